package e2e

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	mathrand "math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// loadFor sends rate requests a second, to one of the processes after the other, for d. Each must be answered.
func loadFor(t *testing.T, processes []*program, rate int, d time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	var all sync.WaitGroup
	defer all.Wait()
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		all.Go(func() {
			if status, body, err := processes[n%len(processes)].chat(); status != http.StatusOK || err != nil {
				t.Errorf("request %d: %d %s, %v", n, status, body, err)
			}
		})
	}
}

// wantOneRefreshAtATime checks how often tokens were refreshed, and that nothing else was asked for. It waits for the refresh under way.
func (w *witness) wantOneRefreshAtATime(least, most int) {
	w.t.Helper()
	w.settled()
	c := w.counts()
	if c.refreshes < least || c.refreshes > most {
		w.t.Errorf("%d refreshes, want %d to %d", c.refreshes, least, most)
	}
	if c.replays != 0 || c.refreshesRefused != 0 || c.deviceAuthorizations != 0 || w.most != 1 || w.unstored != 0 {
		w.t.Errorf("%+v, %d refreshes at one time, %d tokens used before they were stored; want none sent twice or refused, no sign-in, 1, 0", c, w.most, w.unstored)
	}
}

// wantFileAlone checks that nothing but the credential file is in its directory.
func (w *witness) wantFileAlone() {
	w.t.Helper()
	wantEqual(w.t, "left in the directory", map[string]int{credentialFile: 1}, w.left())
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
	loadFor(t, processes, 50, d)
	for _, p := range processes {
		p.terminate()
	}
	w.wantOneRefreshAtATime(int(d/life), int(time.Since(started)/(life/2))+1)
	w.wantFileAlone()
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
	for n := range kills {
		select {
		case <-w.issuing: // of the last process
		default:
		}
		w.settled()
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
		p.kill()
		stop()
		client.Wait()
		w.settled()
		if _, err := w.load(); err != nil {
			t.Fatalf("after kill %d: %v", n, err)
		}
		// A lock that the process left would be waited for until it is stale.
		if w.left()[lockFile] > 0 {
			os.Chtimes(filepath.Join(w.dir, lockFile), time.Time{}, time.Now().Add(-time.Hour))
		}
	}
	if w.unstored != 0 {
		t.Errorf("%d tokens of %d were used before they were stored", w.unstored, len(w.seen))
	}
	t.Logf("%+v after %d kills; left in the directory: %v", w.counts(), kills, w.left())
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
				if err := json.Unmarshal(lines.Bytes(), &said); err != nil || said.Event == "error" {
					t.Errorf("manager %d: %s", i, lines.Text())
				}
				mu.Lock()
				reports[fmt.Sprintf("manager %d: %s", i, said.Event)]++
				mu.Unlock()
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("manager %d: %v\n%s", i, err, &stderr)
			}
		})
		time.AfterFunc(d, func() { stdin.Close() })
	}
	loadFor(t, processes, 15, d)
	managers.Wait()
	for _, p := range processes {
		p.terminate()
		t.Logf("said by a process of ours: %s", p.warned())
	}
	t.Logf("%v; refreshes by %v", reports, w.by)
	w.wantOneRefreshAtATime(int(d/life), 1<<30)
	for i := range 3 {
		if n := reports[fmt.Sprintf("manager %d: token", i)]; n < int(d/life) {
			t.Errorf("manager %d got %d tokens, want %d at least", i, n, int(d/life))
		}
	}
}
