package e2e

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
	"time"

	"qwen-go-proxy/e2e/testkit"
)

// The frames of HTTP/2 that an attack takes, RFC 9113 §6.
const (
	frameHeaders  = 0x1
	frameReset    = 0x3
	frameSettings = 0x4
	framePing     = 0x6
	frameGoAway   = 0x7
	flagEnd       = 0x1 | 0x4 // END_STREAM, END_HEADERS
	codeCancel    = 0x8
)

// appendFrame appends a frame's header and payload to b.
func appendFrame(b []byte, kind, flags byte, stream uint32, payload []byte) []byte {
	n := len(payload)
	b = append(b, byte(n>>16), byte(n>>8), byte(n), kind, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(b, payload...)
}

// readFrame returns the header, 9 bytes, and the payload of a frame.
func readFrame(r io.Reader) (header, payload []byte, err error) {
	header = make([]byte, 9)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, nil, err
	}
	payload = make([]byte, binary.BigEndian.Uint32(header)>>8)
	_, err = io.ReadFull(r, payload)
	return header, payload, err
}

// helloHTTP2 is what a client sends first.
var helloHTTP2 = string(appendFrame([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), frameSettings, 0, 0, nil))

// headerBlock is GET https://localhost and path in HPACK: fields of the static table, RFC 7541 appendix A, the names of
// the last two only.
func headerBlock(path string) []byte {
	b := append([]byte{0x80 | 2, 0x80 | 7, 4, byte(len(path))}, path...)
	return append(append(b, 1, byte(len("localhost"))), "localhost"...)
}

// flood opens streams over HTTP/2 for d, sends a part of a body on each and resets it. It returns their number.
func flood(p *program, d time.Duration, path string, body []byte, flags byte) (n int) {
	headers := headerBlock(path)
	headers[0] = 0x80 | 3 // POST
	code := []byte{0, 0, 0, codeCancel}
	for end := time.Now().Add(d); time.Now().Before(end); {
		c := p.dial()
		go io.Copy(io.Discard, c)
		batch := []byte(helloHTTP2)
		for id := uint32(1); time.Now().Before(end); id += 2 {
			batch = appendFrame(batch, frameHeaders, 0x4, id, headers)
			batch = appendFrame(batch, frameData, flags, id, body)
			batch = appendFrame(batch, frameReset, 0, id, code)
			if n++; n%20 == 0 {
				if _, err := c.Write(batch); err != nil {
					break // the server has had enough of the connection
				}
				batch = batch[:0]
			}
		}
		c.Close()
	}
	return n
}

// TestRapidResets resets streams that are being read or answered (CVE-2023-44487): none of their memory outlives them, and
// others are answered meanwhile.
func TestRapidResets(t *testing.T) {
	t.Parallel()
	if raceEnabled() {
		t.Skip("the race detector takes several times the memory")
	}
	const limit = 50 << 20
	d := time.Second
	if longTests() {
		d = 30 * time.Second
	}
	for _, tt := range []struct {
		name, body string
		flags      byte
		env        map[string]string
	}{
		{"whole bodies", `{"messages":[]}`, 0x1, map[string]string{}},
		{"half bodies", `{"messages":`, 0, map[string]string{}},
		{"without a key", `{"messages":[]}`, 0x1, map[string]string{"PROXY_API_KEYS": "sk-mine"}},
		{"without a key, half bodies", `{"messages":`, 0, map[string]string{"PROXY_API_KEYS": "sk-mine"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				answerJSON(w, 200, "{}")
			}, withTLS(t, tt.env))
			before := p.memory("VmRSS")
			flooded := make(chan int)
			go func() { flooded <- flood(p, d, "/v1/chat/completions", []byte(tt.body), tt.flags) }()
			client := p.client()
			most, asked := 0, 0
			for {
				if res, body, err := testkit.Ask(t, client, "GET", p.url+"/health", nil); err != nil || res.StatusCode != 200 {
					t.Fatalf("beside the resets: %v %s, %v", res, body, err)
				}
				asked++
				most = max(most, p.memory("VmRSS"))
				select {
				case n := <-flooded:
					t.Logf("%d streams, %d requests beside them; resident before %d MB, at most %d MB, after %d MB", n, asked, before>>20, most>>20, p.memory("VmRSS")>>20)
					if most-before > limit {
						t.Errorf("%d MB more than before, want at most %d MB", (most-before)>>20, limit>>20)
					}
					return
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
	}
}

// TestASmallAnswerThatNobodyTakesEnds: net/http holds a small answer back until the handler has returned.
func TestASmallAnswerThatNobodyTakesEnds(t *testing.T) {
	t.Parallel()
	p := startWith(t, nil, withTLS(t, map[string]string{"WRITE_TIMEOUT": "200ms"}))
	c := p.dial()
	io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	c.Write(appendFrame(nil, frameSettings, 0, 0, []byte{0, 4, 0, 0, 0, 0})) // SETTINGS_INITIAL_WINDOW_SIZE is 0
	c.Write(appendFrame(nil, frameHeaders, flagEnd, 1, headerBlock("/v1/models")))
	for {
		header, _, err := readFrame(c)
		if err != nil {
			t.Fatalf("the stream goes on: %v", err)
		}
		if header[3] == frameReset {
			break
		}
	}
}

func TestSilenceOverHTTP2IsNoWriteTimeout(t *testing.T) {
	t.Parallel()
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		sse(w, "data: 1\n\n")
		time.Sleep(2 * time.Second)
		sse(w, "data: [DONE]\n\n")
	}, withTLS(t, map[string]string{"WRITE_TIMEOUT": "1s", "SSE_KEEPALIVE": "0"}))
	res, body, err := testkit.Ask(t, p.client(), "POST", p.url+"/v1/chat/completions", strings.NewReader(`{"messages":[]}`))
	if err != nil || res.ProtoMajor != 2 || body != "data: 1\n\ndata: [DONE]\n\n" {
		t.Errorf("%v: %q, %v", res, body, err)
	}
}

