package main

import (
	"context"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A terminal is one run of a command that is waited for.
type terminal struct {
	stdout, stderr *logBuffer
	stop           context.CancelFunc
	exit           chan int
}

func runCommand(t *testing.T, env map[string]string, args ...string) *terminal {
	ctx, stop := context.WithCancel(t.Context())
	c := &terminal{stdout: &logBuffer{}, stderr: &logBuffer{}, stop: stop, exit: make(chan int, 1)}
	go func() { c.exit <- run(ctx, args, lookup(env), "", c.stdout, c.stderr) }()
	t.Cleanup(stop)
	return c
}

// wait returns the exit status and what was printed.
func (c *terminal) wait(t *testing.T) (int, string) {
	t.Helper()
	select {
	case status := <-c.exit:
		return status, c.stdout.String() + c.stderr.String()
	case <-time.After(time.Minute):
		t.Fatalf("the command did not end:\n%s%s", c.stdout, c.stderr)
		return 0, ""
	}
}

// wantCommand runs a command, checks its exit status and that part is in what it prints, and returns that.
func wantCommand(t *testing.T, env map[string]string, want int, part string, args ...string) string {
	t.Helper()
	status, out := runCommand(t, env, args...).wait(t)
	if status != want || !strings.Contains(out, part) {
		t.Errorf("%s: exit status %d, want %d and %q:\n%s", args, status, want, part, out)
	}
	return out
}

// qwenEnv starts a stand-in that approves nothing by itself, and returns an environment that leads there.
func qwenEnv(t *testing.T) (*standIn, map[string]string) {
	qwen := newStandIn()
	qwen.approveAfter = time.Hour
	srv := httptest.NewServer(qwen)
	t.Cleanup(srv.Close)
	return qwen, map[string]string{"QWEN_OAUTH_BASE_URL": srv.URL, "QWEN_DIR": filepath.Join(t.TempDir(), "qwen"), "SERVER_HOST": "127.0.0.1", "SERVER_PORT": "1"}
}

// decide follows a sign-in's link and approves or denies it.
func decideAt(t *testing.T, link, decision string) {
	t.Helper()
	u, err := url.Parse(link)
	fatalIf(t, err)
	res, err := http.PostForm("http://"+u.Host+"/authorize", url.Values{"user_code": {u.Query().Get("user_code")}, "decision": {decision}})
	fatalIf(t, err)
	res.Body.Close()
}

const (
	linkLine = `(?m)^(http://\S+/authorize\?\S+)$`
	codeLine = `(?m)^([A-Z0-9]{4}-[A-Z0-9]{4})$`
)

func TestLoginStoresTheCredentials(t *testing.T) {
	t.Parallel()
	_, env := qwenEnv(t)
	env["SERVER_PORT"] = "0"
	server := start(t, env)
	env["SERVER_PORT"] = "1" // for status: nobody listens there
	login := runCommand(t, env, "login", "-no-browser")
	link, code := login.stdout.await(t, linkLine), login.stdout.await(t, codeLine)
	if !strings.Contains(link, code) {
		t.Errorf("link %s, code %s", link, code)
	}
	decideAt(t, link, "approve")
	if status, out := login.wait(t); status != 0 || !strings.Contains(out, "Signed in.") {
		t.Fatalf("exit status %d:\n%s", status, out)
	}
	file := filepath.Join(env["QWEN_DIR"], credentialFile)
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("file %v, %v", info, err)
	}
	if info, err := os.Stat(env["QWEN_DIR"]); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory %v, %v", info, err)
	}
	token := regexp.MustCompile(`"access_token": "([^"]+)"`)
	content, _ := os.ReadFile(file)
	secret := token.FindStringSubmatch(string(content))[1]

	status, out := runCommand(t, env, "status").wait(t)
	if status != 0 || !strings.Contains(out, "signed in to Qwen") || !strings.Contains(out, file) || !strings.Contains(out, "good until") || strings.Contains(out, secret) {
		t.Errorf("status: exit status %d:\n%s", status, out)
	}

	// The server that was running all the time has it within seconds, and its own sign-in is over.
	server.stderr.await(t, `"msg":"another process has changed the credentials; using them"`)
	if res, body := server.post("/v1/chat/completions", `{"messages":[{"role":"user","content":"Hello"}]}`); res.StatusCode != 200 {
		t.Errorf("chat after login: %s %s", res.Status, body)
	}

	wantCommand(t, env, 0, "Signed out", "logout")
	if b, _ := os.ReadFile(file); string(b) != "{}\n" {
		t.Errorf("after logout the file holds %q", b)
	}
	wantCommand(t, env, 0, "Nobody was signed in", "logout")
	wantCommand(t, env, 1, "not signed in", "status")
	server.stderr.await(t, `"msg":"signed out by another process"`)
	res, body := server.post("/v1/chat/completions", `{"messages":[]}`)
	wantError(t, res, body, 401, typeAuthentication, "not_signed_in")
	if strings.Contains(server.stderr.String(), secret) {
		t.Error("the token is in the server's log")
	}
}

