package main

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"strings"
	"time"
)

const (
	// maxSignInWait bounds how long /auth waits for the link and code of a sign-in that it started.
	maxSignInWait = 10 * time.Second
	// maxPageWait is the same for the page, which updates itself when they come.
	maxPageWait = 2 * time.Second
)

// An authAnswer is what /auth tells, as JSON and on its page.
type authAnswer struct {
	Status                  string    `json:"status"`           // "signed_in", "none", or a status of signIn
	Method                  string    `json:"method,omitempty"` // of the credentials: "oauth" or "api_key"
	Reason                  string    `json:"reason,omitempty"` // what is wrong, in the words of /health/ready
	Message                 string    `json:"message"`          // what to do next
	VerificationURI         string    `json:"verification_uri,omitempty"`
	VerificationURIComplete string    `json:"verification_uri_complete,omitempty"`
	UserCode                string    `json:"user_code,omitempty"`
	Expires                 time.Time `json:"expires_at,omitzero"` // the token or, while pending, the code
	BaseURL                 string    `json:"base_url,omitempty"`  // for clients, once signed in
	Host                    string    `json:"-"`                   // by which the client reaches the proxy
	NotServed               bool      `json:"-"`                   // another account may help
	Demo                    bool      `json:"-"`                   // a stand-in answers in Qwen's place
}

// authHandler returns the handler of GET /auth. It answers with the state of the sign-in, as a page or as JSON. If a sign-in is
// needed it starts one first, but not with ?watch and not for a HEAD.
func authHandler(tokens tokenSource) handler {
	return func(x *exchange, r *http.Request) error {
		x.Header().Add("Vary", "Accept")
		if site := r.Header.Get("Sec-Fetch-Site"); site == "cross-site" || site == "same-site" {
			return &apiError{status: http.StatusForbidden, typ: typeAuthentication, code: "cross_origin",
				message: "Pages of other sites may not open the sign-in. Type the address of the proxy's /auth into the browser."}
		}
		page := strings.Contains(strings.Join(r.Header.Values("Accept"), ","), "text/html")
		start := r.Method != http.MethodHead && !r.URL.Query().Has("watch")
		st := tokens.status()
		if start && st.needsSignIn() {
			wait := maxSignInWait
			if page {
				wait = maxPageWait
			}
			st.flow.startAndWait(r.Context(), wait)
			st = tokens.status()
		}
		a := newAuthAnswer(r, st)
		if page {
			a.writePage(x)
			return nil
		}
		if start && (a.Status == signInStarting || a.Status == signInFailed) {
			return &apiError{status: http.StatusServiceUnavailable, typ: typeNetwork, code: "sign_in_unavailable", retryAfter: 5 * time.Second,
				message: a.Message, err: st.flow.signIn().err}
		}
		writeJSON(x, http.StatusOK, a)
		return nil
	}
}

// newAuthAnswer returns what /auth tells the client of r about st.
func newAuthAnswer(r *http.Request, st sourceStatus) *authAnswer {
	a := &authAnswer{Host: r.Host}
	if st.problem != nil {
		a.Reason, a.NotServed = st.problem.message, st.problem == errNotServed
	}
	if !st.needsSignIn() {
		a.Status, a.Method, a.BaseURL = "signed_in", st.method, baseURLOf(r)
		switch {
		case st.problem != nil:
			a.Message = st.problem.message
		case st.flow == nil:
			a.Message = "The proxy uses an API key. No sign-in is needed."
		default:
			a.Message = "The proxy is signed in to Qwen."
		}
		if st.token != nil && !st.token.isKey() {
			a.Expires = st.token.expiry.UTC().Truncate(time.Second)
		}
		return a
	}

	in := st.flow.signIn()
	a.Status, a.Demo = in.status, st.flow.demo
	switch in.status {
	case signInPending:
		a.VerificationURI, a.VerificationURIComplete = in.auth.verificationURI, in.auth.verificationURIComplete
		a.UserCode, a.Expires = in.auth.userCode, in.auth.expires.UTC().Truncate(time.Second)
		a.Message = "Open verification_uri_complete in a browser and check that it shows user_code."
	case signInStarting:
		a.Message = "Qwen's sign-in server has not answered yet. The proxy keeps trying."
		if e, ok := errors.AsType[*oauthError](in.err); ok {
			a.Message = e.text + ". The proxy keeps trying."
		}
	case signInDenied:
		a.Message = "The sign-in was denied. Open /auth to start another."
	case signInExpired:
		a.Message = "Nobody approved the sign-in in time. Open /auth to start another."
	case signInFailed:
		a.Message = "Qwen refused the sign-in, and the proxy's log says why. Open /auth to start another."
	default:
		a.Status, a.Message = "none", "No sign-in is under way. Open /auth to start one."
	}
	return a
}

// baseURLOf returns the base URL for r's client, as far as it is known. X-Forwarded-Proto is believed: only its sender reads
// the answer.
func baseURLOf(r *http.Request) string {
	scheme := "http"
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
		scheme = "https"
	}
	return scheme + "://" + r.Host + "/v1"
}

// Why returns the first sentence of Reason. The rest says how to get to the page.
func (a *authAnswer) Why() string {
	why, _, more := strings.Cut(a.Reason, ". ")
	if more {
		why += "."
	}
	return why
}

// LinkParts returns the link in pieces. Its line may break between them.
func (a *authAnswer) LinkParts() []string {
	return strings.Split(strings.NewReplacer("?", " ?", "&", " &").Replace(a.VerificationURIComplete), " ")
}

// TimeLeft returns how long the code is still good, as minutes:seconds.
func (a *authAnswer) TimeLeft() string {
	left := max(0, int(time.Until(a.Expires).Seconds()))
	return fmt.Sprintf("%d:%02d", left/60, left%60)
}

// Live reports whether the state may change without anybody opening /auth.
func (a *authAnswer) Live() bool {
	return a.Status == signInStarting || a.Status == signInPending || a.Status == "signed_in" && a.Reason != ""
}

//go:embed auth.html
var authHTML string

var authTemplate = template.Must(template.New("auth").Parse(authHTML))

// authPolicy is the page's Content-Security-Policy: it has one style and one script, and connects to the proxy only.
var authPolicy = "default-src 'none'; style-src " + inlineSource("style") + "; script-src " + inlineSource("script") +
	"; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// inlineSource returns the hash-source (CSP Level 3 §2.3.1) of the only element of authHTML with that name. The element must
// hold no comments: html/template drops them.
func inlineSource(element string) string {
	_, text, _ := strings.Cut(authHTML, "<"+element+">")
	text, _, _ = strings.Cut(text, "</"+element+">")
	text = strings.ReplaceAll(text, "\r\n", "\n") // as browsers read it, should a checkout have such lines
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// writePage answers with a as a page.
func (a *authAnswer) writePage(w http.ResponseWriter) {
	var b bytes.Buffer
	if err := authTemplate.Execute(&b, a); err != nil {
		panic(err) // the handler of all requests answers it
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", authPolicy)
	w.Write(b.Bytes())
}
