package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A sourceTest is a tokenSource over an OAuth server that a function stands for. When the test ends it
// checks that nothing secret has been logged or shown.
type sourceTest struct {
	*oauthSource
	t           *testing.T
	cfg         *config
	log, prompt logBuffer
	begin       time.Time

	mu       sync.Mutex
	requests []oauthRequest
	secrets  map[string]bool // whatever went to and fro between source and server
}

// An oauthRequest is one that reached the OAuth server.
type oauthRequest struct {
	What string // "device", "poll", or the refresh token
	At   time.Duration
}

// newSourceTest returns a source over file, the content of its credential file ("" for none), which is not yet running.
func newSourceTest(t *testing.T, file string, env map[string]string, serve oauthFunc) *sourceTest {
	t.Helper()
	full := map[string]string{"QWEN_DIR": filepath.Join(t.TempDir(), "qwen")}
	for k, v := range env {
		full[k] = v
	}
	cfg, err := loadConfig(lookup(full))
	fatalIf(t, err)
	s := &sourceTest{t: t, cfg: cfg, begin: time.Now(), secrets: map[string]bool{}}
	if file != "" {
		s.write(file)
	}
	s.oauthSource = newSource(cfg, slog.New(slog.NewJSONHandler(&s.log, nil)), &s.prompt).(*oauthSource)
	s.oauth.http.Transport = oauthFunc(func(r *http.Request) (int, string) {
		s.note(r)
		status, body := serve(r)
		s.keepSecret(body)
		return status, body
	})
	t.Cleanup(func() {
		shown := s.log.String() + s.prompt.String()
		for secret := range s.secrets {
			if strings.Contains(shown, secret) {
				t.Errorf("%q is in the log or at the prompt", secret)
			}
		}
		if t.Failed() {
			t.Logf("log:\n%s", shown)
		}
	})
	return s
}

// write replaces the credential file, at once as other programs do, now by the bubble's clock.
func (s *sourceTest) write(content string) {
	s.t.Helper()
	s.keepSecret(content)
	path := filepath.Join(s.cfg.qwenDir, credentialFile)
	temp := path + ".test"
	if err := errors.Join(os.MkdirAll(s.cfg.qwenDir, 0o700), os.WriteFile(temp, []byte(content), 0o600), os.Chtimes(temp, time.Now(), time.Now()),
		os.Rename(temp, path)); err != nil {
		s.t.Fatal(err)
	}
}

// read returns the members of the credential file.
func (s *sourceTest) read() map[string]any {
	s.t.Helper()
	var members map[string]any
	b, err := os.ReadFile(s.store.path())
	if err = errors.Join(err, json.Unmarshal(b, &members)); err != nil {
		s.t.Fatal(err)
	}
	return members
}

// wantStored checks a member of the credential file.
func (s *sourceTest) wantStored(name, want string) {
	s.t.Helper()
	wantEqual(s.t, "stored "+name, any(want), s.read()[name])
}

func (s *sourceTest) wantReady() {
	s.t.Helper()
	if err := s.ready(); err != nil {
		s.t.Errorf("not ready: %v", err)
	}
}

func (s *sourceTest) note(r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range []string{"refresh_token", "device_code", "code_verifier"} {
		if r.PostForm.Has(name) {
			s.secrets[r.PostForm.Get(name)] = true
		}
	}
	what := "device"
	switch r.PostForm.Get("grant_type") {
	case "refresh_token":
		what = r.PostForm.Get("refresh_token")
	case deviceGrant:
		what = "poll"
	}
	s.requests = append(s.requests, oauthRequest{what, time.Since(s.begin)})
}

func (s *sourceTest) keepSecret(body string) {
	var answer map[string]any
	json.Unmarshal([]byte(body), &answer)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range []string{"access_token", "refresh_token", "device_code", "id_token"} {
		if secret, ok := answer[name].(string); ok && secret != "" {
			s.secrets[secret] = true
		}
	}
}

// asked returns the requests that reached the server so far.
func (s *sourceTest) asked() []oauthRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// wantAsked checks what the server was asked for, without polls.
func (s *sourceTest) wantAsked(want ...string) {
	s.t.Helper()
	var got []string
	for _, r := range s.asked() {
		if r.What != "poll" {
			got = append(got, r.What)
		}
	}
	wantEqual(s.t, "requests to the OAuth server", want, got)
}

// start runs the source until the test ends or the function that it returns is called, which waits for run's end.
func (s *sourceTest) start() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.run(ctx, context.Background())
	}()
	watchFiles(ctx, s.oauthSource.log, 5*time.Second, s.files())
	stop = func() {
		cancel()
		<-done
	}
	s.t.Cleanup(stop)
	return stop
}

// An outcome is what Token or Replace came to.
type outcome struct {
	Got  string // the access token; status and code of an apiError; the text of another error
	Took time.Duration
}

func outcomeOf(call func() (*token, error)) outcome {
	begin := time.Now()
	tok, err := call()
	took := time.Since(begin)
	e, ok := errors.AsType[*apiError](err)
	switch {
	case ok:
		return outcome{fmt.Sprint(e.status, " ", e.code), took}
	case err != nil:
		return outcome{err.Error(), took}
	}
	return outcome{tok.access, took}
}

