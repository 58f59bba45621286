// Command qwen-go-proxy puts Alibaba's Qwen models behind OpenAI-compatible endpoints: it holds and renews
// the credentials, and streams every answer through untouched.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/signal"
	"path"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills at once
	os.Exit(run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// A command is one of the program's, as the usage shows it.
type command struct {
	name, summary, help string
	flags               func(*flag.FlagSet) // nil for none
	run                 func(ctx context.Context, cfg *config, stdout, stderr io.Writer) int
}

func commands() []command {
	var login loginOptions
	var demo demoOptions
	return []command{
		{name: "serve", summary: "serve the proxy (the default); sign in where there are no credentials yet", run: serveCommand,
			help: "It is configured by environment variables alone; the README lists them. Where there are no credentials yet, it\nprints a link to sign in with and serves all the same."},
		{name: "login", summary: "sign in to Qwen at the terminal and store the credentials", run: loginCommand(&login), flags: login.define,
			help: "It prints a link and a code, opens a browser where there is one, and waits. A running server of the same QWEN_DIR\nuses the credentials within a few seconds. The exit status is 1 where the sign-in was denied, expired or could\nnot be stored."},
		{name: "logout", summary: "sign out: replace the stored credentials by an empty object", run: logoutCommand,
			help: "Running servers of the same QWEN_DIR, and Qwen Code, are signed out with it."},
		{name: "status", summary: "say who is signed in and how the server is; exit status 0 only where usable", run: statusCommand,
			help: "It never prints a token."},
		{name: "healthcheck", summary: "ask the server of the same environment for /health; exit status 0 or 1", run: healthcheckCommand,
			help: "For containers without a shell."},
		{name: "demo", summary: "serve with a stand-in for Qwen: no account, no network, nothing stored", run: demoCommand(&demo), flags: demo.define,
			help: "Everything works as in serve, against a stand-in for Qwen inside the program: the sign-in approves itself after a\nfew seconds, and the answers are canned. Credentials go to a temporary directory.\n\n" +
				"Models of some names fail, to try out what a client does then: error-500 answers with status 500, any from error-400\nto error-599 likewise, and error-midstream breaks off in the middle of a stream."},
		{name: "version", summary: "print version, commit, build date and Go version", run: versionCommand},
	}
}

// run executes one command and returns its exit status: 0 done, 1 failed, 2 wrong usage or configuration.
func run(ctx context.Context, args []string, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	terminal := isTerminal(stderr)
	stderr = &syncWriter{w: stderr} // log lines and prompts come from several goroutines
	name := "serve"
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		name, args = args[0], args[1:]
	} else if len(args) > 0 && (args[0] == "-h" || args[0] == "-help" || args[0] == "--help") {
		usage(stdout)
		return 0
	}
	all := commands()
	i := slices.IndexFunc(all, func(c command) bool { return c.name == name })
	if i < 0 {
		fmt.Fprintf(stderr, "qwen-go-proxy: unknown command %q\n\n", name)
		usage(stderr)
		return 2
	}
	c := all[i]
	flags := flag.NewFlagSet(c.name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	if c.flags != nil {
		c.flags(flags)
	}
	err := flags.Parse(args)
	if err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		c.explain(stdout, flags)
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "qwen-go-proxy %s: %v\n\n", c.name, err)
		usage(stderr)
		return 2
	case c.name == "version": // needs no configuration, and a wrong one is not its business
		return c.run(ctx, nil, stdout, stderr)
	}
	cfg, err := loadConfig(lookup)
	if err != nil {
		fmt.Fprintf(stderr, "qwen-go-proxy: the configuration is wrong:\n%v\n", err)
		return 2
	}
	cfg.notifySocket, _ = lookup("NOTIFY_SOCKET") // of the service manager's making, not a setting
	if format, _ := lookup("LOG_FORMAT"); terminal && strings.TrimSpace(format) == "" {
		cfg.greet, cfg.logFormat = true, "text"
	}
	return c.run(ctx, cfg, stdout, stderr)
}

// explain writes what -h says of c.
func (c *command) explain(w io.Writer, flags *flag.FlagSet) {
	fmt.Fprintf(w, "usage: qwen-go-proxy %s\n\n%s.\n", c.name, strings.ToUpper(c.summary[:1])+c.summary[1:])
	if c.help != "" {
		fmt.Fprintf(w, "\n%s\n", c.help)
	}
	if c.flags != nil {
		fmt.Fprintln(w)
		flags.SetOutput(w)
		flags.PrintDefaults()
	}
}

