package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A standInClient calls a standIn without a network.
type standInClient struct {
	t     *testing.T
	s     *standIn
	token string // sent as bearer
}

// newStandInClient returns a client of a standIn that streams without pauses.
func newStandInClient(t *testing.T) *standInClient {
	s := newStandIn()
	s.wordDelay = 0
	return &standInClient{t: t, s: s}
}

// send sends a form where contentType is "", else JSON, and returns the response.
func (c *standInClient) send(method, path string, body any) (int, string) {
	c.t.Helper()
	content, contentType := "", "application/x-www-form-urlencoded"
	switch body := body.(type) {
	case url.Values:
		content = body.Encode()
	case string:
		content, contentType = body, "application/json"
	}
	r := httptest.NewRequestWithContext(c.t.Context(), method, "http://qwen.test"+path, strings.NewReader(content))
	r.Header.Set("Content-Type", contentType)
	r.Header.Set("Authorization", "Bearer "+c.token)
	w := httptest.NewRecorder()
	c.s.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

// object sends as send does, and returns the answer's JSON, its status as the member "status".
func (c *standInClient) object(method, path string, body any) object {
	c.t.Helper()
	status, answer := c.send(method, path, body)
	var o object
	if err := json.Unmarshal([]byte(answer), &o); err != nil {
		c.t.Fatalf("%v in %s", err, answer)
	}
	o["status"] = status
	return o
}

// authorize begins a sign-in, and returns its device code and its user code.
func (c *standInClient) authorize() (deviceCode, userCode string) {
	c.t.Helper()
	device := c.object("POST", "/api/v1/oauth2/device/code", url.Values{})
	deviceCode, _ = device["device_code"].(string)
	userCode, _ = device["user_code"].(string)
	link := "http://qwen.test/authorize"
	want := object{"status": 200, "device_code": deviceCode, "user_code": userCode, "verification_uri": link,
		"verification_uri_complete": link + "?user_code=" + userCode + "&client=qwen-code", "expires_in": 900.0, "interval": 1.0}
	if diff := cmp.Diff(want, device); diff != "" || deviceCode == "" || userCode == "" {
		c.t.Fatalf("device authorization (-want +got):\n%s", diff)
	}
	return deviceCode, userCode
}

func (c *standInClient) poll(deviceCode string) object {
	c.t.Helper()
	return c.object("POST", "/api/v1/oauth2/token", url.Values{
		"grant_type": {"urn:ietf:params:oauth:grant-type:device_code"}, "device_code": {deviceCode}})
}

// signIn signs in by way of the page, and sends the access token from here on.
func (c *standInClient) signIn() (tokens object) {
	c.t.Helper()
	deviceCode, userCode := c.authorize()
	if _, page := c.send("POST", "/authorize", url.Values{"user_code": {userCode}, "decision": {"approve"}}); !strings.Contains(page, "Approved.") {
		c.t.Fatalf("the page after approving:\n%s", page)
	}
	tokens = c.poll(deviceCode)
	if c.token, _ = tokens["access_token"].(string); c.token == "" || tokens["refresh_token"] == "" {
		c.t.Fatalf("tokens %v", tokens)
	}
	return tokens
}

func TestStandInChat(t *testing.T) {
	const intro = `This is qwen-go-proxy's stand-in for Qwen, not a model. `
	const weather = `,"tools":[{"type":"function","function":{"name":"weather","parameters":{"type":"object","required":["city","unit"],
		"properties":{"city":{"type":"string"},"unit":{"type":"string"},"more":{"type":"string"}}}}}]`
	type message struct {
		Content   string
		ToolCalls []struct {
			Function struct{ Name, Arguments string }
		} `json:"tool_calls"`
	}
	type completion struct {
		Choices []struct {
			Message, Delta message
			FinishReason   string `json:"finish_reason"`
		}
		Usage map[string]int
	}
	// told is what the parts of an answer say: text, call and reason of the end.
	told := func(parts ...completion) string {
		var text, call, finish string
		for _, p := range parts {
			for _, c := range p.Choices {
				text += c.Message.Content + c.Delta.Content
				finish += c.FinishReason
				for _, tool := range append(c.Message.ToolCalls, c.Delta.ToolCalls...) {
					call += tool.Function.Name + tool.Function.Arguments
				}
			}
		}
		return text + call + " " + finish
	}
	for _, tt := range []struct{ name, body, want string }{
		{"text", `"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi there"}]`, intro + `You said: "Hi there" stop`},
		{"parts", `"messages":[{"role":"user","content":[{"type":"text","text":"Hi "},{"type":"image_url"},{"type":"text","text":"there"}]}]`, intro + `You said: "Hi there" stop`},
		{"no messages", `"messages":[]`, intro + `You said: "" stop`},
		{"a tool", `"messages":[{"role":"user","content":"Hi"}]` + weather, `weather{"city":"Hi","unit":"Hi"} tool_calls`},
		{"a tool without parameters", `"messages":[{"role":"user","content":"Hi"}],"tools":[{"function":{"name":"weather"}}]`, `weather{} tool_calls`},
		{"a tool's result", `"messages":[{"role":"user","content":"Hi"},{"role":"assistant"},{"role":"tool","content":"20 °C"}]` + weather, intro + `The tool answered: "20 °C" stop`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newStandInClient(t)
			c.signIn()
			var whole completion
			_, body := c.send("POST", "/v1/chat/completions", `{"model":"m",`+tt.body+`}`)
			fatalIf(t, json.Unmarshal([]byte(body), &whole))
			wantEqual(t, "answer", tt.want, told(whole))
			_, stream := c.send("POST", "/v1/chat/completions", `{"model":"m","stream":true,"stream_options":{"include_usage":true},`+tt.body+`}`)
			stream, ok := strings.CutSuffix(stream, "\n\ndata: [DONE]\n\n")
			if !ok {
				t.Fatalf("the stream does not end with [DONE]: %s", stream)
			}
			var parts []completion
			for event := range strings.SplitSeq(stream, "\n\n") {
				var part completion
				fatalIf(t, json.Unmarshal([]byte(strings.TrimPrefix(event, "data: ")), &part))
				parts = append(parts, part)
			}
			wantEqual(t, "stream", tt.want, told(parts...))
			if u := whole.Usage; u["total_tokens"] == 0 || u["total_tokens"] != u["prompt_tokens"]+u["completion_tokens"] {
				t.Errorf("usage %v", u)
			}
			wantEqual(t, "the stream's usage", whole.Usage, parts[len(parts)-1].Usage)
		})
	}
}