// want checks what Token comes to.
func (s *sourceTest) want(got string, took time.Duration) {
	s.t.Helper()
	wantEqual(s.t, fmt.Sprintf("Token at %v", time.Since(s.begin)), outcome{got, took}, outcomeOf(func() (*token, error) { return s.Token(s.t.Context()) }))
}

// wantLogged checks how many lines of the log have part in them.
func (s *sourceTest) wantLogged(part string, want int) {
	s.t.Helper()
	if got := strings.Count(s.log.String(), part); got != want {
		s.t.Errorf("%q is in the log %d times, want %d", part, got, want)
	}
}

// getAuth returns status and answer of GET /auth.
func (s *sourceTest) getAuth() (int, map[string]any) {
	s.t.Helper()
	w := httptest.NewRecorder()
	track(s.cfg, s.oauthSource.log, newMetrics(), authHandler(s.oauthSource)).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/auth", nil))
	var answer map[string]any
	if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil {
		s.t.Errorf("/auth: %v in %q", err, w.Body)
	}
	return w.Code, answer
}

// wantAuth checks the status that GET /auth tells.
func (s *sourceTest) wantAuth(want string) {
	s.t.Helper()
	if status, answer := s.getAuth(); status != http.StatusOK || answer["status"] != want {
		s.t.Errorf("/auth: %d %v, want %s", status, answer, want)
	}
}

// fileOf is a credential file with the n-th token, which expires in life.
func fileOf(n int, life time.Duration) string {
	return fmt.Sprintf(`{"access_token":"access-%[1]d","refresh_token":"refresh-%[1]d","token_type":"Bearer","expiry_date":%[2]d}`,
		n, time.Now().Add(life).UnixMilli())
}

func TestTokenIsRenewedBeforeItExpires(t *testing.T) {
	for _, tt := range []struct{ life, buffer, want time.Duration }{
		{time.Hour, 5 * time.Minute, 55 * time.Minute},
		{8 * time.Minute, 5 * time.Minute, 4 * time.Minute}, // half of its life
		{time.Hour, 2 * time.Hour, 30 * time.Minute},
		{10 * time.Second, time.Second, 9 * time.Second},
	} {
		testInBubble(t, fmt.Sprint(tt.life, " less ", tt.buffer), func(t *testing.T) {
			const call = 500 * time.Millisecond
			s := newSourceTest(t, fileOf(0, tt.life), map[string]string{"TOKEN_REFRESH_BUFFER": tt.buffer.String()}, func(*http.Request) (int, string) {
				time.Sleep(call)
				return 200, tokenAnswer(1, int(tt.life.Seconds()))
			})
			s.start()
			time.Sleep(tt.want)
			synctest.Wait()
			s.want("access-0", 0) // the refresh is under way
			time.Sleep(call)
			synctest.Wait()
			s.want("access-1", 0)
			time.Sleep(tt.want)
			synctest.Wait()
			want := []oauthRequest{{"refresh-0", tt.want}, {"refresh-1", 2*tt.want + call}}
			wantEqual(t, "requests", want, s.asked())
		})
	}
}

// storm calls call 1,000 times at once and returns how often it came to what.
func storm(call func() (*token, error)) map[outcome]int {
	outcomes := make(chan outcome, 1000)
	for range cap(outcomes) {
		go func() { outcomes <- outcomeOf(call) }()
	}
	counts := map[outcome]int{}
	for range cap(outcomes) {
		counts[<-outcomes]++
	}
	return counts
}

func TestThousandRequestsAtExpiryWaitForOneRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, fileOf(0, 3*time.Second), nil, func(*http.Request) (int, string) {
			time.Sleep(2 * time.Second)
			return 200, tokenAnswer(1, 3600)
		})
		s.start() // the refresh is from 1.5 s to 3.5 s
		time.Sleep(3 * time.Second)
		got := storm(func() (*token, error) { return s.Token(t.Context()) })
		wantEqual(t, "outcomes", map[outcome]int{{"access-1", 500 * time.Millisecond}: 1000}, got)
		s.wantAsked("refresh-0")
	})
}

func TestThousandRejectionsLeadToOneRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, fileOf(0, time.Hour), nil, func(*http.Request) (int, string) {
			time.Sleep(2 * time.Second)
			return 200, tokenAnswer(1, 3600)
		})
		s.start()
		rejected, _ := s.Token(t.Context())
		replace := func() (*token, error) { return s.Replace(t.Context(), rejected) }
		got := storm(replace)
		wantEqual(t, "outcomes", map[outcome]int{{"access-1", 2 * time.Second}: 1000}, got)
		wantEqual(t, "a late rejection", outcome{"access-1", 0}, outcomeOf(replace))
		time.Sleep(time.Minute)
		s.wantAsked("refresh-0")
	})
}

