package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A pipeNet is a network of net.Pipes, whose connections let a synctest bubble's clock move while they wait.
type pipeNet struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipeNet() *pipeNet {
	return &pipeNet{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (n *pipeNet) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

func (n *pipeNet) Close() error   { n.once.Do(func() { close(n.closed) }); return nil }
func (n *pipeNet) Addr() net.Addr { return &net.UnixAddr{Net: "pipe"} }

func (n *pipeNet) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case n.conns <- server:
		return client, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-n.closed:
		return nil, net.ErrClosed
	}
}

// A bubble is the whole server between a client and an API that speak over pipes, for tests in which time passes.
type bubble struct {
	client *http.Client
	dial   func() net.Conn
	log    *logBuffer
}

// connKey is the key of the connection in the context of a request to the API.
type connKey struct{}

// inBubble sets up a bubble with env, whose API is api. It must be called within synctest.Test.
func inBubble(t *testing.T, env map[string]string, api http.HandlerFunc) *bubble {
	t.Helper()
	full := map[string]string{"RATE_LIMIT_RPS": "0", "QWEN_API_KEY": "sk-test", "API_BASE_URL": "http://127.0.0.1/v1"}
	maps.Copy(full, env)
	cfg, err := loadConfig(lookup(full))
	fatalIf(t, err)
	upstream := newPipeNet()
	apiServer := &http.Server{Handler: api, ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) }}
	go apiServer.Serve(upstream)
	transport := newTransport()
	transport.Proxy, transport.DialContext = nil, upstream.dial

	b := &bubble{log: &logBuffer{}}
	log := newLogger(cfg, b.log)
	tokens := newSource(cfg, log, b.log)
	m := newMetrics()
	front := newPipeNet()
	server := &http.Server{
		Handler:           newHandler(cfg, log, tokens, newAccess(cfg, log), m, &health{tokens: tokens, metrics: m}, transport),
		ReadHeaderTimeout: cfg.readTimeout,
	}
	go server.Serve(front)
	clientTransport := &http.Transport{DialContext: front.dial}
	b.client = &http.Client{Transport: clientTransport}
	b.dial = func() net.Conn {
		c, err := front.dial(t.Context(), "", "")
		fatalIf(t, err)
		return c
	}
	t.Cleanup(func() {
		clientTransport.CloseIdleConnections()
		server.Close()
		transport.CloseIdleConnections()
		apiServer.Close()
		front.Close()
		upstream.Close()
		synctest.Wait()
	})
	return b
}

// testInBubble runs f as a subtest in a synctest bubble.
func testInBubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

func (b *bubble) post(t *testing.T, path, body string) *http.Response {
	t.Helper()
	res, err := b.client.Post("http://proxy"+path, "application/json", strings.NewReader(body))
	fatalIf(t, err)
	t.Cleanup(func() { res.Body.Close() })
	return res
}

func TestBodiesPassByteForByte(t *testing.T) {
	odd := " {\n\t\"model\" : \"m\\u0065\" ,\"messages\":[{\"role\":\"user\",\"content\":\"\\ud83d \xff é\"}],\"seed\":12345678901234567890.10 , \"x\":{}}\r\n "
	answer := " {\"id\":\"1\",  \"odd\": 1e400, \"t\":\"\xfe\"}\n\n"
	var got []byte
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		got, _ = io.ReadAll(r.Body)
		answerJSON(w, 200, answer)
	}, nil)
	for _, path := range []string{"/v1/chat/completions", "/v1/responses"} {
		res, body := p.post(path, odd)
		if string(got) != odd {
			t.Errorf("%s: the API got\n%q, want\n%q", path, got, odd)
		}
		if body != answer || res.ContentLength != int64(len(answer)) {
			t.Errorf("%s: the client got\n%q (Content-Length %d), want\n%q", path, body, res.ContentLength, answer)
		}
	}
}

func TestTheModelIsSplicedIn(t *testing.T) {
	var got string
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got = string(b)
		answerJSON(w, 200, "{}")
	}, map[string]string{"DEFAULT_MODEL": "fast", "MODEL_ALIASES": "gpt-4o=qwen-y, fast=qwen-x"})
	for _, tt := range []struct{ in, want string }{
		{`{"messages":[]}`, `{"model":"qwen-x","messages":[]}`},
		{" {\n \"messages\" : [ ] }\n", " {\"model\":\"qwen-x\",\n \"messages\" : [ ] }\n"},
		{`{"messages":[],"model":null}`, `{"messages":[],"model":"qwen-x"}`},
		{`{"model": "" ,"messages":[]}`, `{"model": "qwen-x" ,"messages":[]}`},
		{`{"mod\u0065l":"","messages":[]}`, `{"mod\u0065l":"qwen-x","messages":[]}`},
		{`{"model":"other","messages":[]}`, `{"model":"other","messages":[]}`},
		{`{"model":"gpt-4o","messages":[]}`, `{"model":"qwen-y","messages":[]}`},
		{`{"model":"gpt\u002d4o","messages":[]}`, `{"model":"qwen-y","messages":[]}`},
		{`{"messages":[],"model":"fast"}`, `{"messages":[],"model":"qwen-x"}`},
		{`{"messages":[{"model":""}]}`, `{"model":"qwen-x","messages":[{"model":""}]}`},
		{`{"Model":"","messages":[]}`, `{"model":"qwen-x","Model":"","messages":[]}`},
	} {
		p.post("/v1/chat/completions", tt.in)
		wantEqual(t, tt.in, tt.want, got)
	}
	p.post("/v1/responses", `{}`)
	wantEqual(t, "an empty object", `{"model":"qwen-x"}`, got)
	if _, body := p.get("/v1/models"); !strings.Contains(body, `"qwen-x"`) || !strings.Contains(body, `"fast"`) {
		t.Errorf("the models lack qwen-x or fast: %s", body)
	}
}

