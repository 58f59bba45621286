package main

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// send makes a request with the headers that set puts in and a body that the path takes, and returns the answer, read
// whole.
func (p *program) send(method, path string, set func(*http.Request)) (*http.Response, string) {
	p.t.Helper()
	body := `{"messages":[],"input":"x"}`
	if strings.HasSuffix(path, "/completions") && !strings.HasSuffix(path, "/chat/completions") {
		body = `{"prompt":"x"}`
	}
	req, err := http.NewRequest(method, p.url+path, strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	if set != nil {
		set(req)
	}
	res, err := http.DefaultTransport.RoundTrip(req) // follows no redirects
	if err != nil {
		p.t.Fatal(err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return res, string(answer)
}

// header returns what puts a header in.
func header(name, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(name, value) }
}

func TestAccessKeys(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {}, map[string]string{"PROXY_API_KEYS": "key-1, key:2", "LOG_LEVEL": "debug", "DEBUG_MODE": "true"})
	for _, tt := range []struct {
		name string
		set  func(*http.Request)
		ok   bool
	}{
		{"a bearer token", header("Authorization", "Bearer key-1"), true},
		{"the second key", header("Authorization", "Bearer key:2"), true},
		{"bearer in lower case", header("Authorization", "bearer key-1"), true},
		{"bearer in upper case", header("Authorization", "BEARER key-1"), true},
		{"more blanks", header("Authorization", "Bearer   key-1"), true},
		{"x-api-key", header("x-api-key", "key-1"), true},
		{"Basic", func(r *http.Request) { r.SetBasicAuth("anyone", "key-1") }, true},
		{"Basic without a user", func(r *http.Request) { r.SetBasicAuth("", "key-1") }, true},
		{"Basic with a colon in the key", func(r *http.Request) { r.SetBasicAuth("anyone", "key:2") }, true},
		{"Basic in lower case", header("Authorization", "basic YTprZXktMQ=="), true}, // a:key-1
		{"x-api-key beside a foreign scheme", func(r *http.Request) {
			r.Header.Set("Authorization", "Digest x")
			r.Header.Set("X-Api-Key", "key-1")
		}, true},

		{"nothing", nil, false},
		{"a wrong key", header("Authorization", "Bearer wr0ng-key"), false},
		{"the beginning of a key", header("Authorization", "Bearer key-"), false},
		{"a key and more", header("Authorization", "Bearer key-11"), false},
		{"a key in another case", header("Authorization", "Bearer KEY-1"), false},
		{"both keys", header("Authorization", "Bearer key-1, key:2"), false},
		{"a comma", header("Authorization", "Bearer ,"), false},
		{"an empty bearer token", header("Authorization", "Bearer "), false},
		{"a key without a scheme", header("Authorization", "key-1"), false},
		{"another scheme", header("Authorization", "Token key-1"), false},
		{"a wrong x-api-key", header("X-Api-Key", "wr0ng-key"), false},
		{"an empty x-api-key", header("X-Api-Key", ""), false},
		{"another header", header("Api-Key", "key-1"), false},
		{"Basic with the key as user", func(r *http.Request) { r.SetBasicAuth("key-1", "") }, false},
		{"Basic with a wrong key", func(r *http.Request) { r.SetBasicAuth("anyone", "wr0ng-key") }, false},
		{"broken Basic", header("Authorization", "Basic key-1"), false},
		{"in the query", func(r *http.Request) { r.URL.RawQuery = "api_key=key-1&key=key-1" }, false},
		{"in a cookie", header("Cookie", "Authorization=Bearer key-1"), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			res, body := p.send("GET", "/v1/models", tt.set)
			if tt.ok {
				if res.StatusCode != http.StatusOK || res.Header.Get("WWW-Authenticate") != "" {
					t.Errorf("got %s %s, want 200", res.Status, body)
				}
				return
			}
			e := wantError(t, res, body, http.StatusUnauthorized, typeAuthentication, "invalid_api_key")
			if !strings.Contains(e.Error.Message, "PROXY_API_KEYS") || strings.Contains(body, "key-1") || strings.Contains(body, "wr0ng") {
				t.Errorf("message %q: want it to name PROXY_API_KEYS and to tell no key", e.Error.Message)
			}
			if got := res.Header.Get("WWW-Authenticate"); !strings.HasPrefix(got, "Basic realm=") { // RFC 9110 §11.6.1
				t.Errorf("WWW-Authenticate %q, want Basic, so that browsers ask", got)
			}
		})
	}
	for _, key := range []string{"key-1", "key:2", "wr0ng-key"} {
		if strings.Contains(p.stderr.String(), key) {
			t.Errorf("the log tells the key %s", key)
		}
	}
}

