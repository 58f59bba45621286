package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io"
	"iter"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A standIn stands in for Qwen: its OAuth server, the page where a sign-in is approved, and its API. It is an
// http.Handler, safe for concurrent use, and takes its own base URL from each request's Host, over plain HTTP. Make one
// with newStandIn, and change its settings before the first request only.
type standIn struct {
	approveAfter time.Duration // a sign-in approves itself after this; 0 means never: only the page decides
	tokenLife    time.Duration // of an access token
	codeLife     time.Duration // of a device code
	interval     time.Duration // between polls, announced in whole seconds; 0 announces none and allows any
	wordDelay    time.Duration // pause between the words of a stream
	maxBody      int64         // bytes of an API request's body
	key          string        // an API key that is good beside the access tokens; "" for none

	mu           sync.Mutex                // guards all below
	signIns      map[string]*standInSignIn // by device code
	grants       map[string]*standInGrant  // by refresh token, up to its dot
	accessTokens map[string]time.Time      // when each expires
	swept        time.Time                 // when what has expired was last dropped
	counted      standInCounts
}

// standInCounts says what a standIn has been asked for so far.
type standInCounts struct {
	deviceAuthorizations int // device codes issued
	polls                int // token requests with a device code, whatever the answer
	signIns              int // device codes redeemed for tokens
	refreshes            int // refresh tokens redeemed for new ones
	refreshesRefused     int // replays included
	replays              int // refresh tokens sent again after they had been redeemed
	chats                int // chat completions, responses and messages answered
	unauthorized         int // API requests refused with 401
}

// A standInSignIn is one device authorization, RFC 8628 §3.2.
type standInSignIn struct {
	clientID, scope string
	userCode        string
	challenge       string // base64url of the verifier's SHA-256, RFC 7636 §4.2
	issued          time.Time
	polled          time.Time // zero before the first poll
	decision        string    // "approve" or "deny"; "" while nobody has decided
	redeemed        bool
}

// A standInGrant is what a sign-in leads to: the right to access tokens, for one client.
type standInGrant struct {
	clientID, scope string
	refreshToken    string    // the one that is good: the grant's key, a dot, and a secret
	renewed         time.Time // when refreshToken was issued
}

const (
	standInIntro       = "This is qwen-go-proxy's stand-in for Qwen, not a model."
	standInThought     = "I repeat what the user said."
	standInRefreshLife = 90 * 24 * time.Hour    // of a refresh token that is never used
	standInPollSlack   = 100 * time.Millisecond // a poll may come this much too early
	standInMaxInputs   = 2048                   // texts in one embeddings request

	// standInPaced is how many words of a stream come one by one. The others come at once: coding agents send prompts of
	// thousands of words, and the stand-in repeats them.
	standInPaced = 100
)

// newStandIn returns a standIn with the default settings.
func newStandIn() *standIn {
	return &standIn{
		approveAfter: 5 * time.Second,
		tokenLife:    time.Hour,
		codeLife:     15 * time.Minute,
		interval:     2 * time.Second,
		wordDelay:    40 * time.Millisecond,
		maxBody:      64 << 20,
		signIns:      map[string]*standInSignIn{},
		grants:       map[string]*standInGrant{},
		accessTokens: map[string]time.Time{},
	}
}

// counts returns the counters as they stand.
func (s *standIn) counts() standInCounts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counted
}

func (s *standIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch route := r.Method + " " + r.URL.Path; {
	case route == "POST /api/v1/oauth2/device/code":
		s.authorizeDevice(w, r)
	case route == "POST /api/v1/oauth2/token":
		s.token(w, r)
	case route == "GET /authorize":
		s.page(w, r)
	case route == "POST /authorize":
		s.decide(w, r)
	case strings.HasPrefix(r.URL.Path, "/v1/"), strings.HasPrefix(r.URL.Path, "/compatible-mode/v1/"),
		strings.HasPrefix(r.URL.Path, "/apps/anthropic/v1/"):
		s.api(w, r)
	default:
		http.NotFound(w, r)
	}
}

// The OAuth server.

