package main

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
)

// Anthropic's SDKs take the id of a request from request-id, whatever became of it.
func TestAnthropicsClientsFindTheRequestID(t *testing.T) {
	t.Parallel()
	p := start(t, map[string]string{"QWEN_API_KEY": "sk-test", "API_BASE_URL": "http://127.0.0.1:1/v1", "PROXY_API_KEYS": "sk-mine"})
	for _, tt := range []struct {
		method, path, version, key string
		status                     int
	}{
		{"GET", "/v1/models", "2023-06-01", "sk-mine", 200},
		{"GET", "/v1/models", "", "sk-mine", 200},
		{"POST", "/v1/messages", "2023-06-01", "sk-wrong", 401},
		{"POST", "/v1/messages", "2023-06-01", "sk-mine", 502},
		{"POST", "/v2/messages", "2023-06-01", "sk-mine", 404},
	} {
		res, body := p.send(tt.method, tt.path, func(r *http.Request) {
			r.Header.Set("X-Api-Key", tt.key)
			if tt.version != "" {
				r.Header.Set("Anthropic-Version", tt.version)
			}
		})
		want := ""
		if tt.version != "" {
			want = res.Header.Get("X-Request-Id")
		}
		if got := res.Header.Get("Request-Id"); res.StatusCode != tt.status || got != want {
			t.Errorf("%s %s, version %q: %s, Request-Id %q, want %q: %s", tt.method, tt.path, tt.version, res.Status, got, want, body)
		}
	}
}

// TestAnthropicsClientsFindTheErrorsType: every error on /v1/messages says that it is one, and no other error does.
func TestAnthropicsClientsFindTheErrorsType(t *testing.T) {
	answer := func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusBadGateway)
		io.WriteString(w, "<html>")
	}
	open := startWith(t, answer, map[string]string{"QWEN_API_KEY": "sk-qwen"})
	signedIn := startWith(t, answer, nil)
	locked := startWith(t, answer, map[string]string{"QWEN_API_KEY": "sk-qwen", "PROXY_API_KEYS": "sk-mine"})
	limited := startWith(t, answer, map[string]string{"QWEN_API_KEY": "sk-qwen", "RATE_LIMIT_RPS": "0.001", "RATE_LIMIT_BURST": "1"})
	limited.post("/v1/messages", `{"messages":[]}`)
	for _, tt := range []struct {
		name       string
		p          *program
		method     string
		path, body string
		status     int
		anthropic  bool
	}{
		{"a broken body", open, "POST", "/v1/messages", `{`, 400, true},
		{"without /v1", open, "POST", "/messages", `{`, 400, true},
		{"with a slash too many", open, "POST", "//v1/messages", `{`, 400, true},
		{"count_tokens", open, "POST", "/v1/messages/count_tokens", `{`, 400, true},
		{"another method", open, "GET", "/v1/messages", "", 405, true},
		{"no such path", open, "POST", "/v1/messages/batches", "", 404, true},
		{"an error of Qwen's that is wrapped", open, "POST", "/v1/messages", `{"messages":[]}`, 502, true},
		{"no key for Qwen", signedIn, "POST", "/v1/messages", `{"messages":[]}`, 404, true},
		{"no key for the proxy", locked, "POST", "/v1/messages", `{"messages":[]}`, 401, true},
		{"limited", limited, "POST", "/v1/messages", `{"messages":[]}`, 429, true},
		{"a chat", open, "POST", "/v1/chat/completions", `{`, 400, false},
		{"another path", open, "GET", "/v1/messages-of-mine", "", 404, false},
	} {
		res, body := tt.p.do(tt.method, tt.path, strings.NewReader(tt.body))
		if res.StatusCode != tt.status || strings.HasPrefix(body, `{"type":"error","error":{"message":`) != tt.anthropic || strings.HasPrefix(body, `{"error":{"message":`) == tt.anthropic {
			t.Errorf("%s: %s %s", tt.name, res.Status, body)
		}
		if !json.Valid([]byte(body)) || !strings.Contains(body, `"request_id":`) {
			t.Errorf("%s: %s", tt.name, body)
		}
	}
}