func TestBadRequestsStayHere(t *testing.T) {
	var calls atomic.Int32
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) { calls.Add(1) }, map[string]string{"MAX_BODY_BYTES": "1000"})
	for _, tt := range []struct {
		name, path, body string
		status           int
		code, param      string
	}{
		{"no JSON", "chat/completions", "hello", 400, "invalid_json", ""},
		{"empty", "chat/completions", "", 400, "invalid_json", ""},
		{"array", "chat/completions", "[]", 400, "invalid_json", ""},
		{"cut short", "chat/completions", `{"messages":[`, 400, "invalid_json", ""},
		{"data behind it", "chat/completions", `{"messages":[]}{}`, 400, "invalid_json", ""},
		{"stream is a string", "chat/completions", `{"messages":[],"stream":"yes"}`, 400, "invalid_type", "stream"},
		{"model is a number", "chat/completions", `{"messages":[],"model":5}`, 400, "invalid_type", "model"},
		{"model twice", "chat/completions", `{"messages":[],"model":"a","model":"b"}`, 400, "duplicate_member", "model"},
		{"no messages", "chat/completions", `{"model":"m"}`, 400, "missing_required_parameter", "messages"},
		{"input is a number", "embeddings", `{"input":5}`, 400, "invalid_type", "input"},
		{"messages is a string", "chat/completions", `{"messages":"hi"}`, 400, "invalid_type", "messages"},
		{"no input", "embeddings", `{}`, 400, "missing_required_parameter", "input"},
		{"two prompts", "completions", `{"prompt":["a","b"]}`, 400, "invalid_prompt", "prompt"},
		{"suffix", "completions", `{"prompt":"a","suffix":"b"}`, 400, "unsupported_parameter", "suffix"},
		{"completion with a mistyped stream", "completions", `{"prompt":"a","stream":1}`, 400, "invalid_type", "stream"},
		{"too large", "chat/completions", `{"messages":["` + strings.Repeat("x", 1000) + `"]}`, 413, "request_too_large", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			res, body := p.post("/v1/"+tt.path, tt.body)
			e := wantError(t, res, body, tt.status, typeInvalidRequest, tt.code)
			if got := e.Error.Param; (got == nil) != (tt.param == "") || got != nil && *got != tt.param {
				t.Errorf("param %v, want %q", got, tt.param)
			}
			if strings.Contains(body, "xxx") {
				t.Error("the error quotes the request")
			}
		})
	}
	// Chunked, the length is not announced.
	res, body := p.do("POST", "/v1/chat/completions", io.MultiReader(strings.NewReader(`{"messages":["`+strings.Repeat("x", 1000)+`"]}`)))
	wantError(t, res, body, 413, typeInvalidRequest, "request_too_large")
	if n := calls.Load(); n != 0 {
		t.Errorf("%d requests reached the API", n)
	}
}

func TestACompressedRequestIsRefused(t *testing.T) {
	var calls atomic.Int32
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		answerJSON(w, 200, "{}")
	}, nil)
	send := func(body string, codings ...string) (*http.Response, string) {
		return p.send("POST", "/v1/chat/completions", func(r *http.Request) {
			r.Body, r.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
			r.Header["Content-Encoding"] = codings
		})
	}
	for _, codings := range [][]string{{"gzip"}, {"identity, gzip"}, {"identity", "br"}, {"zstd"}} {
		res, body := send(gzipped(`{"messages":[]}`), codings...)
		if e := wantError(t, res, body, 415, typeInvalidRequest, "compressed_body"); !strings.Contains(e.Error.Message, "Send it uncompressed") {
			t.Errorf("%q: message %q", codings, e.Error.Message)
		}
	}
	if n := calls.Load(); n != 0 {
		t.Errorf("%d compressed requests reached the API", n)
	}
	for _, coding := range []string{"identity", "Identity", ""} {
		if res, body := send(`{"messages":[]}`, coding); res.StatusCode != 200 {
			t.Errorf("%q: %s %s", coding, res.Status, body)
		}
	}
}

