package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// send makes a request with the headers that set puts in and a body that the path takes, and returns the answer, read
// whole.
func (p *program) send(method, path string, set func(*http.Request)) (*http.Response, string) {
	p.t.Helper()
	body := `{"messages":[],"input":"x"}`
	if strings.HasSuffix(path, "/completions") && !strings.HasSuffix(path, "/chat/completions") {
		body = `{"prompt":"x"}`
	}
	transport, base := http.DefaultTransport.(*http.Transport), p.url
	if socket, ok := strings.CutPrefix(p.url, "unix:"); ok {
		transport, base = &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}}, "http://localhost"
	}
	req, err := http.NewRequest(method, base+path, strings.NewReader(body))
	fatalIf(p.t, err)
	if set != nil {
		set(req)
	}
	res, err := transport.RoundTrip(req) // follows no redirects
	fatalIf(p.t, err)
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	fatalIf(p.t, err)
	return res, string(answer)
}

// header returns what puts a header in.
func header(name, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(name, value) }
}

func TestAccessKeys(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {}, map[string]string{"PROXY_API_KEYS": "key-1, key:2", "LOG_LEVEL": "debug", "DEBUG_MODE": "true"})
	for _, tt := range []struct {
		name string
		set  func(*http.Request)
		ok   bool
	}{
		{"a bearer token", header("Authorization", "Bearer key-1"), true},
		{"the second key", header("Authorization", "Bearer key:2"), true},
		{"bearer in lower case", header("Authorization", "bearer key-1"), true},
		{"bearer in upper case", header("Authorization", "BEARER key-1"), true},
		{"more blanks", header("Authorization", "Bearer   key-1"), true},
		{"x-api-key", header("x-api-key", "key-1"), true},
		{"Basic", func(r *http.Request) { r.SetBasicAuth("anyone", "key-1") }, true},
		{"Basic without a user", func(r *http.Request) { r.SetBasicAuth("", "key-1") }, true},
		{"Basic with a colon in the key", func(r *http.Request) { r.SetBasicAuth("anyone", "key:2") }, true},
		{"Basic in lower case", header("Authorization", "basic YTprZXktMQ=="), true}, // a:key-1
		{"x-api-key beside a foreign scheme", func(r *http.Request) {
			r.Header.Set("Authorization", "Digest x")
			r.Header.Set("X-Api-Key", "key-1")
		}, true},

		{"nothing", nil, false},
		{"a wrong key", header("Authorization", "Bearer wr0ng-key"), false},
		{"the beginning of a key", header("Authorization", "Bearer key-"), false},
		{"a key and more", header("Authorization", "Bearer key-11"), false},
		{"a key in another case", header("Authorization", "Bearer KEY-1"), false},
		{"both keys", header("Authorization", "Bearer key-1, key:2"), false},
		{"a comma", header("Authorization", "Bearer ,"), false},
		{"an empty bearer token", header("Authorization", "Bearer "), false},
		{"a key without a scheme", header("Authorization", "key-1"), false},
		{"another scheme", header("Authorization", "Token key-1"), false},
		{"a wrong x-api-key", header("X-Api-Key", "wr0ng-key"), false},
		{"an empty x-api-key", header("X-Api-Key", ""), false},
		{"another header", header("Api-Key", "key-1"), false},
		{"Basic with the key as user", func(r *http.Request) { r.SetBasicAuth("key-1", "") }, false},
		{"Basic with a wrong key", func(r *http.Request) { r.SetBasicAuth("anyone", "wr0ng-key") }, false},
		{"broken Basic", header("Authorization", "Basic key-1"), false},
		{"in the query", func(r *http.Request) { r.URL.RawQuery = "api_key=key-1&key=key-1" }, false},
		{"in a cookie", header("Cookie", "Authorization=Bearer key-1"), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			res, body := p.send("GET", "/v1/models", tt.set)
			if tt.ok {
				if res.StatusCode != http.StatusOK || res.Header.Get("WWW-Authenticate") != "" {
					t.Errorf("got %s %s, want 200", res.Status, body)
				}
				return
			}
			e := wantError(t, res, body, http.StatusUnauthorized, typeAuthentication, "invalid_api_key")
			if !strings.Contains(e.Error.Message, "PROXY_API_KEYS") || strings.Contains(body, "key-1") || strings.Contains(body, "wr0ng") {
				t.Errorf("message %q: want it to name PROXY_API_KEYS and to tell no key", e.Error.Message)
			}
			if got := res.Header.Get("WWW-Authenticate"); !strings.HasPrefix(got, "Basic realm=") { // RFC 9110 §11.6.1
				t.Errorf("WWW-Authenticate %q, want Basic, so that browsers ask", got)
			}
		})
	}
	for _, key := range []string{"key-1", "key:2", "wr0ng-key"} {
		if strings.Contains(p.stderr.String(), key) {
			t.Errorf("the log tells the key %s", key)
		}
	}
}

