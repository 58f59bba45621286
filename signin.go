package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// loginCommand signs in at the terminal and stores the credentials. It changes nothing before everything has succeeded.
func loginCommand(ctx context.Context, cfg *config, stdout, stderr io.Writer) int {
	if cfg.apiKey != "" || cfg.apiKeyFile != "" {
		fmt.Fprintln(stderr, "qwen-go-proxy login: QWEN_API_KEY or QWEN_API_KEY_FILE is set. With an API key no sign-in is needed; to sign in, unset it")
		return 2
	}
	if err := login(ctx, cfg, stdout); err != nil {
		fmt.Fprintf(stderr, "qwen-go-proxy login: %v\n", err)
		return 1
	}
	return 0
}

// errGivenUp ends a command that the user interrupts.
var errGivenUp = errors.New("given up; nothing has changed")

func login(ctx context.Context, cfg *config, stdout io.Writer) error {
	store := &credentialStore{dir: cfg.qwenDir}
	if err := store.check(); err != nil {
		return err // now rather than after the user has signed in
	}
	oauth := newOAuthClient(cfg)
	auth, err := oauth.authorize(ctx)
	switch {
	case ctx.Err() != nil:
		return errGivenUp
	case err != nil:
		return fmt.Errorf("%w. Run login again later, or set QWEN_API_KEY: with a key no sign-in is needed", err)
	}
	printSignIn(stdout, auth, false)
	if !cfg.noBrowser && openBrowser(ctx, auth.verificationURIComplete) {
		fmt.Fprintln(stdout, "A browser should have opened there.")
	}
	fmt.Fprintf(stdout, "Waiting until %s; Ctrl-C gives up.\n", auth.expires.Local().Format("15:04"))
	t, err := oauth.poll(ctx, auth)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return errGivenUp
	default:
		return fmt.Errorf("%w; nothing has changed: run login again", err)
	}
	// The user has signed in: a Ctrl-C that comes too late must not lose that. Nor must a lock that is held forever.
	lock, _ := store.lock(context.WithoutCancel(ctx), func() bool { return false })
	defer lock.release()
	if err := store.save(t); err != nil {
		return fmt.Errorf("signed in, but the credentials could not be stored: %w", err)
	}
	fmt.Fprintf(stdout, "\nSigned in. The credentials are in %s; a running server with this QWEN_DIR uses them within a few seconds.\n", absolute(store.path()))
	return nil
}

// openBrowser opens link in the user's browser if there is a screen, and reports whether it tried.
func openBrowser(ctx context.Context, link string) bool {
	name, args := "xdg-open", []string{link}
	switch {
	case os.Getenv("SSH_CONNECTION") != "":
		return false // it would open on the other machine's screen
	case runtime.GOOS == "darwin":
		name = "open"
	case runtime.GOOS == "windows":
		name, args = "rundll32", []string{"url.dll,FileProtocolHandler", link}
	case os.Getenv("DISPLAY") == "" && os.Getenv("WAYLAND_DISPLAY") == "":
		return false
	}
	cmd := exec.CommandContext(ctx, name, args...)
	if cmd.Start() != nil {
		return false
	}
	go cmd.Wait()
	return true
}

// logoutCommand replaces the stored credentials by an empty object, which running servers and Qwen Code treat as signed out.
func logoutCommand(ctx context.Context, cfg *config, stdout, stderr io.Writer) int {
	done, err := logout(ctx, cfg, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "qwen-go-proxy logout: %v\n", err)
		return 1
	}
	fmt.Fprintln(stdout, done)
	return 0
}

