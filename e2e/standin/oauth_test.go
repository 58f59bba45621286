package main

import (
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestSignIn(t *testing.T) {
	s := newStandIn()
	c := newClient(t, s)
	device := c.authorize()
	code, deviceCode := device["user_code"].(string), device["device_code"]
	delete(device, "user_code")
	delete(device, "device_code")
	wantEqual(t, "device authorization", object{
		"verification_uri":          c.base + "/authorize",
		"verification_uri_complete": c.base + "/authorize?user_code=" + code + "&client=qwen-code",
		"expires_in":                900.0,
		"interval":                  2.0,
	}, device)

	device = object{"device_code": deviceCode, "user_code": code}
	status, answer := c.poll(device)
	wantEqual(t, "pending", []any{400, "authorization_pending"}, []any{status, answer["error"]})
	if status, page := c.decide(device, "approve"); status != 200 || !strings.Contains(page, "Approved.") {
		t.Errorf("approving: %d\n%s", status, page)
	}
	status, tokens := c.poll(device)
	if status != http.StatusOK || tokens["access_token"] == "" || tokens["refresh_token"] == "" {
		t.Fatalf("redeeming: %d %v", status, tokens)
	}
	delete(tokens, "access_token")
	delete(tokens, "refresh_token")
	wantEqual(t, "tokens", object{"token_type": "Bearer", "expires_in": 3600.0, "resource_url": c.base, "scope": "openid"}, tokens)
	status, answer = c.poll(device)
	wantEqual(t, "redeeming twice", []any{400, "invalid_grant"}, []any{status, answer["error"]})
	wantEqual(t, "counts", requestCounts{deviceAuthorizations: 1, polls: 3, signIns: 1}, s.counts(), cmp.AllowUnexported(requestCounts{}))
}

func TestPolling(t *testing.T) {
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
		{"only the page approves", func(s *standIn) { s.approveAfter = 0 },
			[]poll{{14 * time.Minute, "authorization_pending"}, {time.Minute, "expired_token"}}},
		{"a code expires unredeemed", func(s *standIn) { s.codeLife = 10 * time.Second },
			[]poll{{9 * time.Second, ""}, {9 * time.Second, "invalid_grant"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStandIn()
				test.setup(s)
				c := newBubbleClient(t, s)
				device := c.authorize()
				var want, got []string
				for _, poll := range test.polls {
					time.Sleep(poll.after)
					_, answer := c.poll(device)
					code, _ := answer["error"].(string)
					want, got = append(want, poll.want), append(got, code)
				}
				wantEqual(t, "answers", want, got)
			})
		})
	}
}

func TestRotatesRefreshTokens(t *testing.T) {
	s := newStandIn()
	c := newClient(t, s)
	first := c.signIn()
	status, second := c.refresh(first["refresh_token"])
	if status != http.StatusOK || second["refresh_token"] == first["refresh_token"] || second["access_token"] == first["access_token"] {
		t.Fatalf("refresh: %d %v", status, second)
	}
	status, answer := c.refresh(first["refresh_token"])
	wantEqual(t, "replay", []any{400, "invalid_grant"}, []any{status, answer["error"]})
	for _, tokens := range []object{first, second} {
		c.token = tokens["access_token"].(string)
		if resp, body := c.do("GET", "/v1/models", "", ""); resp.StatusCode != http.StatusOK {
			t.Errorf("an access token that has not expired: %d %s", resp.StatusCode, body)
		}
	}
	status, answer = c.form("/api/v1/oauth2/token", "grant_type", "refresh_token", "client_id", "another", "refresh_token", c.signIn()["refresh_token"].(string))
	wantEqual(t, "another client", []any{400, "invalid_grant"}, []any{status, answer["error"]})
	wantEqual(t, "counts", requestCounts{deviceAuthorizations: 2, polls: 2, signIns: 2, refreshes: 1, refreshesRefused: 2, replays: 1},
		s.counts(), cmp.AllowUnexported(requestCounts{}))
}

func TestTokensExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStandIn()
		c := newBubbleClient(t, s)
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
