package main

import (
	"bytes"
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
)

// The endpoints of the upstream's API, behind its base URL.
const (
	pathChat       = "/chat/completions"
	pathEmbeddings = "/embeddings"
	pathResponses  = "/responses"
)

// Those of its Anthropic-compatible interface, behind its host.
const (
	anthropic       = "/apps/anthropic"
	pathMessages    = anthropic + "/v1/messages"
	pathCountTokens = anthropic + "/v1/messages/count_tokens"
)

// maxErrorBody bounds how much of an upstream's error answer is read to see what it is, in bytes.
const maxErrorBody = 1 << 20

// maxErrorTime bounds how long such an answer may take to arrive. Until then the client waits without a word.
const maxErrorTime = 10 * time.Second

// maxTranslated bounds an answer that is translated as a whole, in bytes. A text completion is a hundredth of it.
const maxTranslated = 2 << 20

// Why a call to Qwen was cut off, as its context's cause.
var (
	errUpstreamTimeout = &apiError{status: http.StatusGatewayTimeout, typ: typeNetwork, code: "upstream_timeout",
		message: "Qwen did not answer in time. Try again, or raise UPSTREAM_TIMEOUT on the proxy."}
	errStreamIdle = &apiError{status: http.StatusGatewayTimeout, typ: typeStreaming, code: "upstream_idle",
		message: "Qwen fell silent in the middle of its answer. Try again, or raise STREAM_IDLE_TIMEOUT on the proxy."}
	errShuttingDown = &apiError{status: http.StatusServiceUnavailable, typ: typeServer, code: "shutting_down", retryAfter: time.Second,
		message: "The proxy is shutting down. Try again."}
)

// A proxy forwards requests to Qwen's API with the proxy's own credentials, by an httputil.ReverseProxy. What
// can fail happens before it or in the RoundTripper beneath it.
type proxy struct {
	cfg       *config
	tokens    tokenSource
	bodies    bodyReader
	metrics   *metrics
	buffers   copyBuffers
	transport http.RoundTripper
	fresh     http.RoundTripper // the same, but with a new connection for each request
	reverse   httputil.ReverseProxy

	defaultModel []byte            // as JSON
	aliases      map[string][]byte // as JSON
}

// newProxy returns a proxy over transport, which must not follow redirects nor unpack bodies.
func newProxy(cfg *config, tokens tokenSource, m *metrics, transport http.RoundTripper) *proxy {
	p := &proxy{
		cfg: cfg, tokens: tokens, metrics: m, transport: transport, fresh: transport,
		bodies:       newBodyReader(cfg),
		defaultModel: jsonString(cfg.defaultModel),
		aliases:      map[string][]byte{},
	}
	for alias, model := range cfg.aliases {
		p.aliases[alias] = jsonString(model)
	}
	if t, ok := transport.(*http.Transport); ok {
		fresh := t.Clone()
		fresh.DisableKeepAlives = true
		p.fresh = fresh
	}
	p.reverse = httputil.ReverseProxy{
		Rewrite:        p.director,
		Transport:      roundTripper(p.roundTrip),
		ModifyResponse: p.modifyResponse,
		ErrorHandler:   func(_ http.ResponseWriter, r *http.Request, err error) { callOf(r.Context()).err = err },
		BufferPool:     &p.buffers,
		ErrorLog:       log.New(io.Discard, "", 0), // the access log says the same, with the request's id
	}
	return p
}

