package main

import (
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// compareConfigs lets cmp.Diff look into configurations.
var compareConfigs = cmp.Options{
	cmp.AllowUnexported(config{}, proxyKey{}),
	cmp.Comparer(func(a, b *url.URL) bool { return a == b || a != nil && b != nil && a.String() == b.String() }),
	cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
}

// emptyConfig is the configuration of an empty environment. Tests build on it, so that a changed default fails only those
// that are about defaults.
func emptyConfig() *config {
	c, err := loadConfig(lookup(nil))
	if err != nil {
		panic(err)
	}
	return c
}

// defaultConfig is what it has to be.
func defaultConfig() *config {
	return &config{
		host: "0.0.0.0", port: 8080,
		logLevel: slog.LevelInfo, logFormat: "json",
		rateLimit: 10, rateBurst: 20,
		readTimeout: 30 * time.Second, writeTimeout: 30 * time.Second, shutdownTimeout: 30 * time.Second,
		upstreamTimeout: 10 * time.Minute, idleTimeout: 5 * time.Minute, keepAlive: 15 * time.Second,
		maxBody: 33554432, maxBuffered: 268435456,
		qwenDir: ".qwen", refreshBuffer: 5 * time.Minute,
		oauthBase:     &url.URL{Scheme: "https", Host: "chat.qwen.ai"},
		oauthClientID: "f0304373b74a44d2b584a3fb70ca9e56",
		oauthScope:    "openid profile email model.completion",
		defaultModel:  "qwen3-coder-plus",
		aliases:       map[string]string{},
	}
}

func TestConfigDefaults(t *testing.T) {
	wantEqual(t, "config", defaultConfig(), emptyConfig(), compareConfigs)
}

func TestConfigTakesBlankAsUnset(t *testing.T) {
	blank := map[string]string{}
	for _, name := range settingNames() {
		if name != "PROXY_API_KEYS" && name != "PROXY_API_KEYS_FILE" { // an error: see TestConfigHidesSecrets
			blank[name] = " \t"
		}
	}
	c, err := loadConfig(lookup(blank))
	fatalIf(t, err)
	wantEqual(t, "config", emptyConfig(), c, compareConfigs)
}

func TestConfigGoodValues(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	for _, tt := range []struct {
		name   string
		env    map[string]string
		change func(*config) // of the defaults
	}{
		{"blanks around a value", map[string]string{"SERVER_PORT": " 9000\t", "LOG_FORMAT": " TEXT "},
			func(c *config) { c.port, c.logFormat = 9000, "text" }},
		{"a free port", map[string]string{"SERVER_PORT": "0"}, func(c *config) { c.port = 0 }},
		{"the highest port", map[string]string{"SERVER_PORT": "65535"}, func(c *config) { c.port = 65535 }},
		{"a host name", map[string]string{"SERVER_HOST": "my_host-1.internal"}, func(c *config) { c.host = "my_host-1.internal" }},
		{"IPv6", map[string]string{"SERVER_HOST": "::1"}, func(c *config) { c.host = "::1" }},
		{"IPv6 as in a URL", map[string]string{"SERVER_HOST": "[::1]"}, func(c *config) { c.host = "::1" }},
		{"a zone", map[string]string{"SERVER_HOST": "fe80::1%eth0"}, func(c *config) { c.host = "fe80::1%eth0" }},
		{"a Unix socket", map[string]string{"SERVER_HOST": "unix:/run/a b.sock"}, func(c *config) { c.host = "unix:/run/a b.sock" }},

		{"warnings alone", map[string]string{"LOG_LEVEL": "WARN"}, func(c *config) { c.logLevel = slog.LevelWarn }},
		{"debug mode lowers the level", map[string]string{"LOG_LEVEL": "error", "DEBUG_MODE": "TRUE"},
			func(c *config) { c.debug, c.logLevel = true, slog.LevelDebug }},
		{"debug level is not debug mode", map[string]string{"LOG_LEVEL": "debug", "DEBUG_MODE": "0"},
			func(c *config) { c.logLevel = slog.LevelDebug }},

		{"no limit", map[string]string{"RATE_LIMIT_RPS": "0"}, func(c *config) { c.rateLimit = 0 }},
		{"a slow limit", map[string]string{"RATE_LIMIT_RPS": "1e-6", "RATE_LIMIT_BURST": "1"},
			func(c *config) { c.rateLimit, c.rateBurst = 1e-6, 1 }},
		{"a fast limit", map[string]string{"RATE_LIMIT_RPS": "1000000", "RATE_LIMIT_BURST": "1000000"},
			func(c *config) { c.rateLimit, c.rateBurst = 1e6, 1_000_000 }},

		{"short and long durations", map[string]string{"READ_TIMEOUT": "1ns", "WRITE_TIMEOUT": "1h30m", "SHUTDOWN_TIMEOUT": "0.5s",
			"UPSTREAM_TIMEOUT": "24h", "STREAM_IDLE_TIMEOUT": "1ms", "TOKEN_REFRESH_BUFFER": "1h"},
			func(c *config) {
				c.readTimeout, c.writeTimeout, c.shutdownTimeout = 1, 90*time.Minute, 500*time.Millisecond
				c.upstreamTimeout, c.idleTimeout, c.refreshBuffer = 24*time.Hour, time.Millisecond, time.Hour
			}},
		{"a delay before the shutdown", map[string]string{"SHUTDOWN_DELAY": "5s"}, func(c *config) { c.shutdownDelay = 5 * time.Second }},
		{"no keep-alives", map[string]string{"SSE_KEEPALIVE": "0"}, func(c *config) { c.keepAlive = 0 }},

		{"the smallest bodies", map[string]string{"MAX_BODY_BYTES": "1", "MAX_BUFFERED_BYTES": "1"},
			func(c *config) { c.maxBody, c.maxBuffered = 1, 1 }},
		{"the largest bodies", map[string]string{"MAX_BODY_BYTES": "9223372036854775807", "MAX_BUFFERED_BYTES": "9223372036854775807"},
			func(c *config) { c.maxBody, c.maxBuffered = math.MaxInt64, math.MaxInt64 }},

		{"a directory", map[string]string{"QWEN_DIR": "/var/lib/my qwen"}, func(c *config) { c.qwenDir = "/var/lib/my qwen" }},
		{"the home directory", map[string]string{"QWEN_DIR": "~"}, func(c *config) { c.qwenDir = home }},
		{"within the home directory", map[string]string{"QWEN_DIR": "~/.qwen"}, func(c *config) { c.qwenDir = filepath.Join(home, ".qwen") }},
		{"not a home directory", map[string]string{"QWEN_DIR": "~someone/x"}, func(c *config) { c.qwenDir = "~someone/x" }},
		{"a tilde elsewhere", map[string]string{"QWEN_DIR": "a/~/b"}, func(c *config) { c.qwenDir = "a/~/b" }},

		{"an upstream", map[string]string{"API_BASE_URL": "https://host.example/compatible-mode/v1//"},
			func(c *config) {
				c.apiBase = &url.URL{Scheme: "https", Host: "host.example", Path: "/compatible-mode/v1"}
			}},
		{"another machine over http", map[string]string{"API_BASE_URL": "http://10.0.0.1:8000", "QWEN_OAUTH_BASE_URL": "http://[::1]:1/"},
			func(c *config) {
				c.apiBase = &url.URL{Scheme: "http", Host: "10.0.0.1:8000"}
				c.oauthBase = &url.URL{Scheme: "http", Host: "[::1]:1"}
			}},
		{"another OAuth client", map[string]string{"QWEN_OAUTH_CLIENT_ID": "me", "QWEN_OAUTH_SCOPE": "openid"},
			func(c *config) { c.oauthClientID, c.oauthScope = "me", "openid" }},

		{"models", map[string]string{"DEFAULT_MODEL": "org/m:1", "MODELS": " a, org/b ,,c, ", "MODEL_ALIASES": "gpt-4o=a, x = b=c ,"},
			func(c *config) {
				c.defaultModel, c.models = "org/m:1", []string{"a", "org/b", "c"}
				c.aliases = map[string]string{"gpt-4o": "a", "x": "b=c"}
			}},

		{"keys", map[string]string{"QWEN_API_KEY": " sk-1 ", "PROXY_API_KEYS": "one, two:2 ,"},
			func(c *config) { c.apiKey, c.proxyKeys = "sk-1", proxyKeys("one", "two:2") }},

		{"trusted proxies", map[string]string{"TRUSTED_PROXIES": " 10.1.2.3/8 , 192.168.0.1,2001:db8::1/32, ::1, ::ffff:10.1.2.3, ::ffff:10.1.2.3/104"},
			func(c *config) {
				for _, s := range []string{"10.0.0.0/8", "192.168.0.1/32", "2001:db8::/32", "::1/128", "10.1.2.3/32", "10.0.0.0/8"} {
					c.trustedProxies = append(c.trustedProxies, netip.MustParsePrefix(s))
				}
			}},
		{"origins", map[string]string{"CORS_ALLOWED_ORIGINS": "https://App.Example.com/, http://localhost:3000, HTTP://[::1]:1, app://obsidian.md, https://b.example:443, http://b.example:80, http://b.example:443"},
			func(c *config) {
				c.corsOrigins = []string{"https://app.example.com", "http://localhost:3000", "http://[::1]:1", "app://obsidian.md", "https://b.example", "http://b.example", "http://b.example:443"}
			}},
		{"any origin", map[string]string{"CORS_ALLOWED_ORIGINS": "*"}, func(c *config) { c.corsOrigins = []string{"*"} }},

		{"files of TLS that is off", map[string]string{"TLS_CERT_FILE": "none.pem", "TLS_KEY_FILE": "none.key"},
			func(c *config) { c.certFile, c.keyFile = "none.pem", "none.key" }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := loadConfig(lookup(tt.env))
			fatalIf(t, err)
			want := emptyConfig()
			tt.change(want)
			wantEqual(t, "config", want, got, compareConfigs)
		})
	}
}

