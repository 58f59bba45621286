// Package e2e tests the program from outside: its binary as a process, over real sockets. The tests can be run alone,
// go test ./e2e; with QWEN_LONG_TESTS=1 they take the sizes and the time that prove most.
package e2e

import (
	"crypto/tls"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"qwen-go-proxy/e2e/testkit"
)

// What the packages of tests share.
var (
	fatalIf     = testkit.FatalIf
	wantEqual   = testkit.WantEqual
	wantError   = testkit.WantError
	until       = testkit.Until
	writeFile   = testkit.WriteFile
	readFile    = testkit.ReadFile
	certificate = testkit.Certificate
	sse         = testkit.SSE
	answerJSON  = testkit.AnswerJSON
	gzipped     = testkit.Gzipped
)

// A logBuffer is what a program has written so far. It can be waited on.
type logBuffer struct{ testkit.Log }

// await returns the last group of re's first match, or fails the test.
func (l *logBuffer) await(t testing.TB, re string) string {
	t.Helper()
	return l.Await(t, re)
}

var binaryDir string // a temporary directory, for the binary

func TestMain(m *testing.M) {
	flag.Set("test.parallel", "8") // most tests wait
	var err error
	if binaryDir, err = os.MkdirTemp("", "qwen-go-proxy-e2e-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := m.Run()
	os.RemoveAll(binaryDir)
	os.Exit(status)
}

// longTests reports whether the tests take the sizes and the time that prove most, minutes each.
func longTests() bool { return os.Getenv("QWEN_LONG_TESTS") == "1" }

// raceEnabled reports whether the tests, and so the binary, are built with the race detector.
var raceEnabled = sync.OnceValue(func() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
})

// many returns n, or a tenth of it under the race detector, which takes several times the memory and the time.
func many(n int) int {
	if raceEnabled() {
		return n / 10
	}
	return n
}

// build builds the program once and returns the file.
var build = sync.OnceValues(func() (string, error) {
	// Go takes a test's result from its cache unless a file has changed that the test has looked at.
	sources, err := filepath.Glob("../*")
	if err != nil {
		return "", err
	}
	for _, file := range sources {
		os.Stat(file)
	}
	file := filepath.Join(binaryDir, "qwen-go-proxy")
	if runtime.GOOS == "windows" {
		file += ".exe"
	}
	out, err := exec.Command("go", "build", fmt.Sprintf("-race=%t", raceEnabled()), "-o", file, "..").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return file, nil
})

// A program is the program in a process of its own.
type program struct {
	t      *testing.T
	cmd    *exec.Cmd
	url    string // where it listens
	stderr *logBuffer
	ended  chan struct{}
	status error // of Wait; set once ended is closed
}

// start runs serve with env on a free loopback port, and kills it when the test ends. Before that, adapt may change how
// it is started. Where env names a port, it must set LOG_LEVEL=info too: the log then says that it listens.
func start(t *testing.T, env map[string]string, adapt ...func(*exec.Cmd)) *program {
	t.Helper()
	exe, err := build()
	fatalIf(t, err)
	p := &program{t: t, cmd: exec.Command(exe), stderr: &logBuffer{}, ended: make(chan struct{})}
	p.cmd.Dir = binaryDir // where no .env is
	full := map[string]string{
		"SERVER_HOST": "127.0.0.1", "SERVER_PORT": "0", "RATE_LIMIT_RPS": "0", "LOG_LEVEL": "warn", "QWEN_DIR": filepath.Join(t.TempDir(), "qwen"),
		"PATH": os.Getenv("PATH"), "HOME": os.Getenv("HOME"), "TMPDIR": os.TempDir(), "SYSTEMROOT": os.Getenv("SYSTEMROOT"),
		"GORACE": "atexit_sleep_ms=0",
	}
	maps.Copy(full, env)
	for k, v := range full {
		p.cmd.Env = append(p.cmd.Env, k+"="+v)
	}
	p.cmd.Stderr = p.stderr
	for _, f := range adapt {
		f(p.cmd)
	}
	fatalIf(t, p.cmd.Start())
	go func() {
		p.status = p.cmd.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("stderr of process %d:\n%s", p.cmd.Process.Pid, p.stderr)
		}
	})
	p.url = p.stderr.await(t, `(?m)(?:"msg":"listening".*"url":"|listening  .* url=|^Listening on )([^"\s]+)`)
	return p
}

// startWith runs serve with a key, in front of an API that api answers for.
func startWith(t *testing.T, api http.HandlerFunc, env map[string]string) *program {
	t.Helper()
	if api == nil {
		api = http.NotFound
	}
	upstream := httptest.NewServer(api)
	t.Cleanup(upstream.Close)
	full := map[string]string{"QWEN_API_KEY": "sk-test", "API_BASE_URL": upstream.URL + "/v1"}
	maps.Copy(full, env)
	return start(t, full)
}

