package main

import (
	"crypto/rand"
	"crypto/tls"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"path"
	"runtime/debug"
	"strings"
	"sync"
	"time"
)

// An exchange is one request and its answer as the access log tells them. It is the ResponseWriter that
// every handler gets.
type exchange struct {
	w            http.ResponseWriter
	rc           *http.ResponseController
	ids          [1]string  // X-Request-ID, as the value of a header
	client       netip.Addr // not valid where it is unknown
	start        time.Time
	writeTimeout time.Duration
	http2        bool
	anthropic    bool      // the client is one of Anthropic's interface
	err          *apiError // what failed, first; nil where nothing did
	upstreamID   string    // Qwen's own request id
	called       bool      // the request has gone to Qwen
	replayed     bool      // it has gone there more than once, because the connection failed
	quiet        bool      // the access line is at debug level
	firstByte    time.Time // when the first byte of Qwen's answer's body came; zero until then

	mu        sync.Mutex // guards w and what follows: a keep-alive is written from another goroutine
	status    int        // 0 until the header is written
	bytes     int64      // of the body
	lastWrite time.Time
	deadline  time.Time   // of the connection's writes
	unflushed bool        // net/http may hold some of the answer back
	sse       bool        // the body is an event stream
	beat      *time.Timer // writes the stream's keep-alives; nil for none
	tail      [4]byte     // the last bytes of an event stream
	done      bool        // the handler has returned: w is no longer ours
}

// id returns the request's X-Request-ID.
func (x *exchange) id() string { return x.ids[0] }

func (x *exchange) Header() http.Header { return x.w.Header() }

// Unwrap is for http.ResponseController.
func (x *exchange) Unwrap() http.ResponseWriter { return x.w }

func (x *exchange) WriteHeader(status int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.writeHeader(status)
}

func (x *exchange) writeHeader(status int) {
	if x.status == 0 {
		x.status = status
		x.lastWrite = time.Now()
	}
	x.unflushed = true
	x.w.WriteHeader(status)
	if x.sse {
		// The client shall know at once that it is served. Besides, net/http needs much stack to write a header, and further in
		// there is more on it.
		x.flush()
	}
}

func (x *exchange) Write(p []byte) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.write(p)
}

func (x *exchange) write(p []byte) (int, error) {
	if x.status == 0 {
		x.writeHeader(http.StatusOK)
	}
	x.renewDeadline()
	x.unflushed = true
	n, err := x.w.Write(p)
	x.dropDeadline()
	x.bytes += int64(n)
	if x.sse {
		x.tail = lastBytes(x.tail, p[:n])
	}
	return n, err
}

// FlushError is Flush with its error, as http.ResponseController looks for it.
func (x *exchange) FlushError() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.flush()
}

func (x *exchange) flush() error {
	x.renewDeadline()
	x.unflushed = false
	err := x.rc.Flush()
	x.dropDeadline()
	return err
}

// renewDeadline gives the next write writeTimeout. It is not moved for each of a quick succession of
// writes, since that costs more than the write's own bookkeeping; the sixteenth put on top makes up for it.
func (x *exchange) renewDeadline() {
	x.lastWrite = time.Now()
	slack := x.writeTimeout / 16
	if x.deadline.Sub(x.lastWrite) < x.writeTimeout {
		x.deadline = x.lastWrite.Add(x.writeTimeout + slack)
		x.rc.SetWriteDeadline(x.deadline) // an error shows in the write
	}
}

// dropDeadline takes the deadline back in HTTP/2. There it is a timer that resets the stream, also while nothing is being
// written: it would bound Qwen's silences. And a timer that is set after the client has reset the stream keeps the stream
// in memory until it fires.
func (x *exchange) dropDeadline() {
	if x.http2 {
		x.deadline = time.Time{}
		x.rc.SetWriteDeadline(x.deadline)
	}
}

// stream notes that the body is an event stream. Where its client has heard nothing for every, it gets a comment
// (WHATWG EventSource, "authors can include a comment line every 15 seconds or so"); 0 for none.
func (x *exchange) stream(every time.Duration) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.sse = true
	if every > 0 {
		x.beat = time.AfterFunc(every, func() { x.keepAlive(every) })
	}
}

// keepAlive writes a comment where one is due and the stream stands between two events.
func (x *exchange) keepAlive(every time.Duration) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.done {
		return
	}
	next := every
	if silent := time.Since(x.lastWrite); silent < every {
		next -= silent
	} else if x.status != 0 && betweenEvents(x.tail, x.bytes) {
		if _, err := x.write([]byte(": keep-alive\n\n")); err == nil {
			x.flush()
		}
	}
	x.beat.Reset(next)
}