// TestAccessByRoute asks for every route, with /v1 and without.
func TestAccessByRoute(t *testing.T) {
	var calls atomic.Int64
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		answerJSON(w, 200, `{"choices":[{"index":0,"message":{"role":"assistant","content":"x"},"finish_reason":"stop"}]}`)
	}, map[string]string{"PROXY_API_KEYS": "key-1"})
	open := map[string]bool{"/": true, "/health": true, "/health/ready": true}
	routes := []string{"POST /v1//chat/completions", "POST //v1/chat/completions", "HEAD /health/detailed", "HEAD /v1/models"}
	for _, route := range endpoints(t) {
		route = strings.Replace(route, "{id}", "coder-model", 1)
		if routes = append(routes, route); strings.Contains(route, " /v1/") {
			routes = append(routes, strings.Replace(route, " /v1/", " /", 1))
		}
	}
	for _, route := range routes {
		method, path, _ := strings.Cut(route, " ")
		want := http.StatusUnauthorized
		if open[path] {
			want = http.StatusOK
		}
		for name, set := range map[string]func(*http.Request){"no": nil, "a wrong": header("Authorization", "Bearer key-2")} {
			if res, body := p.send(method, path, set); res.StatusCode != want {
				t.Errorf("%s with %s key: %s %s, want %d", route, name, res.Status, body, want)
			}
		}
		if n := calls.Swap(0); n != 0 {
			t.Errorf("%s: %d requests reached Qwen without a key", route, n)
		}
		res, body := p.send(method, path, header("Authorization", "Bearer key-1"))
		proxied := method == "POST" && !strings.Contains(path, "/messages") // which takes an API key
		if calls.Swap(0) == 1 != proxied || (res.StatusCode == 200) != (proxied || method != "POST") {
			t.Errorf("%s with the key: %s %s", route, res.Status, body)
		}
	}
}

func TestOnlyNamesThatNoForeignPageCanHavePointedHere(t *testing.T) {
	own, err := os.Hostname()
	fatalIf(t, err)
	api := func(w http.ResponseWriter, r *http.Request) { answerJSON(w, 200, "{}") }
	open := startWith(t, api, nil)
	keyed := startWith(t, api, map[string]string{"PROXY_API_KEYS": "key-1"})
	behind := startWith(t, api, map[string]string{"TRUSTED_PROXIES": "127.0.0.0/8"})
	for host, allowed := range map[string]bool{
		"127.0.0.1:8080": true, "127.0.0.1": true, "[::1]:8080": true, "[::1]": true, "192.168.1.5": true, "8.8.8.8:80": true,
		"localhost": true, "LocalHost:8080": true, "localhost.": true, "a.localhost": true, "nas.local": true, "qwen.internal:80": true,
		"qwen": true, "qwen_proxy:8080": true, own: true,
		"evil.example": false, "evil.example:8080": false, "localhost.evil.example": false, "127.0.0.1.evil.example": false,
		"local": true, "evil.local.example": false, "xlocalhost.com": false, "qwen.ai": false, "a b": false, "evil.example%00.local": false,
	} {
		t.Run(host, func(t *testing.T) {
			set := func(r *http.Request) { r.Host = host }
			res, body := open.send("GET", "/health", set)
			if allowed != (res.StatusCode == 200) {
				t.Errorf("got %s %s", res.Status, body)
			}
			if !allowed && res.StatusCode != http.StatusBadRequest { // net/http's own word on a malformed Host
				wantError(t, res, body, 403, typeAuthentication, "host_not_allowed")
			}
			if strings.ContainsAny(host, " %") {
				return
			}
			for name, p := range map[string]*program{"with keys": keyed, "behind a trusted proxy": behind} {
				if res, body := p.send("GET", "/health", set); res.StatusCode != 200 {
					t.Errorf("%s: %s %s", name, res.Status, body)
				}
			}
		})
	}
	c, err := net.Dial("tcp", strings.TrimPrefix(open.url, "http://"))
	fatalIf(t, err)
	defer c.Close()
	io.WriteString(c, "GET /health HTTP/1.0\r\n\r\n")
	if b, _ := io.ReadAll(c); !strings.Contains(string(b), " 403 ") {
		t.Errorf("without a Host: %s", b)
	}
}

