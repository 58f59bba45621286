package main

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// browserAccept is what Chromium sends when it opens an address.
const browserAccept = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8,application/signed-exchange;v=b3;q=0.7"

// askAuth returns the answer to a request for target, "/auth" or "/auth?watch".
func (s *sourceTest) askAuth(method, target, accept string) *httptest.ResponseRecorder {
	s.t.Helper()
	r := httptest.NewRequest(method, target, nil)
	r.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	w.Header().Set("Vary", "Origin") // by another handler before
	track(s.cfg, s.oauthSource.log, newMetrics(), authHandler(s.oauthSource)).ServeHTTP(w, r)
	return w
}

// TestAuthStates brings the sign-in to each of its states, opens the page there, and looks again with ?watch.
func TestAuthStates(t *testing.T) {
	const notSignedIn = "The proxy is not signed in to Qwen. Set QWEN_API_KEY on the proxy, or sign in: open /auth on the proxy, or follow the link in its log."
	const noLonger = "Qwen no longer accepts the proxy's sign-in. Sign in again: open /auth on the proxy, or follow the link in its log."
	const live = `<noscript><meta http-equiv="refresh" content="4; url=auth?watch"></noscript>`
	const startAgain = `<a class="button" href="auth">Start again</a>`
	// pending is an answer where now is this long after the beginning of the test.
	pending := func(reason string, now time.Duration) map[string]any {
		return map[string]any{"status": "pending", "reason": reason, "user_code": "WDJB-MJHT", "expires_at": time.Date(2000, 1, 1, 0, 15, 0, 0, time.UTC).Add(now).Format(time.RFC3339),
			"verification_uri": "https://chat.qwen.ai/authorize", "verification_uri_complete": "https://chat.qwen.ai/authorize?user_code=WDJB-MJHT",
			"message": "Open verification_uri_complete in a browser and check that it shows user_code."}
	}
	link := `href="https://chat.qwen.ai/authorize?user_code=WDJB-MJHT" target="_blank" rel="noopener noreferrer"`
	for _, tt := range []struct {
		name   string
		life   time.Duration // of the token in the credential file; 0 for no file
		serve  oauthFunc
		idle   bool // the source does not run
		after  time.Duration
		before func(*sourceTest) // is called before after
		watch  bool              // the page is opened with ?watch
		want   map[string]any    // as JSON
		page   []string          // in the page, and
		not    []string          // not in it
		device int               // authorizations asked for, in all
	}{
		{name: "pending", serve: answering(deviceAnswer(nil), pendingAnswer, ""), after: time.Minute,
			want: pending(notSignedIn, 0), device: 1,
			page: []string{"<h1 tabindex=\"-1\">Sign in to Qwen</h1>", `<strong class="code">WDJB-MJHT</strong>`, link, live, ">14:00</span>", "The proxy is not signed in to Qwen. Open Qwen’s page", "qwen-go-proxy on <strong>example.com</strong>"}},
		{name: "signed in", life: time.Hour, serve: answering("", "", ""),
			want: map[string]any{"status": "signed_in", "method": "oauth", "message": "The proxy is signed in to Qwen.", "expires_at": "2000-01-01T01:00:00Z", "base_url": "http://example.com/v1"},
			page: []string{">Signed in</h1>", ">http://example.com/v1</code>", "<title>Signed in – qwen-go-proxy</title>"}, not: []string{live, "<main data-live>"}},
		{name: "just approved", serve: answering(deviceAnswer(nil), tokenAnswer(1, 3600), ""), after: 6 * time.Second, watch: true, device: 1,
			want: map[string]any{"status": "signed_in", "method": "oauth", "message": "The proxy is signed in to Qwen.", "expires_at": "2000-01-01T01:00:05Z", "base_url": "http://example.com/v1"},
			page: []string{">Signed in</h1>"}, not: []string{live, "WDJB"}},
		{name: "Qwen hangs", serve: func(r *http.Request) (int, string) { <-r.Context().Done(); return 0, "" }, device: 1,
			want: map[string]any{"status": "starting", "reason": notSignedIn, "message": "Qwen's sign-in server has not answered yet. The proxy keeps trying."},
			page: []string{">Waiting for Qwen</h1>", "has not answered yet", live}, not: []string{`class="button"`, "ry again"}},
		{name: "Qwen can't be reached", serve: answering("", "", ""), device: 1,
			want: map[string]any{"status": "starting", "reason": notSignedIn, "message": "Qwen's sign-in server chat.qwen.ai can't be reached. The proxy keeps trying."},
			page: []string{">Waiting for Qwen</h1>", "can&#39;t be reached", live}, not: []string{`class="button"`, "ry again"}},
		{name: "Qwen takes no sign-ins now", serve: func(r *http.Request) (int, string) { return 429, "slow down" }, device: 1,
			want: map[string]any{"status": "starting", "reason": notSignedIn, "message": "Qwen's sign-in server chat.qwen.ai answered 429 Too Many Requests. The proxy keeps trying."},
			page: []string{">Waiting for Qwen</h1>", "429 Too Many Requests", live}, not: []string{"reached"}},
		{name: "Qwen refuses to start", serve: answering(`{"error":"invalid_client"}`, "", ""), after: time.Minute, device: 2,
			want: map[string]any{"status": "failed", "reason": notSignedIn, "message": "Qwen refused the sign-in, and the proxy's log says why. Open /auth to start another."},
			page: []string{">Sign-in failed</h1>", startAgain}, not: []string{live}},
		{name: "denied", serve: answering(deviceAnswer(nil), `{"error":"access_denied"}`, ""), after: 6 * time.Second, watch: true, device: 1,
			want: map[string]any{"status": "denied", "reason": notSignedIn, "message": "The sign-in was denied. Open /auth to start another."},
			page: []string{">Sign-in denied</h1>", startAgain}, not: []string{live, "WDJB"}},
		{name: "denied, then opened", serve: answering(deviceAnswer(nil), `{"error":"access_denied"}`, ""), after: 6 * time.Second, device: 2,
			want: pending(notSignedIn, 6*time.Second), page: []string{">Sign in to Qwen</h1>", link, live}},
		{name: "expired", serve: answering(deviceAnswer(nil), pendingAnswer, ""), after: 16 * time.Minute, watch: true, device: 1,
			want: map[string]any{"status": "expired", "reason": notSignedIn, "message": "Nobody approved the sign-in in time. Open /auth to start another."},
			page: []string{">Sign-in expired</h1>", startAgain}, not: []string{live}},
		{name: "failed", serve: answering(deviceAnswer(nil), grantRefused, ""), after: 6 * time.Second, watch: true, device: 1,
			want: map[string]any{"status": "failed", "reason": notSignedIn, "message": "Qwen refused the sign-in, and the proxy's log says why. Open /auth to start another."},
			page: []string{">Sign-in failed</h1>", startAgain}, not: []string{live}},
		{name: "nothing under way", idle: true, watch: true,
			want: map[string]any{"status": "none", "reason": notSignedIn, "message": "No sign-in is under way. Open /auth to start one."},
			page: []string{">No sign-in under way</h1>", `href="auth">Start a sign-in</a>`}, not: []string{live}},
		{name: "the refresh is refused", life: 10 * time.Minute, after: 12 * time.Minute, device: 1,
			serve: answering(deviceAnswer(nil), pendingAnswer, grantRefused), want: pending(noLonger, 5*time.Minute),
			page: []string{">Sign in to Qwen</h1>", "Qwen no longer accepts the proxy&#39;s sign-in. Open Qwen’s page", link, live}},
		{name: "the refresh is refused, and the token still good", life: 10 * time.Minute, after: 6 * time.Minute, device: 1,
			serve: answering(deviceAnswer(nil), pendingAnswer, grantRefused), want: pending(noLonger, 5*time.Minute),
			page: []string{">Sign in to Qwen</h1>", link, live}},
		{name: "the token has expired, and Qwen can't be reached", life: time.Minute, serve: answering("", "", ""), after: 2 * time.Minute,
			want: map[string]any{"status": "signed_in", "method": "oauth", "expires_at": "2000-01-01T00:01:00Z", "base_url": "http://example.com/v1",
				"reason":  "The proxy's access token has expired and was not renewed: Qwen's sign-in server chat.qwen.ai can't be reached. Try again; the proxy keeps trying.",
				"message": "The proxy's access token has expired and was not renewed: Qwen's sign-in server chat.qwen.ai can't be reached. Try again; the proxy keeps trying."},
			page: []string{">Signed in, with a problem</h1>", "was not renewed: Qwen&#39;s sign-in server chat.qwen.ai can&#39;t be reached", live}},
		{name: "the account is not served", life: time.Hour, serve: answering(deviceAnswer(nil), pendingAnswer, ""), after: time.Minute, device: 1,
			before: func(s *sourceTest) { s.refused() }, want: pending(errNotServed.message, time.Minute),
			page: []string{`<p class="note">Qwen&#39;s API does not serve this account`, "Set QWEN_API_KEY", "sign in with another Qwen account", link, live}},
	} {
		testInBubble(t, tt.name, func(t *testing.T) {
			file := ""
			if tt.life > 0 {
				file = fileOf(0, tt.life)
			}
			s := newSourceTest(t, file, nil, tt.serve)
			if !tt.idle {
				s.start()
			}
			if tt.before != nil {
				tt.before(s)
			}
			time.Sleep(tt.after)
			synctest.Wait()
			target := "/auth"
			if tt.watch {
				target = "/auth?watch"
			}
			page := s.askAuth(http.MethodGet, target, browserAccept)
			wantPage(t, page, tt.page, tt.not)

			synctest.Wait()
			watched := s.askAuth(http.MethodGet, "/auth?watch", "*/*")
			var got map[string]any
			fatalIf(t, json.Unmarshal(watched.Body.Bytes(), &got))
			if diff := cmp.Diff(tt.want, got); diff != "" || watched.Code != http.StatusOK {
				t.Errorf("/auth?watch: status %d (-want +got):\n%s", watched.Code, diff)
			}
			if again := s.askAuth(http.MethodGet, "/auth?watch", browserAccept); again.Body.String() != page.Body.String() {
				t.Errorf("the page with ?watch is another (-want +got):\n%s", cmp.Diff(page.Body.String(), again.Body.String()))
			}
			device := 0
			for _, request := range s.asked() {
				if request.What == "device" {
					device++
				}
			}
			if device != tt.device {
				t.Errorf("%d sign-ins were started, want %d", device, tt.device)
			}
		})
	}
}

