package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// demoCommand serves with a standIn in Qwen's place, over real sockets and on the same code path.
func demoCommand(ctx context.Context, cfg *config, stdout, stderr io.Writer) int {
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
	return serveCommand(ctx, cfg, stdout, stderr)
}

const (
	demoApproval  = 2 * time.Second // when a sign-in approves itself. It is short, because requests get a 401 until then.
	standInIntro  = "This is qwen-go-proxy's stand-in for Qwen, not a model."
	standInBreaks = "error-midstream" // the model that breaks off: in a stream after two words, else before the answer
)

// A standIn is the demo's stand-in for Qwen: its OAuth server, the page where a sign-in is approved, and its API with chat
// and models. It is an http.Handler, safe for concurrent use. It takes its own base URL from each request's Host. Make one
// with newStandIn, and change its settings before the first request only.
type standIn struct {
	http.ServeMux
	approveAfter time.Duration // a sign-in approves itself after this
	wordDelay    time.Duration // pause between the words of a stream

	mu      sync.Mutex        // guards all below
	signIns map[string]string // by code: the error of a poll, "" once the sign-in is approved
	tokens  map[string]bool   // access tokens, and refresh tokens until they are redeemed
}

// The errors of a poll, RFC 8628 §3.5.
const (
	standInPending = "authorization_pending"
	standInDenied  = "access_denied"
)

// newStandIn returns a standIn with the settings of the demo command.
func newStandIn() *standIn {
	s := &standIn{
		approveAfter: demoApproval, wordDelay: 40 * time.Millisecond,
		signIns: map[string]string{}, tokens: map[string]bool{},
	}
	s.HandleFunc("POST /api/v1/oauth2/device/code", s.authorizeDevice)
	s.HandleFunc("POST /api/v1/oauth2/token", s.token)
	s.HandleFunc("/authorize", s.page)
	s.HandleFunc("POST /v1/chat/completions", s.chat)
	return s
}

// object is any JSON object.
type object = map[string]any

func standInError(w http.ResponseWriter, status int, code, message string) {
	writeJSON(w, status, object{"error": object{"message": message, "type": "stand_in_error", "param": nil, "code": code}})
}

// authorizeDevice answers a device authorization request, RFC 8628 §3.1. One code is the device's and the user's.
func (s *standIn) authorizeDevice(w http.ResponseWriter, r *http.Request) {
	code := rand.Text()[:4] + "-" + rand.Text()[:4]
	s.mu.Lock()
	s.signIns[code] = standInPending
	s.mu.Unlock()
	time.AfterFunc(s.approveAfter, func() { s.decide(code, "approve") })
	page := "http://" + r.Host + "/authorize"
	writeJSON(w, http.StatusOK, object{
		"device_code": code, "user_code": code, "expires_in": 900, "interval": 1,
		"verification_uri": page, "verification_uri_complete": page + "?user_code=" + code + "&client=qwen-code",
	})
}

// token answers a token request: a poll (RFC 8628 §3.4) or a refresh (RFC 6749 §6).
func (s *standIn) token(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	code := r.PostFormValue("device_code")
	refusal, known := s.signIns[code]
	if old := r.PostFormValue("refresh_token"); s.tokens[old] {
		delete(s.tokens, old)
	} else if !known {
		refusal = "invalid_grant"
	}
	if refusal != "" {
		writeJSON(w, http.StatusBadRequest, object{"error": refusal})
		return
	}
	delete(s.signIns, code)
	access, refresh := rand.Text(), rand.Text()
	s.tokens[access], s.tokens[refresh] = true, true
	writeJSON(w, http.StatusOK, object{
		"access_token": access, "refresh_token": refresh, "token_type": "Bearer", "expires_in": 3600, "resource_url": "http://" + r.Host,
	})
}

