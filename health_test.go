package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// detailed returns what /health/detailed says, having checked and taken out what differs from run to run.
func (p *program) detailed(header func(*http.Request)) map[string]any {
	p.t.Helper()
	res, body := p.send("GET", "/health/detailed", header)
	var got map[string]any
	fatalIf(p.t, json.Unmarshal([]byte(body), &got))
	if strings.Contains(body, "good-token") || strings.Contains(body, "refresh-1") || strings.Contains(body, "s3cret") {
		p.t.Errorf("it tells a secret: %s", body)
	}
	if res.Header.Get("Content-Type") != "application/json" || res.Header.Get("Cache-Control") != "no-store" || got["request_id"] != res.Header.Get("X-Request-Id") {
		p.t.Errorf("headers %v, request_id %v", res.Header, got["request_id"])
	}
	memory, _ := got["memory"].(map[string]any)
	for name, n := range map[string]any{"uptime_seconds": got["uptime_seconds"], "goroutines": got["goroutines"], "heap_bytes": memory["heap_bytes"], "system_bytes": memory["system_bytes"]} {
		if n, ok := n.(float64); !ok || n < 1 && name != "uptime_seconds" || n != math.Trunc(n) {
			p.t.Errorf("%s is %v, want a whole number", name, n)
		}
	}
	for _, name := range []string{"request_id", "uptime_seconds", "goroutines", "memory"} {
		delete(got, name)
	}
	return got
}

func TestHealthDetailed(t *testing.T) {
	dir := credentials(t)
	stored, err := (&credentialStore{dir: dir}).load()
	fatalIf(t, err)
	nobody := httptest.NewServer(http.NotFoundHandler())
	nobody.Close()
	counts := map[string]any{"total": 1.0, "in_flight": 1.0, "open_streams": 0.0, "rate_limited": 0.0, "upstream_errors": 0.0}
	for _, tt := range []struct {
		name   string
		env    map[string]string
		await  string // in the log, first
		status string
		auth   map[string]any
	}{
		{"signed in", map[string]string{"QWEN_DIR": dir, "PROXY_API_KEYS": "s3cret"}, "", "healthy", map[string]any{
			"method": "oauth", "authenticated": true, "upstream": "https://portal.qwen.ai/v1", "expires_at": true}},
		{"an upstream of its own", map[string]string{"QWEN_DIR": dir, "API_BASE_URL": "http://127.0.0.1:1/x/", "PROXY_API_KEYS": "s3cret"}, "", "healthy",
			map[string]any{"method": "oauth", "authenticated": true, "upstream": "http://127.0.0.1:1/x", "expires_at": true}},
		{"a key", map[string]string{"QWEN_DIR": dir, "QWEN_API_KEY": "sk-s3cret"}, "", "healthy", map[string]any{
			"method": "api_key", "authenticated": true, "upstream": "https://dashscope-intl.aliyuncs.com/compatible-mode/v1"}},
		{"not signed in", nil, "server .* can't be reached", "degraded", map[string]any{
			"method": "oauth", "authenticated": false, "sign_in": "starting",
			"reason": "The proxy is not signed in to Qwen. Set QWEN_API_KEY on the proxy, or sign in: open /auth on the proxy, or follow the link in its log."}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			env := map[string]string{"QWEN_OAUTH_BASE_URL": nobody.URL}
			for k, v := range tt.env {
				env[k] = v
			}
			p := start(t, env)
			if tt.await != "" {
				p.stderr.await(t, "("+tt.await+")")
			}
			got := p.detailed(header("Authorization", "Bearer s3cret"))
			auth, _ := got["auth"].(map[string]any)
			if s, ok := auth["expires_at"].(string); ok {
				expires, err := time.Parse(time.RFC3339, s)
				if err != nil || expires.Sub(stored.expiry).Abs() > time.Second {
					t.Errorf("expires_at %s, want %v", s, stored.expiry)
				}
				auth["expires_at"] = true
			}
			want := map[string]any{"status": tt.status, "version": version().Version, "requests": counts, "auth": tt.auth,
				"tokens": map[string]any{"input": 0.0, "output": 0.0, "cached": 0.0}}
			wantEqual(t, "/health/detailed", want, got)
		})
	}
}