func TestWebPagesOfOtherOriginsStayOut(t *testing.T) {
	var calls atomic.Int64
	api := func(w http.ResponseWriter, r *http.Request) { calls.Add(1); answerJSON(w, 200, "{}") }
	programs := map[string]*program{
		"":  startWith(t, api, nil),
		"a": startWith(t, api, map[string]string{"CORS_ALLOWED_ORIGINS": "https://app.example, http://other.example:8080"}),
		"*": startWith(t, api, map[string]string{"CORS_ALLOWED_ORIGINS": "*"}),
	}
	for _, tt := range []struct {
		config, origin, site string
		ok                   bool
	}{
		{"", "", "", true},
		{"", "http://localhost", "", true}, {"", "http://localhost:3000", "same-site", true}, {"", "https://127.0.0.1:1", "cross-site", true}, {"", "http://[::1]:80", "", true},
		{"", "https://evil.example", "cross-site", false}, {"", "http://localhost.evil.example", "", false}, {"", "null", "cross-site", false},
		{"", "http://127.0.0.1.evil.example", "", false}, {"", "file://localhost", "", false}, {"", "", "cross-site", false}, {"", "", "same-site", false},
		{"", "", "none", true}, {"", "", "same-origin", true},
		{"a", "https://app.example", "cross-site", true}, {"a", "http://other.example:8080", "", true}, {"a", "HTTPS://APP.EXAMPLE", "", true},
		{"a", "http://localhost", "", false}, {"a", "https://app.example.evil.example", "", false}, {"a", "http://app.example", "", false}, {"a", "https://app.example:444", "", false},
		{"*", "https://anyone.example", "cross-site", true}, {"*", "null", "cross-site", true},
	} {
		t.Run(tt.config+" "+tt.origin+" "+tt.site, func(t *testing.T) {
			p := programs[tt.config]
			set := func(r *http.Request) {
				if tt.origin != "" {
					r.Header.Set("Origin", tt.origin)
				}
				if tt.site != "" {
					r.Header.Set("Sec-Fetch-Site", tt.site)
				}
			}
			before := calls.Load()
			res, body := p.send("POST", "/v1/chat/completions", set)
			if tt.ok != (res.StatusCode == 200) || tt.ok != (calls.Load() == before+1) {
				t.Errorf("POST: %s %s, %d calls of the API", res.Status, body, calls.Load()-before)
			}
			if !tt.ok {
				wantError(t, res, body, 403, typeAuthentication, "origin_not_allowed")
			}
			wantOrigin := ""
			if tt.ok {
				wantOrigin = tt.origin
			}
			if got := res.Header.Get("Access-Control-Allow-Origin"); got != wantOrigin || !strings.Contains(res.Header.Get("Vary"), "Origin") {
				t.Errorf("Access-Control-Allow-Origin %q, Vary %q", got, res.Header.Get("Vary"))
			}
			if tt.origin == "" {
				return
			}
			res, body = p.send("OPTIONS", "/v1/chat/completions", func(r *http.Request) {
				set(r)
				r.Header.Set("Access-Control-Request-Method", "POST")
				r.Header.Set("Access-Control-Request-Headers", "authorization,content-type,x-stainless-os")
			})
			if tt.ok != (res.StatusCode == 204) || tt.ok != (res.Header.Get("Access-Control-Allow-Headers") == "authorization,content-type,x-stainless-os") {
				t.Errorf("preflight: %s %s %v", res.Status, body, res.Header)
			}
		})
	}
	t.Run("a safe request of another origin is answered, and the page can't read it", func(t *testing.T) {
		res, _ := programs[""].send("GET", "/v1/models", header("Origin", "https://evil.example"))
		if res.StatusCode != 200 || res.Header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("got %s %v", res.Status, res.Header)
		}
	})
	t.Run("a preflight needs no key and no token of the limiter", func(t *testing.T) {
		p := startWith(t, api, map[string]string{"PROXY_API_KEYS": "key-1", "RATE_LIMIT_RPS": "0.001", "RATE_LIMIT_BURST": "1"})
		for range 5 {
			res, body := p.send("OPTIONS", "/v1/chat/completions", func(r *http.Request) {
				r.Header.Set("Origin", "http://localhost:1")
				r.Header.Set("Access-Control-Request-Method", "POST")
			})
			if res.StatusCode != 204 {
				t.Errorf("got %s %s", res.Status, body)
			}
		}
		if res, body := p.send("GET", "/v1/models", header("Authorization", "Bearer key-1")); res.StatusCode != 200 {
			t.Errorf("afterwards: %s %s", res.Status, body)
		}
	})
}

