//go:build unix

package e2e

import (
	"fmt"
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
	fatalIf(t, err)
	t.Cleanup(func() { conn.Close() })
	return &manager{t, conn}
}

// shortDir returns a directory whose path fits into a socket's address.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qgp")
	fatalIf(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// next returns the next datagram.
func (m *manager) next() string {
	m.t.Helper()
	b := make([]byte, 4096)
	m.conn.SetReadDeadline(time.Now().Add(time.Minute))
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
			p := start(t, map[string]string{"NOTIFY_SOCKET": socket, "QWEN_API_KEY": "sk-test", "API_BASE_URL": upstream.URL, "SHUTDOWN_TIMEOUT": "20s"}, detached)
			m.want(`READY=1`, `STATUS=Serving at `+regexp.QuoteMeta(p.url))

			go p.chat()
			<-streaming
			p.cmd.Process.Signal(syscall.SIGTERM)
			m.want(`STOPPING=1\nSTATUS=Shutting down\nEXTEND_TIMEOUT_USEC=50000000`)
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
	w := newWitness(t, t.TempDir(), time.Hour)
	socket := filepath.Join(shortDir(t), "notify")
	m := newManager(t, socket)
	start(t, map[string]string{"NOTIFY_SOCKET": socket, "QWEN_OAUTH_BASE_URL": w.url, "QWEN_DIR": t.TempDir()}, detached)
	m.want(`READY=1`, `STATUS=The proxy is not signed in to Qwen\..*`, `STATUS=Serving at http://.*`)
}

func TestServesWhereTheServiceManagerDoesNotListen(t *testing.T) {
	t.Parallel()
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
			p.terminate()
			if n := strings.Count(p.stderr.String(), "the service manager can't be notified"); n != 1 {
				t.Errorf("it is logged %d times, want once", n)
			}
		})
	}
}
