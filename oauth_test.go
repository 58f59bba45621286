package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// An oauthFunc answers a form, r.PostForm, in the OAuth server's place. Status 0 is a connection that breaks.
type oauthFunc func(r *http.Request) (status int, body string)

// RoundTrip makes an oauthFunc the Transport of a client.
func (f oauthFunc) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.ParseForm(); err != nil {
		return nil, err
	}
	status, body := f(r)
	switch {
	case r.Context().Err() != nil:
		return nil, r.Context().Err()
	case status == 0:
		return nil, errors.New("connection refused")
	}
	return &http.Response{
		StatusCode: status, Status: fmt.Sprint(status, " ", http.StatusText(status)), Request: r,
		Header: http.Header{"Location": {"https://elsewhere.example/"}}, Body: io.NopCloser(strings.NewReader(body)),
	}, nil
}

// newTestOAuth returns the client that the program itself uses, with f in the server's place.
func newTestOAuth(t testing.TB, f oauthFunc) *oauthClient {
	t.Helper()
	cfg, err := loadConfig(lookup(map[string]string{"QWEN_DIR": t.TempDir()}))
	fatalIf(t, err)
	c := newOAuthClient(cfg)
	c.http.Transport = f
	return c
}

// deviceAnswer is a device authorization of RFC 8628 §3.2 with the members of change put in; nil takes one out.
func deviceAnswer(change map[string]any) string {
	answer := map[string]any{
		"device_code": "device-secret", "user_code": "WDJB-MJHT", "expires_in": 900, "interval": 5,
		"verification_uri":          "https://chat.qwen.ai/authorize",
		"verification_uri_complete": "https://chat.qwen.ai/authorize?user_code=WDJB-MJHT",
	}
	for name, value := range change {
		if answer[name] = value; value == nil {
			delete(answer, name)
		}
	}
	b, err := json.Marshal(answer)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// tokenAnswer is the n-th token, which lives for some seconds.
func tokenAnswer(n, life int) string {
	return fmt.Sprintf(`{"access_token":"access-%[1]d","refresh_token":"refresh-%[1]d","token_type":"Bearer","resource_url":"portal.qwen.ai","expires_in":%[2]d}`, n, life)
}

// Answers that mean nothing in OAuth.
const (
	htmlAnswer    = "<!doctype html><title>Are you a robot?</title>"
	pendingAnswer = `{"error":"authorization_pending","error_description":"not yet"}`
	grantRefused  = `{"error":"invalid_grant","error_description":"it is spent"}`
)

// answering returns an OAuth server's answers to a device authorization, a poll and a refresh; "" breaks the connection.
func answering(device, poll, refresh string) oauthFunc {
	return func(r *http.Request) (int, string) {
		body := map[string]string{"": device, deviceGrant: poll, "refresh_token": refresh}[r.PostForm.Get("grant_type")]
		switch {
		case body == "":
			return 0, ""
		case strings.HasPrefix(body, `{"error"`):
			return 400, body
		}
		return 200, body
	}
}

func TestSignInSendsPKCE(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var forms []url.Values
		c := newTestOAuth(t, func(r *http.Request) (int, string) {
			path, body := "device/code", deviceAnswer(nil)
			if r.PostForm.Has("grant_type") {
				path, body = "token", tokenAnswer(1, 3600)
			}
			forms = append(forms, r.PostForm)
			got := []string{r.Method, r.URL.String(), r.Header.Get("Content-Type"), r.Header.Get("Accept"), r.Header.Get("User-Agent")}
			want := []string{"POST", "https://chat.qwen.ai/api/v1/oauth2/" + path, "application/x-www-form-urlencoded", "application/json", userAgent}
			wantEqual(t, "request", want, got)
			return 200, body
		})
		d, err := c.authorize(t.Context())
		fatalIf(t, err)
		if _, err := c.poll(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		verifier := forms[1].Get("code_verifier")
		if len(verifier) < 43 || len(verifier) > 128 { // RFC 7636 §4.1
			t.Errorf("verifier of %d characters", len(verifier))
		}
		challenge := sha256.Sum256([]byte(verifier))
		want := []url.Values{{
			"client_id": {"f0304373b74a44d2b584a3fb70ca9e56"}, "scope": {"openid profile email model.completion"},
			"code_challenge": {base64.RawURLEncoding.EncodeToString(challenge[:])}, "code_challenge_method": {"S256"},
		}, {
			"grant_type": {"urn:ietf:params:oauth:grant-type:device_code"}, "client_id": {"f0304373b74a44d2b584a3fb70ca9e56"},
			"device_code": {"device-secret"}, "code_verifier": {verifier},
		}}
		wantEqual(t, "forms", want, forms)
		if again, err := c.authorize(t.Context()); err != nil || again.verifier == verifier {
			t.Errorf("a second sign-in: %v; want one with another verifier", err)
		}
	})
}