func TestLoginThatFailsChangesNothing(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		end  func(t *testing.T, c *terminal, link string)
		want string
	}{
		"denied":      {func(t *testing.T, c *terminal, link string) { decideAt(t, link, "deny") }, "denied"},
		"interrupted": {func(t *testing.T, c *terminal, link string) { c.stop() }, "given up"},
	} {
		t.Run(name, func(t *testing.T) {
			_, env := qwenEnv(t)
			fatalIf(t, os.MkdirAll(env["QWEN_DIR"], 0o700))
			file := filepath.Join(env["QWEN_DIR"], credentialFile)
			writeFile(t, file, fileContent)
			c := runCommand(t, env, "login")
			tt.end(t, c, c.stdout.await(t, linkLine))
			if status, out := c.wait(t); status != 1 || !strings.Contains(out, tt.want) {
				t.Errorf("exit status %d:\n%s", status, out)
			}
			if b, _ := os.ReadFile(file); string(b) != fileContent {
				t.Errorf("the file holds %q", b)
			}
			if entries, _ := os.ReadDir(env["QWEN_DIR"]); len(entries) != 1 {
				t.Errorf("left behind: %v", entries)
			}
		})
	}
}

// answeringServer returns the URL of a server that answers everything with body.
func answeringServer(t *testing.T, status int, body string) string {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(status)
		w.Write([]byte(body))
	}))
	t.Cleanup(srv.Close)
	return srv.URL
}

// TestLoginSaysWhyItCannotStart gives sign-in servers that can't be reached or answer what they should not.
func TestLoginSaysWhyItCannotStart(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ server, want string }{
		"no network":        {"http://127.0.0.1:1", "Qwen's sign-in server 127.0.0.1:1 can't be reached: dial tcp 127.0.0.1:1: connect: connection refused; check the network"},
		"no name":           {"http://qwen.invalid", "Qwen's sign-in server qwen.invalid can't be reached: "},
		"too many requests": {answeringServer(t, 429, "slow down"), " answered 429 Too Many Requests. Run login again later"},
		"an outage":         {answeringServer(t, 502, "<html>"), "answered 502 Bad Gateway. Run login again later"},
		"slow_down":         {answeringServer(t, 429, `{"error":"slow_down"}`), `answered "slow_down".`},
		"a refusal":         {answeringServer(t, 400, `{"error":"invalid_client"}`), `answered "invalid_client".`},
		"another answer":    {answeringServer(t, 200, "{}"), "answered without a usable device_code"},
	} {
		status, out := runCommand(t, map[string]string{"QWEN_OAUTH_BASE_URL": tt.server, "QWEN_DIR": t.TempDir()}, "login").wait(t)
		if status != 1 || !strings.Contains(out, tt.want) || strings.Contains(out, "/api/v1") {
			t.Errorf("%s: exit status %d, want 1 and %q:\n%s", name, status, tt.want, out)
		}
	}
}

