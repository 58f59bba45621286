package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// serveAPI starts a process in front of an API that api answers for.
func serveAPI(t *testing.T, api http.HandlerFunc, env map[string]string) *process {
	t.Helper()
	if api == nil {
		api = http.NotFound
	}
	upstream := httptest.NewServer(api)
	t.Cleanup(upstream.Close)
	full := map[string]string{"QWEN_API_KEY": "sk-test", "API_BASE_URL": upstream.URL + "/v1", "QWEN_DIR": t.TempDir()}
	for k, v := range env {
		full[k] = v
	}
	p := startProcess(t, full)
	t.Cleanup(p.kill) // before upstream.Close, which waits for its connections
	return p
}

// dial opens a connection to p for a test that writes its own bytes: TLS where p speaks it, with HTTP/2.
func (p *process) dial() net.Conn {
	p.t.Helper()
	scheme, address, _ := strings.Cut(p.url, "://")
	c, err := net.Dial("tcp", address)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	if scheme == "https" {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	}
	c.SetDeadline(time.Now().Add(time.Minute))
	return c
}

// many returns n, or a tenth of it under the race detector, which takes several times the memory and the time.
func many(n int) int {
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		return n / 10
	}
	return n
}

// atOnce calls f n times, some of them at one time.
func atOnce(n int, f func()) {
	var wg sync.WaitGroup
	var next atomic.Int64
	for range 50 {
		wg.Go(func() {
			for next.Add(1) <= int64(n) {
				f()
			}
		})
	}
	wg.Wait()
}

// A footprint is what a process takes of the machine.
type footprint struct {
	goroutines, descriptors int
	inFlight                int // requests, without the one that asks
	resident, heap          int // bytes
}

func (p *process) footprint() (u footprint) {
	p.t.Helper()
	if runtime.GOOS != "linux" {
		p.t.Skip("needs /proc")
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}
	res, err := (&http.Client{Transport: tr, Timeout: 20 * time.Second}).Get(p.url + "/health/detailed")
	if err != nil {
		p.t.Fatal(err)
	}
	defer res.Body.Close()
	var detailed struct {
		Goroutines int
		Requests   struct {
			InFlight int `json:"in_flight"`
		}
		Memory struct {
			Heap int `json:"heap_bytes"`
		}
	}
	if err := json.NewDecoder(res.Body).Decode(&detailed); err != nil {
		p.t.Fatal(err)
	}
	proc := fmt.Sprintf("/proc/%d/", p.cmd.Process.Pid)
	descriptors, err := os.ReadDir(proc + "fd")
	if err != nil {
		p.t.Fatal(err)
	}
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		p.t.Fatal(err)
	}
	if _, after, ok := strings.Cut(string(status), "\nVmRSS:"); !ok {
		p.t.Fatalf("no VmRSS in %s", status)
	} else if _, err := fmt.Sscanf(after, "%d kB", &u.resident); err != nil {
		p.t.Fatal(err)
	}
	u.resident <<= 10
	u.goroutines, u.heap, u.inFlight, u.descriptors = detailed.Goroutines, detailed.Memory.Heap, detailed.Requests.InFlight-1, len(descriptors)
	return u
}