func TestAuthorize(t *testing.T) {
	const complete = "https://chat.qwen.ai/authorize?user_code=WDJB-MJHT"
	type device struct {
		Link, Complete string
		Life, Interval time.Duration
	}
	usual := device{"https://chat.qwen.ai/authorize", complete, 15 * time.Minute, 5 * time.Second}
	with := func(change func(*device)) device {
		d := usual
		change(&d)
		return d
	}
	life := func(d time.Duration) device { return with(func(w *device) { w.Life = d }) }
	interval := func(d time.Duration) device { return with(func(w *device) { w.Interval = d }) }
	for _, tt := range []struct {
		name   string
		status int // 0 is 200, -1 a broken connection
		body   string
		want   device
		err    string // what is in the error; "" is none
	}{
		{name: "all members", body: deviceAnswer(nil), want: usual},
		{name: "no interval", body: deviceAnswer(map[string]any{"interval": nil}), want: usual},
		{name: "interval 0", body: deviceAnswer(map[string]any{"interval": 0}), want: usual},
		{name: "interval of 2 s", body: deviceAnswer(map[string]any{"interval": 2}), want: interval(2 * time.Second)},
		{name: "interval in a string", body: deviceAnswer(map[string]any{"interval": "7"}), want: interval(7 * time.Second)},
		{name: "absurd interval", body: deviceAnswer(map[string]any{"interval": 1e300}), want: interval(time.Minute)},
		{name: "no complete link", body: deviceAnswer(map[string]any{"verification_uri_complete": nil}),
			want: with(func(w *device) { w.Complete = w.Link })},
		{name: "complete link alone", body: deviceAnswer(map[string]any{"verification_uri": nil}),
			want: with(func(w *device) { w.Link = w.Complete })},
		{name: "expires_in in a string", body: deviceAnswer(map[string]any{"expires_in": "600"}), want: life(10 * time.Minute)},
		{name: "expires_in 0", body: deviceAnswer(map[string]any{"expires_in": 0}), want: life(15 * time.Minute)},
		{name: "expires_in negative", body: deviceAnswer(map[string]any{"expires_in": -60}), want: life(15 * time.Minute)},
		{name: "no expires_in", body: deviceAnswer(map[string]any{"expires_in": nil}), want: life(15 * time.Minute)},
		{name: "absurd expires_in", body: deviceAnswer(map[string]any{"expires_in": 1e18}), want: life(time.Hour)},

		{name: "no link", body: deviceAnswer(map[string]any{"verification_uri": nil, "verification_uri_complete": nil}), err: "verification_uri"},
		{name: "script for a link", body: deviceAnswer(map[string]any{"verification_uri": "javascript:alert(1)"}), err: "verification_uri"},
		{name: "script for a complete link", body: deviceAnswer(map[string]any{"verification_uri_complete": "javascript://chat.qwen.ai/%0aalert(1)"}), err: "verification_uri"},
		{name: "http link", body: deviceAnswer(map[string]any{"verification_uri": "http://chat.qwen.ai/authorize"}), err: "verification_uri"},
		{name: "link without host", body: deviceAnswer(map[string]any{"verification_uri": "https:///authorize"}), err: "verification_uri"},
		{name: "link with an escape sequence", body: deviceAnswer(map[string]any{"verification_uri_complete": "https://chat.qwen.ai/?\x1b[2J"}), err: "verification_uri"},
		{name: "link with a blank", body: deviceAnswer(map[string]any{"verification_uri_complete": "https://chat.qwen.ai/ https://evil.example/"}), err: "verification_uri"},
		{name: "link of 4 KB", body: deviceAnswer(map[string]any{"verification_uri_complete": "https://chat.qwen.ai/" + strings.Repeat("a", 4000)}), err: "verification_uri"},
		{name: "escape sequence in user_code", body: deviceAnswer(map[string]any{"user_code": "WDJB\x1b[2J"}), err: "user_code"},
		{name: "newline in user_code", body: deviceAnswer(map[string]any{"user_code": "WDJB\nopen https://evil.example/"}), err: "user_code"},
		{name: "a CSI in user_code", body: deviceAnswer(map[string]any{"user_code": "WDJB\u009b2J"}), err: "user_code"},
		{name: "right to left in user_code", body: deviceAnswer(map[string]any{"user_code": "WDJB\u202eMJHT"}), err: "user_code"},
		{name: "a line separator in user_code", body: deviceAnswer(map[string]any{"user_code": "WDJB\u2028MJHT"}), err: "user_code"},
		{name: "no user_code", body: deviceAnswer(map[string]any{"user_code": nil}), err: "user_code"},
		{name: "user_code of 4 KB", body: deviceAnswer(map[string]any{"user_code": strings.Repeat("A", 4000)}), err: "user_code"},
		{name: "no device_code", body: deviceAnswer(map[string]any{"device_code": nil}), err: "device_code"},
		{name: "mistyped member", body: deviceAnswer(map[string]any{"user_code": 7}), err: "other than the JSON"},
		{name: "HTML", body: htmlAnswer, err: "other than the JSON"},
		{name: "HTML with 503", status: 503, body: htmlAnswer, err: "503 Service Unavailable"},
		{name: "JSON with 502", status: 502, body: deviceAnswer(nil), err: "502 Bad Gateway"},
		{name: "redirect", status: 302, body: deviceAnswer(nil), err: "302 Found"},
		{name: "error with 400", status: 400, body: `{"error":"invalid_client","error_description":"who\nis it"}`, err: `"invalid_client" ("who\nis it")`},
		{name: "error with 200", body: `{"error":"invalid_client"}`, err: `"invalid_client"`},
		{name: "more than 1 MiB", body: strings.Repeat(" ", 1<<20) + deviceAnswer(nil), err: "other than the JSON"},
		{name: "broken connection", status: -1, err: "connection refused"},
	} {
		testInBubble(t, tt.name, func(t *testing.T) {
			requests := 0
			c := newTestOAuth(t, func(*http.Request) (int, string) {
				requests++
				switch tt.status {
				case 0:
					return 200, tt.body
				case -1:
					return 0, ""
				}
				return tt.status, tt.body
			})
			d, err := c.authorize(t.Context())
			if requests != 1 {
				t.Errorf("%d requests, want 1", requests)
			}
			if err != nil || tt.err != "" {
				if err == nil || tt.err == "" || !strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "device-secret") {
					t.Errorf("error %v, want one with %q in it", err, tt.err)
				}
				return
			}
			got := device{d.verificationURI, d.verificationURIComplete, time.Until(d.expires), d.interval}
			wantEqual(t, "device", tt.want, got)
		})
	}
}

