package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"go/build"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"qwen-go-proxy/e2e/testkit"
)

func TestMain(m *testing.M) {
	flag.Set("test.parallel", "8") // what runs in parallel waits
	fileInterval = 100 * time.Millisecond
	m.Run()
}

// A program is one run of the whole program in process.
type program struct {
	t      *testing.T
	url    string // where it listens
	stderr *logBuffer
	stop   context.CancelFunc
	exit   chan int
}

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

// lookup makes an environment of m.
func lookup(m map[string]string) func(string) (string, bool) {
	return func(key string) (string, bool) {
		v, ok := m[key]
		return v, ok
	}
}

// start runs the program with args and env on a free loopback port, and stops it when the test ends.
func start(t *testing.T, env map[string]string, args ...string) *program {
	t.Helper()
	full := map[string]string{"SERVER_HOST": "127.0.0.1", "SERVER_PORT": "0", "QWEN_DIR": t.TempDir(), "RATE_LIMIT_RPS": "0"}
	for k, v := range env {
		full[k] = v
	}
	ctx, cancel := context.WithCancel(t.Context())
	p := &program{t: t, stderr: &logBuffer{}, stop: cancel, exit: make(chan int, 1)}
	go func() { p.exit <- run(ctx, args, lookup(full), "", io.Discard, p.stderr) }()
	t.Cleanup(func() {
		cancel()
		select {
		case <-p.exit:
		case <-time.After(time.Minute):
			t.Error("the program did not stop")
		}
		if t.Failed() {
			t.Logf("stderr:\n%s", p.stderr)
		}
	})
	p.url = p.stderr.await(t, `(?m)(?:"msg":"listening".*"url":"|^Listening on )([^"\s]+)`)
	return p
}

// wait returns the program's exit status.
func (p *program) wait() int {
	p.t.Helper()
	select {
	case status := <-p.exit:
		p.exit <- status // for the cleanup
		return status
	case <-time.After(time.Minute):
		p.t.Fatal("the program did not end")
		return -1
	}
}

// wantExit checks the program's exit status.
func (p *program) wantExit(want int) {
	p.t.Helper()
	if status := p.wait(); status != want {
		p.t.Errorf("exit status %d, want %d", status, want)
	}
}

// credentials returns a directory with a credential file whose token is good for an hour, for the API at resource if there is one.
func credentials(t *testing.T, resource ...string) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, credentialFile), fmt.Sprintf(`{"access_token":"good-token","refresh_token":"refresh-1","token_type":"Bearer","resource_url":%q,"expiry_date":%d}`,
		strings.Join(resource, ""), time.Now().Add(time.Hour).UnixMilli()))
	return dir
}

// startWith runs serve, signed in, in front of an API that api answers for.
func startWith(t *testing.T, api http.HandlerFunc, env map[string]string) *program {
	t.Helper()
	if api == nil {
		api = http.NotFound
	}
	upstream := httptest.NewServer(api)
	t.Cleanup(upstream.Close)
	full := map[string]string{"API_BASE_URL": upstream.URL + "/v1", "QWEN_OAUTH_BASE_URL": upstream.URL, "QWEN_DIR": credentials(t)}
	for k, v := range env {
		full[k] = v
	}
	return start(t, full, "serve")
}

// post sends body to path and returns the answer, read whole.
func (p *program) post(path, body string) (*http.Response, string) {
	p.t.Helper()
	return p.do(http.MethodPost, path, strings.NewReader(body))
}

func (p *program) get(path string) (*http.Response, string) {
	p.t.Helper()
	return p.do(http.MethodGet, path, nil)
}

func (p *program) do(method, path string, body io.Reader) (*http.Response, string) {
	p.t.Helper()
	res, answer, err := testkit.Ask(p.t, http.DefaultClient, method, p.url+path, body)
	fatalIf(p.t, err)
	return res, answer
}

// open posts body and returns the answer, whose body is to be read while it comes.
func (p *program) open(path, body string) *http.Response {
	p.t.Helper()
	res, err := http.Post(p.url+path, "application/json", strings.NewReader(body))
	fatalIf(p.t, err)
	p.t.Cleanup(func() { res.Body.Close() })
	return res
}

