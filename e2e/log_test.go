package e2e

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startLogging starts the program with its log at level info on a pipe. The log is read until the program listens, and
// the reader's end is returned.
func startLogging(t *testing.T, env map[string]string) (p *program, log *os.File) {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("there is no SIGTERM")
	}
	r, w, err := os.Pipe()
	fatalIf(t, err)
	t.Cleanup(func() { r.Close() })
	full := map[string]string{"QWEN_DIR": credentials(t), "LOG_LEVEL": "info"}
	for k, v := range env {
		full[k] = v
	}
	p = start(t, full, func(cmd *exec.Cmd) {
		seen := cmd.Stderr.(*logBuffer)
		cmd.Stderr = w
		go func() {
			for !strings.Contains(seen.String(), `"msg":"listening"`) {
				b := make([]byte, 4096)
				n, err := r.Read(b)
				if err != nil {
					return
				}
				seen.Write(b[:n])
			}
		}()
	})
	w.Close()
	p.stderr.await(t, `"msg":"listening"`) // and what follows is left in the pipe
	return p, r
}

// requests sends n requests to p, one after the other. Each must be answered.
func (p *program) requests(n int, adapt func(i int, r *http.Request)) {
	p.t.Helper()
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	for i := range n {
		req, err := http.NewRequest("GET", p.url+"/v1/models", nil)
		fatalIf(p.t, err)
		req.Header.Set("X-Request-ID", fmt.Sprintf("request.%d", i))
		if adapt != nil {
			adapt(i, req)
		}
		res, err := client.Do(req)
		if err != nil {
			p.t.Fatalf("request %d: %v", i, err)
		}
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
		if res.StatusCode != http.StatusOK {
			p.t.Fatalf("request %d: %s", i, res.Status)
		}
	}
}

// dropped returns how many log lines p has dropped, as /metrics says.
func (p *program) dropped() float64 {
	p.t.Helper()
	return p.metric("qwen_proxy_log_lines_dropped_total")
}

func TestLogPipeClosed(t *testing.T) {
	t.Parallel()
	p, log := startLogging(t, nil)
	log.Close()
	p.requests(20, nil)
	until(t, "20 lines are dropped", func() bool { return p.dropped() >= 20 }) // lines are written behind the requests
	p.terminate()
}

func TestLogPipeNeverRead(t *testing.T) {
	t.Parallel()
	p, log := startLogging(t, map[string]string{"DEBUG_MODE": "true"})
	p.requests(400, nil) // fill the pipe
	if n := p.dropped(); n != 0 {
		t.Errorf("%v lines dropped, want them in the buffer", n)
	}
	long := "X-" + strings.Repeat("a", 30_000) // debug lines hold the names of all headers
	p.requests(100, func(_ int, r *http.Request) { r.Header.Set(long, "1") })
	if n := p.dropped(); n < 1 || n > 100 {
		t.Errorf("%v of 100 lines dropped, want those beyond the buffer", n)
	}
	p.terminate()
	rest, err := io.ReadAll(log) // what the pipe has taken
	fatalIf(t, err)
	if len(rest) == 0 || rest[len(rest)-1] != '\n' {
		t.Errorf("the log ends with %q, want a whole line", rest[max(0, len(rest)-200):])
	}
}

func TestNoLogLineIsLost(t *testing.T) {
	t.Parallel()
	p, log := startLogging(t, nil)
	read := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(log)
		read <- string(b)
	}()
	const n = 300
	p.requests(n, nil)
	p.terminate()
	var want, got []string
	for i := range n {
		want = append(want, fmt.Sprintf("request.%d", i))
	}
	all := <-read
	for line := range strings.Lines(all) {
		if !strings.HasPrefix(line, `{"time":`) || !strings.HasSuffix(line, "}\n") {
			t.Errorf("not a whole line: %q", line)
		}
		if _, rest, ok := strings.Cut(line, `"request_id":"`); ok {
			id, _, _ := strings.Cut(rest, `"`)
			got = append(got, id)
		}
	}
	wantEqual(t, "requests in the log", want, got)
	if !strings.HasSuffix(all, `"msg":"stopped"}`+"\n") {
		t.Errorf("the log ends in %q, want the line that says stopped", all[max(0, len(all)-200):])
	}
}

func TestASecondSignalWritesTheLog(t *testing.T) {
	t.Parallel()
	for name, reads := range map[string]bool{"a reader that comes back": true, "no reader": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, log := startLogging(t, map[string]string{"SHUTDOWN_DELAY": "10m"})
			const n = 400
			p.requests(n, nil) // more than the pipe takes
			p.cmd.Process.Signal(syscall.SIGTERM)
			until(t, "the server is about to stop", func() bool {
				res, _ := p.get("/health/ready")
				return res.StatusCode == http.StatusServiceUnavailable
			})
			p.cmd.Process.Signal(syscall.SIGTERM)
			if !reads {
				p.awaitEnd()
				return
			}
			all, err := io.ReadAll(log)
			fatalIf(t, err)
			if got := strings.Count(string(all), `"msg":"request"`); got < n {
				t.Errorf("%d requests are in the log, want all %d", got, n)
			}
		})
	}
}
