package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// demoCommand serves with a standIn in Qwen's place, over real sockets and on the same code path.
func demoCommand(ctx context.Context, cfg *config, _, stderr io.Writer) int {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintf(stderr, "qwen-go-proxy demo: %v\n", err)
		return 1
	}
	qwen := &http.Server{Handler: newStandIn(), ReadHeaderTimeout: 10 * time.Second}
	go qwen.Serve(ln)
	defer qwen.Close()
	cfg.demo = true
	cfg.qwenDir = ""
	cfg.oauthBase = &url.URL{Scheme: "http", Host: ln.Addr().String()}
	return serve(ctx, cfg, stderr, func(out io.Writer, base string, _ tokenSource) {
		fmt.Fprintf(out, "\n%s\n", demoBanner(cfg, base))
		if cfg.greet {
			fmt.Fprint(out, "Ctrl-C stops it.\n\n")
		}
	})
}

// demoBanner says what to try with a demo that this machine reaches by base.
func demoBanner(cfg *config, base string) string {
	curl, key := "curl", "any API key"
	if path, ok := strings.CutPrefix(base, "unix:"); ok {
		curl, base = "curl --unix-socket "+path, "http://localhost"
	}
	if cfg.tls {
		curl += " -k"
	}
	if len(cfg.proxyKeys) > 0 {
		curl += " -H 'Authorization: Bearer KEY'"
		key = "one of PROXY_API_KEYS in the place of KEY"
	}
	return fmt.Sprintf(`This is a demo: a stand-in inside the program answers in Qwen's place.
No account, no network, no model.

The sign-in below approves itself after %[4]v. Then try:

  %[1]s %[2]s/v1/chat/completions -d '{"messages":[{"role":"user","content":"Hello"}]}'
  %[1]s -N %[2]s/v1/chat/completions -d '{"stream":true,"messages":[{"role":"user","content":"Hello"}]}'

Base URL for OpenAI clients: %[2]s/v1 (%[3]s)
`, curl, base, key, demoApproval)
}

// A standIn is the demo's stand-in for Qwen: its OAuth server, the page where a sign-in is approved, and its API with chat
// and models. It is an http.Handler, safe for concurrent use. It takes its own base URL from each request's Host. Make one
// with newStandIn, and change its settings before the first request only.
type standIn struct {
	approveAfter time.Duration // a sign-in approves itself after this; 0 means never: only the page decides
	tokenLife    time.Duration // of an access token
	interval     time.Duration // between polls, in whole seconds
	wordDelay    time.Duration // pause between the words of a stream

	mu            sync.Mutex                // guards all below
	signIns       map[string]*standInSignIn // by device code
	refreshTokens map[string]bool           // false once redeemed
	accessTokens  map[string]time.Time      // when each expires
	counted       standInCounts
}

// standInCounts says what a standIn has been asked for so far.
type standInCounts struct {
	deviceAuthorizations int // device codes issued
	polls                int // token requests with a device code, whatever the answer
	signIns              int // device codes redeemed for tokens
	refreshes            int // refresh tokens redeemed for new ones
	refreshesRefused     int // replays included
	replays              int // refresh tokens sent again after they had been redeemed
	unauthorized         int // API requests refused with 401
}

// A standInSignIn is one device authorization, RFC 8628 §3.2.
type standInSignIn struct {
	userCode  string
	challenge string // base64url of the verifier's SHA-256, RFC 7636 §4.2
	issued    time.Time
	decision  string // "approve" or "deny"; "" while nobody has decided
}

const (
	demoApproval    = 2 * time.Second  // when a sign-in approves itself. It is short, because requests get a 401 until then.
	standInCodeLife = 15 * time.Minute // of a device code
	standInIntro    = "This is qwen-go-proxy's stand-in for Qwen, not a model."
	standInBreaks   = "error-midstream" // the model that breaks off: in a stream after two words, else before the answer

	// standInPaced is how many words of a stream come one by one. The others come at once: agents' prompts are long.
	standInPaced = 100
)

// newStandIn returns a standIn with the settings of the demo command.
func newStandIn() *standIn {
	return &standIn{
		approveAfter:  demoApproval,
		tokenLife:     time.Hour,
		interval:      time.Second,
		wordDelay:     40 * time.Millisecond,
		signIns:       map[string]*standInSignIn{},
		refreshTokens: map[string]bool{},
		accessTokens:  map[string]time.Time{},
	}
}

// counts returns the counters as they stand.
func (s *standIn) counts() standInCounts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counted
}

