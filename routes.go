package main

import (
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"path"
	"runtime/debug"
	"strings"
	"time"
)

// A handler answers a request, or returns why it did not. track answers with the error.
type handler func(x *exchange, r *http.Request) error

// A route is one endpoint.
type route struct {
	method string // GET stands for HEAD too
	path   string // in the README, in the metrics and, but for its ending, in the mux
	access accessClass
	handle handler
}

// An accessClass says what the server checks before a route's handler runs.
type accessClass int

const (
	public  accessClass = iota // nothing
	keyed                      // the client's key; the rate limit where it is wrong
	limited                    // the key and the rate limit
	private                    // the same, and without keys only clients of this machine and of private networks
)

// A server finds the route of each request, checks whether the client may use it, and calls its handler.
type server struct {
	access  *access
	metrics *metrics
	limiter *rateLimiter // nil limits nothing
	routes  []route
	mux     *http.ServeMux // its handlers are the routes, and are not called
}

// newRoutes returns the routes, in the README's order.
func newRoutes(p *proxy, models *models, tokens tokenSource, h *health) []route {
	return []route{
		{"POST", "/v1/chat/completions", limited, p.forward("/chat/completions", "messages")},
		{"POST", "/v1/completions", limited, p.forward("/chat/completions", "prompt")},
		{"POST", "/v1/embeddings", limited, p.forward("/embeddings", "input")},
		{"POST", "/v1/responses", limited, p.forward("/responses", "")},
		{"POST", "/v1/messages", limited, p.messages("/messages")},
		{"POST", "/v1/messages/count_tokens", limited, p.messages("/messages/count_tokens")},
		{"GET", "/v1/models", limited, models.show},
		{"GET", "/v1/models/{id}", limited, models.show},
		{"GET", "/auth", private, authHandler(tokens)},
		{"GET", "/health", public, h.live},
		{"GET", "/health/ready", public, h.ready},
		{"GET", "/health/detailed", keyed, h.detailed},
		{"GET", "/metrics", keyed, h.prometheus},
		{"GET", "/", public, h.root},
	}
}

// newHandler returns the handler of all requests.
func newHandler(cfg *config, log *slog.Logger, tokens tokenSource, keys *access, m *metrics, h *health, transport http.RoundTripper) http.Handler {
	s := &server{
		access: keys, metrics: m, limiter: newRateLimiter(cfg.rateLimit, cfg.rateBurst),
		routes: newRoutes(newProxy(cfg, tokens, m, transport), newModels(cfg, tokens, transport, log), tokens, h),
		mux:    http.NewServeMux(),
	}
	for i := range s.routes {
		rt := &s.routes[i]
		m.register(rt.path)
		for _, pattern := range rt.patterns() {
			s.mux.Handle(pattern, rt)
		}
	}
	return track(cfg, log, m, s.dispatch)
}

// ServeHTTP makes rt a handler of the mux, which only finds it.
func (rt *route) ServeHTTP(http.ResponseWriter, *http.Request) {}

// patterns returns the route's patterns in a ServeMux. A path with /v1 has a second one without it.
func (rt *route) patterns() []string {
	path := strings.Replace(rt.path, "{id}", "{id...}", 1) // the ids of models have slashes
	if path == "/" {
		path = "/{$}"
	}
	patterns := []string{rt.method + " " + path}
	if bare, ok := strings.CutPrefix(path, "/v1"); ok {
		patterns = append(patterns, rt.method+" "+bare)
	}
	return patterns
}

// track is the outermost handler: it gives each request its exchange, calls next, answers for its error or panic, and counts
// and logs the request.
func track(cfg *config, log *slog.Logger, m *metrics, next handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x := begin(cfg, w, r)
		m.requests.Add(1)
		m.inFlight.Add(1)
		whole := callHandler(x, r, log, next)
		if whole && x.end() != nil {
			x.fail(errClientLeft)
		}
		took := time.Since(x.start)
		m.inFlight.Add(-1)
		m.ended(x, took)
		m.countTokens(x)
		x.log(r, log, took, cfg.debug)
		if !whole {
			panic(http.ErrAbortHandler) // net/http cuts the connection, so that the answer does not look whole
		}
	})
}

// securityHeaders are in every answer. Nothing writes to the values.
var securityHeaders = http.Header{"X-Content-Type-Options": {"nosniff"}, "X-Frame-Options": {"DENY"}, "Referrer-Policy": {"no-referrer"}}

