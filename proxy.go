package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// anthropicPath is where Qwen's hosts have their Anthropic-compatible interface.
const anthropicPath = "/apps/anthropic/v1"

// maxErrorBody bounds how much of an upstream's error answer is read to see what it is, in bytes.
const maxErrorBody = 64 << 10

// maxWait bounds how long the client waits without any answer while an error's body comes in pieces.
const maxWait = 10 * time.Second

// Why a call to Qwen was cut off, as its context's cause.
var (
	errUpstreamTimeout = &apiError{status: http.StatusGatewayTimeout, typ: typeNetwork, code: "upstream_timeout",
		message: "Qwen did not answer in time. Try again, or raise UPSTREAM_TIMEOUT on the proxy."}
	errStreamIdle = &apiError{status: http.StatusGatewayTimeout, typ: typeStreaming, code: "upstream_idle",
		message: "Qwen fell silent in the middle of its answer. Try again, or raise STREAM_IDLE_TIMEOUT on the proxy."}
)

// A proxy forwards requests to Qwen's API with the proxy's own credentials. It is safe for concurrent use.
type proxy struct {
	cfg       *config
	tokens    tokenSource
	bodies    bodyReader
	metrics   *metrics
	buffers   copyBuffers
	transport http.RoundTripper
}

// newProxy returns a proxy over transport, which must not follow redirects nor unpack bodies.
func newProxy(cfg *config, tokens tokenSource, m *metrics, transport http.RoundTripper) *proxy {
	return &proxy{cfg: cfg, tokens: tokens, bodies: newBodyReader(cfg), metrics: m, transport: transport}
}

// fresh returns a transport for one request, over a new connection.
func (p *proxy) fresh() http.RoundTripper {
	t, ok := p.transport.(*http.Transport)
	if !ok {
		return p.transport // of a test
	}
	t = t.Clone()
	t.DisableKeepAlives = true
	return t
}

// newTransport returns the transport for calls to Qwen.
func newTransport() *http.Transport {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         dialer.DialContext,
		TLSHandshakeTimeout: 10 * time.Second,
		ForceAttemptHTTP2:   true, // a stream takes 59 kB then, and 105 kB over HTTP/1.1
		DisableCompression:  true, // bodies pass as they are
		MaxIdleConnsPerHost: 256,
		ReadBufferSize:      2 << 10, // enough for events; each stream holds one
		IdleConnTimeout:     90 * time.Second,
		// A connection that died without a word is found out before a request waits for it.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second},
	}
}

// copyBuffers are the buffers that answers are copied through.
type copyBuffers struct{ pool sync.Pool }

func (c *copyBuffers) Get() []byte {
	if b, ok := c.pool.Get().(*[16 << 10]byte); ok {
		return b[:]
	}
	return make([]byte, 16<<10)
}

func (c *copyBuffers) Put(b []byte) { c.pool.Put((*[16 << 10]byte)(b)) }

// forward returns the handler that proxies requests to path below the API's base URL. Their body must have the member required,
// unless that is "". A text completion, whose member is prompt, is translated to a chat completion. All that can fail before the
// call fails before anything goes to Qwen.
func (p *proxy) forward(path, required string) handler {
	return func(x *exchange, r *http.Request) error {
		body, err := p.bodies.read(x, r)
		if err != nil {
			return err
		}
		c := &call{proxy: p, x: x, path: path, body: body, out: streamWriter{exchange: x}, whole: buffer{memory: p.bodies.memory}}
		defer c.body.release()
		defer c.whole.release()
		member := required
		if required == "prompt" {
			if err := promptToChat(body); err != nil {
				return err
			}
			c.completion, member = true, "messages"
		}
		if err := p.prepare(x, body, member); err != nil {
			return err
		}
		if c.token, err = p.tokens.Token(r.Context()); err != nil {
			return err
		}
		if c.token.baseErr != nil {
			return baseRefused(c.token.baseErr)
		}
		return c.do(r)
	}
}

// messages returns the handler that proxies requests to path of the Anthropic-compatible interface.
func (p *proxy) messages(path string) handler {
	if p.cfg.apiKey != "" {
		return p.forward(anthropicPath+path, "messages")
	}
	return func(*exchange, *http.Request) error {
		return &apiError{status: http.StatusNotFound, typ: typeInvalidRequest, code: "endpoint_not_found",
			message: "Qwen's Anthropic-compatible interface works only with an API key. Use /v1/chat/completions, or set QWEN_API_KEY on the proxy."}
	}
}