// wantPage checks that w is the page, with all of parts and none of not in it, and that its policy fits.
func wantPage(t *testing.T, w *httptest.ResponseRecorder, parts, not []string) {
	t.Helper()
	body := w.Body.String()
	for _, part := range parts {
		if !strings.Contains(body, part) {
			t.Errorf("%q is not in the page", part)
		}
	}
	for _, part := range not {
		if strings.Contains(body, part) {
			t.Errorf("%q is in the page", part)
		}
	}
	hash := func(element string) string {
		found := regexp.MustCompile("(?s)<"+element+"[^>]*>(.*?)</"+element+">").FindAllStringSubmatch(body, -1)
		if len(found) != 1 {
			t.Errorf("%d %s elements, want 1", len(found), element)
			return ""
		}
		sum := sha256.Sum256([]byte(found[0][1]))
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	want := http.Header{
		"Content-Type":  {"text/html; charset=utf-8"},
		"Cache-Control": {"no-store"},
		"Vary":          {"Origin", "Accept"},
		"Content-Security-Policy": {"default-src 'none'; style-src " + hash("style") + "; script-src " + hash("script") +
			"; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"},
	}
	got := http.Header{}
	for name := range want {
		got[name] = w.Header().Values(name)
	}
	if diff := cmp.Diff(want, got); diff != "" || w.Code != http.StatusOK {
		t.Errorf("page with status %d (-want +got):\n%s\n%s", w.Code, diff, body)
	}
	if inline := regexp.MustCompile(`<[^>]*\s(on[a-z]+|style)=`).FindString(body); inline != "" {
		t.Errorf("%q, which the policy forbids", inline)
	}
}

func TestAuthPageIsQuickWhereQwenHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, "", nil, func(r *http.Request) (int, string) {
			<-r.Context().Done()
			return 0, ""
		})
		s.start()
		begin := time.Now()
		s.askAuth(http.MethodGet, "/auth", browserAccept)
		if took := time.Since(begin); took != maxPageWait {
			t.Errorf("the page came after %v, want %v", took, maxPageWait)
		}
		begin = time.Now()
		if status, _ := s.getAuth(); status != http.StatusServiceUnavailable || time.Since(begin) != maxSignInWait {
			t.Errorf("JSON: %d after %v, want 503 after %v", status, time.Since(begin), maxSignInWait)
		}
	})
}