func usage(w io.Writer) {
	fmt.Fprint(w, "usage: qwen-go-proxy [command]\n\nAn OpenAI-compatible server in front of Alibaba's Qwen models.\n\ncommands:\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-12s %s\n", c.name, c.summary)
	}
	fmt.Fprint(w, "\nqwen-go-proxy command -h explains a command. Environment variables configure everything; the README lists them.\n")
}

// A syncWriter makes w safe for concurrent use, one whole Write at a time.
type syncWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *syncWriter) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(p)
}

// What the linker puts in at a release; a plain go build knows them from its version control.
var (
	buildVersion string
	buildCommit  string
	buildDate    string
)

// A versionInfo says what is running.
type versionInfo struct{ Version, Commit, Date, Go string }

var version = sync.OnceValue(func() versionInfo {
	v := versionInfo{Version: buildVersion, Commit: buildCommit, Date: buildDate, Go: runtime.Version()}
	if info, ok := debug.ReadBuildInfo(); ok {
		if v.Version == "" && info.Main.Version != "(devel)" {
			v.Version = info.Main.Version
		}
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				v.Commit = cmp.Or(v.Commit, s.Value)
			case "vcs.time":
				v.Date = cmp.Or(v.Date, s.Value)
			}
		}
	}
	v.Version = cmp.Or(v.Version, "dev")
	v.Commit = cmp.Or(v.Commit, "unknown")
	v.Date = cmp.Or(v.Date, "unknown")
	return v
})

// userAgent is how the proxy introduces itself to Qwen.
var userAgent = "qwen-go-proxy/" + version().Version

func versionCommand(_ context.Context, _ *config, stdout, _ io.Writer) int {
	v := version()
	fmt.Fprintf(stdout, "qwen-go-proxy %s\ncommit %s\nbuilt %s\n%s %s/%s\n", v.Version, v.Commit, v.Date, v.Go, runtime.GOOS, runtime.GOARCH)
	return 0
}

func newLogger(cfg *config, w io.Writer) *slog.Logger {
	opts := &slog.HandlerOptions{Level: cfg.logLevel}
	if cfg.greet {
		opts.ReplaceAttr = clockTime
	}
	if cfg.logFormat == "text" {
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}

func serveCommand(ctx context.Context, cfg *config, _, stderr io.Writer) int {
	return serve(ctx, cfg, stderr, func(base string, tokens *tokenSource) {
		if cfg.greet {
			greet(stderr, cfg, base, tokens)
		} else if cfg.port == 0 {
			fmt.Fprintf(stderr, "Listening on %s\n", base)
		}
	})
}

// demoOptions are the flags of demo.
type demoOptions struct {
	key bool
}

func (o *demoOptions) define(flags *flag.FlagSet) {
	flags.BoolVar(&o.key, "key", false, "serve as with an API key instead of a sign-in; /v1/messages is there with one alone")
}

// demoKey is the API key that the stand-in of demo -key takes.
const demoKey = "sk-demo"

// demoCommand serves with a standIn in Qwen's place, over real sockets and on the same code path.
func demoCommand(o *demoOptions) func(ctx context.Context, cfg *config, stdout, stderr io.Writer) int {
	return func(ctx context.Context, cfg *config, _, stderr io.Writer) int {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			fmt.Fprintf(stderr, "qwen-go-proxy demo: %v\n", err)
			return 1
		}
		standIn := newStandIn()
		qwen := &http.Server{Handler: standIn, ReadHeaderTimeout: 10 * time.Second}
		dir, err := os.MkdirTemp("", "qwen-go-proxy-demo-")
		if err != nil {
			fmt.Fprintf(stderr, "qwen-go-proxy demo: %v\n", err)
			return 1
		}
		defer os.RemoveAll(dir)

		// What would lead to the real Qwen is put aside.
		cfg.qwenDir = dir
		cfg.oauthBase = &url.URL{Scheme: "http", Host: ln.Addr().String()}
		cfg.apiBase, cfg.apiKey, cfg.apiKeyFile = nil, "", ""
		first, last := "The sign-in below approves itself after a few seconds. Then try:", ""
		if o.key {
			standIn.key, cfg.apiKey = demoKey, demoKey
			cfg.apiBase = &url.URL{Scheme: "http", Host: ln.Addr().String(), Path: "/compatible-mode/v1"}
			first = "It serves as with an API key. Try:"
		}
		go qwen.Serve(ln)
		defer qwen.Close()
		return serve(ctx, cfg, stderr, func(base string, _ *tokenSource) {
			if o.key {
				last = "Base URL for Anthropic clients: " + base + " (any API key)\n"
			}
			fmt.Fprintf(stderr, `
This is a demo: a stand-in inside the program answers in Qwen's place.
No account, no network, no model.

%[2]s

  curl %[1]s/v1/chat/completions -d '{"messages":[{"role":"user","content":"Hello"}]}'
  curl -N %[1]s/v1/chat/completions -d '{"stream":true,"messages":[{"role":"user","content":"Hello"}]}'

Base URL for OpenAI clients: %[1]s/v1 (any API key)
%[3]s
`, base, first, last)
			if cfg.greet {
				fmt.Fprint(stderr, "Ctrl-C stops it.\n\n")
			}
		})
	}
}

