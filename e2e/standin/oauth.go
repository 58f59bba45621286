package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"html/template"
	mathrand "math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const pollSlack = 100 * time.Millisecond // a poll may come this much too early

// An oauthSignIn is one device authorization, RFC 8628 §3.2.
type oauthSignIn struct {
	clientID, scope string
	userCode        string
	challenge       string // base64url of the verifier's SHA-256, RFC 7636 §4.2
	issued          time.Time
	polled          time.Time // zero before the first poll
	decision        string    // "approve" or "deny"; "" while nobody has decided
	redeemed        bool
}

// An oauthGrant is what a sign-in leads to: the right to access tokens, for one client.
type oauthGrant struct {
	clientID, scope string
	refreshToken    string // the one that is good: the grant's key, a dot, and a secret
}

// An oauthRefusal is an OAuth error response, RFC 6749 §5.2.
type oauthRefusal struct {
	status      int
	Code        string `json:"error"`
	Description string `json:"error_description"`
}

func refuse(code, description string) *oauthRefusal {
	return &oauthRefusal{http.StatusBadRequest, code, description}
}

// authorizeDevice answers a device authorization request, RFC 8628 §3.1, with PKCE (RFC 7636).
func (s *standIn) authorizeDevice(w http.ResponseWriter, r *http.Request) {
	_ = r.ParseForm() // a broken form lacks the values that are checked next
	signIn := &oauthSignIn{
		clientID:  r.PostForm.Get("client_id"),
		scope:     r.PostForm.Get("scope"),
		userCode:  newUserCode(),
		challenge: r.PostForm.Get("code_challenge"),
		issued:    time.Now(),
	}
	var refusal *oauthRefusal
	switch {
	case signIn.clientID == "":
		refusal = refuse("invalid_request", "client_id is missing; send application/x-www-form-urlencoded")
	case len(signIn.challenge) != base64.RawURLEncoding.EncodedLen(sha256.Size):
		refusal = refuse("invalid_request", "code_challenge must be the base64url of a SHA-256, without padding")
	case r.PostForm.Get("code_challenge_method") != "S256":
		refusal = refuse("invalid_request", "code_challenge_method must be S256")
	}
	if refusal != nil {
		writeJSON(w, refusal.status, refusal)
		return
	}

	deviceCode := rand.Text()
	s.mu.Lock()
	s.signIns[deviceCode] = signIn
	s.counted.deviceAuthorizations++
	s.mu.Unlock()

	page := "http://" + r.Host + "/authorize"
	writeJSON(w, http.StatusOK, struct {
		DeviceCode              string `json:"device_code"`
		UserCode                string `json:"user_code"`
		VerificationURI         string `json:"verification_uri"`
		VerificationURIComplete string `json:"verification_uri_complete"`
		ExpiresIn               int    `json:"expires_in"`
		Interval                int    `json:"interval,omitempty"`
	}{
		deviceCode, signIn.userCode, page, page + "?user_code=" + signIn.userCode + "&client=qwen-code",
		int(s.codeLife.Seconds()), int(s.interval.Seconds()),
	})
}

// newUserCode returns a code such as WDJB-MJHT: consonants alone make no words, RFC 8628 §6.1.
func newUserCode() string {
	const letters = "BCDFGHJKLMNPQRSTVWXZ"
	b := []byte("0000-0000")
	for i := range b {
		if b[i] != '-' {
			b[i] = letters[mathrand.IntN(len(letters))]
		}
	}
	return string(b)
}