func TestHeadersPassByAllowList(t *testing.T) {
	var got http.Header
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		got = r.Header.Clone()
		h := w.Header()
		for _, name := range []string{"Set-Cookie", "Alt-Svc", "Server", "Access-Control-Allow-Credentials", "X-Envoy-Upstream", "X-Dashscope-Call-Gateway", "Trailer"} {
			h.Set(name, "no")
		}
		h.Set("X-Request-ID", "qwen-1")
		h.Set("X-RateLimit-Remaining-Tokens", "7")
		h.Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusEarlyHints)
		h.Set(http.TrailerPrefix+"X-Secret", "no")
		io.WriteString(w, `{}`)
	}, nil)
	req, err := http.NewRequest("POST", p.url+"/v1/chat/completions?key=secret", strings.NewReader(`{"messages":[]}`))
	fatalIf(t, err)
	for _, name := range []string{"Cookie", "X-Api-Key", "Forwarded", "X-Forwarded-For", "X_Forwarded_For", "X-Real-Ip", "Via", "Referer", "Te", "Upgrade", "X-Custom", "Openai-Organization"} {
		req.Header.Set(name, "secret")
	}
	req.Header.Set("Origin", "http://localhost:3000")
	req.Header.Set("Authorization", "Bearer sk-of-the-client")
	req.Header.Set("Connection", "Authorization, X-Request-Id, Upgrade")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "a client")
	req.Header.Set("X-Request-ID", "client-1")
	early := 0
	req = req.WithContext(withInformational(t.Context(), &early))
	res, err := http.DefaultTransport.RoundTrip(req)
	fatalIf(t, err)
	body, err := io.ReadAll(res.Body)
	fatalIf(t, err)
	res.Body.Close()
	want := http.Header{
		"Accept": {"application/json"}, "Authorization": {"Bearer good-token"}, "Content-Type": {"application/json"}, "Content-Length": {"42"},
		"User-Agent": {userAgent}, "X-Request-Id": {"client-1"}, "X-Dashscope-Authtype": {"qwen-oauth"}, "X-Dashscope-Cachecontrol": {"enable"},
	}
	wantEqual(t, "headers to the API", want, got)
	names := slices.Sorted(maps.Keys(res.Header))
	wantNames := []string{"Access-Control-Allow-Origin", "Access-Control-Expose-Headers", "Content-Type", "Date", "Referrer-Policy", "Vary", "X-Content-Type-Options", "X-Frame-Options", "X-Ratelimit-Remaining-Tokens", "X-Request-Id", "X-Upstream-Request-Id"}
	wantEqual(t, "headers to the client", wantNames, slices.DeleteFunc(names, func(s string) bool { return s == "Content-Length" }))
	if res.Header.Get("X-Request-ID") != "client-1" || res.Header.Get("X-Upstream-Request-ID") != "qwen-1" || early != 0 || len(res.Trailer) != 0 || string(body) != "{}" {
		t.Errorf("answer %v, %d informational answers, trailer %v, body %s", res.Header, early, res.Trailer, body)
	}
}

// TestMessages: the Anthropic-compatible interface stands beside the other one, on the same host.
func TestMessages(t *testing.T) {
	var got *http.Request
	var sent string
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got, sent = r, string(b)
		answerJSON(w, 200, `{"type":"message"}`)
	}, map[string]string{"QWEN_API_KEY": "sk-qwen", "MODEL_ALIASES": "claude-opus=qwen3.7-max", "PROXY_API_KEYS": "sk-mine"})
	body := func(r *http.Request, s string) {
		r.Body, r.ContentLength = io.NopCloser(strings.NewReader(s)), int64(len(s))
	}
	headers := func(r *http.Request) {
		r.Header.Set("X-Api-Key", "sk-mine")
		r.Header.Set("Anthropic-Version", "2023-06-01")
		r.Header.Set("Anthropic-Beta", "a,b")
		r.Header.Set("Anthropic-Dangerous-Direct-Browser-Access", "true")
		body(r, `{"model":"claude-opus", "max_tokens":1,"messages":[]}`)
	}
	for path, want := range map[string]string{
		"/v1/messages": "/apps/anthropic/v1/messages", "/messages": "/apps/anthropic/v1/messages",
		"/v1/messages/count_tokens": "/apps/anthropic/v1/messages/count_tokens", "/messages/count_tokens": "/apps/anthropic/v1/messages/count_tokens",
	} {
		res, answer := p.send("POST", path+"?beta=true", headers)
		if res.StatusCode != 200 || answer != `{"type":"message"}` || got.RequestURI != want || sent != `{"model":"qwen3.7-max", "max_tokens":1,"messages":[]}` {
			t.Errorf("%s: %s %s; the upstream got %s of %s", path, res.Status, answer, sent, got.RequestURI)
		}
		if h := got.Header; h.Get("Authorization") != "Bearer sk-qwen" || h.Get("X-Api-Key") != "" || h.Get("Anthropic-Version") != "2023-06-01" || h.Get("Anthropic-Beta") != "a,b" || len(h) != 7 {
			t.Errorf("%s: the upstream got %v", path, h)
		}
	}
	res, answer := p.send("POST", "/v1/messages", func(r *http.Request) {
		headers(r)
		body(r, `{"messages":"x"}`)
	})
	wantError(t, res, answer, http.StatusBadRequest, typeInvalidRequest, "invalid_type")
}

func TestRequestIDs(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) { answerJSON(w, 200, "{}") }, nil)
	for id, keep := range map[string]bool{
		"a": true, "A.b_c-9": true, strings.Repeat("x", 128): true,
		"": false, strings.Repeat("x", 129): false, "a b": false, "a\tb": false, "é": false, `"}`: false,
	} {
		res, _ := p.send("GET", "/health", header("X-Request-ID", id))
		got := res.Header.Get("X-Request-ID")
		if keep != (got == id) || got != requestID(&http.Request{Header: http.Header{"X-Request-Id": {got}}}) {
			t.Errorf("X-Request-ID %q became %q", id, got)
		}
	}
}