// lastBytes returns the last four bytes of tail and p together.
func lastBytes(tail [4]byte, p []byte) [4]byte {
	if len(p) >= 4 {
		return [4]byte(p[len(p)-4:])
	}
	copy(tail[:], tail[len(p):])
	copy(tail[4-len(p):], p)
	return tail
}

// betweenEvents reports whether an event stream of n bytes that ends in tail has ended its last line and the
// blank one behind it. Lines end in LF, CRLF or CR.
func betweenEvents(tail [4]byte, n int64) bool {
	if n == 0 {
		return true
	}
	end := tail[:]
	if n < 4 {
		end = tail[4-n:]
	}
	rest, ok := trimNewline(end)
	if !ok {
		return false
	}
	_, ok = trimNewline(rest)
	return ok || len(rest) == 0 // a blank line alone
}

// trimNewline returns s without the line end at its end, and whether there was one.
func trimNewline(s []byte) ([]byte, bool) {
	switch n := len(s); {
	case n >= 2 && s[n-2] == '\r' && s[n-1] == '\n':
		return s[:n-2], true
	case n >= 1 && (s[n-1] == '\n' || s[n-1] == '\r'):
		return s[:n-1], true
	}
	return s, false
}

// fail notes what failed, for the log. The first failure counts: others follow from it.
func (x *exchange) fail(err *apiError) {
	if x.err == nil {
		x.err = err
	}
}

// finish ends x: no handler writes to it any more. If the answer is whole, net/http has its end yet to write, such as that of
// a chunked body, and the deadline of the last write may have passed long ago. In HTTP/2 no deadline may outlive the
// handler (see dropDeadline), so what net/http holds back is written here; the frame that ends the stream never waits.
func (x *exchange) finish(whole bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case x.http2:
		if whole && x.unflushed && x.flush() != nil {
			x.fail(errNotTaken)
		}
		x.rc.SetReadDeadline(time.Time{})
	case whole:
		x.renewDeadline()
	}
	x.done = true
	if x.beat != nil {
		x.beat.Stop()
	}
}

// answerError answers with err, of which it writes nothing but the apiError's message. It is for requests that have had no
// other answer yet.
func (x *exchange) answerError(err error) {
	e := toAPIError(err)
	x.fail(e)
	if e.status == statusClientClosedRequest {
		// Nobody reads an answer. A client that has closed only its own half of the connection must not get the empty 200 of
		// a handler that just returns.
		panic(http.ErrAbortHandler)
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
	x.Write(x.errorBody(e)) // a client that's gone needs no answer
}

// errorBody returns the JSON by which the client learns of e.
func (x *exchange) errorBody(e *apiError) []byte {
	b := e.body(x.id())
	if x.anthropic {
		b = append([]byte(`{"type":"error",`), b[1:]...)
	}
	return b
}

// anthropicPath reports whether a request to path expects the errors of Anthropic's API.
func anthropicPath(p string) bool {
	p = strings.TrimPrefix(path.Clean("/"+p), "/v1")
	return p == "/messages" || strings.HasPrefix(p, "/messages/")
}

// Header values that never change. net/http reads them only.
var (
	valueNosniff    = []string{"nosniff"}
	valueDeny       = []string{"DENY"}
	valueNoReferrer = []string{"no-referrer"}
	valueHSTS       = []string{"max-age=31536000"}
	valueClose      = []string{"close"}
)

// track is the outermost handler: it gives each request its exchange, id and security headers, calls next, answers for its
// error or panic, and counts and logs the request.
func track(cfg *config, log *slog.Logger, m *metrics, next handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x := begin(cfg, w, r)
		m.requests.Add(1)
		m.inFlight.Add(1)
		defer func() {
			v := recover()
			if v == http.ErrAbortHandler {
				x.fail(errNotTaken) // where nothing else has failed
			}
			if v != nil && v != http.ErrAbortHandler {
				log.Error("a defect of the proxy: please report it", "request_id", x.id(), "panic", v, "stack", string(debug.Stack()))
				err := &apiError{status: http.StatusInternalServerError, typ: typeServer, code: codeInternal,
					message: "The proxy failed to handle the request. Its log says why."}
				x.fail(err)
				if x.status == 0 {
					x.answerError(err)
					v = nil
				}
			}
			x.finish(v == nil)
			took := time.Since(x.start)
			m.inFlight.Add(-1)
			m.ended(x, r.Pattern, took)
			x.log(r, log, took, cfg.debug)
			if v != nil {
				resetHTTP10(r)
				panic(http.ErrAbortHandler) // an answer that was begun must not look whole
			}
		}()
		if err := next(x, r); err != nil {
			x.answerError(err)
		}
	})
}