func TestWaitersLeaveWithTheirContexts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, fileOf(0, -time.Hour), nil, func(*http.Request) (int, string) {
			time.Sleep(10 * time.Second)
			return 200, tokenAnswer(1, 3600)
		})
		s.start()
		outcomes := make(chan outcome)
		for i := range 4 {
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Duration(1+4*i)*time.Second, fmt.Errorf("client %d left", i))
			defer cancel()
			go func() { outcomes <- outcomeOf(func() (*token, error) { return s.Token(ctx) }) }()
		}
		var got []outcome
		for range 4 {
			got = append(got, <-outcomes)
		}
		want := []outcome{{"client 0 left", time.Second}, {"client 1 left", 5 * time.Second}, {"client 2 left", 9 * time.Second}, {"access-1", 10 * time.Second}}
		wantEqual(t, "outcomes", want, got)
		s.wantAsked("refresh-0")
	})
}

func TestNobodyWaitsLongerThan30s(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, fileOf(0, -time.Hour), nil, func(r *http.Request) (int, string) {
			time.Sleep(20 * time.Second)
			return 200, tokenAnswer(1, 3600)
		})
		lock := filepath.Join(s.cfg.qwenDir, lockFile)
		leaveLock(t, lock, 0)
		s.start()
		time.AfterFunc(19*time.Second, func() { os.Remove(lock) }) // the refresh begins up to 2 s later
		begin := time.Now()
		_, err := s.Token(t.Context())
		e, _ := errors.AsType[*apiError](err)
		if e == nil || e.status != http.StatusServiceUnavailable || e.retryAfter <= 0 || time.Since(begin) != 30*time.Second {
			t.Fatalf("got %v after %v, want a 503 with Retry-After after 30s", err, time.Since(begin))
		}
		if got := outcomeOf(func() (*token, error) { return s.Token(t.Context()) }); got.Got != "access-1" || got.Took < 9*time.Second || got.Took > 11*time.Second {
			t.Errorf("got %v, want access-1 after about 10s", got)
		}
		s.wantAsked("refresh-0")
	})
}

// TestALockCoversOneTimeout: a refused refresh is tried again with the refresh token of another process. Both calls together
// end within 25 s, so that nobody who waits for the lock gives up.
func TestALockCoversOneTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s *sourceTest
		ended := make(chan time.Duration, 9)
		s = newSourceTest(t, fileOf(0, -time.Hour), nil, func(r *http.Request) (int, string) {
			if r.PostForm.Get("refresh_token") == "refresh-0" {
				s.write(fileOf(1, -time.Minute)) // another process was first
				time.Sleep(20 * time.Second)
				return 400, grantRefused
			}
			<-r.Context().Done()
			ended <- time.Since(s.begin)
			return 0, ""
		})
		s.start()
		if got := <-ended; got != 25*time.Second {
			t.Errorf("the second call ended after %v, want 25s", got)
		}
	})
}

// TestALogoutWinsOverARefreshUnderWay has a logout give up waiting for the lock and write the file.
func TestALogoutWinsOverARefreshUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s *sourceTest
		s = newSourceTest(t, fileOf(0, -time.Hour), nil, func(r *http.Request) (int, string) {
			if r.PostForm.Has("refresh_token") {
				s.write("{}")
				return 200, tokenAnswer(1, 3600)
			}
			if r.PostForm.Has("grant_type") {
				return 400, pendingAnswer
			}
			return 200, deviceAnswer(nil)
		})
		s.start()
		s.want("401 not_signed_in", 0)
		wantEqual(t, "the file after a logout", map[string]any{}, s.read())
		s.wantAuth(signInPending)
		s.wantAsked("refresh-0", "device")
	})
}

// TestAForeignFileComesDuringARefresh: it stays, and the new token is used from memory.
func TestAForeignFileComesDuringARefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s *sourceTest
		s = newSourceTest(t, fileOf(0, -time.Hour), nil, func(r *http.Request) (int, string) {
			s.write(`{"hello":"world"}`)
			return 200, tokenAnswer(1, 3600)
		})
		s.start()
		s.want("access-1", 0)
		wantEqual(t, "the file", map[string]any{"hello": "world"}, s.read())
		s.wantAsked("refresh-0")
	})
}

// TestOAuthServerIsDown goes from the first failure through expiry to the server's return.
func TestOAuthServerIsDown(t *testing.T) {
	for name, answer := range map[string]oauthFunc{
		"network": func(*http.Request) (int, string) { return 0, "" },
		"5xx":     func(*http.Request) (int, string) { return 503, `{"error":"server_error"}` },
		"HTML":    func(*http.Request) (int, string) { return 200, htmlAnswer },
		"limit":   func(*http.Request) (int, string) { return 429, `{"error":"slow_down"}` },
	} {
		testInBubble(t, name, func(t *testing.T) {
			var up atomic.Bool
			s := newSourceTest(t, fileOf(0, 10*time.Minute), nil, func(r *http.Request) (int, string) {
				if up.Load() {
					return 200, tokenAnswer(1, 3600)
				}
				return answer(r)
			})
			s.start()
			for range 599 {
				time.Sleep(time.Second)
				s.want("access-0", 0)
				s.wantReady()
			}
			time.Sleep(time.Second) // it has expired
			synctest.Wait()
			retryAfter := time.Duration(0)
			for range 60 {
				time.Sleep(time.Second + 100*time.Millisecond)
				synctest.Wait()
				s.want("503 token_refresh_failed", 0)
				_, err := s.Token(t.Context())
				e, _ := errors.AsType[*apiError](err)
				if ready := s.ready(); ready == nil || ready.code != e.code || e.retryAfter <= 0 || e.retryAfter > 30*time.Second {
					t.Fatalf("ready says %v, a request was told %v", ready, e)
				}
				retryAfter = e.retryAfter
			}
			up.Store(true)
			time.Sleep(retryAfter) // which told the truth
			s.want("access-1", 0)

			exact, requests := 0, s.asked()
			for i := range requests[1:] {
				pause, full := requests[i+1].At-requests[i].At, min(time.Second<<min(i, 10), 30*time.Second)
				if pause < full*4/5 || pause > full {
					t.Errorf("pause %d is %v, want one from %v to %v", i, pause, full*4/5, full)
				}
				if pause == full {
					exact++
				}
			}
			if n := len(requests); n < 12 || exact > 2 {
				t.Errorf("%d requests, %d pauses without jitter", n, exact)
			}
		})
	}
}

func TestRejectedTokenAndNoServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, fileOf(0, time.Hour), nil, func(*http.Request) (int, string) { return 0, "" })
		s.start()
		rejected, _ := s.Token(t.Context())
		for range 2 {
			got := outcomeOf(func() (*token, error) { return s.Replace(t.Context(), rejected) })
			wantEqual(t, "Replace", outcome{"503 token_refresh_failed", 0}, got)
		}
		s.want("access-0", 0)
		s.wantAsked("refresh-0")
	})
}

func TestRefusedRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		devices := 0
		s := newSourceTest(t, fileOf(0, 10*time.Minute), nil, func(r *http.Request) (int, string) {
			switch r.PostForm.Get("grant_type") {
			case "refresh_token":
				return 400, grantRefused
			case deviceGrant:
				if devices == 2 {
					return 200, tokenAnswer(1, 3600)
				}
				return 400, pendingAnswer
			}
			devices++
			return 200, deviceAnswer(map[string]any{"expires_in": 120})
		})
		s.start()
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		s.wantLogged("invalid_grant", 1)
		if !strings.Contains(s.prompt.String(), "\nhttps://chat.qwen.ai/authorize?user_code=WDJB-MJHT\n") || !strings.Contains(s.prompt.String(), "\nWDJB-MJHT\n") {
			t.Errorf("prompt %q, want link and code on lines of their own", s.prompt.String())
		}
		s.want("access-0", 0)
		time.Sleep(5*time.Minute - time.Nanosecond)
		s.want("access-0", 0) // good until it expires
		s.wantAsked("refresh-0", "device")
		time.Sleep(time.Nanosecond)
		s.want("401 sign_in_expired", 0) // and a new link, the old one being dead
		synctest.Wait()
		s.wantAsked("refresh-0", "device", "device")
		s.wantAuth(signInPending)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		s.want("access-1", 0)
		s.wantAuth("signed_in")
	})
}

// TestRefusedRefreshLooksIntoTheFile has another process write what is in file while the source's refresh token is refused.
func TestRefusedRefreshLooksIntoTheFile(t *testing.T) {
	for _, tt := range []struct {
		name  string
		file  func() string
		asked []string
		got   string
	}{
		{"a good token is adopted", func() string { return fileOf(1, time.Hour) }, []string{"refresh-0"}, "access-1"},
		{"an expired token is renewed", func() string { return fileOf(1, -time.Hour) }, []string{"refresh-0", "refresh-1"}, "access-2"},
		{"the same token", func() string { return fileOf(0, -time.Hour) }, []string{"refresh-0", "device"}, "401 sign_in_expired"},
		{"nonsense", func() string { return "{" }, []string{"refresh-0", "device"}, "401 sign_in_expired"},
		{"signed out", func() string { return "{}" }, []string{"refresh-0", "device"}, "401 not_signed_in"},
	} {
		testInBubble(t, tt.name, func(t *testing.T) {
			var s *sourceTest
			s = newSourceTest(t, fileOf(0, -time.Hour), nil, func(r *http.Request) (int, string) {
				switch r.PostForm.Get("refresh_token") {
				case "refresh-0":
					time.Sleep(time.Second) // the first look at the file is over
					s.write(tt.file())
					return 400, grantRefused
				case "refresh-1":
					return 200, tokenAnswer(2, 3600)
				}
				return 200, deviceAnswer(nil)
			})
			s.start()
			s.want(tt.got, time.Second)
			synctest.Wait()
			s.wantAsked(tt.asked...)
		})
	}
}

