package e2e

import (
	"bytes"
	"context"
	"encoding/csv"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A fleet is three replicas on one directory, behind HAProxy with deploy/haproxy.cfg.
type fleet struct {
	t        *testing.T
	env      map[string]string
	addrs    []string // of the replicas, host:port, the same after a restart
	replicas []*program
	url      string // HAProxy's, for clients
	stats    string // its statistics, as CSV
}

// startFleet starts the replicas with env, and HAProxy.
func startFleet(t *testing.T, env map[string]string) *fleet {
	haproxy, err := exec.LookPath("haproxy")
	if err != nil {
		haproxy, err = exec.LookPath("/usr/sbin/haproxy") // not in everybody's PATH
	}
	if err != nil {
		t.Skip("HAProxy is not installed (Debian's package haproxy)")
	}
	f := &fleet{t: t, env: env}

	// All are held open until each has another port.
	var held []net.Listener
	free := func(host string) string {
		ln, err := net.Listen("tcp", host+":0")
		fatalIf(t, err)
		held = append(held, ln)
		return ln.Addr().String()
	}
	clients, stats := free("127.0.0.1"), free("127.0.0.1")
	f.url, f.stats = "http://"+clients, "http://"+stats+"/stats;csv"
	replace := map[string]string{"\tbind :8080\n": "\tbind " + clients + "\n", "127.0.0.1:8405": stats,
		"\tuser haproxy\n": "", "\tgroup haproxy\n": ""} // only root may
	for i := range 3 {
		// No connection comes from these addresses, so none can hold the port of a replica that is being restarted.
		f.addrs = append(f.addrs, free(fmt.Sprintf("127.0.0.1%d", i+1)))
		replace[fmt.Sprintf("10.0.0.1%d:8080", i+1)] = f.addrs[i]
	}
	b := readFile(t, "../deploy/haproxy.cfg")
	config := string(b)
	for from, to := range replace {
		if !strings.Contains(config, from) {
			t.Fatalf("deploy/haproxy.cfg lacks %q", from)
		}
		config = strings.ReplaceAll(config, from, to)
	}
	file := filepath.Join(t.TempDir(), "haproxy.cfg")
	writeFile(t, file, config)
	for _, ln := range held {
		ln.Close()
	}

	for i := range f.addrs {
		f.replicas = append(f.replicas, f.start(i))
	}
	if out, err := exec.Command(haproxy, "-c", "-f", file).CombinedOutput(); err != nil || strings.Contains(string(out), "WARNING") {
		t.Fatalf("haproxy -c: %v\n%s", err, out)
	}
	var out logBuffer
	cmd := exec.Command(haproxy, "-db", "-f", file)
	cmd.Stdout, cmd.Stderr = &out, &out
	fatalIf(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			for line := range strings.Lines(out.String()) {
				if !strings.Contains(line, " 200 ") && !strings.Contains(line, " 429 ") {
					t.Log("HAProxy: ", strings.TrimSpace(line))
				}
			}
		}
	})
	for i := range f.addrs {
		f.await(i, "UP")
	}
	return f
}

// start starts replica i.
func (f *fleet) start(i int) *program {
	host, port, _ := net.SplitHostPort(f.addrs[i])
	env := map[string]string{"SERVER_HOST": host, "SERVER_PORT": port, "TRUSTED_PROXIES": "127.0.0.1", "LOG_LEVEL": "info", "SHUTDOWN_DELAY": "2s"}
	for k, v := range f.env {
		env[k] = v
	}
	return start(f.t, env)
}

// state returns what HAProxy says of replica i. Before its first check HAProxy takes a server for one that is up.
func (f *fleet) state(i int) string {
	res, err := http.Get(f.stats)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	rows, _ := csv.NewReader(res.Body).ReadAll()
	for _, row := range rows {
		if row[0] == "replicas" && row[1] == fmt.Sprintf("replica%d", i+1) {
			return row[slices.Index(rows[0], "status")] + " " + row[slices.Index(rows[0], "check_status")]
		}
	}
	return "unknown"
}

// await waits until a check of HAProxy's has found replica i in a state.
func (f *fleet) await(i int, want string) {
	f.t.Helper()
	until(f.t, fmt.Sprintf("replica %d is %s", i, want), func() bool {
		state, check, _ := strings.Cut(f.state(i), " ")
		return state == want && check != "INI"
	})
}

