// Command qwen-go-proxy puts Alibaba's Qwen models behind OpenAI-compatible endpoints. It holds the credentials, keeps them
// fresh, adds them to every request, and passes answers on as they come.
//
// The way of a request: server.go accepts it. routes.go gives it an id, finds its route and asks access.go and ratelimit.go
// whether it may go on. The route's handler in proxy.go reads the body (body.go), takes a token (tokens.go) and sends both to
// Qwen through a ReverseProxy. stream.go watches the answer, keeps the client's stream alive and sees whether it ends as it
// should. At its end routes.go answers an error, and has metrics.go count the request and exchange.go log it.
//
// The way of a token: signin.go (at the terminal) or auth.go (in a browser) start a sign-in with oauth.go's device flow.
// credentials.go stores its tokens in QWEN_DIR, in the format of Qwen Code. tokens.go reads and follows that file.
// Requests take the present token without a lock. Before it expires, tokens.go has oauth.go refresh it, once for all processes:
// lock.go has the lock file. An API key takes the place of all this, and does not expire.
//
// The files:
//
//	main.go         commands, their settings, version
//	config.go       settings: reading, checking, the .env file
//	server.go       listening, TLS, following files, the service manager, shutdown
//	routes.go       the table of routes; what happens before and after a handler
//	access.go       keys of clients, web origins, Host names, addresses of clients
//	ratelimit.go    a token bucket for each client
//	exchange.go     one request and its answer: deadlines of writes, errors, access line
//	proxy.go        chat, embeddings, responses and messages: the call to Qwen
//	body.go         request bodies within a bound on memory; finding members of JSON
//	body_linux.go   gives the memory of large bodies back to the system at once
//	stream.go       answers from Qwen: silence, keep-alive comments, whether they are whole
//	completions.go  the text completions endpoint, over chat
//	models.go       the lists of models
//	tokens.go       the token or key at hand, and its renewal
//	oauth.go        Qwen's OAuth server, and the device flow
//	credentials.go  the credential file
//	lock.go         the lock file that keeps refreshes single
//	auth.go         the sign-in page and its JSON
//	signin.go       the commands login, logout and status
//	health.go       the health endpoints, and the healthcheck command
//	metrics.go      counts, and the page for Prometheus
//	usage.go        the token usage in an answer
//	log.go          the log's format, and a writer that never blocks
//	demo.go         the demo command, and its stand-in for Qwen
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
)

func main() {
	// Without this, a write to a closed stderr or stdout would end the program. With it the write returns an error. Ignoring the
	// signal would pass on to the browser that login starts.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills at once, except a server: see serveCommand
	os.Exit(run(ctx, os.Args[1:], os.LookupEnv, ".env", os.Stdout, os.Stderr))
}

// A command is one of the program's, as the usage shows it.
type command struct {
	name, summary, help string
	reads               func(name string) bool // reports whether it reads the setting; nil: it reads none
	serves              bool                   // it needs the files too that settings name
	run                 func(ctx context.Context, cfg *config, stdout, stderr io.Writer) int
}

// only and allBut are for a command's reads.
func only(names ...string) func(string) bool {
	return func(name string) bool { return slices.Contains(names, name) }
}

func allBut(names ...string) func(string) bool {
	return func(name string) bool { return !slices.Contains(names, name) }
}

func commands() []command {
	return []command{
		{name: "serve", summary: "start the server; this is the default", run: serveCommand, serves: true, reads: allBut(), help: `
It needs an API key in QWEN_API_KEY, or a Qwen account: without a key and a sign-in it prints a link to sign in with.
Environment variables configure it, and a file .env in the working directory. docs/configuration.md lists all settings.`},
		{name: "login", summary: "sign in to Qwen at the terminal and store the credentials", run: loginCommand,
			reads: only("QWEN_DIR", "QWEN_OAUTH_BASE_URL", "QWEN_OAUTH_CLIENT_ID", "QWEN_OAUTH_SCOPE", "QWEN_API_KEY", "QWEN_API_KEY_FILE"), help: `
It prints a link and a code, opens a browser if there is one, and waits. With -no-browser it opens none. A running server with
the same QWEN_DIR uses the credentials within a few seconds. The exit status is 1 if the sign-in was denied, expired or could
not be stored.
With an API key in QWEN_API_KEY no sign-in is needed.`},
		{name: "logout", summary: "sign out", run: logoutCommand, reads: only("QWEN_DIR"), help: `
It replaces the stored credentials with an empty object. That signs out running servers with the same QWEN_DIR and Qwen Code too.`},
		{name: "status", summary: "show the state of the server and who is signed in", run: statusCommand,
			reads: only("SERVER_HOST", "SERVER_PORT", "ENABLE_TLS", "QWEN_DIR", "API_BASE_URL", "QWEN_API_KEY", "QWEN_API_KEY_FILE"), help: `
It asks the running server, and looks at the credentials of this environment. The exit status is 0 only if requests would
be served. It never prints a token.`},
		{name: "healthcheck", summary: "ask the running server for /health; exit status 0 or 1", run: healthcheckCommand,
			reads: only("SERVER_HOST", "SERVER_PORT", "ENABLE_TLS"), help: `
It is for containers without a shell. SERVER_HOST, SERVER_PORT and ENABLE_TLS say where the server is.`},
		{name: "demo", summary: "serve with a stand-in for Qwen: no account, no network, nothing stored", run: demoCommand, serves: true,
			// What leads to the real Qwen is not read.
			reads: allBut("QWEN_DIR", "QWEN_OAUTH_BASE_URL", "QWEN_API_KEY", "QWEN_API_KEY_FILE", "API_BASE_URL"), help: `
Everything works as in serve, against a stand-in for Qwen inside the program: the sign-in approves itself after two
seconds, and the answers are canned. Nothing is stored.

Some models fail on purpose, so that you can see how a client handles errors: error-400 to error-599 answer with that status,
and error-midstream breaks off in the middle of a stream.`},
		{name: "version", summary: "print version, commit, build date and Go version", run: versionCommand},
		{name: "help", summary: "print this text"},
	}
}

