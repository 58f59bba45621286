package main

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"unicode/utf8"
)

// A proxyKey is one of the keys that clients must send. Digests all have one length, so comparing them does not reveal a key's.
type proxyKey struct {
	digest [sha256.Size]byte // of the key
	name   string            // for the log and the metrics; several keys may have the same
}

// maxKeyName bounds the name of a key, in bytes. A longer one may be another key, and names are logged.
const maxKeyName = 32

// newProxyKey returns the proxyKey of a key. Without a name it is named after its digest. The error shows neither.
func newProxyKey(key, name string) (proxyKey, error) {
	k := proxyKey{sha256.Sum256([]byte(key)), name}
	if name == "" {
		k.name = fmt.Sprintf("key-%x", k.digest[:3])
	}
	if !validKey(key) || quoted(key) || !printable(name) || !utf8.ValidString(name) || len(name) > maxKeyName {
		return k, fmt.Errorf("want keys of printable characters without quotes, and names of at most %d bytes", maxKeyName)
	}
	return k, nil
}

// An access decides which requests may come in, by three things: the client's key, the web page that a browser sends it for, and
// the host name that it was sent to. It is safe for concurrent use.
type access struct {
	log      *slog.Logger
	keys     atomic.Pointer[[]proxyKey] // empty: no key is needed
	keysFile string                     // "" for none
	trusted  []netip.Prefix             // reverse proxies whose X-Forwarded-For is believed
	origins  []string                   // nil is the loopback origins; "*" alone is all
	hostname string                     // the machine's own name, in lower case
	csrf     *http.CrossOriginProtection
}

func newAccess(cfg *config, log *slog.Logger) *access {
	name, _ := os.Hostname() // "" matches no Host
	a := &access{
		log: log, keysFile: cfg.proxyKeysFile, trusted: cfg.trustedProxies, origins: cfg.corsOrigins,
		hostname: strings.ToLower(name), csrf: http.NewCrossOriginProtection(),
	}
	a.setKeys(cfg.proxyKeys)
	return a
}

// setKeys puts keys into use. It reports whether they differ from the last ones.
func (a *access) setKeys(keys []proxyKey) bool {
	old := a.keys.Swap(&keys)
	return old == nil || !slices.Equal(*old, keys)
}

// required reports whether a client needs a key.
func (a *access) required() bool { return len(*a.keys.Load()) > 0 }

// files returns PROXY_API_KEYS_FILE if it is set.
func (a *access) files() []*watchedFile {
	if a.keysFile == "" {
		return nil
	}
	return []*watchedFile{{name: "PROXY_API_KEYS_FILE", fallback: "the last keys stay in use", read: func() error {
		keys, err := readProxyKeys(a.keysFile)
		if err == nil && a.setKeys(keys) {
			a.log.Info("the proxy's keys have changed", "keys", len(keys))
		}
		return err
	}}}
}

// A client is what the proxy knows of the client of one request.
type client struct {
	addr     netip.Addr // not valid if it is unknown: a Unix socket has no addresses
	trusted  bool       // the request came from one of TRUSTED_PROXIES, or through a Unix socket
	told     bool       // addr is from the X-Forwarded-For of such a peer
	admitted bool       // it has one of the proxy's keys, or needs none
	key      string     // the name of its key; "" if it needs none
	rate     rateKey    // its bucket in the rate limiter: by key if the client has a valid one, otherwise by address
}

// client returns what is known of the client of r.
func (a *access) client(r *http.Request) client {
	var c client
	c.addr, _ = parseAddr(r.RemoteAddr)
	c.trusted = a.isTrusted(c.addr) || !c.addr.IsValid() && onUnixSocket(r)
	if c.trusted {
		c.addr, c.told = a.forwardedFor(c.addr, r.Header["X-Forwarded-For"])
	}
	c.rate, c.admitted = addressKey(c.addr), !a.required()
	if !c.admitted {
		if key, ok := a.key(r); ok {
			c.rate, c.admitted, c.key = digestKey(key.digest[:]), true, key.name
		}
	}
	return c
}

