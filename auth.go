package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	// maxSignInWait bounds how long /auth waits for the link and code of a sign-in that it started.
	maxSignInWait = 10 * time.Second
	// maxPageWait is the same for the page, which turns by itself when they come.
	maxPageWait = 2 * time.Second
)

// An authAnswer is what /auth tells, as JSON and on its page.
type authAnswer struct {
	Status                  string    `json:"status"`           // "signed_in", "none", or that of the sign-in
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

// auth handles GET /auth: it tells the state of the sign-in, as a page or as JSON, having started one where that
// is needed. With ?watch, and for a HEAD, it starts nothing.
func (s *tokenSource) auth(x *exchange, r *http.Request) error {
	x.Header().Add("Vary", "Accept")
	if site := r.Header.Get("Sec-Fetch-Site"); site == "cross-site" || site == "same-site" {
		return &apiError{status: http.StatusForbidden, typ: typeAuthentication, code: "cross_origin",
			message: "Another site's page led here, and such a page may not start a sign-in. Type the address of the proxy's /auth into the browser."}
	}
	page := prefersHTML(r)
	start := r.Method != http.MethodHead && !r.URL.Query().Has("watch")
	if start {
		wait := maxSignInWait
		if page {
			wait = maxPageWait
		}
		s.startNeeded(r.Context(), wait)
	}
	a := s.authAnswer(r)
	switch {
	case page:
		a.writePage(x)
	case start && (a.Status == signInStarting || a.Status == signInFailed):
		return &apiError{status: http.StatusServiceUnavailable, typ: typeNetwork, code: "sign_in_unavailable", retryAfter: 5 * time.Second,
			message: a.Message, err: s.flow.state().err}
	default:
		writeJSON(x, http.StatusOK, a)
	}
	return nil
}

// trouble returns what ready says of st or, where its token is still good but can't be renewed any more, that, and
// whether a sign-in mends it.
func (s *tokenSource) trouble(st *authState) (err *apiError, needsSignIn bool) {
	err = s.ready()
	if u := s.unserved.Load(); err == nil && u != nil && !s.keyed() && time.Since(u.since) >= unservedPause {
		err = notServed() // the server counts as ready again, and yet a sign-in is what helps
	}
	if err == nil && st.refused != nil {
		err = signInRefused(st.refused)
	}
	return err, err != nil && err.status == http.StatusUnauthorized && !s.keyed()
}

// startNeeded starts a sign-in where one is needed and none is under way, and waits until it has a link or has failed.
func (s *tokenSource) startNeeded(ctx context.Context, wait time.Duration) {
	if _, needsSignIn := s.trouble(s.state.Load()); !needsSignIn {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	s.flow.start()
	for in := s.flow.state(); in.status == signInStarting && in.err == nil; in = s.flow.state() {
		select {
		case <-in.changed:
		case <-ctx.Done():
			return
		}
	}
}

// authAnswer returns the state of the sign-in, for r's client.
func (s *tokenSource) authAnswer(r *http.Request) *authAnswer {
	a := &authAnswer{Host: r.Host, Demo: s.demo}
	st := s.state.Load()
	err, needsSignIn := s.trouble(st)
	if err != nil {
		a.Reason, a.NotServed = err.message, err.code == notServed().code
	}
	if !needsSignIn {
		a.Status, a.BaseURL = "signed_in", baseURLOf(r)
		a.Method, a.Message = "oauth", "The proxy is signed in to Qwen."
		switch {
		case s.keyed():
			a.Method, a.Message = "api_key", "The proxy uses an API key. No sign-in is needed."
		case st.token != nil:
			a.Expires = st.token.expiry.UTC().Truncate(time.Second)
		}
		if err != nil {
			a.Message = err.message
		}
		return a
	}

	in := s.flow.state()
	a.Status = in.status
	switch in.status {
	case signInPending:
		a.VerificationURI, a.VerificationURIComplete = in.auth.verificationURI, in.auth.verificationURIComplete
		a.UserCode, a.Expires = in.auth.userCode, in.auth.expires.UTC().Truncate(time.Second)
		a.Message = "Open verification_uri_complete in a browser and check that it shows user_code."
	case signInStarting:
		a.Message = "Qwen's sign-in server has not answered yet. The proxy keeps trying."
		if in.err != nil && unanswered(in.err) {
			a.Message = "Qwen's sign-in server can't be reached. Check the proxy's network. The proxy keeps trying." // the cause is in the log
		} else if in.err != nil {
			a.Message = s.oauth.trouble(in.err) + " The proxy keeps trying."
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

// baseURLOf returns the base URL that r's client is to use, as far as it can be told. X-Forwarded-Proto is taken at
// its word: nobody but who sent it reads the answer.
func baseURLOf(r *http.Request) string {
	scheme := "http"
	if r.TLS != nil || r.Header.Get("X-Forwarded-Proto") == "https" {
		scheme = "https"
	}
	return scheme + "://" + r.Host + "/v1"
}

// Why returns the first sentence of Reason: what follows it is how to get to the page.
func (a *authAnswer) Why() string {
	why, _, more := strings.Cut(a.Reason, ". ")
	if more {
		why += "."
	}
	return why
}

// LinkParts returns the link in the pieces between which its line may break.
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

// authPolicy is the page's Content-Security-Policy: it has one style and one script, and talks to the proxy alone.
var authPolicy = "default-src 'none'; style-src " + inlineSource("style") + "; script-src " + inlineSource("script") +
	"; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// inlineSource returns the hash-source (CSP Level 3 §2.3.1) of authHTML's one element with that name. That must hold
// no comments, which html/template drops.
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
		panic(err) // track answers for it
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Security-Policy", authPolicy)
	w.Write(b.Bytes())
}

// prefersHTML reports whether r's Accept ranks text/html above application/json, as browsers do.
func prefersHTML(r *http.Request) bool {
	accept := strings.Join(r.Header.Values("Accept"), ",")
	return acceptWeight(accept, "text", "html") > acceptWeight(accept, "application", "json")
}

// acceptWeight returns the weight, 0 to 1, that an Accept header gives to typ/subtype: "the most specific reference
// has precedence" (RFC 9110 §12.5.1).
func acceptWeight(accept, typ, subtype string) (weight float64) {
	specific := 0
	for item := range strings.SplitSeq(accept, ",") {
		mediaRange, params, err := mime.ParseMediaType(item)
		if err != nil {
			continue
		}
		rank := 0
		switch mediaRange {
		case typ + "/" + subtype:
			rank = 3
		case typ + "/*":
			rank = 2
		case "*/*":
			rank = 1
		}
		if rank > specific {
			specific, weight = rank, 1
			if q, err := strconv.ParseFloat(params["q"], 64); err == nil && q >= 0 && q <= 1 {
				weight = q
			}
		}
	}
	return weight
}