// newTransport returns the transport for calls to Qwen.
func newTransport() *http.Transport {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         dialer.DialContext,
		TLSHandshakeTimeout: 10 * time.Second,
		ForceAttemptHTTP2:   true, // an event of a stream costs 28 µs then, of 37, and a stream 59 kB, of 105
		DisableCompression:  true, // bodies pass as they are
		MaxIdleConnsPerHost: 256,
		ReadBufferSize:      2 << 10, // what events need, and header and beginning of an answer; each stream holds one
		IdleConnTimeout:     90 * time.Second,
		// A connection that died without a word is found out before a request waits for it.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second},
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// copyBuffers are the buffers that answers are copied through.
type copyBuffers struct{ pool sync.Pool }

func (c *copyBuffers) Get() []byte {
	if b, ok := c.pool.Get().(*[16 << 10]byte); ok {
		return b[:]
	}
	return make([]byte, 16<<10)
}

func (c *copyBuffers) Put(b []byte) { c.pool.Put((*[16 << 10]byte)(b)) }

// A call is one request on its way to Qwen.
type call struct {
	x          *exchange
	path       string // one of the path constants
	ctx        context.Context
	cancel     context.CancelCauseFunc
	body       *requestBody
	token      *token
	completion *completion // nil but for a text completion
	err        error       // why there is no answer to pass on, as ReverseProxy's ErrorHandler got it
	answer     buffer      // a whole answer that is translated
	tried      attempt
	fresh      bool // only a new connection will do: one that was kept alive has failed

	silence  *time.Timer // cuts the call off; it runs while the call waits for Qwen
	answered atomic.Bool // the answer's headers have come
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

type callKey struct{}

func callOf(ctx context.Context) *call { return ctx.Value(callKey{}).(*call) }

// forward returns the handler that proxies requests to path.
func (p *proxy) forward(path string) handler { return p.handler(path, false) }

// messages returns the handler of requests to path, one of the Anthropic-compatible interface, which is for API keys alone.
func (p *proxy) messages(path string) handler {
	if p.cfg.apiKey != "" {
		return p.forward(path)
	}
	return func(*exchange, *http.Request) error {
		return &apiError{status: http.StatusNotFound, typ: typeInvalidRequest, code: "endpoint_not_found",
			message: "Qwen has an Anthropic-compatible interface for API keys alone. Use /v1/chat/completions, or set QWEN_API_KEY on the proxy."}
	}
}

// completions returns the handler of text completions, which go to the chat endpoint, translated.
func (p *proxy) completions() handler { return p.handler(pathChat, true) }

func (p *proxy) handler(path string, translate bool) handler {
	return func(x *exchange, r *http.Request) (err error) {
		c := &call{x: x, path: path, answer: buffer{memory: p.bodies.memory}}
		if c.body, err = p.bodies.read(x, r); err != nil {
			return err
		}
		defer c.body.release()
		defer c.answer.release()
		if err := p.begin(c, translate, r); err != nil {
			return err
		}
		return p.serve(c, x, r)
	}
}

// begin checks the request and gets a token for it: all that can fail before anything goes to Qwen.
func (p *proxy) begin(c *call, translate bool, r *http.Request) (err error) {
	required := requiredMember[c.path]
	if translate {
		if c.completion, err = newCompletion(c.body); err != nil {
			return err
		}
		required = "prompt"
	}
	if err := p.prepare(c.body, required); err != nil {
		return err
	}
	if c.token, err = p.tokens.Token(r.Context()); err != nil {
		return err
	}
	if c.token.baseErr != nil {
		return baseRefused(c.token.baseErr)
	}
	return nil
}

// requiredMember is the member that a request to a path can't do without, beside the model.
var requiredMember = map[string]string{pathChat: "messages", pathEmbeddings: "input", pathMessages: "messages", pathCountTokens: "messages"}

// prepare checks what the proxy has to know of a body, which can't do without the member required ("" for none), and puts in
// the model where it names none, or an alias. All other bytes stay as they are.
func (p *proxy) prepare(body *requestBody, required string) error {
	names := []string{"model", "stream", required}
	if required == "" {
		names = names[:2]
	}
	found, err := findMembers(body.data, names...)
	if err != nil {
		return err
	}
	value := func(i int) []byte { return body.data[found[i].start:found[i].end] }
	if required != "" {
		switch v := value(2); {
		case len(v) == 0 || string(v) == "null":
			return invalidRequest(required, "missing_required_parameter", "The request has no %q. It is required.", required)
		case required == "messages" && v[0] != '[':
			return invalidRequest(required, "invalid_type", "%q has to be an array of messages.", required)
		}
	}
	switch string(value(1)) {
	case "", "null", "true", "false":
	default:
		return invalidRequest("stream", "invalid_type", `"stream" has to be true or false.`)
	}
	switch v := value(0); {
	case len(v) == 0: // missing: it goes first, where it can't run into anything
		at := bytes.IndexByte(body.data, '{') + 1
		insert := append([]byte(`"model":`), p.defaultModel...)
		if body.data[skipSpace(body.data, at)] != '}' {
			insert = append(insert, ',')
		}
		body.replace(at, at, insert)
	case string(v) == "null" || string(v) == `""`:
		body.replace(found[0].start, found[0].end, p.defaultModel)
	case v[0] != '"':
		return invalidRequest("model", "invalid_type", `"model" has to be a string.`)
	case len(p.aliases) > 0:
		if model := p.aliases[modelName(v)]; model != nil {
			body.replace(found[0].start, found[0].end, model)
		}
	}
	body.seal()
	return nil
}

// serve sends the call to Qwen and its answer to the client, or returns why there is none.
func (p *proxy) serve(c *call, w http.ResponseWriter, r *http.Request) error {
	r = p.watch(c, r)
	defer c.cancel(nil)
	defer c.silence.Stop()
	p.reverse.ServeHTTP(w, r)
	return c.err
}

// watch returns the request that goes out for r, under the call's own context. From now on the call waits for Qwen.
func (p *proxy) watch(c *call, r *http.Request) *http.Request {
	c.x.called = true
	c.ctx, c.cancel = context.WithCancelCause(context.WithValue(r.Context(), callKey{}, c))
	c.ctx = httptrace.WithClientTrace(c.ctx, c.tried.trace())
	c.silence = time.AfterFunc(p.cfg.upstreamTimeout, c.silent)
	r = r.WithContext(c.ctx)
	r.Header = onward(r.Header) // from here on it is copied again and again
	return r
}

// onward returns those headers of a request that may go to Qwen.
func onward(h http.Header) http.Header {
	out := make(http.Header, len(allowedRequestHeaders))
	for _, name := range allowedRequestHeaders {
		if v, ok := h[name]; ok {
			out[name] = v
		}
	}
	return out
}

// answerBegan notes that the headers of Qwen's answer have come.
func (p *proxy) answerBegan(c *call) {
	c.silence.Stop()
	c.answered.Store(true)
	c.body.answer()
}

// anthropic reports whether the call is to the Anthropic-compatible interface.
func (c *call) anthropic() bool { return strings.HasPrefix(c.path, anthropic) }

// silent cuts the call off, because Qwen has been silent for too long.
func (c *call) silent() {
	if c.answered.Load() {
		c.cancel(errStreamIdle)
	} else {
		c.cancel(errUpstreamTimeout)
	}
}

// allowedRequestHeaders are those of the client's that Qwen needs, and Connection, by which ReverseProxy takes out what it
// lists. All others stay here.
var allowedRequestHeaders = []string{"Accept", "Accept-Language", "Idempotency-Key", "Anthropic-Version", "Anthropic-Beta", "Connection"}

// Values of headers to Qwen that never change. Nothing writes to them.
var (
	valueJSON      = []string{"application/json"}
	valueUserAgent = []string{userAgent}
	valueOAuth     = []string{"qwen-oauth"}
	valueEnable    = []string{"enable"}
)

// director points a request at Qwen and sets the bearer token. It is the Rewrite of ReverseProxy: hop-by-hop
// headers are gone by then, so no client can have the token removed.
func (p *proxy) director(r *httputil.ProxyRequest) {
	c := callOf(r.In.Context())
	h := r.Out.Header
	h["Content-Type"] = valueJSON
	h["User-Agent"] = valueUserAgent
	h["X-Request-Id"] = c.x.ids[:]
	if !c.token.isKey() {
		h["X-Dashscope-Authtype"] = valueOAuth
		h["X-Dashscope-Cachecontrol"] = valueEnable
	}
	r.Out.Trailer = nil // HTTP/2 would send it
	r.Out.Method = http.MethodPost
	c.aim(r.Out)
}

// aim points req at the API of the call's token, with the token and a fresh reader of the body.
func (c *call) aim(req *http.Request) {
	base := c.token.base
	path := c.path
	if !c.anthropic() {
		path = base.Path + path
	}
	req.URL = &url.URL{Scheme: base.Scheme, Host: base.Host, Path: path}
	req.Host = ""
	req.Header["Authorization"] = []string{c.token.authorization}
	req.Body = c.body.open()
	req.GetBody = nil // with it net/http would send the request again by rules of its own
	req.ContentLength = c.body.size
	req.TransferEncoding = nil
}

// roundTrip sends the request, and sends it once more with a fresh token where the API answers 401 to the
// one it had. It is the Transport of ReverseProxy.
func (p *proxy) roundTrip(req *http.Request) (*http.Response, error) {
	c := callOf(req.Context())
	// The context that ReverseProxy made would hand on the upstream's 1xx answers.
	req = req.WithContext(c.ctx)
	res, err := p.send(c, req)
	switch {
	case err != nil:
	case res.StatusCode == http.StatusUnauthorized:
		res, err = p.renew(c, req, res)
	case res.StatusCode < 300:
		p.tokens.served()
	}
	if err != nil {
		return nil, c.cause(err)
	}
	return res, nil
}

// replayWindow is how soon a kept-alive connection that was dead before shows it. What takes longer to fail may have been
// worked on.
const replayWindow = time.Second

// maxResends bounds how often a request is sent again that Qwen has not processed.
const maxResends = 3

// send makes one round trip. It sends the request again where that is safe (see mayResend).
func (p *proxy) send(c *call, req *http.Request) (*http.Response, error) {
	for n := 0; ; n++ {
		transport := p.transport
		if c.fresh {
			transport = p.fresh
		}
		c.tried.conn = nil
		res, err := transport.RoundTrip(req)
		if err == nil || n == maxResends || c.ctx.Err() != nil || !c.tried.mayResend(err) {
			return res, err
		}
		if c.tried.sent.Load() {
			c.x.replayed = true
			p.metrics.replays.Add(1)
		}
		c.fresh = c.fresh || !c.tried.http2()
		sleep(c.ctx, time.Duration(n*n)*100*time.Millisecond)
		req = req.Clone(c.ctx)
		c.aim(req)
	}
}

// mayResend reports whether the request may be sent again after this attempt, which failed with err. Qwen bills what it
// executes. So over HTTP/2, where a dead connection shows before it is used and Qwen says what it has not processed, only
// that is sent again. Over HTTP/1.1 a connection that was kept alive for too long looks like one that breaks while Qwen
// works: the request is sent again if the connection failed at once. A new connection that fails is never a reason.
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
	if errors.Is(err, os.ErrClosed) {
		// net/http has closed the body without reading it, because the connection could take no more requests, and then
		// tried to send it over another one.
		return true
	}
	reason, ok := strings.CutPrefix(err.Error(), "http2: Transport: cannot retry err [")
	return ok && (strings.Contains(reason, "GOAWAY") || strings.Contains(reason, "REFUSED_STREAM"))
}

// renew sends a request again with another token, since Qwen answered 401 to the first. It fails if there is no other, or if
// Qwen refuses that one too.
func (p *proxy) renew(c *call, req *http.Request, res *http.Response) (*http.Response, error) {
	id := c.upstreamID(res.Header)
	res.Body.Close() // unread: it may never end. The replay may need a new connection.
	fresh, err := p.tokens.Replace(c.ctx, c.token)
	if err != nil {
		c.x.upstreamID = id
		return nil, err
	}
	c.token = fresh
	if fresh.baseErr != nil {
		return nil, baseRefused(fresh.baseErr)
	}
	req = req.Clone(c.ctx)
	c.aim(req)
	c.silence.Reset(p.cfg.upstreamTimeout)
	if res, err = p.send(c, req); err != nil {
		return nil, err
	}
	if res.StatusCode == http.StatusUnauthorized {
		res.Body.Close()
		c.x.upstreamID = id
		return nil, p.tokens.refused()
	}
	if res.StatusCode < 300 {
		p.tokens.served()
	}
	return res, nil
}

// cause returns why the call failed: what cut it off, where something did, else err.
func (c *call) cause(err error) error {
	if cause := context.Cause(c.ctx); cause != nil {
		return cause
	}
	return c.token.redactError(err) // net/http quotes what it can't read
}

// upstreamID returns Qwen's id of a request, "" for none.
func (c *call) upstreamID(h http.Header) string {
	return clip(c.token.redact(h.Get("X-Request-Id")), 128)
}

// allowedResponseHeaders are those of Qwen's that a client needs. No other passes.
var allowedResponseHeaders = []string{
	"Content-Type", "Content-Length", "Content-Encoding", "Content-Language", "Retry-After", "Retry-After-Ms", "X-Should-Retry",
	"X-Ratelimit-Limit-Requests", "X-Ratelimit-Limit-Tokens", "X-Ratelimit-Remaining-Requests", "X-Ratelimit-Remaining-Tokens",
	"X-Ratelimit-Reset-Requests", "X-Ratelimit-Reset-Tokens",
}

// modifyResponse makes of Qwen's answer what the client gets: a stream or a JSON answer as it is, with the
// headers that a client needs; an error of OpenAI's shape as it is; of anything else an error that says so.
func (p *proxy) modifyResponse(res *http.Response) error {
	c := callOf(res.Request.Context())
	if err := p.answer(c, res); err != nil {
		return err
	}
	maps.Copy(c.x.Header(), res.Header)
	res.Header = nil // ReverseProxy would copy each value of it
	return nil
}

func (p *proxy) answer(c *call, res *http.Response) error {
	p.answerBegan(c)
	h := res.Header
	c.x.upstreamID = c.upstreamID(h)
	maps.DeleteFunc(h, func(name string, values []string) bool {
		return !slices.Contains(allowedResponseHeaders, name) || slices.ContainsFunc(values, c.token.quotedIn)
	})
	if c.x.upstreamID != "" {
		h["X-Upstream-Request-Id"] = []string{c.x.upstreamID}
	}
	res.Trailer = nil // else ReverseProxy announces its names; Read drops the values
	res.Body = &upstreamBody{ReadCloser: res.Body, x: c.x, silence: c.silence, limit: p.cfg.idleTimeout}
	body := &responseBody{call: c, res: res, src: res.Body, text: res.Body, delimited: endsWithConnection(res) && !isCompressed(h)}
	if res.StatusCode != http.StatusOK {
		return p.failure(c, res)
	}
	stream := isEventStream(h.Get("Content-Type"))
	if stream {
		res.ContentLength = -1 // else ReverseProxy, which won't see the Content-Type, does not pass each event on at once
	}
	// Nothing can be put into a compressed stream.
	if body.sse = stream && !isCompressed(h); body.sse {
		h["Cache-Control"] = []string{"no-cache"}
		h["X-Accel-Buffering"] = []string{"no"} // nginx passes each event on at once then
		// A comment or an error event may come on top of what is announced.
		h.Del("Content-Length")
		c.x.stream(p.cfg.keepAlive)
		if c.path == pathChat {
			body.ending = &doneEnding{}
		} else {
			body.delimited = false // other streams have ends of their own
		}
		if c.completion != nil {
			body.text = c.completion.stream(body.src)
		}
		res.Body = body
		p.metrics.streams.Add(1)
		body.onClose = func() { p.metrics.streams.Add(-1) }
		return nil
	}
	if body.delimited {
		body.ending = &jsonEnding{}
	}
	if c.completion != nil {
		return p.translate(c, res, body)
	}
	return body.peek(&p.buffers, min(maxPeekTime, p.cfg.idleTimeout))
}

// isEventStream reports whether a Content-Type is that of server-sent events.
func isEventStream(contentType string) bool {
	mediaType, _, _ := strings.Cut(contentType, ";")
	return strings.EqualFold(strings.TrimSpace(mediaType), "text/event-stream")
}

// translate makes a text completion of a whole chat completion.
func (p *proxy) translate(c *call, res *http.Response, body *responseBody) error {
	// An answer that drips is never silent. Silence comes first, for it has a message of its own.
	defer time.AfterFunc(p.cfg.upstreamTimeout+p.cfg.idleTimeout, func() { c.cancel(errUpstreamTimeout) }).Stop()
	err := c.answer.fill(body, maxTranslated, func(int) {})
	if err == errTooLong {
		return notAnAnswer(res.StatusCode, err)
	} else if err != nil {
		return err
	}
	text, _, err := c.completion.translate(c.answer.data, "message")
	if err != nil {
		return notAnAnswer(res.StatusCode, err)
	}
	res.Body.Close()
	res.ContentLength = 0
	for _, piece := range text {
		res.ContentLength += int64(len(piece))
	}
	res.Body = io.NopCloser(&text)
	res.Header["Content-Type"] = valueJSON
	res.Header.Set("Content-Length", strconv.FormatInt(res.ContentLength, 10))
	return nil
}

// isCompressed reports whether an answer with header h is compressed. It passes unread then.
func isCompressed(h http.Header) bool {
	encoding := h.Get("Content-Encoding")
	return encoding != "" && !strings.EqualFold(encoding, "identity")
}

// setJSON makes b the whole body of res, in JSON.
func setJSON(res *http.Response, b []byte) {
	res.Header["Content-Type"] = valueJSON
	res.Header.Del("Content-Encoding")
	setBody(res, b)
}

// setBody makes b the whole body of res.
func setBody(res *http.Response, b []byte) {
	res.Body = io.NopCloser(bytes.NewReader(b))
	res.ContentLength = int64(len(b))
	res.Header.Set("Content-Length", strconv.Itoa(len(b)))
}

// failure passes an error answer of OpenAI's shape as it is, and a compressed one. It wraps any other, and one that quotes the
// token; its status and its Retry-After are kept where it is a 4xx or 5xx.
func (p *proxy) failure(c *call, res *http.Response) error {
	status := res.StatusCode
	if status < 400 || status > 599 {
		return notAnAnswer(status, nil)
	}
	late := time.AfterFunc(min(maxErrorTime, p.cfg.idleTimeout), func() { c.cancel(errStreamIdle) })
	text, err := io.ReadAll(io.LimitReader(res.Body, maxErrorBody+1))
	late.Stop()
	res.Body.Close()
	whole := err == nil && len(text) <= maxErrorBody // where it is not, the status is an answer all the same
	if err != nil {
		err = c.cause(err)
	}
	compressed := isCompressed(res.Header)
	detail, ok := openAIError(text)
	if compressed {
		detail, ok = "(compressed)", true
	}
	quoted := c.tokenIn(text, res.Header.Get("Content-Encoding"))
	if whole && ok && !quoted {
		c.x.fail(&apiError{status: status, typ: categoryOf(status), message: "Qwen answered " + clip(c.token.redact(res.Status+" "+detail), 150)})
		if compressed {
			setBody(res, text)
		} else {
			setJSON(res, text)
		}
		return nil
	}
	e := &apiError{status: status, typ: categoryOf(status), code: "upstream_error", err: err,
		message: fmt.Sprintf("Qwen answered with status %d and something other than an error of its API. Try again; if it lasts, check API_BASE_URL on the proxy.", status)}
	switch {
	case quoted:
		e.message = fmt.Sprintf("Qwen answered with status %d and an error that quotes the proxy's own credentials, so it is not passed on. The proxy's log has its type and code.", status)
		e.err = fmt.Errorf("its type and code: %q", clip(c.token.redact(detail), 150))
	case status == http.StatusNotFound && c.path == pathResponses:
		e.code = "endpoint_not_found"
		e.message = `The API behind the proxy has no /responses. Use /v1/chat/completions; in n8n's OpenAI nodes turn off "Use Responses API".`
	case status == http.StatusNotFound:
		e.code = "endpoint_not_found"
		e.message = fmt.Sprintf("The API behind the proxy has no %s. Check API_BASE_URL on the proxy.", c.path)
	}
	c.x.fail(e)
	setJSON(res, c.x.errorBody(e))
	return nil
}

// tokenIn reports whether an answer contains the call's token, be it in gzip or escaped in JSON.
func (c *call) tokenIn(text []byte, encoding string) bool {
	if strings.EqualFold(encoding, "gzip") {
		if r, err := gzip.NewReader(bytes.NewReader(text)); err == nil {
			text, _ = io.ReadAll(io.LimitReader(r, maxErrorBody)) // what there is of it
		}
	}
	var v any
	if bytes.IndexByte(text, '\\') >= 0 && json.Unmarshal(text, &v) == nil {
		var plain bytes.Buffer
		enc := json.NewEncoder(&plain)
		enc.SetEscapeHTML(false)
		if enc.Encode(v) == nil && c.token.quotedIn(plain.String()) {
			return true
		}
	}
	return c.token.quotedIn(string(text))
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

// categoryOf returns the error type that a status of the upstream's stands for.
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

// notAnAnswer is what the client is told when the upstream's answer is of no use.
func notAnAnswer(status int, err error) *apiError {
	return &apiError{status: http.StatusBadGateway, typ: typeNetwork, code: "bad_upstream_answer", err: err,
		message: fmt.Sprintf("What answered in Qwen's place (status %d) is not its API: a gateway, a redirect or a block page. Try again; if it lasts, check API_BASE_URL on the proxy.", status)}
}

// jsonString returns s as JSON.
func jsonString(s string) []byte {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // a string always marshals
	}
	return b
}
