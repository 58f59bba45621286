package e2e

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
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
	b, err := os.ReadFile("../deploy/haproxy.cfg")
	fatalIf(t, err)
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

// server returns HAProxy's statistics of replica i, by name.
func (f *fleet) server(i int) (map[string]string, error) {
	res, err := http.Get(f.stats)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	rows, err := csv.NewReader(res.Body).ReadAll()
	if err != nil {
		return nil, err
	}
	for _, row := range rows[1:] {
		if row[0] != "replicas" || row[1] != fmt.Sprintf("replica%d", i+1) {
			continue
		}
		stats := map[string]string{}
		for column, name := range rows[0] {
			stats[name] = row[column]
		}
		return stats, nil
	}
	return nil, fmt.Errorf("no statistics of replica %d", i)
}

// number returns one of HAProxy's statistics of replica i.
func (f *fleet) number(i int, name string) int {
	f.t.Helper()
	stats, err := f.server(i)
	fatalIf(f.t, err)
	n, err := strconv.Atoi(stats[name])
	if err != nil {
		f.t.Fatalf("%s of replica %d: %v", name, i, err)
	}
	return n
}

// await waits until a check of HAProxy's has found replica i in a state.
func (f *fleet) await(i int, state string) {
	f.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		stats, err := f.server(i)
		// Before its first check HAProxy takes a server for one that is up.
		if err == nil && stats["status"] == state && stats["check_status"] != "INI" {
			return
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("HAProxy says of replica %d: %q, %v; want %s", i, stats["status"], err, state)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// ask sends a chat request as the client of key, and returns an error unless the whole answer came.
func (f *fleet) ask(client *http.Client, key string, stream bool) error {
	text := strings.TrimSpace(strings.Repeat("word ", 55)) // a stream of 2.7 s, longer than SHUTDOWN_DELAY
	req, err := http.NewRequest(http.MethodPost, f.url+"/v1/chat/completions",
		strings.NewReader(fmt.Sprintf(`{"stream":%t,"messages":[{"role":"user","content":%q}]}`, stream, text)))
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
	if err != nil || res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s, %v:\n%s", res.Status, err, body)
	}
	type part struct{ Content string }
	var said strings.Builder
	var answer struct {
		Choices []struct{ Message, Delta part }
	}
	done := !stream
	for event := range strings.SplitSeq(strings.TrimSpace(string(body)), "\n\n") {
		data := strings.TrimPrefix(event, "data: ")
		if data == "[DONE]" {
			done = true
			break
		}
		answer.Choices = nil
		if err := json.Unmarshal([]byte(data), &answer); err != nil {
			return fmt.Errorf("%q: %v", event, err)
		}
		for _, c := range answer.Choices {
			said.WriteString(c.Message.Content + c.Delta.Content)
		}
	}
	if !done || !strings.Contains(said.String(), text) {
		return fmt.Errorf("not the whole answer:\n%s", body)
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

	var asked, streamed, failed atomic.Int64
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for n := range 20 {
		// Half of them keep their connections to HAProxy.
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: n%2 == 1}}
		t.Cleanup(client.CloseIdleConnections)
		clients.Go(func() {
			pace := time.NewTicker(150 * time.Millisecond) // within the limit
			defer pace.Stop()
			for {
				select {
				case <-stop:
					return
				case <-pace.C:
				}
				stream := n < 10
				asked.Add(1)
				if stream {
					streamed.Add(1)
				}
				if err := f.ask(client, fmt.Sprintf("client-%d", n), stream); err != nil && failed.Add(1) <= 5 {
					t.Errorf("client %d, stream %t: %v", n, stream, err)
				}
			}
		})
	}
	finish := sync.OnceFunc(func() {
		close(stop)
		clients.Wait()
	})
	defer finish()

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

	for name, as := range map[string]func(*http.Request) *http.Client{
		"key": func(r *http.Request) *http.Client {
			r.Header.Set("X-Api-Key", "hasty")
			return &http.Client{}
		},
		"address": func(*http.Request) *http.Client {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 99)}}
			return &http.Client{Transport: &http.Transport{DialContext: d.DialContext, DisableKeepAlives: true}}
		},
	} {
		passed, refused := f.burst(60, as)
		t.Logf("60 requests at once by one %s: %d passed, %d refused", name, passed, refused)
		if passed < 20 || passed > 25 || passed+refused != 60 {
			t.Errorf("60 requests at once by one %s: %d passed, %d got 429; want 20 passed, a few more for the time that it took, and 429 for all others", name, passed, refused)
		}
	}
	finish()

	retried := 0
	for i := range f.replicas {
		retried += f.number(i, "wredis")
	}
	var ended sync.WaitGroup
	for _, p := range f.replicas {
		ended.Go(p.terminate)
	}
	ended.Wait()
	took := time.Since(started)
	w.settled()
	c := w.counts()
	t.Logf("%d requests, %d of them streams, %d failed; %d were in flight when their replica closed its listener, %d were refused by one and went to another",
		asked.Load(), streamed.Load(), failed.Load(), drained, retried)
	t.Logf("%d refreshes in %v with tokens of %v, %d at one time at the most", c.refreshes, took.Round(time.Millisecond), life, w.most)
	if failed.Load() > 0 || drained == 0 {
		t.Errorf("%d requests failed, want none; %d were in flight when their replica closed its listener, want some", failed.Load(), drained)
	}
	if least, most := int(took/life)-1, int(took/(life/2))+1; c.refreshes < least || c.refreshes > most {
		t.Errorf("%d refreshes, want %d to %d", c.refreshes, least, most)
	}
	if c.replays != 0 || c.refreshesRefused != 0 || c.deviceAuthorizations != 0 || w.most != 1 || w.unstored != 0 {
		t.Errorf("%d refresh tokens sent twice, %d refused, %d sign-ins, %d refreshes at one time, %d tokens used before they were stored; want 0, 0, 0, 1, 0",
			c.replays, c.refreshesRefused, c.deviceAuthorizations, w.most, w.unstored)
	}
}

// burst sends n requests at once, and returns how many were answered and how many got the 429 of deploy/haproxy.cfg.
func (f *fleet) burst(n int, as func(*http.Request) *http.Client) (passed, refused int) {
	var mu sync.Mutex
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			req, _ := http.NewRequest(http.MethodPost, f.url+"/v1/chat/completions", strings.NewReader(`{"messages":[{"role":"user","content":"Hello"}]}`))
			res, err := as(req).Do(req)
			if err != nil {
				f.t.Error(err)
				return
			}
			defer res.Body.Close()
			var body struct{ Error struct{ Type, Code string } }
			err = json.NewDecoder(res.Body).Decode(&body)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil && res.StatusCode == http.StatusOK:
				passed++
			case err == nil && res.StatusCode == http.StatusTooManyRequests && res.Header.Get("Retry-After") != "" &&
				body.Error.Type == "rate_limit_error" && body.Error.Code == "rate_limit_exceeded":
				refused++
			default:
				f.t.Errorf("%s %v: %+v, %v", res.Status, res.Header, body, err)
			}
		})
	}
	all.Wait()
	return passed, refused
}
