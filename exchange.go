package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// An exchange is one request and its answer: the ResponseWriter that every handler gets, and the record of the request.
type exchange struct {
	answerWriter
	record
}

// A record is what the access log and the metrics say about a request. Each part of the proxy fills in what it knows.
type record struct {
	id         string // X-Request-ID
	route      string // the path of its route; "" if there is none, or the request was refused before
	client     netip.Addr
	key        string // the name of the client's key; "" if it needs none
	start      time.Time
	model      string     // the model that goes to Qwen; "" until it is known
	stream     bool       // the client asks for a stream; known if model is
	usage      tokenUsage // of Qwen's answer
	anthropic  bool       // the client expects the errors of Anthropic's API
	quiet      bool       // the access line is at debug level
	called     bool       // the request has gone to Qwen
	replayed   bool       // it has gone there more than once, because the connection failed
	upstreamID string     // Qwen's own request id
	firstByte  time.Time  // when the first byte of Qwen's answer's body came; zero until then
	err        *apiError  // what failed first; nil if nothing did
}

// fail notes what failed. The first failure counts: others follow from it.
func (rec *record) fail(err *apiError) {
	if rec.err == nil {
		rec.err = err
	}
}

// An answerWriter is the ResponseWriter of one request. It counts what it writes, and gives each write WRITE_TIMEOUT.
type answerWriter struct {
	w       http.ResponseWriter
	rc      *http.ResponseController
	timeout time.Duration
	http2   bool
	status  int   // 0 until the header is written
	bytes   int64 // of the body
}

func (a *answerWriter) Header() http.Header { return a.w.Header() }

// Unwrap is for http.ResponseController.
func (a *answerWriter) Unwrap() http.ResponseWriter { return a.w }

func (a *answerWriter) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
	a.w.WriteHeader(status)
}

func (a *answerWriter) Write(p []byte) (int, error) {
	if a.status == 0 {
		a.WriteHeader(http.StatusOK)
	}
	a.setDeadline()
	n, err := a.w.Write(p)
	a.dropDeadline()
	a.bytes += int64(n)
	return n, err
}

// FlushError is Flush with its error, as http.ResponseController looks for it.
func (a *answerWriter) FlushError() error {
	a.setDeadline()
	err := a.rc.Flush()
	a.dropDeadline()
	return err
}

func (a *answerWriter) setDeadline() {
	a.rc.SetWriteDeadline(time.Now().Add(a.timeout)) // an error shows in the write
}

// dropDeadline takes the deadline back in HTTP/2. There it is a timer that resets the stream, also while Qwen is silent. And a
// timer that is set after the client has reset the stream keeps the stream in memory until it fires.
func (a *answerWriter) dropDeadline() {
	if a.http2 {
		a.rc.SetWriteDeadline(time.Time{})
	}
}

// end is called when the handler has returned and its answer is whole. net/http still writes the answer's end, and the deadline
// of the last write may be over. In HTTP/2 no deadline may outlive the handler, so what net/http holds back is written here.
func (a *answerWriter) end() error {
	if a.http2 {
		return a.FlushError()
	}
	a.setDeadline()
	return nil
}

// answerError answers with err, and reports whether it did: a client that has left gets no answer. The request must have had no
// other answer yet.
func (x *exchange) answerError(err error) bool {
	e := toAPIError(err)
	x.fail(e)
	if e == errClientLeft {
		return false // it may have closed only its own half of the connection, and must not get an empty 200
	}
	h := x.Header()
	maps.Copy(h, e.header)
	if x.upstreamID != "" {
		h.Set("X-Upstream-Request-Id", x.upstreamID)
	}
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	if e.retryAfter > 0 {
		h.Set("Retry-After", retryAfterSeconds(e.retryAfter))
	}
	x.WriteHeader(e.status)
	x.Write(x.errorBody(e)) // a client that has left needs no answer
	return true
}

