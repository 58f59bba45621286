package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
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
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// ballast is the size in bytes of an array that nobody touches. It counts as part of the heap, which is so small here that the
// garbage collector would run after every 4 MB, all the time under load: with it a request takes 6 % less CPU. GOGC=400 would
// do the same, and let thousands of streams grow to five times their memory.
const ballast = 8 << 20

// withoutBallast returns a figure of the Go runtime, in bytes, less the ballast that it includes. The array takes no memory.
func withoutBallast(n uint64) uint64 { return max(n, ballast) - ballast }

// serveCommand runs the server until ctx ends and returns the exit status.
func serveCommand(ctx context.Context, cfg *config, _, stderr io.Writer) int {
	heap := make([]byte, ballast)
	defer runtime.KeepAlive(heap)
	m := newMetrics()
	logging, stopLogging := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLogging()
	out := newLogWriter(logging, stderr, &m.logDropped)
	defer out.flush(time.Second)
	// No signal kills the program from here on, so that it can release its lock first. A second one ends abort.
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(signals)
	abort, cancelAbort := context.WithCancel(context.WithoutCancel(ctx))
	defer cancelAbort()
	log := newLogger(cfg, out)
	ln, err := listen(cfg)
	if err != nil {
		fmt.Fprintf(out, "qwen-go-proxy: %v\n", err)
		return 1
	}
	defer ln.Close()

	tokens := newSource(cfg, log, out)
	keys := newAccess(cfg, log)
	files := append(tokens.files(), keys.files()...)
	h := &health{tokens: tokens, metrics: m, log: log}
	requests, cutOff := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cutOff(nil)
	srv := &http.Server{
		Handler:           newHandler(cfg, log, tokens, keys, m, h, newTransport()),
		ReadHeaderTimeout: cfg.readTimeout,
		// No ReadTimeout and no WriteTimeout: they bound the whole request and would cut long streams. The
		// deadlines of bodies and writes move with each piece.
		IdleTimeout:    2 * time.Minute,
		MaxHeaderBytes: 64 << 10,
		// What net/http takes of bodies before anybody reads them is not counted: by default up to 1 MiB a connection.
		HTTP2:                        &http.HTTP2Config{MaxReadFrameSize: 16 << 10, MaxReceiveBufferPerStream: 64 << 10, MaxReceiveBufferPerConnection: 64 << 10},
		BaseContext:                  func(net.Listener) context.Context { return requests },
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		DisableGeneralOptionsHandler: true,
	}
	accept := srv.Serve
	if cfg.tls {
		tlsConfig, cert := followCertificate(cfg)
		if err := cert.read(); err != nil {
			fmt.Fprintf(out, "qwen-go-proxy: %v\n", err)
			return 1
		}
		files = append(files, cert)
		srv.TLSConfig = tlsConfig
		accept = func(ln net.Listener) error { return srv.ServeTLS(ln, "", "") }
	}

	announce(out, log, cfg, ln.Addr(), tokens)
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	failed, tokensDone := make(chan error, 1), make(chan struct{})
	go func() { failed <- accept(ln) }()
	go func() {
		defer close(tokensDone)
		tokens.run(running, abort)
	}()
	watchFiles(running, log, fileInterval, files)
	if err := notifyManager(cfg, "READY=1"); err != nil {
		log.Warn("the service manager can't be notified of the server's state", "NOTIFY_SOCKET", cfg.notifySocket, "error", err)
	}
	go h.watch(ctx, func(status string) {
		notifyManager(cfg, "STATUS="+cmp.Or(status, "Serving at "+serverURL(cfg, ln.Addr())))
	})

	select {
	case err = <-failed:
	case <-ctx.Done():
		h.stopping.Store(true)
		go func() {
			<-signals // the one that has ended ctx
			<-signals
			cancelAbort()
		}()
		if cfg.greet {
			fmt.Fprintln(out, "Stopping. Ctrl-C again cuts off what is under way.")
		}
		// After the timeout streams are cut off, and a refresh is finished and stored.
		atMost := cfg.shutdownDelay + cfg.shutdownTimeout + oauthTimeout + 5*time.Second
		notifyManager(cfg, "STOPPING=1", "STATUS=Shutting down", fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", atMost.Microseconds()))
		shutDown(ctx, abort, cfg, log, srv, &m.inFlight, cutOff)
	}
	stop()
	select {
	case <-tokensDone:
	case <-time.After(100 * time.Millisecond):
		log.Info("waiting until the token refresh under way is done and stored; a second signal gives it up", "at_most", oauthTimeout.String())
		<-tokensDone
	}
	switch {
	case err != nil:
		log.Error("the server failed", "error", err)
		return 1
	case abort.Err() != nil:
		log.Warn("stopped by a second signal; what was under way is cut off")
		return 1
	}
	log.Info("stopped")
	return 0
}

// shutDown lets the requests in flight finish within cfg's bounds, and ends those that remain with cutOff. It returns early when
// abort ends.
func shutDown(ctx, abort context.Context, cfg *config, log *slog.Logger, srv *http.Server, inFlight *atomic.Int64, cutOff context.CancelCauseFunc) {
	if cfg.shutdownDelay > 0 {
		// Closing the listener resets connections that nobody has accepted yet. A load balancer can't know that nobody has read
		// their requests and must not send them again. So it has to stop sending before.
		log.Info("not ready any more; serving until load balancers have noticed", "delay", cfg.shutdownDelay.String())
		select {
		case <-time.After(cfg.shutdownDelay):
		case <-abort.Done():
		}
	}
	log.Info("shutting down", "cause", context.Cause(ctx), "in_flight", inFlight.Load(), "timeout", cfg.shutdownTimeout.String())
	deadline, cancel := context.WithTimeout(abort, cfg.shutdownTimeout)
	defer cancel()
	if srv.Shutdown(deadline) == nil {
		return
	}
	log.Warn("requests were still in flight and are cut off", "in_flight", inFlight.Load())
	cutOff(errShuttingDown) // streams end with an error event
	last, cancelLast := context.WithTimeout(abort, time.Second)
	defer cancelLast()
	if srv.Shutdown(last) != nil {
		srv.Close()
	}
}

// notifyManager sends lines to the service manager by systemd's protocol, sd_notify(3). It does nothing if there is no manager.
//
// There is no watchdog: it would kill a server on a machine that is short of CPU, and with it all open streams.
func notifyManager(cfg *config, lines ...string) error {
	if cfg.notifySocket == "" {
		return nil
	}
	conn, err := net.Dial("unixgram", cfg.notifySocket) // a path, or @ and the name of an abstract socket
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetWriteDeadline(time.Now().Add(time.Second)) // the manager's queue may be full
	_, err = io.WriteString(conn, strings.Join(lines, "\n"))
	return err
}

// listen binds the address. It takes over a Unix socket that a dead process has left behind.
func listen(cfg *config) (net.Listener, error) {
	network, address := cfg.addr()
	if network == "unix" {
		conn, err := net.Dial(network, address)
		if err == nil {
			conn.Close()
		}
		// ECONNREFUSED is the one error that proves that no process listens. A live one that is busy gives EAGAIN.
		if info, statErr := os.Lstat(address); errors.Is(err, syscall.ECONNREFUSED) && statErr == nil && info.Mode().Type() == fs.ModeSocket {
			os.Remove(address)
		}
	}
	ln, err := net.Listen(network, address)
	if err != nil {
		next := "check SERVER_HOST"
		switch {
		case errors.Is(err, syscall.EADDRINUSE):
			next = "stop the other program, or set SERVER_PORT to another port (for a Unix socket, SERVER_HOST to another path)"
		case errors.Is(err, fs.ErrPermission) && network == "tcp":
			next = "set SERVER_PORT to 1024 or above, or give the program CAP_NET_BIND_SERVICE"
		}
		return nil, fmt.Errorf("%w: %s", err, next)
	}
	return ln, nil
}

// serverURL returns the URL by which this machine reaches the server that listens on a: http, https, or unix: and a path.
func serverURL(cfg *config, a net.Addr) string {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return "unix:" + a.String()
	}
	scheme, host := "http", tcp.IP.String()
	if cfg.tls {
		scheme = "https"
	}
	if tcp.IP.IsUnspecified() {
		host = "localhost"
	}
	return scheme + "://" + net.JoinHostPort(host, strconv.Itoa(tcp.Port))
}

