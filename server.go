package main

import (
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
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// ballast is how much more garbage than by itself the collector lets gather, in bytes. It goes by the size of the heap, which
// is so small here that it would run after every 4 MB, all the time under load. An array of this size, never touched and so
// without memory of its own, counts as part of the heap: 6 % less CPU a request. GOGC=400 does the same, and would let
// thousands of streams grow to five times their memory.
const ballast = 8 << 20

// withoutBallast returns a figure of the Go runtime, in bytes, less the ballast that it includes: nothing uses that memory.
func withoutBallast(n uint64) uint64 { return max(n, ballast) - ballast }

// serve runs the server until ctx ends and returns the exit status. Once it listens, it calls listening with a URL to reach it
// by, and with the writer for text that has to keep its place among the log lines.
func serve(ctx context.Context, cfg *config, stderr io.Writer, listening func(out io.Writer, base string, tokens *tokenSource)) int {
	heap := make([]byte, ballast)
	defer runtime.KeepAlive(heap)
	m := &metrics{started: time.Now()}
	out := &logWriter{w: stderr, dropped: &m.logDropped}
	defer out.flush(time.Second)
	abort, cancelAbort := secondSignal(ctx)
	defer cancelAbort()
	log := newLogger(cfg, out)
	ln, err := listen(cfg)
	if err != nil {
		fmt.Fprintf(out, "qwen-go-proxy: %v\n", err)
		return 1
	}
	tokens := newSource(cfg, log, out)
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
	files := append(tokens.files(), keys.files()...)
	if cfg.tls {
		cert := &servedCertificate{certFile: cfg.certFile, keyFile: cfg.keyFile}
		if err := cert.read(); err != nil {
			fmt.Fprintf(out, "qwen-go-proxy: %v\n", err)
			return 1
		}
		srv.TLSConfig = cert.tlsConfig()
		files = append(files, &watchedFile{name: "the certificate", fallback: "the last one stays in use", read: cert.read})
	}
	base := baseURL(cfg, ln.Addr())
	listening(out, base, tokens)
	log.Info("listening", "address", ln.Addr().String(), "url", base, "version", version().Version)
	if cfg.envFile != "" {
		log.Info("settings were read from a file; the environment wins", "file", cfg.envFile)
	}
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
	go watchFiles(running, log, fileInterval, files)
	go h.follow(running)
	tokensDone := make(chan struct{})
	go func() {
		defer close(tokensDone)
		tokens.run(running, abort)
	}()
	finishTokens := sync.OnceFunc(func() {
		stopTokens()
		select {
		case <-tokensDone:
		case <-time.After(100 * time.Millisecond):
			log.Info("waiting until the token refresh under way is done and stored; a second signal gives it up", "at_most", oauthTimeout.String())
			<-tokensDone
		}
	})
	defer finishTokens()
	manager := &notifier{socket: cfg.notifySocket, log: log}
	managerTold := make(chan struct{})
	go func() {
		defer close(managerTold)
		manager.run(ctx, tokens, base, ln.Addr().Network() == "tcp" && !keys.required())
	}()

	select {
	case err := <-served:
		log.Error("the server failed", "error", err)
		return 1
	case <-ctx.Done():
	}
	if cfg.greet {
		fmt.Fprintln(out, "Stopping. Ctrl-C again cuts off what is under way.")
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
		case <-abort.Done():
		}
	}
	log.Info("shutting down", "cause", context.Cause(ctx), "in_flight", m.inFlight.Load(), "timeout", cfg.shutdownTimeout.String())
	deadline, cancel := context.WithTimeout(abort, cfg.shutdownTimeout)
	defer cancel()
	if err := srv.Shutdown(deadline); err != nil {
		log.Warn("requests were still in flight and are cut off", "in_flight", m.inFlight.Load())
		cutOff(errShuttingDown) // streams end with an error event
		last, cancel := context.WithTimeout(abort, time.Second)
		defer cancel()
		if srv.Shutdown(last) != nil {
			srv.Close()
		}
	}
	finishTokens()
	if abort.Err() != nil {
		log.Warn("stopped by a second signal; what was under way is cut off")
		return 1
	}
	log.Info("stopped")
	return 0
}

// secondSignal returns a context that ends when the program has been asked twice to stop. From here on no signal kills it, so
// that it can release its lock first.
func secondSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	twice, cancel := context.WithCancel(context.WithoutCancel(ctx))
	go func() {
		defer signal.Stop(signals)
		for range 2 {
			select {
			case <-signals:
			case <-twice.Done():
				return
			}
		}
		cancel()
	}()
	return twice, cancel
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
	config := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) error {
		if network == "unix" {
			return nil
		}
		// Without the option the server serves all the same.
		return c.Control(func(fd uintptr) { boundUnsent(fd, cfg.writeTimeout) })
	}}
	config.SetMultipathTCP(false) // its sockets don't know the option
	ln, err := config.Listen(context.Background(), network, address)
	switch {
	case network == "tcp" && errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%w: stop the other program, or set SERVER_PORT to another port", err)
	case network == "unix" && errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%w: stop the program that listens there, or set SERVER_HOST to another path", err)
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
	if tcp, ok := a.(*net.TCPAddr); ok && len(cfg.proxyKeys) == 0 && !tcp.IP.IsLoopback() && !cfg.demo {
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

// A servedCertificate is the pair of files that TLS_CERT_FILE and TLS_KEY_FILE name, as last read without error.
type servedCertificate struct {
	certFile, keyFile string
	current           atomic.Pointer[tls.Certificate]
}

func (c *servedCertificate) read() error {
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err == nil {
		c.current.Store(&pair)
	}
	return err
}

// tlsConfig returns a configuration that serves c as it is at each handshake.
func (c *servedCertificate) tlsConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		CipherSuites: []uint16{ // for TLS 1.2; all those of 1.3 are AEAD
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.current.Load(), nil },
	}
}

// fileInterval is how often the server reads the files that may change.
const fileInterval = 5 * time.Second

// A watchedFile is a file, or a pair of files, that may change while the server runs.
type watchedFile struct {
	name     string       // as the log names it
	fallback string       // for the log: what happens while it can't be used
	read     func() error // puts the content into use; on error the last good content stays in use
}

// watchFiles reads each of files at once and then every interval, until ctx ends. It logs each cause of failure once, and its end.
func watchFiles(ctx context.Context, log *slog.Logger, interval time.Duration, files []*watchedFile) {
	causes := make([]string, len(files)) // as logged; "" while the file can be used
	for ctx.Err() == nil {
		for i, f := range files {
			err := f.read()
			switch {
			case err == nil && causes[i] != "":
				causes[i] = ""
				log.Info(f.name + " can be used again")
			case err != nil && causes[i] != err.Error():
				causes[i] = err.Error()
				log.Error(f.name+" can't be used; "+f.fallback, "error", err)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(interval):
		}
	}
}