// errorBody returns e as JSON on one line, in OpenAI's shape, and with the type that Anthropic's clients look for.
func (x *exchange) errorBody(e *apiError) []byte {
	type detail struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"`
		Code    *string `json:"code"`
	}
	var answer struct {
		Type      string `json:"type,omitempty"`
		Error     detail `json:"error"`
		RequestID string `json:"request_id"`
	}
	if x.anthropic {
		answer.Type = "error"
	}
	answer.Error = detail{Message: strings.TrimSpace(e.message + " " + e.hint), Type: e.typ}
	if e.param != "" {
		answer.Error.Param = &e.param
	}
	if e.code != "" {
		answer.Error.Code = &e.code
	}
	answer.RequestID = x.id
	b, err := json.Marshal(answer)
	if err != nil {
		panic(err) // strings alone always marshal
	}
	return b
}

// outcome returns the status for the log and the metrics. Before an answer has begun it is the error's status.
func (x *exchange) outcome() int {
	switch {
	case x.status != 0:
		return x.status
	case x.err != nil:
		return x.err.status
	}
	return http.StatusOK // net/http's, for a handler that wrote nothing
}

// log writes the access line. detail is for DEBUG_MODE.
func (x *exchange) log(r *http.Request, log *slog.Logger, took time.Duration, detail bool) {
	status, level := x.outcome(), slog.LevelInfo
	if status >= 500 {
		level = slog.LevelError
	}
	// Streams of HTTP/2 can be opened and reset faster than answered (CVE-2023-44487), and a line each would fill a disk.
	if x.quiet || x.http2 && !x.called && r.Context().Err() != nil {
		level = slog.LevelDebug
	}
	if !log.Enabled(r.Context(), level) {
		return
	}
	attrs := append(make([]slog.Attr, 0, 24),
		slog.String("request_id", x.id),
		slog.String("method", clip(r.Method, 20)),
		slog.String("path", clip(r.URL.Path, 200)),
		slog.Int("status", status),
		slog.Float64("duration_ms", milliseconds(took)),
	)
	if !x.firstByte.IsZero() {
		attrs = append(attrs, slog.Float64("first_byte_ms", milliseconds(x.firstByte.Sub(x.start))))
	}
	client := "unix"
	if x.client.IsValid() {
		client = x.client.String()
	}
	attrs = append(attrs, slog.Int64("bytes", x.bytes), slog.String("client", client))
	if x.key != "" {
		attrs = append(attrs, slog.String("key", x.key))
	}
	if x.model != "" {
		attrs = append(attrs, slog.String("model", clip(x.model, 100)), slog.Bool("stream", x.stream))
	}
	for i, kind := range tokenKinds {
		if x.usage.known[i] {
			attrs = append(attrs, slog.Int64(kind+"_tokens", x.usage.tokens[i]))
		}
	}
	if x.upstreamID != "" {
		attrs = append(attrs, slog.String("upstream_request_id", x.upstreamID))
	}
	if x.replayed {
		attrs = append(attrs, slog.Bool("replayed", true))
	}
	if x.err != nil {
		attrs = append(attrs, slog.String("error_type", x.err.typ), slog.String("error", x.err.Error()))
	}
	if detail {
		attrs = append(attrs, slog.String("proto", r.Proto), slog.Int64("request_bytes", r.ContentLength), slog.Any("headers", safeHeaders(r)))
	}
	log.LogAttrs(r.Context(), level, "request", attrs...)
}

// milliseconds returns d in milliseconds, to the microsecond.
func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// safeHeaders returns the names of the request's headers, at most 50, and the values of those that never hold a secret.
func safeHeaders(r *http.Request) slog.Value {
	attrs := []slog.Attr{slog.String("Host", clip(r.Host, 200))}
	for name, values := range r.Header {
		value := "(not shown)"
		switch name {
		case "Accept", "Accept-Encoding", "Content-Type", "Content-Length", "User-Agent", "Origin", "Sec-Fetch-Site", "Connection":
			value = clip(strings.Join(values, ", "), 200)
		}
		if attrs = append(attrs, slog.String(name, value)); len(attrs) == 50 {
			break
		}
	}
	return slog.GroupValue(attrs...)
}

