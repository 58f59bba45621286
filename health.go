package main

import (
	"context"
	"encoding/json"
	"math"
	"net/http"
	"runtime"
	"sync/atomic"
	"time"
)

// A health answers questions about the server's state. It never starts a refresh or a sign-in.
type health struct {
	tokens   *tokenSource
	metrics  *metrics
	stopping atomic.Bool          // the server is shutting down
	logged   atomic.Pointer[bool] // whether the server was ready at the last call of note; nil before the first
}

// follow logs each change of readiness, until ctx ends.
func (h *health) follow(ctx context.Context) {
	for ctx.Err() == nil {
		st := h.tokens.state.Load()
		h.note()
		select {
		case <-ctx.Done():
		case <-st.changed:
		case <-time.After(maxNap): // for changes without an event: 401s, and tokens that expire
		}
	}
}

// note logs a change of readiness. It ignores a shutdown, which has log lines of its own.
func (h *health) note() {
	err := h.tokens.ready()
	ready := err == nil
	switch last := h.logged.Swap(&ready); {
	case last == nil || *last == ready:
	case ready:
		h.tokens.log.Info("the server is ready")
	default:
		h.tokens.log.Warn("the server is not ready", "reason", err.message)
	}
}

// writeJSON answers with v.
func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // track answers with an error
	}
	writeBody(w, status, append(b, '\n'))
}

// writeBody answers with b, a JSON document.
func writeBody(w http.ResponseWriter, status int, b []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	w.Write(b)
}

// root handles GET /.
func (h *health) root(x *exchange, _ *http.Request) error {
	writeJSON(x, http.StatusOK, map[string]string{"message": "Qwen API proxy is running", "version": version().Version})
	return nil
}

// live handles GET /health: the process serves.
func (h *health) live(x *exchange, _ *http.Request) error {
	x.quiet = true
	writeJSON(x, http.StatusOK, map[string]string{"status": "healthy"})
	return nil
}

// reason returns why the server is not ready, nil if it is.
func (h *health) reason() *apiError {
	if h.stopping.Load() {
		return errShuttingDown
	}
	return h.tokens.ready()
}

// ready handles GET /health/ready.
func (h *health) ready(x *exchange, _ *http.Request) error {
	x.quiet = true
	h.note()
	if err := h.reason(); err != nil {
		writeJSON(x, http.StatusServiceUnavailable, map[string]string{"status": "not_ready", "code": err.code, "reason": err.message})
		return nil
	}
	writeJSON(x, http.StatusOK, map[string]string{"status": "ready"})
	return nil
}

// detailed handles GET /health/detailed.
func (h *health) detailed(x *exchange, _ *http.Request) error {
	type auth struct {
		Method        string     `json:"method"` // "oauth" or "api_key"
		Authenticated bool       `json:"authenticated"`
		Reason        string     `json:"reason,omitempty"`
		Expires       *time.Time `json:"expires_at,omitempty"`
		Upstream      string     `json:"upstream,omitempty"`
		SignIn        string     `json:"sign_in,omitempty"`
	}
	st := h.tokens.state.Load()
	a := auth{Method: "oauth", SignIn: h.tokens.flow.state().status}
	if h.tokens.keyed() {
		a.Method = "api_key"
	}
	if err := h.tokens.ready(); err != nil {
		a.Reason = err.message
	} else {
		a.Authenticated = true
	}
	if t := st.token; t != nil {
		if !t.expiry.IsZero() {
			a.Expires = &t.expiry
		}
		if t.base != nil {
			a.Upstream = t.base.String()
		}
	}
	status := "healthy"
	if h.reason() != nil {
		status = "degraded"
	}
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	writeJSON(x, http.StatusOK, map[string]any{
		"status":         status,
		"version":        version().Version,
		"uptime_seconds": math.Round(time.Since(h.metrics.started).Seconds()),
		"requests": map[string]int64{
			"total":           h.metrics.requests.Load(),
			"in_flight":       h.metrics.inFlight.Load(),
			"open_streams":    h.metrics.streams.Load(),
			"rate_limited":    h.metrics.rateLimited.Load(),
			"upstream_errors": h.metrics.upstreamFailures(),
		},
		"memory":     map[string]uint64{"heap_bytes": withoutBallast(mem.HeapAlloc), "system_bytes": withoutBallast(mem.Sys)},
		"goroutines": runtime.NumGoroutine(),
		"auth":       a,
		"request_id": x.id(),
	})
	return nil
}
