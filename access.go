package main

import (
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"strings"
)

// An access says which clients may come in: those with one of the proxy's keys, or all where it has none.
type access struct {
	digests [][sha256.Size]byte
}

func newAccess(cfg *config) *access {
	a := &access{}
	for _, key := range cfg.proxyKeys {
		a.digests = append(a.digests, sha256.Sum256([]byte(key)))
	}
	return a
}

// required reports whether a client needs a key.
func (a *access) required() bool { return len(a.digests) > 0 }

// require lets requests with a valid key through to next.
func (a *access) require(next http.Handler) http.Handler {
	if !a.required() {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a.allows(clientKey(r)) {
			next.ServeHTTP(w, r)
			return
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="qwen-go-proxy", charset="UTF-8"`) // for browsers; RFC 7617
		writeError(w, r, &apiError{status: http.StatusUnauthorized, typ: typeAuthentication, code: "invalid_api_key",
			message: "The proxy needs one of its keys (PROXY_API_KEYS): send it as Authorization: Bearer, as x-api-key, or as the password of HTTP Basic."})
	})
}

// allows reports whether key is one of the proxy's. How long it takes says nothing about the keys.
func (a *access) allows(key string) bool {
	digest := sha256.Sum256([]byte(key))
	found := 0
	for i := range a.digests {
		found |= subtle.ConstantTimeCompare(digest[:], a.digests[i][:])
	}
	return found == 1
}

// clientKey returns the key that r carries, "" for none: the bearer token, x-api-key, or the password of HTTP Basic.
func clientKey(r *http.Request) string {
	if scheme, value, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(value)
	}
	if key := r.Header.Get("X-Api-Key"); key != "" {
		return key
	}
	_, password, _ := r.BasicAuth()
	return password
}