func (s *standIn) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/api/v1/oauth2/device/code":
		s.authorizeDevice(w, r)
	case "/api/v1/oauth2/token":
		s.token(w, r)
	case "/authorize":
		s.page(w, r)
	default:
		s.api(w, r)
	}
}

// object is any JSON object.
type object = map[string]any

// writeStandIn answers with v as JSON.
func writeStandIn(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // nobody is told if the client has left
}

// The OAuth server.

// authorizeDevice answers a device authorization request, RFC 8628 §3.1.
func (s *standIn) authorizeDevice(w http.ResponseWriter, r *http.Request) {
	deviceCode := rand.Text()
	signIn := &standInSignIn{userCode: newUserCode(), challenge: r.PostFormValue("code_challenge"), issued: time.Now()}
	s.mu.Lock()
	s.signIns[deviceCode] = signIn
	s.counted.deviceAuthorizations++
	s.mu.Unlock()
	page := "http://" + r.Host + "/authorize"
	writeStandIn(w, http.StatusOK, object{
		"device_code":               deviceCode,
		"user_code":                 signIn.userCode,
		"verification_uri":          page,
		"verification_uri_complete": page + "?user_code=" + signIn.userCode + "&client=qwen-code",
		"expires_in":                int(standInCodeLife.Seconds()),
		"interval":                  int(s.interval.Seconds()),
	})
}

// newUserCode returns a code such as WDJB-MJHT: consonants alone make no words, RFC 8628 §6.1.
func newUserCode() string {
	code := []byte(rand.Text()[:9])
	for i, letter := range code {
		code[i] = "BCDFGHJKLMNPQRSTVWXZ"[letter%20]
	}
	code[4] = '-'
	return string(code)
}

// token answers a token request: a poll (RFC 8628 §3.4) or a refresh (RFC 6749 §6).
func (s *standIn) token(w http.ResponseWriter, r *http.Request) {
	_ = r.ParseForm() // a form that can't be parsed lacks what is looked for
	s.mu.Lock()
	defer s.mu.Unlock()
	redeem := s.poll
	if r.PostForm.Get("grant_type") == "refresh_token" {
		redeem = s.refresh
	}
	if refusal := redeem(r.PostForm); refusal != "" {
		writeStandIn(w, http.StatusBadRequest, object{"error": refusal})
		return
	}
	accessToken, refreshToken := rand.Text(), rand.Text()
	s.accessTokens[accessToken] = time.Now().Add(s.tokenLife)
	s.refreshTokens[refreshToken] = true
	writeStandIn(w, http.StatusOK, object{
		"access_token":  accessToken,
		"refresh_token": refreshToken,
		"token_type":    "Bearer",
		"expires_in":    int(s.tokenLife.Seconds()),
		"resource_url":  "http://" + r.Host,
	})
}

// poll redeems a device code, or returns the error that says why not, RFC 8628 §3.5. The caller holds s.mu.
func (s *standIn) poll(form url.Values) (refusal string) {
	s.counted.polls++
	signIn := s.signIns[form.Get("device_code")]
	challenge := sha256.Sum256([]byte(form.Get("code_verifier")))
	switch {
	case signIn == nil, base64.RawURLEncoding.EncodeToString(challenge[:]) != signIn.challenge:
		return "invalid_grant"
	case time.Since(signIn.issued) >= standInCodeLife:
		return "expired_token"
	}
	switch s.decision(signIn) {
	case "":
		return "authorization_pending"
	case "deny":
		return "access_denied"
	}
	delete(s.signIns, form.Get("device_code"))
	s.counted.signIns++
	return ""
}

// refresh redeems a refresh token, or returns the error that says why not. The caller holds s.mu.
func (s *standIn) refresh(form url.Values) (refusal string) {
	token := form.Get("refresh_token")
	good, known := s.refreshTokens[token]
	if !good {
		s.counted.refreshesRefused++
		if known {
			s.counted.replays++
		}
		return "invalid_grant"
	}
	s.refreshTokens[token] = false
	s.counted.refreshes++
	return ""
}

// decision returns what became of a sign-in: "approve", "deny", or "" while it is open. The caller holds s.mu.
func (s *standIn) decision(signIn *standInSignIn) string {
	if signIn.decision == "" && s.approveAfter > 0 && time.Since(signIn.issued) >= s.approveAfter {
		return "approve"
	}
	return signIn.decision
}

// The sign-in page.

