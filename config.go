package main

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A config holds every setting, validated. The README's table says what each is for.
type config struct {
	host     string // bind address without port, or "unix:" and a path
	port     int    // 0 picks a free one
	tls      bool
	certFile string
	keyFile  string
	tlsErr   error // why the two files can't be used; nil where TLS is off

	logLevel  slog.Level
	logFormat string // "json" or "text"
	debug     bool   // per-request detail in the log
	demo      bool   // a stand-in answers in Qwen's place
	greet     bool   // whoever started the program sits at a terminal and reads

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
	apiKeyErr  error // why there is no usable key where one is set

	defaultModel string // never an alias
	aliases      map[string]string
	models       []string // nil is the built-in list

	proxyKeys      []string // nil is open
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
	e := &env{lookup: lookup}
	c := &config{
		host:     e.host("SERVER_HOST", "0.0.0.0"),
		port:     int(e.integer("SERVER_PORT", 8080, 0, 65535)),
		tls:      e.boolean("ENABLE_TLS", false),
		certFile: e.text("TLS_CERT_FILE", ""),
		keyFile:  e.text("TLS_KEY_FILE", ""),

		logLevel:  e.level("LOG_LEVEL", slog.LevelInfo),
		logFormat: e.oneOf("LOG_FORMAT", "json", "text"),
		debug:     e.boolean("DEBUG_MODE", false),

		rateLimit: e.rate("RATE_LIMIT_RPS", 10),
		rateBurst: int(e.integer("RATE_LIMIT_BURST", 20, 1, 1_000_000)),

		readTimeout:     e.duration("READ_TIMEOUT", 30*time.Second),
		writeTimeout:    e.duration("WRITE_TIMEOUT", 30*time.Second),
		shutdownDelay:   e.durationOrOff("SHUTDOWN_DELAY", 0),
		shutdownTimeout: e.duration("SHUTDOWN_TIMEOUT", 30*time.Second),
		upstreamTimeout: e.duration("UPSTREAM_TIMEOUT", 10*time.Minute),
		idleTimeout:     e.duration("STREAM_IDLE_TIMEOUT", 5*time.Minute),
		keepAlive:       e.durationOrOff("SSE_KEEPALIVE", 15*time.Second),

		maxBody:     e.integer("MAX_BODY_BYTES", 32<<20, 1, math.MaxInt64),
		maxBuffered: e.integer("MAX_BUFFERED_BYTES", 256<<20, 1, math.MaxInt64),

		qwenDir:       e.directory("QWEN_DIR", ".qwen"),
		refreshBuffer: e.duration("TOKEN_REFRESH_BUFFER", 5*time.Minute),
		oauthBase:     e.url("QWEN_OAUTH_BASE_URL", "https://chat.qwen.ai"),
		oauthClientID: e.text("QWEN_OAUTH_CLIENT_ID", "f0304373b74a44d2b584a3fb70ca9e56"),
		oauthScope:    e.text("QWEN_OAUTH_SCOPE", "openid profile email model.completion"),

		apiBase: e.url("API_BASE_URL", ""),

		defaultModel: e.model("DEFAULT_MODEL", "qwen3-coder-plus"),
		aliases:      e.aliases("MODEL_ALIASES"),
		models:       e.models("MODELS"),

		trustedProxies: e.prefixes("TRUSTED_PROXIES"),
		corsOrigins:    e.origins("CORS_ALLOWED_ORIGINS"),
	}
	c.apiKey, c.apiKeyFile, c.apiKeyErr = e.apiKey("QWEN_API_KEY", "QWEN_API_KEY_FILE")
	c.proxyKeys, c.proxyKeysFile = e.proxyKeys("PROXY_API_KEYS", "PROXY_API_KEYS_FILE")

	if c.debug {
		c.logLevel = min(c.logLevel, slog.LevelDebug)
	}
	if model, ok := c.aliases[c.defaultModel]; ok {
		c.defaultModel = model
	}
	if c.maxBuffered < c.maxBody {
		e.problem("MAX_BUFFERED_BYTES", strconv.FormatInt(c.maxBuffered, 10),
			fmt.Sprintf("at least MAX_BODY_BYTES, which is %d", c.maxBody))
	}
	if c.tls {
		if c.certFile == "" || c.keyFile == "" {
			c.tlsErr = errors.New(`ENABLE_TLS="true": want TLS_CERT_FILE and TLS_KEY_FILE beside it, both PEM files`)
		} else if _, err := tls.LoadX509KeyPair(c.certFile, c.keyFile); err != nil {
			c.tlsErr = fmt.Errorf("TLS_CERT_FILE=%q, TLS_KEY_FILE=%q: want a PEM certificate chain and its key: %w", c.certFile, c.keyFile, err)
		}
	}
	return c, errors.Join(e.errs...)
}

