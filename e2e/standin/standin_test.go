package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

const standInVerifier = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk" // RFC 7636 appendix B

// A standInClient calls a standIn, over HTTP or directly.
type standInClient struct {
	t      testing.TB
	client *http.Client
	base   string
	token  string // sent as bearer; "" for none
}

// serveStandIn serves s on a loopback port.
func serveStandIn(t testing.TB, s *standIn) *standInClient {
	t.Helper()
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	return &standInClient{t: t, client: server.Client(), base: server.URL}
}

// callStandIn calls s without a network, for synctest bubbles.
func callStandIn(t testing.TB, s *standIn) *standInClient {
	return &standInClient{t: t, client: &http.Client{Transport: standInTransport{s}}, base: "http://stand.in"}
}

type standInTransport struct{ handler http.Handler }

func (t standInTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	if r.Body == nil {
		r.Body = http.NoBody
	}
	t.handler.ServeHTTP(w, r)
	return w.Result(), nil
}

// do sends body, JSON or a form, and returns the response with its body read.
func (c *standInClient) do(method, path, contentType, body string) (*http.Response, string) {
	c.t.Helper()
	r, err := http.NewRequestWithContext(c.t.Context(), method, c.base+path, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	r.Header.Set("Content-Type", contentType)
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.client.Do(r)
	if err != nil {
		c.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp, string(b)
}

// form posts name and value pairs, and returns the status and the answer's JSON.
func (c *standInClient) form(path string, pairs ...string) (int, object) {
	c.t.Helper()
	form := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		form.Set(pairs[i], pairs[i+1])
	}
	resp, body := c.do("POST", path, "application/x-www-form-urlencoded", form.Encode())
	return resp.StatusCode, parseObject(c.t, body)
}

// post posts JSON, and returns the status and the answer's JSON.
func (c *standInClient) post(path, body string) (int, object) {
	c.t.Helper()
	resp, answer := c.do("POST", path, "application/json", body)
	return resp.StatusCode, parseObject(c.t, answer)
}

// authorize begins a sign-in.
func (c *standInClient) authorize() object {
	c.t.Helper()
	challenge := sha256.Sum256([]byte(standInVerifier))
	status, device := c.form("/api/v1/oauth2/device/code", "client_id", "client", "scope", "openid",
		"code_challenge", base64.RawURLEncoding.EncodeToString(challenge[:]), "code_challenge_method", "S256")
	if status != http.StatusOK {
		c.t.Fatalf("device authorization: %d %v", status, device)
	}
	return device
}

// poll redeems a device code.
func (c *standInClient) poll(device object) (int, object) {
	c.t.Helper()
	return c.form("/api/v1/oauth2/token", "grant_type", "urn:ietf:params:oauth:grant-type:device_code",
		"client_id", "client", "device_code", device["device_code"].(string), "code_verifier", standInVerifier)
}

// refresh redeems a refresh token.
func (c *standInClient) refresh(token any) (int, object) {
	c.t.Helper()
	return c.form("/api/v1/oauth2/token", "grant_type", "refresh_token", "client_id", "client",
		"refresh_token", token.(string))
}

// decide answers the page's question, "approve" or "deny".
func (c *standInClient) decide(device object, decision string) (int, string) {
	c.t.Helper()
	form := url.Values{"user_code": {device["user_code"].(string)}, "decision": {decision}}
	resp, body := c.do("POST", "/authorize", "application/x-www-form-urlencoded", form.Encode())
	return resp.StatusCode, body
}

// signIn signs in by way of the page, sends the access token from here on, and returns the token response.
func (c *standInClient) signIn() object {
	c.t.Helper()
	device := c.authorize()
	c.decide(device, "approve")
	status, tokens := c.poll(device)
	if status != http.StatusOK {
		c.t.Fatalf("sign-in: %d %v", status, tokens)
	}
	c.token = tokens["access_token"].(string)
	return tokens
}

func parseObject(t testing.TB, s string) object {
	t.Helper()
	var o object
	if err := json.Unmarshal([]byte(s), &o); err != nil {
		t.Fatalf("%v in %s", err, s)
	}
	return o
}

// dig returns what is in v below the keys: strings of objects, ints of arrays.
func dig(v any, keys ...any) any {
	for _, key := range keys {
		switch key := key.(type) {
		case string:
			o, _ := v.(object)
			v = o[key]
		case int:
			a, ok := v.([]any)
			if !ok || key >= len(a) {
				return nil
			}
			v = a[key]
		}
	}
	return v
}

// diffStandIn reports how got differs from want.
func diffStandIn(t testing.TB, what string, want, got any) {
	t.Helper()
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s (-want +got):\n%s", what, d)
	}
}