// startOverTLS is startWith for an API that speaks TLS, and HTTP/2.
func startOverTLS(t *testing.T, api *httptest.Server, env map[string]string) *program {
	t.Helper()
	api.EnableHTTP2 = true
	api.StartTLS()
	t.Cleanup(api.Close)
	file := filepath.Join(t.TempDir(), "ca.pem")
	fatalIf(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw}), 0o600))
	full := map[string]string{"QWEN_API_KEY": "sk-test", "API_BASE_URL": api.URL + "/v1", "SSL_CERT_FILE": file}
	maps.Copy(full, env)
	return start(t, full)
}

// kill ends the process as a crash would, and returns once it is gone.
func (p *program) kill() {
	p.cmd.Process.Kill()
	<-p.ended
}

// terminate asks the process to end, and checks that it does so well.
func (p *program) terminate() {
	p.t.Helper()
	if runtime.GOOS == "windows" {
		p.kill() // there is no SIGTERM
		return
	}
	http.DefaultClient.CloseIdleConnections() // one that has never been used would be waited for
	p.cmd.Process.Signal(syscall.SIGTERM)
	if p.awaitEnd(); p.status != nil {
		p.t.Errorf("process %d: %v", p.cmd.Process.Pid, p.status)
	}
}

// awaitEnd waits for the process to end.
func (p *program) awaitEnd() {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(time.Minute):
		p.t.Fatalf("process %d does not end", p.cmd.Process.Pid)
	}
}

// do sends a request and returns the answer, which must be whole.
func (p *program) do(method, path, body string) (*http.Response, string) {
	p.t.Helper()
	res, answer, err := testkit.Ask(p.t, http.DefaultClient, method, p.url+path, strings.NewReader(body))
	fatalIf(p.t, err)
	return res, answer
}

// try posts body, and returns an answer that may be cut short with the error that tells so.
func (p *program) try(path, body string) (*http.Response, string, error) {
	p.t.Helper()
	return testkit.Ask(p.t, http.DefaultClient, "POST", p.url+path, strings.NewReader(body))
}

func (p *program) get(path string) (*http.Response, string) {
	p.t.Helper()
	return p.do("GET", path, "")
}

func (p *program) post(path, body string) (*http.Response, string) {
	p.t.Helper()
	return p.do("POST", path, body)
}

// chat sends a chat request and returns the answer's status and body.
func (p *program) chat() (int, string, error) {
	res, err := http.Post(p.url+"/v1/chat/completions", "application/json", strings.NewReader(`{"messages":[{"role":"user","content":"Hello"}]}`))
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res.StatusCode, string(body), err
}

// metric returns a sample of /metrics by its name and labels.
func (p *program) metric(name string) (value float64) {
	p.t.Helper()
	_, page := p.get("/metrics")
	_, rest, ok := strings.Cut(page, "\n"+name+" ")
	if _, err := fmt.Sscan(rest, &value); !ok || err != nil {
		p.t.Fatalf("/metrics lacks %s:\n%s", name, page)
	}
	return value
}

// dial opens a connection to p for a test that writes its own bytes: TLS where p speaks it, with HTTP/2.
func (p *program) dial() net.Conn {
	p.t.Helper()
	scheme, address, _ := strings.Cut(p.url, "://")
	c, err := net.Dial("tcp", address)
	fatalIf(p.t, err)
	p.t.Cleanup(func() { c.Close() })
	if scheme == "https" {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	}
	c.SetDeadline(time.Now().Add(time.Minute))
	return c
}

// client returns a client that speaks to p by HTTP/1.1, or by HTTP/2 where p serves TLS.
func (p *program) client() *http.Client {
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true, DisableCompression: true}
	p.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute}
}

// memory returns a figure of /proc/PID/status in bytes: VmRSS, what the process holds now, or VmHWM, the most so far.
func (p *program) memory(name string) (bytes int) {
	p.t.Helper()
	if runtime.GOOS != "linux" {
		p.t.Skip("needs /proc")
	}
	status := readFile(p.t, fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	_, after, _ := strings.Cut(string(status), "\n"+name+":")
	if _, err := fmt.Sscanf(after, "%d kB", &bytes); err != nil {
		p.t.Fatalf("%s: %v in %s", name, err, status)
	}
	return bytes << 10
}

// withTLS adds a certificate to env.
func withTLS(t *testing.T, env map[string]string) map[string]string {
	full := map[string]string{"ENABLE_TLS": "true"}
	maps.Copy(full, env)
	full["TLS_CERT_FILE"], full["TLS_KEY_FILE"] = certificate(t)
	return full
}
