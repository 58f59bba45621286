package e2e

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"
	"unsafe"
)

// newTerminal returns both ends of a new pseudo-terminal: what programs have, and what the user reads, until the test ends.
func newTerminal(t *testing.T) (program, user *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("there are no pseudo-terminals here: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	raw, err := master.SyscallConn()
	fatalIf(t, err)
	var n, locked int32
	raw.Control(func(fd uintptr) {
		for request, arg := range map[uintptr]*int32{syscall.TIOCSPTLCK: &locked, syscall.TIOCGPTN: &n} {
			if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, request, uintptr(unsafe.Pointer(arg))); errno != 0 {
				err = errno
			}
		}
	})
	if err != nil {
		t.Skipf("there are no pseudo-terminals here: %v", err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("there are no pseudo-terminals here: %v", err)
	}
	t.Cleanup(func() { program.Close() })
	return program, master
}

// startAtTerminal starts the program with its stderr on a terminal, and returns what the user reads there as its stderr.
func startAtTerminal(t *testing.T, env map[string]string, args ...string) *program {
	t.Helper()
	terminal, user := newTerminal(t)
	full := map[string]string{"LOG_LEVEL": "info"}
	maps.Copy(full, env)
	return start(t, full, func(cmd *exec.Cmd) {
		cmd.Args = append(cmd.Args, args...)
		go io.Copy(cmd.Stderr, user) // until one end is closed
		cmd.Stderr = terminal
	})
}

func TestGreetingAtATerminal(t *testing.T) {
	t.Parallel()
	cert, key := certificate(t)
	socket := filepath.Join(shortDir(t), "s")
	for _, tt := range []struct {
		name string
		env  map[string]string
		want string
	}{
		{"not signed in", map[string]string{"QWEN_OAUTH_BASE_URL": "http://127.0.0.1:1"}, `
qwen-go-proxy listens on http://127.0.0.1:PORT.

  Base URL  http://127.0.0.1:PORT/v1
  API key   any text
  Sign in   at http://127.0.0.1:PORT/auth, or set QWEN_API_KEY
  Stop      Ctrl-C; twice to cut off what is under way

`},
		{"signed in, on all addresses", map[string]string{"QWEN_DIR": credentials(t), "SERVER_HOST": "0.0.0.0"}, `
qwen-go-proxy listens on http://localhost:PORT and all other addresses.

  Base URL  http://localhost:PORT/v1
  API key   any text
  Stop      Ctrl-C; twice to cut off what is under way

`},
		{"API key, TLS, keys", map[string]string{"QWEN_API_KEY": "sk-test", "PROXY_API_KEYS": "k", "ENABLE_TLS": "true", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key}, `
qwen-go-proxy listens on https://127.0.0.1:PORT.

  Base URL  https://127.0.0.1:PORT/v1, by a name in the certificate
  API key   one of the proxy's keys (PROXY_API_KEYS)
  Stop      Ctrl-C; twice to cut off what is under way

`},
		{"Unix socket", map[string]string{"QWEN_API_KEY": "sk-test", "SERVER_HOST": "unix:" + socket}, `
qwen-go-proxy listens on unix:` + socket + `.

  Base URL  http://localhost/v1, through the socket ` + socket + `
  API key   any text
  Stop      Ctrl-C; twice to cut off what is under way

`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			user := startAtTerminal(t, tt.env).stderr
			user.await(t, `(?m)^\d\d:\d\d:\d\d listening  address=`)
			got := strings.ReplaceAll(user.String(), "\r\n", "\n")
			got = got[:regexp.MustCompile(`(?m)^\d\d:\d\d:\d\d `).FindStringIndex(got)[0]]
			for line := range strings.Lines(got) {
				if n := utf8.RuneCountInString(strings.TrimSpace(line)); n > 78 {
					t.Errorf("%d columns: %s", n, line)
				}
			}
			got = regexp.MustCompile(`:\d{2,5}\b`).ReplaceAllString(got, ":PORT")
			wantEqual(t, "greeting", tt.want, got)
		})
	}
}

func TestDemoAtATerminalSaysHowToStop(t *testing.T) {
	t.Parallel()
	user := startAtTerminal(t, nil, "demo").stderr
	user.await(t, `(?s)Base URL .*Stop      Ctrl-C; .*\d listening  address=.*To sign in to Qwen`)
}

func TestASecondInterruptIsAnnounced(t *testing.T) {
	t.Parallel()
	p := startAtTerminal(t, map[string]string{"QWEN_API_KEY": "sk-test"})
	p.cmd.Process.Signal(os.Interrupt)
	p.stderr.await(t, `Stopping\. Ctrl-C again cuts off what is under way\.`)
	if <-p.ended; p.status != nil {
		t.Error(p.status)
	}
}

// TestLogAtATerminal: the log is for people, with colors where the terminal takes them, unless LOG_FORMAT is set.
func TestLogAtATerminal(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		env  map[string]string
		want string // of the line of a request
	}{
		{map[string]string{"TERM": "xterm"}, `(?m)^\x1b\[2m\d\d:\d\d:\d\d\x1b\[m \x1b\[32m200\x1b\[m +\d+ ms  GET /\r$`},
		{map[string]string{"TERM": "xterm", "NO_COLOR": "1"}, `(?m)^\d\d:\d\d:\d\d 200 +\d+ ms  GET /\r$`},
		{map[string]string{"TERM": "dumb"}, `(?m)^\d\d:\d\d:\d\d 200 +\d+ ms  GET /\r$`},
		{nil, `(?m)^\d\d:\d\d:\d\d 200 +\d+ ms  GET /\r$`},
		{map[string]string{"TERM": "xterm", "LOG_FORMAT": "text"}, `(?m)^time=\S+ level=INFO msg=request request_id=\S+ method=GET path=/ status=200 `},
		{map[string]string{"TERM": "xterm", "LOG_FORMAT": "json"}, `(?m)^\{"time":"[^"]+","level":"INFO","msg":"request","request_id":"[^"]+","method":"GET","path":"/","status":200,`},
	} {
		t.Run(fmt.Sprint(tt.env), func(t *testing.T) {
			env := map[string]string{"QWEN_API_KEY": "sk-test"}
			maps.Copy(env, tt.env)
			p := startAtTerminal(t, env)
			p.requests(1, func(_ int, r *http.Request) { r.URL.Path = "/" })
			p.stderr.await(t, tt.want)
		})
	}
}

// TestEndsWithItsTerminal closes the window that the program runs in.
func TestEndsWithItsTerminal(t *testing.T) {
	t.Parallel()
	hangUp := make(chan os.Signal, 1)
	signal.Notify(hangUp, syscall.SIGHUP) // under nohup the program would inherit that the signal is ignored
	defer signal.Stop(hangUp)
	terminal, user := newTerminal(t)
	p := start(t, map[string]string{"QWEN_API_KEY": "sk-test"}, func(cmd *exec.Cmd) {
		cmd.Stdin = terminal
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	})
	terminal.Close()
	user.Close()
	select {
	case <-p.ended:
	case <-time.After(time.Minute):
		t.Error("the program outlives its terminal")
	}
}