// decide approves or denies the sign-in of code if that is open, and returns its state.
func (s *standIn) decide(code, decision string) (state string, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.signIns[code] == standInPending {
		switch decision {
		case "approve":
			s.signIns[code] = ""
		case "deny":
			s.signIns[code] = standInDenied
		}
	}
	state, known = s.signIns[code]
	return state, known
}

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
{{if not .Known}}<p><strong>No sign-in with this code is open.</strong> Follow the link that qwen-go-proxy shows.</p>
{{else if not .State}}<p><strong>Approved.</strong> You may close this page.</p>
{{else if eq .State "access_denied"}}<p><strong>Denied.</strong> You may close this page.</p>
{{else}}<p>Is this the code that qwen-go-proxy shows?</p>
<form method="post" action="/authorize">
<input type="hidden" name="user_code" value="{{.UserCode}}">
<button name="decision" value="approve">Approve</button>
<button name="decision" value="deny">Deny</button>
</form>
<p>It approves itself after {{.ApproveAfter}}.</p>
{{end}}
</html>
`))

// page shows the sign-in of a user code. Its buttons decide the sign-in, once.
func (s *standIn) page(w http.ResponseWriter, r *http.Request) {
	code := r.FormValue("user_code")
	state, known := s.decide(code, r.PostFormValue("decision"))
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'")
	_ = standInTemplate.Execute(w, object{"UserCode": code, "Known": known, "State": state, "ApproveAfter": s.approveAfter}) // a client that has left needs no page
}

// A standInChat is a chat completion request: the members that the stand-in heeds.
type standInChat struct {
	Model    string `json:"model"`
	Stream   bool   `json:"stream"`
	Messages []struct {
		Role    string `json:"role"`
		Content any    `json:"content"` // a string, or an array of parts
	} `json:"messages"`
	StreamOptions struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
	Tools []struct {
		Function struct {
			Name       string `json:"name"`
			Parameters struct {
				Required []string `json:"required"`
			} `json:"parameters"`
		} `json:"function"`
	} `json:"tools"`
}

// chat answers a chat completion request, or fails as the model's name says.
func (s *standIn) chat(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	authorized := s.tokens[strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")]
	s.mu.Unlock()
	if !authorized {
		standInError(w, http.StatusUnauthorized, "invalid_api_key", "invalid access token or token expired")
		return
	}
	var c standInChat
	if err := json.NewDecoder(r.Body).Decode(&c); err != nil {
		standInError(w, http.StatusBadRequest, "invalid_json", fmt.Sprintf("The request body is not a chat completion request: %v.", err))
		return
	}
	digits, _ := strings.CutPrefix(c.Model, "error-")
	if status, _ := strconv.Atoi(digits); digits != c.Model && status >= 400 && status <= 599 {
		standInError(w, status, "provoked", fmt.Sprintf("The model %s fails with status %d.", c.Model, status))
		return
	}
	message, finish, usage := c.reply()
	breaks := c.Model == standInBreaks
	answer := object{"id": "chatcmpl-" + rand.Text(), "object": "chat.completion", "created": time.Now().Unix(), "model": c.Model}
	if !c.Stream {
		if breaks {
			panic(http.ErrAbortHandler)
		}
		answer["choices"] = []object{{"index": 0, "message": message, "finish_reason": finish}}
		answer["usage"] = usage
		writeJSON(w, http.StatusOK, answer)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream;charset=UTF-8")
	answer["object"] = "chat.completion.chunk"
	send := func(choices ...object) {
		answer["choices"] = append([]object{}, choices...) // never null
		b, _ := json.Marshal(answer)                       // strings and numbers alone always marshal
		fmt.Fprintf(w, "data: %s\n\n", b)
		_ = http.NewResponseController(w).Flush() // a client that has left ends r's context
	}
	deltas := []object{message}
	if text, ok := message["content"].(string); ok {
		deltas = []object{{"role": "assistant", "content": ""}}
		for word := range strings.SplitAfterSeq(text, " ") {
			deltas = append(deltas, object{"content": word})
		}
	}
	for i, delta := range deltas {
		if breaks && i == 3 {
			break
		}
		send(object{"index": 0, "delta": delta, "finish_reason": nil})
		time.Sleep(s.wordDelay)
	}
	if breaks {
		panic(http.ErrAbortHandler)
	}
	send(object{"index": 0, "delta": object{}, "finish_reason": finish})
	if c.StreamOptions.IncludeUsage {
		answer["usage"] = usage
		send()
	}
	fmt.Fprint(w, "data: [DONE]\n\n")
}

// reply returns the message that answers c, its finish_reason and usage, where words count for tokens. If the user spoke last
// and there are tools, it is a call of the first one, with what the user said as each required argument. Otherwise it is a text
// that repeats what the user said, or what the tool answered.
func (c *standInChat) reply() (message object, finish string, usage object) {
	role, said, last, prompt := "", "", "", 0
	for _, m := range c.Messages {
		role, last = m.Role, contentText(m.Content)
		prompt += len(strings.Fields(last))
		if role == "user" {
			said = last
		}
	}
	text := fmt.Sprintf(`%s You said: "%s"`, standInIntro, clip(said, 300))
	if role == "tool" {
		text = fmt.Sprintf(`%s The tool answered: "%s"`, standInIntro, clip(last, 300))
	}
	message, finish = object{"role": "assistant", "content": text}, "stop"
	if role == "user" && len(c.Tools) > 0 {
		tool := c.Tools[0].Function
		values := object{}
		for _, name := range tool.Parameters.Required {
			values[name] = said
		}
		arguments, _ := json.Marshal(values) // strings alone always marshal
		text, finish = string(arguments), "tool_calls"
		call := object{"index": 0, "id": "call_" + rand.Text(), "type": "function", "function": object{"name": tool.Name, "arguments": text}}
		message = object{"role": "assistant", "content": nil, "tool_calls": []object{call}}
	}
	completion := len(strings.Fields(text))
	return message, finish, object{"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
}

// contentText returns the text of a message's content: a string, or an array of parts.
func contentText(content any) string {
	text, _ := content.(string)
	parts, _ := content.([]any)
	for _, part := range parts {
		part, _ := part.(object)
		more, _ := part["text"].(string)
		text += more
	}
	return text
}