func TestForwardedForIsReadFromTheRight(t *testing.T) {
	a := &access{trusted: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}}
	for _, tt := range []struct{ lines, want string }{
		{"", "10.0.0.1"},
		{"198.51.100.7", "198.51.100.7"},
		{"1.2.3.4, 198.51.100.7", "198.51.100.7"},
		{"1.2.3.4,198.51.100.7 , 10.9.9.9", "198.51.100.7"},
		{"1.2.3.4|198.51.100.7|10.9.9.9,10.1.1.1", "198.51.100.7"}, // | stands between header lines
		{"10.2.2.2, 10.9.9.9", "10.2.2.2"},
		{"198.51.100.7:4711", "198.51.100.7"},
		{"[2001:db8::1]:4711", "2001:db8::1"},
		{"2001:db8::1", "2001:db8::1"},
		{"::ffff:198.51.100.7", "198.51.100.7"},
		{"fe80::1%eth0", "fe80::1"},
		{"1.2.3.4, unknown", "10.0.0.1"},
		{"1.2.3.4, unknown, 10.9.9.9", "10.9.9.9"},
		{"1.2.3.4,", "10.0.0.1"},
		{"1.2.3.4, 198.51.100.7\x00", "10.0.0.1"},
	} {
		var lines []string
		if tt.lines != "" {
			lines = strings.Split(tt.lines, "|")
		}
		if got, _ := a.forwardedFor(netip.MustParseAddr("10.0.0.1"), lines); got.String() != tt.want {
			t.Errorf("%q: %v, want %s", tt.lines, got, tt.want)
		}
	}
}

// TestTheSignInIsShownToTheOwnNetworkAlone: without keys, /auth is for clients that are known to be near.
func TestTheSignInIsShownToTheOwnNetworkAlone(t *testing.T) {
	api := func(w http.ResponseWriter, r *http.Request) {}
	socket := filepath.Join(t.TempDir(), "s")
	programs := map[string]*program{
		"direct":  startWith(t, api, nil),
		"trusted": startWith(t, api, map[string]string{"TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/8"}),
		"socket":  startWith(t, api, map[string]string{"SERVER_HOST": "unix:" + socket}),
	}
	for _, tt := range []struct {
		peer, host, header, value string
		code                      string // "" is 200
	}{
		{"direct", "localhost", "", "", ""},
		{"direct", "qwen.example", "", "", "host_not_allowed"},
		{"direct", "localhost", "X-Forwarded-For", "127.0.0.1", "forbidden"},
		{"direct", "localhost", "Forwarded", "for=127.0.0.1", "forbidden"},
		{"direct", "localhost", "X-Real-Ip", "127.0.0.1", "forbidden"},
		{"direct", "localhost", "Via", "1.1 cache", "forbidden"},

		{"trusted", "qwen.example", "X-Forwarded-For", "203.0.113.9", "forbidden"},
		{"trusted", "qwen.example", "X-Forwarded-For", "192.168.1.2", ""},
		{"trusted", "qwen.example", "X-Forwarded-For", "203.0.113.9, 192.168.1.2", ""}, // what stands on the left, anybody may have written
		{"trusted", "qwen.example", "X-Forwarded-For", "10.1.2.3, 10.9.9.9", ""},
		{"trusted", "localhost", "", "", ""}, // somebody on the reverse proxy's own machine
		{"trusted", "qwen.example", "", "", "forbidden"},
		{"trusted", "localhost", "Forwarded", "for=203.0.113.9", "forbidden"},
		{"trusted", "localhost", "X-Forwarded-For", "unknown", "forbidden"},
		{"trusted", "localhost", "X-Forwarded-For", "203.0.113.9, unknown", "forbidden"},
		{"trusted", "localhost", "X-Forwarded-For", "203.0.113.9, unknown, 10.9.9.9", "forbidden"},
		{"trusted", "localhost", "X-Forwarded-For", "", "forbidden"},
		{"trusted", "localhost", "X-Real-Ip", "203.0.113.9", "forbidden"},

		{"socket", "localhost", "", "", ""},
		{"socket", "qwen.example", "", "", "forbidden"},
		{"socket", "qwen.example", "X-Forwarded-For", "192.168.1.2", ""},
		{"socket", "qwen.example", "X-Forwarded-For", "203.0.113.9", "forbidden"},
		{"socket", "localhost", "Forwarded", "for=127.0.0.1", "forbidden"},
		{"socket", "localhost", "X-Forwarded-For", "unix:", "forbidden"},
	} {
		t.Run(strings.Join([]string{tt.peer, tt.host, tt.header, tt.value}, " "), func(t *testing.T) {
			res, body := programs[tt.peer].send("GET", "/auth", func(r *http.Request) {
				r.Host = tt.host
				if tt.header != "" {
					r.Header[tt.header] = []string{tt.value}
				}
			})
			if tt.code != "" {
				wantError(t, res, body, 403, typeAuthentication, tt.code)
			} else if res.StatusCode != 200 {
				t.Errorf("%s %s", res.Status, body)
			}
		})
	}
	t.Run("both headers", func(t *testing.T) { // a reverse proxy that sends one may pass the client's other
		res, body := programs["trusted"].send("GET", "/auth", func(r *http.Request) {
			r.Header.Set("X-Forwarded-For", "192.168.1.2")
			r.Header.Set("Forwarded", "for=203.0.113.9")
		})
		wantError(t, res, body, 403, typeAuthentication, "forbidden")
	})
}