// ballast is how much more garbage than by itself the collector lets gather, in bytes. It goes by the size of the heap, which
// is so small here that it would run after every 4 MB, all the time under load. An array of this size, never touched and so
// without memory of its own, counts as part of the heap: 6 % less CPU a request. GOGC=400 does the same, and would let
// thousands of streams grow to five times their memory.
const ballast = 8 << 20

// serve runs the server until ctx ends and returns the exit status. It calls listening with a URL to reach it by.
func serve(ctx context.Context, cfg *config, stderr io.Writer, listening func(base string, tokens *tokenSource)) int {
	heap := make([]byte, ballast)
	defer runtime.KeepAlive(heap)
	log := newLogger(cfg, stderr)
	ln, err := listen(cfg)
	if err != nil {
		fmt.Fprintf(stderr, "qwen-go-proxy: %v\n", err)
		return 1
	}
	m := &metrics{started: time.Now()}
	tokens := newSource(cfg, log, stderr)
	keys := newAccess(cfg, log)
	h := &health{tokens: tokens, metrics: m}
	requests, cutOff := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cutOff(nil)
	srv := &http.Server{
		Handler:           newHandler(cfg, log, tokens, keys, m, h, newTransport()),
		ReadHeaderTimeout: cfg.readTimeout,
		// No ReadTimeout and no WriteTimeout: they bound the whole request and would cut long streams. The
		// deadlines of bodies and writes move with each piece.
		IdleTimeout:    2 * time.Minute,
		MaxHeaderBytes: 64 << 10,
		// net/http reserves a frame's announced length before any of it comes, by default up to 1 MiB a connection.
		HTTP2:                        &http.HTTP2Config{MaxReadFrameSize: 16 << 10},
		BaseContext:                  func(net.Listener) context.Context { return requests },
		ConnContext:                  func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		DisableGeneralOptionsHandler: true,
	}
	if cfg.tls {
		srv.TLSConfig = tlsConfig(cfg, log)
	}
	reload := func() {
		lookNow(ctx, keys.looks)
		lookNow(ctx, tokens.looks)
		if cfg.tls {
			srv.TLSConfig.GetCertificate(nil)
		}
	}

	base := baseURL(cfg, ln.Addr())
	hangups := hangups() // before anybody can know that the program runs, and close its terminal
	listening(base, tokens)
	log.Info("listening", "address", ln.Addr().String(), "url", base, "version", version().Version)
	warn(cfg, log, ln.Addr())

	served := make(chan error, 1)
	go func() {
		if cfg.tls {
			served <- srv.ServeTLS(ln, "", "")
		} else {
			served <- srv.Serve(ln)
		}
	}()
	running, stopTokens := context.WithCancel(context.WithoutCancel(ctx))
	go keys.follow(running, cfg.proxyKeys)
	tokensDone := make(chan struct{})
	go func() {
		defer close(tokensDone)
		tokens.run(running)
	}()
	defer func() {
		stopTokens()
		<-tokensDone // a refresh under way is stored first
	}()
	manager := &notifier{socket: cfg.notifySocket, log: log}
	managerTold := make(chan struct{})
	go func() {
		defer close(managerTold)
		manager.run(ctx, tokens, base, ln.Addr().Network() == "tcp" && !keys.required(), hangups, reload)
	}()

	select {
	case err := <-served:
		log.Error("the server failed", "error", err)
		return 1
	case <-ctx.Done():
	}
	h.stopping.Store(true)
	<-managerTold
	manager.stopping(m.inFlight.Load(), cfg.shutdownDelay+cfg.shutdownTimeout)
	if cfg.shutdownDelay > 0 {
		// Closing the listener resets connections that the kernel has taken and nobody has accepted. A load balancer must not
		// send their requests again, since it can't know that nobody has read them, so it has to stop sending them before.
		log.Info("not ready any more, and serving on until load balancers have noticed", "delay", cfg.shutdownDelay.String())
		select {
		case err := <-served:
			log.Error("the server failed", "error", err)
			return 1
		case <-time.After(cfg.shutdownDelay):
		}
	}
	log.Info("shutting down", "cause", context.Cause(ctx), "in_flight", m.inFlight.Load(), "timeout", cfg.shutdownTimeout.String())
	deadline, cancel := context.WithTimeout(context.Background(), cfg.shutdownTimeout)
	defer cancel()
	if err := srv.Shutdown(deadline); err != nil {
		log.Warn("requests were still in flight and are cut off", "in_flight", m.inFlight.Load())
		cutOff(errShuttingDown) // streams end with an error event
		last, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if srv.Shutdown(last) != nil {
			srv.Close()
		}
	}
	log.Info("stopped")
	return 0
}