func TestEventsPassAsTheyCome(t *testing.T) {
	for _, encoding := range []string{"", "gzip"} { // of a packed stream the proxy knows no events
		next := make(chan string)
		p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
			if encoding != "" {
				w.Header().Set("Content-Encoding", encoding)
			}
			sse(w)
			for e := range next {
				sse(w, e)
			}
		}, nil)
		req, _ := http.NewRequest("POST", p.url+"/v1/chat/completions", strings.NewReader(`{"stream":true,"messages":[]}`))
		req.Header.Set("Accept-Encoding", "gzip") // else the client unpacks
		res, err := http.DefaultClient.Do(req)
		fatalIf(t, err) // the headers come before the first event, or this would hang
		defer res.Body.Close()
		buf := make([]byte, 1000)
		for _, e := range []string{"data: 1\n\n", ": comment\n\n", "data: half", " a line\n", "\n", "event: x\r\ndata: \xff\r\n\r\n", "data: [DONE]\n\n"} {
			next <- e
			n, err := io.ReadAtLeast(res.Body, buf, len(e)) // before the API sends any more
			if err != nil || string(buf[:n]) != e {
				t.Fatalf("%s: got %q, %v; want %q", encoding, buf[:n], err, e)
			}
		}
		close(next)
		if rest, err := io.ReadAll(res.Body); err != nil || len(rest) != 0 {
			t.Errorf("%s: at the end %q, %v", encoding, rest, err)
		}
	}
}

func TestAClientThatLeavesEndsTheUpstreamRequest(t *testing.T) {
	for _, headers := range []bool{false, true} {
		t.Run(fmt.Sprintf("after headers %v", headers), func(t *testing.T) {
			began, ended := make(chan struct{}), make(chan struct{})
			p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
				io.ReadAll(r.Body)
				if headers {
					sse(w, "data: 1\n\n")
				}
				close(began)
				<-r.Context().Done()
				close(ended)
			}, nil)
			ctx, leave := context.WithCancel(t.Context())
			go func() {
				<-began
				leave()
			}()
			req, _ := http.NewRequestWithContext(ctx, "POST", p.url+"/v1/chat/completions", strings.NewReader(`{"messages":[]}`))
			if res, err := http.DefaultClient.Do(req); err == nil {
				io.ReadAll(res.Body)
				res.Body.Close()
			}
			<-ended // or the test hangs
			p.stderr.await(t, `"msg":"request".*"error":"The client closed the connection`)
			if !headers {
				p.stderr.await(t, `"status":499`)
			}
		})
	}
}

func TestUpstreamAnswersThatAreNoneOfItsAPI(t *testing.T) {
	const html = "<html><body>Gateway</body></html>"
	var answer http.HandlerFunc
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) { answer(w, r) }, nil)
	openAI := `{"error":{"message":"no such model","type":"invalid_request_error","param":null,"code":"model_not_found"},"request_id":"q-1"}`
	for _, tt := range []struct {
		name, path  string
		status      int
		contentType string
		body        string
		header      string // Name: value
		want        int
		typ, code   string // of a wrapped answer; "" where it passes as it is
	}{
		{"OpenAI's 404", "chat/completions", 404, "application/json", openAI, "", 404, "", ""},
		{"OpenAI's 429", "chat/completions", 429, "application/json", openAI, "Retry-After: 7", 429, "", ""},
		{"OpenAI's 403", "chat/completions", 403, "application/json", openAI, "", 403, "", ""},
		{"OpenAI's 500", "chat/completions", 500, "text/plain", openAI, "", 500, "", ""},
		{"500 with HTML", "chat/completions", 500, "text/html", html, "", 500, typeServer, "upstream_error"},
		{"503 without a body", "chat/completions", 503, "", "", "Retry-After: 9", 503, typeServer, "upstream_error"},
		{"429 with HTML", "chat/completions", 429, "text/html", html, "Retry-After: 9", 429, typeRateLimit, "upstream_error"},
		{"DashScope's own shape", "chat/completions", 400, "application/json", `{"code":"InvalidParameter","message":"x"}`, "", 400, typeInvalidRequest, "upstream_error"},
		{"404 for an endpoint", "embeddings", 404, "text/html", html, "", 404, typeInvalidRequest, "endpoint_not_found"},
		{"404 for /responses", "responses", 404, "", "", "", 404, typeInvalidRequest, "endpoint_not_found"},
		{"200 with HTML", "chat/completions", 200, "text/html", html, "", 502, typeNetwork, "bad_upstream_answer"},
		{"200 with HTML that says it is JSON", "chat/completions", 200, "application/json", html, "", 502, typeNetwork, "bad_upstream_answer"},
		{"200 without a body", "chat/completions", 200, "application/json", "", "", 502, typeNetwork, "bad_upstream_answer"},
		{"204", "chat/completions", 204, "", "", "", 502, typeNetwork, "bad_upstream_answer"},
		{"redirect", "chat/completions", 307, "", "", "Location: http://127.0.0.1:1/elsewhere", 502, typeNetwork, "bad_upstream_answer"},
		{"HTML for a text completion", "completions", 200, "text/html", html, "", 502, typeNetwork, "bad_upstream_answer"},
		{"OpenAI's error for a text completion", "completions", 404, "application/json", openAI, "", 404, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			answer = func(w http.ResponseWriter, r *http.Request) {
				if tt.contentType != "" {
					w.Header().Set("Content-Type", tt.contentType)
				}
				if name, value, ok := strings.Cut(tt.header, ": "); ok {
					w.Header().Set(name, value)
				}
				w.Header().Set("X-Request-ID", "qwen-9")
				w.WriteHeader(tt.status)
				io.WriteString(w, tt.body)
			}
			res, body := p.send("POST", "/v1/"+tt.path, nil)
			if tt.code == "" {
				if res.StatusCode != tt.want || body != tt.body {
					t.Errorf("got %s %s", res.Status, body)
				}
			} else {
				e := wantError(t, res, body, tt.want, tt.typ, tt.code)
				if strings.Contains(body, "Gateway") {
					t.Error("the page passed")
				}
				if tt.path == "responses" && !strings.Contains(e.Error.Message, "Use Responses API") {
					t.Errorf("message %q does not name n8n's toggle", e.Error.Message)
				}
			}
			if _, after, ok := strings.Cut(tt.header, "Retry-After: "); ok && res.Header.Get("Retry-After") != after {
				t.Errorf("Retry-After %q, want %s", res.Header.Get("Retry-After"), after)
			}
			if res.Header.Get("X-Upstream-Request-ID") != "qwen-9" {
				t.Error("no X-Upstream-Request-ID")
			}
		})
	}
}