func TestStandInSignIn(t *testing.T) {
	s := newStandIn()
	c := serveStandIn(t, s)
	device := c.authorize()
	code := device["user_code"].(string)
	if len(code) != 9 || strings.Trim(code, "BCDFGHJKLMNPQRSTVWXZ-") != "" || code[4] != '-' {
		t.Errorf("user code %q is not of the form BCDF-GHJK", code)
	}
	if c := device["device_code"].(string); len(c) < 22 {
		t.Errorf("device code %q can be guessed", c)
	}
	delete(device, "user_code")
	deviceCode := device["device_code"]
	delete(device, "device_code")
	diffStandIn(t, "device authorization", object{
		"verification_uri":          c.base + "/authorize",
		"verification_uri_complete": c.base + "/authorize?user_code=" + code + "&client=qwen-code",
		"expires_in":                900.0,
		"interval":                  2.0,
	}, device)

	device = object{"device_code": deviceCode, "user_code": code}
	status, answer := c.poll(device)
	diffStandIn(t, "pending", []any{400, "authorization_pending"}, []any{status, answer["error"]})
	if status, page := c.decide(device, "approve"); status != 200 || !strings.Contains(page, "Approved.") {
		t.Errorf("approving: %d\n%s", status, page)
	}
	status, tokens := c.poll(device)
	if status != http.StatusOK || tokens["access_token"] == "" || tokens["refresh_token"] == "" {
		t.Fatalf("redeeming: %d %v", status, tokens)
	}
	delete(tokens, "access_token")
	delete(tokens, "refresh_token")
	diffStandIn(t, "tokens", object{"token_type": "Bearer", "expires_in": 3600.0, "resource_url": c.base, "scope": "openid"}, tokens)
	status, answer = c.poll(device)
	diffStandIn(t, "redeeming twice", []any{400, "invalid_grant"}, []any{status, answer["error"]})
	if d := cmp.Diff(standInCounts{deviceAuthorizations: 1, polls: 3, signIns: 1}, s.counts(),
		cmp.AllowUnexported(standInCounts{})); d != "" {
		t.Errorf("counts (-want +got):\n%s", d)
	}
}

func TestStandInRefusesBadOAuthRequests(t *testing.T) {
	c := serveStandIn(t, newStandIn())
	challenge := strings.Repeat("c", 43)
	device := c.authorize()["device_code"].(string)
	const deviceGrant = "urn:ietf:params:oauth:grant-type:device_code"
	for _, test := range []struct {
		name   string
		path   string
		form   []string
		status int
		want   string
	}{
		{"no client", "/api/v1/oauth2/device/code",
			[]string{"code_challenge", challenge, "code_challenge_method", "S256"}, 400, "invalid_request"},
		{"no challenge", "/api/v1/oauth2/device/code",
			[]string{"client_id", "c", "code_challenge_method", "S256"}, 400, "invalid_request"},
		{"plain challenge", "/api/v1/oauth2/device/code",
			[]string{"client_id", "c", "code_challenge", challenge, "code_challenge_method", "plain"}, 400, "invalid_request"},
		{"no grant type", "/api/v1/oauth2/token", nil, 400, "unsupported_grant_type"},
		{"another grant type", "/api/v1/oauth2/token", []string{"grant_type", "password"}, 400, "unsupported_grant_type"},
		{"unknown device code", "/api/v1/oauth2/token",
			[]string{"grant_type", deviceGrant, "client_id", "client", "device_code", "x", "code_verifier", standInVerifier},
			401, "invalid_grant"},
		{"another verifier", "/api/v1/oauth2/token",
			[]string{"grant_type", deviceGrant, "client_id", "client", "device_code", device, "code_verifier", "x"},
			400, "invalid_grant"},
		{"another client", "/api/v1/oauth2/token",
			[]string{"grant_type", deviceGrant, "client_id", "x", "device_code", device, "code_verifier", standInVerifier},
			400, "invalid_grant"},
		{"unknown refresh token", "/api/v1/oauth2/token",
			[]string{"grant_type", "refresh_token", "client_id", "client", "refresh_token", "x"}, 400, "invalid_grant"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := *c
			c.t = t
			status, answer := c.form(test.path, test.form...)
			diffStandIn(t, "refusal", []any{test.status, test.want}, []any{status, answer["error"]})
			if answer["error_description"] == "" {
				t.Error("no error_description")
			}
		})
	}

	resp, body := c.do("POST", "/api/v1/oauth2/device/code", "application/json", `{"client_id":"client"}`)
	if resp.StatusCode != 400 || parseObject(t, body)["error"] != "invalid_request" {
		t.Errorf("JSON for a form: %d %s", resp.StatusCode, body)
	}
}