// token answers a token request: a poll (RFC 8628 §3.4) or a refresh (RFC 6749 §6).
func (s *standIn) token(w http.ResponseWriter, r *http.Request) {
	_ = r.ParseForm() // as in authorizeDevice
	var grant *oauthGrant
	var refusal *oauthRefusal
	now := time.Now()

	s.mu.Lock()
	defer s.mu.Unlock()
	switch r.PostForm.Get("grant_type") {
	case "urn:ietf:params:oauth:grant-type:device_code":
		grant, refusal = s.poll(r.PostForm, now)
	case "refresh_token":
		grant, refusal = s.refresh(r.PostForm)
	default:
		refusal = refuse("unsupported_grant_type", "grant_type must be that of a device code, or refresh_token")
	}
	if refusal != nil {
		writeJSON(w, refusal.status, refusal)
		return
	}

	// A new refresh token replaces the old one; earlier access tokens stay good until they expire.
	key, _, _ := strings.Cut(grant.refreshToken, ".")
	grant.refreshToken = key + "." + rand.Text()
	accessToken := rand.Text()
	s.accessTokens[accessToken] = now.Add(s.tokenLife)
	writeJSON(w, http.StatusOK, struct {
		AccessToken  string `json:"access_token"`
		RefreshToken string `json:"refresh_token"`
		TokenType    string `json:"token_type"`
		ExpiresIn    int    `json:"expires_in"`
		ResourceURL  string `json:"resource_url"`
		Scope        string `json:"scope,omitempty"`
	}{accessToken, grant.refreshToken, "Bearer", int(s.tokenLife.Seconds()), "http://" + r.Host, grant.scope})
}

// poll redeems a device code, or says why it can't be yet, RFC 8628 §3.5. The caller holds s.mu.
func (s *standIn) poll(form url.Values, now time.Time) (*oauthGrant, *oauthRefusal) {
	s.counted.polls++
	signIn := s.signIns[form.Get("device_code")]
	if signIn == nil {
		return nil, &oauthRefusal{http.StatusUnauthorized, "invalid_grant", "the device code is unknown"}
	}
	tooEarly := now.Sub(signIn.polled) < s.interval-pollSlack
	signIn.polled = now
	challenge := sha256.Sum256([]byte(form.Get("code_verifier")))
	decision := s.decision(signIn, now)
	switch {
	case form.Get("client_id") != signIn.clientID:
		return nil, refuse("invalid_grant", "the device code was issued to another client")
	case base64.RawURLEncoding.EncodeToString(challenge[:]) != signIn.challenge:
		return nil, refuse("invalid_grant", "code_verifier does not match the code_challenge")
	case signIn.redeemed:
		return nil, refuse("invalid_grant", "the device code has been redeemed")
	case s.expired(signIn, now):
		return nil, refuse("expired_token", "the device code has expired")
	case decision == "deny":
		return nil, refuse("access_denied", "the sign-in was denied")
	case decision == "" && tooEarly:
		return nil, refuse("slow_down", "polled sooner than the interval")
	case decision == "":
		return nil, refuse("authorization_pending", "the sign-in is not approved yet")
	}
	signIn.redeemed = true
	s.counted.signIns++
	key := rand.Text()
	s.grants[key] = &oauthGrant{clientID: signIn.clientID, scope: signIn.scope, refreshToken: key + "."}
	return s.grants[key], nil
}

// refresh returns the grant of a refresh token that is good. The caller holds s.mu.
func (s *standIn) refresh(form url.Values) (*oauthGrant, *oauthRefusal) {
	token := form.Get("refresh_token")
	key, _, _ := strings.Cut(token, ".")
	grant := s.grants[key]
	switch {
	case grant == nil:
		s.counted.refreshesRefused++
		return nil, refuse("invalid_grant", "the refresh token is unknown")
	case grant.refreshToken != token:
		s.counted.refreshesRefused++
		s.counted.replays++
		return nil, refuse("invalid_grant", "the refresh token has been redeemed")
	case grant.clientID != form.Get("client_id"):
		s.counted.refreshesRefused++
		return nil, refuse("invalid_grant", "the refresh token was issued to another client")
	}
	s.counted.refreshes++
	return grant, nil
}

func (s *standIn) expired(signIn *oauthSignIn, now time.Time) bool {
	return now.Sub(signIn.issued) >= s.codeLife
}