func TestRefreshKeepsWhatTheAnswerLacks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := fmt.Sprintf(`{"access_token":"access-0","refresh_token":"refresh-0","token_type":"Bearer","resource_url":"dashscope.aliyuncs.com/compatible-mode",
			"id_token":"id-0","scope":"openid","expiry_date":%d,"endpoint":{"of":"Qwen Code"}}`, time.Now().Add(-time.Hour).UnixMilli())
		s := newSourceTest(t, file, nil, func(*http.Request) (int, string) { return 200, `{"access_token":"access-1","expires_in":3600}` })
		s.start()
		tok, err := s.Token(t.Context())
		fatalIf(t, err)
		if got := tok.base.String(); got != "https://dashscope.aliyuncs.com/compatible-mode/v1" {
			t.Errorf("base %q, want the old one", got)
		}
		want := map[string]any{"access_token": "access-1", "refresh_token": "refresh-0", "token_type": "Bearer", "id_token": "id-0", "scope": "openid",
			"resource_url": "dashscope.aliyuncs.com/compatible-mode", "expiry_date": float64(time.Now().Add(time.Hour).UnixMilli()), "endpoint": map[string]any{"of": "Qwen Code"}}
		wantEqual(t, "credential file", want, s.read())
		time.Sleep(55 * time.Minute)
		synctest.Wait()
		s.wantAsked("refresh-0", "refresh-0")
	})
}

func TestSignIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var approved atomic.Bool
		s := newSourceTest(t, "", nil, func(r *http.Request) (int, string) {
			time.Sleep(2 * time.Second)
			switch {
			case !r.PostForm.Has("grant_type"):
				return 200, deviceAnswer(nil)
			case approved.Load():
				return 200, tokenAnswer(1, 3600)
			}
			return 400, pendingAnswer
		})
		s.want("401 not_signed_in", 0)
		s.start()
		begin := time.Now()
		var answers sync.WaitGroup
		for range 50 {
			answers.Go(func() {
				if _, got := s.getAuth(); got["status"] != signInPending || got["user_code"] != "WDJB-MJHT" {
					t.Errorf("/auth: %v", got)
				}
			})
		}
		s.want("401 not_signed_in", 0)
		answers.Wait()
		if took := time.Since(begin); took != 2*time.Second {
			t.Errorf("/auth answered after %v, want 2s", took)
		}
		s.want("401 not_signed_in", 0)
		if err := s.ready(); err == nil || err.code != "not_signed_in" {
			t.Errorf("ready: %v", err)
		}

		approved.Store(true)
		time.Sleep(7 * time.Second)
		synctest.Wait()
		s.want("access-1", 0)
		s.wantAuth("signed_in")
		s.wantAsked("device")
		if got := s.flow.signIn().status; got != signInComplete {
			t.Errorf("sign-in %q, want complete", got)
		}
		s.wantReady()
		want := map[string]any{"access_token": "access-1", "refresh_token": "refresh-1", "token_type": "Bearer", "resource_url": "portal.qwen.ai",
			"expiry_date": float64(time.Now().Add(time.Hour).UnixMilli())}
		wantEqual(t, "credential file", want, s.read())
		if info, err := os.Stat(s.store.path()); err != nil || info.Mode() != 0o600 {
			t.Errorf("credential file: %v, %v; want mode 0600", info.Mode(), err)
		}
		if n := strings.Count(s.prompt.String(), "https://"); n != 1 {
			t.Errorf("%d links at the prompt, want 1", n)
		}
	})
}

// TestSignInEnds has a sign-in end without success, and looks at who starts the next one.
func TestSignInEnds(t *testing.T) {
	for _, tt := range []struct {
		name, answer string
		after        time.Duration
		status       string
	}{
		{"expired", pendingAnswer, 15 * time.Minute, signInExpired},
		{"denied", `{"error":"access_denied"}`, 5 * time.Second, signInDenied},
		{"failed", `{"error":"invalid_grant"}`, 5 * time.Second, signInFailed},
	} {
		for _, by := range []string{"a request a minute later", "/auth at once"} {
			testInBubble(t, tt.name+", restarted by "+by, func(t *testing.T) {
				s := newSourceTest(t, "", nil, answering(deviceAnswer(nil), tt.answer, ""))
				s.start()
				time.Sleep(tt.after)
				synctest.Wait()
				if got := s.flow.signIn().status; got != tt.status {
					t.Fatalf("sign-in %q, want %q", got, tt.status)
				}
				s.wantLogged("sign-in ended without success", 1)
				if by == "/auth at once" {
					s.wantAuth(signInPending)
				} else {
					time.Sleep(time.Minute)
					s.want("401 not_signed_in", 0)
					synctest.Wait()
					s.wantAsked("device") // not yet: the next one is a breath later
					time.Sleep(time.Nanosecond)
					s.want("401 not_signed_in", 0)
				}
				synctest.Wait()
				s.wantAsked("device", "device")
				s.wantLogged("waiting for sign-in", 2)
			})
		}
	}
}

func TestSignInWithoutServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var up atomic.Bool
		s := newSourceTest(t, "", nil, func(r *http.Request) (int, string) {
			switch {
			case !up.Load():
				return 502, htmlAnswer
			case r.PostForm.Has("grant_type"):
				return 200, tokenAnswer(1, 3600)
			}
			return 200, deviceAnswer(nil)
		})
		s.start()
		time.Sleep(10 * time.Minute)
		status, answer := s.getAuth()
		if status != http.StatusServiceUnavailable || answer["error"] == nil {
			t.Errorf("/auth: %d %v, want 503 and an error", status, answer)
		}
		if n := len(s.asked()); n < 14 || n > 21 {
			t.Errorf("%d attempts in 10 minutes, want pauses up to a minute", n)
		}
		s.wantLogged("a sign-in is needed, but can't be started yet", 1)
		up.Store(true)
		time.Sleep(maxSignInPause + 5*time.Second)
		synctest.Wait()
		s.want("access-1", 0)
	})
}