func TestUsageAndExitStatus(t *testing.T) {
	tests := []struct {
		args           []string
		env            map[string]string
		status         int
		stdout, stderr string // substrings; "" wants nothing there
	}{
		{args: []string{"-h"}, stdout: "usage: qwen-go-proxy"},
		{args: []string{"--help"}, stdout: "healthcheck"},
		{args: []string{"serve", "-h"}, stdout: "usage: qwen-go-proxy serve"},
		{args: []string{"demo", "-h"}, stdout: "stand-in"},
		{args: []string{"healthcheck", "-h"}, stdout: "/health"},
		{args: []string{"version", "-h"}, stdout: "version"},
		{args: []string{"version"}, stdout: "qwen-go-proxy "},
		{args: []string{"--version"}, stdout: "qwen-go-proxy "},
		{args: []string{"-version"}, stdout: "qwen-go-proxy "},
		{args: []string{"help"}, stdout: "usage: qwen-go-proxy [command]"},
		{args: []string{"--version", "now"}, status: 2, stderr: `unexpected argument "now"`},
		{args: []string{"frobnicate"}, status: 2, stderr: `unknown command "frobnicate"`},
		{args: []string{"-port", "80"}, status: 2, stderr: `unexpected argument "-port"`},
		{args: []string{"serve", "now"}, status: 2, stderr: `unexpected argument "now"`},
		{args: []string{"serve"}, env: map[string]string{"RATE_LIMIT_RPS": "ten"}, status: 2, stderr: `RATE_LIMIT_RPS="ten"`},
		{args: []string{"healthcheck"}, env: map[string]string{"SERVER_PORT": "0"}, status: 1, stderr: "SERVER_PORT=0"},
		{args: []string{"healthcheck"}, env: map[string]string{"SERVER_HOST": "127.0.0.1", "SERVER_PORT": "1"}, status: 1, stderr: "refused"},
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			status := run(t.Context(), tt.args, lookup(tt.env), "", &stdout, &stderr)
			if status != tt.status {
				t.Errorf("exit status %d, want %d", status, tt.status)
			}
			for _, out := range []struct{ name, got, want string }{{"stdout", stdout.String(), tt.stdout}, {"stderr", stderr.String(), tt.stderr}} {
				if (out.want == "") != (out.got == "") || !strings.Contains(out.got, out.want) {
					t.Errorf("%s:\n%s\nwant %q in it", out.name, out.got, out.want)
				}
			}
		})
	}
}

// TestCommandsReadOnlyTheirSettings runs each command with all that it does not need broken.
func TestCommandsReadOnlyTheirSettings(t *testing.T) {
	t.Parallel()
	cert, key := certificate(t)
	dir := credentials(t)
	env := map[string]string{"ENABLE_TLS": "true", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "QWEN_DIR": dir, "SERVER_HOST": "127.0.0.1"}
	p := start(t, env)
	env["SERVER_PORT"] = p.url[strings.LastIndexByte(p.url, ':')+1:]
	for _, name := range settingNames() {
		if _, ok := env[name]; !ok && !strings.HasPrefix(name, "QWEN_") {
			env[name] = "\x00"
		}
	}
	delete(env, "API_BASE_URL")
	env["PROXY_API_KEYS"] = ""
	env["TLS_CERT_FILE"] = filepath.Join(dir, "none")
	env["QWEN_API_KEY_FILE"] = filepath.Join(dir, "none")
	for _, tt := range []struct {
		command string
		status  int
		out     string
	}{
		{"serve", 2, "the configuration is wrong"},
		{"healthcheck", 0, ""},
		{"status", 0, "ready"},
		{"login", 2, "With an API key no sign-in is needed"},
		{"logout", 0, "Signed out"},
	} {
		if status, out := runCommand(t, env, tt.command).wait(t); status != tt.status || !strings.Contains(out, tt.out) {
			t.Errorf("%s: exit status %d, want %d and %q:\n%s", tt.command, status, tt.status, tt.out, out)
		}
	}
}

func TestEnvFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), ".env")
	write := func(content string) {
		t.Helper()
		writeFile(t, file, content)
	}
	const secret = "s3cret"
	for name, tt := range map[string]struct {
		content string
		want    map[string]string
		err     string // of the lines that are wrong, the numbers
	}{
		"lines":           {"A=1\nB = two words \n\n", map[string]string{"A": "1", "B": "two words"}, ""},
		"CRLF and BOM":    {"\ufeffA=1\r\nB=2", map[string]string{"A": "1", "B": "2"}, ""},
		"comments":        {"# A=1\n  #B=2\nC=3 # three\nD=x#y\nE=#\n", map[string]string{"C": "3", "D": "x#y", "E": ""}, ""},
		"quotes":          {"A=\"a # b\"\nB='it is \"so\"' # quoted\nC=\"\"\n", map[string]string{"A": "a # b", "B": `it is "so"`, "C": ""}, ""},
		"an equals sign":  {"A=b=c\n", map[string]string{"A": "b=c"}, ""},
		"the last counts": {"A=1\nA=2\n", map[string]string{"A": "2"}, ""},
		"wrong lines":     {"A=1\nexport B=" + secret + "\n" + secret + "\nC=\"" + secret + "\n=" + secret + "\nD='" + secret + "'x\n", map[string]string{"A": "1"}, "2 3 4 5 6"},
		"empty":           {"", map[string]string{}, ""},
	} {
		write(tt.content)
		got, err := readEnvFile(file)
		wantEqual(t, name, tt.want, got)
		var lines []string
		if err != nil {
			for _, m := range regexp.MustCompile(`(?m)^`+regexp.QuoteMeta(file)+`, line (\d+): want `).FindAllStringSubmatch(err.Error(), -1) {
				lines = append(lines, m[1])
			}
		}
		if strings.Join(lines, " ") != tt.err || err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%s: error %v, want lines %q and no value", name, err, tt.err)
		}
	}
	if got, err := readEnvFile(filepath.Dir(file)); got != nil || err != nil {
		t.Errorf("a directory: %v, %v", got, err)
	}
	if _, err := readEnvFile(os.DevNull); err == nil {
		t.Error("a device is read")
	}
	write("SERVER_PORT=no port\nA\n")
	var stderr bytes.Buffer
	status := run(t.Context(), []string{"serve"}, lookup(nil), file, io.Discard, &stderr)
	if out := stderr.String(); status != 2 || !strings.Contains(out, ", line 2: ") || !strings.Contains(out, `SERVER_PORT="no port"`) {
		t.Errorf("exit status %d, want 2 and both problems:\n%s", status, out)
	}
	stderr.Reset()
	status = run(t.Context(), []string{"healthcheck"}, lookup(map[string]string{"SERVER_PORT": "1", "SERVER_HOST": "127.0.0.1"}), file, io.Discard, &stderr)
	if out := stderr.String(); status != 1 || !strings.Contains(out, "refused") {
		t.Errorf("healthcheck: exit status %d, want 1, from the server:\n%s", status, out)
	}
}

// TestDemoBannerWorks runs the demo's first example as it is printed.
func TestDemoBannerWorks(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip(err)
	}
	cert, key := certificate(t)
	for name, tt := range map[string]struct {
		env  map[string]string
		want string // in the banner
	}{
		"plain":       {nil, "any text"},
		"keys":        {map[string]string{"PROXY_API_KEYS": "k3y"}, "one of the proxy's keys (PROXY_API_KEYS)"},
		"Unix socket": {map[string]string{"SERVER_HOST": "unix:" + filepath.Join(t.TempDir(), "s")}, "curl --unix-socket "},
		"TLS":         {map[string]string{"ENABLE_TLS": "true", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key}, "curl -k https://"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := start(t, tt.env, "demo")
			p.stderr.await(t, `"msg":"signed in"`)
			banner, _, _ := strings.Cut(p.stderr.String(), `{"time"`)
			if !strings.Contains(banner, tt.want) {
				t.Errorf("%q is not in the banner:\n%s", tt.want, banner)
			}
			command := strings.ReplaceAll(p.stderr.await(t, `(?m)^  (curl .*)$`), "KEY", "k3y")
			out, err := exec.CommandContext(t.Context(), "sh", "-c", command+" -sS").CombinedOutput()
			if err != nil || !strings.Contains(string(out), "stand-in") {
				t.Errorf("%s: %v\n%s", command, err, out)
			}
		})
	}
}