// prepare checks the members of a body that the proxy depends on. It puts in the default model if there is none, and an alias's
// model. All other bytes stay as they are. It notes model and stream in x.
func (p *proxy) prepare(x *exchange, body *requestBody, required string) error {
	names := []string{"model", "stream", required}
	if required == "" {
		names = names[:2]
	}
	found, err := findMembers(body.data, names...)
	if err != nil {
		return err
	}
	if required != "" {
		switch v := found[2].of(body.data); {
		case isNull(v):
			return invalidRequest(required, "missing_required_parameter", "The request has no %q. It is required.", required)
		case required == "messages" && v[0] != '[':
			return invalidRequest(required, "invalid_type", "%q must be an array of messages.", required)
		case required == "input" && v[0] != '[' && v[0] != '"':
			return invalidRequest(required, "invalid_type", "%q must be a string or an array.", required)
		}
	}
	stream := string(found[1].of(body.data))
	switch stream {
	case "", "null", "true", "false":
	default:
		return invalidRequest("stream", "invalid_type", `"stream" must be true or false.`)
	}
	model, name := found[0], p.cfg.defaultModel
	switch v := model.of(body.data); {
	case len(v) == 0: // missing: it goes first
		at := bytes.IndexByte(body.data, '{') + 1
		insert := `"model":` + jsonString(p.cfg.defaultModel)
		if body.data[skipSpace(body.data, at)] != '}' {
			insert += ","
		}
		body.replace(at, at, insert)
	case string(v) == "null" || string(v) == `""`:
		body.replace(model.start, model.end, jsonString(p.cfg.defaultModel))
	case v[0] != '"':
		return invalidRequest("model", "invalid_type", `"model" must be a string.`)
	default:
		name = modelName(v)
		if real, ok := p.cfg.aliases[name]; ok {
			name = real
			body.replace(model.start, model.end, jsonString(name))
		}
	}
	x.model, x.stream = name, stream == "true"
	return nil
}

// modelName returns the model that v, a JSON string, names; "" if it is invalid, or too long to be an alias or to be logged.
func modelName(v []byte) string {
	switch {
	case len(v) > 1<<10:
		return ""
	case utf8.Valid(v) && bytes.IndexByte(v, '\\') < 0: // without this, json.Unmarshal would allocate for each request
		return string(v[1 : len(v)-1])
	}
	var name string
	json.Unmarshal(v, &name)
	return name
}

// A call is one request to Qwen and its answer. It is the Rewrite, the Transport and the ModifyResponse of a ReverseProxy.
type call struct {
	*proxy
	x          *exchange
	path       string // below the API's base URL; one of the Anthropic-compatible interface is whole
	body       *requestBody
	token      *token
	completion bool // a text completion, which is translated
	out        streamWriter
	whole      buffer // an answer that is read whole
	err        error  // why there is no answer to pass on

	ctx    context.Context
	cancel context.CancelCauseFunc
	tried  attempt

	silence *time.Timer // cuts the call off; it runs while the call waits for Qwen
}

// do sends the request to Qwen and its answer to the client, or returns why there is none.
func (c *call) do(r *http.Request) error {
	c.x.called = true
	c.ctx, c.cancel = context.WithCancelCause(httptrace.WithClientTrace(r.Context(), c.tried.trace()))
	defer c.cancel(nil)
	c.silence = time.AfterFunc(c.cfg.upstreamTimeout, func() { c.cancel(errUpstreamTimeout) })
	defer func() { c.silence.Stop() }()
	defer c.out.stop()
	r = r.WithContext(c.ctx)
	r.Header = forwardedHeaders(r.Header)
	reverse := httputil.ReverseProxy{
		Rewrite:        c.rewrite,
		Transport:      c,
		ModifyResponse: c.modifyResponse,
		ErrorHandler:   func(_ http.ResponseWriter, _ *http.Request, err error) { c.err = err },
		BufferPool:     &c.buffers,
		ErrorLog:       discardLog,
	}
	reverse.ServeHTTP(&c.out, r)
	return c.err
}