func TestStandInPolling(t *testing.T) {
	type poll struct {
		after time.Duration // since the poll before
		want  string        // the error; "" for tokens
	}
	for _, test := range []struct {
		name  string
		setup func(*standIn)
		polls []poll
	}{
		{"a sign-in approves itself", func(s *standIn) {},
			[]poll{{0, "authorization_pending"}, {2 * time.Second, "authorization_pending"}, {3 * time.Second, ""}}},
		{"a poll too early is told once", func(s *standIn) {},
			[]poll{{0, "authorization_pending"}, {1899 * time.Millisecond, "slow_down"}, {1900 * time.Millisecond, "authorization_pending"}}},
		{"without an interval none is too early", func(s *standIn) { s.interval = 0 },
			[]poll{{0, "authorization_pending"}, {0, "authorization_pending"}, {5 * time.Second, ""}}},
		{"only the page approves", func(s *standIn) { s.approveAfter = 0 },
			[]poll{{14 * time.Minute, "authorization_pending"}, {time.Minute, "expired_token"}}},
		{"a code expires unredeemed", func(s *standIn) { s.codeLife = 10 * time.Second },
			[]poll{{9 * time.Second, ""}, {9 * time.Second, "invalid_grant"}}},
		{"expired, then forgotten", func(s *standIn) {},
			[]poll{{15 * time.Minute, "expired_token"}, {15 * time.Minute, "invalid_grant"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStandIn()
				test.setup(s)
				c := callStandIn(t, s)
				device := c.authorize()
				var want, got []string
				for _, poll := range test.polls {
					time.Sleep(poll.after)
					_, answer := c.poll(device)
					code, _ := answer["error"].(string)
					want, got = append(want, poll.want), append(got, code)
				}
				diffStandIn(t, "answers", want, got)
			})
		})
	}
}

func TestStandInAnnouncesNoInterval(t *testing.T) {
	s := newStandIn()
	s.interval = 0
	if device := serveStandIn(t, s).authorize(); device["interval"] != nil {
		t.Errorf("interval %v announced", device["interval"])
	}
}

func TestStandInRotatesRefreshTokens(t *testing.T) {
	s := newStandIn()
	c := serveStandIn(t, s)
	first := c.signIn()
	status, second := c.refresh(first["refresh_token"])
	if status != http.StatusOK || second["refresh_token"] == first["refresh_token"] || second["access_token"] == first["access_token"] {
		t.Fatalf("refresh: %d %v", status, second)
	}
	status, answer := c.refresh(first["refresh_token"])
	diffStandIn(t, "replay", []any{400, "invalid_grant"}, []any{status, answer["error"]})
	for _, tokens := range []object{first, second} {
		c.token = tokens["access_token"].(string)
		if resp, body := c.do("GET", "/v1/models", "", ""); resp.StatusCode != http.StatusOK {
			t.Errorf("an access token that has not expired: %d %s", resp.StatusCode, body)
		}
	}
	if status, third := c.refresh(second["refresh_token"]); status != http.StatusOK {
		t.Errorf("refresh after a replay: %d %v", status, third)
	}
	status, answer = c.form("/api/v1/oauth2/token", "grant_type", "refresh_token", "client_id", "another",
		"refresh_token", c.signIn()["refresh_token"].(string))
	diffStandIn(t, "another client", []any{400, "invalid_grant"}, []any{status, answer["error"]})
	if d := cmp.Diff(standInCounts{deviceAuthorizations: 2, polls: 2, signIns: 2, refreshes: 2, refreshesRefused: 2, replays: 1},
		s.counts(), cmp.AllowUnexported(standInCounts{})); d != "" {
		t.Errorf("counts (-want +got):\n%s", d)
	}
}

func TestStandInRedeemsARefreshTokenOnce(t *testing.T) {
	s := newStandIn()
	c := serveStandIn(t, s)
	token := c.signIn()["refresh_token"]
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() { c.refresh(token) })
	}
	all.Wait()
	if got := s.counts(); got.refreshes != 1 || got.replays != 7 {
		t.Errorf("8 refreshes with one token: %+v", got)
	}
}

func TestStandInTokensExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStandIn()
		c := callStandIn(t, s)
		tokens := c.signIn()
		time.Sleep(s.tokenLife - time.Nanosecond)
		if resp, body := c.do("GET", "/v1/models", "", ""); resp.StatusCode != http.StatusOK {
			t.Fatalf("just before expiry: %d %s", resp.StatusCode, body)
		}
		time.Sleep(time.Nanosecond)
		if resp, body := c.do("GET", "/v1/models", "", ""); resp.StatusCode != http.StatusUnauthorized {
			t.Fatalf("at expiry: %d %s", resp.StatusCode, body)
		}
		if status, answer := c.refresh(tokens["refresh_token"]); status != http.StatusOK {
			t.Errorf("refresh after expiry: %d %v", status, answer)
		}
	})
}

func TestStandInForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStandIn()
		c := callStandIn(t, s)
		for range 200 {
			tokens := c.signIn()
			c.refresh(tokens["refresh_token"])
			time.Sleep(24 * time.Hour)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.signIns) > 1 || len(s.accessTokens) > 2 || len(s.grants) > 91 {
			t.Errorf("%d sign-ins, %d access tokens, %d grants kept", len(s.signIns), len(s.accessTokens), len(s.grants))
		}
	})
}

