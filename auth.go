package main

import (
	"context"
	"net/http"
	"time"
)

// maxSignInWait bounds how long /auth waits for the link and code of a sign-in that it started.
const maxSignInWait = 10 * time.Second

// auth handles GET /auth: it tells the state of the sign-in, having started one where that is needed.
func (s *tokenSource) auth(w http.ResponseWriter, r *http.Request) {
	if s.keyed() {
		writeJSON(w, http.StatusOK, map[string]any{"status": "signed_in", "method": "api_key",
			"message": "The proxy uses an API key. No sign-in is needed."})
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), maxSignInWait)
	defer cancel()
	st := s.state.Load()
	if err := s.ready(); err == nil || err.status != http.StatusUnauthorized {
		answer := map[string]any{"status": "signed_in", "method": "oauth", "message": "The proxy is signed in to Qwen."}
		if err != nil {
			answer["message"] = err.message
		}
		if st.token != nil {
			answer["expires_at"] = st.token.expiry.UTC().Truncate(time.Second)
		}
		writeJSON(w, http.StatusOK, answer)
		return
	}
	s.startSignIn()
	for st = s.state.Load(); st.signIn.status == signInStarting && st.signIn.err == nil; st = s.state.Load() {
		select {
		case <-st.changed:
			continue
		case <-ctx.Done():
		}
		break
	}
	in := st.signIn
	if in.auth == nil {
		writeError(w, r, &apiError{status: http.StatusServiceUnavailable, typ: typeNetwork, code: "sign_in_unavailable", retryAfter: 5 * time.Second,
			message: "Qwen's sign-in server can't be reached to start a sign-in. Try again; the proxy keeps trying.", err: in.err})
		return
	}
	writeJSON(w, http.StatusOK, map[string]any{
		"status":                    in.status,
		"verification_uri":          in.auth.verificationURI,
		"verification_uri_complete": in.auth.verificationURIComplete,
		"user_code":                 in.auth.userCode,
		"expires_at":                in.auth.expires.UTC().Truncate(time.Second),
		"message":                   "Open verification_uri_complete in a browser and check that it shows user_code.",
	})
}

// private lets only clients on this machine or in a private network through: whoever completes a sign-in decides
// whose account reads the prompts. A request that another proxy has forwarded comes from anywhere.
func private(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		addr := exchangeOf(r.Context()).client
		_, forwarded := r.Header["X-Forwarded-For"]
		if _, ok := r.Header["Forwarded"]; ok || forwarded || addr.IsValid() && !addr.IsLoopback() && !addr.IsPrivate() && !addr.IsLinkLocalUnicast() {
			writeError(w, r, &apiError{status: http.StatusForbidden, typ: typeAuthentication, code: "forbidden",
				message: "Without PROXY_API_KEYS the proxy shows its sign-in to loopback and private addresses alone. Set PROXY_API_KEYS, or open /auth from the proxy's own network."})
			return
		}
		next.ServeHTTP(w, r)
	})
}