// TestDemoNeedsNoAccountAndNoDirectory runs the demo on all addresses, where nothing can be written.
func TestDemoNeedsNoAccountAndNoDirectory(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	t.Setenv("TMPDIR", none)
	t.Chdir(t.TempDir())
	p := start(t, map[string]string{"SERVER_HOST": "0.0.0.0", "QWEN_DIR": none, "QWEN_API_KEY_FILE": none}, "demo")
	p.stderr.await(t, `"msg":"signed in"`)
	if res, body := p.post("/v1/chat/completions", `{"messages":[{"role":"user","content":"Hello"}]}`); res.StatusCode != http.StatusOK {
		t.Errorf("chat: %s %s", res.Status, body)
	}
	if out := p.stderr.String(); strings.Contains(out, `"level":"ERROR"`) || strings.Contains(out, "spend") || strings.Contains(out, "QWEN_API_KEY") {
		t.Errorf("it warns of what does not concern it:\n%s", out)
	}
	if entries, err := os.ReadDir("."); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestDemoFromSignInToAnswer(t *testing.T) {
	t.Parallel()
	p := start(t, map[string]string{"QWEN_API_KEY": "sk-must-not-be-used"}, "demo")
	if res, _ := p.get("/health/ready"); res.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("ready before the sign-in: %s", res.Status)
	}
	res, body := p.post("/v1/chat/completions", `{"messages":[{"role":"user","content":"too early"}]}`)
	early := wantError(t, res, body, http.StatusUnauthorized, typeAuthentication, "not_signed_in")
	if !strings.Contains(early.Error.Message, "approves itself after 2s") {
		t.Errorf("the early request is told %q, not when to try again", early.Error.Message)
	}

	link := p.stderr.await(t, `(?m)^(http://\S+/authorize\?\S+)$`)
	code := p.stderr.await(t, `(?m)^([A-Z0-9]{4}-[A-Z0-9]{4})$`)
	var auth map[string]string
	if _, body := p.get("/auth"); json.Unmarshal([]byte(body), &auth) != nil {
		t.Fatalf("/auth: %s", body)
	}
	if auth["verification_uri_complete"] != link || auth["user_code"] != code || auth["status"] != signInPending {
		t.Errorf("/auth says %v, the log says %s and %s", auth, link, code)
	}
	res, err := http.PostForm(strings.SplitN(link, "?", 2)[0], map[string][]string{"user_code": {code}, "decision": {"approve"}})
	fatalIf(t, err)
	res.Body.Close()
	p.stderr.await(t, `"msg":"signed in"`)

	if res, body := p.get("/health/ready"); res.StatusCode != http.StatusOK {
		t.Errorf("ready after the sign-in: %s %s", res.Status, body)
	}
	if _, body := p.get("/auth"); !strings.Contains(body, `"signed_in"`) {
		t.Errorf("/auth after the sign-in: %s", body)
	}
	for _, tt := range []struct{ path, body, want, suffix string }{
		{"chat/completions", `{"messages":[{"role":"user","content":"Hello there"}]}`, "Hello there", ""},
		{"chat/completions", `{"stream":true,"messages":[{"role":"user","content":"Hello"}]}`, `"delta":`, "data: [DONE]\n\n"},
		{"completions", `{"prompt":"Hello there"}`, `"text_completion"`, ""},
		{"completions", `{"prompt":"Hello","stream":true}`, `"text_completion"`, "data: [DONE]\n\n"},
		{"embeddings", `{"input":"Hello","model":"text-embedding-v4"}`, `"code":"endpoint_not_found"`, ""},
		{"responses", `{"input":"Hello"}`, `turn off \"Use Responses API\"`, ""},
	} {
		if _, body := p.post("/v1/"+tt.path, tt.body); !strings.Contains(body, tt.want) || !strings.HasSuffix(body, tt.suffix) {
			t.Errorf("%s %s: %s", tt.path, tt.body, body)
		}
	}
	if _, body := p.get("/v1/models"); !strings.Contains(body, `"qwen3-coder-plus"`) {
		t.Errorf("models: %s", body)
	}
	p.stop()
	p.wantExit(0)
}