func TestStandInPage(t *testing.T) {
	s := newStandIn()
	c := serveStandIn(t, s)
	device := c.authorize()
	code := device["user_code"].(string)
	for _, test := range []struct {
		name   string
		path   string
		status int
		want   []string
	}{
		{"no code", "/authorize", 200, []string{`name="user_code" placeholder`, "stand-in for Qwen", "No account is involved"}},
		{"a code that waits", "/authorize?user_code=" + code + "&client=qwen-code", 200,
			[]string{code, `value="approve"`, `value="deny"`, "stand-in for Qwen", "No account is involved", "approves itself 5s after"}},
		{"as people type it", "/authorize?user_code=" + strings.ToLower(strings.Replace(code, "-", "+", 1)), 200, []string{code, `value="approve"`}},
		{"unknown code", "/authorize?user_code=%3Cb%3E", 404, []string{"No sign-in has the code &lt;b&gt;", `name="user_code" placeholder`}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := *c
			c.t = t
			resp, body := c.do("GET", test.path, "", "")
			if resp.StatusCode != test.status {
				t.Errorf("status %d, want %d", resp.StatusCode, test.status)
			}
			for _, want := range test.want {
				if !strings.Contains(body, want) {
					t.Errorf("%q is not in\n%s", want, body)
				}
			}
		})
	}

	if status, _ := c.decide(device, "maybe"); status != http.StatusBadRequest {
		t.Errorf("another decision: %d", status)
	}
	if status, _ := c.decide(object{"user_code": "XXXX"}, "approve"); status != http.StatusNotFound {
		t.Errorf("approving an unknown code: %d", status)
	}
	if status, page := c.decide(device, "deny"); status != 200 || !strings.Contains(page, "Denied.") {
		t.Errorf("denying: %d\n%s", status, page)
	}
	if _, page := c.decide(device, "approve"); !strings.Contains(page, "Denied.") {
		t.Errorf("approving what is denied:\n%s", page)
	}
	status, answer := c.poll(device)
	diffStandIn(t, "denied", []any{400, "access_denied"}, []any{status, answer["error"]})
}

func TestStandInUnauthorized(t *testing.T) {
	s := newStandIn()
	c := serveStandIn(t, s)
	for _, path := range []string{"/v1/chat/completions", "/v1/embeddings", "/v1/nothing"} {
		resp, body := c.do("POST", path, "application/json", "{}")
		want := object{"request_id": resp.Header.Get("X-Request-Id"), "error": object{"code": "invalid_api_key",
			"message": "invalid access token or token expired", "param": nil, "type": "invalid_request_error"}}
		diffStandIn(t, path, []any{401, want}, []any{resp.StatusCode, parseObject(t, body)})
	}
	resp, body := c.do("POST", "/apps/anthropic/v1/messages", "application/json", "{}")
	want := object{"type": "error", "request_id": resp.Header.Get("X-Request-Id"),
		"error": object{"type": "authentication_error", "message": "invalid access token or token expired"}}
	diffStandIn(t, "messages", []any{401, want}, []any{resp.StatusCode, parseObject(t, body)})
	if got := s.counts().unauthorized; got != 4 {
		t.Errorf("%d counted as unauthorized, want 4", got)
	}
}