// TestPoll drives RFC 8628 §3.5 with a code that lives for 90 s and an interval of 5 s.
func TestPoll(t *testing.T) {
	type answer struct {
		status int
		body   string
	}
	pending := answer{400, pendingAnswer}
	slowDown := answer{400, `{"error":"slow_down"}`}
	granted := answer{200, tokenAnswer(1, 3600)}
	for _, tt := range []struct {
		name    string
		answers []answer // the last is repeated
		want    []int    // when the server is asked, in seconds
		err     string   // the error's code; "" is a token
	}{
		{"granted at once", []answer{granted}, []int{5}, ""},
		{"pending, then granted", []answer{pending, pending, granted}, []int{5, 10, 15}, ""},
		{"pending with 200", []answer{{200, pendingAnswer}, granted}, []int{5, 10}, ""},
		{"slow_down adds 5 s for good", []answer{pending, slowDown, pending, pending, granted}, []int{5, 10, 20, 30, 40}, ""},
		{"slow_down twice", []answer{slowDown, slowDown, pending, granted}, []int{5, 15, 30, 45}, ""},
		{"slow_down with 429", []answer{{429, `{"error":"slow_down"}`}, pending, granted}, []int{5, 15, 25}, ""},
		{"429 without JSON", []answer{{429, "slow down"}, pending, granted}, []int{5, 15, 20}, ""},
		{"denied", []answer{pending, {400, `{"error":"access_denied"}`}}, []int{5, 10}, "access_denied"},
		{"denied with 401", []answer{{401, `{"error":"access_denied"}`}}, []int{5}, "access_denied"},
		{"expired", []answer{{400, `{"error":"expired_token"}`}}, []int{5}, "expired_token"},
		{"unknown code", []answer{{401, `{"message":"no such device code"}`}}, []int{5}, "expired_token"},
		{"unknown code with an error", []answer{{401, `{"error":"invalid_device_code"}`}}, []int{5}, "expired_token"},
		{"another client's code", []answer{{400, `{"error":"invalid_grant"}`}}, []int{5}, "invalid_grant"},
		{"pending for ever", []answer{pending}, []int{5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85}, "expired_token"},
		{"one broken connection", []answer{{}, pending, granted}, []int{5, 15, 20}, ""},
		{"connections break for ever", []answer{{}}, []int{5, 15, 35, 65}, "expired_token"},
		{"5xx for ever", []answer{{503, `{"error":"server_error"}`}}, []int{5, 15, 35, 65}, "expired_token"},
		{"HTML with 200 for ever", []answer{{200, htmlAnswer}}, []int{5, 15, 35, 65}, "expired_token"},
		{"HTML with 401", []answer{{401, htmlAnswer}, granted}, []int{5, 15}, ""},
		{"400 that names no error", []answer{{400, `{"message":"bad"}`}, granted}, []int{5, 15}, ""},
		{"token that is none", []answer{{200, `{"access_token":""}`}, granted}, []int{5, 15}, ""},
		{"trouble after slow_down", []answer{slowDown, {}, pending, granted}, []int{5, 15, 35, 45}, ""},
	} {
		testInBubble(t, tt.name, func(t *testing.T) {
			begin := time.Now()
			var asked []int
			c := newTestOAuth(t, func(*http.Request) (int, string) {
				a := tt.answers[min(len(asked), len(tt.answers)-1)]
				asked = append(asked, int(time.Since(begin).Seconds()))
				return a.status, a.body
			})
			d := &deviceAuth{deviceCode: "device-secret", verifier: "verifier-secret", interval: 5 * time.Second, expires: wallClock().Add(90 * time.Second)}
			tok, err := c.poll(t.Context(), d)
			wantEqual(t, "poll times", tt.want, asked)
			if tt.err == "" {
				if err != nil || tok.access != "access-1" || tok.refresh != "refresh-1" {
					t.Errorf("got %v, %v; want a token", tok, err)
				}
				return
			}
			if e, ok := errors.AsType[*oauthError](err); tok != nil || !ok || e.code != tt.err {
				t.Errorf("error %v, want %s", err, tt.err)
			}
		})
	}
}