// discardLog drops what ReverseProxy logs: the access log says the same, with the request's id.
var discardLog = log.New(io.Discard, "", 0)

// forwardedHeaders returns the headers of a client's request that Qwen needs, and Connection: ReverseProxy takes out what that
// lists. All others stay here.
func forwardedHeaders(h http.Header) http.Header {
	forwarded := http.Header{}
	for _, name := range []string{"Accept", "Accept-Language", "Idempotency-Key", "Anthropic-Version", "Anthropic-Beta", "Connection"} {
		if values, ok := h[name]; ok {
			forwarded[name] = values
		}
	}
	return forwarded
}

// The headers of every request to Qwen, and those of requests with a sign-in's token. Nothing writes to the values.
var (
	upstreamHeaders = http.Header{"Content-Type": {"application/json"}, "User-Agent": {userAgent}}
	oauthHeaders    = http.Header{"X-Dashscope-Authtype": {"qwen-oauth"}, "X-Dashscope-Cachecontrol": {"enable"}}
)

// rewrite points the request at Qwen and sets the bearer token. ReverseProxy has removed hop-by-hop headers by then, so no client
// can have the token removed.
func (c *call) rewrite(r *httputil.ProxyRequest) {
	h := r.Out.Header
	maps.Copy(h, upstreamHeaders)
	h["X-Request-Id"] = []string{c.x.id}
	if !c.token.isKey() {
		maps.Copy(h, oauthHeaders)
	}
	r.Out.Method = http.MethodPost
	r.Out.Trailer = nil // HTTP/2 would send it
	r.Out.TransferEncoding = nil
	r.Out.GetBody = nil // with it net/http would send the request again by rules of its own
	c.setUpstream(r.Out)
}

// setUpstream points req at the API of the call's token, with the token and a new reader of the body.
func (c *call) setUpstream(req *http.Request) {
	base := c.token.base
	path := c.path
	if !strings.HasPrefix(path, anthropicPath) {
		path = base.Path + path
	}
	req.URL = &url.URL{Scheme: base.Scheme, Host: base.Host, Path: path}
	req.Host = ""
	req.Header["Authorization"] = []string{c.token.authorization}
	req.Body = c.body.open()
	req.ContentLength = int64(len(c.body.data))
}

// RoundTrip sends the request, and once more with another token if Qwen answers 401 to the first.
func (c *call) RoundTrip(req *http.Request) (*http.Response, error) {
	// The context that ReverseProxy made would hand on the upstream's 1xx answers.
	res, err := c.send(req.WithContext(c.ctx))
	if err == nil && res.StatusCode == http.StatusUnauthorized {
		res.Body.Close() // unread: it may never end
		res, err = c.renew(req)
	}
	if err != nil {
		return nil, c.cause(err)
	}
	if res.StatusCode < 300 {
		c.tokens.accepted()
	}
	passed := *res // without trailers: net/http puts those of the upstream into res
	passed.Trailer = nil
	return &passed, nil
}

// renew sends the request again with another token, since Qwen answered 401 to the first. It fails if there is no other, or if
// Qwen refuses that one too.
func (c *call) renew(req *http.Request) (*http.Response, error) {
	fresh, err := c.tokens.Replace(c.ctx, c.token)
	if err != nil {
		return nil, err
	}
	c.token = fresh
	if fresh.baseErr != nil {
		return nil, baseRefused(fresh.baseErr)
	}
	c.silence.Reset(c.cfg.upstreamTimeout)
	res, err := c.send(c.again(req))
	if err == nil && res.StatusCode == http.StatusUnauthorized {
		res.Body.Close()
		return nil, c.tokens.refused()
	}
	return res, err
}

// replayWindow is how soon a dead kept-alive connection shows that it is dead. On one that fails later, Qwen may have worked.
const replayWindow = time.Second