func TestStandInKey(t *testing.T) {
	s := newStandIn()
	c := serveStandIn(t, s)
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

func TestStandInChat(t *testing.T) {
	const weather = `{"type":"function","function":{"name":"weather","parameters":{"type":"object","required":["city","unit","days"],
		"properties":{"city":{"type":"string"},"unit":{"type":"string","enum":["C","F"]},"days":{"type":"integer"},"more":{"type":"string"}}}}}`
	const now = `{"type":"function","function":{"name":"now"}}`
	const hi = `"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi there"}]`
	const hiAnswer = `This is qwen-go-proxy's stand-in for Qwen, not a model. You said: "Hi there"`
	const result = `"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":null},{"role":"tool","content":"20 °C"}]`

	for _, test := range []struct {
		name       string
		body       string
		want       string // the content
		finish     string
		tool, args string // the tool call
		thoughts   string
	}{
		{name: "text", body: hi, want: hiAnswer, finish: "stop"},
		{name: "null members", body: hi + `,"n":null,"max_tokens":null,"stop":null,"tools":null,"tool_choice":null,"stream_options":null,"response_format":null`,
			want: hiAnswer, finish: "stop"},
		{name: "parts", body: `"messages":[{"role":"user","content":[{"type":"text","text":"What is"},{"type":"image_url","image_url":{"url":"x"}},{"type":"text","text":"this?"}]}]`,
			want: `This is qwen-go-proxy's stand-in for Qwen, not a model. You said: "What is this?" Images sent along: 1.`, finish: "stop"},
		{name: "the last message of the user", body: `"messages":[{"role":"user","content":"a"},{"role":"user","content":"b\n\n c"},{"role":"assistant","content":"d"}]`,
			want: "This is qwen-go-proxy's stand-in for Qwen, not a model. You said: \"b\n\n c\"", finish: "stop"},
		{name: "max_tokens", body: hi + `,"max_tokens":3`, want: "This is qwen-go-proxy's", finish: "length"},
		{name: "max_completion_tokens", body: hi + `,"max_tokens":3,"max_completion_tokens":1`, want: "This", finish: "length"},
		{name: "max_tokens enough", body: hi + `,"max_tokens":13`, want: hiAnswer, finish: "stop"},
		{name: "stop", body: hi + `,"stop":" stand"`, want: "This is qwen-go-proxy's", finish: "stop"},
		{name: "stops", body: hi + `,"stop":["not a","","-proxy","nowhere"]`, want: "This is qwen-go", finish: "stop"},
		{name: "stop at once", body: hi + `,"stop":"This"`, want: "", finish: "stop"},
		{name: "tool", body: hi + `,"tools":[` + weather + `,` + now + `]`,
			finish: "tool_calls", tool: "weather", args: `{"city":"Hi there","days":1,"unit":"C"}`},
		{name: "tool in other scripts", body: `"messages":[{"role":"user","content":"天气怎么样？今天在北京，明天在上海"}],"tools":[` + weather + `]`,
			finish: "tool_calls", tool: "weather", args: `{"city":"天气怎么样？今天在北京，明天在上海","days":1,"unit":"C"}`},
		{name: "named tool", body: hi + `,"tools":[` + weather + `,` + now + `],"tool_choice":{"type":"function","function":{"name":"now"}}`,
			finish: "tool_calls", tool: "now", args: `{}`},
		{name: "no tool wanted", body: hi + `,"tools":[` + weather + `],"tool_choice":"none"`, want: hiAnswer, finish: "stop"},
		{name: "no tools", body: hi + `,"tools":[],"tool_choice":"auto"`, want: hiAnswer, finish: "stop"},
		{name: "tool result", body: result + `,"tools":[` + weather + `]`,
			want: `This is qwen-go-proxy's stand-in for Qwen, not a model. The tool answered: "20 °C"`, finish: "stop"},
		{name: "thinking", body: hi + `,"enable_thinking":true`, want: hiAnswer, finish: "stop", thoughts: standInThought},
		{name: "thinking before a call", body: hi + `,"enable_thinking":true,"tools":[` + now + `]`,
			finish: "tool_calls", tool: "now", args: `{}`, thoughts: standInThought},
		{name: "json_object", body: hi + `,"response_format":{"type":"json_object"}`,
			want: `{"answer":"This is qwen-go-proxy's stand-in for Qwen, not a model. You said: \"Hi there\""}`, finish: "stop"},
		{name: "json_schema", body: hi + `,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":"object","required":["s","n","b","a","o","z","m"],
			"properties":{"s":{"type":"string"},"n":{"type":"number"},"b":{"type":"boolean"},"a":{"type":"array"},"z":{"type":["null","string"]},
			"o":{"type":"object","required":["e"],"properties":{"e":{"enum":[2]}}},"m":{"anyOf":[{"type":"integer"},{"type":"null"}]}}}}}`,
			want: `{"a":[],"b":true,"m":1,"n":1,"o":{"e":2},"s":"Hi there","z":null}`, finish: "stop"},
		{name: "json_schema that is none", body: hi + `,"response_format":{"type":"json_schema","json_schema":{"schema":true}}`, want: `{}`, finish: "stop"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newStandIn()
			s.wordDelay = 0
			c := serveStandIn(t, s)
			c.signIn()

			status, answer := c.post("/v1/chat/completions", `{"model":"m",`+test.body+`}`)
			if status != http.StatusOK {
				t.Fatalf("%d %v", status, answer)
			}
			message := dig(answer, "choices", 0, "message")
			content, _ := dig(message, "content").(string)
			tool, _ := dig(message, "tool_calls", 0, "function", "name").(string)
			args, _ := dig(message, "tool_calls", 0, "function", "arguments").(string)
			thoughts, _ := dig(message, "reasoning_content").(string)
			want := []any{test.want, test.finish, test.tool, test.args, test.thoughts}
			diffStandIn(t, "completion", want, []any{content, dig(answer, "choices", 0, "finish_reason"), tool, args, thoughts})

			resp, stream := c.do("POST", "/v1/chat/completions", "application/json", `{"model":"m","stream":true,`+test.body+`}`)
			diffStandIn(t, "Content-Type", "text/event-stream;charset=UTF-8", resp.Header.Get("Content-Type"))
			content, tool, args, thoughts = "", "", "", ""
			var finish any
			for _, chunk := range standInEvents(t, stream) {
				delta := dig(chunk, "choices", 0, "delta")
				more, _ := dig(delta, "content").(string)
				content += more
				more, _ = dig(delta, "tool_calls", 0, "function", "name").(string)
				tool += more
				more, _ = dig(delta, "tool_calls", 0, "function", "arguments").(string)
				args += more
				more, _ = dig(delta, "reasoning_content").(string)
				thoughts += more
				finish = dig(chunk, "choices", 0, "finish_reason")
			}
			diffStandIn(t, "stream", want, []any{content, finish, tool, args, thoughts})
			if got := s.counts().chats; got != 2 {
				t.Errorf("%d chats counted, want 2", got)
			}
		})
	}
}