var standInTemplate = template.Must(template.New("page").Parse(`<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sign-in: stand-in for Qwen</title>
<style>
:root { color-scheme: light dark }
body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 34rem; margin: 10vh auto; padding: 0 1rem }
button { font: inherit; padding: .4rem 1.2rem; margin-right: .5rem }
.code { font: 2.2rem ui-monospace, monospace; letter-spacing: .1em }
</style>
<h1>Sign-in</h1>
<p>This is qwen-go-proxy's stand-in for Qwen's sign-in page. No account is involved, and nothing leaves this machine.</p>
<p class="code">{{.UserCode}}</p>
{{if eq .State "approve"}}<p><strong>Approved.</strong> You may close this page.</p>
{{else if eq .State "deny"}}<p><strong>Denied.</strong> You may close this page.</p>
{{else if eq .State "unknown"}}<p><strong>No sign-in with this code is open.</strong> Follow the link that qwen-go-proxy shows.</p>
{{else}}<p>Is this the code that qwen-go-proxy shows?</p>
<form method="post" action="/authorize">
<input type="hidden" name="user_code" value="{{.UserCode}}">
<button name="decision" value="approve">Approve</button>
<button name="decision" value="deny">Deny</button>
</form>
{{if .ApproveAfter}}<p>Left alone, it approves itself {{.ApproveAfter}} after it began.</p>{{end}}
{{end}}
</html>
`))

// page shows the sign-in of a user code. Its buttons decide the sign-in, once.
func (s *standIn) page(w http.ResponseWriter, r *http.Request) {
	userCode, decision, state := r.FormValue("user_code"), r.PostFormValue("decision"), "unknown"
	s.mu.Lock()
	for _, signIn := range s.signIns {
		if signIn.userCode != userCode {
			continue
		}
		if s.decision(signIn) == "" && (decision == "approve" || decision == "deny") {
			signIn.decision = decision
		}
		state = s.decision(signIn)
	}
	s.mu.Unlock()
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'")
	_ = standInTemplate.Execute(w, object{"UserCode": userCode, "State": state, "ApproveAfter": s.approveAfter}) // as in writeStandIn
}

// The API.

// api serves chat and models to whoever has an access token.
func (s *standIn) api(w http.ResponseWriter, r *http.Request) {
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	s.mu.Lock()
	authorized := time.Now().Before(s.accessTokens[token])
	if !authorized {
		s.counted.unauthorized++
	}
	s.mu.Unlock()

	var failure *apiError
	switch route := r.Method + " " + r.URL.Path; {
	case !authorized:
		failure = &apiError{status: http.StatusUnauthorized, typ: typeInvalidRequest, code: "invalid_api_key",
			message: "invalid access token or token expired"}
	case route == "POST /v1/chat/completions":
		failure = s.chat(w, r)
	case route == "GET /v1/models":
		writeStandIn(w, http.StatusOK, object{"object": "list", "data": []object{
			{"id": "qwen3-coder-plus", "object": "model", "created": 1753228800, "owned_by": "qwen"},
		}})
	default:
		failure = &apiError{status: http.StatusNotFound, typ: typeInvalidRequest, code: "not_found",
			message: "The demo has chat completions and models, not " + route + "."}
	}
	if failure != nil {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(failure.status)
		_, _ = w.Write(failure.body(rand.Text())) // as in writeStandIn
	}
}

// A standInChat is a chat completion request: the members that the stand-in heeds.
type standInChat struct {
	Model         string           `json:"model"`
	Messages      []standInMessage `json:"messages"`
	Stream        bool             `json:"stream"`
	StreamOptions struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
	Tools []struct {
		Function struct {
			Name       string `json:"name"`
			Parameters object `json:"parameters"`
		} `json:"function"`
	} `json:"tools"`
}

type standInMessage struct {
	Role    string `json:"role"`
	Content any    `json:"content"` // a string, or an array of parts
}

// text returns the text of the content.
func (m standInMessage) text() string {
	text, _ := m.Content.(string)
	parts, _ := m.Content.([]any)
	for _, part := range parts {
		part, _ := part.(object)
		more, _ := part["text"].(string)
		text += more
	}
	return text
}

// A standInAnswer is the answer to a chat completion request.
type standInAnswer struct {
	message object
	deltas  []object // the message as a stream has it
	finish  string   // the finish_reason
	usage   object
}