// TestStatusBelievesTheServer compares what a running server says with what the files of this environment say.
func TestStatusBelievesTheServer(t *testing.T) {
	t.Parallel()
	port := func(url string) string { return url[strings.LastIndexByte(url, ':')+1:] }
	serving := func(env map[string]string) string { return port(start(t, env, "serve").url) }
	const noQwen = "http://127.0.0.1:1"
	signedIn, signedOut := credentials(t), t.TempDir()
	ready := serving(map[string]string{"QWEN_DIR": signedIn})
	unready := serving(map[string]string{"QWEN_DIR": signedOut, "QWEN_OAUTH_BASE_URL": noQwen})
	refused := port(answeringServer(t, 503, `{"status":"not_ready","code":"invalid_api_key","reason":"Qwen refuses the key."}`))
	for name, tt := range map[string]struct {
		env    map[string]string
		status int
		want   []string
		not    string
	}{
		"ready, and its files are elsewhere": {map[string]string{"SERVER_PORT": ready, "QWEN_DIR": signedOut}, 0,
			[]string{"server:      ready at 127.0.0.1:" + ready, "credentials: the server has its own"}, ""},
		"ready, with its files": {map[string]string{"SERVER_PORT": ready, "QWEN_DIR": signedIn}, 0,
			[]string{"server:      ready", "credentials: signed in to Qwen", "token:       good until", signedIn}, ""},
		"not ready, and the files are good": {map[string]string{"SERVER_PORT": unready, "QWEN_DIR": signedIn}, 1,
			[]string{"server:      not ready", "not signed in", "credentials: signed in to Qwen"}, ""},
		"the key is refused": {map[string]string{"SERVER_PORT": refused, "QWEN_API_KEY": "sk-1"}, 1,
			[]string{"server:      not ready", "Qwen refuses the key.", "credentials: API key"}, ""},
		"no server, signed in": {map[string]string{"SERVER_PORT": "1", "QWEN_DIR": signedIn}, 0,
			[]string{"server:      not running at 127.0.0.1:1", "credentials: signed in to Qwen"}, ""},
		"no server, not signed in": {map[string]string{"SERVER_PORT": "1", "QWEN_DIR": signedOut}, 1,
			[]string{"server:      not running", "credentials: not signed in: set QWEN_API_KEY, or sign in with qwen-go-proxy login"}, ""},
		"no server, no usable key": {map[string]string{"SERVER_PORT": "1", "QWEN_API_KEY_FILE": signedOut}, 1,
			[]string{"credentials: QWEN_API_KEY_FILE=", "want a readable file"}, ""},
		"no server, an API that gets no token": {map[string]string{"SERVER_PORT": "1", "QWEN_DIR": foreignBase(t)}, 1,
			[]string{"set API_BASE_URL"}, ""},
		"no server, a Unix socket": {map[string]string{"SERVER_HOST": "unix:" + filepath.Join(signedOut, "s"), "QWEN_DIR": signedIn}, 0,
			[]string{"server:      not running at " + filepath.Join(signedOut, "s")}, ""},
		"a server that can't be understood": {map[string]string{"SERVER_PORT": ready, "QWEN_DIR": signedIn, "ENABLE_TLS": "true"}, 1,
			[]string{"server:      not known: "}, ""},
		"any port": {map[string]string{"SERVER_PORT": "0", "QWEN_DIR": signedIn}, 0,
			[]string{"server:      not known: SERVER_PORT=0", "credentials: signed in to Qwen"}, ""},
		"another program": {map[string]string{"SERVER_PORT": port(answeringServer(t, 200, "hello")), "QWEN_DIR": signedIn}, 1,
			[]string{"server:      not known: another program answers"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			env := map[string]string{"SERVER_HOST": "127.0.0.1"}
			maps.Copy(env, tt.env)
			status, out := runCommand(t, env, "status").wait(t)
			if status != tt.status {
				t.Errorf("exit status %d, want %d", status, tt.status)
			}
			for _, want := range tt.want {
				if !strings.Contains(out, want) {
					t.Errorf("%q is missing", want)
				}
			}
			if tt.not != "" && strings.Contains(out, tt.not) {
				t.Errorf("%q is there", tt.not)
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}

// foreignBase returns a directory with credentials for an API that gets no token.
func foreignBase(t *testing.T) string {
	dir := t.TempDir()
	content := strings.Replace(fileContent, "portal.qwen.ai", "evil.example", 1)
	writeFile(t, filepath.Join(dir, credentialFile), content)
	return dir
}

// TestLogoutBesideALock finds a lock that a process without a sign of life has left.
func TestLogoutBesideALock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := credentials(t)
		lock := filepath.Join(dir, lockFile)
		writeFile(t, lock, "dead")
		begin := time.Now()
		os.Chtimes(lock, begin, begin)
		c := runCommand(t, map[string]string{"QWEN_DIR": dir}, "logout")
		time.Sleep(time.Second)
		if out := c.stderr.String(); !strings.Contains(out, "Another process holds "+lock) {
			t.Errorf("after a second it has said %q", out)
		}
		status := <-c.exit
		if took := time.Since(begin); status != 0 || took > time.Minute {
			t.Errorf("exit status %d after %v:\n%s%s", status, took, c.stdout, c.stderr)
		}
		if b, _ := os.ReadFile(filepath.Join(dir, credentialFile)); string(b) != "{}\n" {
			t.Errorf("the file holds %q", b)
		}
	})
}

func TestLoginSaysBeforehandThatItCannotStore(t *testing.T) {
	qwen, env := qwenEnv(t)
	if err := os.WriteFile(env["QWEN_DIR"], nil, 0o600); err != nil { // a file in the directory's place
		t.Fatal(err)
	}
	status, out := runCommand(t, env, "login").wait(t)
	if status != 1 || !strings.Contains(out, "can't write the directory") || !strings.Contains(out, env["QWEN_DIR"]) || !strings.Contains(out, "user id") {
		t.Errorf("exit status %d:\n%s", status, out)
	}
	if n := qwen.authorizations(); n != 0 {
		t.Errorf("%d sign-ins were started", n)
	}
}

func TestLogoutLeavesForeignFilesAlone(t *testing.T) {
	_, env := qwenEnv(t)
	os.MkdirAll(env["QWEN_DIR"], 0o700)
	file := filepath.Join(env["QWEN_DIR"], credentialFile)
	os.WriteFile(file, []byte(`{"acc`), 0o600)
	wantCommand(t, env, 1, "cut short", "logout")
	if b, _ := os.ReadFile(file); string(b) != `{"acc` {
		t.Errorf("the file holds %q", b)
	}
}

func TestWithAnAPIKeyThereIsNoOAuth(t *testing.T) {
	qwen, env := qwenEnv(t)
	env["QWEN_API_KEY"] = "sk-sp-mine"
	wantCommand(t, env, 2, "QWEN_API_KEY", "login")
	if status, out := runCommand(t, env, "status").wait(t); status != 0 || !strings.Contains(out, "API key") || strings.Contains(out, "sk-sp-mine") {
		t.Errorf("status: exit status %d:\n%s", status, out)
	}
	env["SERVER_PORT"] = "0"
	server := start(t, env)
	server.stderr.await(t, `set API_BASE_URL to the plan's base URL`)
	if _, body := server.get("/auth"); !strings.Contains(body, "api_key") {
		t.Errorf("/auth: %s", body)
	}
	if n := qwen.authorizations(); n != 0 {
		t.Errorf("%d sign-ins were started", n)
	}
	if _, err := os.Stat(env["QWEN_DIR"]); err == nil {
		t.Error("QWEN_DIR was made")
	}
}

func TestTheAPIKeysFileIsFollowed(t *testing.T) {
	t.Parallel()
	var got = make(chan string, 1)
	file := filepath.Join(t.TempDir(), "key")
	writeFile(t, file, "sk-old\n")
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		got <- r.Header.Get("Authorization")
		answerJSON(w, 200, "{}")
	}, map[string]string{"QWEN_API_KEY_FILE": file})
	p.post("/v1/chat/completions", `{"messages":[]}`)
	if key := <-got; key != "Bearer sk-old" {
		t.Errorf("sent %q", key)
	}
	writeFile(t, file, "sk-new\n")
	p.stderr.await(t, `"msg":"the API key has changed"`)
	p.post("/v1/chat/completions", `{"messages":[]}`)
	if key := <-got; key != "Bearer sk-new" {
		t.Errorf("sent %q", key)
	}
	fatalIf(t, os.WriteFile(file, nil, 0o600))
	p.stderr.await(t, `"msg":"QWEN_API_KEY_FILE can't be used`)
	p.post("/v1/chat/completions", `{"messages":[]}`)
	if key := <-got; key != "Bearer sk-new" {
		t.Errorf("sent %q after the file was emptied", key)
	}
}