// begin returns the exchange of r, with what every answer's header has.
func begin(cfg *config, w http.ResponseWriter, r *http.Request) *exchange {
	x := &exchange{w: w, rc: http.NewResponseController(w), ids: [1]string{requestID(r)}, start: time.Now(), writeTimeout: cfg.writeTimeout, http2: r.ProtoMajor == 2, anthropic: anthropicPath(r.URL.Path)}
	h := w.Header()
	h["X-Request-Id"] = x.ids[:]
	if _, ok := r.Header["Anthropic-Version"]; ok {
		h["Request-Id"] = x.ids[:] // where Anthropic's clients, which all send that, look for it
	}
	h["X-Content-Type-Options"] = valueNosniff
	h["X-Frame-Options"] = valueDeny
	h["Referrer-Policy"] = valueNoReferrer
	if r.TLS != nil {
		h["Strict-Transport-Security"] = valueHSTS
	}
	if len(r.TransferEncoding) > 0 {
		// net/http takes a request with both Transfer-Encoding and Content-Length, and then hides the
		// latter. "the server MUST close the connection after responding to such a request" (RFC 9112 §6.1).
		h["Connection"] = valueClose
	}
	if !x.http2 && r.Body != http.NoBody {
		// What a handler leaves of the body net/http reads, and would wait for without end.
		x.rc.SetReadDeadline(x.start.Add(cfg.readTimeout))
	}
	return x
}

// connKey is where a request's context has its connection.
type connKey struct{}

// resetHTTP10 makes the connection of an HTTP/1.0 request end by a reset: such a client takes the connection's end for
// that of the answer.
func resetHTTP10(r *http.Request) {
	if r.ProtoAtLeast(1, 1) {
		return
	}
	c, _ := r.Context().Value(connKey{}).(net.Conn)
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if c, ok := c.(*net.TCPConn); ok {
		c.SetLinger(0)
	}
}

// outcome returns the status of x, which has ended: where no answer was begun that of what failed.
func (x *exchange) outcome() int {
	switch {
	case x.status != 0:
		return x.status
	case x.err != nil:
		return x.err.status
	}
	return http.StatusOK // net/http's, for a handler that wrote nothing
}

// log writes the access line.
func (x *exchange) log(r *http.Request, log *slog.Logger, took time.Duration, detail bool) {
	status, level := x.outcome(), slog.LevelInfo
	if status >= 500 {
		level = slog.LevelError
	}
	if x.http2 && !x.called && r.Context().Err() != nil {
		// Streams can be opened and reset faster than answered (CVE-2023-44487), and a line each would fill a disk.
		level = slog.LevelDebug
	}
	if x.quiet {
		level = slog.LevelDebug
	}
	if !log.Enabled(r.Context(), level) {
		return
	}
	attrs := make([]slog.Attr, 0, 16)
	attrs = append(attrs,
		slog.String("request_id", x.id()),
		slog.String("method", clip(r.Method, 20)),
		slog.String("path", clip(r.URL.Path, 200)),
		slog.Int("status", status),
		slog.Float64("duration_ms", milliseconds(took)),
	)
	if !x.firstByte.IsZero() {
		attrs = append(attrs, slog.Float64("first_byte_ms", milliseconds(x.firstByte.Sub(x.start))))
	}
	attrs = append(attrs, slog.Int64("bytes", x.bytes), slog.String("client", x.clientName()))
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

func (x *exchange) clientName() string {
	if !x.client.IsValid() {
		return "unix"
	}
	return x.client.String()
}

// milliseconds returns d in milliseconds, to the microsecond.
func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// safeHeaders returns the request's headers for a debug log: the names of all, and the values of those
// that hold no secret whatever the client puts there on purpose.
func safeHeaders(r *http.Request) slog.Value {
	attrs := []slog.Attr{slog.String("Host", clip(r.Host, 200))}
	for name, values := range r.Header {
		switch name {
		case "Accept", "Accept-Encoding", "Content-Type", "Content-Length", "User-Agent", "Origin", "Sec-Fetch-Site", "Connection":
			attrs = append(attrs, slog.String(name, clip(strings.Join(values, ", "), 200)))
		default:
			attrs = append(attrs, slog.String(name, "(not shown)"))
		}
		if len(attrs) == 50 {
			break
		}
	}
	return slog.GroupValue(attrs...)
}

// requestID returns the client's X-Request-ID where it is 1 to 128 characters of [A-Za-z0-9._-], else a new one.
func requestID(r *http.Request) string {
	if ids := r.Header["X-Request-Id"]; len(ids) == 1 && validRequestID(ids[0]) {
		return ids[0]
	}
	return rand.Text()
}

func validRequestID(s string) bool {
	if s == "" || len(s) > 128 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-') {
			return false
		}
	}
	return true
}