func TestUnusableFileIsLeftUntilASignInIsComplete(t *testing.T) {
	for _, file := range []string{`{"access_token":"access-0","refre`, `{"name":"another program's"}`, "not JSON", `["a"]`} {
		testInBubble(t, file, func(t *testing.T) {
			s := newSourceTest(t, file, nil, answering(deviceAnswer(nil), tokenAnswer(1, 3600), ""))
			s.start()
			s.want("401 not_signed_in", 0)
			synctest.Wait()
			if b, err := os.ReadFile(s.store.path()); string(b) != file {
				t.Errorf("the file is now %q, %v", b, err)
			}
			s.wantLogged("the credential file can't be used", 1)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			s.want("access-1", 0)
			s.wantStored("access_token", "access-1")
		})
	}
}

// TestAFileThatVanishes: the token in memory stays in use, and the next refresh writes the file again.
func TestAFileThatVanishes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, fileOf(0, time.Hour), nil, answering("", "", tokenAnswer(1, 3600)))
		s.start()
		time.Sleep(time.Second)
		fatalIf(t, os.Remove(s.store.path()))
		time.Sleep(50 * time.Minute)
		s.want("access-0", 0)
		s.wantLogged("the credential file has vanished", 1)
		time.Sleep(10 * time.Minute)
		s.want("access-1", 0)
		s.wantStored("refresh_token", "refresh-1")
		s.wantAsked("refresh-0")
	})
}

func TestTokenIsUsedWhereItCannotBeStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		fatalIf(t, os.WriteFile(file, nil, 0o600))
		s := newSourceTest(t, "", map[string]string{"QWEN_DIR": file}, answering(deviceAnswer(nil), tokenAnswer(1, 3600), ""))
		s.start()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		s.want("access-1", 0)
		s.wantLogged("the credentials could not be stored and are lost when the proxy stops", 1)
	})
}

func TestShutdownEndsASignIn(t *testing.T) {
	for _, after := range []time.Duration{time.Second, 3 * time.Second, 8 * time.Second} { // starting, between polls, during one
		synctest.Test(t, func(t *testing.T) {
			s := newSourceTest(t, "", nil, func(r *http.Request) (int, string) {
				sleep(r.Context(), 2*time.Second)
				if r.PostForm.Has("grant_type") {
					return 400, pendingAnswer
				}
				return 200, deviceAnswer(nil)
			})
			stop := s.start()
			time.Sleep(after)
			begin := time.Now()
			stop()
			if took := time.Since(begin); took != 0 {
				t.Errorf("run returned after %v, want at once", took)
			}
			s.wantLogged("sign-in ended", 0)
			s.wantLogged("can't be reached", 0)
		})
	}
}

// TestANewKeyIsTried: what Qwen said of the old key does not count for the one that replaces it in the file.
func TestANewKeyIsTried(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	s := newKeySource(&config{apiKey: "sk-old", apiKeyFile: file}, slog.New(slog.DiscardHandler))
	if err := s.refused(); err.code != "invalid_api_key" || s.ready() != err {
		t.Errorf("refused: %v, ready: %v", err, s.ready())
	}
	writeFile(t, file, "sk-new\n")
	fatalIf(t, s.readFile())
	if err := s.ready(); err != nil {
		t.Errorf("not ready with a new key: %v", err)
	}
	if s.refused(); s.ready() == nil {
		t.Error("ready though Qwen refuses the new key too")
	}
}

// signedIn returns a source whose token is good for long.
func signedIn(t testing.TB) *oauthSource {
	s := &oauthSource{oauth: &oauthClient{}}
	s.state.Store(&authState{token: s.prepare(&token{access: "access-0", expiry: wallClock().Add(time.Hour)})})
	return s
}

func TestTokenDoesNotAllocate(t *testing.T) {
	s := signedIn(t)
	if n := testing.AllocsPerRun(1000, func() { s.Token(t.Context()) }); n != 0 {
		t.Errorf("%v allocations, want 0", n)
	}
}

func TestNewSignInOfAnAccountThatWasNotServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, fileOf(0, time.Hour), nil, answering(deviceAnswer(nil), tokenAnswer(1, 3600), ""))
		s.start()
		s.refused()
		time.Sleep(time.Minute)
		s.wantAuth(signInPending)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		s.want("access-1", 0)
		s.wantAuth("signed_in")
		s.wantAsked("device")
		s.wantReady()
	})
}

