package main

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestKey(t *testing.T) {
	s := newStandIn()
	c := newClient(t, s)
	for _, test := range []struct {
		key, sent string
		status    int
	}{
		{"sk-demo", "sk-demo", 200},
		{"sk-demo", "sk-other", 401},
		{"sk-demo", "", 401},
		{"", "", 401},
	} {
		s.key, c.token = test.key, test.sent
		resp, body := c.do("GET", "/compatible-mode/v1/models", "", "")
		if resp.StatusCode != test.status {
			t.Errorf("key %q, sent %q: %d %s", test.key, test.sent, resp.StatusCode, body)
		}
	}
}

func TestFails(t *testing.T) {
	s := newStandIn()
	s.wordDelay = 0
	c := newClient(t, s)
	c.signIn()
	const chat, responses, embeddings, messages = "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/apps/anthropic/v1/messages"
	ask := func(path, model string, stream bool) (*http.Response, string, error) {
		body := marshalText(object{"model": model, "stream": stream, "max_tokens": 100, "input": "Hi",
			"messages": []object{{"role": "user", "content": "Hi"}}})
		r, err := http.NewRequest("POST", c.base+path, strings.NewReader(body))
		fatalIf(t, err)
		r.Header.Set("Authorization", "Bearer "+c.token)
		resp, err := c.client.Do(r)
		if err != nil {
			return nil, "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return resp, string(b), err
	}
	for _, path := range []string{chat, responses, embeddings, messages} {
		for _, test := range []struct {
			model      string
			status     int
			retryAfter string
		}{
			{"error-400", 400, ""}, {"error-429", 429, "1"}, {"error-599", 599, ""},
			{"error-399", 200, ""}, {"error-600", 200, ""}, {"error-", 200, ""}, {"500", 200, ""},
		} {
			resp, body, err := ask(path, test.model, false)
			fatalIf(t, err)
			wantEqual(t, path+" "+test.model, []any{test.status, test.retryAfter}, []any{resp.StatusCode, resp.Header.Get("Retry-After")})
			if _, ok := dig(parseObject(t, body), "error", "message").(string); ok != (test.status != 200) {
				t.Errorf("%s %s: %s", path, test.model, body)
			}
		}
	}
	for _, path := range []string{chat, responses, messages} {
		if _, body, err := ask(path, breakingModel, false); err == nil {
			t.Errorf("%s: answered with %s", path, body)
		}
		if _, body, err := ask(path, breakingModel, true); err == nil || !strings.Contains(body, `" is"`) || strings.Contains(body, "stand-in") {
			t.Errorf("%s: the stream is %q, %v; want it to break after two words", path, body, err)
		}
	}
}