func TestAuthEscapesForeignText(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const hostile = `"'><script>alert(1)</script>&lt;{{.}}`
		s := newSourceTest(t, "", nil, answering(deviceAnswer(map[string]any{"user_code": hostile, "verification_uri_complete": "https://chat.qwen.ai/?" + hostile}), pendingAnswer, ""))
		s.start()
		r := httptest.NewRequest(http.MethodGet, "/auth", nil)
		r.Header.Set("Accept", browserAccept)
		r.Host = hostile
		w := httptest.NewRecorder()
		w.Header().Set("Vary", "Origin")
		track(s.cfg, s.oauthSource.log, newMetrics(), authHandler(s.oauthSource)).ServeHTTP(w, r)
		const escaped = "&#34;&#39;&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;lt;{{.}}"
		wantPage(t, w, []string{`<strong class="code">` + escaped + "</strong>", "on <strong>" + escaped + "</strong>",
			`href="https://chat.qwen.ai/?%22%27%3e%3cscript%3ealert%281%29%3c/script%3e&amp;lt;%7b%7b.%7d%7d"`}, []string{"<script>alert"})
	})
}

// TestAuthOfTheProgram denies a sign-in, with the stand-in in Qwen's place. Pages of other sites neither see it nor start another.
func TestAuthOfTheProgram(t *testing.T) {
	t.Parallel()
	qwen, env := qwenEnv(t)
	env["SERVER_PORT"] = "0"
	p := start(t, env)
	link := p.stderr.await(t, linkLine)
	want := func(method, path, site, part string, authorizations int) string {
		t.Helper()
		res, body := p.send(method, path, func(r *http.Request) {
			r.Header.Set("Accept", browserAccept)
			r.Header.Set("Sec-Fetch-Site", site)
		})
		if part == "" {
			wantError(t, res, body, http.StatusForbidden, typeAuthentication, "cross_origin")
		} else if method == "GET" && !strings.Contains(body, part) || res.StatusCode != 200 || res.Header.Get("Content-Security-Policy") == "" || res.Header.Get("X-Frame-Options") != "DENY" {
			t.Errorf("%s %s: %s %v, want %q in\n%s", method, path, res.Status, res.Header, part, body)
		}
		if n := qwen.authorizations(); n != authorizations {
			t.Errorf("%s %s from %s: %d device authorizations, want %d", method, path, site, n, authorizations)
		}
		return body
	}
	want("GET", "/auth", "none", ">Sign in to Qwen</h1>", 1)
	decideAt(t, link, "deny")
	p.stderr.await(t, "sign-in ended without success")
	want("GET", "/auth?watch", "same-origin", ">Start again</a>", 1)
	want("HEAD", "/auth", "none", "(no body)", 1)
	want("GET", "/auth", "cross-site", "", 1)
	want("GET", "/auth?watch", "same-site", "", 1)
	want("GET", "/auth", "none", ">Sign in to Qwen</h1>", 2)
}

