package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	mathrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestMain is the program itself where a test has started it as a process of its own.
func TestMain(m *testing.M) {
	if os.Getenv("QWEN_GO_PROXY_TEST_MAIN") == "1" {
		main()
	}
	os.Exit(m.Run())
}

// longTests reports whether the tests with processes take the time that proves most, minutes each.
func longTests() bool { return os.Getenv("QWEN_LONG_TESTS") == "1" }

// A process is the program in a process of its own.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	url    string // where it listens
	stderr *logBuffer
	ended  chan struct{}
	status error // of Wait; set once ended is closed
}

// startProcess runs serve with env on a free loopback port, and kills it when the test ends. Before that, adapt may
// change how it is started. Where env names a port, it must set LOG_LEVEL=info too: the log then says that it listens.
func startProcess(t *testing.T, env map[string]string, adapt ...func(*exec.Cmd)) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.Command(exe), stderr: &logBuffer{}, ended: make(chan struct{})}
	full := map[string]string{
		"QWEN_GO_PROXY_TEST_MAIN": "1", "SERVER_HOST": "127.0.0.1", "SERVER_PORT": "0", "RATE_LIMIT_RPS": "0", "LOG_LEVEL": "warn",
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
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
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
	p.url = p.stderr.await(t, `(?m)(?:"msg":"listening".*"url":"|^Listening on )([^"\s]+)`)
	return p
}

// kill ends the process as a crash would, and returns once it is gone.
func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.ended
}

// terminate asks the process to end, and checks that it does so well.
func (p *process) terminate() {
	p.t.Helper()
	if runtime.GOOS == "windows" {
		p.kill() // there is no SIGTERM
		return
	}
	http.DefaultClient.CloseIdleConnections() // one that has never been used would be waited for
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		if p.status != nil {
			p.t.Errorf("process %d: %v", p.cmd.Process.Pid, p.status)
		}
	case <-time.After(20 * time.Second):
		p.t.Errorf("process %d did not stop", p.cmd.Process.Pid)
	}
}

// chat sends a chat request and returns the answer's status and body.
func (p *process) chat() (int, string, error) {
	res, err := http.Post(p.url+"/v1/chat/completions", "application/json", strings.NewReader(`{"messages":[{"role":"user","content":"Hello"}]}`))
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res.StatusCode, string(body), err
}

// A witness is a stand-in for Qwen that takes its time to answer, and notes what became of refreshes.
type witness struct {
	*standIn
	url   string
	store *credentialStore     // of the processes under test
	delay func() time.Duration // before, and again after, a token is issued

	issuing chan struct{} // 1 slot: a request that is to issue a token has arrived

	mu       sync.Mutex // guards all below
	under    int        // refreshes under way
	most     int        // at one time
	refresh  string     // the refresh token issued last
	issued   time.Time  // when
	by       map[string]int
	stored   map[string]bool // access tokens that have been in the file
	seen     map[string]bool // access tokens that API requests have carried
	unstored int             // of those, the ones that were not in the file by then
}

// newWitness serves a witness, with a credential file in dir whose token has expired and can be refreshed.
func newWitness(t *testing.T, dir string, life time.Duration) *witness {
	t.Helper()
	w := &witness{
		standIn: newStandIn(), store: &credentialStore{dir: dir}, delay: func() time.Duration { return 10 * time.Millisecond },
		issuing: make(chan struct{}, 1), refresh: "first",
		by: map[string]int{}, stored: map[string]bool{}, seen: map[string]bool{},
	}
	w.tokenLife = life
	w.approveAfter = time.Millisecond
	w.interval = time.Second
	w.refreshTokens[w.refresh] = true
	srv := httptest.NewServer(w)
	t.Cleanup(srv.Close)
	w.url = srv.URL
	content := fmt.Sprintf(`{"access_token":"expired","refresh_token":%q,"token_type":"Bearer","resource_url":%q,"expiry_date":%d}`,
		w.refresh, w.url, time.Now().Add(-time.Minute).UnixMilli())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.store.path(), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return w
}

// env is that of a process under test.
func (w *witness) env() map[string]string {
	return map[string]string{"QWEN_OAUTH_BASE_URL": w.url, "QWEN_DIR": w.store.dir}
}

