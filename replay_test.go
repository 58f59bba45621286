package main

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// executions counts how often an API has worked on each request, by its body. It is safe for concurrent use.
type executions struct {
	mu sync.Mutex
	of map[string]int
}

func (e *executions) count(body []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.of == nil {
		e.of = map[string]int{}
	}
	e.of[string(body)]++
}

// most returns how many requests there were, and how often the one was executed that was executed most often.
func (e *executions) most() (requests, most int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, n := range e.of {
		most = max(most, n)
	}
	return len(e.of), most
}

// TestARequestIsReplayedOnce: the API works for a while on each reused connection and then closes it without an answer,
// whatever number of idle connections there is to try.
func TestARequestIsReplayedOnce(t *testing.T) {
	for _, idle := range []int{1, 5, 20} {
		for _, key := range []string{"", "key-1"} {
			t.Run(fmt.Sprintf("%d idle connections, Idempotency-Key %q", idle, key), func(t *testing.T) {
				t.Parallel()
				var mu sync.Mutex
				used := map[string]bool{} // connections
				var warm sync.WaitGroup
				warm.Add(idle)
				var executed executions
				p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
					body, _ := io.ReadAll(r.Body)
					if bytes.Contains(body, []byte("warm")) {
						warm.Done()
						warm.Wait() // so that each takes a connection
					} else {
						executed.count(body)
						if got := r.Header.Get("Idempotency-Key"); got != key {
							t.Errorf("Idempotency-Key %q", got)
						}
					}
					mu.Lock()
					reused := used[r.RemoteAddr]
					used[r.RemoteAddr] = true
					mu.Unlock()
					if reused {
						time.Sleep(100 * time.Millisecond)
						panic(http.ErrAbortHandler)
					}
					answerJSON(w, 200, "{}")
				}, nil)
				var clients sync.WaitGroup
				for range idle {
					clients.Go(func() { p.post("/v1/chat/completions", `{"messages":["warm"]}`) })
				}
				clients.Wait()
				res, body := p.send("POST", "/v1/chat/completions", func(r *http.Request) {
					if key != "" {
						r.Header.Set("Idempotency-Key", key)
					}
				})
				if res.StatusCode != 200 {
					t.Errorf("%s %s", res.Status, body)
				}
				if _, n := executed.most(); n != 2 {
					t.Errorf("the API executed one request %d times, want 2", n)
				}
				for strings.Count(p.stderr.String(), `"msg":"request"`) <= idle {
					time.Sleep(time.Millisecond)
				}
				if n := strings.Count(p.stderr.String(), `"replayed":true`); n != 1 {
					t.Errorf("%d requests are logged as replayed, want 1", n)
				}
				if n := p.metrics()["qwen_proxy_upstream_replays_total"]; n != 1 {
					t.Errorf("%v replays are counted, want 1", n)
				}
			})
		}
	}
}

// TestNoReplayAfterASecond: what took longer to fail may well have been worked on.
func TestNoReplayAfterASecond(t *testing.T) {
	for _, tt := range []struct {
		work             time.Duration
		status, executed int
	}{{900 * time.Millisecond, 200, 2}, {1100 * time.Millisecond, 502, 1}} {
		synctest.Test(t, func(t *testing.T) {
			var served atomic.Int32
			b := inBubble(t, nil, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				if served.Add(1) == 2 {
					time.Sleep(tt.work)
					panic(http.ErrAbortHandler)
				}
				answerJSON(w, 200, "{}")
			})
			io.Copy(io.Discard, b.post(t, "/v1/chat/completions", `{"messages":[]}`).Body)
			res := b.post(t, "/v1/chat/completions", `{"messages":[]}`)
			if n := int(served.Load()) - 1; res.StatusCode != tt.status || n != tt.executed {
				t.Errorf("after %v of work: %s, executed %d times, want %d and %d", tt.work, res.Status, n, tt.status, tt.executed)
			}
		})
	}
}

// A rawStream is a request to an HTTP/2 API that writes its own frames.
type rawStream struct {
	conn  int // number of the connection, from 0
	id    uint32
	body  []byte
	write func(kind, flags byte, stream uint32, payload []byte)
	close func() // the connection
}

// reset ends the stream with an error code, RFC 9113 §7.
func (s *rawStream) reset(code uint32) {
	s.write(frameReset, 0, s.id, binary.BigEndian.AppendUint32(nil, code))
}

// goAway says that nothing after the stream last has been or will be processed.
func (s *rawStream) goAway(last uint32) {
	s.write(frameGoAway, 0, 0, binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, last), codeNone))
}