// TestHealthAndModelsStartNothing: monitors ask often, and every sign-in that nobody completes is one too many.
func TestHealthAndModelsStartNothing(t *testing.T) {
	qwen := newStandIn()
	qwen.approveAfter = time.Hour
	server := httptest.NewServer(qwen)
	t.Cleanup(server.Close)
	dir := t.TempDir()
	p := start(t, map[string]string{"QWEN_OAUTH_BASE_URL": server.URL, "QWEN_DIR": dir})
	p.stderr.await(t, `("msg":"waiting for sign-in")`)
	for range 10 {
		for path, want := range map[string]int{
			"/": 200, "/health": 200, "/health/ready": 503, "/health/detailed": 200, "/v1/models": 200, "/v1/models/coder-model": 200, "/v1/models/none": 404,
		} {
			if res, body := p.get(path); res.StatusCode != want {
				t.Errorf("%s: %s %s, want %d", path, res.Status, body, want)
			}
		}
	}
	want := map[string]any{"method": "oauth", "authenticated": false, "sign_in": signInPending,
		"reason": "The proxy is not signed in to Qwen. Set QWEN_API_KEY on the proxy, or sign in: open /auth on the proxy, or follow the link in its log."}
	wantEqual(t, "auth", want, p.detailed(nil)["auth"])
	if n := qwen.authorizations(); n != 1 {
		t.Errorf("%d sign-ins were started, want 1", n)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("QWEN_DIR holds %v, %v; want nothing", entries, err)
	}
}

func TestReadiness(t *testing.T) {
	hour := time.Now().Add(time.Hour).UnixMilli()
	good := fmt.Sprintf(`{"access_token":"good-token","refresh_token":"refresh-1","expiry_date":%d}`, hour)
	foreign := strings.Replace(good, "{", `{"resource_url":"evil.com",`, 1)
	const expired = `{"access_token":"good-token","refresh_token":"refresh-1","expiry_date":1753142400000}`
	for _, tt := range []struct {
		name    string
		file    string // the credential file
		env     map[string]string
		answer  func(http.ResponseWriter) // the OAuth server's
		await   string                    // in the log, first
		code    string                    // "" is ready
		message string
	}{
		{name: "signed in", file: good},
		{name: "a key", env: map[string]string{"QWEN_API_KEY": "sk-test"}},
		{name: "expires in the far future", file: `{"access_token":"good-token","refresh_token":"refresh-1","expiry_date":1753142400123000}`},
		{name: "a key beside a broken file", file: "{", env: map[string]string{"QWEN_API_KEY": "sk-test"}},
		{name: "no file", code: "not_signed_in", message: "open /auth"},
		{name: "signed out", file: "{}", code: "not_signed_in", message: "open /auth"},
		{name: "a broken file", file: `{"access_token":"good-token`, await: "the credential file can't be used", code: "not_signed_in", message: "open /auth"},
		{
			name: "expired, and nobody to renew it", file: expired,
			answer: func(w http.ResponseWriter) { w.WriteHeader(http.StatusTooManyRequests) },
			await:  "token refresh failed", code: "token_refresh_failed", message: "answered 429 Too Many Requests",
		},
		{
			name: "expired, and no network", file: expired,
			env:   map[string]string{"QWEN_OAUTH_BASE_URL": "http://127.0.0.1:1"},
			await: "token refresh failed", code: "token_refresh_failed", message: "can't be reached",
		},
		{
			name: "expired, and refused", file: expired,
			answer: func(w http.ResponseWriter) {
				w.WriteHeader(http.StatusBadRequest)
				io.WriteString(w, `{"error":"invalid_grant","error_description":"Invalid refresh token or client_id"}`)
			},
			await: "sign-in ended without success", code: "sign_in_expired", message: "Sign in again",
		},
		{
			name: "about to expire, and nobody to renew it",
			file: fmt.Sprintf(`{"access_token":"good-token","refresh_token":"refresh-1","expiry_date":%d}`, time.Now().Add(2*time.Minute).UnixMilli()),
			env:  map[string]string{"TOKEN_REFRESH_BUFFER": "1h"},
		},
		{
			name: "someone else's API", file: foreign, code: "resource_url_refused", message: "API_BASE_URL",
		},
		{name: "someone else's API, meant", file: foreign, env: map[string]string{"API_BASE_URL": "https://evil.com"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			oauth := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if tt.answer == nil {
					http.NotFound(w, r)
					return
				}
				tt.answer(w)
			}))
			defer oauth.Close()
			env := map[string]string{"QWEN_DIR": t.TempDir(), "QWEN_OAUTH_BASE_URL": oauth.URL}
			for k, v := range tt.env {
				env[k] = v
			}
			if tt.file != "" {
				writeFile(t, filepath.Join(env["QWEN_DIR"], credentialFile), tt.file)
			}
			p := start(t, env)
			if tt.await != "" {
				p.stderr.await(t, "("+tt.await+")")
			}
			res, body := p.get("/health/ready")
			var got map[string]string
			if err := json.Unmarshal([]byte(body), &got); err != nil {
				t.Fatalf("%s %s", res.Status, body)
			}
			if !strings.Contains(got["reason"], tt.message) || strings.Contains(body, "good-token") || strings.Contains(body, "refresh-1") {
				t.Errorf("reason %q, want %q in it and no token", got["reason"], tt.message)
			}
			delete(got, "reason")
			want, status := map[string]string{"status": "ready"}, http.StatusOK
			if tt.code != "" {
				want, status = map[string]string{"status": "not_ready", "code": tt.code}, http.StatusServiceUnavailable
			}
			if diff := cmp.Diff(want, got); diff != "" || res.StatusCode != status {
				t.Errorf("%s, want %d; body (-want +got):\n%s", res.Status, status, diff)
			}
			for _, path := range []string{"/health", "/health/detailed"} {
				if res, body := p.get(path); res.StatusCode != http.StatusOK {
					t.Errorf("%s: %s %s, want 200 whatever readiness is", path, res.Status, body)
				}
			}
		})
	}
}