// TestConfigBadValues checks that every error has the form NAME="value": want …, and is the only one.
func TestConfigBadValues(t *testing.T) {
	const (
		whole    = "a whole number"
		positive = "a positive duration such as 30s or 5m"
		orNone   = "a duration such as 30s or 5m, or 0"
		oneURL   = "a URL such as https://host/v1, without user, password, ? and #"
		control  = "text without control characters"
	)
	for _, tt := range []struct {
		name   string
		values []string
		want   string
	}{
		{"SERVER_HOST", []string{"0.0.0.0:8080", "http://localhost", "[::1]:8080", "[]", "my host", "::g", "höst", strings.Repeat("a", 254)}, "an IP address, a host name, or unix:/path (the port goes into SERVER_PORT)"},
		{"SERVER_HOST", []string{"unix:", "unix:/a\x00b"}, "an IP address, a host name, or unix:/path"},
		{"SERVER_PORT", []string{"-1", "65536", "http", "80.0", "0x50", "8080 8081", "99999999999999999999"}, "a whole number from 0 to 65535"},
		{"ENABLE_TLS", []string{"yes", "on", "2"}, "true or false"},
		{"TLS_CERT_FILE", []string{"a\nb"}, control},
		{"TLS_KEY_FILE", []string{"a\x7fb"}, control},
		{"LOG_LEVEL", []string{"warning", "trace", "0"}, "debug, info, warn or error"},
		{"LOG_FORMAT", []string{"yaml", "json text"}, "json or text"},
		{"DEBUG_MODE", []string{"yes", "debug"}, "true or false"},
		{"RATE_LIMIT_RPS", []string{"ten", "-1", "NaN", "Inf", "-inf", "1e-7", "1000001", "1,5", "10/s"}, "requests a second such as 10 or 0.5"},
		{"RATE_LIMIT_BURST", []string{"0", "-1", "1000001", "2.5", "many"}, "a whole number from 1 to 1000000"},
		{"READ_TIMEOUT", []string{"30", "-1s", "soon", "9999999999h", "0", "0s"}, positive},
		{"WRITE_TIMEOUT", []string{"30", "1 m", "0"}, positive},
		{"SHUTDOWN_TIMEOUT", []string{"1d", "-0.1s", "0m"}, positive},
		{"UPSTREAM_TIMEOUT", []string{"10", "ten minutes", "0"}, positive},
		{"STREAM_IDLE_TIMEOUT", []string{"5", "∞", "0"}, positive},
		{"TOKEN_REFRESH_BUFFER", []string{"300", "five", "0"}, positive},
		{"SHUTDOWN_DELAY", []string{"5", "-1s"}, orNone},
		{"SSE_KEEPALIVE", []string{"15", "-1s", "off"}, orNone},
		{"MAX_BODY_BYTES", []string{"0", "-1", "32M", "1e6", "9223372036854775808"}, whole + " of at least 1"},
		{"MAX_BUFFERED_BYTES", []string{"0", "256MiB", "all"}, whole + " of at least 1"},
		{"QWEN_DIR", []string{"a\tb"}, control},
		{"QWEN_OAUTH_CLIENT_ID", []string{"a\nb"}, control},
		{"QWEN_OAUTH_SCOPE", []string{"openid\r\nprofile"}, control},
		{"QWEN_OAUTH_BASE_URL", []string{"chat.qwen.ai", "ftp://chat.qwen.ai", "https:///api", "//chat.qwen.ai", "localhost:8080"}, oneURL},
		{"API_BASE_URL", []string{"portal.qwen.ai/v1", "ws://h", "https://", "https://:443/v1", "localhost:8080/v1"}, oneURL},
		{"DEFAULT_MODEL", []string{"a, b", "a b", "a,b", "a\x1bb"}, "one model id"},
		{"MODELS", []string{"a b", "a\x00b"}, "model ids without blanks and control characters"},
		{"MODELS", []string{",", ", ,"}, "model ids"},
		{"MODEL_ALIASES", []string{"gpt-4o", "=a", "a=", "a=b\x00c", "="}, "alias=model pairs such as gpt-4o=qwen3.7-plus"},
		{"TRUSTED_PROXIES", []string{"localhost", "10.0.0.0/33", "10.0.0.256", "10.0.0.1:80", "10.0.0.1-10.0.0.9"}, "IP addresses or CIDRs such as 10.0.0.0/8"},
		{"CORS_ALLOWED_ORIGINS", []string{"app.example.com", "https://", "https://a.example/path", "mailto:x", "null", "%", "https://*.example.com"}, "origins such as https://app.example.com, or * alone"},
		{"CORS_ALLOWED_ORIGINS", []string{",", ", ,"}, "origins such as"},
		{"CORS_ALLOWED_ORIGINS", []string{"*, https://a.example"}, "origins such as https://app.example.com, or * alone"},
		{"QWEN_API_KEY_FILE", []string{"no such file"}, "a readable file with the key and nothing else"},
		{"PROXY_API_KEYS_FILE", []string{"no such file"}, "a readable file with one key a line"},
		{"PROXY_API_KEYS_FILE", []string{""}, "the path of a file with one key a line, or the variable unset"},
		{"PROXY_API_KEYS", []string{""}, "comma-separated keys, or the variable unset to need none"},
	} {
		for _, value := range tt.values {
			t.Run(tt.name+"="+value, func(t *testing.T) {
				wantProblems(t, map[string]string{tt.name: value}, fmt.Sprintf("%s=%q: want %s", tt.name, value, tt.want))
			})
		}
	}
}