// newSource returns the source of tokens that cfg asks for.
func newSource(cfg *config, log *slog.Logger, prompt io.Writer) *tokenSource {
	if cfg.apiKey != "" {
		return newKeySource(cfg, keyBase(cfg), log)
	}
	return newTokenSource(newOAuthClient(cfg), &credentialStore{dir: cfg.qwenDir}, cfg, log, prompt)
}

func newOAuthClient(cfg *config) *oauthClient {
	client := &http.Client{
		Transport: newTransport(),
		// A redirect would carry refresh tokens elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return &oauthClient{http: client, base: cfg.oauthBase, clientID: cfg.oauthClientID, scope: cfg.oauthScope}
}

// keyBase returns the base URL that the API key goes to: where none is set, international pay as you go.
func keyBase(cfg *config) *url.URL {
	if cfg.apiBase != nil {
		return cfg.apiBase
	}
	return &url.URL{Scheme: "https", Host: "dashscope-intl.aliyuncs.com", Path: "/compatible-mode/v1"}
}

// planMismatch returns what is wrong between the kind of key and the host that it goes to, "" for nothing. Only
// Alibaba's own hosts are judged.
func planMismatch(key string, base *url.URL) string {
	host := base.Hostname()
	if !strings.HasSuffix(host, ".aliyuncs.com") {
		return ""
	}
	planHost := strings.HasPrefix(host, "coding.") || strings.HasPrefix(host, "coding-intl.") || strings.HasPrefix(host, "token-plan.")
	planKey := strings.HasPrefix(key, "sk-sp-")
	switch {
	case planKey && !planHost:
		return "the key looks like a Coding Plan or Token Plan key (sk-sp-…), and the base URL is for pay as you go: set API_BASE_URL to the plan's"
	case !planKey && planHost:
		return "the key looks like a pay-as-you-go key, and the base URL is that of a Coding Plan or Token Plan: take the plan's key, or another API_BASE_URL"
	}
	return ""
}

// newHandler returns the whole server's handler. From the outside in: track (id, log, panics), guard (names and origins,
// the client's address), the routes, the limiter, the key, the endpoint.
func newHandler(cfg *config, log *slog.Logger, tokens *tokenSource, keys *access, m *metrics, h *health, transport http.RoundTripper) http.Handler {
	p := newProxy(cfg, tokens, m, transport)
	models := newModels(cfg, tokens, transport, log)
	limiter := newRateLimiter(cfg.rateLimit, cfg.rateBurst)
	limited := func(next http.HandlerFunc) http.Handler { return keys.admit(limiter, next) }
	keyed := func(next http.HandlerFunc) http.Handler { return keys.admit(nil, next) }
	auth := http.HandlerFunc(tokens.auth)
	if !keys.required() {
		auth = private(auth)
	}

	rt := &router{metrics: m, full: http.NewServeMux(), bare: http.NewServeMux()}
	rt.handle("GET /{$}", http.HandlerFunc(h.root))
	rt.handle("GET /health", http.HandlerFunc(h.live))
	rt.handle("GET /health/ready", http.HandlerFunc(h.ready))
	rt.handle("GET /health/detailed", keyed(h.detailed))
	rt.handle("GET /metrics", keyed(h.prometheus))
	rt.handle("GET /auth", limited(auth))
	for _, prefix := range []string{"/v1", ""} {
		rt.handle("GET "+prefix+"/models", limited(models.all))
		rt.handle("GET "+prefix+"/models/{id...}", limited(models.one))
		rt.handle("POST "+prefix+"/chat/completions", limited(p.forward(pathChat)))
		rt.handle("POST "+prefix+"/completions", limited(p.completions()))
		rt.handle("POST "+prefix+"/embeddings", limited(p.forward(pathEmbeddings)))
		rt.handle("POST "+prefix+"/responses", limited(p.forward(pathResponses)))
		rt.handle("POST "+prefix+"/messages", limited(p.messages(pathMessages)))
		rt.handle("POST "+prefix+"/messages/count_tokens", limited(p.messages(pathCountTokens)))
	}
	rt.full.Handle("/", limited(rt.unmatched))
	// guard and what admit asks are no handlers around the next one: those would be on the stack for as long as a stream
	// lasts, and double it to 16 kB.
	return track(cfg, log, m, func(w http.ResponseWriter, r *http.Request) {
		if keys.guard(w, r) {
			rt.ServeHTTP(w, r)
		}
	})
}

// A router is a ServeMux whose own answers have the shape of the API's errors.
type router struct {
	metrics *metrics
	full    *http.ServeMux // the routes, and unmatched for all else
	bare    *http.ServeMux // the routes alone, to find out what is wrong with a request that matches none
}

func (rt *router) handle(pattern string, h http.Handler) {
	rt.metrics.register(pattern)
	rt.full.Handle(pattern, h)
	rt.bare.Handle(pattern, h)
}

func (rt *router) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.RequestURI == "*" || r.Method == http.MethodConnect { // ServeMux has answers of its own for these
		rt.unmatched(w, r)
		return
	}
	if clean := path.Clean("/" + r.URL.Path); clean != r.URL.Path {
		// A base URL that ends in a slash makes /v1//chat/completions. ServeMux would redirect, and a
		// redirected POST arrives as a GET.
		r.URL.Path, r.URL.RawPath = clean, ""
	}
	rt.full.ServeHTTP(w, r)
}

