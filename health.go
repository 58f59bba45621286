package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"runtime"
	"sync/atomic"
	"time"
)

// A health answers questions about the server's state. It never starts a refresh or a sign-in.
type health struct {
	tokens   tokenSource
	metrics  *metrics
	log      *slog.Logger
	stopping atomic.Bool // the server is shutting down
}

// watch logs each change of readiness until ctx ends. It calls tell with each reason for not being ready, and with "" when
// the server is ready.
func (h *health) watch(ctx context.Context, tell func(reason string)) {
	const unknown = "unknown"
	last := unknown
	for ok := true; ok; ok = sleep(ctx, time.Second) {
		reason := ""
		if err := h.tokens.ready(); err != nil {
			reason = err.message
		}
		if reason != last {
			tell(reason)
		}
		switch {
		case last == unknown || (reason == "") == (last == ""):
		case reason == "":
			h.log.Info("the server is ready")
		default:
			h.log.Warn("the server is not ready", "reason", reason)
		}
		last = reason
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
	st, err := h.tokens.status(), h.tokens.ready()
	a := auth{Method: st.method, Authenticated: err == nil}
	if err != nil {
		a.Reason = err.message
	}
	if st.flow != nil {
		a.SignIn = st.flow.signIn().status
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
	tokens := map[string]int64{"input": 0, "output": 0, "cached": 0}
	for _, counts := range h.metrics.allTokens() {
		for i, kind := range tokenKinds {
			tokens[kind] += counts[i]
		}
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
		"tokens":     tokens,
		"memory":     map[string]uint64{"heap_bytes": withoutBallast(mem.HeapAlloc), "system_bytes": withoutBallast(mem.Sys)},
		"goroutines": runtime.NumGoroutine(),
		"auth":       a,
		"request_id": x.id,
	})
	return nil
}

// healthcheckCommand asks the server that the same environment configures for /health.
func healthcheckCommand(ctx context.Context, cfg *config, _, stderr io.Writer) int {
	res, err := askServer(ctx, cfg, "/health")
	if err == nil {
		res.Body.Close()
		if res.StatusCode != http.StatusOK {
			err = fmt.Errorf("/health answered %s", res.Status)
		}
	}
	if err != nil {
		fmt.Fprintf(stderr, "qwen-go-proxy healthcheck: %v\n", err)
		return 1
	}
	return 0
}

// errAnyPort says why a server can't be asked: its configuration does not say where it listens.
var errAnyPort = errors.New("SERVER_PORT=0 picks any port, so there is none to ask")

// askServer gets path from the server that cfg configures. The caller closes the answer's body.
func askServer(ctx context.Context, cfg *config, path string) (*http.Response, error) {
	network, address := cfg.addr() // to dial 0.0.0.0 or :: is to dial this machine
	if network == "tcp" && cfg.port == 0 {
		return nil, errAnyPort
	}
	scheme := "http"
	if cfg.tls {
		scheme = "https"
	}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
		// The certificate is for the server's public name, and this asks by its address. Nothing secret is sent.
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://localhost"+path, nil)
	if err != nil {
		return nil, err
	}
	return client.Do(req)
}
