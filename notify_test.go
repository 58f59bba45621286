//go:build unix

package main

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// A manager is the side of the notify socket that systemd has.
type manager struct {
	t    *testing.T
	conn *net.UnixConn
}

// newManager listens on socket.
func newManager(t *testing.T, socket string) *manager {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &manager{t, conn}
}

// shortDir returns a directory whose path fits into a socket's address.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qgp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// next returns the next datagram.
func (m *manager) next() string {
	m.t.Helper()
	b := make([]byte, 4096)
	m.conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	n, err := m.conn.Read(b)
	if err != nil {
		m.t.Fatalf("the manager heard nothing: %v", err)
	}
	return string(b[:n])
}

// want checks that the next datagrams are these, as regular expressions that match all of one.
func (m *manager) want(patterns ...string) {
	m.t.Helper()
	for _, p := range patterns {
		if got := m.next(); !regexp.MustCompile(`^(?s:` + p + `)$`).MatchString(got) {
			m.t.Fatalf("the manager heard %q, want %q", got, p)
		}
	}
}

// detached starts a process without a controlling terminal, as a service manager does.
func detached(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} }

func TestServiceManagerHearsOfALife(t *testing.T) {
	t.Parallel()
	sockets := map[string]string{"path": filepath.Join(shortDir(t), "notify")}
	if runtime.GOOS == "linux" {
		sockets["abstract"] = fmt.Sprintf("@qwen-go-proxy-test-%d", os.Getpid())
	}
	for name, socket := range sockets {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			streaming, release := make(chan struct{}), make(chan struct{})
			upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/event-stream")
				http.NewResponseController(w).Flush()
				close(streaming)
				<-release
			}))
			defer upstream.Close()
			finish := sync.OnceFunc(func() { close(release) })
			defer finish() // Close waits for the stream
			m := newManager(t, socket)
			p := startProcess(t, map[string]string{"NOTIFY_SOCKET": socket, "QWEN_API_KEY": "sk-test", "API_BASE_URL": upstream.URL, "SHUTDOWN_TIMEOUT": "20s"}, detached)
			m.want(`READY=1`, `STATUS=Serving at `+regexp.QuoteMeta(p.url))

			go p.chat()
			<-streaming
			p.cmd.Process.Signal(syscall.SIGTERM)
			m.want(`STOPPING=1\nSTATUS=Shutting down, requests in flight: 1\nEXTEND_TIMEOUT_USEC=50000000`)
			finish()
			<-p.ended
			if p.status != nil {
				t.Errorf("exit: %v", p.status)
			}
		})
	}
}

func TestServiceManagerHearsOfTheSignIn(t *testing.T) {
	t.Parallel()
	qwen := newStandIn()
	server := httptest.NewServer(qwen)
	defer server.Close()
	for _, tt := range []struct {
		name string
		env  map[string]string
		want string
	}{
		{"open", nil, `STATUS=Waiting for sign-in: http://\S+/authorize\?user_code=\S+`},
		{"with keys", map[string]string{"PROXY_API_KEYS": "k"}, `STATUS=Waiting for sign-in: the link is in the log`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			socket := filepath.Join(shortDir(t), "notify")
			m, dir := newManager(t, socket), t.TempDir()
			env := map[string]string{"NOTIFY_SOCKET": socket, "QWEN_OAUTH_BASE_URL": server.URL, "QWEN_DIR": dir}
			for k, v := range tt.env {
				env[k] = v
			}
			startProcess(t, env, detached)
			m.want(`READY=1`)
			for got := m.next(); !regexp.MustCompile(tt.want).MatchString(got); got = m.next() {
				if !strings.HasPrefix(got, "STATUS=Waiting for Qwen") && !strings.HasPrefix(got, "STATUS=The proxy is not signed in") {
					t.Fatalf("the manager heard %q, want %q", got, tt.want)
				}
			}
		})
	}
}

func TestServesWhereTheServiceManagerDoesNotListen(t *testing.T) {
	for name, socket := range map[string]string{
		"nobody there":  filepath.Join(t.TempDir(), "nobody"),
		"vsock":         "vsock:2:1234",
		"far too long":  "/" + strings.Repeat("x", 1000),
		"not a socket":  os.DevNull,
		"abstract name": "@qwen-go-proxy-test-nobody",
	} {
		t.Run(name, func(t *testing.T) {
			p := start(t, map[string]string{"NOTIFY_SOCKET": socket, "QWEN_API_KEY": "sk-test"})
			p.stderr.await(t, `the service manager can't be notified`)
			if res, body := p.get("/health/ready"); res.StatusCode != http.StatusOK {
				t.Errorf("%s %s", res.Status, body)
			}
			p.stop()
			if status := p.wait(); status != 0 {
				t.Errorf("exit status %d", status)
			}
			if n := strings.Count(p.stderr.String(), "the service manager can't be notified"); n != 1 {
				t.Errorf("it is logged %d times, want once", n)
			}
		})
	}
}

func TestStatusOfASource(t *testing.T) {
	now := time.Now()
	good := &token{access: "a", expiry: now.Add(time.Hour)}
	for _, tt := range []struct {
		name string
		st   authState
		in   *signIn
		want string
	}{
		{"signed in", authState{token: good}, noSignIn, "Serving at http://localhost:8080"},
		{"being renewed", authState{token: &token{access: "a", refresh: "r", expiry: now.Add(-time.Hour)}, refreshing: true}, noSignIn, "Renewing the token"},
		{"no link yet", authState{}, &signIn{status: signInStarting}, "Waiting for Qwen, to start a sign-in"},
		{"no sign-in", authState{}, noSignIn, "The proxy is not signed in to Qwen. Set QWEN_API_KEY on the proxy, or sign in: open /auth on the proxy, or follow the link in its log."},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &tokenSource{log: slog.New(slog.DiscardHandler)}
			s.state.Store(&tt.st)
			s.flow.current.Store(tt.in)
			if diff := cmp.Diff(tt.want, s.status(&tt.st, "http://localhost:8080", true)); diff != "" {
				t.Errorf("status (-want +got):\n%s", diff)
			}
		})
	}
}
