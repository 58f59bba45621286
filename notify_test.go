//go:build unix

package main

import (
	"bytes"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
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

			p.cmd.Process.Signal(syscall.SIGHUP)
			m.want(`RELOADING=1\nMONOTONIC_USEC=\d+`, `READY=1`)

			go p.chat()
			<-streaming
			p.cmd.Process.Signal(syscall.SIGTERM)
			m.want(`STOPPING=1\nSTATUS=Shutting down, requests in flight: 1\nEXTEND_TIMEOUT_USEC=50000000`)
			p.cmd.Process.Signal(syscall.SIGHUP) // does not end the stream
			select {
			case <-p.ended:
				t.Fatalf("SIGHUP while the stream runs on ended the program: %v", p.status)
			case <-time.After(200 * time.Millisecond):
			}
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

// TestHangupLooksAtTheFilesNow has each file changed that the server follows. Once the manager hears that the reload
// is over the new content is in use.
func TestHangupLooksAtTheFilesNow(t *testing.T) {
	t.Parallel()
	write := func(t *testing.T, file, content string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// reload starts the server with env, has change change a file, and returns once that has been looked at.
	reload := func(t *testing.T, env map[string]string, change func(p *process)) *process {
		t.Helper()
		socket := filepath.Join(shortDir(t), "notify")
		m := newManager(t, socket)
		env["NOTIFY_SOCKET"] = socket
		p := startProcess(t, env, detached)
		m.want(`READY=1`, `STATUS=Serving .*`)
		change(p)
		p.cmd.Process.Signal(syscall.SIGHUP)
		m.want(`RELOADING=1\n.*`)
		for m.next() != "READY=1" {
		}
		return p
	}
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"authorization":%q}`, r.Header.Get("Authorization"))
	}))
	defer upstream.Close()
	chat := func(t *testing.T, url, key string) string {
		t.Helper()
		req, err := http.NewRequest(http.MethodPost, url+"/v1/chat/completions", strings.NewReader(`{"messages":[]}`))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+key)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		return fmt.Sprint(res.StatusCode, " ", string(body))
	}

	t.Run("keys of clients", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "keys")
		write(t, file, "old\n")
		p := reload(t, map[string]string{"PROXY_API_KEYS_FILE": file, "QWEN_API_KEY": "sk-test", "API_BASE_URL": upstream.URL}, func(*process) { write(t, file, "new\n") })
		if got := chat(t, p.url, "new"); !strings.HasPrefix(got, "200") {
			t.Errorf("the new key: %s", got)
		}
		if got := chat(t, p.url, "old"); !strings.HasPrefix(got, "401") {
			t.Errorf("the old key: %s", got)
		}
	})
	t.Run("API key", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "key")
		write(t, file, "sk-old")
		p := reload(t, map[string]string{"QWEN_API_KEY_FILE": file, "API_BASE_URL": upstream.URL}, func(*process) { write(t, file, "sk-new") })
		if diff := cmp.Diff(`200 {"authorization":"Bearer sk-new"}`, chat(t, p.url, "")); diff != "" {
			t.Errorf("the answer (-want +got):\n%s", diff)
		}
	})
	t.Run("credential file", func(t *testing.T) {
		dir := credentials(t)
		p := reload(t, map[string]string{"QWEN_DIR": dir, "API_BASE_URL": upstream.URL, "QWEN_OAUTH_BASE_URL": upstream.URL}, func(*process) {
			write(t, filepath.Join(dir, credentialFile), fmt.Sprintf(`{"access_token":"another-token","refresh_token":"refresh-2","token_type":"Bearer","expiry_date":%d}`,
				time.Now().Add(2*time.Hour).UnixMilli()))
		})
		if diff := cmp.Diff(`200 {"authorization":"Bearer another-token"}`, chat(t, p.url, "")); diff != "" {
			t.Errorf("the answer (-want +got):\n%s", diff)
		}
	})
	t.Run("certificate", func(t *testing.T) {
		cert, key := certificate(t)
		next, nextKey := certificate(t)
		read := func(file string) string {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		served := func(url string) []byte {
			conn, err := tls.Dial("tcp", strings.TrimPrefix(url, "https://"), &tls.Config{InsecureSkipVerify: true})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			return conn.ConnectionState().PeerCertificates[0].Raw
		}
		want, _ := pem.Decode([]byte(read(next)))
		p := reload(t, map[string]string{"ENABLE_TLS": "true", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "QWEN_API_KEY": "sk-test"}, func(p *process) {
			if bytes.Equal(want.Bytes, served(p.url)) {
				t.Error("the two certificates are the same")
			}
			write(t, cert, read(next))
			write(t, key, read(nextKey))
		})
		if !bytes.Equal(want.Bytes, served(p.url)) {
			t.Error("the server has the old certificate")
		}
	})
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

// TestAFileThatIsLostAgainIsReportedAgain: it has been there in between, as it was.
func TestAFileThatIsLostAgainIsReportedAgain(t *testing.T) {
	t.Parallel()
	for name, env := range map[string]map[string]string{
		"PROXY_API_KEYS_FILE": {"QWEN_API_KEY": "sk-test"},
		"QWEN_API_KEY_FILE":   {},
	} {
		t.Run(name, func(t *testing.T) {
			file, socket := filepath.Join(t.TempDir(), "keys"), filepath.Join(shortDir(t), "notify")
			if err := os.WriteFile(file, []byte("sk-key"), 0o600); err != nil {
				t.Fatal(err)
			}
			m := newManager(t, socket)
			env["NOTIFY_SOCKET"], env[name] = socket, file
			p := startProcess(t, env, detached)
			m.want(`READY=1`, `STATUS=Serving .*`)
			for n := range 4 {
				from, to := file, file+".away"
				if n%2 == 1 {
					from, to = to, from
				}
				if err := os.Rename(from, to); err != nil {
					t.Fatal(err)
				}
				p.cmd.Process.Signal(syscall.SIGHUP)
				m.want(`RELOADING=1\n.*`, `READY=1`)
			}
			p.stderr.await(t, `(?s)(can't be read any more.*can't be read any more)`)
		})
	}
}