func TestServeStartsWithoutNetwork(t *testing.T) {
	unused, err := net.Listen("tcp", "127.0.0.1:0")
	fatalIf(t, err)
	unused.Close()
	p := start(t, map[string]string{"QWEN_OAUTH_BASE_URL": "http://" + unused.Addr().String()})
	p.stderr.await(t, `a sign-in is needed, but can't be started yet.*can't be reached`)
	res, body := p.post("/v1/chat/completions", `{"messages":[]}`)
	wantError(t, res, body, http.StatusUnauthorized, typeAuthentication, "not_signed_in")
	res, body = p.get("/auth")
	wantError(t, res, body, http.StatusServiceUnavailable, typeNetwork, "sign_in_unavailable")
	if res, _ := p.get("/health"); res.StatusCode != http.StatusOK {
		t.Errorf("/health: %s", res.Status)
	}
}

func TestServeSaysWhatToDoIfItCannotListen(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	fatalIf(t, err)
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	for _, tt := range []struct{ host, port, want string }{
		{"127.0.0.1", port, "set SERVER_PORT to another port"},
		{"192.0.2.1", "0", "check SERVER_HOST"}, // RFC 5737: no machine has it
		{"unix:" + filepath.Join(t.TempDir(), "none", "socket"), "0", "check SERVER_HOST"},
	} {
		var stderr bytes.Buffer
		env := map[string]string{"SERVER_HOST": tt.host, "SERVER_PORT": tt.port, "QWEN_DIR": t.TempDir()}
		status := run(t.Context(), nil, lookup(env), "", io.Discard, &stderr)
		if status != 1 || !strings.Contains(stderr.String(), tt.want) {
			t.Errorf("%s: exit status %d, want 1 and %q, stderr:\n%s", tt.host, status, tt.want, &stderr)
		}
	}
}

func TestShutdownLetsAStreamFinish(t *testing.T) {
	release := make(chan struct{})
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		sse(w, "data: 1\n\n")
		<-release
		io.WriteString(w, "data: [DONE]\n\n")
	}, nil)
	body := bufio.NewReader(p.open("/v1/chat/completions", `{"messages":[]}`).Body)
	if line, _ := body.ReadString('\n'); line != "data: 1\n" {
		t.Fatalf("first line %q", line)
	}
	p.stop()
	p.stderr.await(t, `"msg":"shutting down"`)
	until(t, "new connections are refused", func() bool { // the line comes just before the listener closes
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	close(release)
	rest, err := io.ReadAll(body)
	if err != nil || string(rest) != "\ndata: [DONE]\n\n" {
		t.Errorf("rest of the stream: %q, %v", rest, err)
	}
	p.wantExit(0)
}

func TestShutdownDelay(t *testing.T) {
	t.Parallel()
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "{}") }, map[string]string{"SHUTDOWN_DELAY": "3s"})
	stopped := time.Now()
	p.stop()
	p.stderr.await(t, `"msg":"not ready any more`)
	var got []int
	for _, request := range []string{"GET /health/ready", "GET /health", "POST /v1/chat/completions"} {
		method, path, _ := strings.Cut(request, " ")
		res, _ := p.send(method, path, func(r *http.Request) { r.Close = true })
		got = append(got, res.StatusCode)
	}
	wantEqual(t, "readiness, health and a request during the delay", []int{503, 200, 200}, got)
	p.wantExit(0)
	if took := time.Since(stopped); took < 3*time.Second {
		t.Errorf("it took %v to stop, less than the delay", took)
	}
}

func TestShutdownCutsAStreamAtItsTimeout(t *testing.T) {
	t.Parallel()
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		sse(w, "data: 1\n\n")
		<-r.Context().Done()
	}, map[string]string{"SHUTDOWN_TIMEOUT": "100ms"})
	body := bufio.NewReader(p.open("/v1/chat/completions", `{"messages":[]}`).Body)
	body.ReadString('\n')
	p.stop()
	rest, err := io.ReadAll(body)
	if err == nil || !strings.Contains(string(rest), `"code":"shutting_down"`) {
		t.Errorf("rest of the stream: %q, %v; want an error event and a cut", rest, err)
	}
	p.wantExit(0)
}