// ask sends a chat request as the client of key, and returns an error unless the whole answer came.
func (f *fleet) ask(client *http.Client, key string, stream bool) error {
	const words = 55 // a stream of 2.7 s, longer than SHUTDOWN_DELAY
	req, err := http.NewRequest("POST", f.url+"/v1/chat/completions",
		strings.NewReader(fmt.Sprintf(`{"stream":%t,"messages":[{"role":"user","content":%q}]}`, stream, strings.Repeat("word ", words))))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+key)
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK || bytes.Count(body, []byte("word ")) != words || stream != bytes.HasSuffix(body, []byte("data: [DONE]\n\n")) {
		return fmt.Errorf("%s, %v:\n%s", res.Status, err, body)
	}
	return nil
}

// TestFleet restarts three replicas behind HAProxy in turn, twice round, while 20 clients ask. No request fails, no stream is
// cut, a token is refreshed once for all, and HAProxy keeps a limit for all.
func TestFleet(t *testing.T) {
	t.Parallel()
	if !longTests() {
		t.Skip("QWEN_LONG_TESTS=1 runs three replicas behind HAProxy, for half a minute")
	}
	const life = 3 * time.Second
	w := newWitness(t, filepath.Join(t.TempDir(), "qwen"), life)
	started := time.Now()
	f := startFleet(t, w.env())

	var asked, failed atomic.Int64
	ctx, stop := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	for n := range 20 {
		// Half of them keep their connections to HAProxy.
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: n%2 == 1}}
		t.Cleanup(client.CloseIdleConnections)
		clients.Go(func() {
			for ; ctx.Err() == nil; time.Sleep(150 * time.Millisecond) { // within the limit
				asked.Add(1)
				if err := f.ask(client, fmt.Sprintf("client-%d", n), n < 10); err != nil && failed.Add(1) <= 5 {
					t.Errorf("client %d: %v", n, err)
				}
			}
		})
	}
	defer clients.Wait()
	defer stop()

	drained := 0
	for range 2 {
		for i, old := range f.replicas {
			old.terminate()
			inFlight, _ := strconv.Atoi(old.stderr.await(t, `"msg":"shutting down".*"in_flight":(\d+)`))
			drained += inFlight
			f.await(i, "DOWN")
			f.replicas[i] = f.start(i)
			f.await(i, "UP")
		}
	}

	for _, key := range []string{"hasty", ""} { // a key's limit, and an address's
		began := time.Now()
		passed, refused := f.burst(60, key)
		most := 20 * (2 + int(time.Since(began)/(2*time.Second))) // 20 in each window of 2 s
		if passed < 20 || passed > most || passed+refused != 60 {
			t.Errorf("60 requests at once with the key %q: %d passed, %d got 429; want 20 to %d passed, and 429 for all others", key, passed, refused, most)
		}
	}
	stop()
	clients.Wait()
	var ended sync.WaitGroup
	for _, p := range f.replicas {
		ended.Go(p.terminate)
	}
	ended.Wait()
	t.Logf("%d requests, %d failed; %d were in flight when their replica closed its listener", asked.Load(), failed.Load(), drained)
	if drained == 0 {
		t.Error("no request was in flight when its replica closed its listener")
	}
	w.wantOneRefreshAtATime(int(time.Since(started)/life)-1, int(time.Since(started)/(life/2))+1)
}

// burst sends n requests at once with a key, or from an address of its own without one. It returns how many were answered and
// how many got the 429 of deploy/haproxy.cfg.
func (f *fleet) burst(n int, key string) (passed, refused int) {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 99)}}
	client := &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext, DisableKeepAlives: true}}
	var mu sync.Mutex
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			req, _ := http.NewRequest(http.MethodPost, f.url+"/v1/chat/completions", strings.NewReader(`{"messages":[{"role":"user","content":"Hello"}]}`))
			if key != "" {
				req.Header.Set("X-Api-Key", key)
			}
			res, err := client.Do(req)
			if err != nil {
				f.t.Error(err)
				return
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil && res.StatusCode == http.StatusOK:
				passed++
			case err == nil && res.StatusCode == http.StatusTooManyRequests && res.Header.Get("Retry-After") != "" && bytes.Contains(body, []byte(`"rate_limit_exceeded"`)):
				refused++
			default:
				f.t.Errorf("%s %v: %s, %v", res.Status, res.Header, body, err)
			}
		})
	}
	all.Wait()
	return passed, refused
}