func TestRefreshFailures(t *testing.T) {
	for _, tt := range []struct {
		name    string
		status  int
		body    string
		refused bool
		text    string // in the error's
	}{
		{"invalid_grant", 400, grantRefused, true, `"invalid_grant" ("it is spent")`},
		{"401 in JSON", 401, `{"message":"invalid refresh token"}`, true, "401"},
		{"400 in JSON", 400, `{"code":"InvalidParameter"}`, true, "400"},
		{"200 with an error", 200, grantRefused, true, "invalid_grant"},
		{"200 with an error and a token", 200, `{"error":"invalid_grant","access_token":"access-secret"}`, true, "invalid_grant"},
		{"a mistyped description", 401, `{"error":"invalid_grant","error_description":["x"]}`, true, "invalid_grant"},
		{"an error that is an object", 401, `{"error":{"code":"invalid_token"}}`, true, "401"},
		{"invalid_client with 403", 403, `{"error":"invalid_client"}`, true, "invalid_client"},
		{"temporarily_unavailable with 400", 400, `{"error":"temporarily_unavailable"}`, false, "temporarily_unavailable"},
		{"server_error with 400", 400, `{"error":"server_error"}`, false, "server_error"},
		{"429", 429, `{"error":"too_many_requests"}`, false, "too_many_requests"},
		{"429 in HTML", 429, htmlAnswer, false, "429"},
		{"503", 503, `{"error":"invalid_grant"}`, false, "invalid_grant"},
		{"503 in HTML", 503, htmlAnswer, false, "503"},
		{"200 with HTML", 200, htmlAnswer, false, "other than the JSON"},
		{"200 with a list", 200, `["access-secret"]`, false, "other than the JSON"},
		{"200 with a mistyped token", 200, `{"access_token":["access-secret"]}`, false, "other than the JSON"},
		{"200 with nothing", 200, "", false, "other than the JSON"},
		{"200 without a token", 200, `{"refresh_token":"access-secret"}`, false, "access_token"},
		{"token that splits the header", 200, `{"access_token":"access-secret\r\nX-Evil: 1"}`, false, "access_token"},
		{"401 in HTML, as a gateway has it", 401, htmlAnswer, false, "401"},
		{"redirect", 302, tokenAnswer(1, 3600), false, "302"},
		{"broken connection", 0, "", false, "connection refused"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			requests := 0
			c := newTestOAuth(t, func(*http.Request) (int, string) {
				requests++
				return tt.status, tt.body
			})
			tok, err := c.refresh(t.Context(), "refresh-secret")
			if tok != nil || err == nil || requests != 1 {
				t.Fatalf("got %v, %v after %d requests; want an error after 1", tok, err, requests)
			}
			if isFinal(err) != tt.refused || !strings.Contains(err.Error(), tt.text) || strings.Contains(err.Error(), "secret") {
				t.Errorf("isFinal(%v) is %t, want %t and %q", err, isFinal(err), tt.refused, tt.text)
			}
		})
	}
}