func TestA401IsAnsweredByARefreshAndAReplay(t *testing.T) {
	const request = `{"model":"m","messages":[]}`
	var refreshes atomic.Int32
	var bodies []string
	takes := "Bearer fresh-1"
	api := func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		if strings.HasSuffix(r.URL.Path, "/oauth2/token") {
			answerJSON(w, 200, fmt.Sprintf(`{"access_token":"fresh-%d","refresh_token":"r","token_type":"Bearer","expires_in":3600}`, refreshes.Add(1)))
			return
		}
		bodies = append(bodies, string(b))
		if r.Header.Get("Authorization") != takes {
			answerJSON(w, 401, `{"error":{"code":"invalid_api_key","message":"invalid access token or token expired","param":null,"type":"invalid_request_error"},"request_id":"q"}`)
			return
		}
		answerJSON(w, 200, `{"ok":true}`)
	}
	p := startWith(t, api, nil)
	res, body := p.post("/v1/chat/completions", request)
	if res.StatusCode != 200 || body != `{"ok":true}` || refreshes.Load() != 1 {
		t.Errorf("got %s %s after %d refreshes", res.Status, body, refreshes.Load())
	}
	wantEqual(t, "bodies", []string{request, request}, bodies)

	// From now on no token will do: the account is not served.
	takes = "none"
	res, body = p.post("/v1/chat/completions", request)
	e := wantError(t, res, body, 401, typeAuthentication, "qwen_oauth_unavailable")
	if !strings.Contains(e.Error.Message, "QWEN_API_KEY") {
		t.Errorf("message %q", e.Error.Message)
	}
	for range 3 {
		res, body = p.post("/v1/chat/completions", request)
		wantError(t, res, body, 401, typeAuthentication, "qwen_oauth_unavailable")
	}
	if n := refreshes.Load(); n != 2 {
		t.Errorf("%d refreshes, want 2: one more for the first 401, none for those within a minute", n)
	}
	if n := strings.Count(p.stderr.String(), `"msg":"Qwen's API does not serve this account`); n != 1 {
		t.Errorf("the log says it %d times, want once", n)
	}
}

func TestA401OfAnAPIKeySaysWhatBelongsTogether(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer sk-mine" || r.Header.Get("X-Dashscope-Authtype") != "" {
			t.Errorf("headers %v", r.Header)
		}
		answerJSON(w, 401, `{"error":{"message":"Incorrect API key provided","type":"invalid_request_error","code":"invalid_api_key"}}`)
	}, map[string]string{"QWEN_API_KEY": "sk-mine"})
	res, body := p.post("/v1/chat/completions", `{"messages":[]}`)
	e := wantError(t, res, body, 401, typeAuthentication, "invalid_api_key")
	if res, body := p.get("/health/ready"); res.StatusCode != 503 || !strings.Contains(body, `"code":"invalid_api_key"`) {
		t.Errorf("ready: %s %s", res.Status, body)
	}
	if !strings.Contains(e.Error.Message, "API_BASE_URL") || !strings.Contains(e.Error.Message, "http://127.0.0.1:") {
		t.Errorf("message %q", e.Error.Message)
	}
	if strings.Contains(p.stderr.String()+body, "sk-mine") {
		t.Error("the key is in the log or the answer")
	}
}

