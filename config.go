package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A config holds every setting, validated. docs/configuration.md says what each is for.
type config struct {
	host     string // bind address without port, or "unix:" and a path
	port     int    // 0 picks a free one
	tls      bool
	certFile string
	keyFile  string
	tlsErr   error // why the two files can't be used; nil if TLS is off

	logLevel  slog.Level
	logFormat string // "json" or "text"
	debug     bool   // per-request detail in the log
	demo      bool   // a stand-in answers in Qwen's place
	greet     bool   // the log goes to a terminal, and a user reads it
	colors    bool   // that terminal takes colors

	noBrowser    bool   // login opens no browser
	envFile      string // the file that settings were read from; "" for none
	notifySocket string // of the service manager; "" for none

	rateLimit float64 // requests a second and client; 0 is no limit
	rateBurst int

	readTimeout     time.Duration
	writeTimeout    time.Duration
	shutdownDelay   time.Duration // SHUTDOWN_DELAY; 0 is none
	shutdownTimeout time.Duration
	upstreamTimeout time.Duration
	idleTimeout     time.Duration // STREAM_IDLE_TIMEOUT
	keepAlive       time.Duration // SSE_KEEPALIVE; 0 is off

	maxBody     int64 // bytes of one request's body
	maxBuffered int64 // bytes of all requests' bodies together

	qwenDir       string
	refreshBuffer time.Duration
	oauthBase     *url.URL
	oauthClientID string
	oauthScope    string

	apiBase    *url.URL // nil: what the credentials or the kind of key say
	apiKey     string   // "" is OAuth
	apiKeyFile string
	apiKeyErr  error // why the key that is set can't be used

	defaultModel string // never an alias
	aliases      map[string]string
	models       []string // nil is the built-in list

	proxyKeys      []proxyKey // nil is open
	proxyKeysFile  string
	trustedProxies []netip.Prefix
	corsOrigins    []string // nil is the loopback origins
}

// loadConfig reads what the server needs: every setting, and the files that they name. Its error joins every problem
// found, one a line, each naming the variable, the value and what is wanted.
func loadConfig(lookup func(string) (string, bool)) (*config, error) {
	c, err := loadSettings(lookup)
	return c, errors.Join(err, c.apiKeyErr, c.tlsErr)
}