// wantProblems checks that loadConfig finds exactly these problems, each a line that begins so.
func wantProblems(t *testing.T, env map[string]string, want ...string) {
	t.Helper()
	_, err := loadConfig(lookup(env))
	if err == nil {
		t.Fatalf("no error, want\n%s", strings.Join(want, "\n"))
	}
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != len(want) {
		t.Fatalf("got %d problems, want %d:\n%v", len(lines), len(want), err)
	}
	for _, begin := range want {
		if !slices.ContainsFunc(lines, func(line string) bool { return strings.HasPrefix(line, begin) }) {
			t.Errorf("no line begins with\n%s\nin\n%v", begin, err)
		}
	}
}

func TestConfigShowsTheItemThatIsWrong(t *testing.T) {
	for _, tt := range []struct{ name, value, want string }{
		{"SERVER_PORT", " 80a ", `SERVER_PORT="80a"`},
		{"MODELS", "a, b c, d", `MODELS="b c"`},
		{"MODEL_ALIASES", "a=b, c, d=e", `MODEL_ALIASES="c"`},
		{"MODEL_ALIASES", "a=b, a=c", `MODEL_ALIASES="a=c": want alias=model pairs such as gpt-4o=qwen3.7-plus, each alias once`},
		{"MODEL_ALIASES", "a=b, b=c, d=c", `MODEL_ALIASES="a=b": want a model, not another alias, behind =`},
		{"MODEL_ALIASES", "a=a", `MODEL_ALIASES="a=a": want a model, not another alias, behind =`},
		{"TRUSTED_PROXIES", "10.0.0.0/8, ten", `TRUSTED_PROXIES="ten"`},
		{"CORS_ALLOWED_ORIGINS", "https://a.example, b.example", `CORS_ALLOWED_ORIGINS="b.example"`},
		{"CORS_ALLOWED_ORIGINS", "https://a.example?x, https://b.example", `CORS_ALLOWED_ORIGINS="`},
		{"CORS_ALLOWED_ORIGINS", "https://a.example#x", `CORS_ALLOWED_ORIGINS="`},
	} {
		wantProblems(t, map[string]string{tt.name: tt.value}, tt.want)
	}
	wantProblems(t, map[string]string{"MAX_BODY_BYTES": "1000", "MAX_BUFFERED_BYTES": "999"},
		`MAX_BUFFERED_BYTES="999": want at least MAX_BODY_BYTES, which is 1000`)
	t.Setenv("HOME", "")
	wantProblems(t, map[string]string{"QWEN_DIR": "~/.qwen"}, `QWEN_DIR="~/.qwen": want text without control characters, and without ~ if`)
}

