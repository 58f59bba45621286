package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"runtime"
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
		if cfg.apiKey != "" {
			return fail(2, signInFailed, errors.New("QWEN_API_KEY is set, and with a key there is no sign-in: unset it to sign in"))
		}
		store := &credentialStore{dir: cfg.qwenDir}
		if err := store.check(); err != nil {
			return fail(1, signInFailed, err) // now rather than after the user has signed in
		}
		oauth := newOAuthClient(cfg)
		auth, err := oauth.authorize(ctx)
		if err != nil {
			return fail(1, signInFailed, err)
		}
		opened := !o.noBrowser && openBrowser(ctx, auth.verificationURIComplete)
		if o.json {
			printJSON(stdout, map[string]any{
				"status": signInPending, "verification_uri": auth.verificationURI, "verification_uri_complete": auth.verificationURIComplete,
				"user_code": auth.userCode, "expires_at": auth.expires.UTC().Truncate(time.Second),
			})
		} else {
			printSignIn(stdout, auth)
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
			return fail(1, signInFailed, err)
		}
		// The user has signed in: a Ctrl-C that comes too late shall not lose that.
		if err := storeSignIn(context.WithoutCancel(ctx), store, t); err != nil && !errors.Is(err, errInPlace) {
			return fail(1, signInFailed, fmt.Errorf("signed in, but the credentials could not be stored: %w", err))
		}
		if o.json {
			printJSON(stdout, map[string]any{"status": signInComplete, "expires_at": t.expiry.UTC().Truncate(time.Second), "file": store.path()})
		} else {
			fmt.Fprintf(stdout, "\nSigned in. The credentials are in %s; a running server uses them within a few seconds.\n", store.path())
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
	lock, err := store.lock(ctx, func() bool { return false })
	if err != nil {
		return fail(err)
	}
	defer lock.release()
	if err := store.signOut(); err != nil && !errors.Is(err, errInPlace) {
		return fail(err)
	}
	fmt.Fprintf(stdout, "Signed out: %s is empty now.\n", store.path())
	return 0
}

// statusCommand prints how things stand, on one screen. The exit status is 0 only where requests would be served.
func statusCommand(ctx context.Context, cfg *config, stdout, _ io.Writer) int {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(stdout, "%-13s%s\n", name+":", fmt.Sprintf(format, args...))
	}
	log := slog.New(slog.DiscardHandler)
	usable := true
	if cfg.apiKey != "" {
		line("credentials", "API key")
		line("upstream", "%s", keyBase(cfg))
		if cfg.apiKeyFile != "" {
			line("file", "%s", cfg.apiKeyFile)
		}
	} else {
		store := &credentialStore{dir: cfg.qwenDir}
		s := &tokenSource{oauth: newOAuthClient(cfg), store: store, base: cfg.apiBase, buffer: cfg.refreshBuffer, log: log}
		t, err := store.load()
		st := &authState{token: s.prepare(t)}
		now := time.Now()
		switch problem := st.problem(now); {
		case err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errSignedOut):
			line("credentials", "unusable: %v", err)
			usable = false
		case problem != nil:
			line("credentials", "%s", problem.message)
			usable = false
		case t.good(now):
			line("credentials", "signed in to Qwen")
			line("token", "good until %s (%s)", t.expiry.Format(time.DateTime), t.expiry.Sub(now).Round(time.Second))
		case t.refresh != "":
			line("credentials", "signed in to Qwen")
			line("token", "expired at %s; the server renews it", t.expiry.Format(time.DateTime))
		default:
			line("credentials", "the token expired at %s and can't be renewed: sign in again", t.expiry.Format(time.DateTime))
			usable = false
		}
		if t != nil && t.base != nil {
			line("upstream", "%s", t.base)
		}
		line("file", "%s", store.path())
	}
	switch ready, reason, err := askReady(ctx, cfg); {
	case err != nil:
		line("server", "not running at %s", serverAddress(cfg))
	case ready:
		line("server", "ready at %s", serverAddress(cfg))
	default:
		line("server", "not ready: %s", reason)
		usable = false // it knows more than the file: a refused refresh, an account that is not served
	}
	if !usable {
		return 1
	}
	return 0
}

// askReady asks the server of the same environment whether it is ready. The error says that none answers.
func askReady(ctx context.Context, cfg *config) (ready bool, reason string, err error) {
	res, err := askServer(ctx, cfg, "/health/ready")
	if err != nil {
		return false, "", err
	}
	defer res.Body.Close()
	var answer struct{ Status, Reason string }
	if err := json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(&answer); err != nil || answer.Status == "" {
		return false, "", errors.New("something else answers there")
	}
	return res.StatusCode == http.StatusOK, answer.Reason, nil
}