// parseAddr returns the IP address in s, which may have a port. A zone is dropped: net/netip has no prefixes with one.
func parseAddr(s string) (netip.Addr, bool) {
	ap, err := netip.ParseAddrPort(s) // first, because each request's RemoteAddr has a port
	addr := ap.Addr()
	if err != nil {
		if addr, err = netip.ParseAddr(s); err != nil {
			return addr, false
		}
	}
	return addr.Unmap().WithZone(""), true
}

// forwardingHeaders are headers by which reverse proxies say that they forward a request.
var forwardingHeaders = []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-Ip", "Via"}

// isLocal reports whether c, the client of r, is known to be on this machine or in a private network.
func (a *access) isLocal(r *http.Request, c client) bool {
	has := func(name string) bool { _, ok := r.Header[name]; return ok }
	near := c.addr.IsLoopback() || c.addr.IsPrivate() || c.addr.IsLinkLocalUnicast()
	switch {
	case has("Forwarded"):
		return false // A reverse proxy that sends this header may pass on an X-Forwarded-For of the client's own.
	case c.told:
		return near
	case slices.ContainsFunc(forwardingHeaders, has):
		return false
	}
	// The client of a reverse proxy that sends no such header shows itself by the public name that it uses.
	onSocket := c.trusted && !c.addr.IsValid()
	return (near || onSocket) && a.isLocalName(r.Host)
}

// onUnixSocket reports whether r came through a Unix socket.
func onUnixSocket(r *http.Request) bool {
	addr, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	return ok && addr.Network() == "unix"
}

// check reports why a request from c may not go on, whatever it asks for: its Host is a name that a foreign page can have
// pointed here, or a foreign page sent it.
func (a *access) check(r *http.Request, c client) error {
	if !a.required() && !c.trusted && !a.isLocalName(r.Host) {
		return errHostNotAllowed
	}
	if !a.allowsOrigin(r.Header.Get("Origin")) && (isPreflight(r) || a.csrf.Check(r) != nil) {
		return errOriginNotAllowed
	}
	return nil
}

// Why a request does not go on.
var (
	errHostNotAllowed = &apiError{status: http.StatusForbidden, typ: typeAuthentication, code: "host_not_allowed",
		message: "Without PROXY_API_KEYS the proxy serves only IP addresses and local host names. Set PROXY_API_KEYS, use the proxy's IP address, or add the reverse proxy in front to TRUSTED_PROXIES."}
	errOriginNotAllowed = &apiError{status: http.StatusForbidden, typ: typeAuthentication, code: "origin_not_allowed",
		message: "Web pages of this origin may not use the proxy. To allow them, add the origin to CORS_ALLOWED_ORIGINS on the proxy."}
	errNoKey = &apiError{status: http.StatusUnauthorized, typ: typeAuthentication, code: "invalid_api_key",
		message: "The request has none of the proxy's keys (PROXY_API_KEYS). Send one as Authorization: Bearer, as x-api-key, or as the password of HTTP Basic.",
		header:  http.Header{"Www-Authenticate": {`Basic realm="qwen-go-proxy", charset="UTF-8"`}}} // for browsers; RFC 7617
	errNotLocal = &apiError{status: http.StatusForbidden, typ: typeAuthentication, code: "forbidden",
		message: "Without PROXY_API_KEYS the proxy shows its sign-in only to loopback and private addresses. Set PROXY_API_KEYS, or open /auth from the proxy's own network."}
)

// allowOrigin sets the CORS headers in h, by which a browser lets the page that sent r read the answer.
func (a *access) allowOrigin(h http.Header, r *http.Request) {
	h["Vary"] = valueOrigin
	if origin := r.Header.Get("Origin"); a.allowsOrigin(origin) {
		h["Access-Control-Allow-Origin"] = []string{origin}
		h["Access-Control-Expose-Headers"] = valueExposed
	}
}

var (
	valueOrigin  = []string{"Origin"}
	valueExposed = []string{"X-Request-ID, Request-ID, X-Upstream-Request-ID, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset, Retry-After"}
)

// isPreflight reports whether r is a CORS preflight (WHATWG Fetch, "CORS-preflight request").
func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Origin") != "" && r.Header.Get("Access-Control-Request-Method") != ""
}