// TestSignInWinsOverARefreshUnderWay has a sign-in become complete at 5:04, while the refresh goes on from 5:00 to 5:20.
func TestSignInWinsOverARefreshUnderWay(t *testing.T) {
	for _, status := range []int{200, 400, 0} {
		testInBubble(t, fmt.Sprint("refresh ends with ", status), func(t *testing.T) {
			s := newSourceTest(t, fileOf(0, 10*time.Minute), nil, func(r *http.Request) (int, string) {
				switch r.PostForm.Get("grant_type") {
				case "refresh_token":
					time.Sleep(20 * time.Second)
					return status, map[int]string{200: tokenAnswer(7, 3600), 400: grantRefused}[status]
				case deviceGrant:
					return 200, tokenAnswer(1, 3600)
				}
				return 200, deviceAnswer(nil)
			})
			s.start()
			s.refused()
			time.Sleep(5*time.Minute - time.Second)
			s.wantAuth(signInPending)
			time.Sleep(time.Minute)
			synctest.Wait()
			s.want("access-1", 0)
			if st := s.state.Load(); st.final != nil || st.failed != nil {
				t.Errorf("what became of the old refresh token counts for the new sign-in: %v, %v", st.final, st.failed)
			}
			s.wantStored("access_token", "access-1")
		})
	}
}

// TestATokenOfAnotherProcessIsTriedBeforeARefresh: several processes whose account is not served must not refresh for
// one another for ever.
func TestATokenOfAnotherProcessIsTriedBeforeARefresh(t *testing.T) {
	cfg, err := loadConfig(lookup(map[string]string{"QWEN_DIR": credentials(t)}))
	fatalIf(t, err)
	s := newSource(cfg, slog.New(slog.DiscardHandler), io.Discard).(*oauthSource)
	s.refused()
	s.verdict.success = time.Now().Add(-2 * refusalTime)
	if s.ready() == nil {
		t.Fatal("ready though the account is not served")
	}
	old := s.state.Load().token
	content := strings.Replace(fileContent, "1753142400123", strconv.FormatInt(time.Now().Add(time.Hour).UnixMilli(), 10), 1)
	writeFile(t, s.store.path(), content)
	fatalIf(t, s.readFile())
	if tok, err := s.Token(t.Context()); err != nil || tok == old {
		t.Fatalf("the new token was not taken: %v", err)
	}
	if err := s.ready(); err != nil {
		t.Errorf("not ready, so that nobody will ever try the new token: %v", err)
	}
	if !s.refusedLately() {
		t.Error("the next 401 would start a refresh")
	}
}

// TestAClockThatJumps: what expires is judged by the wall clock as it is now, forwards and back, and a credential file
// whose time lies in the future is no reason to refresh late or over and over.
func TestAClockThatJumps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newTestOAuth(t, func(*http.Request) (int, string) { return 200, tokenAnswer(1, 3600) })
		fresh, err := c.refresh(t.Context(), "refresh-0")
		fatalIf(t, err)
		if fresh.expiry != fresh.expiry.Round(0) || fresh.obtained != fresh.obtained.Round(0) {
			t.Error("the token's times have a monotonic reading: a jump of the wall clock would go unnoticed")
		}
		now := wallClock()
		for _, tt := range []struct {
			name string
			at   time.Duration // where the clock stands, from now
			good bool
		}{{"as it was", 0, true}, {"an hour and more ahead", 2 * time.Hour, false}, {"a day back", -24 * time.Hour, true}} {
			if got := fresh.good(now.Add(tt.at)); got != tt.good {
				t.Errorf("%s: good %v, want %v", tt.name, got, tt.good)
			}
		}
		s := &oauthSource{buffer: 5 * time.Minute}
		for name, obtained := range map[string]time.Time{"written in the future": now.Add(48 * time.Hour), "written long ago": now.Add(-48 * time.Hour)} {
			old := s.prepare(&token{access: "a", obtained: obtained, expiry: now.Add(time.Hour)})
			if want := now.Add(55 * time.Minute); !old.refreshAt.Equal(want) {
				t.Errorf("%s: refreshed at %v, want %v", name, old.refreshAt, want)
			}
		}
	})
}

// unusableFiles put something in the credential file's place that can't be used.
var unusableFiles = map[string]func(path string) error{
	"unreadable but for root": func(path string) error { return os.WriteFile(path, []byte("not JSON"), 0) },
	"a socket": func(path string) error {
		ln, err := net.Listen("unix", path)
		if err == nil {
			ln.(*net.UnixListener).SetUnlinkOnClose(false)
			ln.Close()
		}
		return err
	},
	"a directory":        func(path string) error { return os.Mkdir(path, 0o700) },
	"a loop of symlinks": func(path string) error { return os.Symlink(path, path) },
	"broken":             func(path string) error { return os.WriteFile(path, []byte(`{"access_token":`), 0o600) },
	"another program's":  func(path string) error { return os.WriteFile(path, []byte(`{"name":"x"}`), 0o600) },
}