func TestHealthcheckAsksTheServerOfTheSameEnvironment(t *testing.T) {
	cert, key := certificate(t)
	for name, env := range map[string]map[string]string{
		"TCP":           {"SERVER_HOST": "127.0.0.1"},
		"all addresses": {"SERVER_HOST": "0.0.0.0"},
		"IPv6":          {"SERVER_HOST": "::1"},
		"TLS":           {"SERVER_HOST": "127.0.0.1", "ENABLE_TLS": "true", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key},
		"Unix socket":   {"SERVER_HOST": "unix:" + filepath.Join(t.TempDir(), "s")},
	} {
		env["QWEN_API_KEY"] = "sk-test"
		if p := start(t, env); !strings.HasPrefix(p.url, "unix:") {
			env["SERVER_PORT"] = p.url[strings.LastIndexByte(p.url, ':')+1:]
		}
		if status, out := runCommand(t, env, "healthcheck").wait(t); status != 0 {
			t.Errorf("%s: exit status %d: %s", name, status, out)
		}
	}
}

func TestRoutes(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) { answerJSON(w, 200, `{"path":"`+r.URL.Path+`"}`) }, nil)
	for route, want := range map[string]string{
		"GET /":                      `200 {"message":"Qwen API proxy is running","version":`,
		"GET /health":                `200 {"status":"healthy"`,
		"HEAD /health":               `200 `,
		"GET /health/ready":          `200 {"status":"ready"`,
		"POST /v1/chat/completions":  `200 {"path":"/v1/chat/completions"}`,
		"POST /chat/completions":     `200 {"path":"/v1/chat/completions"}`,
		"POST /v1//chat/completions": `200 {"path":"/v1/chat/completions"}`,
		"POST /v2/chat/completions":  `404 {"error":`,
	} {
		method, path, _ := strings.Cut(route, " ")
		res, body := p.send(method, path, nil)
		if got := fmt.Sprint(res.StatusCode, " ", body); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %s, want %s", route, got, want)
		}
		for name, want := range map[string]string{"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"} {
			if got := res.Header.Get(name); got != want {
				t.Errorf("%s: %s %q, want %q", route, name, got, want)
			}
		}
	}
}

// TestPanicsStayInside drives track with handlers that fail.
func TestPanicsStayInside(t *testing.T) {
	var log logBuffer
	cfg, err := loadConfig(lookup(nil))
	fatalIf(t, err)
	srv := httptest.NewServer(track(cfg, slog.New(slog.NewJSONHandler(&log, nil)), newMetrics(), func(x *exchange, r *http.Request) error {
		if r.URL.Path == "/before" {
			panic("at once")
		}
		io.WriteString(x, "half an ans")
		http.NewResponseController(x).Flush()
		panic("in the middle")
	}))
	defer srv.Close()
	res, body, err := testkit.Ask(t, http.DefaultClient, "GET", srv.URL+"/before", nil)
	fatalIf(t, err)
	wantError(t, res, body, http.StatusInternalServerError, typeServer, "internal_error")
	if _, body, err = testkit.Ask(t, http.DefaultClient, "GET", srv.URL+"/after", nil); err == nil {
		t.Errorf("an answer broken by a panic looks whole: %q", body)
	}
	log.await(t, `"panic":"in the middle"`)
}

// A file that is embedded but kept out of the build context would break the image alone.
func TestDockerContextHasWhatIsEmbedded(t *testing.T) {
	b := readFile(t, ".dockerignore")
	lines := strings.Split(string(b), "\n")
	pkg, err := build.ImportDir(".", 0)
	fatalIf(t, err)
	if len(pkg.EmbedPatterns) == 0 {
		t.Fatal("nothing is embedded")
	}
	for _, pattern := range pkg.EmbedPatterns {
		if !slices.Contains(lines, "!"+pattern) {
			t.Errorf(".dockerignore leaves out %s, which is embedded: want a line !%s", pattern, pattern)
		}
	}
}

// TestMapOfTheFiles: the package comment has a line for each file.
func TestMapOfTheFiles(t *testing.T) {
	b := readFile(t, "main.go")
	var want, got []string
	for _, m := range regexp.MustCompile(`(?m)^//\t(\w+\.go) `).FindAllStringSubmatch(string(b), -1) {
		got = append(got, m[1])
	}
	files, err := filepath.Glob("*.go")
	fatalIf(t, err)
	for _, file := range files {
		if !strings.HasSuffix(file, "_test.go") {
			want = append(want, file)
		}
	}
	slices.Sort(got)
	wantEqual(t, "files", want, got)
}
