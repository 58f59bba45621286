package e2e

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A load is what came of requests to processes.
type load struct {
	sent, failed atomic.Int64
	answered     []atomic.Int64 // with 200, by process
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

// loadFor sends rate requests a second, to one of the processes after the other, for d.
func loadFor(t *testing.T, processes []*program, rate int, d time.Duration) *load {
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
	var processes []*program
	for range 5 {
		processes = append(processes, start(t, w.env()))
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
	w.setDelay(func() time.Duration { return mathrand.N(4 * time.Millisecond) })
	var idle, inFlight, received, kept int
	var latest time.Duration // after its token was issued, that a kill made it lost
	for n := range kills {
		select {
		case <-w.issuing: // of the last process
		default:
		}
		_, last := w.settled()
		p := start(t, w.env())
		ctx, stop := context.WithCancel(t.Context())
		var client sync.WaitGroup
		client.Go(func() {
			for ctx.Err() == nil {
				time.Sleep(2 * time.Millisecond)
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

		stored, err := w.load()
		if err != nil {
			t.Fatalf("after kill %d: %v", n, err)
		}
		switch {
		case issued.Equal(last):
			idle++
		case stored.Refresh == refresh:
			kept++
		case issued.After(killed):
			inFlight++
		default:
			received++
			latest = max(latest, killed.Sub(issued))
		}
		// A lock that the process left would be waited for until it is stale.
		if w.left()[lockFile] > 0 {
			os.Chtimes(filepath.Join(w.dir, lockFile), time.Time{}, time.Now().Add(-time.Hour))
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
	t.Parallel()
	qwenCode := os.Getenv("QWEN_CODE_DIR")
	if qwenCode == "" {
		t.Skip("QWEN_CODE_DIR is not set; examples/qwen-code/check.sh fetches Qwen Code and runs this test with it")
	}
	node, err := exec.LookPath("node")
	fatalIf(t, err)
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
	w.setDelay(func() time.Duration { return 50*time.Millisecond + mathrand.N(200*time.Millisecond) })
	var processes []*program
	for range 3 {
		processes = append(processes, start(t, w.env()))
	}

	var mu sync.Mutex
	reports := map[string]int{} // what Qwen Code's managers said, by manager
	problems := map[string]int{}
	var managers sync.WaitGroup
	for i := range 3 {
		cmd := exec.Command(node, filepath.Join("..", "examples", "qwen-code", "manager.mjs"))
		cmd.Env = append(os.Environ(), "QWEN_HOME="+w.dir, "OAUTH_URL="+w.url)
		stdin, err := cmd.StdinPipe()
		fatalIf(t, err)
		stdout, err := cmd.StdoutPipe()
		fatalIf(t, err)
		var stderr logBuffer
		cmd.Stderr = &stderr
		fatalIf(t, cmd.Start())
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