// announce says where the server listens, and warns of what is allowed but may not be meant.
func announce(out io.Writer, log *slog.Logger, cfg *config, a net.Addr, tokens tokenSource) {
	base := serverURL(cfg, a)
	switch {
	case cfg.demo || cfg.greet:
		greet(out, cfg, base, tokens.ready() != nil)
	case cfg.port == 0:
		fmt.Fprintf(out, "Listening on %s\n", base)
	}
	log.Info("listening", "address", a.String(), "url", base, "version", version().Version)
	if cfg.envFile != "" {
		log.Info("settings were read from a file; the environment wins", "file", cfg.envFile)
	}
	if tcp, ok := a.(*net.TCPAddr); ok && len(cfg.proxyKeys) == 0 && !tcp.IP.IsLoopback() && !cfg.demo {
		log.Warn("anyone who can reach this address can spend this account: set PROXY_API_KEYS, or SERVER_HOST=127.0.0.1", "address", a.String())
	}
	if strings.HasPrefix(cfg.apiKey, "sk-sp-") && cfg.apiBase == nil {
		log.Warn("the API key is one of a Coding Plan or Token Plan: set API_BASE_URL to the plan's base URL")
	}
	for _, u := range []*url.URL{cfg.apiBase, cfg.oauthBase} {
		if u != nil && u.Scheme == "http" && !isLoopback(u.Hostname()) {
			log.Warn("credentials go over the network unencrypted: use https", "url", u.String())
		}
	}
}