// maxEnvFile bounds the bytes of a .env file.
const maxEnvFile = 1 << 20

// readEnvFile returns the settings in file, nil where there is no such file: NAME=value lines, where # begins a comment
// and a value may be in quotes. Its error joins the problems, one a line, and shows no value. The settings of the good
// lines are returned all the same.
func readEnvFile(file string) (map[string]string, error) {
	info, err := os.Stat(file)
	switch {
	case file == "", errors.Is(err, fs.ErrNotExist), err == nil && info.IsDir(): // Python environments have that name too
		return nil, nil
	case err == nil && !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s: want a regular file", file)
	case err == nil && info.Size() > maxEnvFile:
		return nil, fmt.Errorf("%s: want at most %d bytes", file, maxEnvFile)
	case err != nil:
		return nil, err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	settings, n := map[string]string{}, 0
	var errs []error
	for line := range strings.Lines(strings.TrimPrefix(string(b), "\ufeff")) { // some editors of Windows put a BOM there
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		name = strings.TrimSpace(name)
		if ok = ok && variable(name); ok {
			value, ok = unquote(strings.TrimSpace(value))
		}
		if !ok {
			errs = append(errs, fmt.Errorf(`%s, line %d: want NAME=value, NAME="value" or a comment (the line is not shown)`, file, n))
			continue
		}
		settings[name] = value
	}
	return settings, errors.Join(errs...)
}

// unquote returns the value that s, the right side of a .env line, stands for, and whether it is well-formed.
func unquote(s string) (string, bool) {
	if s == "" || s[0] != '"' && s[0] != '\'' {
		for i := range s {
			if s[i] == '#' && (i == 0 || s[i-1] == ' ' || s[i-1] == '\t') {
				return strings.TrimSpace(s[:i]), true
			}
		}
		return s, true
	}
	value, rest, ok := strings.Cut(s[1:], s[:1])
	rest = strings.TrimSpace(rest)
	return value, ok && (rest == "" || rest[0] == '#')
}

// variable reports whether s can be the name of an environment variable.
func variable(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_')
	})
}