func (w *witness) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	switch {
	case r.URL.Path == "/api/v1/oauth2/token":
		w.tokens(rw, r)
		return
	case strings.HasPrefix(r.URL.Path, "/v1/"):
		w.look(r)
	}
	w.standIn.ServeHTTP(rw, r)
}

// tokens answers a token request.
func (w *witness) tokens(rw http.ResponseWriter, r *http.Request) {
	w.look(nil)
	refresh := r.PostFormValue("refresh_token")
	w.mu.Lock()
	good := refresh == w.refresh
	if refresh != "" {
		w.under++
		w.most = max(w.most, w.under)
		defer func() {
			w.mu.Lock()
			w.under--
			w.mu.Unlock()
		}()
	}
	w.mu.Unlock()
	if good {
		wakeUp(w.issuing)
	}
	time.Sleep(w.delay())
	answer := httptest.NewRecorder()
	w.standIn.ServeHTTP(answer, r)
	var issued struct {
		Refresh string `json:"refresh_token"`
	}
	if answer.Code == http.StatusOK && json.Unmarshal(answer.Body.Bytes(), &issued) == nil {
		agent, _, _ := strings.Cut(r.UserAgent(), "/")
		w.mu.Lock()
		w.refresh, w.issued = issued.Refresh, time.Now()
		w.by[agent]++
		w.mu.Unlock()
		wakeUp(w.issuing)
	}
	time.Sleep(w.delay())
	maps.Copy(rw.Header(), answer.Header())
	rw.WriteHeader(answer.Code)
	rw.Write(answer.Body.Bytes())
}

// look notes the access token in the file, and whether that of an API request r has been there.
func (w *witness) look(r *http.Request) {
	if r != nil {
		w.mu.Lock()
		seen := w.seen[r.Header.Get("Authorization")]
		w.mu.Unlock()
		if seen {
			return
		}
	}
	// A store of its own: load notes in it what it saw.
	t, err := (&credentialStore{dir: w.store.dir}).load()
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.stored["Bearer "+t.access] = true
	}
	if r != nil {
		sent := r.Header.Get("Authorization")
		w.seen[sent] = true
		if !w.stored[sent] {
			w.unstored++
		}
	}
}

// settled returns the refresh token issued last, and when, once no refresh is under way.
func (w *witness) settled() (string, time.Time) {
	for {
		w.mu.Lock()
		under, refresh, issued := w.under, w.refresh, w.issued
		w.mu.Unlock()
		if under == 0 {
			return refresh, issued
		}
		time.Sleep(time.Millisecond)
	}
}

// left counts what is in the directory of the credential file, temporary files by their kind.
func (w *witness) left() map[string]int {
	entries, _ := os.ReadDir(w.store.dir)
	left := map[string]int{}
	for _, e := range entries {
		name := e.Name()
		switch {
		case strings.HasSuffix(name, ".tmp"):
			name = "*.tmp"
		case strings.Contains(name, ".stale."):
			name = "*.stale.*"
		}
		left[name]++
	}
	return left
}

// A load is what came of requests to processes.
type load struct {
	sent, failed atomic.Int64
	answered     []atomic.Int64 // with 200, by process
}

// loadFor sends rate requests a second, to one of the processes after the other, for d.
func loadFor(t *testing.T, processes []*process, rate int, d time.Duration) *load {
	t.Helper()
	l := &load{answered: make([]atomic.Int64, len(processes))}
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	var all sync.WaitGroup
	defer all.Wait()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return l
		case <-tick.C:
		}
		i := n % len(processes)
		l.sent.Add(1)
		all.Go(func() {
			status, body, err := processes[i].chat()
			if status == http.StatusOK && err == nil {
				l.answered[i].Add(1)
			} else if l.failed.Add(1) <= 5 {
				t.Errorf("request to process %d: %d %s, %v", i, status, body, err)
			}
		})
	}
}

// log reports the figures of l, and fails the test where a process did not take its part.
func (l *load) log(t *testing.T) {
	t.Helper()
	var answered []int64
	for i := range l.answered {
		n := l.answered[i].Load()
		answered = append(answered, n)
		if n < l.sent.Load()/int64(len(l.answered)) {
			t.Errorf("process %d answered %d requests of %d to all", i, n, l.sent.Load())
		}
	}
	t.Logf("%d requests, %d failed, answered by each process: %d", l.sent.Load(), l.failed.Load(), answered)
}