// greet tells the user what to do with the server at url.
func greet(out io.Writer, cfg *config, url string, signIn bool) {
	listens, baseURL, key, curl := url, url+"/v1", "any text", "curl"
	if addr, err := netip.ParseAddr(cfg.host); err == nil && addr.IsUnspecified() {
		listens += " and all other addresses"
	}
	if path, ok := strings.CutPrefix(url, "unix:"); ok {
		baseURL, url = "http://localhost/v1, through the socket "+path, "http://localhost"
		curl += " --unix-socket " + path
	}
	if cfg.tls {
		baseURL += ", by a name in the certificate"
		curl += " -k"
	}
	if len(cfg.proxyKeys) > 0 {
		key = "one of the proxy's keys (PROXY_API_KEYS)"
		curl += " -H 'Authorization: Bearer KEY'"
	}
	if cfg.demo {
		fmt.Fprintf(out, `
This is a demo: a stand-in inside the program answers in Qwen's place.
No account, no network, no model.

The sign-in below approves itself after %[1]v. Then try:

  %[2]s %[3]s/v1/chat/completions -d '{"messages":[{"role":"user","content":"Hello"}]}'
  %[2]s -N %[3]s/v1/chat/completions -d '{"stream":true,"messages":[{"role":"user","content":"Hello"}]}'
`, demoApproval, curl, url)
	}
	fmt.Fprintf(out, "\nqwen-go-proxy listens on %s.\n\n  Base URL  %s\n  API key   %s\n", listens, baseURL, key)
	if signIn && !cfg.demo {
		fmt.Fprintf(out, "  Sign in   at %s/auth, or set QWEN_API_KEY\n", url)
	}
	fmt.Fprint(out, "  Stop      Ctrl-C; twice to cut off what is under way\n\n")
}

// followCertificate returns the TLS configuration for TLS_CERT_FILE and TLS_KEY_FILE, and the pair of files to watch. Handshakes
// use what was last read without error, so the caller reads the pair first.
func followCertificate(cfg *config) (*tls.Config, *watchedFile) {
	var current atomic.Pointer[tls.Certificate]
	read := func() error {
		pair, err := tls.LoadX509KeyPair(cfg.certFile, cfg.keyFile)
		if err == nil {
			current.Store(&pair)
		}
		return err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		CipherSuites: []uint16{ // for TLS 1.2; all those of 1.3 are AEAD
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return current.Load(), nil },
	}, &watchedFile{name: "the certificate", fallback: "the last one stays in use", read: read}
}

// fileInterval is how often the server reads the files that may change.
var fileInterval = 5 * time.Second // a variable for tests alone

// A watchedFile is a file, or a pair of files, that may change while the server runs.
type watchedFile struct {
	name     string       // as the log names it
	fallback string       // for the log: what happens while it can't be used
	read     func() error // puts the content into use; on error the last good content stays in use
}

// watchFiles reads each of files at once and then every interval, until ctx ends. It logs each cause of failure once, and its end.
// It does not wait: one file may take long.
func watchFiles(ctx context.Context, log *slog.Logger, interval time.Duration, files []*watchedFile) {
	for _, f := range files {
		go func() {
			cause := "" // as logged; "" while the file can be used
			for ok := true; ok; ok = sleep(ctx, interval) {
				err := f.read()
				switch {
				case err == nil && cause != "":
					cause = ""
					log.Info(f.name + " can be used again")
				case err != nil && cause != err.Error():
					cause = err.Error()
					log.Error(f.name+" can't be used; "+f.fallback, "error", err)
				}
			}
		}()
	}
}