// loadSettings is loadConfig without the files: whether they can be used is in the config.
func loadSettings(lookup func(string) (string, bool)) (*config, error) {
	const (
		boolean   = "true or false"
		positive  = "a positive duration such as 30s or 5m"
		anyLength = "a duration such as 30s or 5m, or 0"
		text      = "text without control characters"
		baseURL   = "a URL such as https://host/v1, without user, password, ? and #"
		modelIDs  = "model ids without blanks and control characters"
		origins   = "origins such as https://app.example.com, or * alone"
	)
	e := &env{lookup: lookup}
	c := &config{
		host:     read(e, "SERVER_HOST", "0.0.0.0", "an IP address, a host name, or unix:/path (the port goes into SERVER_PORT)", parseHost),
		port:     int(e.integer("SERVER_PORT", 8080, 0, 65535)),
		tls:      read(e, "ENABLE_TLS", false, boolean, parseBool),
		certFile: read(e, "TLS_CERT_FILE", "", text, parseText),
		keyFile:  read(e, "TLS_KEY_FILE", "", text, parseText),

		logLevel:  read(e, "LOG_LEVEL", slog.LevelInfo, "debug, info, warn or error", parseLevel),
		logFormat: read(e, "LOG_FORMAT", "json", "json or text", parseFormat),
		debug:     read(e, "DEBUG_MODE", false, boolean, parseBool),

		rateLimit: read(e, "RATE_LIMIT_RPS", 10, "requests a second such as 10 or 0.5, at most 1000000, or 0 for no limit", parseRate),
		rateBurst: int(e.integer("RATE_LIMIT_BURST", 20, 1, 1_000_000)),

		readTimeout:     read(e, "READ_TIMEOUT", 30*time.Second, positive, parsePositive),
		writeTimeout:    read(e, "WRITE_TIMEOUT", 30*time.Second, positive, parsePositive),
		shutdownDelay:   read(e, "SHUTDOWN_DELAY", 0, anyLength, parseDuration),
		shutdownTimeout: read(e, "SHUTDOWN_TIMEOUT", 30*time.Second, positive, parsePositive),
		upstreamTimeout: read(e, "UPSTREAM_TIMEOUT", 10*time.Minute, positive, parsePositive),
		idleTimeout:     read(e, "STREAM_IDLE_TIMEOUT", 5*time.Minute, positive, parsePositive),
		keepAlive:       read(e, "SSE_KEEPALIVE", 15*time.Second, anyLength, parseDuration),

		maxBody:     e.integer("MAX_BODY_BYTES", 32<<20, 1, math.MaxInt64),
		maxBuffered: e.integer("MAX_BUFFERED_BYTES", 256<<20, 1, math.MaxInt64),

		qwenDir:       read(e, "QWEN_DIR", ".qwen", text+", and without ~ if the home directory is unknown", parseDirectory),
		refreshBuffer: read(e, "TOKEN_REFRESH_BUFFER", 5*time.Minute, positive, parsePositive),
		oauthBase:     read(e, "QWEN_OAUTH_BASE_URL", &url.URL{Scheme: "https", Host: "chat.qwen.ai"}, baseURL, parseURL),
		oauthClientID: read(e, "QWEN_OAUTH_CLIENT_ID", "f0304373b74a44d2b584a3fb70ca9e56", text, parseText),
		oauthScope:    read(e, "QWEN_OAUTH_SCOPE", "openid profile email model.completion", text, parseText),

		apiBase: read(e, "API_BASE_URL", nil, baseURL, parseURL),

		defaultModel: read(e, "DEFAULT_MODEL", "qwen3-coder-plus", "one model id", parseModel),
		aliases:      e.aliases("MODEL_ALIASES"),
		models:       readList(e, "MODELS", modelIDs, parseModel),

		trustedProxies: readList(e, "TRUSTED_PROXIES", "IP addresses or CIDRs such as 10.0.0.0/8", parsePrefix),
		corsOrigins:    readList(e, "CORS_ALLOWED_ORIGINS", origins, parseOrigin),
	}
	c.apiKey, c.apiKeyFile, c.apiKeyErr = e.apiKey("QWEN_API_KEY", "QWEN_API_KEY_FILE")
	c.proxyKeys, c.proxyKeysFile = e.proxyKeys("PROXY_API_KEYS", "PROXY_API_KEYS_FILE")

	if c.debug {
		c.logLevel = min(c.logLevel, slog.LevelDebug)
	}
	if len(c.corsOrigins) > 1 && slices.Contains(c.corsOrigins, "*") {
		e.problem("CORS_ALLOWED_ORIGINS", e.get("CORS_ALLOWED_ORIGINS"), origins)
	}
	if model, ok := c.aliases[c.defaultModel]; ok {
		c.defaultModel = model
	}
	if c.maxBuffered < c.maxBody {
		e.problem("MAX_BUFFERED_BYTES", strconv.FormatInt(c.maxBuffered, 10), fmt.Sprintf("at least MAX_BODY_BYTES, which is %d", c.maxBody))
	}
	switch {
	case !c.tls:
	case c.certFile == "" || c.keyFile == "":
		c.tlsErr = errors.New(`ENABLE_TLS="true": want TLS_CERT_FILE and TLS_KEY_FILE beside it, both PEM files`)
	default:
		if _, err := tls.LoadX509KeyPair(c.certFile, c.keyFile); err != nil {
			c.tlsErr = fmt.Errorf("TLS_CERT_FILE=%q, TLS_KEY_FILE=%q: want a PEM certificate chain and its key: %w", c.certFile, c.keyFile, err)
		}
	}
	return c, errors.Join(e.errs...)
}

// addr returns the network and address to listen on.
func (c *config) addr() (network, address string) {
	if path, ok := strings.CutPrefix(c.host, "unix:"); ok {
		return "unix", path
	}
	return "tcp", net.JoinHostPort(c.host, strconv.Itoa(c.port))
}

// envLine matches a setting in a .env file: NAME=value, where # begins a comment and the value may be in quotes.
var envLine = regexp.MustCompile(`^(\w+)\s*=\s*(?:"([^"]*)"\s*|'([^']*)'\s*|([^"'#\s].*?)(?:\s+|$)|)(?:#.*)?$`)

// readEnvFile returns the settings in file, nil if there is no such file. Its error joins the problems, one a line, and shows no
// value. The settings of the good lines are returned all the same.
func readEnvFile(file string) (map[string]string, error) {
	b, _, err := readRegular(file, math.MaxInt64)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.EISDIR): // Python environments have that name too
		return nil, nil
	case err != nil:
		return nil, err
	}
	settings := map[string]string{}
	var errs []error
	text := strings.TrimPrefix(string(b), "\ufeff") // some editors of Windows put this byte order mark there
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		m := envLine.FindStringSubmatch(line)
		switch {
		case line == "" || line[0] == '#':
		case m == nil:
			errs = append(errs, fmt.Errorf(`%s, line %d: want NAME=value, NAME="value" or a comment (the line is not shown)`, file, i+1))
		default:
			settings[m[1]] = m[2] + m[3] + m[4]
		}
	}
	return settings, errors.Join(errs...)
}