// chat answers a chat completion request, or fails as the model's name says.
func (s *standIn) chat(w http.ResponseWriter, r *http.Request) *apiError {
	c := &standInChat{}
	if err := json.NewDecoder(r.Body).Decode(c); err != nil {
		return invalidRequest("", "invalid_json", "The request body is not a chat completion request: %v.", err)
	}
	digits, _ := strings.CutPrefix(c.Model, "error-")
	if status, _ := strconv.Atoi(digits); digits != c.Model && status >= 400 && status <= 599 {
		return &apiError{status: status, typ: categoryOf(status), code: "provoked", message: fmt.Sprintf("The model %s fails with status %d.", c.Model, status)}
	}
	answer := c.answer()
	completion := object{"id": "chatcmpl-" + rand.Text(), "created": time.Now().Unix(), "model": c.Model}
	switch {
	case c.Stream:
		s.stream(w, r, c, completion, answer)
	case c.Model == standInBreaks:
		panic(http.ErrAbortHandler)
	default:
		completion["object"] = "chat.completion"
		completion["choices"] = []object{{"index": 0, "message": answer.message, "finish_reason": answer.finish}}
		completion["usage"] = answer.usage
		writeStandIn(w, http.StatusOK, completion)
	}
	return nil
}

// stream sends the deltas of an answer, until the client has left.
func (s *standIn) stream(w http.ResponseWriter, r *http.Request, c *standInChat, chunk object, answer *standInAnswer) {
	w.Header().Set("Content-Type", "text/event-stream;charset=UTF-8")
	chunk["object"] = "chat.completion.chunk"
	send := func(choices ...object) {
		chunk["choices"] = append([]object{}, choices...) // never null
		b, _ := json.Marshal(chunk)                       // strings and numbers alone always marshal
		fmt.Fprintf(w, "data: %s\n\n", b)
		_ = http.NewResponseController(w).Flush() // a client that has left ends r's context
	}
	for i, delta := range answer.deltas {
		if i > 1 && i <= standInPaced {
			select {
			case <-r.Context().Done():
				return
			case <-time.After(s.wordDelay):
			}
		}
		if c.Model == standInBreaks && i == 3 {
			break
		}
		send(object{"index": 0, "delta": delta, "finish_reason": nil})
	}
	if c.Model == standInBreaks {
		panic(http.ErrAbortHandler)
	}
	send(object{"index": 0, "delta": object{}, "finish_reason": answer.finish})
	if c.StreamOptions.IncludeUsage {
		chunk["usage"] = answer.usage
		send()
	}
	fmt.Fprint(w, "data: [DONE]\n\n")
}

// standInWord matches a word and the white space before it.
var standInWord = regexp.MustCompile(`\s*\S+|\s+$`)

// answer returns the answer to c: a call of the first tool if the user spoke last, else a text that repeats what the user
// said, or what the tool answered. Words count for tokens.
func (c *standInChat) answer() *standInAnswer {
	var last standInMessage
	said, prompt := "", 0
	for _, last = range c.Messages {
		prompt += len(strings.Fields(last.text()))
		if last.Role == "user" {
			said = last.text()
		}
	}
	text := fmt.Sprintf(`%s You said: "%s"`, standInIntro, said)
	if last.Role == "tool" {
		text = fmt.Sprintf(`%s The tool answered: "%s"`, standInIntro, last.text())
	}
	a := &standInAnswer{message: object{"role": "assistant", "content": text}, finish: "stop"}
	if last.Role == "user" && len(c.Tools) > 0 {
		tool := c.Tools[0].Function
		arguments, _ := json.Marshal(exampleObject(tool.Parameters, said)) // what came from JSON always marshals
		text, a.finish = string(arguments), "tool_calls"
		a.message = object{"role": "assistant", "content": nil, "tool_calls": []object{
			{"index": 0, "id": "call_" + rand.Text(), "type": "function", "function": object{"name": tool.Name, "arguments": text}},
		}}
		a.deltas = []object{a.message}
	} else {
		a.deltas = []object{{"role": "assistant", "content": ""}}
		for _, word := range standInWord.FindAllString(text, -1) {
			a.deltas = append(a.deltas, object{"content": word})
		}
	}
	completion := len(strings.Fields(text))
	a.usage = object{"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
	return a
}

// exampleObject returns an object after a JSON schema, with its required properties alone: text for strings.
func exampleObject(schema object, text string) object {
	simple := object{"array": []any{}, "number": 1, "integer": 1, "boolean": true} // by type
	example := object{}
	properties, _ := schema["properties"].(object)
	required, _ := schema["required"].([]any)
	for _, name := range required {
		name, _ := name.(string)
		property, _ := properties[name].(object) // nil reads as empty
		enum, _ := property["enum"].([]any)
		typ, _ := property["type"].(string)
		switch value, ok := simple[typ]; {
		case len(enum) > 0:
			example[name] = enum[0]
		case typ == "object":
			example[name] = exampleObject(property, text)
		case ok:
			example[name] = value
		default:
			example[name] = text
		}
	}
	return example
}