// TestFiveProcessesShareADirectory has five processes live on tokens of 3 s: all of them go on, on one refresh for all
// each time that half of a token's life is over.
func TestFiveProcessesShareADirectory(t *testing.T) {
	t.Parallel()
	const life = 3 * time.Second
	d := 4 * time.Second
	if longTests() {
		d = time.Minute
	}
	w := newWitness(t, filepath.Join(t.TempDir(), "qwen"), life)
	started := time.Now()
	var processes []*process
	for range 5 {
		processes = append(processes, startProcess(t, w.env()))
	}
	l := loadFor(t, processes, 50, d)
	for _, p := range processes {
		p.terminate()
	}
	took := time.Since(started)
	w.settled()
	l.log(t)
	c := w.counts()
	t.Logf("%d refreshes in %v with tokens of %v, %d at one time at the most", c.refreshes, took.Round(time.Millisecond), life, w.most)
	if least, most := int(d/life), int(took/(life/2))+1; c.refreshes < least || c.refreshes > most {
		t.Errorf("%d refreshes, want %d to %d", c.refreshes, least, most)
	}
	if c.replays != 0 || c.refreshesRefused != 0 || c.deviceAuthorizations != 0 || w.most != 1 || w.unstored != 0 {
		t.Errorf("%d refresh tokens sent twice, %d refused, %d sign-ins, %d refreshes at one time, %d tokens used before they were stored; want 0, 0, 0, 1, 0",
			c.replays, c.refreshesRefused, c.deviceAuthorizations, w.most, w.unstored)
	}
	if left := w.left(); len(left) != 1 || left[credentialFile] != 1 {
		t.Errorf("left in the directory: %v, want the credential file alone", left)
	}
}

// TestKilledWhileRefreshing kills the process again and again while it gets a token.
func TestKilledWhileRefreshing(t *testing.T) {
	t.Parallel()
	kills := 6
	if longTests() {
		kills = 200
	}
	w := newWitness(t, filepath.Join(t.TempDir(), "qwen"), time.Second)
	w.delay = func() time.Duration { return mathrand.N(4 * time.Millisecond) }
	var idle, inFlight, received, kept int
	var latest time.Duration // after its token was issued, that a kill made it lost
	for n := range kills {
		select {
		case <-w.issuing: // of the last process
		default:
		}
		_, last := w.settled()
		p := startProcess(t, w.env())
		ctx, stop := context.WithCancel(t.Context())
		var client sync.WaitGroup
		client.Go(func() {
			for sleep(ctx, 2*time.Millisecond) {
				p.chat() // the kill breaks some
			}
		})
		if n%4 == 3 {
			time.Sleep(mathrand.N(time.Second)) // at any instant
		} else {
			select {
			case <-w.issuing:
			case <-time.After(30 * time.Second):
				t.Fatalf("no token was asked for after kill %d", n)
			}
			time.Sleep(mathrand.N(16 * time.Millisecond))
		}
		killed := time.Now()
		p.kill()
		stop()
		client.Wait()
		refresh, issued := w.settled()

		stored, err := w.store.load()
		if err != nil {
			t.Fatalf("after kill %d: %v", n, err)
		}
		switch {
		case issued.Equal(last):
			idle++
		case stored.refresh == refresh:
			kept++
		case issued.After(killed):
			inFlight++
		default:
			received++
			latest = max(latest, killed.Sub(issued))
		}
		// A lock that the process left would be waited for until it is stale.
		if w.left()[lockFile] > 0 {
			setAge(t, filepath.Join(w.store.dir, lockFile), ancientLock)
		}
	}
	c := w.counts()
	t.Logf("%d kills: %d while no token was issued, %d after it was stored; lost: %d while the server answered, %d between the answer and the rename, at most %v after the token was issued",
		kills, idle, kept, inFlight, received, latest.Round(10*time.Microsecond))
	t.Logf("%d refreshes, %d sign-ins, %d tokens used", c.refreshes, c.signIns, len(w.seen))
	if latest > 500*time.Millisecond {
		t.Errorf("a token was lost %v after it was issued", latest)
	}
	if w.unstored != 0 {
		t.Errorf("%d tokens of %d were used before they were stored", w.unstored, len(w.seen))
	}
	t.Logf("left in the directory: %v", w.left())
}