// logout returns what it has done.
func logout(ctx context.Context, cfg *config, stderr io.Writer) (done string, err error) {
	store := &credentialStore{dir: cfg.qwenDir}
	if _, err := store.load(); unusable(err) {
		return "", fmt.Errorf("%w; it is left as it is; if nobody needs it, delete it by hand", err)
	} else if err != nil {
		return "Nobody was signed in.", nil
	}
	said := false
	lock, err := store.lock(ctx, func() bool {
		if !said {
			said = true
			fmt.Fprintf(stderr, "Another process holds %s. Waiting for up to half a minute …\n", absolute(filepath.Join(cfg.qwenDir, lockFile)))
		}
		return false
	})
	defer lock.release()
	switch {
	case ctx.Err() != nil:
		return "", errGivenUp
	case err != nil && !errors.Is(err, errLocked): // no live process holds it for so long: it must not keep the user signed in
		return "", err
	}
	if err := store.signOut(); err != nil {
		return "", err
	}
	return fmt.Sprintf("Signed out: %s is empty now.", absolute(store.path())), nil
}

// absolute returns path as an absolute path: QWEN_DIR is relative by default.
func absolute(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// statusCommand prints how the server is and which credentials this environment names. The exit status is 0 if requests would
// be served. A running server knows that best; without one the credentials decide.
func statusCommand(ctx context.Context, cfg *config, stdout, _ io.Writer) int {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(stdout, "%-13s%s\n", name+":", fmt.Sprintf(format, args...))
	}
	if cfg.envFile != "" {
		line("settings", "%s, and the environment", cfg.envFile)
	}
	ready, reason, err := askReady(ctx, cfg)
	stopped := errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist)
	_, address := cfg.addr()
	switch {
	case ready:
		line("server", "ready at %s", address)
	case err == nil:
		line("server", "not ready at %s: %s", address, reason)
	case stopped:
		line("server", "not running at %s, the address that is set here", address)
	default:
		line("server", "not known: %v", err)
	}
	t, problem := localCredentials(cfg)
	if ready && problem != nil {
		line("credentials", "the server has its own; this environment names none that can be used")
		return 0
	}
	file := cfg.apiKeyFile
	switch {
	case problem != nil:
		line("credentials", "%v", problem)
	case t.isKey():
		line("credentials", "API key")
	default:
		line("credentials", "signed in to Qwen")
		file = filepath.Join(cfg.qwenDir, credentialFile)
		if now := time.Now(); t.good(now) {
			line("token", "good until %s (%s)", t.expiry.Format(time.DateTime), t.expiry.Sub(now).Round(time.Second))
		} else {
			line("token", "expired at %s; the server renews it", t.expiry.Format(time.DateTime))
		}
	}
	if t != nil && t.base != nil {
		line("upstream", "%s", t.base)
	}
	if file != "" {
		line("file", "%s", absolute(file))
	}
	if ready || problem == nil && (stopped || err == errAnyPort) {
		return 0
	}
	return 1
}

// localCredentials returns the credentials that the environment names. The error says why a server could not use them.
func localCredentials(cfg *config) (*token, error) {
	if cfg.apiKey != "" || cfg.apiKeyFile != "" {
		return &token{base: keyBase(cfg)}, cfg.apiKeyErr
	}
	t, err := (&credentialStore{dir: cfg.qwenDir}).load()
	switch {
	case unusable(err):
		return nil, fmt.Errorf("unusable: %w", err)
	case err != nil:
		return nil, errors.New("not signed in: set QWEN_API_KEY, or sign in with qwen-go-proxy login")
	case t.refresh == "" && !t.good(time.Now()):
		return nil, fmt.Errorf("the token expired at %s and can't be renewed: sign in again", t.expiry.Format(time.DateTime))
	}
	t.base, err = apiBase(cfg.apiBase, t)
	return t, err
}

// askReady asks the server of the same environment whether it is ready, and why not. The error says why there is no answer.
func askReady(ctx context.Context, cfg *config) (ready bool, reason string, err error) {
	res, err := askServer(ctx, cfg, "/health/ready")
	if err != nil {
		return false, "", err
	}
	defer res.Body.Close()
	var answer struct{ Status, Reason string }
	json.NewDecoder(io.LimitReader(res.Body, 1<<20)).Decode(&answer)
	if answer.Status != "ready" && answer.Status != "not_ready" {
		return false, "", errors.New("another program answers at the server's address, or ENABLE_TLS is not set here as it is for the server")
	}
	return answer.Status == "ready", answer.Reason, nil
}