// standInEvents returns the JSON of each event of a stream that ends with [DONE].
func standInEvents(t testing.TB, stream string) []object {
	t.Helper()
	stream, ok := strings.CutSuffix(stream, "data: [DONE]\n\n")
	if !ok {
		t.Fatalf("the stream does not end with [DONE]:\n%s", stream)
	}
	var chunks []object
	for event := range strings.SplitSeq(strings.TrimSuffix(stream, "\n\n"), "\n\n") {
		data, ok := strings.CutPrefix(event, "data: ")
		if !ok {
			t.Fatalf("not an event: %q", event)
		}
		chunks = append(chunks, parseObject(t, data))
	}
	return chunks
}

func TestStandInChatShape(t *testing.T) {
	c := serveStandIn(t, newStandIn())
	c.signIn()
	resp, body := c.do("POST", "/v1/chat/completions", "application/json",
		`{"model":"qwen3-coder-plus","messages":[{"role":"user","content":"one two"}],"max_tokens":2,"n":2}`)
	answer := parseObject(t, body)
	id, _ := answer["id"].(string)
	created, _ := answer["created"].(float64)
	if !strings.HasPrefix(id, "chatcmpl-") || math.Abs(float64(time.Now().Unix())-created) > 60 || resp.Header.Get("X-Request-Id") == "" {
		t.Errorf("id %q, created %v, header %v", id, created, resp.Header)
	}
	delete(answer, "id")
	delete(answer, "created")
	choice := func(i float64) object {
		return object{"index": i, "finish_reason": "length", "message": object{"role": "assistant", "content": "This is"}}
	}
	diffStandIn(t, "completion", object{
		"object": "chat.completion", "model": "qwen3-coder-plus", "choices": []any{choice(0), choice(1)},
		"usage": object{"prompt_tokens": 2.0, "completion_tokens": 4.0, "total_tokens": 6.0},
	}, answer)
}

func TestStandInStreamShape(t *testing.T) {
	s := newStandIn()
	s.wordDelay = 0
	c := serveStandIn(t, s)
	c.signIn()
	post := func(body string) []object {
		_, stream := c.do("POST", "/v1/chat/completions", "application/json", body)
		chunks := standInEvents(t, stream)
		id := chunks[0]["id"]
		for i, chunk := range chunks {
			diffStandIn(t, "id", id, chunk["id"])
			diffStandIn(t, "object and model", []any{"chat.completion.chunk", "m"}, []any{chunk["object"], chunk["model"]})
			chunks[i] = object{"choices": chunk["choices"]}
			if usage, ok := chunk["usage"]; ok {
				chunks[i]["usage"] = usage
			}
		}
		return chunks
	}
	choice := func(index float64, delta object, finish any) []any {
		return []any{object{"index": index, "delta": delta, "finish_reason": finish}}
	}

	diffStandIn(t, "text with usage", []object{
		{"choices": choice(0, object{"role": "assistant", "content": ""}, nil), "usage": nil},
		{"choices": choice(0, object{"content": "This"}, nil), "usage": nil},
		{"choices": choice(0, object{"content": " is"}, nil), "usage": nil},
		{"choices": choice(0, object{}, "length"), "usage": nil},
		{"choices": []any{}, "usage": object{"prompt_tokens": 1.0, "completion_tokens": 2.0, "total_tokens": 3.0}},
	}, post(`{"model":"m","messages":[{"role":"user","content":"Hi"}],"max_tokens":2,"stream":true,"stream_options":{"include_usage":true}}`))

	diffStandIn(t, "two choices", []object{
		{"choices": choice(0, object{"role": "assistant", "content": ""}, nil)},
		{"choices": choice(1, object{"role": "assistant", "content": ""}, nil)},
		{"choices": choice(0, object{"content": "This"}, nil)},
		{"choices": choice(1, object{"content": "This"}, nil)},
		{"choices": choice(0, object{}, "length")},
		{"choices": choice(1, object{}, "length")},
	}, post(`{"model":"m","messages":[{"role":"user","content":"Hi"}],"max_tokens":1,"n":2,"stream":true}`))

	chunks := post(`{"model":"m","messages":[{"role":"user","content":"Hi"}],"stream":true,"tools":[{"type":"function",
		"function":{"name":"f","parameters":{"type":"object","required":["a"],"properties":{"a":{"type":"string"}}}}}]}`)
	call := dig(chunks[1], "choices", 0, "delta", "tool_calls", 0)
	if id, _ := dig(call, "id").(string); !strings.HasPrefix(id, "call_") {
		t.Errorf("tool call %v has no id", call)
	} else {
		delete(call.(object), "id")
	}
	diffStandIn(t, "tool call", []object{
		{"choices": choice(0, object{"role": "assistant", "content": ""}, nil)},
		{"choices": choice(0, object{"tool_calls": []any{object{"index": 0.0, "type": "function",
			"function": object{"name": "f", "arguments": ""}}}}, nil)},
		{"choices": choice(0, object{"tool_calls": []any{object{"index": 0.0, "function": object{"arguments": `{"a":"Hi`}}}}, nil)},
		{"choices": choice(0, object{"tool_calls": []any{object{"index": 0.0, "function": object{"arguments": `"}`}}}}, nil)},
		{"choices": choice(0, object{}, "tool_calls")},
	}, chunks)
}