// send makes one round trip. If it fails and it is safe (see mayResend), send makes a second one over a new connection: others
// that were kept alive may be dead too.
func (c *call) send(req *http.Request) (*http.Response, error) {
	transport := c.transport
	if c.x.replayed {
		transport = c.fresh()
	}
	c.tried.conn = nil
	res, err := transport.RoundTrip(req)
	if err != nil && c.ctx.Err() == nil && !c.x.replayed && c.tried.mayResend(err) {
		if c.tried.sent.Load() {
			c.x.replayed = true
			c.metrics.replays.Add(1)
		}
		res, err = c.fresh().RoundTrip(c.again(req))
	}
	if err == nil {
		c.x.upstreamID = clip(c.token.redact(res.Header.Get("X-Request-Id")), 128)
	}
	return res, err
}

// again returns a copy of req to send: a transport may still read req.
func (c *call) again(req *http.Request) *http.Request {
	req = req.Clone(c.ctx)
	c.setUpstream(req)
	return req
}

// An attempt is what httptrace tells of the latest attempt to send a request.
type attempt struct {
	conn     net.Conn // nil until there is one
	reused   bool     // conn has carried a request before
	start    time.Time
	sent     atomic.Bool // some of the request may have been written
	answered atomic.Bool // a byte of an answer has come
}

func (a *attempt) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			a.conn, a.reused, a.start = info.Conn, info.Reused, time.Now()
			a.sent.Store(false)
			a.answered.Store(false)
		},
		WroteHeaders:         func() { a.sent.Store(true) },
		GotFirstResponseByte: func() { a.answered.Store(true) },
	}
}

func (a *attempt) http2() bool {
	c, ok := a.conn.(*tls.Conn)
	return ok && c.ConnectionState().NegotiatedProtocol == "h2"
}

// mayResend reports whether the request may be sent again after this attempt, which failed with err. Qwen bills what it
// executes. Over HTTP/2 a dead connection shows before it is used, and Qwen says what it has not processed: only that is sent
// again. Over HTTP/1.1 a connection that was kept alive for too long looks like one that breaks while Qwen works: the request is
// sent again if the connection failed at once. A new connection that fails is never a reason.
func (a *attempt) mayResend(err error) bool {
	switch {
	case a.conn == nil:
		return false
	case a.http2():
		return !a.sent.Load() || unprocessed(err)
	}
	return a.reused && !a.answered.Load() && time.Since(a.start) < replayWindow
}

// unprocessed reports whether err says that Qwen has not processed a request over HTTP/2 (RFC 9113 §8.7: a GOAWAY for a
// lower stream, REFUSED_STREAM). net/http does not export these errors, so their text decides. If it ever changes, the
// request is not sent again, which is safe.
func unprocessed(err error) bool {
	if errors.Is(err, os.ErrClosed) { // net/http closed the body unread, because the connection could take no more requests
		return true
	}
	reason, ok := strings.CutPrefix(err.Error(), "http2: Transport: cannot retry err [")
	return ok && (strings.Contains(reason, "GOAWAY") || strings.Contains(reason, "REFUSED_STREAM"))
}

// cause returns why the call failed: what cut it off, if something did, else err.
func (c *call) cause(err error) error {
	if cause := context.Cause(c.ctx); cause != nil {
		return cause
	}
	return c.token.redactError(err) // net/http quotes what it can't read
}

// brokenBy returns the error for an answer that ended with err before it was whole.
func (c *call) brokenBy(err error) *apiError {
	if c.ctx.Err() != nil {
		return toAPIError(c.cause(err))
	}
	if err == io.EOF { // too early
		err = io.ErrUnexpectedEOF
	}
	return errBroken.because(c.cause(err))
}

// allowedResponseHeaders are those of Qwen's that a client needs. No other passes.
var allowedResponseHeaders = []string{
	"Content-Type", "Content-Length", "Content-Encoding", "Content-Language", "Retry-After", "Retry-After-Ms", "X-Should-Retry",
	"X-Ratelimit-Limit-Requests", "X-Ratelimit-Limit-Tokens", "X-Ratelimit-Remaining-Requests", "X-Ratelimit-Remaining-Tokens",
	"X-Ratelimit-Reset-Requests", "X-Ratelimit-Reset-Tokens",
}