func TestTokenLife(t *testing.T) {
	for want, values := range map[time.Duration]string{
		2 * time.Hour:                  `7200 "7200" 7.2e3`,
		90*time.Second + time.Second/2: `90.5`,
		time.Second:                    `0.25`,
		366 * 24 * time.Hour:           `1e18 "1e18"`,
		time.Hour:                      `1e999 0 -1 null "" "soon" {"in":1} true`,
	} {
		for expiresIn := range strings.FieldsSeq(values) {
			testInBubble(t, expiresIn, func(t *testing.T) {
				c := newTestOAuth(t, answering("", "", `{"access_token":"access-1","expires_in":`+expiresIn+`}`))
				tok, err := c.refresh(t.Context(), "refresh-secret")
				fatalIf(t, err)
				if got := time.Until(tok.expiry); got != want {
					t.Errorf("life %v, want %v", got, want)
				}
			})
		}
	}
}

// FuzzTokenAnswer checks that an answer gives a usable token or an error, and that the error holds none of the
// answer's tokens: SECRET in body stands for one.
func FuzzTokenAnswer(f *testing.F) {
	for _, body := range []string{
		`{"access_token":"SECRET","refresh_token":"SECRET","token_type":"Bearer","resource_url":"portal.qwen.ai","expires_in":3600}`,
		`{"access_token":"SECRET\n","expires_in":"1e3"}`, `{"access_token":["SECRET"]}`, `{"access_token":"SECRET"`,
		`{"refresh_token":"SECRET"}`, `{"error":"invalid_grant","refresh_token":"SECRET"}`, `{"error":{"message":"SECRET"}}`,
		`{"access_token":"SECRET","error":7}`, `{"Access_Token":"SECRET","expires_in":-1}`, `"SECRET"`, `null`, htmlAnswer, "",
	} {
		for _, status := range []int{200, 302, 400, 401, 429, 503} {
			f.Add(status, body)
		}
	}
	const secret = "eyJhbGciOiJub25lIn0.e30."
	var answer struct {
		status int
		body   string
	}
	c := newTestOAuth(f, func(*http.Request) (int, string) { return answer.status, answer.body })
	f.Fuzz(func(t *testing.T, status int, body string) {
		body = strings.ReplaceAll(body, "SECRET", secret)
		answer.status, answer.body = max(status, 0), body
		begin := wallClock()
		tok, err := c.refresh(t.Context(), "refresh-secret")
		if (tok == nil) == (err == nil) {
			t.Fatalf("token %v and error %v: want exactly one", tok, err)
		}
		if err != nil {
			var failure struct {
				Error       string `json:"error"`
				Description string `json:"error_description"`
			}
			json.Unmarshal([]byte(body), &failure)
			shown := strings.Contains(failure.Error+failure.Description, secret) // where the server itself shows it
			if strings.Contains(err.Error(), secret) && !shown || strings.Contains(err.Error(), "refresh-secret") {
				t.Errorf("the error shows a token: %v", err)
			}
			return
		}
		if status != http.StatusOK || !validKey(tok.access) {
			t.Errorf("status %d gave the access token %q", status, tok.access)
		}
		if low, high := begin.Add(time.Second), wallClock().Add(maxTokenLife); tok.expiry.Before(low) || tok.expiry.After(high) {
			t.Errorf("expiry %v, want one between %v and %v", tok.expiry, low, high)
		}
	})
}