// TestAPeerOnAUnixSocketIsTrusted: it is a reverse proxy on this machine, and has no address to put into TRUSTED_PROXIES.
func TestAPeerOnAUnixSocketIsTrusted(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {}, map[string]string{
		"SERVER_HOST": "unix:" + filepath.Join(t.TempDir(), "s"), "RATE_LIMIT_RPS": "0.001", "RATE_LIMIT_BURST": "2"})
	var got []int
	for _, from := range []string{"198.51.100.1", "6.6.6.6, 198.51.100.1", "7.7.7.7, 198.51.100.1", "198.51.100.2"} {
		res, _ := p.send("GET", "/v1/models", func(r *http.Request) {
			r.Host = "qwen.example"
			r.Header.Set("X-Forwarded-For", from)
		})
		got = append(got, res.StatusCode)
	}
	wantEqual(t, "statuses", []int{200, 200, 429, 200}, got)
	p.stderr.await(t, `"client":"198.51.100.2"`)
	p.send("GET", "/health/detailed", nil)
	p.stderr.await(t, `"client":"unix"`)
}

func TestATrustedProxyMayHaveAZone(t *testing.T) {
	for _, trusted := range []string{"fe80::1", "fe80::/10", "fe80::1%eth0"} {
		cfg, err := loadConfig(lookup(map[string]string{"TRUSTED_PROXIES": trusted}))
		fatalIf(t, err)
		a := newAccess(cfg, slog.New(slog.DiscardHandler))
		c := a.client(&http.Request{RemoteAddr: "[fe80::1%eth0]:4711", Header: http.Header{"X-Forwarded-For": {"198.51.100.1"}}})
		if got := c.addr.String(); got != "198.51.100.1" {
			t.Errorf("TRUSTED_PROXIES=%s: the client is %s, want 198.51.100.1", trusted, got)
		}
	}
}