func TestAResourceURLOfAnotherHostIsRefused(t *testing.T) {
	p := start(t, map[string]string{"QWEN_DIR": credentials(t, "evil.example")})
	res, body := p.post("/v1/chat/completions", `{"messages":[]}`)
	e := wantError(t, res, body, 500, typeConfiguration, "resource_url_refused")
	if !strings.Contains(e.Error.Message, "API_BASE_URL") {
		t.Errorf("message %q", e.Error.Message)
	}
}

func TestTimeouts(t *testing.T) {
	hang := func(w http.ResponseWriter, r *http.Request) {
		io.ReadAll(r.Body)
		<-r.Context().Done()
	}
	testInBubble(t, "UPSTREAM_TIMEOUT", func(t *testing.T) {
		b := inBubble(t, map[string]string{"UPSTREAM_TIMEOUT": "2m"}, hang)
		begin := time.Now()
		res := b.post(t, "/v1/chat/completions", `{"messages":[]}`)
		body, _ := io.ReadAll(res.Body)
		wantError(t, res, string(body), 504, typeNetwork, "upstream_timeout")
		if d := time.Since(begin).Round(time.Millisecond); d != 2*time.Minute {
			t.Errorf("took %v", d)
		}
	})
	testInBubble(t, "STREAM_IDLE_TIMEOUT", func(t *testing.T) {
		b := inBubble(t, map[string]string{"STREAM_IDLE_TIMEOUT": "1m", "SSE_KEEPALIVE": "0"}, func(w http.ResponseWriter, r *http.Request) {
			for range 5 {
				sse(w, "data: x\n\n")
				time.Sleep(59 * time.Second)
			}
			<-r.Context().Done()
		})
		begin := time.Now()
		res := b.post(t, "/v1/chat/completions", `{"messages":[]}`)
		body, err := io.ReadAll(res.Body)
		if err == nil || !strings.HasPrefix(string(body), strings.Repeat("data: x\n\n", 5)+"\n\ndata: {\"error\"") || !strings.Contains(string(body), "upstream_idle") {
			t.Errorf("got %q, %v", body, err)
		}
		if d := time.Since(begin).Round(time.Second); d != 4*59*time.Second+time.Minute {
			t.Errorf("took %v", d)
		}
	})
	testInBubble(t, "STREAM_IDLE_TIMEOUT of an answer that is no stream", func(t *testing.T) {
		b := inBubble(t, map[string]string{"STREAM_IDLE_TIMEOUT": "1m"}, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Length", "100")
			w.WriteHeader(200)
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		})
		res := b.post(t, "/v1/chat/completions", `{"messages":[]}`)
		body, _ := io.ReadAll(res.Body)
		wantError(t, res, string(body), 504, typeStreaming, "upstream_idle")
	})
	testInBubble(t, "SSE_KEEPALIVE", func(t *testing.T) {
		b := inBubble(t, map[string]string{"SSE_KEEPALIVE": "15s"}, func(w http.ResponseWriter, r *http.Request) {
			sse(w)
			time.Sleep(31 * time.Second)
			sse(w, "data: 1\r\n\r\n")
			time.Sleep(16 * time.Second) // a line of CRLF alone ends an event too
			sse(w, "data: 2\n\ndata: ")
			time.Sleep(61 * time.Second) // within an event nothing may come
			sse(w, "3\n\n")
			time.Sleep(16 * time.Second)
			sse(w, "data: [DONE]\n\n")
		})
		res := b.post(t, "/v1/chat/completions", `{"messages":[]}`)
		body, err := io.ReadAll(res.Body)
		const ka = ": keep-alive\n\n"
		want := ka + ka + "data: 1\r\n\r\n" + ka + "data: 2\n\ndata: 3\n\n" + ka + "data: [DONE]\n\n"
		if diff := cmp.Diff(want, string(body)); diff != "" || err != nil {
			t.Errorf("%v (-want +got):\n%s", err, diff)
		}
	})
	testInBubble(t, "a stream longer than every timeout lives", func(t *testing.T) {
		b := inBubble(t, map[string]string{"WRITE_TIMEOUT": "30s", "READ_TIMEOUT": "30s", "UPSTREAM_TIMEOUT": "1m"}, func(w http.ResponseWriter, r *http.Request) {
			for range 360 {
				sse(w, "data: x\n\n")
				time.Sleep(10 * time.Second)
			}
		})
		res := b.post(t, "/v1/chat/completions", `{"messages":[]}`)
		body, err := io.ReadAll(res.Body)
		if err != nil || string(body) != strings.Repeat("data: x\n\n", 360) {
			t.Errorf("%d bytes, %v", len(body), err)
		}
	})
	testInBubble(t, "a client that takes nothing for WRITE_TIMEOUT does not", func(t *testing.T) {
		ended := make(chan time.Time, 1)
		// No keep-alives: a goroutine that waits for a mutex would stop the bubble's clock.
		b := inBubble(t, map[string]string{"WRITE_TIMEOUT": "30s", "SSE_KEEPALIVE": "0"}, func(w http.ResponseWriter, r *http.Request) {
			io.ReadAll(r.Body)
			for r.Context().Err() == nil {
				sse(w, "data: x\n\n")
				time.Sleep(time.Second)
			}
			ended <- time.Now()
		})
		c := b.dial()
		defer c.Close()
		io.WriteString(c, "POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Length: 15\r\n\r\n{\"messages\":[]}")
		if _, err := io.ReadAtLeast(c, make([]byte, 1000), 500); err != nil {
			t.Fatal(err)
		}
		stopped := time.Now() // from here on nothing is read, and a pipe has no buffer
		if d := (<-ended).Sub(stopped); d < 30*time.Second || d > 34*time.Second {
			t.Errorf("the upstream request ended after %v", d)
		}
	})
	testInBubble(t, "a kept-alive connection is good after WRITE_TIMEOUT", func(t *testing.T) {
		b := inBubble(t, nil, func(w http.ResponseWriter, r *http.Request) { answerJSON(w, 200, "{}") })
		c := b.dial()
		defer c.Close()
		br := bufio.NewReader(c)
		for range 3 {
			io.WriteString(c, "POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nContent-Length: 15\r\n\r\n{\"messages\":[]}")
			res, err := http.ReadResponse(br, nil)
			fatalIf(t, err)
			io.Copy(io.Discard, res.Body)
			time.Sleep(time.Minute)
		}
	})
}