func TestConfigReportsAllProblemsAtOnce(t *testing.T) {
	wantProblems(t, map[string]string{
		"SERVER_PORT": "http", "LOG_LEVEL": "loud", "RATE_LIMIT_RPS": "ten", "READ_TIMEOUT": "30",
		"API_BASE_URL": "portal.qwen.ai", "PROXY_API_KEYS": "", "MODEL_ALIASES": "gpt-4o", "ENABLE_TLS": "true",
		"DEFAULT_MODEL": "a-good-one",
	},
		`SERVER_PORT="http": want`, `LOG_LEVEL="loud": want`, `RATE_LIMIT_RPS="ten": want`, `READ_TIMEOUT="30": want`,
		`API_BASE_URL="portal.qwen.ai": want`, `PROXY_API_KEYS="": want`, `MODEL_ALIASES="gpt-4o": want`, `ENABLE_TLS="true": want`)
}

func TestConfigHidesSecrets(t *testing.T) {
	const keys, plainURL = "keys of printable characters", "a URL such as https://host/v1, without user, password, ? and #"
	file := filepath.Join(t.TempDir(), "key")
	writeFile(t, file, "s3cret and more")
	for _, tt := range []struct {
		env  map[string]string
		want string
	}{
		{map[string]string{"QWEN_API_KEY": "s3cret with blanks"}, "QWEN_API_KEY: want one key of printable characters without blanks"},
		{map[string]string{"QWEN_API_KEY": `"s3cret"`}, "QWEN_API_KEY: want one key of printable characters without blanks and quotes"},
		{map[string]string{"QWEN_API_KEY": `'s3cret'`}, "QWEN_API_KEY: want one key of printable characters without blanks and quotes"},
		{map[string]string{"QWEN_API_KEY": "s3cret\x00"}, "QWEN_API_KEY: want one key"},
		{map[string]string{"QWEN_API_KEY": "s3cret-é"}, "QWEN_API_KEY: want one key"},
		{map[string]string{"QWEN_API_KEY": "s3cret", "QWEN_API_KEY_FILE": file}, "QWEN_API_KEY and QWEN_API_KEY_FILE: want one of the two"},
		{map[string]string{"QWEN_API_KEY_FILE": file}, fmt.Sprintf("QWEN_API_KEY_FILE=%q: want", file)},
		{map[string]string{"PROXY_API_KEYS": "good, s3cret bad"}, "PROXY_API_KEYS: want " + keys},
		{map[string]string{"PROXY_API_KEYS": `"s3cret"`}, "PROXY_API_KEYS: want " + keys},
		{map[string]string{"PROXY_API_KEYS": "s3cret\x7f"}, "PROXY_API_KEYS: want " + keys},
		{map[string]string{"PROXY_API_KEYS": "s3cret", "PROXY_API_KEYS_FILE": file}, "PROXY_API_KEYS and PROXY_API_KEYS_FILE: want one of the two"},
		{map[string]string{"PROXY_API_KEYS": "", "PROXY_API_KEYS_FILE": file}, "PROXY_API_KEYS and PROXY_API_KEYS_FILE: want one of the two"},
		{map[string]string{"PROXY_API_KEYS": " ,, "}, `PROXY_API_KEYS="": want comma-separated keys`},
		{map[string]string{"PROXY_API_KEYS_FILE": file}, fmt.Sprintf("PROXY_API_KEYS_FILE=%q: want", file)},
		{map[string]string{"API_BASE_URL": "https://user:s3cret@host/v1"}, `API_BASE_URL="`},
		{map[string]string{"API_BASE_URL": "http://user:s3cret@host:notaport/"}, `API_BASE_URL="…": want a URL such as`},
		{map[string]string{"API_BASE_URL": "https://host/v1?key=s3cret"}, `API_BASE_URL="…": want ` + plainURL},
		{map[string]string{"API_BASE_URL": "https://s3cret@host/v1"}, `API_BASE_URL="…": want ` + plainURL},
		{map[string]string{"API_BASE_URL": "https://user@host/v1?key=s3cret"}, `API_BASE_URL="…": want ` + plainURL},
		{map[string]string{"API_BASE_URL": "user:s3cret@host/v1"}, `API_BASE_URL="…": want ` + plainURL},
		{map[string]string{"API_BASE_URL": "https:///user:s3cret@host/v1"}, `API_BASE_URL="…": want ` + plainURL},
		{map[string]string{"API_BASE_URL": "ftp://host/v1?key=s3cret"}, `API_BASE_URL="…": want ` + plainURL},
		{map[string]string{"CORS_ALLOWED_ORIGINS": "https://user:s3cret@host"}, `CORS_ALLOWED_ORIGINS="…": want`},
		{map[string]string{"QWEN_OAUTH_BASE_URL": "ftp://user:s3cret@host"}, `QWEN_OAUTH_BASE_URL="`},
		{map[string]string{"QWEN_OAUTH_BASE_URL": "https://host#s3cret"}, `QWEN_OAUTH_BASE_URL="…": want ` + plainURL},
	} {
		t.Run(tt.want, func(t *testing.T) {
			wantProblems(t, tt.env, tt.want)
			if _, err := loadConfig(lookup(tt.env)); strings.Contains(err.Error(), "s3cret") {
				t.Errorf("the error tells the secret: %v", err)
			}
		})
	}
}