// modifyResponse turns Qwen's answer into the client's: a stream or a JSON answer passes as it is, or translated; an error of
// OpenAI's shape passes as it is; anything else becomes an error. It is the ModifyResponse of ReverseProxy.
func (c *call) modifyResponse(res *http.Response) error {
	c.silence.Stop()
	c.silence = time.AfterFunc(c.cfg.idleTimeout, func() { c.cancel(errStreamIdle) })
	c.body.answerBegan()
	// RFC 9112 §6.3, rule 8: nothing but the connection's end tells the answer's.
	delimited := res.ProtoMajor == 1 && res.ContentLength < 0 && len(res.TransferEncoding) == 0
	h := res.Header
	maps.DeleteFunc(h, func(name string, values []string) bool {
		return !slices.Contains(allowedResponseHeaders, name) || slices.ContainsFunc(values, c.token.quotedIn)
	})
	if c.x.upstreamID != "" {
		h["X-Upstream-Request-Id"] = []string{c.x.upstreamID}
	}
	compressed := isCompressed(h) // it passes unread: its own format shows a cut
	upstream := &upstreamBody{ReadCloser: res.Body, call: c, count: res.StatusCode == http.StatusOK && !compressed}
	res.Body = upstream
	if res.StatusCode != http.StatusOK {
		return c.passError(res)
	}
	body := &answerBody{Closer: upstream, call: c, text: upstream, delimited: delimited}
	res.Body = body
	mediaType, _, _ := strings.Cut(h.Get("Content-Type"), ";")
	stream := strings.EqualFold(strings.TrimSpace(mediaType), "text/event-stream")
	switch {
	case stream && !compressed:
		c.passStream(res, body)
		return nil
	case c.completion:
		return c.readWhole(res, delimited)
	case compressed:
		return nil
	case delimited || 0 < res.ContentLength && res.ContentLength <= shortAnswer:
		return c.readWhole(res, delimited)
	}
	return body.checkBegin(res.StatusCode)
}

// isCompressed reports whether an answer with header h is compressed.
func isCompressed(h http.Header) bool {
	encoding := h.Get("Content-Encoding")
	return encoding != "" && !strings.EqualFold(encoding, "identity")
}

// passStream passes an event stream on.
func (c *call) passStream(res *http.Response, body *answerBody) {
	body.stream = true
	if c.completion {
		body.text = &completionStream{lines: bufio.NewReader(body.text)}
	}
	res.ContentLength = -1 // comments or an error event may come on top of what is announced
	res.Header.Del("Content-Length")
	res.Header["Cache-Control"] = []string{"no-cache"}
	res.Header["X-Accel-Buffering"] = []string{"no"} // nginx passes each event on at once then
	c.out.start(c.cfg.keepAlive)
	c.metrics.streams.Add(1)
}

// shortAnswer is the size of a JSON answer, in bytes, up to which it is read whole before any of it passes. net/http would hold
// back about as much anyway, and drop it with the connection if the answer breaks off.
const shortAnswer = 4 << 10

// readWhole reads a JSON answer before any of it passes: one that is translated, a short one, or one that only the connection's end
// delimits and that is whole if it is valid.
func (c *call) readWhole(res *http.Response, delimited bool) error {
	// An answer that drips is never silent. Silence comes first, for it has a message of its own.
	defer time.AfterFunc(c.cfg.upstreamTimeout+c.cfg.idleTimeout, func() { c.cancel(errUpstreamTimeout) }).Stop()
	length := c.bodies.max
	if res.ContentLength >= 0 {
		length = min(length, res.ContentLength)
	}
	err := c.whole.fill(res.Body, length, func(int) {})
	text := net.Buffers{c.whole.data}
	switch {
	case err == errTooLong || err == nil && !mayBeJSON(c.whole.data):
		return notAnAnswer(res.StatusCode, err)
	case err == errOverloaded:
		return err
	case err != nil:
		return c.brokenBy(err)
	case delimited && !json.Valid(c.whole.data):
		return c.brokenBy(io.EOF)
	case c.completion:
		if text, err = translate(c.whole.data, "message"); err != nil {
			return notAnAnswer(res.StatusCode, err)
		}
		res.Header.Set("Content-Type", "application/json")
	}
	setBody(res, text)
	return nil
}

// setBody makes text the whole body of res.
func setBody(res *http.Response, text net.Buffers) {
	res.Body.Close()
	res.Body = io.NopCloser(&text)
	res.ContentLength = 0
	for _, piece := range text {
		res.ContentLength += int64(len(piece))
	}
	res.Header["Content-Length"] = []string{strconv.FormatInt(res.ContentLength, 10)}
}

