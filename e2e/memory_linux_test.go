package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A memoryTest is a process whose memory is measured, and an API in front of which it stands. The API streams without end
// to requests whose id begins with "stream". It answers those with "late" once they stop coming, and others at once.
type memoryTest struct {
	*program
	buffered int // MAX_BUFFERED_BYTES
	client   *http.Client
	latest   atomic.Int64 // when the last request came, in Unix nanoseconds
	answer   []byte       // for requests that are not for streams
}

func startMemoryTest(t *testing.T, http2 bool, largest, buffered int) *memoryTest {
	t.Helper()
	m := &memoryTest{buffered: buffered, answer: []byte(`{"choices":[{"message":{"content":"Hello"}}]}`)}
	env := map[string]string{"LOG_LEVEL": "error", "MAX_BODY_BYTES": strconv.Itoa(largest), "MAX_BUFFERED_BYTES": strconv.Itoa(buffered)}
	if http2 {
		api := httptest.NewUnstartedServer(http.HandlerFunc(m.serveAPI))
		api.Config.ErrorLog = log.New(io.Discard, "", 0) // of handshakes that a burst of requests gives up
		m.program = startOverTLS(t, api, env)
	} else {
		m.program = startWith(t, m.serveAPI, env)
	}
	m.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 50, WriteBufferSize: 64 << 10}, Timeout: 5 * time.Minute}
	return m
}