func TestAnHTTP2ClientThatTakesNothingIsCutOff(t *testing.T) {
	t.Parallel()
	ended := make(chan struct{})
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		for r.Context().Err() == nil {
			sse(w, "data: "+strings.Repeat("x", 10000)+"\n\n")
		}
		close(ended)
	}, withTLS(t, map[string]string{"WRITE_TIMEOUT": "200ms", "LOG_LEVEL": "info"}))
	res, err := p.client().Post(p.url+"/v1/chat/completions", "application/json", strings.NewReader(`{"messages":[]}`))
	fatalIf(t, err)
	defer res.Body.Close() // of which nothing is read
	<-ended
	p.stderr.await(t, `"error_type":"network_error","error":"The client`)
}

// executions counts how often an API has worked on each request, by its body. It is safe for concurrent use.
type executions struct {
	mu sync.Mutex
	of map[string]int
}

// count notes an execution and returns how many there have been of this body.
func (e *executions) count(body []byte) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.of == nil {
		e.of = map[string]int{}
	}
	e.of[string(body)]++
	return e.of[string(body)]
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

// overHTTP2 starts the program in front of an HTTP/2 API that has answer called for each request, in a goroutine
// of its own.
func overHTTP2(t *testing.T, answer func(*rawStream)) *program {
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
			header, payload, err := readFrame(c)
			if err != nil {
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
	return startOverTLS(t, api, map[string]string{"LOG_LEVEL": "error"})
}

// askAtOnce sends n different requests to p, up to 20 at one time. It returns the statuses of their answers, each once, and how
// many replays /metrics then has.
func askAtOnce(t *testing.T, p *program, n int) (statuses []int, replays float64) {
	t.Helper()
	var mu sync.Mutex
	var clients sync.WaitGroup
	slots := make(chan struct{}, 20)
	for i := range n {
		slots <- struct{}{}
		clients.Go(func() {
			defer func() { <-slots }()
			res, _, err := p.try("/v1/chat/completions", fmt.Sprintf(`{"messages":[%d]%s}`, i, strings.Repeat(" ", i%2*8000))) // what is copied, and what is not
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			statuses = append(statuses, res.StatusCode)
		})
	}
	clients.Wait()
	slices.Sort(statuses)
	return slices.Compact(statuses), p.metric("qwen_proxy_upstream_replays_total")
}

// The codes of errors, RFC 9113 §7.
const (
	codeNone    = 0x0
	codeRefused = 0x7
)

// TestReplaysOverHTTP2: the API resets requests that it has worked on, or loses their connection: they may have been executed. What
// it says that it has not processed is sent again, once: "Requests that have not been processed have not been executed" (RFC 9113 §8.7).
func TestReplaysOverHTTP2(t *testing.T) {
	t.Parallel()
	const requests = 20
	goAway := func(last uint32) func(*rawStream) { return func(s *rawStream) { s.goAway(last) } }
	resets := func(code uint32) func(*rawStream) { return func(s *rawStream) { s.reset(code) } }
	for name, tt := range map[string]struct {
		fails       func(*rawStream)
		unprocessed bool
	}{
		"INTERNAL_ERROR":                  {resets(0x2), false},
		"PROTOCOL_ERROR":                  {resets(0x1), false},
		"CANCEL":                          {resets(codeCancel), false},
		"a GOAWAY that covers the stream": {func(s *rawStream) { s.goAway(1<<31 - 1); s.close() }, false},
		"REFUSED_STREAM":                  {resets(codeRefused), true},
		"a GOAWAY before the stream":      {goAway(1), true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var executed, failed executions
			p := overHTTP2(t, func(s *rawStream) {
				switch {
				case bytes.Contains(s.body, []byte("warm")):
					s.ok()
				case tt.unprocessed && s.conn == 0 && failed.count(s.body) == 1:
					tt.fails(s)
				case tt.unprocessed:
					executed.count(s.body)
					s.ok()
				default:
					executed.count(s.body)
					for n := 0; n < requests; n, _ = executed.most() { // all of them are in flight
						time.Sleep(time.Millisecond)
					}
					tt.fails(s)
				}
			})
			if res, body := p.post("/v1/chat/completions", `{"messages":["warm"]}`); res.StatusCode != 200 { // so that there is a connection
				t.Fatalf("%s %s", res.Status, body)
			}
			want := 502
			if tt.unprocessed {
				want = 200
			}
			statuses, replays := askAtOnce(t, p, requests)
			wantEqual(t, "statuses", []int{want}, statuses)
			if n, most := executed.most(); n != requests || most != 1 || (replays > 0) != tt.unprocessed {
				t.Errorf("%d requests, one of them executed %d times, %v replays; want %d and 1", n, most, replays, requests)
			}
		})
	}
	t.Run("refused each time", func(t *testing.T) {
		t.Parallel()
		var seen atomic.Int32
		p := overHTTP2(t, func(s *rawStream) {
			seen.Add(1)
			s.reset(codeRefused)
		})
		statuses, replays := askAtOnce(t, p, 1)
		if n := seen.Load(); !slices.Equal(statuses, []int{502}) || n != 2 || replays != 1 {
			t.Errorf("%v after %d tries, %v of them replays", statuses, n, replays)
		}
	})
}