func TestTheConnectionClosesAfterAChunkedRequest(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) { answerJSON(w, 200, "{}") }, nil)
	c, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	fatalIf(t, err)
	defer c.Close()
	io.WriteString(c, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"+
		"f\r\n{\"messages\":[]}\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
	all, err := io.ReadAll(c)
	if err != nil || bytes.Count(all, []byte("HTTP/1.1 ")) != 1 || !bytes.Contains(all, []byte("Connection: close")) {
		t.Errorf("got %q, %v; want one answer", all, err)
	}
}

func TestSecretsAndTextStayOutOfTheLog(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		answerJSON(w, 400, `{"error":{"message":"about your secret-text","type":"invalid_request_error","code":"x"}}`)
	}, map[string]string{"DEBUG_MODE": "true", "LOG_LEVEL": "debug"})
	req, _ := http.NewRequest("POST", p.url+"/v1/chat/completions?api_key=secret-query", strings.NewReader(`{"messages":[{"content":"secret-text"}]}`))
	req.Header.Set("Authorization", "Bearer secret-key")
	req.Header.Set("Cookie", "a=secret-cookie")
	req.Header.Set("X-Request-ID", "forged\",\"status\":200")
	res, err := http.DefaultClient.Do(req)
	fatalIf(t, err)
	res.Body.Close()
	line := p.stderr.await(t, `(?m)^(.*"msg":"request".*)$`)
	for _, want := range []string{`"method":"POST"`, `"path":"/v1/chat/completions"`, `"status":400`, `"duration_ms":`, `"first_byte_ms":`, `"bytes":`, `"client":"127.0.0.1"`,
		`"error_type":"invalid_request_error"`, `"request_id":"` + res.Header.Get("X-Request-ID"), `"headers":`, `"Authorization":"(not shown)"`} {
		if !strings.Contains(line, want) {
			t.Errorf("no %s in %s", want, line)
		}
	}
	for _, secret := range []string{"secret", "good-token", "refresh-1", "forged"} {
		if strings.Contains(p.stderr.String(), secret) {
			t.Errorf("%q is in the log", secret)
		}
	}
}

// benchTransport answers at once, as a static API would.
type benchTransport struct{ header http.Header }

func (b benchTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
	}
	const body = `{"id":"chatcmpl-1","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Hello"},"finish_reason":"stop"}]}`
	return &http.Response{StatusCode: 200, Status: "200 OK", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: b.header.Clone(),
		Body: io.NopCloser(strings.NewReader(body)), ContentLength: int64(len(body)), Request: r}, nil
}

// discard is a ResponseWriter for benchmarks.
type discard struct{ header http.Header }

func (d *discard) Header() http.Header              { return d.header }
func (d *discard) Write(p []byte) (int, error)      { return len(p), nil }
func (d *discard) WriteHeader(int)                  {}
func (d *discard) FlushError() error                { return nil }
func (d *discard) SetReadDeadline(time.Time) error  { return nil }
func (d *discard) SetWriteDeadline(time.Time) error { return nil }

// benchHandlers runs bench with the whole handler, as it ships, and with a bare ReverseProxy; serve has it serve a request.
func benchHandlers(b *testing.B, upstream http.RoundTripper, body []byte, bench func(b *testing.B, serve func())) {
	cfg, err := loadConfig(lookup(map[string]string{"QWEN_API_KEY": "sk-test", "RATE_LIMIT_RPS": "1000000", "RATE_LIMIT_BURST": "1000000"}))
	fatalIf(b, err)
	log := slog.New(slog.NewJSONHandler(io.Discard, nil))
	tokens := newSource(cfg, log, io.Discard)
	m := newMetrics()
	target := &url.URL{Scheme: "http", Host: "127.0.0.1"}
	for _, bm := range []struct {
		name string
		h    http.Handler
	}{
		{"ours", newHandler(cfg, log, tokens, newAccess(cfg, log), m, &health{tokens: tokens, metrics: m}, upstream)},
		{"bare", &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }, Transport: upstream, BufferPool: &copyBuffers{}}},
	} {
		b.Run(bm.name, func(b *testing.B) {
			var payload bytes.Reader
			b.ReportAllocs()
			bench(b, func() {
				payload.Reset(body)
				r := &http.Request{Method: "POST", URL: &url.URL{Path: "/v1/chat/completions"}, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
					Header: http.Header{"Content-Type": {"application/json"}, "User-Agent": {"bench"}, "Accept": {"*/*"}, "Authorization": {"Bearer x"}},
					Body:   io.NopCloser(&payload), ContentLength: int64(len(body)), Host: "localhost", RemoteAddr: "127.0.0.1:1234"}
				ctx, cancel := context.WithCancel(context.Background())
				bm.h.ServeHTTP(&discard{http.Header{}}, r.WithContext(ctx))
				cancel()
			})
		})
	}
}