// until returns p's footprint once it is as wanted, or fails the test.
func (p *process) until(what string, wanted func(footprint) bool) footprint {
	p.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		u := p.footprint()
		if wanted(u) {
			return u
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("%+v, want %s", u, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func TestClientsThatVanishLeaveNothing(t *testing.T) {
	clients := many(1000)
	p := serveAPI(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		sse(w, "data: 1\n\n")
		<-r.Context().Done()
	}, nil)
	p.footprint()
	before := p.footprint()
	var conns sync.Map
	atOnce(clients, func() {
		c := p.dial()
		io.WriteString(c, rawChat)
		lines := bufio.NewScanner(c)
		for lines.Scan() && lines.Text() != "data: 1" {
		}
		if lines.Err() != nil {
			t.Error(lines.Err())
		}
		conns.Store(c, true)
	})
	during := p.footprint()
	if during.inFlight != clients {
		t.Fatalf("%d streams are open, want %d", during.inFlight, clients)
	}
	n := 0
	conns.Range(func(c, _ any) bool {
		if n++; n%2 == 0 {
			c.(*net.TCPConn).SetLinger(0) // a reset
		}
		c.(net.Conn).Close()
		return true
	})
	after := p.until("what it was before", func(u footprint) bool {
		return u.inFlight == 0 && u.goroutines <= before.goroutines && u.descriptors <= before.descriptors
	})
	t.Logf("before %+v, with %d streams %+v, after %+v", before, clients, during, after)
}

// TestAnnouncementsTakeNoMemory: memory goes by what has come, never by what is said to come.
func TestAnnouncementsTakeNoMemory(t *testing.T) {
	const limit = 64 << 20
	clients := many(1000)
	t.Run("bodies", func(t *testing.T) {
		p := serveAPI(t, nil, nil)
		before := p.footprint()
		atOnce(clients, func() {
			io.WriteString(p.dial(), "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 33554432\r\n\r\n{")
		})
		after := p.until("all of them in flight", func(u footprint) bool { return u.inFlight == clients })
		t.Logf("%d bytes more: before %+v, after %+v", after.resident-before.resident, before, after)
		if grown := after.resident - before.resident; grown > limit {
			t.Errorf("%d clients took %d bytes, want at most %d", clients, grown, limit)
		}
	})
	t.Run("frames", func(t *testing.T) { // of HTTP/2, whose length is reserved: there is no larger one
		p := serveAPI(t, nil, withTLS(t, map[string]string{}))
		c := p.dial()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		io.WriteString(c, helloHTTP2+"\x00\x40\x01\x00\x00\x00\x00\x00\x01{")
		for {
			kind, _, err := readFrame(c)
			if err != nil {
				t.Fatalf("a frame of 16 KiB and 1 byte is not refused: %v", err)
			}
			if kind == frameGoAway {
				break
			}
		}
		c.Close()
		before := p.footprint()
		atOnce(clients, func() {
			c := p.dial()
			io.WriteString(c, helloHTTP2+"\x00\x40\x00\x00\x00\x00\x00\x00\x01{") // DATA of 16 KiB, which every server takes
			readFrame(c)
		})
		after := p.until("all of them connected", func(u footprint) bool { return u.goroutines >= before.goroutines+clients })
		t.Logf("%d bytes more: before %+v, after %+v", after.resident-before.resident, before, after)
		if grown := after.heap - before.heap; grown > limit {
			t.Errorf("%d clients took %d bytes, want at most %d", clients, grown, limit)
		}
	})
}

func TestClientsThatDoNotReadHinderNobody(t *testing.T) {
	const stuck, events = 50, 200
	next := make(chan struct{}, 1)
	var taken atomic.Int64 // bytes of those that are stuck
	p := serveAPI(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if bytes.Contains(body, []byte("steady")) {
			sse(w)
			for range events {
				select {
				case <-next:
				case <-r.Context().Done():
					return
				}
				sse(w, "data: 1\n\n")
			}
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		big := []byte("data: " + strings.Repeat("x", 1<<16) + "\n\n")
		for r.Context().Err() == nil {
			n, _ := w.Write(big)
			taken.Add(int64(n))
		}
	}, map[string]string{"WRITE_TIMEOUT": "2s"})
	before := p.footprint()
	atOnce(stuck, func() { io.WriteString(p.dial(), rawChat) })

	res, err := http.Post(p.url+"/v1/chat/completions", "application/json", strings.NewReader(`{"messages":["steady"]}`))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	lines := bufio.NewReader(res.Body)
	var slowest time.Duration
	for n := range events {
		sent := time.Now()
		next <- struct{}{}
		for range 2 {
			if _, err := lines.ReadString('\n'); err != nil {
				t.Fatalf("event %d: %v", n, err)
			}
		}
		slowest = max(slowest, time.Since(sent))
	}
	beside := p.footprint()
	after := p.until("those that are stuck cut off", func(u footprint) bool { return u.inFlight == 0 })
	t.Logf("%d stuck streams of %d bytes; the slowest of %d events beside them took %v; before %+v, beside %+v, after %+v",
		stuck, taken.Load(), events, slowest, before, beside, after)
	if slowest > time.Second {
		t.Errorf("an event took %v beside streams that nobody reads", slowest)
	}
}

// A slowBody is a body of which a piece comes after each pause.
type slowBody struct {
	ctx          context.Context // of the request, which ends its pauses
	pieces, size int
	pause        time.Duration
	end          time.Duration // of silence before the end
	sent         int
}

func (s *slowBody) Read(p []byte) (int, error) {
	if s.sent == s.pieces {
		sleep(s.ctx, s.end)
		return copy(p, `"]}`), io.EOF
	}
	n := copy(p[:min(len(p), s.size)], bytes.Repeat([]byte("x"), s.size))
	if s.sent == 0 {
		copy(p, `{"messages":["`)
	}
	s.sent++
	sleep(s.ctx, s.pause)
	return n, nil
}

func TestASlowBodyPassesWhileItComes(t *testing.T) {
	for _, tt := range []struct {
		name string
		body slowBody
		want int
		took time.Duration
	}{
		{"1.6 MB in seven minutes", slowBody{pieces: 400, size: readQuantum, pause: 1100 * time.Millisecond}, 200, 440 * time.Second},
		{"a large one that comes as slowly", slowBody{pieces: 5000, size: readQuantum, pause: 1100 * time.Millisecond}, 408, 532 * time.Second},
		{"each piece at the last moment", slowBody{pieces: 10, size: readQuantum, pause: 29 * time.Second}, 200, 290 * time.Second},
		{"one that stops", slowBody{pieces: 2500, size: readQuantum, end: time.Hour}, 408, 30 * time.Second},
		{"a drip", slowBody{pieces: 1000, size: 10, pause: time.Second}, 408, 30 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := inBubble(t, nil, func(w http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					answerJSON(w, 200, "{}")
				})
				started := time.Now()
				ctx, stop := context.WithCancel(t.Context())
				defer stop()
				tt.body.ctx = ctx
				req, err := http.NewRequestWithContext(ctx, "POST", "http://proxy/v1/chat/completions", &tt.body)
				if err != nil {
					t.Fatal(err)
				}
				res, err := b.client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				if body, _ := io.ReadAll(res.Body); res.StatusCode != tt.want {
					t.Errorf("%s %s, want %d", res.Status, body, tt.want)
				}
				if took := time.Since(started).Round(time.Second); took != tt.took {
					t.Errorf("it took %v, want %v", took, tt.took)
				}
			})
		})
	}
}