// An env reads variables and collects what is wrong with them. A variable that is set to nothing but
// white space counts as unset, except for the proxy's keys.
type env struct {
	lookup func(string) (string, bool)
	errs   []error
}

func (e *env) get(key string) string {
	s, _ := e.lookup(key)
	return strings.TrimSpace(s)
}

// problem records that key has a value which is not what is wanted. It shows no value that may be a URL with a password or key.
func (e *env) problem(key, value, want string) {
	if strings.ContainsAny(value, "@?#") {
		value = "…"
	}
	e.errs = append(e.errs, fmt.Errorf("%s=%q: want %s", key, value, want))
}

// read returns the value of key as parse understands it, or def if key is unset. If parse fails, it records what is wanted.
func read[T any](e *env, key string, def T, want string, parse func(string) (T, bool)) T {
	s := e.get(key)
	if s == "" {
		return def
	}
	v, ok := parse(s)
	if !ok {
		e.problem(key, s, want)
		return def
	}
	return v
}

// readList is read for comma-separated values, nil if key is unset.
func readList[T any](e *env, key, want string, parse func(string) (T, bool)) []T {
	var list []T
	items := e.list(key)
	for _, item := range items {
		v, ok := parse(item)
		if !ok {
			e.problem(key, item, want)
			continue
		}
		list = append(list, v)
	}
	if s := e.get(key); s != "" && len(items) == 0 {
		e.problem(key, s, want)
	}
	return list
}

// list returns the comma-separated items of key that are not blank.
func (e *env) list(key string) []string {
	var items []string
	for item := range strings.SplitSeq(e.get(key), ",") {
		if item = strings.TrimSpace(item); item != "" {
			items = append(items, item)
		}
	}
	return items
}

func (e *env) integer(key string, def, low, high int64) int64 {
	want := fmt.Sprintf("a whole number from %d to %d", low, high)
	if high == math.MaxInt64 {
		want = fmt.Sprintf("a whole number of at least %d", low)
	}
	return read(e, key, def, want, func(s string) (int64, bool) {
		n, err := strconv.ParseInt(s, 10, 64)
		return n, err == nil && n >= low && n <= high
	})
}

// aliases returns the value of key: models by their aliases.
func (e *env) aliases(key string) map[string]string {
	models := map[string]string{}
	for _, item := range e.list(key) {
		alias, model, _ := strings.Cut(item, "=")
		alias, model = strings.TrimSpace(alias), strings.TrimSpace(model)
		if _, dup := models[alias]; dup || alias == "" || model == "" || !printable(item) {
			e.problem(key, item, "alias=model pairs such as gpt-4o=qwen3.7-plus, each alias once")
		}
		models[alias] = model
	}
	for alias, model := range models {
		if _, ok := models[model]; ok && model != "" {
			e.problem(key, alias+"="+model, "a model, not another alias, behind =")
		}
	}
	return models
}

func parseText(s string) (string, bool) { return s, printable(s) }

func parseBool(s string) (bool, bool) {
	b, err := strconv.ParseBool(strings.ToLower(s))
	return b, err == nil
}

func parseLevel(s string) (slog.Level, bool) {
	var level slog.Level
	err := level.UnmarshalText([]byte(s))
	return level, err == nil
}

func parseFormat(s string) (string, bool) {
	s = strings.ToLower(s)
	return s, s == "json" || s == "text"
}

func parseRate(s string) (float64, bool) {
	f, err := strconv.ParseFloat(s, 64)
	return f, err == nil && (f == 0 || f >= 1e-6 && f <= 1e6) // NaN fails every comparison
}

func parseDuration(s string) (time.Duration, bool) {
	d, err := time.ParseDuration(s)
	return d, err == nil && d >= 0
}

func parsePositive(s string) (time.Duration, bool) {
	d, ok := parseDuration(s)
	return d, ok && d > 0
}

func parseHost(s string) (string, bool) {
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		return s, path != "" && printable(path)
	}
	host := strings.TrimSuffix(strings.TrimPrefix(s, "["), "]") // an IPv6 address as in a URL
	_, err := netip.ParseAddr(host)
	return host, err == nil || hostname(host)
}