// TestAnUnusableFileIsLoggedOnce has the credential file be unusable for an hour, come back, and be unusable again.
func TestAnUnusableFileIsLoggedOnce(t *testing.T) {
	for name, put := range unusableFiles {
		for _, from := range []string{"from the start", "later"} {
			t.Run(name+" "+from, func(t *testing.T) {
				t.Parallel()
				dir, err := os.MkdirTemp("", "q") // the path of a socket must be short
				fatalIf(t, err)
				t.Cleanup(func() { os.RemoveAll(dir) })
				synctest.Test(t, func(t *testing.T) {
					path := filepath.Join(dir, credentialFile)
					good := fileOf(0, 48*time.Hour)
					first := good
					breakFile := func() {
						fatalIf(t, errors.Join(os.RemoveAll(path), put(path)))
					}
					if from == "from the start" {
						breakFile()
						first = ""
					}
					s := newSourceTest(t, first, map[string]string{"QWEN_DIR": dir}, answering(deviceAnswer(nil), pendingAnswer, ""))
					s.start()
					if from == "later" {
						synctest.Wait()
						breakFile()
					}
					time.Sleep(time.Hour + time.Second) // not at the moment of a look
					s.wantLogged("the credential file can't be used", 1)
					fatalIf(t, os.RemoveAll(path))
					s.write(good)
					time.Sleep(2 * maxNap)
					s.want("access-0", 0)
					breakFile()
					time.Sleep(time.Hour)
					s.wantLogged("the credential file can't be used", 2)
				})
			})
		}
	}
}

// TestReasonsForWaitingAreTrue: what a request is told while the token can't be renewed is the reason.
func TestReasonsForWaitingAreTrue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, fileOf(0, -time.Hour), nil, func(*http.Request) (int, string) { return 200, tokenAnswer(1, 3600) })
		lock := filepath.Join(s.cfg.qwenDir, lockFile)
		leaveLock(t, lock, 0)
		s.start()
		time.Sleep(time.Second)
		check := func(err error, want string) {
			t.Helper()
			e, ok := errors.AsType[*apiError](err)
			if !ok || e.status != http.StatusServiceUnavailable || !strings.Contains(e.message, want) || strings.Contains(e.message, "can't be reached") {
				t.Errorf("got %v, want a 503 that says %q", err, want)
			}
		}
		if err := s.ready(); err == nil {
			t.Error("ready without a token")
		} else {
			check(err, "is being renewed")
		}
		_, err := s.Token(t.Context())
		check(err, "holds "+lockFile)
		if took := time.Since(s.begin); took > 30*time.Second {
			t.Errorf("the answer took %v", took)
		}
		time.Sleep(time.Second)
		if got := outcomeOf(func() (*token, error) { return s.Token(t.Context()) }); got.Got != "access-1" || got.Took > 13*time.Second {
			t.Errorf("got %v, want a token once the lock counts as left behind", got)
		}
	})
}

// TestNoRefreshBesideAnUnusableFile: the successor could not be stored, so the refresh token is not spent. Once the file is
// back, it is.
func TestNoRefreshBesideAnUnusableFile(t *testing.T) {
	for name, put := range unusableFiles {
		testInBubble(t, name, func(t *testing.T) {
			old := fileOf(0, 10*time.Minute)
			s := newSourceTest(t, old, nil, func(r *http.Request) (int, string) {
				if r.PostForm.Get("refresh_token") != "refresh-0" {
					return 400, grantRefused
				}
				return 200, tokenAnswer(1, 3600)
			})
			s.start()
			time.Sleep(time.Minute + time.Second) // no change comes while the file is read
			fatalIf(t, errors.Join(os.Remove(s.store.path()), put(s.store.path())))
			time.Sleep(8 * time.Minute)
			s.want("access-0", 0)
			time.Sleep(20 * time.Minute)
			_, err := s.Token(t.Context())
			if e, ok := errors.AsType[*apiError](err); !ok || e.status != http.StatusServiceUnavailable || !strings.Contains(e.message, "Repair or delete "+credentialFile) {
				t.Errorf("got %v, want a 503 that says what to do", err)
			}
			s.wantAsked()
			fatalIf(t, os.RemoveAll(s.store.path()))
			s.write(old)
			time.Sleep(maxNap)
			synctest.Wait()
			s.want("access-1", 0)
			s.wantAsked("refresh-0")
			s.wantStored("refresh_token", "refresh-1")
		})
	}
}

// TestARefreshThatIsNoLongerDueDoesNothing: between the look at the clock and the refresh, another process may have signed out.
func TestARefreshThatIsNoLongerDueDoesNothing(t *testing.T) {
	s := newOAuthSource(nil, &credentialStore{dir: t.TempDir()}, emptyConfig(), slog.New(slog.DiscardHandler), io.Discard)
	s.refresh(t.Context(), t.Context()) // with a token that is nil
	if st := s.state.Load(); st.failed != nil {
		t.Errorf("the state is %+v", st)
	}
}

// TestShutdownDoesNotWaitForASignInToBeStored: a sign-in that is stored may wait for the lock of another process.
func TestShutdownDoesNotWaitForASignInToBeStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSourceTest(t, fileOf(0, -time.Hour), nil, func(*http.Request) (int, string) { return 200, tokenAnswer(1, 3600) })
		s.turn <- struct{}{}
		stop := s.start()
		time.Sleep(time.Second)
		stop()
		<-s.turn
		if took := time.Since(s.begin); took != time.Second {
			t.Errorf("run ended after %v, want 1s", took)
		}
		s.wantAsked()
	})
}
