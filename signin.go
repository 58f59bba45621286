package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// loginOptions are the flags of login.
type loginOptions struct {
	noBrowser bool
	json      bool
}

func (o *loginOptions) define(flags *flag.FlagSet) {
	flags.BoolVar(&o.noBrowser, "no-browser", false, "do not open a browser")
	flags.BoolVar(&o.json, "json", false, "print JSON, one object a line: the link and code, then what came of it")
}

// loginCommand signs in at the terminal and stores the credentials. Nothing is changed before all has gone well.
func loginCommand(o *loginOptions) func(ctx context.Context, cfg *config, stdout, stderr io.Writer) int {
	return func(ctx context.Context, cfg *config, stdout, stderr io.Writer) int {
		fail := func(status int, what string, err error) int {
			if o.json {
				printJSON(stdout, map[string]string{"status": what, "error": err.Error()})
			}
			fmt.Fprintf(stderr, "qwen-go-proxy login: %v\n", err)
			return status
		}
		if cfg.apiKey != "" || cfg.apiKeyFile != "" {
			return fail(2, signInFailed, errors.New("an API key is set (QWEN_API_KEY or QWEN_API_KEY_FILE), and with a key there is no sign-in: unset it to sign in"))
		}
		store := &credentialStore{dir: cfg.qwenDir}
		if err := store.check(); err != nil {
			return fail(1, signInFailed, err) // now rather than after the user has signed in
		}
		oauth := newOAuthClient(cfg)
		auth, err := oauth.authorize(ctx)
		switch {
		case ctx.Err() != nil:
			return fail(1, "interrupted", errors.New("given up; nothing has changed"))
		case err != nil:
			return fail(1, signInFailed, errors.New(oauth.trouble(err)+" Run login again later, or set QWEN_API_KEY: with a key no sign-in is needed."))
		}
		opened := !o.noBrowser && openBrowser(ctx, auth.verificationURIComplete)
		if o.json {
			printJSON(stdout, map[string]any{
				"status": signInPending, "verification_uri": auth.verificationURI, "verification_uri_complete": auth.verificationURIComplete,
				"user_code": auth.userCode, "expires_at": auth.expires.UTC().Truncate(time.Second),
			})
		} else {
			printSignIn(stdout, auth, false)
			if opened {
				fmt.Fprintln(stdout, "A browser should have opened there.")
			}
			fmt.Fprintf(stdout, "Waiting until %s; Ctrl-C gives up.\n", auth.expires.Local().Format("15:04"))
		}
		t, err := oauth.poll(ctx, auth)
		switch e, ok := errors.AsType[*oauthError](err); {
		case ctx.Err() != nil:
			return fail(1, "interrupted", errors.New("given up; nothing has changed"))
		case ok && e.Code == "access_denied":
			return fail(1, signInDenied, errors.New("the sign-in was denied; nothing has changed"))
		case ok && e.Code == "expired_token":
			return fail(1, signInExpired, errors.New("nobody completed the sign-in in time; run login again"))
		case err != nil:
			return fail(1, signInFailed, errors.New(oauth.trouble(err)))
		}
		// The user has signed in: a Ctrl-C that comes too late shall not lose that.
		if err := storeSignIn(context.WithoutCancel(ctx), store, t); err != nil && !errors.Is(err, errInPlace) {
			return fail(1, signInFailed, fmt.Errorf("signed in, but the credentials could not be stored: %w", err))
		}
		if o.json {
			printJSON(stdout, map[string]any{"status": signInComplete, "expires_at": t.expiry.UTC().Truncate(time.Second), "file": absolute(store.path())})
		} else {
			fmt.Fprintf(stdout, "\nSigned in. The credentials are in %s; a running server with this QWEN_DIR uses them within a few seconds.\n", absolute(store.path()))
		}
		return 0
	}
}

func printJSON(w io.Writer, v any) {
	json.NewEncoder(w).Encode(v)
}

// openBrowser opens link in the user's browser where there is one to be seen, and reports whether it tried.
func openBrowser(ctx context.Context, link string) bool {
	var cmd *exec.Cmd
	switch {
	case os.Getenv("SSH_CONNECTION") != "":
		return false // it would open on the far side's screen
	case runtime.GOOS == "darwin":
		cmd = exec.CommandContext(ctx, "open", link)
	case runtime.GOOS == "windows":
		cmd = exec.CommandContext(ctx, "rundll32", "url.dll,FileProtocolHandler", link)
	case os.Getenv("DISPLAY") != "" || os.Getenv("WAYLAND_DISPLAY") != "":
		cmd = exec.CommandContext(ctx, "xdg-open", link)
	default:
		return false
	}
	if cmd.Start() != nil {
		return false
	}
	go cmd.Wait()
	return true
}

