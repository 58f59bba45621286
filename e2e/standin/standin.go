package main

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A standIn stands in for Qwen: its OAuth server, the page where a sign-in is approved, and its API. It is an
// http.Handler, safe for concurrent use. It takes its own base URL from each request's Host. Make one with newStandIn, and
// change its settings before the first request only.
type standIn struct {
	approveAfter time.Duration // a sign-in approves itself after this; 0 means never: only the page decides
	tokenLife    time.Duration // of an access token
	codeLife     time.Duration // of a device code
	interval     time.Duration // between polls, announced in whole seconds; 0 announces none and allows any
	wordDelay    time.Duration // pause between the words of a stream
	maxBody      int64         // bytes of an API request's body
	key          string        // an API key that is good beside the access tokens; "" if there is none

	mu           sync.Mutex              // guards all below
	signIns      map[string]*oauthSignIn // by device code
	grants       map[string]*oauthGrant  // by refresh token, up to its dot
	accessTokens map[string]time.Time    // when each expires
	counted      requestCounts
}

// requestCounts says what a standIn has been asked for so far.
type requestCounts struct {
	deviceAuthorizations int // device codes issued
	polls                int // token requests with a device code, whatever the answer
	signIns              int // device codes redeemed for tokens
	refreshes            int // refresh tokens redeemed for new ones
	refreshesRefused     int // replays included
	replays              int // refresh tokens sent again after they had been redeemed
	chats                int // chat completions, responses and messages answered
	unauthorized         int // API requests refused with 401
}

// newStandIn returns a standIn with the default settings.
func newStandIn() *standIn {
	return &standIn{
		approveAfter: 5 * time.Second,
		tokenLife:    time.Hour,
		codeLife:     15 * time.Minute,
		interval:     2 * time.Second,
		wordDelay:    40 * time.Millisecond,
		maxBody:      64 << 20,
		signIns:      map[string]*oauthSignIn{},
		grants:       map[string]*oauthGrant{},
		accessTokens: map[string]time.Time{},
	}
}

// counts returns the counters as they stand.
func (s *standIn) counts() requestCounts {
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
		writeJSON(w, failure.status, failure.messagesBody(requestID))
	} else {
		writeJSON(w, failure.status, failure.body(requestID))
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

// Models with these names fail. The stand-in answers for all others.
const (
	failPrefix    = "error-"          // and a status from 400 to 599: it fails with that status
	breakingModel = "error-midstream" // the connection is cut: in a stream after two words, else before the answer
)

// fault returns the failure that the name of a model asks for, or nil.
func fault(model string) *apiError {
	digits, _ := strings.CutPrefix(model, failPrefix)
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

// writeJSON answers with v as JSON. RFC 6749 §5.1 forbids caches to keep tokens.
func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // nobody is told if the client has left
}

// models answers with a list of models. Requests may name any other.
func (s *standIn) models(w http.ResponseWriter) {
	models := []object{}
	for _, id := range []string{"qwen3-coder-plus", "qwen3-coder-flash", "coder-model", "text-embedding-v4"} {
		models = append(models, object{"id": id, "object": "model", "created": 1753228800, "owned_by": "qwen"})
	}
	writeJSON(w, http.StatusOK, object{"object": "list", "data": models})
}