// decision returns what became of a sign-in: "approve", "deny", or "" while it is open.
func (s *standIn) decision(signIn *oauthSignIn, now time.Time) string {
	if signIn.decision == "" && s.approveAfter > 0 && now.Sub(signIn.issued) >= s.approveAfter {
		return "approve"
	}
	return signIn.decision
}

// The sign-in page.

// A signInPage is what pageTemplate shows.
type signInPage struct {
	UserCode     string
	Decision     string // as in oauthSignIn
	Unknown      bool
	ApproveAfter time.Duration
}

var pageTemplate = template.Must(template.New("page").Parse(`<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sign-in: stand-in for Qwen</title>
<style>
:root { color-scheme: light dark }
body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 34rem; margin: 10vh auto; padding: 0 1rem }
button, input { font: inherit; padding: .4rem 1.2rem; margin-right: .5rem }
.code { font: 2.2rem ui-monospace, monospace; letter-spacing: .1em }
.note { border-left: .25rem solid; padding-left: 1rem; opacity: .8 }
</style>
<h1>Sign-in</h1>
<p class="note">This is qwen-go-proxy's stand-in for Qwen's sign-in page. No account is involved, and
nothing leaves this machine.</p>
{{if eq .Decision "approve"}}
<p class="code">{{.UserCode}}</p>
<p><strong>Approved.</strong> You may close this page.</p>
{{else if eq .Decision "deny"}}
<p class="code">{{.UserCode}}</p>
<p><strong>Denied.</strong> You may close this page.</p>
{{else if and .UserCode (not .Unknown)}}
<p>Is this the code that qwen-go-proxy shows?</p>
<p class="code">{{.UserCode}}</p>
<form method="post" action="/authorize">
<input type="hidden" name="user_code" value="{{.UserCode}}">
<button name="decision" value="approve">Approve</button>
<button name="decision" value="deny">Deny</button>
</form>
{{if .ApproveAfter}}<p>It approves itself after {{.ApproveAfter}}.</p>{{end}}
{{else}}
{{if .Unknown}}<p><strong>No sign-in has the code {{.UserCode}}.</strong> It may have expired.</p>{{end}}
<form action="/authorize">
<p><label for="user_code">The code that qwen-go-proxy shows:</label></p>
<p><input id="user_code" name="user_code" placeholder="ABCD-EFGH" autocomplete="off" required autofocus>
<button>Continue</button></p>
</form>
{{end}}
</html>
`))

// page shows the sign-in of a user code. Without a code it asks for one.
func (s *standIn) page(w http.ResponseWriter, r *http.Request) {
	s.showPage(w, r.FormValue("user_code"), "")
}

// decide takes the answer of the page. The first answer to a sign-in is final.
func (s *standIn) decide(w http.ResponseWriter, r *http.Request) {
	decision := r.PostFormValue("decision")
	if decision != "approve" && decision != "deny" {
		http.Error(w, "decision must be approve or deny", http.StatusBadRequest)
		return
	}
	s.showPage(w, r.PostFormValue("user_code"), decision)
}

// showPage decides the sign-in of userCode if there is a decision, and shows its state.
func (s *standIn) showPage(w http.ResponseWriter, userCode, decision string) {
	page := signInPage{UserCode: userCode, Unknown: userCode != "", ApproveAfter: s.approveAfter}
	now := time.Now()
	s.mu.Lock()
	for _, signIn := range s.signIns {
		if plainCode(signIn.userCode) != plainCode(userCode) || s.expired(signIn, now) {
			continue
		}
		if s.decision(signIn, now) == "" {
			signIn.decision = decision
		}
		page.UserCode, page.Unknown = signIn.userCode, false
		page.Decision = s.decision(signIn, now)
	}
	s.mu.Unlock()

	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy",
		"default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'")
	if page.Unknown {
		w.WriteHeader(http.StatusNotFound)
	}
	_ = pageTemplate.Execute(w, page) // nobody is told if the browser has left
}

// plainCode returns a user code without dash, space and small letters, for comparing what people type.
func plainCode(userCode string) string {
	return strings.ToUpper(strings.NewReplacer("-", "", " ", "").Replace(userCode))
}