// unmatched answers what no route matches: 405 where another method would match, else 404.
func (rt *router) unmatched(w http.ResponseWriter, r *http.Request) {
	h, pattern := rt.bare.Handler(r)
	if pattern == "" {
		var plain discardResponse
		h.ServeHTTP(&plain, r)
		if allow := plain.Header().Get("Allow"); allow != "" {
			w.Header().Set("Allow", allow)
			writeError(w, r, &apiError{status: http.StatusMethodNotAllowed, typ: typeInvalidRequest, code: "method_not_allowed",
				message: fmt.Sprintf("%s is not allowed here, but %s.", clip(r.Method, 20), allow)})
			return
		}
	}
	writeError(w, r, &apiError{status: http.StatusNotFound, typ: typeInvalidRequest, code: "unknown_url",
		message: fmt.Sprintf("There is no %s. The proxy has POST /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/responses, /v1/messages and /v1/messages/count_tokens, and GET /v1/models, /health, /health/ready, /health/detailed, /metrics and /auth.", clip(r.URL.Path, 100))})
}

// A discardResponse keeps an answer's header and nothing else.
type discardResponse struct{ header http.Header }

func (d *discardResponse) Header() http.Header {
	if d.header == nil {
		d.header = http.Header{}
	}
	return d.header
}
func (d *discardResponse) Write(p []byte) (int, error) { return len(p), nil }
func (d *discardResponse) WriteHeader(int)             {}

// listen binds the address, and takes over a Unix socket that nobody listens on any more.
func listen(cfg *config) (net.Listener, error) {
	network, address := cfg.addr()
	if network == "unix" {
		if conn, err := net.Dial(network, address); err == nil {
			conn.Close()
		} else if info, err := os.Lstat(address); err == nil && info.Mode().Type() == fs.ModeSocket {
			os.Remove(address) // left behind by a process that was killed
		}
	}
	config := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) error {
		if network == "unix" {
			return nil
		}
		// Without the option the server serves all the same.
		return c.Control(func(fd uintptr) { boundUnsent(fd, cfg.writeTimeout) })
	}}
	config.SetMultipathTCP(false) // its sockets don't know the option
	ln, err := config.Listen(context.Background(), network, address)
	if network == "tcp" && errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%w: stop the other program, or set SERVER_PORT to another port", err)
	}
	return ln, err
}