// proxyKeys returns the keys of texts, each with a name behind a blank or without one.
func proxyKeys(texts ...string) (keys []proxyKey) {
	for _, text := range texts {
		key, name, _ := strings.Cut(text, " ")
		k, err := newProxyKey(key, name)
		if err != nil {
			panic(err)
		}
		keys = append(keys, k)
	}
	return keys
}

func TestConfigKeyFiles(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		name, content string
		apiKey        string   // "" for an error
		proxyKeys     []string // with their names; nil for an error
	}{
		{"one key", "sk-1", "sk-1", []string{"sk-1"}},
		{"white space around", "\n sk-1 \r\n\n", "sk-1", []string{"sk-1"}},
		{"several", "one\ntwo\n", "", []string{"one", "two"}},
		{"CRLF", "one\r\ntwo\r\n", "", []string{"one", "two"}},
		{"comments and blank lines", "# for n8n\n\none\n  # for the team\ntwo#2\n", "", []string{"one", "two#2"}},
		{"quotes", `"sk-1"`, "", nil},
		{"another key in the name's place", "sk-1 sk-0123456789abcdef0123456789abcdef", "", nil},
		{"names and comments", "sk-1 alice\nsk-2\tn8n # the server\n sk-3 # bob's\n", "", []string{"sk-1 alice", "sk-2 n8n", "sk-3"}},
		{"two keys with a name, one without ASCII", "sk-1 Zoë\nsk-2 Zoë\n", "", []string{"sk-1 Zoë", "sk-2 Zoë"}},
		{"a control character in a name", "sk-1 a\x1b[31m", "", nil},
		{"a name that is not UTF-8", "sk-1 a\xff", "", nil},
		{"two blanks within", "sk 1 2", "", nil},
		{"beyond ASCII", "sk-é", "", nil},
		{"a NUL", "sk\x00", "", nil},
		{"empty", "", "", nil},
		{"blank", " \r\n\t\n", "", nil},
		{"comments alone", "# one\n# two\n", "", nil},
		{"one very long line", strings.Repeat("k", 1<<20), strings.Repeat("k", 1<<20), []string{strings.Repeat("k", 1<<20)}},
	} {
		file := filepath.Join(dir, strings.ReplaceAll(tt.name, " ", "-"))
		writeFile(t, file, tt.content)
		for name, good := range map[string]bool{"QWEN_API_KEY_FILE": tt.apiKey != "", "PROXY_API_KEYS_FILE": tt.proxyKeys != nil} {
			if !good {
				wantProblems(t, map[string]string{name: file}, fmt.Sprintf("%s=%q: want a readable file", name, file))
				continue
			}
			got, err := loadConfig(lookup(map[string]string{name: " " + file + " "}))
			fatalIf(t, err)
			want := emptyConfig()
			if name == "QWEN_API_KEY_FILE" {
				want.apiKey, want.apiKeyFile = tt.apiKey, file
			} else {
				want.proxyKeys, want.proxyKeysFile = proxyKeys(tt.proxyKeys...), file
			}
			wantEqual(t, tt.name+": "+name, want, got, compareConfigs)
		}
	}
	for _, name := range []string{"QWEN_API_KEY_FILE", "PROXY_API_KEYS_FILE"} {
		wantProblems(t, map[string]string{name: dir}, fmt.Sprintf("%s=%q: want a readable file", name, dir))
	}
}