func TestStandInStreamsWordByWord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStandIn()
		c := callStandIn(t, s)
		c.signIn()
		start := time.Now()
		c.do("POST", "/v1/chat/completions", "application/json", `{"model":"m","messages":[{"role":"user","content":"Hi"}],"stream":true,"max_tokens":5}`)
		diffStandIn(t, "time for 5 words", 4*s.wordDelay, time.Since(start))

		start = time.Now()
		c.do("POST", "/v1/chat/completions", "application/json", `{"model":"m","messages":[{"role":"user","content":"`+strings.Repeat("word ", 5000)+`"}],"stream":true}`)
		diffStandIn(t, "time for an agent's prompt", (standInPaced-1)*s.wordDelay, time.Since(start))
	})
}

func TestStandInStreamEndsWhenClientLeaves(t *testing.T) {
	s := newStandIn()
	s.wordDelay = time.Hour
	served := make(chan struct{})
	c := serveStandIn(t, s)
	c.signIn()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.ServeHTTP(w, r)
		close(served)
	}))
	defer server.Close()

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, "POST", server.URL+"/v1/chat/completions",
		strings.NewReader(`{"model":"m","messages":[{"role":"user","content":"Hi"}],"stream":true}`))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+c.token)
	resp, err := server.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	events := bufio.NewScanner(resp.Body)
	for events.Scan() && !strings.Contains(events.Text(), `"content":"This"`) {
	}
	if events.Err() != nil {
		t.Fatal(events.Err()) // else the first word is here while the stream goes on
	}
	cancel()
	<-served
}

func TestStandInRefusesBadAPIRequests(t *testing.T) {
	s := newStandIn()
	c := serveStandIn(t, s)
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
			diffStandIn(t, "refusal", []any{test.status, "invalid_request_error", test.code, test.param, resp.Header.Get("X-Request-Id")},
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

func TestStandInFails(t *testing.T) {
	s := newStandIn()
	s.wordDelay = 0
	c := serveStandIn(t, s)
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
			diffStandIn(t, path+" "+test.model, []any{test.status, test.retryAfter}, []any{resp.StatusCode, resp.Header.Get("Retry-After")})
			if _, ok := dig(parseObject(t, body), "error", "message").(string); ok != (test.status != 200) {
				t.Errorf("%s %s: %s", path, test.model, body)
			}
		}
	}
	for _, path := range []string{chat, responses, messages} {
		if _, body, err := ask(path, standInBreaks, false); err == nil {
			t.Errorf("%s: answered with %s", path, body)
		}
		if _, body, err := ask(path, standInBreaks, true); err == nil || !strings.Contains(body, `" is"`) || strings.Contains(body, "stand-in") {
			t.Errorf("%s: the stream is %q, %v; want it to break after two words", path, body, err)
		}
	}
}

func TestStandInLimitsBodies(t *testing.T) {
	s := newStandIn()
	s.maxBody = 1000
	c := serveStandIn(t, s)
	c.signIn()
	for size, want := range map[int]int{1000: http.StatusBadRequest, 1001: http.StatusRequestEntityTooLarge} {
		status, answer := c.post("/v1/chat/completions", strings.Repeat(" ", size))
		diffStandIn(t, "status, type", []any{want, "invalid_request_error"}, []any{status, dig(answer, "error", "type")})
	}
}

func TestStandInModels(t *testing.T) {
	c := serveStandIn(t, newStandIn())
	c.signIn()
	_, body := c.do("GET", "/v1/models", "", "")
	answer := parseObject(t, body)
	var ids []any
	for _, model := range answer["data"].([]any) {
		ids = append(ids, dig(model, "id"))
		diffStandIn(t, "object", "model", dig(model, "object"))
	}
	diffStandIn(t, "models", []any{"qwen3-coder-plus", "qwen3-coder-flash", "coder-model", "text-embedding-v4"}, ids)
	diffStandIn(t, "object", "list", answer["object"])
}