// ok answers with {}.
func (s *rawStream) ok() {
	header := append([]byte{0x80 | 8, 0x0f, 31 - 15, 16}, "application/json"...) // :status: 200 and content-type, RFC 7541 appendix A
	s.write(frameHeaders, 0x4, s.id, header)
	s.write(frameData, 0x1, s.id, []byte("{}"))
}

const frameData = 0x0

// overHTTP2 returns the whole handler in front of an HTTP/2 API that has answer called for each request, in a goroutine
// of its own.
func overHTTP2(t *testing.T, answer func(*rawStream)) http.Handler {
	t.Helper()
	var conns atomic.Int32
	api := httptest.NewUnstartedServer(nil)
	api.Config.ErrorLog = log.New(io.Discard, "", 0)
	api.TLS = &tls.Config{NextProtos: []string{"h2"}}
	api.Config.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){"h2": func(_ *http.Server, c *tls.Conn, _ http.Handler) {
		defer c.Close()
		conn := int(conns.Add(1)) - 1
		var mu sync.Mutex
		write := func(kind, flags byte, stream uint32, payload []byte) {
			mu.Lock()
			defer mu.Unlock()
			c.Write(appendFrame(nil, kind, flags, stream, payload))
		}
		write(frameSettings, 0, 0, nil)
		write(0x8, 0, 0, []byte{0, 0x10, 0, 0}) // WINDOW_UPDATE: 1 MiB
		io.CopyN(io.Discard, c, int64(len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")))
		bodies := map[uint32][]byte{}
		for {
			var header [9]byte
			if _, err := io.ReadFull(c, header[:]); err != nil {
				return
			}
			payload := make([]byte, binary.BigEndian.Uint32(header[:])>>8)
			if _, err := io.ReadFull(c, payload); err != nil {
				return
			}
			id := binary.BigEndian.Uint32(header[5:])
			switch kind, flags := header[3], header[4]; {
			case kind == frameSettings && flags == 0:
				write(frameSettings, 0x1, 0, nil)
			case kind == framePing && flags == 0:
				write(framePing, 0x1, 0, payload)
			case kind == frameData:
				if bodies[id] = append(bodies[id], payload...); flags&0x1 != 0 {
					go answer(&rawStream{conn: conn, id: id, body: bodies[id], write: write, close: func() { c.Close() }})
				}
			}
		}
	}}
	api.StartTLS()
	t.Cleanup(api.Close)
	cfg, err := loadConfig(lookup(map[string]string{"QWEN_API_KEY": "sk-test", "API_BASE_URL": api.URL + "/v1", "RATE_LIMIT_RPS": "0", "LOG_LEVEL": "error"}))
	if err != nil {
		t.Fatal(err)
	}
	return handlerOver(t, cfg, api)
}

// askAtOnce sends n different requests through h, up to 20 at one time. It returns the statuses of their answers, each once, and how
// many replays /metrics then has.
func askAtOnce(t *testing.T, h http.Handler, n int) (statuses []int, replays float64) {
	t.Helper()
	front := httptest.NewServer(h)
	defer front.Close()
	var mu sync.Mutex
	var clients sync.WaitGroup
	slots := make(chan struct{}, 20)
	for i := range n {
		slots <- struct{}{}
		clients.Go(func() {
			defer func() { <-slots }()
			body := fmt.Sprintf(`{"messages":[%d]%s}`, i, strings.Repeat(" ", i%2*8000)) // what is copied, and what is not
			res, err := http.Post(front.URL+"/v1/chat/completions", "application/json", strings.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			defer res.Body.Close()
			io.Copy(io.Discard, res.Body)
			mu.Lock()
			defer mu.Unlock()
			statuses = append(statuses, res.StatusCode)
		})
	}
	clients.Wait()
	slices.Sort(statuses)
	res, err := http.Get(front.URL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, _ := io.ReadAll(res.Body)
	page, err := parsePage(string(text))
	if err != nil {
		t.Fatal(err)
	}
	return slices.Compact(statuses), page["qwen_proxy_upstream_replays_total"]
}

// The codes of errors, RFC 9113 §7.
const (
	codeNone     = 0x0
	codeProtocol = 0x1
	codeRefused  = 0x7
)

// TestNoReplayOverHTTP2 has the API work on each request and then reset its stream, or lose the connection: whatever the
// reason, the request may have been executed.
func TestNoReplayOverHTTP2(t *testing.T) {
	const requests = 20
	for name, code := range map[string]uint32{"INTERNAL_ERROR": 0x2, "PROTOCOL_ERROR": codeProtocol, "CANCEL": codeCancel, "a GOAWAY that covers the stream": codeNone} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var executed executions
			h := overHTTP2(t, func(s *rawStream) {
				if bytes.Contains(s.body, []byte("warm")) {
					s.ok()
					return
				}
				executed.count(s.body)
				time.Sleep(50 * time.Millisecond)
				for n := 0; n < requests; n, _ = executed.most() { // all of them are in flight
					time.Sleep(time.Millisecond)
				}
				if code == codeNone {
					s.goAway(1<<31 - 1)
					s.close()
				} else {
					s.reset(code)
				}
			})
			warmHTTP2(t, h)
			statuses, replays := askAtOnce(t, h, requests)
			if diff := cmp.Diff([]int{502}, statuses); diff != "" {
				t.Errorf("statuses (-want +got):\n%s", diff)
			}
			if n, most := executed.most(); n != requests || most != 1 || replays != 0 {
				t.Errorf("%d requests, one of them executed %d times, %v replays; want %d, 1 and 0", n, most, replays, requests)
			}
		})
	}
}