// begin returns the exchange of r, and sets the headers that every answer has.
func begin(cfg *config, w http.ResponseWriter, r *http.Request) *exchange {
	if clean := path.Clean("/" + strings.TrimPrefix(r.URL.Path, "/")); clean != r.URL.Path {
		// A base URL that ends in a slash makes /v1//chat/completions. ServeMux would redirect, and a redirected POST arrives as a GET.
		r.URL.Path, r.URL.RawPath = clean, ""
	}
	bare := strings.TrimPrefix(r.URL.Path, "/v1")
	x := &exchange{
		answerWriter: answerWriter{w: w, rc: http.NewResponseController(w), timeout: cfg.writeTimeout, http2: r.ProtoMajor == 2},
		record: record{id: requestID(r), start: time.Now(),
			anthropic: bare == "/messages" || strings.HasPrefix(bare, "/messages/")},
	}
	h := w.Header()
	h["X-Request-Id"] = []string{x.id}
	if _, ok := r.Header["Anthropic-Version"]; ok {
		h["Request-Id"] = []string{x.id} // where Anthropic's clients look for it
	}
	maps.Copy(h, securityHeaders)
	if r.TLS != nil {
		h.Set("Strict-Transport-Security", "max-age=31536000")
	}
	if len(r.TransferEncoding) > 0 {
		// net/http takes a request with both Transfer-Encoding and Content-Length, and then hides the
		// latter. "the server MUST close the connection after responding to such a request" (RFC 9112 §6.1).
		h.Set("Connection", "close")
	}
	if !x.http2 && r.Body != http.NoBody {
		// net/http reads what a handler leaves of the body, and would wait for it without end.
		x.rc.SetReadDeadline(x.start.Add(cfg.readTimeout))
	}
	return x
}

// callHandler calls next and answers its error or panic. It reports whether the answer is whole.
func callHandler(x *exchange, r *http.Request, log *slog.Logger, next handler) (whole bool) {
	defer func() {
		switch v := recover(); v {
		case nil:
		case http.ErrAbortHandler: // ReverseProxy could not pass the answer on
			x.fail(errClientLeft)
		default:
			log.Error("a bug in the proxy: please report it", "request_id", x.id, "panic", v, "stack", string(debug.Stack()))
			x.fail(errDefect)
			whole = x.status == 0 && x.answerError(errDefect)
		}
	}()
	if err := next(x, r); err != nil {
		return x.answerError(err)
	}
	return true
}

// dispatch answers r, or returns why it did not. It calls one handler, which no other handler wraps: all of them would be on the
// stack for as long as a stream lasts, and double it to 16 kB.
func (s *server) dispatch(x *exchange, r *http.Request) error {
	c := s.access.client(r)
	x.client, x.key = c.addr, c.key
	s.access.allowOrigin(x.Header(), r)
	if err := s.access.check(r, c); err != nil {
		return err
	}
	if isPreflight(r) {
		preflight(x, r)
		return nil
	}
	rt := s.find(r)
	x.route = rt.path
	if err := s.admit(x.Header(), r, c, rt.access); err != nil {
		return err
	}
	return rt.handle(x, r)
}

// find returns the route of r.
func (s *server) find(r *http.Request) *route {
	h, _ := s.mux.Handler(r)
	if rt, ok := h.(*route); ok {
		return rt
	}
	return &route{access: limited, handle: s.noRoute}
}

// admit reports why c, the client of r, may not use routes of the class. It sets the X-RateLimit headers in h.
func (s *server) admit(h http.Header, r *http.Request, c client, class accessClass) error {
	if class == public {
		return nil
	}
	if s.limiter != nil && (class != keyed || !c.admitted) { // a wrong key counts wherever it is tried
		if err := s.limiter.check(h, c.rate); err != nil {
			s.metrics.rateLimited.Add(1)
			return err
		}
	}
	if !c.admitted {
		return errNoKey
	}
	if class == private && !s.access.required() && !s.access.isLocal(r, c) {
		return errNotLocal
	}
	return nil
}

// noRoute handles what no route matches: 405 where another method would match, else 404.
func (s *server) noRoute(_ *exchange, r *http.Request) error {
	var allow []string
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		if _, pattern := s.mux.Handler(&http.Request{Method: method, URL: r.URL}); pattern != "" {
			allow = append(allow, method)
		}
	}
	if len(allow) == 0 {
		var list []string
		for _, rt := range s.routes {
			list = append(list, rt.method+" "+rt.path)
		}
		return &apiError{status: http.StatusNotFound, typ: typeInvalidRequest, code: "unknown_url",
			message: fmt.Sprintf("There is no %s.", clip(r.URL.Path, 100)), hint: "The proxy has " + strings.Join(list, ", ") + "."}
	}
	message := fmt.Sprintf("Method %s is not allowed here. Use %s.", clip(r.Method, 20), strings.Join(allow, " or "))
	if allow[0] == http.MethodGet {
		allow = append(allow, http.MethodHead)
	}
	return &apiError{status: http.StatusMethodNotAllowed, typ: typeInvalidRequest, code: "method_not_allowed", message: message,
		header: http.Header{"Allow": {strings.Join(allow, ", ")}}}
}