func TestConfigTLSFiles(t *testing.T) {
	cert, key := certificate(t)
	_, otherKey := certificate(t)
	c, err := loadConfig(lookup(map[string]string{"ENABLE_TLS": "true", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key}))
	fatalIf(t, err)
	want := emptyConfig()
	want.tls, want.certFile, want.keyFile = true, cert, key
	wantEqual(t, "config", want, c, compareConfigs)
	for _, tt := range []struct{ name, cert, key string }{
		{"no certificate", "", key},
		{"no key", cert, ""},
		{"neither", "", ""},
		{"a missing certificate", cert + "x", key},
		{"a missing key", cert, key + "x"},
		{"the two swapped", key, cert},
		{"another certificate's key", cert, otherKey},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := fmt.Sprintf("TLS_CERT_FILE=%q, TLS_KEY_FILE=%q: want a PEM certificate chain and its key", tt.cert, tt.key)
			if tt.cert == "" || tt.key == "" {
				want = `ENABLE_TLS="true": want TLS_CERT_FILE and TLS_KEY_FILE beside it`
			}
			wantProblems(t, map[string]string{"ENABLE_TLS": "true", "TLS_CERT_FILE": tt.cert, "TLS_KEY_FILE": tt.key}, want)
		})
	}
}

// settingNames returns the names of all variables that loadConfig reads, sorted.
func settingNames() []string {
	names := map[string]bool{}
	loadConfig(func(name string) (string, bool) {
		names[name] = true
		return "", false
	})
	return slices.Sorted(maps.Keys(names))
}

