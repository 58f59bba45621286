package main

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"qwen-go-proxy/e2e/testkit"
)

const verifier = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk" // RFC 7636 appendix B

var (
	fatalIf   = testkit.FatalIf
	wantEqual = testkit.WantEqual
)

// A client calls a standIn, over HTTP or directly.
type client struct {
	t      testing.TB
	client *http.Client
	base   string
	token  string // sent as bearer; "" for none
}

// newClient serves s on a loopback port.
func newClient(t testing.TB, s *standIn) *client {
	t.Helper()
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	return &client{t: t, client: server.Client(), base: server.URL}
}

// newBubbleClient calls s without a network, for synctest bubbles.
func newBubbleClient(t testing.TB, s *standIn) *client {
	return &client{t: t, client: &http.Client{Transport: transport{s}}, base: "http://stand.in"}
}

type transport struct{ handler http.Handler }

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	if r.Body == nil {
		r.Body = http.NoBody
	}
	t.handler.ServeHTTP(w, r)
	return w.Result(), nil
}

// do sends body, JSON or a form, and returns the response with its body read.
func (c *client) do(method, path, contentType, body string) (*http.Response, string) {
	c.t.Helper()
	r, err := http.NewRequestWithContext(c.t.Context(), method, c.base+path, strings.NewReader(body))
	fatalIf(c.t, err)
	r.Header.Set("Content-Type", contentType)
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.client.Do(r)
	fatalIf(c.t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	fatalIf(c.t, err)
	return resp, string(b)
}

// form posts name and value pairs, and returns the status and the answer's JSON.
func (c *client) form(path string, pairs ...string) (int, object) {
	c.t.Helper()
	form := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		form.Set(pairs[i], pairs[i+1])
	}
	resp, body := c.do("POST", path, "application/x-www-form-urlencoded", form.Encode())
	return resp.StatusCode, parseObject(c.t, body)
}

// post posts JSON, and returns the status and the answer's JSON.
func (c *client) post(path, body string) (int, object) {
	c.t.Helper()
	resp, answer := c.do("POST", path, "application/json", body)
	return resp.StatusCode, parseObject(c.t, answer)
}

// authorize begins a sign-in.
func (c *client) authorize() object {
	c.t.Helper()
	challenge := sha256.Sum256([]byte(verifier))
	status, device := c.form("/api/v1/oauth2/device/code", "client_id", "client", "scope", "openid",
		"code_challenge", base64.RawURLEncoding.EncodeToString(challenge[:]), "code_challenge_method", "S256")
	if status != http.StatusOK {
		c.t.Fatalf("device authorization: %d %v", status, device)
	}
	return device
}

// poll redeems a device code.
func (c *client) poll(device object) (int, object) {
	c.t.Helper()
	return c.form("/api/v1/oauth2/token", "grant_type", "urn:ietf:params:oauth:grant-type:device_code",
		"client_id", "client", "device_code", device["device_code"].(string), "code_verifier", verifier)
}

// refresh redeems a refresh token.
func (c *client) refresh(token any) (int, object) {
	c.t.Helper()
	return c.form("/api/v1/oauth2/token", "grant_type", "refresh_token", "client_id", "client",
		"refresh_token", token.(string))
}

// decide answers the page's question, "approve" or "deny".
func (c *client) decide(device object, decision string) (int, string) {
	c.t.Helper()
	form := url.Values{"user_code": {device["user_code"].(string)}, "decision": {decision}}
	resp, body := c.do("POST", "/authorize", "application/x-www-form-urlencoded", form.Encode())
	return resp.StatusCode, body
}

// signIn signs in by way of the page, sends the access token from here on, and returns the token response.
func (c *client) signIn() object {
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