func TestHeadersHaveALimit(t *testing.T) {
	p := startWith(t, nil, nil)
	for _, tt := range []struct{ size, want int }{{60 << 10, 200}, {80 << 10, 431}} {
		c := dialRaw(t, p)
		io.WriteString(c, "GET /health HTTP/1.1\r\nHost: localhost\r\nX-Large: "+strings.Repeat("x", tt.size)+"\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || res.StatusCode != tt.want {
			t.Errorf("%d bytes: %v, %v, want %d", tt.size, res, err, tt.want)
		}
	}
}

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

func readFrame(r io.Reader) (kind byte, payload []byte, err error) {
	var header [9]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, nil, err
	}
	payload = make([]byte, binary.BigEndian.Uint32(header[:])>>8)
	_, err = io.ReadFull(r, payload)
	return header[3], payload, err
}

// helloHTTP2 is what a client sends first.
var helloHTTP2 = string(appendFrame([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), frameSettings, 0, 0, nil))

// headerBlock is GET https://localhost and path in HPACK: fields of the static table, RFC 7541 appendix A, the names of
// the last two only.
func headerBlock(path string) []byte {
	b := append([]byte{0x80 | 2, 0x80 | 7, 4, byte(len(path))}, path...)
	return append(append(b, 1, byte(len("localhost"))), "localhost"...)
}

// reset opens n streams over c and resets each at once. It returns how many of them the server has dealt with, which
// may have had enough before.
func reset(c net.Conn, path string, n int) int {
	defer c.Close()
	go func() {
		io.WriteString(c, helloHTTP2)
		headers, code := headerBlock(path), []byte{0, 0, 0, codeCancel}
		var batch []byte
		for i := range n {
			id := uint32(2*i + 1)
			batch = appendFrame(batch, frameHeaders, flagEnd, id, headers)
			batch = appendFrame(batch, frameReset, 0, id, code)
			if i%50 == 0 || i == n-1 {
				if _, err := c.Write(batch); err != nil {
					return
				}
				batch = batch[:0]
			}
		}
		c.Write(appendFrame(nil, framePing, 0, 0, make([]byte, 8)))
	}()
	for {
		switch kind, payload, err := readFrame(c); {
		case err != nil:
			return 0
		case kind == framePing: // all that went before it has been read
			return n
		case kind == frameGoAway:
			return (int(binary.BigEndian.Uint32(payload)) + 1) / 2 // by the last stream's id
		}
	}
}