func TestDocsListEverySetting(t *testing.T) {
	settings, order := documentedSettings(t, "docs/configuration.md")
	slices.Sort(order)
	wantEqual(t, "the table of settings", settingNames(), order)
	for name, def := range settings {
		if def == "" {
			continue
		}
		c, err := loadConfig(lookup(map[string]string{name: def}))
		fatalIf(t, err)
		wantEqual(t, "with the default of "+name, emptyConfig(), c, compareConfigs)
	}
	short, _ := documentedSettings(t, "README.md")
	for name, def := range short {
		if want, ok := settings[name]; !ok || def != want {
			t.Errorf("the README gives %s the default %q, docs/configuration.md %q", name, def, want)
		}
	}
}

var (
	settingName    = regexp.MustCompile("`([A-Z0-9_]+)`")
	settingDefault = regexp.MustCompile("`([^`]+)`|–")
)

// documentedSettings returns the variables in the table of a page's section Settings, with their defaults,
// "" for none, and their names in the table's order. A row may hold several of both; one – stands for any number.
func documentedSettings(t *testing.T, file string) (settings map[string]string, order []string) {
	t.Helper()
	settings = map[string]string{}
	_, section, _ := strings.Cut(readFile(t, file), "\n## Settings\n")
	section, _, _ = strings.Cut(section, "\n## ")
	for line := range strings.Lines(section) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 {
			continue
		}
		names, defaults := settingName.FindAllStringSubmatch(cells[1], -1), settingDefault.FindAllStringSubmatch(cells[2], -1)
		if none := len(defaults) == 1 && defaults[0][1] == ""; len(names) != len(defaults) && !none {
			t.Errorf("%s: %d variables and %d defaults: %s", file, len(names), len(defaults), line)
			continue
		}
		for i, name := range names {
			order = append(order, name[1])
			settings[name[1]] = ""
			if i < len(defaults) {
				settings[name[1]] = defaults[i][1]
			}
		}
	}
	return settings, order
}