// preflight answers a CORS preflight of an allowed origin.
func preflight(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h["Vary"] = []string{"Origin, Access-Control-Request-Method, Access-Control-Request-Headers"}
	h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST")
	if want := r.Header.Get("Access-Control-Request-Headers"); want != "" {
		h.Set("Access-Control-Allow-Headers", want) // of what a client sends, the proxy passes on what it knows
	}
	h.Set("Access-Control-Max-Age", "7200")
	w.WriteHeader(http.StatusNoContent)
}

// allowsOrigin reports whether pages of origin may use the proxy. It is false for "".
func (a *access) allowsOrigin(origin string) bool {
	switch {
	case origin == "":
		return false
	case a.origins == nil:
		u, err := url.Parse(origin)
		return err == nil && (u.Scheme == "http" || u.Scheme == "https") && isLoopback(strings.ToLower(u.Hostname()))
	case a.origins[0] == "*":
		return true
	}
	return slices.Contains(a.origins, strings.ToLower(origin))
}

// isLocalName reports whether host is one that public DNS can't point here: an IP address, localhost, a name without a dot or
// of a domain for local use, or the machine's own name. Against DNS rebinding: a foreign page that has pointed a name of its
// own here uses that name as the Host.
func (a *access) isLocalName(host string) bool {
	name := strings.ToLower(strings.TrimSuffix((&url.URL{Host: host}).Hostname(), "."))
	if _, err := netip.ParseAddr(name); err == nil {
		return true
	}
	return hostname(name) && (!strings.Contains(name, ".") || name == a.hostname ||
		strings.HasSuffix(name, ".localhost") || strings.HasSuffix(name, ".local") || strings.HasSuffix(name, ".internal"))
}

// isTrusted reports whether addr is a reverse proxy of ours.
func (a *access) isTrusted(addr netip.Addr) bool {
	return addr.IsValid() && slices.ContainsFunc(a.trusted, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// forwardedFor returns the client's address by the X-Forwarded-For lines of a trusted peer, and whether they tell it. If not, it
// returns the address of the last proxy that is known. Each proxy puts the address that called it at the end. So the lines are
// read from the right, and the first address that is not a trusted proxy's is the client's. Anybody may have written what
// stands left of it, or of anything that is not an address.
func (a *access) forwardedFor(peer netip.Addr, lines []string) (addr netip.Addr, told bool) {
	if len(lines) == 0 {
		return peer, false
	}
	addr = peer
	for _, item := range slices.Backward(strings.Split(strings.Join(lines, ","), ",")) {
		next, ok := parseAddr(strings.TrimSpace(item))
		if !ok {
			return addr, false
		}
		if addr = next; !a.isTrusted(addr) {
			break
		}
	}
	return addr, true
}

// key returns the proxy's key that r carries, and whether there is one. The time it takes says nothing about the keys.
func (a *access) key(r *http.Request) (proxyKey, bool) {
	digest := sha256.Sum256([]byte(clientKey(r)))
	keys, found := *a.keys.Load(), -1
	for i := range keys {
		found = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(digest[:], keys[i].digest[:]), i, found)
	}
	if found < 0 {
		return proxyKey{}, false
	}
	return keys[found], true
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

// readProxyKeys returns the keys in file: one a line, with an optional name of one word. # begins a comment, at the start of a
// line or after white space.
func readProxyKeys(file string) ([]proxyKey, error) {
	b, _, err := readRegular(file, math.MaxInt64)
	if err != nil {
		return nil, err
	}
	var keys []proxyKey
	for i, line := range strings.Split(string(b), "\n") {
		fields := strings.Fields(line) // the key, its name, a comment
		if i := slices.IndexFunc(fields, func(s string) bool { return s[0] == '#' }); i >= 0 {
			fields = fields[:i]
		}
		switch {
		case len(fields) > 2:
			return nil, fmt.Errorf("line %d: want a key, a name of one word, and a comment after #", i+1)
		case len(fields) > 0:
			key, err := newProxyKey(fields[0], strings.Join(fields[1:], ""))
			if err != nil {
				return nil, fmt.Errorf("line %d: %w", i+1, err)
			}
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("the file holds no key")
	}
	return keys, nil
}
