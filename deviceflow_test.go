package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

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
		if err := os.Remove(lock); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		s.want("401 not_signed_in", 0)
		if diff := cmp.Diff(map[string]any{}, s.read()); diff != "" {
			t.Errorf("the file after a logout (-want +got):\n%s", diff)
		}
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