func TestAccessByRoute(t *testing.T) {
	var calls atomic.Int64
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"choices":[{"index":0,"message":{"role":"assistant","content":"x"},"finish_reason":"stop"}]}`)
	}, map[string]string{"PROXY_API_KEYS": "key-1"})
	const proxied = 1 // calls of Qwen
	for _, tt := range []struct {
		route  string
		closed bool
		calls  int64
	}{
		{route: "GET /"},
		{route: "GET /health"},
		{route: "HEAD /health"},
		{route: "GET /health/ready"},
		{route: "GET /health/detailed", closed: true},
		{route: "HEAD /health/detailed", closed: true},
		{route: "GET /auth", closed: true},
		{route: "GET /v1/models", closed: true},
		{route: "HEAD /v1/models", closed: true},
		{route: "GET /v1/models/coder-model", closed: true},
		{route: "GET /models", closed: true},
		{route: "GET /models/coder-model", closed: true},
		{"POST /v1/chat/completions", true, proxied},
		{"POST /v1//chat/completions", true, proxied},
		{"POST //v1/chat/completions", true, proxied},
		{"POST /chat/completions", true, proxied},
		{"POST /v1/completions", true, proxied},
		{"POST /completions", true, proxied},
		{"POST /v1/embeddings", true, proxied},
		{"POST /embeddings", true, proxied},
		{"POST /v1/responses", true, proxied},
		{"POST /responses", true, proxied},
	} {
		t.Run(tt.route, func(t *testing.T) {
			method, path, _ := strings.Cut(tt.route, " ")
			calls.Store(0)
			for name, set := range map[string]func(*http.Request){"no": nil, "a wrong": header("Authorization", "Bearer key-2")} {
				want := http.StatusOK
				if tt.closed {
					want = http.StatusUnauthorized
				}
				if res, body := p.send(method, path, set); res.StatusCode != want {
					t.Errorf("with %s key: %s %s, want %d", name, res.Status, body, want)
				}
			}
			if n := calls.Load(); n != 0 {
				t.Errorf("%d requests reached Qwen without a key", n)
			}
			if res, body := p.send(method, path, header("Authorization", "Bearer key-1")); res.StatusCode != http.StatusOK {
				t.Errorf("with the key: %s %s", res.Status, body)
			}
			if n := calls.Load(); n != tt.calls {
				t.Errorf("%d requests reached Qwen with the key, want %d", n, tt.calls)
			}
		})
	}
}

func TestAccessIsOpenWithoutKeys(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "{}") }, nil)
	for name, set := range map[string]func(*http.Request){
		"nothing":    nil,
		"some key":   header("Authorization", "Bearer whatever"),
		"some Basic": func(r *http.Request) { r.SetBasicAuth("a", "b") },
	} {
		for _, route := range []string{"GET /v1/models", "GET /health/detailed", "POST /v1/chat/completions"} {
			method, path, _ := strings.Cut(route, " ")
			if res, body := p.send(method, path, set); res.StatusCode != http.StatusOK {
				t.Errorf("%s with %s: %s %s", route, name, res.Status, body)
			}
		}
	}
}

func TestAccessKeysOfAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(file, []byte("# n8n\r\nkey-1\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, map[string]string{"QWEN_API_KEY": "sk-test", "PROXY_API_KEYS_FILE": file})
	for key, want := range map[string]int{"key-1": http.StatusOK, "# n8n": http.StatusUnauthorized, "n8n": http.StatusUnauthorized, "sk-test": http.StatusUnauthorized} {
		if res, body := p.send("GET", "/v1/models", header("X-Api-Key", key)); res.StatusCode != want {
			t.Errorf("key %q: %s %s, want %d", key, res.Status, body, want)
		}
	}
}