// passError passes an error answer of OpenAI's shape as it is, and a compressed one. It wraps any other, and one that quotes the
// token. A 4xx or 5xx status and Retry-After are kept.
func (c *call) passError(res *http.Response) error {
	status := res.StatusCode
	if status < 400 || status > 599 {
		return notAnAnswer(status, nil)
	}
	late := time.AfterFunc(min(maxWait, c.cfg.idleTimeout), func() { c.cancel(errStreamIdle) })
	text, err := io.ReadAll(io.LimitReader(res.Body, maxErrorBody+1))
	late.Stop()
	if err != nil {
		err = c.cause(err) // the status is an answer all the same
	}
	detail, ok := openAIError(text)
	if isCompressed(res.Header) {
		detail, ok = "(compressed)", true
	} else {
		res.Header.Set("Content-Type", "application/json")
	}
	detail = clip(c.token.redact(res.Status+" "+detail), 150)
	if ok && err == nil && len(text) <= maxErrorBody && !c.tokenIn(text) {
		c.x.fail(&apiError{status: status, typ: categoryOf(status), message: "Qwen answered " + detail})
		setBody(res, net.Buffers{text})
		return nil
	}
	maps.DeleteFunc(res.Header, func(name string, _ []string) bool { return strings.HasPrefix(name, "Content-") })
	e := &apiError{status: status, typ: categoryOf(status), code: "upstream_error", header: res.Header, err: cmp.Or(err, errors.New(detail)),
		message: fmt.Sprintf("Qwen answered with status %d and something that can't be passed on, such as a gateway's page. Try again. If that does not help, check API_BASE_URL on the proxy, and the proxy's log.", status)}
	switch {
	case status == http.StatusNotFound && c.path == "/responses":
		e.code = "endpoint_not_found"
		e.message = `The API behind the proxy has no /responses. Use /v1/chat/completions; in n8n's OpenAI nodes turn off "Use Responses API".`
	case status == http.StatusNotFound:
		e.code = "endpoint_not_found"
		e.message = fmt.Sprintf("The API behind the proxy has no %s. Check API_BASE_URL on the proxy.", c.path)
	}
	return e
}

// tokenIn reports whether an answer contains the call's token, be it in gzip, whatever its header says, or escaped in JSON.
func (c *call) tokenIn(text []byte) bool {
	if r, err := gzip.NewReader(bytes.NewReader(text)); err == nil {
		text, _ = io.ReadAll(io.LimitReader(r, maxErrorBody)) // what there is of it
	}
	if c.token.quotedIn(string(text)) {
		return true
	}
	for dec := json.NewDecoder(bytes.NewReader(text)); ; {
		part, err := dec.Token()
		if err != nil {
			return false
		}
		if s, ok := part.(string); ok && c.token.quotedIn(s) {
			return true
		}
	}
}

// openAIError reports whether b is an error of OpenAI's shape, and returns its type and code, for the log.
func openAIError(b []byte) (detail string, ok bool) {
	var e struct {
		Error *struct {
			Message *string         `json:"message"`
			Type    string          `json:"type"`
			Code    json.RawMessage `json:"code"`
		} `json:"error"`
	}
	if json.Unmarshal(b, &e) != nil || e.Error == nil || e.Error.Message == nil {
		return "", false
	}
	return e.Error.Type + " " + string(e.Error.Code), true
}

// categoryOf returns the error type for a status of the upstream.
func categoryOf(status int) string {
	switch {
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		return typeAuthentication
	case status == http.StatusTooManyRequests:
		return typeRateLimit
	case status >= 500:
		return typeServer
	}
	return typeInvalidRequest
}

// notAnAnswer returns the error for an answer with this status that is not from Qwen's API.
func notAnAnswer(status int, err error) *apiError {
	return &apiError{status: http.StatusBadGateway, typ: typeNetwork, code: "bad_upstream_answer", err: err,
		message: fmt.Sprintf("The answer (status %d) did not come from Qwen's API, but from a gateway, a redirect or a block page. Try again. If that does not help, check API_BASE_URL on the proxy.", status)}
}

// jsonString returns s as JSON.
func jsonString(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // a string always marshals
	}
	return string(b)
}