func TestEnvExampleIsTheTableOfSettings(t *testing.T) {
	settings, order := documentedSettings(t, "docs/configuration.md")
	var want, got []string
	for _, name := range order {
		want = append(want, "#"+name+"="+settings[name])
	}
	env := map[string]string{} // of one who uncomments every default
	before := ""
	for line := range strings.Lines(readFile(t, ".env.example")) {
		line = strings.TrimSuffix(line, "\n")
		switch assignment := envAssignment.FindStringSubmatch(line); {
		case assignment != nil:
			got = append(got, line)
			if !strings.HasPrefix(before, "# ") {
				t.Errorf("%s: want a line above it that starts with # and says what it is for", line)
			}
			if assignment[2] != "" {
				env[assignment[1]] = assignment[2]
			}
		case line != "" && line != "#" && !strings.HasPrefix(line, "# "):
			t.Errorf("%q: want an empty line, a comment that starts with # and a blank, or #NAME=default", line)
		}
		before = line
	}
	wantEqual(t, ".env.example against the table in docs/configuration.md", want, got)
	c, err := loadConfig(lookup(env))
	fatalIf(t, err)
	wantEqual(t, "config with all of .env.example", emptyConfig(), c, compareConfigs)
}

// envAssignment is a variable in .env.example, commented out.
var envAssignment = regexp.MustCompile(`^#([A-Z0-9_]+)=(.*)$`)