// addr returns the network and address to listen on.
func (c *config) addr() (network, address string) {
	if path, ok := strings.CutPrefix(c.host, "unix:"); ok {
		return "unix", path
	}
	return "tcp", net.JoinHostPort(c.host, strconv.Itoa(c.port))
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

// problem records that key has a value which is not what is wanted.
func (e *env) problem(key, value, want string) {
	e.errs = append(e.errs, fmt.Errorf("%s=%q: want %s", key, value, want))
}

func (e *env) text(key, def string) string {
	s := e.get(key)
	if s == "" {
		return def
	}
	if !printable(s) {
		e.problem(key, s, "text without control characters")
	}
	return s
}

func (e *env) boolean(key string, def bool) bool {
	s := e.get(key)
	if s == "" {
		return def
	}
	b, err := strconv.ParseBool(strings.ToLower(s))
	if err != nil {
		e.problem(key, s, "true or false")
	}
	return b
}

// oneOf returns the value of key, which is one of values in any case; the first is the default.
func (e *env) oneOf(key string, values ...string) string {
	s := strings.ToLower(e.get(key))
	if s == "" {
		return values[0]
	}
	if !slices.Contains(values, s) {
		e.problem(key, s, strings.Join(values, " or "))
	}
	return s
}

func (e *env) integer(key string, def, low, high int64) int64 {
	s := e.get(key)
	if s == "" {
		return def
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < low || n > high {
		want := fmt.Sprintf("a whole number from %d to %d", low, high)
		if high == math.MaxInt64 {
			want = fmt.Sprintf("a whole number of at least %d", low)
		}
		e.problem(key, s, want)
		return def
	}
	return n
}

func (e *env) rate(key string, def float64) float64 {
	s := e.get(key)
	if s == "" {
		return def
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil || !(f == 0 || f >= 1e-6 && f <= 1e6) { // NaN fails every comparison
		e.problem(key, s, "requests a second such as 10 or 0.5, at most 1000000, or 0 for no limit")
		return def
	}
	return f
}

// duration returns the value of key, or def where it is unset.
func (e *env) duration(key string, def time.Duration) time.Duration {
	if d := e.durationOrOff(key, def); d > 0 {
		return d
	}
	e.problem(key, e.get(key), "a positive duration such as 30s or 5m")
	return def
}

// durationOrOff is duration, with 0 allowed.
func (e *env) durationOrOff(key string, def time.Duration) time.Duration {
	s := e.get(key)
	if s == "" {
		return def
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		e.problem(key, s, "a duration with its unit, such as 30s or 5m")
		return def
	}
	return d
}

func (e *env) level(key string, def slog.Level) slog.Level {
	s := e.get(key)
	switch strings.ToLower(s) {
	case "":
		return def
	case "debug":
		return slog.LevelDebug
	case "info":
		return slog.LevelInfo
	case "warn":
		return slog.LevelWarn
	case "error":
		return slog.LevelError
	}
	e.problem(key, s, "debug, info, warn or error")
	return def
}

func (e *env) host(key, def string) string {
	s := e.get(key)
	if s == "" {
		return def
	}
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		if path == "" || !printable(path) {
			e.problem(key, s, "a path behind unix:, such as unix:/run/qwen-go-proxy.sock")
		}
		return s
	}
	host := strings.TrimSuffix(strings.TrimPrefix(s, "["), "]") // an IPv6 address as in a URL
	if _, err := netip.ParseAddr(host); err != nil && !hostname(host) {
		e.problem(key, s, "an IP address, a host name, or unix:/path (the port goes into SERVER_PORT)")
	}
	return host
}

// directory returns the value of key with a leading ~/ replaced by the home directory.
func (e *env) directory(key, def string) string {
	s := e.text(key, def)
	rest, ok := strings.CutPrefix(s, "~")
	if !ok || rest != "" && rest[0] != '/' && rest[0] != filepath.Separator {
		return s
	}
	home, err := os.UserHomeDir()
	if err != nil {
		e.errs = append(e.errs, fmt.Errorf("%s=%q: want a path without ~, since the home directory is unknown: %w", key, s, err))
		return s
	}
	return filepath.Join(home, rest)
}

// url returns the value of key as an absolute http or https URL without a trailing slash, or nil where
// both it and def are empty.
func (e *env) url(key, def string) *url.URL {
	s := e.get(key)
	if s == "" {
		s = def
	}
	if s == "" {
		return nil
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		e.problem(key, "…", "a URL such as https://host/v1") // url.Parse's error and the value may hold a password
		return nil
	case u.User != nil:
		e.problem(key, showable(s), "a URL without user and password")
	case u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "":
		e.problem(key, showable(s), "a URL that starts with https:// (or http://) and a host")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		e.problem(key, u.Scheme+"://"+u.Host+u.Path+"…", "a URL without ? and #")
	}
	u.Path, u.RawPath = strings.TrimRight(u.Path, "/"), ""
	return u
}

// showable returns s, or … where the URLs in it may hold a password or a key.
func showable(s string) string {
	if strings.ContainsAny(s, "@?#") {
		return "…"
	}
	return s
}

func (e *env) list(key string) []string {
	var items []string
	for item := range strings.SplitSeq(e.get(key), ",") {
		if item = strings.TrimSpace(item); item != "" {
			items = append(items, item)
		}
	}
	return items
}

func (e *env) model(key, def string) string {
	s := e.text(key, def)
	if strings.ContainsAny(s, ", ") {
		e.problem(key, s, "one model id")
	}
	return s
}

func (e *env) models(key string) []string {
	items := e.list(key)
	if e.get(key) != "" && len(items) == 0 {
		e.problem(key, e.get(key), "comma-separated model ids")
	}
	for _, id := range items {
		if !printable(id) || strings.Contains(id, " ") {
			e.problem(key, id, "model ids without blanks and control characters")
		}
	}
	return items
}

// aliases returns the value of key: models by their aliases.
func (e *env) aliases(key string) map[string]string {
	pairs := map[string]string{}
	for _, item := range e.list(key) {
		from, to, ok := strings.Cut(item, "=")
		from, to = strings.TrimSpace(from), strings.TrimSpace(to)
		if !ok || from == "" || to == "" || !printable(item) {
			e.problem(key, item, "alias=model pairs such as gpt-4o=qwen3.7-plus")
			continue
		}
		if _, dup := pairs[from]; dup {
			e.problem(key, item, "each alias once")
		}
		pairs[from] = to
	}
	for _, from := range slices.Sorted(maps.Keys(pairs)) {
		if _, alias := pairs[pairs[from]]; alias {
			e.problem(key, from+"="+pairs[from], "a model, not another alias, behind =")
		}
	}
	return pairs
}

func (e *env) prefixes(key string) []netip.Prefix {
	var prefixes []netip.Prefix
	for _, item := range e.list(key) {
		p, err := netip.ParsePrefix(item)
		if err != nil {
			a, addrErr := netip.ParseAddr(item)
			if addrErr != nil {
				e.problem(key, item, "IP addresses or CIDRs such as 10.0.0.0/8")
				continue
			}
			a = a.Unmap()
			p = netip.PrefixFrom(a, a.BitLen())
		}
		prefixes = append(prefixes, p.Masked())
	}
	return prefixes
}

func (e *env) origins(key string) []string {
	items := e.list(key)
	if e.get(key) != "" && len(items) == 0 {
		e.problem(key, e.get(key), "comma-separated origins, or *")
	}
	for i, item := range items {
		if item == "*" {
			if len(items) > 1 {
				e.problem(key, showable(e.get(key)), "either * or a list of origins")
			}
			continue
		}
		u, err := url.Parse(item)
		if err != nil || u.Scheme == "" || u.Host == "" || strings.Contains(u.Host, "*") || u.User != nil || u.Opaque != "" ||
			strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
			e.problem(key, showable(item), "origins such as https://app.example.com, or *")
			continue
		}
		items[i] = strings.ToLower(u.Scheme + "://" + u.Host)
		if port, ok := map[string]string{"http": ":80", "https": ":443"}[u.Scheme]; ok {
			items[i] = strings.TrimSuffix(items[i], port) // browsers leave it out (RFC 6454 §6.2)
		}
	}
	return items
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

// readKeyFile returns the key that file holds with nothing else but white space.
func readKeyFile(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	key := strings.TrimSpace(string(b))
	switch {
	case key == "":
		return "", errors.New("the file is empty")
	case !validKey(key):
		return "", errors.New("the file holds more than one key of printable characters")
	case quoted(key):
		return "", errors.New("the key is in quotes: write it without them")
	}
	return key, nil
}

// proxyKeys returns the keys that clients must send, nil for none, and the file they came from.
func (e *env) proxyKeys(key, fileKey string) (keys []string, file string) {
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
		keys = e.list(key)
		if len(keys) == 0 {
			e.problem(key, "", "comma-separated keys, or the variable unset to need none")
		}
		if !allValidKeys(keys) {
			e.errs = append(e.errs, fmt.Errorf("%s: want keys of printable characters without blanks (the value is not shown)", key))
		}
	}
	return keys, file
}

// readProxyKeys returns the keys in file, one a line; blank lines and lines that start with # do not count.
func readProxyKeys(file string) ([]string, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var keys []string
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line != "" && !strings.HasPrefix(line, "#") {
			keys = append(keys, line)
		}
	}
	switch {
	case lines.Err() != nil:
		return nil, lines.Err()
	case len(keys) == 0:
		return nil, errors.New("the file holds no key")
	case !allValidKeys(keys):
		return nil, errors.New("a key has blanks or unprintable characters")
	}
	return keys, nil
}

func allValidKeys(keys []string) bool {
	return !slices.ContainsFunc(keys, func(k string) bool { return !validKey(k) })
}

// validKey reports whether s can stand behind "Bearer " in a header.
func validKey(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

// quoted reports whether s begins or ends with a quote: Docker, for one, leaves those of its --env-file in the value.
func quoted(s string) bool {
	return strings.Trim(s, "\"'") != s
}

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