func TestStandInEmbeddings(t *testing.T) {
	c := serveStandIn(t, newStandIn())
	c.signIn()
	_, answer := c.post("/v1/embeddings", `{"model":"m","input":["one two","three","one two"],"dimensions":100}`)
	diffStandIn(t, "answer", []any{"list", "m", object{"prompt_tokens": 5.0, "total_tokens": 5.0}},
		[]any{answer["object"], answer["model"], answer["usage"]})
	vector := func(i int) []any { v, _ := dig(answer, "data", i, "embedding").([]any); return v }
	diffStandIn(t, "equal texts", vector(0), vector(2))
	if cmp.Equal(vector(0), vector(1)) {
		t.Error("different texts have equal vectors")
	}
	var square float64
	for _, x := range vector(0) {
		square += x.(float64) * x.(float64)
	}
	if len(vector(0)) != 100 || math.Abs(square-1) > 1e-5 {
		t.Errorf("%d dimensions, length %v", len(vector(0)), math.Sqrt(square))
	}

	_, answer = c.post("/v1/embeddings", `{"model":"m","input":"one two","encoding_format":"base64"}`)
	encoded, _ := dig(answer, "data", 0, "embedding").(string)
	raw, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]float32, 64)
	if err := binary.Read(bytes.NewReader(raw), binary.LittleEndian, got); err != nil || len(raw) != 4*len(got) {
		t.Fatalf("%d bytes: %v", len(raw), err)
	}
	diffStandIn(t, "base64", textVector("one two", 64), got)
}

func TestUserCodes(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		seen[newUserCode()] = true
	}
	if len(seen) != 1000 {
		t.Errorf("%d different codes in 1000", len(seen))
	}
}

// fuzzedStandIn returns a client, signed in for long, of a standIn that makes no pauses.
func fuzzedStandIn(f *testing.F) *standInClient {
	s := newStandIn()
	s.wordDelay = 0
	s.tokenLife = 1000 * time.Hour
	c := callStandIn(f, s)
	c.signIn()
	return c
}

// Whatever is sent, the answer is a completion, a stream that is whole, or an error of OpenAI's shape;
// and a tool call's arguments are a JSON object.
func FuzzStandInChat(f *testing.F) {
	for _, seed := range []string{
		`{"model":"m","messages":[{"role":"user","content":"Hi"}]}`,
		`{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"Hi"}]}],"stream":true,"stop":["x"],"n":2}`,
		`{"model":"m","messages":[{"role":"tool"}],"stream_options":{"include_usage":true},"max_tokens":1}`,
		`{"model":"m","messages":[{}],"tools":[{"function":{"name":"f","parameters":{"required":["a"],"properties":{"a":{"enum":[1]}}}}}],"tool_choice":"auto"}`,
		`{"model":"m","messages":[{}],"response_format":{"type":"json_schema","json_schema":{"schema":{"type":["object"],"anyOf":[1]}}}}`,
		`{"model":"m"`,
	} {
		f.Add([]byte(seed))
	}
	c := fuzzedStandIn(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		c := *c
		c.t = t
		resp, answer := c.do("POST", "/v1/chat/completions", "application/json", string(body))
		switch {
		case resp.StatusCode == http.StatusBadRequest:
			if _, ok := dig(parseObject(t, answer), "error", "message").(string); !ok {
				t.Errorf("no error: %s", answer)
			}
		case resp.StatusCode != http.StatusOK:
			t.Errorf("status %d", resp.StatusCode)
		case strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream"):
			standInEvents(t, answer)
		default:
			message := dig(parseObject(t, answer), "choices", 0, "message")
			_, isText := dig(message, "content").(string)
			args, isCall := dig(message, "tool_calls", 0, "function", "arguments").(string)
			if isText == isCall {
				t.Errorf("neither text nor call: %s", answer)
			}
			if isCall {
				parseObject(t, args)
			}
		}
	})
}

func BenchmarkStandInChat(b *testing.B) {
	for _, bench := range []struct{ name, stream string }{{"whole", "false"}, {"stream", "true"}} {
		b.Run(bench.name, func(b *testing.B) {
			s := newStandIn()
			s.wordDelay = 0
			c := callStandIn(b, s)
			c.signIn()
			body := `{"model":"m","messages":[{"role":"user","content":"Hi"}],"stream":` + bench.stream + `}`
			b.ReportAllocs()
			for b.Loop() {
				if resp, answer := c.do("POST", "/v1/chat/completions", "application/json", body); resp.StatusCode != http.StatusOK {
					b.Fatal(answer)
				}
			}
		})
	}
}