// requestID returns the client's X-Request-ID if it is 1 to 128 characters of [A-Za-z0-9._-], else a new one.
func requestID(r *http.Request) string {
	const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
	ids := r.Header["X-Request-Id"]
	if len(ids) == 1 && 0 < len(ids[0]) && len(ids[0]) <= 128 && strings.Trim(ids[0], allowed) == "" {
		return ids[0]
	}
	return rand.Text()
}

// The categories of failure: an error body's type and the log's error_type.
const (
	typeAuthentication = "authentication_error"
	typeInvalidRequest = "invalid_request_error"
	typeNetwork        = "network_error"
	typeRateLimit      = "rate_limit_error"
	typeStreaming      = "streaming_error"
	typeConfiguration  = "configuration_error"
	typeServer         = "server_error"
)

// Failures that neither Qwen nor the network to it has caused.
var (
	// 499 is nginx's status for a client that left before its answer. It is only logged.
	errClientLeft = &apiError{status: 499, typ: typeNetwork, code: "client_closed_request",
		message: "The client closed the connection, or received nothing for WRITE_TIMEOUT."}
	errShuttingDown = &apiError{status: http.StatusServiceUnavailable, typ: typeServer, code: "shutting_down", retryAfter: time.Second,
		message: "The proxy is shutting down. Try again."}
	errDefect = &apiError{status: http.StatusInternalServerError, typ: typeServer, code: "internal_error",
		message: "The proxy failed to handle the request. Its log says why."}
)

// An apiError is the answer to a client whose request failed, in the shape of OpenAI's errors. Those that code decides on are
// variables, and compared with ==.
type apiError struct {
	status     int           // HTTP status
	typ        string        // one of the type constants
	code       string        // "" is JSON null
	param      string        // the member of the request that is wrong; "" is JSON null
	message    string        // says what to do next; no secrets, no message text
	hint       string        // follows message in the answer, and is left out of the log; may be ""
	retryAfter time.Duration // the Retry-After header, rounded up to seconds; 0 for none
	header     http.Header   // other headers of the answer; may be nil
	err        error         // what happened, for the log alone; may be nil
}

func (e *apiError) Error() string {
	if e.err != nil {
		return e.message + " (" + e.err.Error() + ")"
	}
	return e.message
}

func (e *apiError) Unwrap() error { return e.err }

// ours reports whether neither Qwen nor the network to it has caused e.
func (e *apiError) ours() bool {
	return e == errClientLeft || e == errShuttingDown || e == errOverloaded || e == errDefect
}

// because returns e with what happened, for the log.
func (e *apiError) because(err error) *apiError {
	with := *e
	with.err = err
	return &with
}

// invalidRequest returns a 400 about param, a member of the request's body ("" for the body as a whole).
func invalidRequest(param, code, format string, args ...any) *apiError {
	return &apiError{status: http.StatusBadRequest, typ: typeInvalidRequest, param: param, code: code, message: fmt.Sprintf(format, args...)}
}

// toAPIError turns any error of a request into the client's answer. An error that is not an apiError comes from the network to Qwen;
// its text is for the log alone.
func toAPIError(err error) *apiError {
	if e, ok := errors.AsType[*apiError](err); ok {
		return e
	}
	if errors.Is(err, context.Canceled) {
		return errClientLeft
	}
	return &apiError{status: http.StatusBadGateway, typ: typeNetwork, code: "upstream_unreachable",
		message: "Qwen could not be reached, or ended the connection before it answered. Try again. If that does not help, check the proxy's network and its log.", err: err}
}

// retryAfterSeconds is the Retry-After header's value for d (RFC 9110 §10.2.3), at least 1.
func retryAfterSeconds(d time.Duration) string {
	return strconv.FormatInt(max(1, int64(math.Ceil(d.Seconds()))), 10)
}