// TestRapidResets opens streams and resets each at once (CVE-2023-44487): others hardly notice, and few of them are
// worth a line in the log, those that were answered before the reset came.
func TestRapidResets(t *testing.T) {
	resets := many(20_000)
	const most = 200 // connections that this may take
	for _, path := range []string{"/health", "/v1/models"} {
		t.Run(path, func(t *testing.T) {
			p := serveAPI(t, nil, withTLS(t, map[string]string{"LOG_LEVEL": "info"}))
			client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: 20 * time.Second}
			defer client.CloseIdleConnections()
			var slowest time.Duration
			var asked int
			ask := func() {
				started := time.Now()
				res, err := client.Get(p.url + "/health")
				if err != nil {
					t.Errorf("beside the resets: %v", err)
					return
				}
				io.Copy(io.Discard, res.Body)
				res.Body.Close()
				asked++
				slowest = max(slowest, time.Since(started))
			}
			ask()
			before := p.footprint()
			slowest = 0
			done := make(chan struct{})
			var second sync.WaitGroup
			second.Go(func() {
				for {
					ask()
					select {
					case <-done:
						return
					case <-time.After(time.Millisecond):
					}
				}
			})

			started := time.Now()
			sent, connections := 0, 0
			for ; sent < resets && connections < most; connections++ {
				sent += reset(p.dial(), path, resets-sent)
			}
			took := time.Since(started)
			close(done)
			second.Wait()
			after := p.until("nothing in flight", func(u footprint) bool { return u.inFlight == 0 && u.descriptors <= before.descriptors })
			lines := strings.Count(p.stderr.String(), `"msg":"request"`)
			t.Logf("%d resets in %v over %d connections; the slowest of %d answers beside them took %v; %d log lines more; before %+v, after %+v",
				sent, took.Round(time.Millisecond), connections, asked, slowest, lines-asked, before, after)
			if sent < resets {
				t.Errorf("%d resets over %d connections", sent, connections)
			}
			if slowest > time.Second {
				t.Errorf("an answer took %v beside resets", slowest)
			}
			if lines-asked > resets/4 {
				t.Errorf("%d log lines of %d resets", lines-asked, resets)
			}
		})
	}
}

// resident returns the memory that the process holds, in bytes.
func (p *process) resident() int {
	p.t.Helper()
	if runtime.GOOS != "linux" {
		p.t.Skip("needs /proc")
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "\nVmRSS:")
	var kB int
	if _, err := fmt.Sscanf(after, "%d kB", &kB); err != nil {
		p.t.Fatal(err)
	}
	return kB << 10
}

// flood opens streams over HTTP/2 for d, sends a part of a body on each and resets it. It returns their number.
func flood(p *process, d time.Duration, path string, body []byte, flags byte) (n int) {
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

// TestRapidResetsHoldNoMemory resets streams that are being read or answered: none of their memory outlives them.
func TestRapidResetsHoldNoMemory(t *testing.T) {
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
			p := serveAPI(t, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				answerJSON(w, 200, "{}")
			}, withTLS(t, tt.env))
			before := p.resident()
			stop, peak := make(chan struct{}), make(chan int)
			go func() {
				most := 0
				for {
					most = max(most, p.resident())
					select {
					case <-stop:
						peak <- most
						return
					case <-time.After(20 * time.Millisecond):
					}
				}
			}()
			n := flood(p, d, "/v1/chat/completions", []byte(tt.body), tt.flags)
			close(stop)
			most := <-peak
			t.Logf("%d streams; resident before %d MB, at most %d MB, after %d MB", n, before>>20, most>>20, p.resident()>>20)
			if most-before > limit {
				t.Errorf("%d MB more than before, want at most %d MB", (most-before)>>20, limit>>20)
			}
		})
	}
}