// A standInRefusal is an OAuth error response, RFC 6749 §5.2.
type standInRefusal struct {
	status      int
	Code        string `json:"error"`
	Description string `json:"error_description"`
}

func refuse(code, description string) *standInRefusal {
	return &standInRefusal{http.StatusBadRequest, code, description}
}

// authorizeDevice answers a device authorization request, RFC 8628 §3.1, with PKCE (RFC 7636).
func (s *standIn) authorizeDevice(w http.ResponseWriter, r *http.Request) {
	_ = r.ParseForm() // a form that can't be parsed lacks what is checked next
	signIn := &standInSignIn{
		clientID:  r.PostForm.Get("client_id"),
		scope:     r.PostForm.Get("scope"),
		userCode:  newUserCode(),
		challenge: r.PostForm.Get("code_challenge"),
		issued:    time.Now(),
	}
	var refusal *standInRefusal
	switch {
	case signIn.clientID == "":
		refusal = refuse("invalid_request", "client_id is missing; send application/x-www-form-urlencoded")
	case len(signIn.challenge) != base64.RawURLEncoding.EncodedLen(sha256.Size):
		refusal = refuse("invalid_request", "code_challenge must be the base64url of a SHA-256, without padding")
	case r.PostForm.Get("code_challenge_method") != "S256":
		refusal = refuse("invalid_request", "code_challenge_method must be S256")
	}
	if refusal != nil {
		writeStandIn(w, refusal.status, refusal)
		return
	}

	deviceCode := rand.Text()
	s.mu.Lock()
	s.sweep(signIn.issued)
	s.signIns[deviceCode] = signIn
	s.counted.deviceAuthorizations++
	s.mu.Unlock()

	page := "http://" + r.Host + "/authorize"
	writeStandIn(w, http.StatusOK, struct {
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
	var grant *standInGrant
	var refusal *standInRefusal
	now := time.Now()

	s.mu.Lock()
	defer s.mu.Unlock()
	s.sweep(now)
	switch r.PostForm.Get("grant_type") {
	case "urn:ietf:params:oauth:grant-type:device_code":
		grant, refusal = s.poll(r.PostForm, now)
	case "refresh_token":
		grant, refusal = s.refresh(r.PostForm)
	default:
		refusal = refuse("unsupported_grant_type", "grant_type must be that of a device code, or refresh_token")
	}
	if refusal != nil {
		writeStandIn(w, refusal.status, refusal)
		return
	}

	// A new refresh token replaces the old one; earlier access tokens stay good until they expire.
	key, _, _ := strings.Cut(grant.refreshToken, ".")
	grant.refreshToken = key + "." + rand.Text()
	grant.renewed = now
	accessToken := rand.Text()
	s.accessTokens[accessToken] = now.Add(s.tokenLife)
	writeStandIn(w, http.StatusOK, struct {
		AccessToken  string `json:"access_token"`
		RefreshToken string `json:"refresh_token"`
		TokenType    string `json:"token_type"`
		ExpiresIn    int    `json:"expires_in"`
		ResourceURL  string `json:"resource_url"`
		Scope        string `json:"scope,omitempty"`
	}{accessToken, grant.refreshToken, "Bearer", int(s.tokenLife.Seconds()), "http://" + r.Host, grant.scope})
}

// poll redeems a device code, or says why it can't be yet, RFC 8628 §3.5. The caller holds s.mu.
func (s *standIn) poll(form url.Values, now time.Time) (*standInGrant, *standInRefusal) {
	s.counted.polls++
	signIn := s.signIns[form.Get("device_code")]
	if signIn == nil {
		return nil, &standInRefusal{http.StatusUnauthorized, "invalid_grant", "the device code is unknown"}
	}
	tooEarly := now.Sub(signIn.polled) < s.interval-standInPollSlack
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
	s.grants[key] = &standInGrant{clientID: signIn.clientID, scope: signIn.scope, refreshToken: key + "."}
	return s.grants[key], nil
}

// refresh returns the grant of a refresh token that is good. The caller holds s.mu.
func (s *standIn) refresh(form url.Values) (*standInGrant, *standInRefusal) {
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

func (s *standIn) expired(signIn *standInSignIn, now time.Time) bool {
	return now.Sub(signIn.issued) >= s.codeLife
}

// decision returns what became of a sign-in: "approve", "deny", or "" while it is open.
func (s *standIn) decision(signIn *standInSignIn, now time.Time) string {
	if signIn.decision == "" && s.approveAfter > 0 && now.Sub(signIn.issued) >= s.approveAfter {
		return "approve"
	}
	return signIn.decision
}

// sweep drops what has expired, once a minute, so that memory stays bounded over months. A device code
// stays for a second life, in which it is known as expired. The caller holds s.mu.
func (s *standIn) sweep(now time.Time) {
	if now.Sub(s.swept) < time.Minute {
		return
	}
	s.swept = now
	maps.DeleteFunc(s.signIns, func(_ string, x *standInSignIn) bool { return now.Sub(x.issued) >= 2*s.codeLife })
	maps.DeleteFunc(s.grants, func(_ string, g *standInGrant) bool { return now.Sub(g.renewed) >= standInRefreshLife })
	maps.DeleteFunc(s.accessTokens, func(_ string, expires time.Time) bool { return !now.Before(expires) })
}

// The sign-in page.

// A standInPage is what standInTemplate shows.
type standInPage struct {
	UserCode     string
	Decision     string // as in standInSignIn
	Unknown      bool
	ApproveAfter time.Duration
}

var standInTemplate = template.Must(template.New("page").Parse(`<!doctype html>
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
{{if .ApproveAfter}}<p>Left alone, it approves itself {{.ApproveAfter}} after it began.</p>{{end}}
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

// page shows a sign-in to whoever has its user code, and asks for the code where there is none.
func (s *standIn) page(w http.ResponseWriter, r *http.Request) {
	s.showPage(w, r.FormValue("user_code"), "")
}

// decide takes the page's answer. A sign-in that is decided stays so: the page then shows what it is.
func (s *standIn) decide(w http.ResponseWriter, r *http.Request) {
	decision := r.PostFormValue("decision")
	if decision != "approve" && decision != "deny" {
		http.Error(w, "decision must be approve or deny", http.StatusBadRequest)
		return
	}
	s.showPage(w, r.PostFormValue("user_code"), decision)
}

// showPage decides the sign-in of userCode, unless decision is "", and shows what became of it.
func (s *standIn) showPage(w http.ResponseWriter, userCode, decision string) {
	page := standInPage{UserCode: userCode, Unknown: userCode != "", ApproveAfter: s.approveAfter}
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
	_ = standInTemplate.Execute(w, page) // a browser that has left is nobody to tell
}

// plainCode returns a user code as it is compared: typed by people, with or without dash and capitals.
func plainCode(userCode string) string {
	return strings.ToUpper(strings.NewReplacer("-", "", " ", "").Replace(userCode))
}

// The API.

// object is any JSON object.
type object = map[string]any

// api serves the API to whoever has an access token or the key: under /v1/, where a sign-in points, and under
// /compatible-mode/v1/, as with a key. Under /apps/anthropic/v1/ is its Anthropic-compatible interface.
func (s *standIn) api(w http.ResponseWriter, r *http.Request) {
	requestID := rand.Text()
	w.Header().Set("X-Request-Id", requestID)
	path := strings.TrimPrefix(r.URL.Path, "/compatible-mode")
	var failure *apiError
	switch route := r.Method + " " + path; {
	case !s.authorized(r):
		failure = &apiError{status: http.StatusUnauthorized, typ: "invalid_request_error", code: "invalid_api_key",
			message: "invalid access token or token expired"}
	case route == "POST /v1/chat/completions":
		failure = s.chat(w, r)
	case route == "POST /v1/responses":
		failure = s.responses(w, r)
	case route == "POST /v1/embeddings":
		failure = s.embeddings(w, r)
	case route == "GET /v1/models":
		s.models(w)
	case route == "POST /apps/anthropic/v1/messages":
		failure = s.messages(w, r)
	case route == "POST /apps/anthropic/v1/messages/count_tokens":
		failure = s.countTokens(w, r)
	default:
		failure = &apiError{status: http.StatusNotFound, typ: "invalid_request_error", code: "not_found",
			message: "The stand-in for Qwen has no " + r.Method + " " + r.URL.Path + "."}
	}
	if failure == nil {
		return
	}
	if failure.status == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", "1")
	}
	if strings.HasPrefix(path, "/apps/anthropic/") {
		writeStandIn(w, failure.status, failure.messagesBody(requestID))
	} else {
		writeStandIn(w, failure.status, failure.body(requestID))
	}
}

// authorized reports whether r carries the key, or an access token that has not expired.
func (s *standIn) authorized(r *http.Request) bool {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if s.key != "" && token == s.key {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Now().Before(s.accessTokens[token]) {
		return true
	}
	s.counted.unauthorized++
	return false
}

// Models of these names fail. All others are answered.
const (
	standInFails  = "error-"          // and a status from 400 to 599: with that
	standInBreaks = "error-midstream" // the connection is cut after two words of a stream, and before an answer that is none
)

// fault returns the failure that the name of a model asks for, nil where it asks for none.
func fault(model string) *apiError {
	digits, _ := strings.CutPrefix(model, standInFails)
	status, err := strconv.Atoi(digits)
	if err != nil || digits == model || status < 400 || status > 599 {
		return nil
	}
	return &apiError{status: status, typ: categoryOf(status), code: "provoked",
		message: fmt.Sprintf("The model %s fails with status %d.", model, status)}
}

// read decodes the JSON body of an API request into v.
func (s *standIn) read(w http.ResponseWriter, r *http.Request, v any) *apiError {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, s.maxBody))
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return &apiError{status: http.StatusRequestEntityTooLarge, typ: "invalid_request_error", code: "request_too_large",
			message: fmt.Sprintf("The request body is larger than %d bytes.", s.maxBody)}
	}
	if err == nil {
		err = json.Unmarshal(body, v)
	}
	if err != nil {
		return invalidRequest("", "invalid_json", "The request body is not what this endpoint takes: %v.", err)
	}
	return nil
}

// writeStandIn answers with v as JSON. Nothing is cached: RFC 6749 §5.1 wants so of tokens.
func writeStandIn(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // a client that has left is nobody to tell
}

// A standInChat is a chat completion request: the members that the stand-in heeds.
type standInChat struct {
	Model               string           `json:"model"`
	Messages            []standInMessage `json:"messages"`
	N                   int              `json:"n"`
	MaxTokens           int              `json:"max_tokens"`
	MaxCompletionTokens int              `json:"max_completion_tokens"`
	Stop                standInStrings   `json:"stop"`
	Stream              bool             `json:"stream"`
	StreamOptions       struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
	EnableThinking bool              `json:"enable_thinking"`
	Tools          []standInTool     `json:"tools"`
	ToolChoice     standInToolChoice `json:"tool_choice"`
	ResponseFormat struct {
		Type       string `json:"type"`
		JSONSchema struct {
			Schema any `json:"schema"`
		} `json:"json_schema"`
	} `json:"response_format"`
}

type standInMessage struct {
	Role    string         `json:"role"`
	Content standInContent `json:"content"`
}

// A standInContent is a message's content: a string, or an array of parts whose texts are joined. The types of the parts
// are those of all three interfaces.
type standInContent struct {
	text   string
	images int
	result bool // there is a tool's result in it
}

func (c *standInContent) UnmarshalJSON(b []byte) error {
	if json.Unmarshal(b, &c.text) == nil {
		return nil
	}
	var parts []struct {
		Type    string         `json:"type"`
		Text    string         `json:"text"`
		Content standInContent `json:"content"`
	}
	if json.Unmarshal(b, &parts) != nil {
		return errors.New("content must be a string or an array of parts")
	}
	var texts []string
	for _, part := range parts {
		switch part.Type {
		case "text", "input_text", "output_text":
			texts = append(texts, part.Text)
		case "image_url", "input_image", "image":
			c.images++
		case "tool_result":
			texts = append(texts, part.Content.text)
			c.result = true
		}
	}
	c.text = strings.Join(texts, " ")
	return nil
}

// standInStrings is a string, or an array of strings; null is none.
type standInStrings []string

func (s *standInStrings) UnmarshalJSON(b []byte) error {
	if bytes.HasPrefix(b, []byte(`"`)) {
		b = slices.Concat([]byte("["), b, []byte("]"))
	}
	return json.Unmarshal(b, (*[]string)(s))
}

// chat answers a chat completion request.
func (s *standIn) chat(w http.ResponseWriter, r *http.Request) *apiError {
	c := &standInChat{N: 1, MaxTokens: math.MaxInt, MaxCompletionTokens: math.MaxInt} // null keeps them too
	if failure := s.read(w, r, c); failure != nil {
		return failure
	}
	switch {
	case c.Model == "":
		return invalidRequest("model", "missing_required_parameter", "model is missing.")
	case len(c.Messages) == 0:
		return invalidRequest("messages", "missing_required_parameter", "messages must hold a message at least.")
	case c.N < 1 || c.N > 8:
		return invalidRequest("n", "invalid_value", "n must be between 1 and 8.")
	case c.MaxTokens < 1:
		return invalidRequest("max_tokens", "invalid_value", "max_tokens must be 1 at least.")
	case c.MaxCompletionTokens < 1:
		return invalidRequest("max_completion_tokens", "invalid_value", "max_completion_tokens must be 1 at least.")
	}
	answer, failure := s.answer(c)
	if failure != nil {
		return failure
	}
	if c.Stream {
		c.stream(s.newStream(w, r, c.Model), answer)
		return nil
	}
	choices := make([]object, c.N)
	for i := range choices {
		choices[i] = object{"index": i, "message": answer.message(), "finish_reason": answer.finish}
	}
	writeStandIn(w, http.StatusOK, object{
		"id": "chatcmpl-" + rand.Text(), "object": "chat.completion", "created": time.Now().Unix(), "model": c.Model,
		"choices": choices, "usage": c.usage(answer),
	})
	return nil
}

// answer returns the answer to c, or the failure that its model's name asks for.
func (s *standIn) answer(c *standInChat) (*standInAnswer, *apiError) {
	if failure := fault(c.Model); failure != nil {
		return nil, failure
	}
	answer, failure := c.answer()
	if failure != nil {
		return nil, failure
	}
	if c.Model == standInBreaks && !c.Stream {
		panic(http.ErrAbortHandler)
	}
	s.mu.Lock()
	s.counted.chats++
	s.mu.Unlock()
	return answer, nil
}

// A standInStream sends server-sent events, and the pieces of an answer at the pace of the stand-in.
type standInStream struct {
	ctx    context.Context
	w      http.ResponseWriter
	delay  time.Duration
	breaks bool // off in the middle
	sent   int  // pieces so far
}

// newStream begins the stream that answers r.
func (s *standIn) newStream(w http.ResponseWriter, r *http.Request, model string) *standInStream {
	w.Header().Set("Content-Type", "text/event-stream;charset=UTF-8")
	w.Header().Set("Cache-Control", "no-cache")
	return &standInStream{ctx: r.Context(), w: w, delay: s.wordDelay, breaks: model == standInBreaks}
}

// send sends one event; name is "" where the interface has none.
func (e *standInStream) send(name string, data object) {
	b, _ := json.Marshal(data) // strings and numbers alone always marshal
	if name != "" {
		fmt.Fprintf(e.w, "event: %s\n", name)
	}
	fmt.Fprintf(e.w, "data: %s\n\n", b)
	_ = http.NewResponseController(e.w).Flush() // a client that has left ends ctx
}

// pace returns pieces, each when it is its time, until the client has left.
func (e *standInStream) pace(pieces []string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, piece := range pieces {
			if e.sent == 2 && e.breaks {
				panic(http.ErrAbortHandler)
			}
			if e.sent > 0 && e.sent < standInPaced {
				select {
				case <-e.ctx.Done():
					return
				case <-time.After(e.delay):
				}
			}
			if e.sent++; !yield(piece) {
				return
			}
		}
	}
}

// stream sends answer as chunks of a chat completion.
func (c *standInChat) stream(events *standInStream, answer *standInAnswer) {
	id, created := "chatcmpl-"+rand.Text(), time.Now().Unix()
	send := func(choices []object, usage any) {
		chunk := object{"id": id, "object": "chat.completion.chunk", "created": created, "model": c.Model, "choices": choices}
		if c.StreamOptions.IncludeUsage {
			chunk["usage"] = usage
		}
		events.send("", chunk)
	}
	sendDelta := func(delta object, finish any) {
		for i := range c.N {
			send([]object{{"index": i, "delta": delta, "finish_reason": finish}}, nil)
		}
	}

	sendDelta(object{"role": "assistant", "content": ""}, nil)
	for piece := range events.pace(answer.thoughts) {
		sendDelta(object{"content": nil, "reasoning_content": piece}, nil)
	}
	if answer.tool != "" { // a call begins with its name, and its arguments follow
		sendDelta(object{"tool_calls": []object{{
			"index": 0, "id": answer.callID, "type": "function", "function": object{"name": answer.tool, "arguments": ""},
		}}}, nil)
	}
	for piece := range events.pace(answer.pieces) {
		if answer.tool == "" {
			sendDelta(object{"content": piece}, nil)
		} else {
			sendDelta(object{"tool_calls": []object{{"index": 0, "function": object{"arguments": piece}}}}, nil)
		}
	}
	sendDelta(object{}, answer.finish)
	if c.StreamOptions.IncludeUsage {
		send([]object{}, c.usage(answer))
	}
	fmt.Fprint(events.w, "data: [DONE]\n\n")
}

// A standInAnswer is what each choice of a chat completion holds: a text, or a call of a tool.
type standInAnswer struct {
	thoughts []string // word by word; none where thinking was not asked for
	pieces   []string // of the text, word by word, or of the call's arguments, in JSON
	tool     string   // the function's name; "" for a text
	callID   string
	finish   string // the finish_reason: stop, length or tool_calls
	stop     string // the stop sequence that ended the text; "" for none
}

// text returns the answer in one piece.
func (a *standInAnswer) text() string { return strings.Join(a.pieces, "") }

// tokens counts pieces for tokens.
func (a *standInAnswer) tokens() int { return len(a.thoughts) + len(a.pieces) }

// standInWord matches a word with the white space before it, and white space at the end, so that the
// matches joined are the text.
var standInWord = regexp.MustCompile(`\s*\S+|\s+$`)

// answer returns the answer to c: a tool call where c allows for one, else a text.
func (c *standInChat) answer() (*standInAnswer, *apiError) {
	tool, failure := c.tool()
	if failure != nil {
		return nil, failure
	}
	a := &standInAnswer{finish: "stop"}
	if c.EnableThinking {
		a.thoughts = standInWord.FindAllString(standInThought, -1)
	}
	if tool != nil {
		a.tool, a.callID, a.finish = tool.name, "call_"+rand.Text(), "tool_calls"
		a.pieces = toolArguments(tool.schema, c.said().text)
		return a, nil
	}

	text := c.text()
	for _, stop := range c.Stop {
		if before, _, found := strings.Cut(text, stop); found && stop != "" {
			text, a.stop = before, stop
		}
	}
	a.pieces = standInWord.FindAllString(text, -1)
	if limit := min(c.MaxTokens, c.MaxCompletionTokens); len(a.pieces) > limit {
		a.pieces, a.finish, a.stop = a.pieces[:limit], "length", ""
	}
	return a, nil
}

// text returns the answer in words, or in JSON where response_format wants it.
func (c *standInChat) text() string {
	said := c.said()
	text := fmt.Sprintf(`%s You said: "%s"`, standInIntro, said.text)
	if said.images > 0 {
		text += fmt.Sprintf(" Images sent along: %d.", said.images)
	}
	if last := c.Messages[len(c.Messages)-1]; last.Role == "tool" {
		text = fmt.Sprintf(`%s The tool answered: "%s"`, standInIntro, last.Content.text)
	}
	switch c.ResponseFormat.Type {
	case "json_schema":
		return marshalText(exampleObject(c.ResponseFormat.JSONSchema.Schema, said.text))
	case "json_object":
		return marshalText(object{"answer": text})
	default:
		return text
	}
}

// said returns the content of the last message from the user; it is empty where there is none.
func (c *standInChat) said() standInContent {
	for _, m := range slices.Backward(c.Messages) {
		if m.Role == "user" {
			return m.Content
		}
	}
	return standInContent{}
}

// usage counts words for tokens.
func (c *standInChat) usage(answer *standInAnswer) object {
	prompt, completion := c.promptTokens(), c.N*answer.tokens()
	usage := object{"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
	if thoughts := len(answer.thoughts); thoughts > 0 {
		usage["completion_tokens_details"] = object{"reasoning_tokens": c.N * thoughts}
	}
	return usage
}

// promptTokens counts the words of the messages.
func (c *standInChat) promptTokens() int {
	n := 0
	for _, m := range c.Messages {
		n += len(strings.Fields(m.Content.text))
	}
	return n
}

// message returns the answer as the message of a chat completion.
func (a *standInAnswer) message() object {
	m := object{"role": "assistant", "content": a.text()}
	if a.tool != "" {
		m["content"] = nil
		m["tool_calls"] = []object{{"id": a.callID, "type": "function", "function": object{"name": a.tool, "arguments": a.text()}}}
	}
	if len(a.thoughts) > 0 {
		m["reasoning_content"] = strings.Join(a.thoughts, "")
	}
	return m
}

// models answers with the stand-in's models. It serves any other name as well.
func (s *standIn) models(w http.ResponseWriter) {
	models := []object{}
	for _, id := range []string{"qwen3-coder-plus", "qwen3-coder-flash", "coder-model", "text-embedding-v4"} {
		models = append(models, object{"id": id, "object": "model", "created": 1753228800, "owned_by": "qwen"})
	}
	writeStandIn(w, http.StatusOK, object{"object": "list", "data": models})
}

// embeddings answers an embeddings request. Equal texts have equal vectors; nothing else is meant by them.
func (s *standIn) embeddings(w http.ResponseWriter, r *http.Request) *apiError {
	req := struct {
		Model          string         `json:"model"`
		Input          standInStrings `json:"input"`
		Dimensions     int            `json:"dimensions"`
		EncodingFormat string         `json:"encoding_format"`
	}{Dimensions: 64, EncodingFormat: "float"}
	if failure := s.read(w, r, &req); failure != nil {
		return failure
	}
	switch {
	case req.Model == "":
		return invalidRequest("model", "missing_required_parameter", "model is missing.")
	case len(req.Input) == 0 || len(req.Input) > standInMaxInputs || slices.Contains(req.Input, ""):
		return invalidRequest("input", "invalid_value",
			"input must be a string, or an array of 1 to %d strings, none of them empty.", standInMaxInputs)
	case req.Dimensions < 1 || req.Dimensions > 2048:
		return invalidRequest("dimensions", "invalid_value", "dimensions must be between 1 and 2048.")
	case req.EncodingFormat != "float" && req.EncodingFormat != "base64":
		return invalidRequest("encoding_format", "invalid_value", "encoding_format must be float or base64.")
	}
	if failure := fault(req.Model); failure != nil {
		return failure
	}
	data := make([]object, len(req.Input))
	tokens := 0
	for i, text := range req.Input {
		var embedding any = textVector(text, req.Dimensions)
		if req.EncodingFormat == "base64" {
			b, _ := binary.Append(nil, binary.LittleEndian, embedding) // float32s have a fixed size
			embedding = base64.StdEncoding.EncodeToString(b)
		}
		data[i] = object{"object": "embedding", "index": i, "embedding": embedding}
		tokens += len(strings.Fields(text))
	}
	writeStandIn(w, http.StatusOK, object{"object": "list", "model": req.Model, "data": data,
		"usage": object{"prompt_tokens": tokens, "total_tokens": tokens}})
	return nil
}

// textVector returns a vector of length 1 that text's hash determines.
func textVector(text string, dimensions int) []float32 {
	random := mathrand.New(mathrand.NewChaCha8(sha256.Sum256([]byte(text))))
	vector := make([]float32, dimensions)
	var square float64
	for i := range vector {
		x := random.NormFloat64()
		vector[i] = float32(x)
		square += x * x
	}
	for i := range vector {
		vector[i] /= float32(math.Sqrt(square))
	}
	return vector
}

// Tools, and JSON made after a schema.

// A standInTool is a function to call, as any of the three interfaces describes it.
type standInTool struct {
	name   string
	schema any // of the arguments, a JSON schema
}

func (t *standInTool) UnmarshalJSON(b []byte) error {
	type function struct {
		Name       string `json:"name"`
		Parameters any    `json:"parameters"`
	}
	var tool struct {
		function
		InputSchema any      `json:"input_schema"`
		Function    function `json:"function"`
	}
	if err := json.Unmarshal(b, &tool); err != nil {
		return err
	}
	*t = standInTool{cmp.Or(tool.Function.Name, tool.Name), cmp.Or(tool.Function.Parameters, tool.Parameters, tool.InputSchema)}
	return nil
}

// A standInToolChoice is "none", "auto" or "required", or an object that says so in its type or names a function.
type standInToolChoice struct {
	mode string
	name string
}

func (t *standInToolChoice) UnmarshalJSON(b []byte) error {
	if json.Unmarshal(b, &t.mode) == nil {
		return nil
	}
	var typed struct {
		Type string `json:"type"`
	}
	var named standInTool
	if json.Unmarshal(b, &typed) != nil || json.Unmarshal(b, &named) != nil {
		return errors.New("tool_choice must be a string or an object that names a function")
	}
	t.mode, t.name = typed.Type, named.name
	return nil
}

// tool returns the tool that the answer is to call: the one that tool_choice names, else the first. It
// is nil where the answer is to be a text, as after a tool's result.
func (c *standInChat) tool() (*standInTool, *apiError) {
	if c.ToolChoice.mode == "none" || c.Messages[len(c.Messages)-1].Role == "tool" {
		return nil, nil
	}
	for i, tool := range c.Tools {
		if name := tool.name; name != "" && (c.ToolChoice.name == "" || c.ToolChoice.name == name) {
			return &c.Tools[i], nil
		}
	}
	if c.ToolChoice.name != "" {
		return nil, invalidRequest("tool_choice", "invalid_value", "tool_choice names a function that is not in tools.")
	}
	return nil, nil
}

// toolArguments returns arguments that suit schema, as JSON in pieces.
func toolArguments(schema any, text string) []string {
	var pieces []string
	// By runes: half a character in a piece would not survive JSON.
	for piece := range slices.Chunk([]rune(marshalText(exampleObject(schema, text))), 8) {
		pieces = append(pieces, string(piece))
	}
	return pieces
}

// exampleObject returns an object after a JSON schema; it is empty where schema is not that of an object.
func exampleObject(schema any, text string) object {
	if o, ok := example(schema, text).(object); ok {
		return o
	}
	return object{}
}

// example returns a value after a JSON schema, as simple as it allows: of an object only the required
// properties, and text for strings. $ref is not followed.
func example(schema any, text string) any {
	s, _ := schema.(object) // nil reads as an empty schema, which allows any value
	if enum, _ := s["enum"].([]any); len(enum) > 0 {
		return enum[0]
	}
	if anyOf, _ := s["anyOf"].([]any); len(anyOf) > 0 {
		return example(anyOf[0], text)
	}
	typ := s["type"]
	if types, _ := typ.([]any); len(types) > 0 { // such as ["string", "null"]
		typ = types[0]
	}
	switch typ {
	case "object":
		properties, _ := s["properties"].(object)
		required, _ := s["required"].([]any)
		o := object{}
		for _, name := range required {
			if name, ok := name.(string); ok {
				o[name] = example(properties[name], text)
			}
		}
		return o
	case "array":
		return []any{}
	case "number", "integer":
		return 1
	case "boolean":
		return true
	case "null":
		return nil
	default:
		return text
	}
}

// marshalText returns v, which came from JSON, as JSON again.
func marshalText(v any) string {
	b, _ := json.Marshal(v) // what came from JSON always marshals
	return string(b)
}