// parseDirectory replaces a leading ~/ by the home directory.
func parseDirectory(s string) (string, bool) {
	rest, ok := strings.CutPrefix(s, "~")
	if !printable(s) || !ok || rest != "" && rest[0] != '/' && rest[0] != filepath.Separator {
		return s, printable(s)
	}
	home, err := os.UserHomeDir()
	return filepath.Join(home, rest), err == nil
}

// parseURL returns an absolute http or https URL, without slashes at its end.
func parseURL(s string) (*url.URL, bool) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, false
	}
	ok := (u.Scheme == "https" || u.Scheme == "http") && u.Hostname() != "" && u.User == nil && !strings.ContainsAny(s, "?#")
	u.Path, u.RawPath = strings.TrimRight(u.Path, "/"), ""
	return u, ok
}

func parseModel(s string) (string, bool) {
	return s, printable(s) && !strings.ContainsAny(s, ", ")
}

// parsePrefix returns a range of IP addresses, or that of one address.
func parsePrefix(s string) (netip.Prefix, bool) {
	if p, err := netip.ParsePrefix(s); err == nil {
		if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(a.Unmap(), p.Bits()-96) // clients' addresses come unmapped
		}
		return p.Masked(), true
	}
	a, err := netip.ParseAddr(s)
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen()).Masked(), err == nil
}

// parseOrigin returns an origin as browsers send it: in lower case, without the default port (RFC 6454 §6.2).
func parseOrigin(s string) (string, bool) {
	if s == "*" {
		return s, true
	}
	u, err := url.Parse(s)
	if err != nil {
		return "", false
	}
	origin := strings.ToLower(u.Scheme + "://" + u.Host)
	if port, ok := map[string]string{"http": ":80", "https": ":443"}[u.Scheme]; ok {
		origin = strings.TrimSuffix(origin, port)
	}
	rest, ok := strings.CutPrefix(strings.ToLower(s), strings.ToLower(u.Scheme+"://"+u.Host))
	return origin, ok && u.Scheme != "" && u.Host != "" && strings.Trim(rest, "/") == "" && !strings.Contains(u.Host, "*")
}

// apiKey returns the upstream's key, "" for none, and the file it came from ("" for the variable). The error says why
// the key that is set can't be used.
func (e *env) apiKey(key, fileKey string) (value, file string, err error) {
	value, file = e.get(key), e.get(fileKey)
	switch {
	case value != "" && file != "":
		err = fmt.Errorf("%s and %s: want one of the two, not both", key, fileKey)
	case file != "":
		if value, err = readKeyFile(file); err != nil {
			err = fmt.Errorf("%s=%q: want a readable file with the key and nothing else: %w", fileKey, file, err)
		}
	case value != "" && (!validKey(value) || quoted(value)):
		err = fmt.Errorf("%s: want one key of printable characters without blanks and quotes (the value is not shown)", key)
	}
	return value, file, err
}

// proxyKeys returns the keys that clients must send, nil for none, and the file they came from.
func (e *env) proxyKeys(key, fileKey string) (keys []proxyKey, file string) {
	_, set := e.lookup(key)
	_, fileSet := e.lookup(fileKey)
	file = e.get(fileKey)
	switch {
	case set && fileSet:
		e.errs = append(e.errs, fmt.Errorf("%s and %s: want one of the two, not both", key, fileKey))
	case fileSet && file == "":
		e.problem(fileKey, "", "the path of a file with one key a line, or the variable unset")
	case fileSet:
		var err error
		if keys, err = readProxyKeys(file); err != nil {
			e.errs = append(e.errs, fmt.Errorf("%s=%q: want a readable file with one key a line: %w", fileKey, file, err))
		}
	case set:
		values := e.list(key)
		if len(values) == 0 {
			e.problem(key, "", "comma-separated keys, or the variable unset to need none")
		}
		for _, value := range values {
			k, err := newProxyKey(value, "")
			if err != nil {
				e.errs = append(e.errs, fmt.Errorf("%s: %w (the value is not shown)", key, err))
				break
			}
			keys = append(keys, k)
		}
	}
	return keys, file
}

// validKey reports whether s can stand behind "Bearer " in a header.
func validKey(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

// quoted reports whether s begins or ends with a quote. Docker leaves the quotes of its --env-file in the value.
func quoted(s string) bool { return strings.Trim(s, "\"'") != s }

// printable reports whether s is free of control characters.
func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// hostname reports whether s can be a host name (RFC 1123 §2.1, and the underscores of container networks).
func hostname(s string) bool {
	return s != "" && len(s) <= 253 && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '.' || r == '_')
	})
}

// isLoopback reports whether host, without port, is this machine: localhost or a loopback address.
func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	a, err := netip.ParseAddr(host)
	return err == nil && a.Unmap().IsLoopback()
}
