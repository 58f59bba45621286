package main

import (
	"fmt"
	"log/slog"
	"net/http"
	"path"
)

// newHandler returns the whole server's handler. From the outside in: track (id, log, panics), guard (names and origins,
// the client's address), the routes, the limiter, the key, the endpoint.
func newHandler(cfg *config, log *slog.Logger, tokens *tokenSource, keys *access, m *metrics, h *health, transport http.RoundTripper) http.Handler {
	p := newProxy(cfg, tokens, m, transport)
	models := newModels(cfg, tokens, transport, log)
	limiter := newRateLimiter(cfg.rateLimit, cfg.rateBurst)
	limited := func(next http.HandlerFunc) http.Handler { return keys.admit(limiter, next) }
	keyed := func(next http.HandlerFunc) http.Handler { return keys.admit(nil, next) }
	auth := http.HandlerFunc(tokens.auth)
	if !keys.required() {
		auth = private(auth)
	}

	rt := &router{metrics: m, full: http.NewServeMux(), bare: http.NewServeMux()}
	rt.handle("GET /{$}", http.HandlerFunc(h.root))
	rt.handle("GET /health", http.HandlerFunc(h.live))
	rt.handle("GET /health/ready", http.HandlerFunc(h.ready))
	rt.handle("GET /health/detailed", keyed(h.detailed))
	rt.handle("GET /metrics", keyed(h.prometheus))
	rt.handle("GET /auth", limited(auth))
	for _, prefix := range []string{"/v1", ""} {
		rt.handle("GET "+prefix+"/models", limited(models.all))
		rt.handle("GET "+prefix+"/models/{id...}", limited(models.one))
		rt.handle("POST "+prefix+"/chat/completions", limited(p.forward(pathChat)))
		rt.handle("POST "+prefix+"/completions", limited(p.completions()))
		rt.handle("POST "+prefix+"/embeddings", limited(p.forward(pathEmbeddings)))
		rt.handle("POST "+prefix+"/responses", limited(p.forward(pathResponses)))
		rt.handle("POST "+prefix+"/messages", limited(p.messages(pathMessages)))
		rt.handle("POST "+prefix+"/messages/count_tokens", limited(p.messages(pathCountTokens)))
	}
	rt.full.Handle("/", limited(rt.unmatched))
	// guard and what admit asks are no handlers around the next one: those would be on the stack for as long as a stream
	// lasts, and double it to 16 kB.
	return track(cfg, log, m, func(w http.ResponseWriter, r *http.Request) {
		if keys.guard(w, r) {
			rt.ServeHTTP(w, r)
		}
	})
}

// A router is a ServeMux whose own answers have the shape of the API's errors.
type router struct {
	metrics *metrics
	full    *http.ServeMux // the routes, and unmatched for all else
	bare    *http.ServeMux // the routes alone, to find out what is wrong with a request that matches none
}

func (rt *router) handle(pattern string, h http.Handler) {
	rt.metrics.register(pattern)
	rt.full.Handle(pattern, h)
	rt.bare.Handle(pattern, h)
}

func (rt *router) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.RequestURI == "*" || r.Method == http.MethodConnect { // ServeMux has answers of its own for these
		rt.unmatched(w, r)
		return
	}
	if clean := path.Clean("/" + r.URL.Path); clean != r.URL.Path {
		// A base URL that ends in a slash makes /v1//chat/completions. ServeMux would redirect, and a
		// redirected POST arrives as a GET.
		r.URL.Path, r.URL.RawPath = clean, ""
	}
	rt.full.ServeHTTP(w, r)
}

// unmatched answers what no route matches: 405 where another method would match, else 404.
func (rt *router) unmatched(w http.ResponseWriter, r *http.Request) {
	h, pattern := rt.bare.Handler(r)
	if pattern == "" {
		var plain discardResponse
		h.ServeHTTP(&plain, r)
		if allow := plain.Header().Get("Allow"); allow != "" {
			w.Header().Set("Allow", allow)
			writeError(w, r, &apiError{status: http.StatusMethodNotAllowed, typ: typeInvalidRequest, code: "method_not_allowed",
				message: fmt.Sprintf("%s is not allowed here, but %s.", clip(r.Method, 20), allow)})
			return
		}
	}
	writeError(w, r, &apiError{status: http.StatusNotFound, typ: typeInvalidRequest, code: "unknown_url",
		message: fmt.Sprintf("There is no %s. The proxy has POST /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses, /v1/messages and /v1/messages/count_tokens, and GET /v1/models, /health, /health/ready, /health/detailed, /metrics and /auth.", clip(r.URL.Path, 100))})
}

// A discardResponse keeps an answer's header and nothing else.
type discardResponse struct{ header http.Header }

func (d *discardResponse) Header() http.Header {
	if d.header == nil {
		d.header = http.Header{}
	}
	return d.header
}
func (d *discardResponse) Write(p []byte) (int, error) { return len(p), nil }
func (d *discardResponse) WriteHeader(int)             {}