// BenchmarkHandler compares what a request costs in the whole handler with a bare ReverseProxy, without the network.
func BenchmarkHandler(b *testing.B) {
	upstream := benchTransport{http.Header{"Content-Type": {"application/json"}}}
	for _, size := range []int{2 << 10, 100 << 10} {
		b.Run(fmt.Sprintf("%d KB", size>>10), func(b *testing.B) {
			benchHandlers(b, upstream, chatBody(size, codeText), func(b *testing.B, serve func()) {
				for b.Loop() {
					serve()
				}
			})
		})
	}
}

func withInformational(ctx context.Context, n *int) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{Got1xxResponse: func(int, textproto.MIMEHeader) error { *n++; return nil }})
}

// A benchEvents is an event stream of n events, one a Read.
type benchEvents struct{ n int }

func (e *benchEvents) Read(p []byte) (int, error) {
	if e.n == 0 {
		return 0, io.EOF
	}
	e.n--
	return copy(p, "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"Hello\"}}]}\n\n"), nil
}

func (*benchEvents) Close() error { return nil }

// BenchmarkEvent compares what one event costs on its way through the whole handler with a bare ReverseProxy, without the network.
func BenchmarkEvent(b *testing.B) {
	events := &benchEvents{}
	upstream := roundTripper(func(r *http.Request) (*http.Response, error) {
		io.Copy(io.Discard, r.Body)
		r.Body.Close()
		return &http.Response{StatusCode: 200, Status: "200 OK", Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
			Header: http.Header{"Content-Type": {"text/event-stream"}}, Body: events, ContentLength: -1, TransferEncoding: []string{"chunked"}, Request: r}, nil
	})
	benchHandlers(b, upstream, chatBody(2<<10, codeText), func(b *testing.B, serve func()) {
		events.n = b.N
		serve()
	})
}

// TestARequestIsReplayedOnce: the API works for a while on a kept-alive connection and then closes it without an answer, however
// many such connections there are to try. What took longer than a second to fail, or has begun to be answered, is not sent again.
func TestARequestIsReplayedOnce(t *testing.T) {
	for _, idle := range []int{1, 5, 20} {
		for _, tt := range []struct {
			work  time.Duration
			begun string // of an answer
			want  string // status and executions
		}{
			{0, "", "200 2"}, {900 * time.Millisecond, "", "200 2"}, {1100 * time.Millisecond, "", "502 1"},
			{0, "HTTP/1.1 20", "502 1"}, {0, "HTTP/1.1 102 Processing\r\n\r\n", "502 1"},
		} {
			testInBubble(t, fmt.Sprintf("%d idle connections, %v, %q", idle, tt.work, tt.begun), func(t *testing.T) {
				var used sync.Map // connections
				var executed atomic.Int64
				var warm, clients sync.WaitGroup
				warm.Add(idle)
				b := inBubble(t, nil, func(w http.ResponseWriter, r *http.Request) {
					if body, _ := io.ReadAll(r.Body); bytes.Contains(body, []byte("warm")) {
						warm.Done()
						warm.Wait() // so that each takes a connection
					} else if executed.Add(1); r.Header.Get("Idempotency-Key") != "key-1" { // with one, net/http would replay by rules of its own
						t.Errorf("headers %v", r.Header)
					}
					if _, reused := used.LoadOrStore(r.Context().Value(connKey{}), true); reused {
						time.Sleep(tt.work)
						if c, _, err := http.NewResponseController(w).Hijack(); err == nil {
							io.WriteString(c, tt.begun)
							c.Close()
						}
						return
					}
					answerJSON(w, 200, "{}")
				})
				for range idle {
					clients.Go(func() { io.Copy(io.Discard, b.post(t, "/v1/chat/completions", `{"messages":["warm"]}`).Body) })
				}
				clients.Wait()
				req, _ := http.NewRequest("POST", "http://proxy/v1/chat/completions", strings.NewReader(ordinaryChat))
				req.Header.Set("Idempotency-Key", "key-1")
				res, err := b.client.Do(req)
				fatalIf(t, err)
				res.Body.Close()
				n := executed.Load()
				wantEqual(t, "status and executions", tt.want, fmt.Sprint(res.StatusCode, " ", n))
				synctest.Wait()
				if counted, logged := b.metrics(t)["qwen_proxy_upstream_replays_total"], strings.Count(b.log.String(), `"replayed":true`); counted != float64(n-1) || logged != int(n-1) {
					t.Errorf("%v replays are counted, %v logged, want %d", counted, logged, n-1)
				}
			})
		}
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