// TestASmallAnswerThatNobodyTakesEnds: net/http holds a small answer back until the handler has returned.
func TestASmallAnswerThatNobodyTakesEnds(t *testing.T) {
	p := startWith(t, nil, withTLS(t, map[string]string{"WRITE_TIMEOUT": "200ms"}))
	c := tls.Client(dialRaw(t, &program{t: t, url: strings.Replace(p.url, "https", "http", 1)}), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	c.Write(appendFrame(nil, frameSettings, 0, 0, []byte{0, 4, 0, 0, 0, 0})) // SETTINGS_INITIAL_WINDOW_SIZE is 0
	c.Write(appendFrame(nil, frameHeaders, flagEnd, 1, headerBlock("/v1/models")))
	for {
		kind, _, err := readFrame(c)
		if err != nil {
			t.Fatalf("the stream goes on: %v", err)
		}
		if kind == frameReset {
			break
		}
	}
}

// copyFile puts the content of one file into another, as of time at.
func copyFile(t *testing.T, to, from string, at time.Time) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(to, at, at); err != nil {
		t.Fatal(err)
	}
}

func TestARenewedCertificateIsServed(t *testing.T) {
	firstCert, firstKey := certificate(t)
	secondCert, secondKey := certificate(t)
	dir := t.TempDir()
	broken := filepath.Join(dir, "broken")
	if err := os.WriteFile(broken, []byte("-----BEGIN CERT"), 0o600); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		var log logBuffer
		cert := &servedCertificate{certFile: filepath.Join(dir, "cert.pem"), keyFile: filepath.Join(dir, "key.pem")}
		serving := cert.tlsConfig()
		files := []*watchedFile{{name: "the certificate", read: cert.read}}
		for _, tt := range []struct {
			name      string
			cert, key string // put in place
			want      string // the certificate served 10 s later
			complains int    // log lines so far
		}{
			{"the first", firstCert, firstKey, firstCert, 0},
			{"a renewal", secondCert, secondKey, secondCert, 0},
			{"a broken renewal", broken, secondKey, secondCert, 1},
			{"a mended one", firstCert, firstKey, firstCert, 2},
			{"a certificate before its key", secondCert, firstKey, firstCert, 3},
			{"the key behind it", "", secondKey, secondCert, 4},
			{"the same again", "", "", secondCert, 4},
		} {
			before := ""
			served := func() string {
				t.Helper()
				c, err := serving.GetCertificate(&tls.ClientHelloInfo{})
				if err != nil {
					t.Fatalf("%s: %v", tt.name, err)
				}
				for _, file := range []string{firstCert, secondCert} {
					if pair, err := tls.LoadX509KeyPair(file, strings.Replace(file, "cert.pem", "key.pem", 1)); err == nil && bytes.Equal(pair.Certificate[0], c.Certificate[0]) {
						return file
					}
				}
				return "another"
			}
			if tt.name != "the first" {
				before = served()
			}
			if tt.cert != "" {
				copyFile(t, cert.certFile, tt.cert, time.Now())
			}
			if tt.key != "" {
				copyFile(t, cert.keyFile, tt.key, time.Now())
			}
			if before == "" {
				go watchFiles(t.Context(), newLogger(&config{}, &log), 5*time.Second, files)
				synctest.Wait()
			} else {
				if got := served(); got != before {
					t.Errorf("%s: served at once: %s", tt.name, got)
				}
				time.Sleep(10 * time.Second)
			}
			for range 3 {
				if got := served(); got != tt.want {
					t.Errorf("%s: %s is served, want %s", tt.name, got, tt.want)
				}
				time.Sleep(10 * time.Second)
			}
			if n := strings.Count(log.String(), "\n"); n != tt.complains {
				t.Errorf("%s: %d log lines, want %d:\n%s", tt.name, n, tt.complains, &log)
			}
		}
	})
}

func TestOldTLSIsRefused(t *testing.T) {
	p := startWith(t, nil, withTLS(t, map[string]string{}))
	for _, tt := range []struct {
		name  string
		max   uint16
		suite uint16
		ok    bool
	}{
		{"TLS 1.3", tls.VersionTLS13, 0, true},
		{"TLS 1.2, AEAD", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, true},
		{"TLS 1.2, CBC", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, false},
		{"TLS 1.2, CBC and SHA-256", tls.VersionTLS12, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA256, false},
		{"TLS 1.1", tls.VersionTLS11, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, false},
		{"TLS 1.0", tls.VersionTLS10, tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, false},
	} {
		cfg := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: tt.max}
		if tt.suite != 0 {
			cfg.CipherSuites = []uint16{tt.suite}
		}
		c, err := tls.Dial("tcp", strings.TrimPrefix(p.url, "https://"), cfg)
		if err == nil {
			c.Close()
		}
		if (err == nil) != tt.ok {
			t.Errorf("%s: %v, want it taken: %v", tt.name, err, tt.ok)
		}
	}
}