// run executes one command and returns its exit status: 0 done, 1 failed, 2 wrong usage or configuration. Settings come
// from lookup and then from envFile, if there is such a file; "" reads none.
func run(ctx context.Context, args []string, lookup func(string) (string, bool), envFile string, stdout, stderr io.Writer) int {
	name := "serve"
	switch {
	case len(args) == 0:
	case slices.Contains([]string{"help", "-h", "-help", "--help"}, args[0]):
		usage(stdout)
		return 0
	case args[0] == "-version" || args[0] == "--version":
		name, args = "version", args[1:]
	case !strings.HasPrefix(args[0], "-"):
		name, args = args[0], args[1:]
	}
	all := commands()
	i := slices.IndexFunc(all, func(c command) bool { return c.name == name })
	if i < 0 {
		fmt.Fprintf(stderr, "qwen-go-proxy: unknown command %q\n\n", name)
		usage(stderr)
		return 2
	}
	c := all[i]
	noBrowser := false
	for _, arg := range args {
		switch flag := "-" + strings.TrimLeft(arg, "-"); {
		case flag == "-h" || flag == "-help":
			fmt.Fprintf(stdout, "usage: qwen-go-proxy %s\n\n%s.\n%s\n", c.name, strings.ToUpper(c.summary[:1])+c.summary[1:], c.help)
			return 0
		case flag == "-no-browser" && c.name == "login":
			noBrowser = true
		default:
			fmt.Fprintf(stderr, "qwen-go-proxy %s: unexpected argument %q\n\n", c.name, arg)
			usage(stderr)
			return 2
		}
	}
	if c.reads == nil {
		return c.run(ctx, nil, stdout, stderr)
	}
	cfg, err := configure(c, lookup, envFile, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "qwen-go-proxy: the configuration is wrong:\n%v\n", err)
		return 2
	}
	cfg.noBrowser = noBrowser
	return c.run(ctx, cfg, stdout, stderr)
}

// configure returns c's configuration. Its error joins all problems, one a line.
func configure(c command, lookup func(string) (string, bool), envFile string, stderr io.Writer) (*config, error) {
	file, fileErr := readEnvFile(envFile)
	if fileErr != nil && c.name == "healthcheck" {
		fmt.Fprintln(stderr, fileErr) // the server may have started before the file was broken, and be healthy
		fileErr = nil
	}
	settings := func(name string) (string, bool) {
		if !c.reads(name) {
			return "", false
		}
		if value, ok := lookup(name); ok {
			return value, true
		}
		value, ok := file[name]
		return value, ok
	}
	load := loadSettings
	if c.serves {
		load = loadConfig
	}
	cfg, err := load(settings)
	if file != nil {
		cfg.envFile = absolute(envFile)
	}
	cfg.notifySocket, _ = lookup("NOTIFY_SOCKET") // set by the service manager: not a setting
	if format, _ := settings("LOG_FORMAT"); isTerminal(stderr) && strings.TrimSpace(format) == "" {
		cfg.greet, cfg.logFormat = true, "text"
		noColor, _ := lookup("NO_COLOR") // no-color.org
		term, _ := lookup("TERM")
		cfg.colors = noColor == "" && term != "" && term != "dumb"
	}
	return cfg, errors.Join(fileErr, err)
}

func usage(w io.Writer) {
	fmt.Fprint(w, "usage: qwen-go-proxy [command]\n\nAn OpenAI-compatible server in front of Alibaba's Qwen models.\n\ncommands:\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %-12s %s\n", c.name, c.summary)
	}
	fmt.Fprint(w, `
Environment variables configure everything, and a file .env in the working directory. The most important:
  QWEN_API_KEY     a Model Studio key; without it, sign in with a Qwen account
  API_BASE_URL     Qwen's API, if the key is not for international pay as you go
  SERVER_HOST      the address to listen on (0.0.0.0)
  SERVER_PORT      the port to listen on (8080)
  PROXY_API_KEYS   keys that clients must send
  QWEN_DIR         the directory of the sign-in (.qwen)

"qwen-go-proxy command -h" explains a command. docs/configuration.md lists all settings.
`)
}

// The linker sets these at a release. A plain go build takes them from version control.
var buildVersion, buildCommit, buildDate string

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
	v.Version, v.Commit, v.Date = cmp.Or(v.Version, "dev"), cmp.Or(v.Commit, "unknown"), cmp.Or(v.Date, "unknown")
	return v
})

// userAgent is how the proxy introduces itself to Qwen.
var userAgent = "qwen-go-proxy/" + version().Version

func versionCommand(_ context.Context, _ *config, stdout, _ io.Writer) int {
	v := version()
	fmt.Fprintf(stdout, "qwen-go-proxy %s\ncommit %s\nbuilt %s\n%s %s/%s\n", v.Version, v.Commit, v.Date, v.Go, runtime.GOOS, runtime.GOARCH)
	return 0
}