func TestStandInErrors(t *testing.T) {
	c := newStandInClient(t)
	for _, tt := range []struct {
		name, route, body string
		signedOut         bool
		status            int
		code              any
	}{
		{"no token", "POST /v1/chat/completions", `{}`, true, 401, "invalid_api_key"},
		{"error-400", "POST /v1/chat/completions", `{"model":"error-400"}`, false, 400, "provoked"},
		{"error-599", "POST /v1/chat/completions", `{"model":"error-599"}`, false, 599, "provoked"},
		{"error-600", "POST /v1/chat/completions", `{"model":"error-600"}`, false, 200, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &standInClient{t: t, s: c.s}
			if !tt.signedOut {
				c.signIn()
			}
			method, path, _ := strings.Cut(tt.route, " ")
			got := c.object(method, path, tt.body)
			failure, _ := got["error"].(object)
			if got["status"] != tt.status || failure["code"] != tt.code || (failure != nil && failure["message"] == "") {
				t.Errorf("%v, want status %d, code %v", got, tt.status, tt.code)
			}
		})
	}
}

func TestStandInBreaksOff(t *testing.T) {
	c := newStandInClient(t)
	c.signIn()
	server := httptest.NewServer(c.s)
	defer server.Close()
	for body, want := range map[string]string{
		`{"model":"error-midstream"}`:                                                         "",
		`{"model":"error-midstream","stream":true}`:                                           `"content":"is "`,
		`{"model":"error-midstream","stream":true,"messages":[{"role":"user"}],"tools":[{}]}`: `"tool_calls":[{`,
	} {
		got, err := "", error(nil)
		r, _ := http.NewRequest("POST", server.URL+"/v1/chat/completions", strings.NewReader(body))
		r.Header.Set("Authorization", "Bearer "+c.token)
		if res, doErr := server.Client().Do(r); doErr != nil {
			err = doErr
		} else {
			var b []byte
			b, err = io.ReadAll(res.Body)
			res.Body.Close()
			got = string(b)
		}
		if err == nil || !strings.Contains(got, want) || strings.Contains(got, "stand-in") || strings.Contains(got, "[DONE]") {
			t.Errorf("%s: %v, %q", body, err, got)
		}
	}
}

// authorizations returns how many device codes were issued and are not redeemed.
func (s *standIn) authorizations() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.signIns)
}