func (m *memoryTest) serveAPI(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	switch kind, _, _ := strings.Cut(r.Header.Get("X-Request-Id"), "."); kind {
	case "stream":
		sse(w, "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n")
		<-r.Context().Done()
		return
	case "late":
		m.latest.Store(time.Now().UnixNano())
		for time.Now().UnixNano()-m.latest.Load() < int64(300*time.Millisecond) && r.Context().Err() == nil {
			time.Sleep(50 * time.Millisecond)
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(m.answer)
}

// ask sends n requests, some of them at one time, and returns how many had which status. Streams are open until stop.
func (m *memoryTest) ask(n, atOnce int, kind, path string, body []byte) (statuses map[int]int, stop func()) {
	m.t.Helper()
	ctx, cancel := context.WithCancel(m.t.Context())
	statuses = map[int]int{}
	var mu sync.Mutex
	var open []io.Closer
	var workers sync.WaitGroup
	var next atomic.Int64
	for range atOnce {
		workers.Go(func() {
			for {
				i := next.Add(1)
				if i > int64(n) {
					return
				}
				req, _ := http.NewRequestWithContext(ctx, "POST", m.url+path, bytes.NewReader(body))
				req.Header.Set("X-Request-ID", kind+"."+strconv.FormatInt(i, 10))
				res, err := m.client.Do(req)
				status := 0
				if err == nil {
					if status = res.StatusCode; kind == "stream" && status == 200 {
						_, err = io.ReadFull(res.Body, make([]byte, 20))
					} else {
						_, err = io.Copy(io.Discard, res.Body)
						res.Body.Close()
					}
				}
				mu.Lock()
				if err != nil {
					m.t.Errorf("request %d: %v", i, err)
					status = -1
				} else if kind == "stream" {
					open = append(open, res.Body)
				}
				statuses[status]++
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	return statuses, func() {
		cancel()
		for _, c := range open {
			c.Close()
		}
	}
}

// wantBound checks the most memory that the process has had.
func (m *memoryTest) wantBound(what string) {
	m.t.Helper()
	limit := m.buffered + m.buffered/5 + 64<<20
	m.t.Logf("%s: at most %d MiB resident, limit %d MiB", what, m.memory("VmHWM")>>20, limit>>20)
	if m.memory("VmHWM") > limit {
		m.t.Errorf("%s: %d bytes resident, want at most %d", what, m.memory("VmHWM"), limit)
	}
}

// TestMemoryStaysWithinItsBound sends mixes of bodies, each to a process of its own.
func TestMemoryStaysWithinItsBound(t *testing.T) {
	t.Parallel()
	if many(10) != 10 {
		t.Skip("the race detector takes several times the memory")
	}
	large, buffered, streams, answers := 4<<20, 16<<20, 100, 10
	if longTests() {
		large, buffered, streams, answers = 32<<20, 256<<20, 2400, 100
	}
	// body returns a request body of n bytes, with name and text in it.
	body := func(n int, format, filler string) []byte {
		rest := n - len(fmt.Sprintf(format, ""))
		return fmt.Appendf(nil, format, strings.Repeat(filler, rest/len(filler)))
	}
	const chatText, chatName = `{"messages":[{"role":"user","content":"%s"}]}`, `{"%s":1,"messages":[]}`
	const text, textName = `{"prompt":"%s","max_tokens":1,"echo":false}`, `{"%s":1,"prompt":"Hello"}`
	const answerSize = 2 << 20
	const chat, completions = "/v1/chat/completions", "/v1/completions"
	content := func(s string, n int) []byte {
		return []byte(`{"choices":[{"message":{"content":"` + strings.Repeat(s, n/len(s)) + `"}}]}`)
	}
	for _, tt := range []struct {
		name      string
		n, atOnce int
		kind      string
		path      string
		body      []byte
		answer    []byte // nil for a short one
		all       bool   // every request gets 200
		quick     bool   // not for the long tests alone
	}{
		{name: "names of bytes that are not UTF-8", n: 8, atOnce: 8, kind: "late", path: chat, body: body(large, chatName, "\xff")},
		{name: "such names in text completions", n: 8, atOnce: 8, kind: "late", path: completions, body: body(large, textName, "\xff"), quick: true},
		{name: "brackets", n: 8, atOnce: 8, kind: "late", path: chat, body: []byte(`{"x":` + strings.Repeat("[", large/2-20) + strings.Repeat("]", large/2-20) + `,"messages":[]}`)},
		{name: "many members", n: 8, atOnce: 8, kind: "late", path: completions, body: body(large, `{%s"prompt":""}`, `"\u0070":0,`)},
		{name: "large prompts that wait", n: 40, atOnce: 20, kind: "late", path: completions, body: body(large, text, "\xff")},
		{name: "many prompts that wait", n: buffered / 256000, atOnce: buffered / 256000, kind: "late", path: chat, body: body(256000, chatText, "x")},
		{name: "more prompts that wait", n: buffered / 50000, atOnce: buffered / 100000, kind: "late", path: chat, body: body(100000, chatText, "x")},
		{name: "small prompts that wait", n: buffered / 100000, atOnce: buffered / 100000, kind: "late", path: chat, body: body(5000, chatText, "x")},
		{name: "streams of large prompts", n: 24, atOnce: 3, kind: "stream", path: chat, body: body(large, chatText, "x"), all: true, quick: true},
		{name: "streams of large text completions", n: 24, atOnce: 3, kind: "stream", path: completions, body: body(large, text, "x"), all: true, quick: true},
		{name: "streams of 100 KB prompts", n: streams, atOnce: 20, kind: "stream", path: chat, body: body(100000, chatText, "x"), all: true},
		{name: "streams of 200 KB prompts", n: streams, atOnce: 20, kind: "stream", path: chat, body: body(200000, chatText, "x"), all: true, quick: true},
		{name: "streams of 200 KB text completions", n: streams, atOnce: 20, kind: "stream", path: completions, body: body(200000, text, "x"), all: true},
		{name: "long translated answers", n: answers, atOnce: answers / 2, kind: "late", path: completions, body: body(1000, text, "x"), answer: content("\xff", answerSize-100), quick: true},
		{name: "long translated answers of escapes", n: answers, atOnce: answers / 2, kind: "late", path: completions, body: body(1000, text, "x"), answer: content(`\u0001`, answerSize-100)},
		{name: "translated answers of many choices", n: answers, atOnce: answers / 2, kind: "late", path: completions, body: body(1000, text, "x"),
			answer: []byte(`{"choices":[{}` + strings.Repeat(",{}", answerSize/3-100) + `]}`)},
		{name: "translated answers that are too long", n: answers, atOnce: answers / 2, kind: "late", path: completions, body: body(1000, text, "x"), answer: content("x", 2*answerSize)},
	} {
		if !tt.quick && !longTests() {
			continue
		}
		for _, http2 := range []bool{false, true} {
			if http2 && tt.kind != "stream" && !longTests() {
				continue // only streams hold more over HTTP/2
			}
			t.Run(fmt.Sprintf("%s, HTTP/2 %t", tt.name, http2), func(t *testing.T) {
				m := startMemoryTest(t, http2, large, buffered)
				if tt.answer != nil {
					m.answer = tt.answer
				}
				statuses, stop := m.ask(tt.n, tt.atOnce, tt.kind, tt.path, tt.body)
				t.Log("answers by status:", statuses)
				if tt.all && statuses[200] != tt.n {
					t.Errorf("answers by status: %v, want %d times 200", statuses, tt.n)
				}
				m.answer = []byte("{}")
				if beside, _ := m.ask(10, 1, "", chat, body(100000, chatText, "x")); beside[200] != 10 {
					t.Errorf("answers beside them by status: %v, want 10 times 200", beside)
				}
				m.wantBound("peak")
				stop()
			})
		}
	}
}

// TestSlowBodiesLockNobodyOut has eight clients send half of the largest body there may be, and then drip.
func TestSlowBodiesLockNobodyOut(t *testing.T) {
	t.Parallel()
	large, buffered, timeout := 4<<20, 16<<20, time.Second
	if longTests() {
		large, buffered, timeout = 32<<20, 256<<20, 30*time.Second
	}
	var served atomic.Int64
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		served.Add(1)
		answerJSON(w, 200, "{}")
	}, map[string]string{"MAX_BODY_BYTES": strconv.Itoa(large), "MAX_BUFFERED_BYTES": strconv.Itoa(buffered), "READ_TIMEOUT": timeout.String()})
	half := bytes.Repeat([]byte(" "), large/2)
	var slow, ready sync.WaitGroup
	begun := time.Now()
	for range 8 {
		ready.Add(1)
		slow.Go(func() {
			c := p.dial()
			c.SetDeadline(time.Now().Add(5 * time.Minute))
			fmt.Fprintf(c, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n", large)
			c.Write(half)
			ready.Done()
			answer := make(chan string, 1)
			go func() {
				line := make([]byte, 12)
				_, err := io.ReadFull(c, line)
				answer <- fmt.Sprint(string(line), " ", err)
			}()
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case got := <-answer:
					if got != "HTTP/1.1 408 <nil>" && got != "HTTP/1.1 503 <nil>" {
						t.Errorf("a slow body got %q", got)
					}
					return
				case <-tick.C:
					if _, err := c.Write(half[:41]); err != nil && !errors.Is(err, net.ErrClosed) {
						tick.Stop() // it has been answered
					}
				}
			}
		})
	}
	ready.Wait()
	for _, size := range []int{20, 64 << 10} {
		body := `{"messages":[]` + strings.Repeat(" ", size-15) + `}`
		for i := range 30 {
			if res, _ := p.post("/v1/chat/completions", body); res.StatusCode != 200 {
				t.Errorf("small request %d of %d bytes: %s", i, size, res.Status)
			}
		}
	}
	slow.Wait()
	if took := time.Since(begun); took > 2*time.Minute {
		t.Errorf("the slow bodies ended after %v", took)
	}
}

// TestMemoryFiguresLeaveOutTheBallast asks a new process, which has yet to use much memory.
func TestMemoryFiguresLeaveOutTheBallast(t *testing.T) {
	t.Parallel()
	p := start(t, map[string]string{"QWEN_DIR": credentials(t)})
	var detailed struct{ Memory map[string]float64 }
	if _, body := p.get("/health/detailed"); json.Unmarshal([]byte(body), &detailed) != nil {
		t.Fatal(body)
	}
	const ballast = 8 << 20 // that keeps the garbage collector from running all the time
	for _, tt := range []struct {
		name  string
		bytes float64
		below float64
	}{
		{"heap_bytes", detailed.Memory["heap_bytes"], ballast},
		{"system_bytes", detailed.Memory["system_bytes"], 2 * ballast},
		{"go_memstats_heap_alloc_bytes", p.metric("go_memstats_heap_alloc_bytes"), ballast},
		{"go_memstats_alloc_bytes_total", p.metric("go_memstats_alloc_bytes_total"), ballast},
		{"go_memstats_next_gc_bytes", p.metric("go_memstats_next_gc_bytes"), 2 * ballast},
		{"go_memstats_sys_bytes", p.metric("go_memstats_sys_bytes"), 2 * ballast},
	} {
		if tt.bytes < 100_000 || tt.bytes >= tt.below {
			t.Errorf("%s is %.1f MB, want less than %.1f MB", tt.name, tt.bytes/1e6, tt.below/1e6)
		}
	}
}