func TestErrorsHideWhatTheServerRepeats(t *testing.T) {
	c := newTestOAuth(t, func(r *http.Request) (int, string) {
		return 400, fmt.Sprintf(`{"error":"invalid_grant","error_description":"there is no %s"}`, r.PostForm.Get("refresh_token"))
	})
	if _, err := c.refresh(t.Context(), "refresh-secret"); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("the error shows the refresh token: %v", err)
	}
}

// A secret that is part of any text hides nothing, least of all the code that says how to go on.
func TestAShortSecretHidesNoCode(t *testing.T) {
	c := newTestOAuth(t, func(*http.Request) (int, string) { return 400, `{"error":"invalid_grant"}` })
	_, err := c.refresh(t.Context(), "i")
	if e, ok := errors.AsType[*oauthError](err); !ok || e.code != "invalid_grant" {
		t.Errorf("got %v, want invalid_grant", err)
	}
}

// wantLinks checks how many sign-in links have been shown so far.
func (s *sourceTest) wantLinks(want int) {
	s.t.Helper()
	if got := strings.Count(s.prompt.String(), "https://"); got != want {
		s.t.Errorf("%d links were shown at %v, want %d", got, time.Since(s.begin), want)
	}
}

// TestAFileChangesWhileASignInStarts: the answer to the authorization arrives after another process has signed in. It
// must not bring the sign-in back to life.
func TestAFileChangesWhileASignInStarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		devices := 0
		s := newSourceTest(t, "", nil, func(r *http.Request) (int, string) {
			switch r.PostForm.Get("grant_type") {
			case "refresh_token":
				return 400, grantRefused
			case deviceGrant:
				return 400, pendingAnswer
			}
			if devices++; devices == 1 {
				time.Sleep(maxNap + time.Second) // run looks at the file meanwhile
			}
			return 200, deviceAnswer(nil)
		})
		s.oauth.http.Transport = lateAnswers{s.oauth.http.Transport}
		s.start()
		time.Sleep(time.Second)
		s.write(fileOf(0, time.Hour))
		time.Sleep(10 * time.Minute)
		s.want("access-0", 0)
		s.wantLinks(0)
		time.Sleep(time.Hour) // the refresh is refused, and the token has expired
		s.want("401 sign_in_expired", 0)
		synctest.Wait()
		s.wantAuth(signInPending)
		if s.prompt.String() == "" {
			t.Error("no link was shown")
		}
	})
}

// A lateAnswers hands on answers that arrive at the very moment in which their requests are given up.
type lateAnswers struct{ next http.RoundTripper }

func (l lateAnswers) RoundTrip(r *http.Request) (*http.Response, error) {
	return l.next.RoundTrip(r.WithContext(context.WithoutCancel(r.Context())))
}

// numberedDevices answers device authorizations with device-1, device-2, and so on, and says which ones are polled for.
// What approve returns is the answer to polls.
func numberedDevices(approve func(device string) (int, string)) oauthFunc {
	devices := 0
	return func(r *http.Request) (int, string) {
		if r.PostForm.Get("grant_type") == deviceGrant {
			return approve(r.PostForm.Get("device_code"))
		}
		devices++
		return 200, deviceAnswer(map[string]any{"device_code": fmt.Sprint("device-", devices)})
	}
}

