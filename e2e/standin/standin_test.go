package main

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestUnauthorized(t *testing.T) {
	s := newStandIn()
	c := newClient(t, s)
	for _, path := range []string{"/v1/chat/completions", "/v1/embeddings", "/v1/nothing"} {
		resp, body := c.do("POST", path, "application/json", "{}")
		want := object{"request_id": resp.Header.Get("X-Request-Id"), "error": object{"code": "invalid_api_key",
			"message": "invalid access token or token expired", "param": nil, "type": "invalid_request_error"}}
		wantEqual(t, path, []any{401, want}, []any{resp.StatusCode, parseObject(t, body)})
	}
	resp, body := c.do("POST", "/apps/anthropic/v1/messages", "application/json", "{}")
	want := object{"type": "error", "request_id": resp.Header.Get("X-Request-Id"),
		"error": object{"type": "authentication_error", "message": "invalid access token or token expired"}}
	wantEqual(t, "messages", []any{401, want}, []any{resp.StatusCode, parseObject(t, body)})
	if got := s.counts().unauthorized; got != 4 {
		t.Errorf("%d counted as unauthorized, want 4", got)
	}
}

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

func TestRefusesBadAPIRequests(t *testing.T) {
	s := newStandIn()
	c := newClient(t, s)
	c.signIn()
	const chat, embeddings = "POST /v1/chat/completions", "POST /v1/embeddings"
	const messages = `"model":"m","messages":[{"role":"user","content":"Hi"}]`
	for _, test := range []struct {
		name, route, body string
		status            int
		code, param       any
	}{
		{"no JSON", chat, `{"model"`, 400, "invalid_json", nil},
		{"empty", chat, ``, 400, "invalid_json", nil},
		{"more than JSON", chat, `{` + messages + `}}`, 400, "invalid_json", nil},
		{"another type", chat, `{"model":"m","messages":"Hi"}`, 400, "invalid_json", nil},
		{"content of another type", chat, `{"model":"m","messages":[{"content":1}]}`, 400, "invalid_json", nil},
		{"no model", chat, `{"messages":[{}]}`, 400, "missing_required_parameter", "model"},
		{"no messages", chat, `{"model":"m"}`, 400, "missing_required_parameter", "messages"},
		{"empty messages", chat, `{"model":"m","messages":[]}`, 400, "missing_required_parameter", "messages"},
		{"n of 0", chat, `{` + messages + `,"n":0}`, 400, "invalid_value", "n"},
		{"n of 9", chat, `{` + messages + `,"n":9}`, 400, "invalid_value", "n"},
		{"max_tokens", chat, `{` + messages + `,"max_tokens":0}`, 400, "invalid_value", "max_tokens"},
		{"max_completion_tokens", chat, `{` + messages + `,"max_completion_tokens":-1}`, 400, "invalid_value", "max_completion_tokens"},
		{"tool that is not there", chat, `{` + messages + `,"tool_choice":{"function":{"name":"f"}}}`, 400, "invalid_value", "tool_choice"},
		{"tool_choice", chat, `{` + messages + `,"tool_choice":1}`, 400, "invalid_json", nil},
		{"embeddings without model", embeddings, `{"input":"x"}`, 400, "missing_required_parameter", "model"},
		{"no input", embeddings, `{"model":"m"}`, 400, "invalid_value", "input"},
		{"empty input", embeddings, `{"model":"m","input":""}`, 400, "invalid_value", "input"},
		{"input of tokens", embeddings, `{"model":"m","input":[1,2]}`, 400, "invalid_json", nil},
		{"too many inputs", embeddings, `{"model":"m","input":["x"` + strings.Repeat(`,"x"`, 2048) + `]}`, 400, "invalid_value", "input"},
		{"dimensions", embeddings, `{"model":"m","input":"x","dimensions":0}`, 400, "invalid_value", "dimensions"},
		{"encoding_format", embeddings, `{"model":"m","input":"x","encoding_format":"hex"}`, 400, "invalid_value", "encoding_format"},
		{"another route", "POST /v1/nothing", `{}`, 404, "not_found", nil},
		{"another method", "GET /v1/chat/completions", ``, 404, "not_found", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := *c
			c.t = t
			method, path, _ := strings.Cut(test.route, " ")
			resp, body := c.do(method, path, "application/json", test.body)
			answer := parseObject(t, body)
			e, _ := answer["error"].(object)
			wantEqual(t, "refusal", []any{test.status, "invalid_request_error", test.code, test.param, resp.Header.Get("X-Request-Id")},
				[]any{resp.StatusCode, e["type"], e["code"], e["param"], answer["request_id"]})
			if message, _ := e["message"].(string); message == "" {
				t.Error("no message")
			}
		})
	}
	if got := s.counts().chats; got != 0 {
		t.Errorf("%d chats counted, want none", got)
	}
	if resp, _ := c.do("GET", "/elsewhere", "", ""); resp.StatusCode != http.StatusNotFound {
		t.Errorf("outside of /v1: %d", resp.StatusCode)
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
		r, err := http.NewRequestWithContext(t.Context(), "POST", c.base+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
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
			if err != nil {
				t.Fatal(err)
			}
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

func TestLimitsBodies(t *testing.T) {
	s := newStandIn()
	s.maxBody = 1000
	c := newClient(t, s)
	c.signIn()
	for size, want := range map[int]int{1000: http.StatusBadRequest, 1001: http.StatusRequestEntityTooLarge} {
		status, answer := c.post("/v1/chat/completions", strings.Repeat(" ", size))
		wantEqual(t, "status, type", []any{want, "invalid_request_error"}, []any{status, dig(answer, "error", "type")})
	}
}

func TestModels(t *testing.T) {
	c := newClient(t, newStandIn())
	c.signIn()
	_, body := c.do("GET", "/v1/models", "", "")
	answer := parseObject(t, body)
	var ids []any
	for _, model := range answer["data"].([]any) {
		ids = append(ids, dig(model, "id"))
		wantEqual(t, "object", "model", dig(model, "object"))
	}
	wantEqual(t, "models", []any{"qwen3-coder-plus", "qwen3-coder-flash", "coder-model", "text-embedding-v4"}, ids)
	wantEqual(t, "object", "list", answer["object"])
}