// TestBesideQwenCode runs three processes beside three of Qwen Code's own token manager, on one directory.
func TestBesideQwenCode(t *testing.T) {
	qwenCode := os.Getenv("QWEN_CODE_DIR")
	if qwenCode == "" {
		t.Skip("QWEN_CODE_DIR is not set; examples/qwen-code/check.sh fetches Qwen Code and runs this test with it")
	}
	node, err := exec.LookPath("node")
	if err != nil {
		t.Fatal(err)
	}
	duration := func(name string, def time.Duration) time.Duration {
		d, err := time.ParseDuration(cmp.Or(os.Getenv(name), def.String()))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return d
	}
	life := duration("QWEN_CODE_TOKEN_LIFE", time.Minute)
	if life < 35*time.Second {
		t.Fatalf("QWEN_CODE_TOKEN_LIFE=%v: Qwen Code takes a token as expired 30 s before it is, and would refresh all the time", life)
	}
	d := duration("QWEN_CODE_DURATION", 2*time.Minute)
	w := newWitness(t, filepath.Join(t.TempDir(), "qwen"), life)
	w.delay = func() time.Duration { return 50*time.Millisecond + mathrand.N(200*time.Millisecond) }
	var processes []*process
	for range 3 {
		processes = append(processes, startProcess(t, w.env()))
	}

	var mu sync.Mutex
	reports := map[string]int{} // what Qwen Code's managers said, by manager
	problems := map[string]int{}
	var managers sync.WaitGroup
	for i := range 3 {
		cmd := exec.Command(node, filepath.Join("examples", "qwen-code", "manager.mjs"))
		cmd.Env = append(os.Environ(), "QWEN_HOME="+w.store.dir, "OAUTH_URL="+w.url)
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var stderr logBuffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Process.Kill()
		defer stdin.Close() // ends it
		managers.Go(func() {
			lines := bufio.NewScanner(stdout)
			for lines.Scan() {
				var said struct{ Event, Error string }
				if json.Unmarshal(lines.Bytes(), &said) != nil {
					said.Event, said.Error = "error", lines.Text()
				}
				mu.Lock()
				reports[fmt.Sprintf("manager %d: %s", i, said.Event)]++
				if said.Event == "error" {
					problems[said.Error]++
				}
				mu.Unlock()
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("manager %d: %v\n%s", i, err, &stderr)
			}
		})
		time.AfterFunc(d, func() { stdin.Close() })
	}
	l := loadFor(t, processes, 15, d)
	managers.Wait()
	for _, p := range processes {
		p.terminate()
		for line := range strings.Lines(p.stderr.String()) {
			if strings.Contains(line, `"level":"WARN"`) || strings.Contains(line, `"level":"ERROR"`) {
				t.Logf("said by a process of ours: %s", line)
			}
		}
	}
	w.settled()
	l.log(t)
	for _, name := range slices.Sorted(maps.Keys(reports)) {
		t.Logf("%s: %d times", name, reports[name])
	}
	for problem, n := range problems {
		t.Errorf("Qwen Code's manager said %d times: %s", n, problem)
	}
	c := w.counts()
	t.Logf("%d refreshes in %v with tokens of %v, by %v, %d at one time at the most, %d API requests refused with 401", c.refreshes, d, life, w.by, w.most, c.unauthorized)
	if c.replays != 0 || c.refreshesRefused != 0 || c.deviceAuthorizations != 0 || w.most != 1 {
		t.Errorf("%d refresh tokens sent twice, %d refused, %d sign-ins, %d refreshes at one time; want 0, 0, 0, 1",
			c.replays, c.refreshesRefused, c.deviceAuthorizations, w.most)
	}
	if least := int(d / life); c.refreshes < least {
		t.Errorf("%d refreshes, want %d at least", c.refreshes, least)
	}
	for i := range 3 {
		if n := reports[fmt.Sprintf("manager %d: token", i)]; n < int(d/life) {
			t.Errorf("manager %d got %d tokens, want %d at least", i, n, int(d/life))
		}
	}
}