// logoutCommand replaces the stored credentials by an empty object, which running servers and Qwen Code obey.
func logoutCommand(ctx context.Context, cfg *config, stdout, stderr io.Writer) int {
	fail := func(err error) int {
		fmt.Fprintf(stderr, "qwen-go-proxy logout: %v\n", err)
		return 1
	}
	store := &credentialStore{dir: cfg.qwenDir}
	if _, err := store.load(); errors.Is(err, fs.ErrNotExist) || errors.Is(err, errSignedOut) {
		fmt.Fprintln(stdout, "Nobody was signed in.")
		return 0
	} else if err != nil {
		return fail(fmt.Errorf("%w; it is left as it is: delete it by hand if it may go", err))
	}
	waiting := false
	lock, err := store.lock(ctx, func() bool {
		if !waiting {
			waiting = true
			fmt.Fprintf(stderr, "Another process holds %s. Waiting for up to half a minute …\n", absolute(filepath.Join(cfg.qwenDir, lockFile)))
		}
		return false
	})
	switch {
	case ctx.Err() != nil:
		return fail(errors.New("given up; nothing has changed"))
	case errors.Is(err, errLocked): // nobody holds one for so long and lives: it shall not keep the user signed in
	case err != nil:
		return fail(err)
	default:
		defer lock.release()
	}
	if err := store.signOut(); err != nil && !errors.Is(err, errInPlace) {
		return fail(err)
	}
	fmt.Fprintf(stdout, "Signed out: %s is empty now.\n", absolute(store.path()))
	return 0
}

// absolute returns path as it is from anywhere: QWEN_DIR is relative by default.
func absolute(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// statusCommand prints on one screen how things stand. A running server knows best. Where none answers, the exit status
// says whether the credentials are good for one.
func statusCommand(ctx context.Context, cfg *config, stdout, _ io.Writer) int {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(stdout, "%-13s%s\n", name+":", fmt.Sprintf(format, args...))
	}
	if cfg.envFile != "" {
		line("settings", "%s, and the environment", cfg.envFile)
	}
	ready, err := askReady(ctx, cfg)
	running := err == nil
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		line("server", "not running at %s", serverAddress(cfg))
	case err != nil:
		line("server", "not known: %v", err)
	case ready.Status == "ready":
		line("server", "ready at %s", serverAddress(cfg))
	default:
		line("server", "not ready at %s: %s", serverAddress(cfg), ready.Reason)
	}
	ours := ownCredentials(cfg, time.Now())
	if running && ready.Status == "ready" && ours.problem != "" {
		line("credentials", "the server's own; there are none here, by this environment: %s", ours.problem)
		return 0
	}
	line("credentials", "%s", cmp.Or(ours.problem, ours.kind))
	if ours.token != "" {
		line("token", "%s", ours.token)
	}
	if ours.base != nil {
		line("upstream", "%s", ours.base)
	}
	if ours.file != "" {
		line("file", "%s", absolute(ours.file))
	}
	switch {
	case running && ready.Code == "not_signed_in" && ours.problem == "":
		line("next", "the server does not use this file: run login with the server's QWEN_DIR")
	case !running && ours.missing:
		line("next", "set QWEN_API_KEY, or sign in with: qwen-go-proxy login")
	}
	if running && ready.Status == "ready" || !running && ours.problem == "" && !errors.Is(err, errNotOurs) {
		return 0
	}
	return 1
}

// A credentialReport says what is known of the credentials that the environment names, without a server.
type credentialReport struct {
	kind    string
	problem string   // "" where a server would use them
	missing bool     // there are none
	token   string   // how long it is good
	base    *url.URL // nil where it is not known
	file    string   // "" for none
}

func ownCredentials(cfg *config, now time.Time) credentialReport {
	if cfg.apiKey != "" || cfg.apiKeyFile != "" {
		r := credentialReport{kind: "API key", base: keyBase(cfg), file: cfg.apiKeyFile}
		if cfg.apiKeyErr != nil {
			r.problem = cfg.apiKeyErr.Error()
		}
		return r
	}
	store := &credentialStore{dir: cfg.qwenDir}
	r := credentialReport{kind: "signed in to Qwen", file: store.path()}
	t, err := store.load()
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errSignedOut):
		r.problem, r.missing = "not signed in", true
		return r
	case err != nil:
		r.problem = fmt.Sprintf("unusable: %v", err)
		return r
	case t.good(now):
		r.token = fmt.Sprintf("good until %s (%s)", t.expiry.Format(time.DateTime), t.expiry.Sub(now).Round(time.Second))
	case t.refresh != "":
		r.token = fmt.Sprintf("expired at %s; the server renews it", t.expiry.Format(time.DateTime))
	default:
		r.problem = fmt.Sprintf("the token expired at %s and can't be renewed: sign in again", t.expiry.Format(time.DateTime))
	}
	if r.base = cfg.apiBase; r.base == nil {
		if r.base, err = apiBase(t.resourceURL); err != nil {
			r.problem = err.Error()
		}
	}
	return r
}

// A readyAnswer is what /health/ready answers.
type readyAnswer struct{ Status, Code, Reason string }

// errNotOurs says that the answer is not the proxy's.
var errNotOurs = errors.New("another program answers at the server's address")

// askReady asks the server of the same environment whether it is ready. The error says why there is no answer.
func askReady(ctx context.Context, cfg *config) (r readyAnswer, err error) {
	res, err := askServer(ctx, cfg, "/health/ready")
	if err != nil {
		return r, err
	}
	defer res.Body.Close()
	err = json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(&r)
	if err != nil || (r.Status == "ready") != (res.StatusCode == http.StatusOK) || r.Status == "" {
		return r, errNotOurs
	}
	return r, nil
}