// TestALogoutEndsTheSignInUnderWay has an account that is not served, whose owner begins to sign in with another one, and
// then logs out.
func TestALogoutEndsTheSignInUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var approved atomic.Value // the device that the user approves
		var lastPoll atomic.Int64 // of device-1, in ns from the beginning
		var s *sourceTest
		s = newSourceTest(t, fileOf(0, time.Hour), nil, numberedDevices(func(device string) (int, string) {
			if device == "device-1" {
				lastPoll.Store(int64(time.Since(s.begin)))
			}
			if device == approved.Load() {
				return 200, tokenAnswer(1, 3600)
			}
			return 400, pendingAnswer
		}))
		s.start()
		s.refused()
		time.Sleep(time.Minute)
		s.refused()
		s.wantAuth(signInPending)
		time.Sleep(time.Minute)
		s.write("{}")
		time.Sleep(maxNap)
		synctest.Wait()
		s.want("401 not_signed_in", 0)
		synctest.Wait()
		s.wantLinks(2) // the message says that a link is in the log, and there is one
		s.wantAuth(signInPending)
		approved.Store("device-1")
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		s.want("401 not_signed_in", 0)
		s.wantAsked("device", "device")
		if last := time.Duration(lastPoll.Load()); last > 2*time.Minute+maxNap {
			t.Errorf("the old link was still good at %v", last)
		}
		approved.Store("device-2")
		time.Sleep(5 * time.Second)
		synctest.Wait()
		s.want("access-1", 0)
	})
}

// TestALogoutWinsOverASignInThatIsBeingStored: the user has approved, and before the token is stored another process that
// holds the lock signs out.
func TestALogoutWinsOverASignInThatIsBeingStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, fileOf(0, time.Hour), nil, numberedDevices(func(device string) (int, string) {
			if device == "device-1" {
				return 200, tokenAnswer(1, 3600)
			}
			return 400, pendingAnswer
		}))
		s.start()
		s.refused()
		time.Sleep(time.Minute)
		s.refused()
		lock := filepath.Join(s.cfg.qwenDir, lockFile)
		leaveLock(t, lock, 0)
		s.wantAuth(signInPending)
		time.Sleep(5500 * time.Millisecond) // the sign-in waits for the lock
		s.write("{}")
		fatalIf(t, os.Remove(lock))
		time.Sleep(time.Minute)
		s.want("401 not_signed_in", 0)
		wantEqual(t, "the file after a logout", map[string]any{}, s.read())
	})
}

// TestRequestsWithoutCredentialsOnlyRead: while a sign-in is under way, a request takes no lock and wakes nobody.
func TestRequestsWithoutCredentialsOnlyRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, "", nil, numberedDevices(func(string) (int, string) { return 400, pendingAnswer }))
		s.start()
		time.Sleep(2*time.Minute + time.Second)
		before := s.state.Load()
		s.oauthSource.mu.Lock()
		s.flow.mu.Lock()
		answered := false
		go func() {
			s.want("401 not_signed_in", 0)
			answered = true
		}()
		synctest.Wait()
		if !answered {
			t.Error("the request waits for a lock")
		}
		s.flow.mu.Unlock()
		s.oauthSource.mu.Unlock()
		synctest.Wait()
		if s.state.Load() != before {
			t.Error("the request replaced the state, which wakes everybody who waits for a change")
		}
	})
}

// TestAnAnswerThatIsNotHTTPIsNotQuoted: net/http quotes the first line, and it may hold tokens.
func TestAnAnswerThatIsNotHTTPIsNotQuoted(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	fatalIf(t, err)
	defer ln.Close()
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 4096))
			io.WriteString(conn, `{"access_token":"s3cret"}`+"\r\n\r\n")
			conn.Close()
		}
	}()
	cfg, err := loadConfig(lookup(map[string]string{"QWEN_OAUTH_BASE_URL": "http://" + ln.Addr().String()}))
	fatalIf(t, err)
	_, err = newOAuthClient(cfg).refresh(t.Context(), "old")
	e, ok := errors.AsType[*oauthError](err)
	if !ok || e.cause == nil || strings.Contains(fmt.Sprint(err, e.cause), "s3cret") {
		t.Errorf("%v: %v", err, e)
	}
}