// TestWhatHTTP2LeavesUnprocessedIsSentAgain: "Requests that have not been processed have not been executed" (RFC 9113
// §8.7), and the server says so.
func TestWhatHTTP2LeavesUnprocessedIsSentAgain(t *testing.T) {
	const requests = 20
	for name, refuse := range map[string]func(s *rawStream){
		"REFUSED_STREAM": func(s *rawStream) { s.reset(codeRefused) },
		"GOAWAY":         func(s *rawStream) { s.goAway(1) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var executed executions
			var refused atomic.Int32
			h := overHTTP2(t, func(s *rawStream) {
				switch {
				case bytes.Contains(s.body, []byte("warm")):
					s.ok()
				case s.conn == 0 && s.id > 1 && refused.Add(1) <= requests:
					refuse(s)
				default:
					executed.count(s.body)
					s.ok()
				}
			})
			warmHTTP2(t, h)
			statuses, replays := askAtOnce(t, h, requests)
			if diff := cmp.Diff([]int{200}, statuses); diff != "" {
				t.Errorf("statuses (-want +got):\n%s", diff)
			}
			if n, most := executed.most(); n != requests || most != 1 || replays < 1 {
				t.Errorf("%d requests, one of them executed %d times, %v replays; want %d, 1 and some", n, most, replays, requests)
			}
		})
	}
	t.Run("a GOAWAY for every 50 requests", func(t *testing.T) {
		t.Parallel()
		requests := 500
		if longTests() {
			requests = 20_000
		}
		var executed executions
		var mu sync.Mutex
		seen, last := 0, map[int]uint32{} // the last stream of each connection that gets an answer
		h := overHTTP2(t, func(s *rawStream) {
			mu.Lock()
			defer mu.Unlock()
			if id, ok := last[s.conn]; ok && s.id > id {
				return
			}
			if seen++; seen%50 == 0 && s.id > 1 {
				last[s.conn] = s.id - 2
				s.goAway(s.id - 2)
				return
			}
			executed.count(s.body)
			s.ok()
		})
		statuses, _ := askAtOnce(t, h, requests)
		if diff := cmp.Diff([]int{200}, statuses); diff != "" {
			t.Errorf("statuses (-want +got):\n%s", diff)
		}
		if n, most := executed.most(); n != requests || most != 1 {
			t.Errorf("%d requests, one of them executed %d times, want %d and 1", n, most, requests)
		}
	})
	t.Run("always", func(t *testing.T) {
		t.Parallel()
		var seen atomic.Int32
		h := overHTTP2(t, func(s *rawStream) {
			seen.Add(1)
			s.reset(codeRefused)
		})
		statuses, replays := askAtOnce(t, h, 1)
		if n := seen.Load(); !slices.Equal(statuses, []int{502}) || n != maxResends+1 || replays != maxResends {
			t.Errorf("%v after %d tries, %v of them replays", statuses, n, replays)
		}
	})
}

// warmHTTP2 has one request answered, so that there is a connection.
func warmHTTP2(t *testing.T, h http.Handler) {
	t.Helper()
	r := httptest.NewRequest("POST", "http://localhost/v1/chat/completions", strings.NewReader(`{"messages":["warm"]}`))
	w := httptest.NewRecorder()
	if h.ServeHTTP(w, r); w.Code != 200 {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
}