// FuzzForwardedFor: whatever stands left of the first address that a trusted proxy has put there changes nothing.
func FuzzForwardedFor(f *testing.F) {
	for _, s := range []string{"", "1.2.3.4", "x, 1.2.3.4", ",,,", "[::1]:80, 10.0.0.1", "::ffff:10.0.0.1", "fe80::1%x"} {
		f.Add(s)
	}
	a := &access{trusted: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	peer := netip.MustParseAddr("10.0.0.1")
	f.Fuzz(func(t *testing.T, s string) {
		if got, _ := a.forwardedFor(peer, []string{s}); !got.IsValid() || got.Is4In6() || got.Zone() != "" {
			t.Errorf("%q: %v", s, got)
		}
		for _, end := range []string{"198.51.100.7", "198.51.100.7, 10.1.1.1"} {
			if got, _ := a.forwardedFor(peer, []string{s, end}); got.String() != "198.51.100.7" {
				t.Errorf("%q before %q: %v", s, end, got)
			}
			if got, _ := a.forwardedFor(peer, []string{s + "," + end}); got.String() != "198.51.100.7" {
				t.Errorf("%q before %q on a line: %v", s, end, got)
			}
		}
	})
}

func TestTheLimiterCountsByKeyOrAddress(t *testing.T) {
	api := func(w http.ResponseWriter, r *http.Request) {}
	for _, tt := range []struct {
		name, setting, value string
		header, scheme       string
		from                 []string
		want                 []int
	}{
		{"by key", "PROXY_API_KEYS", "key-1,key-2", "Authorization", "Bearer ",
			[]string{"key-1", "key-1", "key-1", "key-2", "wrong-1", "wrong-2", "wrong-3", "key-2"}, []int{200, 200, 429, 200, 401, 401, 429, 200}},
		{"by address behind a trusted proxy", "TRUSTED_PROXIES", "127.0.0.1, ::1", "X-Forwarded-For", "",
			[]string{"198.51.100.1", "6.6.6.6, 198.51.100.1", "7.7.7.7, 198.51.100.1", "198.51.100.2"}, []int{200, 200, 429, 200}},
		{"X-Forwarded-For of anybody counts for nothing", "LOG_LEVEL", "info", "X-Forwarded-For", "",
			[]string{"198.51.100.1", "198.51.100.2", "198.51.100.3"}, []int{200, 200, 429}},
	} {
		p := startWith(t, api, map[string]string{"RATE_LIMIT_RPS": "0.001", "RATE_LIMIT_BURST": "2", tt.setting: tt.value})
		var got []int
		for _, from := range tt.from {
			res, _ := p.send("GET", "/v1/models", header(tt.header, tt.scheme+from))
			got = append(got, res.StatusCode)
		}
		wantEqual(t, tt.name, tt.want, got)
		if tt.setting == "TRUSTED_PROXIES" {
			p.stderr.await(t, `"client":"198.51.100.2"`)
		}
	}
	t.Run("guesses count on every route that needs a key", func(t *testing.T) {
		env := map[string]string{"RATE_LIMIT_RPS": "0.001", "RATE_LIMIT_BURST": "2", "PROXY_API_KEYS": "key-1"}
		for _, route := range []string{"GET /metrics", "GET /health/detailed", "GET /auth", "GET /v1/models", "POST /v1/chat/completions", "GET /nowhere"} {
			method, path, _ := strings.Cut(route, " ")
			p := startWith(t, api, env)
			var got []int
			for _, key := range []string{"wrong-1", "wrong-2", "wrong-3", ""} {
				res, _ := p.send(method, path, header("X-Api-Key", key))
				got = append(got, res.StatusCode)
			}
			wantEqual(t, route, []int{401, 401, 429, 429}, got)
			for range 3 { // more than the limit: it is not for these two routes
				for _, path := range []string{"/metrics", "/health/detailed"} {
					if res, body := p.send("GET", path, header("X-Api-Key", "key-1")); res.StatusCode != 200 {
						t.Errorf("%s: then %s with the key: %s %s", route, path, res.Status, body)
					}
				}
			}
		}
	})
}

func TestTheFileOfTheProxysKeysIsFollowed(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "keys")
	write := func(s string) {
		writeFile(t, file, s)
	}
	write("# ours\nold\n")
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {}, map[string]string{"PROXY_API_KEYS_FILE": file})
	status := func(key string) int {
		res, _ := p.send("GET", "/v1/models", header("X-Api-Key", key))
		return res.StatusCode
	}
	if status("old") != 200 || status("new") != 401 || status("# ours") != 401 || status("ours") != 401 {
		t.Error("the file's keys are not in use")
	}
	write("new\n")
	p.stderr.await(t, `"msg":"the proxy's keys have changed"`)
	if status("old") != 401 || status("new") != 200 {
		t.Error("the file's new keys are not in use")
	}
	write("")
	p.stderr.await(t, `"msg":"PROXY_API_KEYS_FILE can't be used`)
	if status("") != 401 || status("new") != 200 {
		t.Error("an emptied file opened the proxy, or lost the last keys")
	}
}