// baseURL returns the URL by which this machine reaches the server that listens on a.
func baseURL(cfg *config, a net.Addr) string {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return "unix:" + a.String()
	}
	scheme := "http"
	if cfg.tls {
		scheme = "https"
	}
	host := tcp.IP.String()
	if tcp.IP.IsUnspecified() {
		host = "localhost"
	}
	return scheme + "://" + net.JoinHostPort(host, strconv.Itoa(tcp.Port))
}

// reachable returns the host to connect to for a server that is bound to host.
func reachable(host string) string {
	addr, err := netip.ParseAddr(host)
	switch {
	case err != nil || !addr.IsUnspecified():
		return host
	case addr.Is4():
		return "127.0.0.1"
	}
	return "::1"
}

// warn logs what is allowed but may not be meant.
func warn(cfg *config, log *slog.Logger, a net.Addr) {
	if tcp, ok := a.(*net.TCPAddr); ok && len(cfg.proxyKeys) == 0 && !tcp.IP.IsLoopback() {
		log.Warn("anyone who can reach this address can spend this account: set PROXY_API_KEYS, or SERVER_HOST=127.0.0.1", "address", a.String())
	}
	if cfg.apiKey != "" {
		if problem := planMismatch(cfg.apiKey, keyBase(cfg)); problem != "" {
			log.Warn(problem, "base_url", keyBase(cfg).String())
		}
	}
	for _, u := range []*url.URL{cfg.apiBase, cfg.oauthBase} {
		if u != nil && u.Scheme == "http" && !isLoopback(u.Hostname()) {
			log.Warn("credentials go over the network unencrypted: use https", "url", u.String())
		}
	}
}

// tlsConfig serves the certificate in the files as they are now: a renewed one is picked up without a restart,
// and a broken renewal leaves the old one in use. They are looked at every ten seconds at most, and at once for no hello.
func tlsConfig(cfg *config, log *slog.Logger) *tls.Config {
	var mu sync.Mutex
	var current *tls.Certificate
	var modified, looked time.Time
	var problem string // as it was logged last
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// For TLS 1.2; all those of 1.3 are AEAD.
		CipherSuites: []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			mu.Lock()
			defer mu.Unlock()
			if hello != nil && current != nil && time.Since(looked) < 10*time.Second {
				return current, nil
			}
			looked = time.Now()
			info, err := os.Stat(cfg.certFile)
			if err == nil && current != nil && info.ModTime().Equal(modified) {
				return current, nil
			}
			pair, pairErr := tls.LoadX509KeyPair(cfg.certFile, cfg.keyFile)
			if err = errors.Join(err, pairErr); err != nil {
				if current == nil {
					return nil, err
				}
				if err.Error() != problem {
					problem = err.Error()
					log.Error("the renewed certificate can't be used; the old one stays in use", "error", err)
				}
				return current, nil
			}
			current, modified, problem = &pair, info.ModTime(), ""
			return current, nil
		},
	}
}

// healthcheckCommand asks the server that the same environment configures for /health.
func healthcheckCommand(ctx context.Context, cfg *config, _, stderr io.Writer) int {
	res, err := askServer(ctx, cfg, "/health")
	if err == nil {
		res.Body.Close()
		if res.StatusCode != http.StatusOK {
			err = fmt.Errorf("/health answered %s", res.Status)
		}
	}
	if err != nil {
		fmt.Fprintf(stderr, "qwen-go-proxy healthcheck: %v\n", err)
		return 1
	}
	return 0
}

// serverAddress returns where the server that cfg configures can be reached from this machine.
func serverAddress(cfg *config) string {
	network, address := cfg.addr()
	if network == "tcp" {
		address = net.JoinHostPort(reachable(cfg.host), strconv.Itoa(cfg.port))
	}
	return address
}

// askServer gets path from the server that cfg configures. The caller closes the answer's body.
func askServer(ctx context.Context, cfg *config, path string) (*http.Response, error) {
	network, _ := cfg.addr()
	if network == "tcp" && cfg.port == 0 {
		return nil, errors.New("SERVER_PORT=0 picks any port, so there is none to ask")
	}
	scheme := "http"
	if cfg.tls {
		scheme = "https"
	}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, serverAddress(cfg))
		},
		// The certificate is for the server's public name, and this asks by its address. Nothing secret is sent.
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://localhost"+path, nil)
	if err != nil {
		return nil, err
	}
	return client.Do(req)
}