// readiness asks h whether it is ready, and returns the status and code of its answer.
func readiness(t *testing.T, h *health) string {
	t.Helper()
	w := httptest.NewRecorder()
	h.ready(&exchange{answerWriter: answerWriter{w: w, rc: http.NewResponseController(w)}}, nil)
	var got struct{ Status, Code string }
	fatalIf(t, json.Unmarshal(w.Body.Bytes(), &got))
	return fmt.Sprintf("%d %s %s", w.Code, got.Status, got.Code)
}

func TestNotReadyWhileShuttingDown(t *testing.T) {
	h := &health{tokens: newKeySource(&config{apiKey: "sk-test"}, slog.New(slog.DiscardHandler)), metrics: newMetrics(), log: slog.New(slog.DiscardHandler)}
	before := readiness(t, h)
	h.stopping.Store(true)
	wantEqual(t, "before and after", []string{"200 ready ", "503 not_ready shutting_down"}, []string{before, readiness(t, h)})
}

// TestProbesDoNotFillTheLog: they come every few seconds for months.
func TestProbesDoNotFillTheLog(t *testing.T) {
	t.Parallel()
	probe := func(t *testing.T, env map[string]string) *program {
		p := start(t, env)
		for range 3 {
			for _, path := range []string{"/health", "/health/ready", "/v1/models"} {
				p.get(path)
			}
		}
		p.send("GET", "/health", func(r *http.Request) { r.Host = "probe.example" }) // refused: no probe meant to be one
		p.stderr.await(t, `("status":403)`)
		return p
	}
	nobody := httptest.NewServer(http.NotFoundHandler())
	nobody.Close()
	for name, env := range map[string]map[string]string{
		"ready":     {"QWEN_API_KEY": "sk-test", "API_BASE_URL": nobody.URL},
		"not ready": {"QWEN_OAUTH_BASE_URL": nobody.URL},
	} {
		log := probe(t, env).stderr.String()
		for path, want := range map[string]int{"/health": 1, "/health/ready": 0, "/v1/models": 3} {
			if n := strings.Count(log, `"path":"`+path+`"`); n != want {
				t.Errorf("%s: %d lines for %s, want %d:\n%s", name, n, path, want, log)
			}
		}
		env["LOG_LEVEL"] = "debug"
		log = probe(t, env).stderr.String()
		if n := strings.Count(log, `"level":"DEBUG","msg":"request"`); n != 6 {
			t.Errorf("%s: %d access lines at debug level, want 6:\n%s", name, n, log)
		}
	}
}

func TestAChangeOfReadinessIsOneLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg, err := loadConfig(lookup(nil))
		fatalIf(t, err)
		var b logBuffer
		log := newLogger(cfg, &b)
		tokens := newOAuthSource(nil, &credentialStore{dir: t.TempDir()}, cfg, log, io.Discard)
		h := &health{tokens: tokens, metrics: newMetrics(), log: log}
		ctx, stop := context.WithCancel(t.Context())
		go h.watch(ctx, func(string) {})
		var got []string
		check := func(when string) {
			for range 3 {
				readiness(t, h)
				time.Sleep(time.Minute)
			}
			for line := range strings.Lines(b.String()) {
				var entry struct{ Level, Msg, Reason string }
				fatalIf(t, json.Unmarshal([]byte(line), &entry))
				got = append(got, when+": "+entry.Level+" "+entry.Msg+" "+entry.Reason)
			}
			b.Reset()
		}
		check("at the start")
		tokens.setToken(&token{access: "good-token", refresh: "refresh-1", expiry: time.Now().Add(30 * time.Minute)})
		check("signed in")
		time.Sleep(time.Hour) // and nobody asks
		check("expired")
		h.stopping.Store(true) // which the log tells already
		check("stopping")
		stop()
		want := []string{
			"signed in: INFO the server is ready ",
			"expired: WARN the server is not ready " + h.tokens.ready().message,
		}
		wantEqual(t, "the log", want, got)
	})
}

// steps returns what waits, tells h's tokens how Qwen has answered then, and adds to got how ready h is.
func steps(t *testing.T, h *health, got *[]string) func(pause time.Duration, served ...bool) {
	return func(pause time.Duration, served ...bool) {
		time.Sleep(pause)
		for _, ok := range served {
			if ok {
				h.tokens.accepted()
			} else {
				h.tokens.refused()
			}
		}
		*got = append(*got, readiness(t, h))
	}
}

// TestReadinessHeals: a minute after the last 401 requests can come again, and the first one decides.
func TestReadinessHeals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, fileOf(0, 24*time.Hour), nil, func(*http.Request) (int, string) { return 0, "" })
		h := &health{tokens: s.oauthSource, metrics: newMetrics(), log: slog.New(slog.DiscardHandler)}
		var got []string
		step := steps(t, h, &got)
		step(0, false)
		step(time.Minute, false)
		step(time.Minute - time.Nanosecond)
		if _, err := s.Replace(t.Context(), nil); err == nil { // a request that no refresh is tried for
			t.Error("a refresh was tried")
		}
		step(time.Minute - time.Nanosecond)
		step(time.Nanosecond)
		step(time.Hour)
		step(0, false)
		step(time.Minute)
		step(0, true, false)
		const no, yes = "503 not_ready qwen_oauth_unavailable", "200 ready "
		wantEqual(t, "readiness", []string{yes, no, no, no, yes, yes, no, yes, yes}, got)
	})
}

// TestNotReadyWhileTheKeyIsRefused: a key that was never good counts as refused at once, and one that was after a minute.
func TestNotReadyWhileTheKeyIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := &url.URL{Scheme: "https", Host: "qwen.test"}
		h := &health{tokens: newKeySource(&config{apiKey: "sk-test", apiBase: base}, slog.New(slog.DiscardHandler)), metrics: newMetrics(), log: slog.New(slog.DiscardHandler)}
		got := []string{readiness(t, h)}
		step := steps(t, h, &got)
		step(0, false)
		step(time.Minute)
		step(0, false)
		step(0, true)
		step(0, false)
		step(time.Minute, false)
		step(time.Minute)
		const no, yes = "503 not_ready invalid_api_key", "200 ready "
		wantEqual(t, "readiness", []string{yes, no, yes, no, yes, yes, no, yes}, got)
	})
}