// TestAuthIsAPageForBrowsers: text/html in Accept is enough.
func TestAuthIsAPageForBrowsers(t *testing.T) {
	p := start(t, map[string]string{"QWEN_API_KEY": "sk-test"})
	for accept, page := range map[string]bool{
		browserAccept: true, "application/json;q=0.5, text/html": true, "*/*": false, "application/json, text/plain, */*": false,
	} {
		res, body := p.send("GET", "/auth", header("Accept", accept))
		want := `{"status":"signed_in","method":"api_key","message":"The proxy uses an API key. No sign-in is needed.","base_url":"` + p.url + `/v1"}` + "\n"
		if page != (res.Header.Get("Content-Type") == "text/html; charset=utf-8") || !page && body != want {
			t.Errorf("Accept %q: %v %s", accept, res.Header, body)
		}
		if page && (!strings.Contains(body, ">No sign-in needed</h1>") || !strings.Contains(body, ">"+p.url+"/v1</code>")) {
			t.Errorf("Accept %q: the page is\n%s", accept, body)
		}
	}
}

func TestBaseURLOf(t *testing.T) {
	for _, tt := range []struct{ target, proto, want string }{
		{"http://localhost:8080/auth", "", "http://localhost:8080/v1"},
		{"http://[::1]:8080/auth", "http", "http://[::1]:8080/v1"},
		{"https://qwen.example/auth", "", "https://qwen.example/v1"},
		{"http://qwen.example/auth", "https", "https://qwen.example/v1"},
		{"http://qwen.example/auth", "javascript", "http://qwen.example/v1"},
	} {
		r := httptest.NewRequest(http.MethodGet, tt.target, nil)
		r.Header.Set("X-Forwarded-Proto", tt.proto)
		if got := baseURLOf(r); got != tt.want {
			t.Errorf("%s, X-Forwarded-Proto %q: %s, want %s", tt.target, tt.proto, got, tt.want)
		}
	}
}
