package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestSoak runs the program between clients and an API that misbehave in every way they can, for QWEN_SOAK (2 s where it
// is not set). Each outcome has to be the right one, and all that was held is given back.
func TestSoak(t *testing.T) {
	t.Parallel()
	d, err := time.ParseDuration(cmp.Or(os.Getenv("QWEN_SOAK"), "2s"))
	fatalIf(t, err)
	clients, timeout := 32, "2s"
	if os.Getenv("QWEN_SOAK") == "" { // beside other tests, with the race detector
		clients, timeout = 6, "5s"
	}
	s := &soak{conns: map[net.Conn]bool{}, asked: map[string]int{}}
	s.program = start(t, map[string]string{
		"API_BASE_URL": s.listen(t), "QWEN_API_KEY": "sk-test", "LOG_LEVEL": "error", "SHUTDOWN_TIMEOUT": "15s",
		"READ_TIMEOUT": timeout, "WRITE_TIMEOUT": timeout, "UPSTREAM_TIMEOUT": timeout, "STREAM_IDLE_TIMEOUT": timeout, "SSE_KEEPALIVE": "200ms",
	})
	s.transport = &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}

	s.ask(soakKinds[0])
	idle := s.drained(footprint{goroutines: 1 << 20, descriptors: 1 << 20})
	started := time.Now()
	var running sync.WaitGroup
	for range clients {
		running.Go(func() {
			for time.Since(started) < d || int(s.started.Load()) < len(soakKinds) {
				s.ask(s.next())
			}
		})
	}
	var peaks [10]int // of the resident memory, by tenth of the run: single figures move with the garbage collector
	for elapsed := time.Duration(0); elapsed < d; elapsed = time.Since(started) {
		i := elapsed * 10 / d
		peaks[i] = max(peaks[i], s.memory("VmRSS"))
		time.Sleep(d / 200)
	}
	running.Wait()
	end := s.drained(footprint{goroutines: idle.goroutines + 2, descriptors: idle.descriptors + 2})
	if growth := peaks[9] - peaks[1]; d >= 30*time.Second && growth > 32<<20 {
		t.Errorf("resident memory grew by %d MiB", growth>>20)
	}

	s.terminate()
	if strings.Contains(s.stderr.String(), "a defect of the proxy") {
		t.Error("the log tells of a defect of the proxy")
	}
	t.Logf("requests by kind: %v; before %+v, after %+v; peaks in the second and last tenth %d and %d MiB", s.asked, idle, end, peaks[1]>>20, peaks[9]>>20)
	for _, w := range s.wrong[:min(len(s.wrong), 10)] {
		t.Error(w)
	}
}

// A soak is the clients, the API, and what came of it.
type soak struct {
	*program
	transport *http.Transport
	requests  sync.Map // of *soakRequest, by id
	started   atomic.Int64

	mu    sync.Mutex // guards all below
	conns map[net.Conn]bool
	asked map[string]int // requests, by kind
	wrong []string
}

// A soakKind is a kind of request: what the API does, and what has to come of it.
type soakKind struct {
	name    string
	weight  int                         // how often, against other kinds
	stream  bool                        // the answer is one
	content int                         // at most so many bytes of text in the answer, or in each event
	cut     bool                        // the API sends not all of its answer
	api     func(*apiCall) (stays bool) // reports whether the connection can be used again; nil where nothing may arrive
	client  func(*soak, *soakRequest)   // nil for post
	status  int                         // 0 for 200, or for what client makes of it
	typ     string                      // the error's, in the answer or in the last event; "" for a whole answer
	code    string
}

const (
	soakHTML    = "<!DOCTYPE html><title>blocked</title>"
	soakLimited = `{"error":{"message":"Too many requests","type":"limit_requests","param":null,"code":"rate_limited"}}` // Qwen's own
)

var soakKinds = []*soakKind{
	{name: "json", weight: 10, content: 2000, api: (*apiCall).json},
	{name: "json-large", weight: 4, content: 2 << 20, api: (*apiCall).json},
	{name: "json-early", weight: 4, content: 2000, api: func(a *apiCall) bool { return a.json() && a.readBody() }},
	{name: "json-dead", weight: 10, content: 2000, api: (*apiCall).dead},
	{name: "stream", weight: 10, stream: true, content: 500, api: (*apiCall).events},
	{name: "stream-slow", weight: 3, stream: true, content: 500, api: (*apiCall).events},
	{name: "stream-large", weight: 4, stream: true, content: 100 << 10, api: (*apiCall).events},
	{name: "stream-slowly", weight: 4, stream: true, content: 40 << 10, api: (*apiCall).events},
	{name: "close", weight: 5, api: func(*apiCall) bool { return false }, status: 502, typ: "network_error", code: "upstream_unreachable"},
	{name: "reset", weight: 5, api: (*apiCall).reset, status: 502, typ: "network_error", code: "upstream_unreachable"},
	{name: "silent", weight: 1, api: (*apiCall).silent, status: 504, typ: "network_error", code: "upstream_timeout"},
	{name: "stream-close", weight: 10, stream: true, content: 500, cut: true, api: (*apiCall).part, typ: "streaming_error", code: "upstream_broken"},
	{name: "stream-reset", weight: 10, stream: true, content: 500, cut: true, api: (*apiCall).part, typ: "streaming_error", code: "upstream_broken"},
	{name: "stream-no-end", weight: 5, stream: true, content: 500, api: (*apiCall).part, typ: "streaming_error", code: "upstream_broken"},
	{name: "stream-short", weight: 5, stream: true, content: 500, cut: true, api: (*apiCall).short, typ: "streaming_error", code: "upstream_broken"},
	{name: "stream-stall", weight: 1, stream: true, content: 500, cut: true, api: (*apiCall).part, typ: "streaming_error", code: "upstream_idle"},
	{name: "json-short", weight: 5, content: 2000, cut: true, api: (*apiCall).short, status: 502, typ: "streaming_error", code: "upstream_broken"},
	{name: "json-large-short", weight: 3, content: 2 << 20, cut: true, api: (*apiCall).short, status: 502, typ: "streaming_error", code: "upstream_broken"},
	{name: "json-stall", weight: 1, content: 2000, cut: true, api: (*apiCall).short, status: 504, typ: "streaming_error", code: "upstream_idle"},
	{name: "status-500-html", weight: 5, api: sends("500 Odd", "", soakHTML), status: 500, typ: "server_error", code: "upstream_error"},
	{name: "status-200-html", weight: 5, api: sends("200 OK", "", soakHTML), status: 502, typ: "network_error", code: "bad_upstream_answer"},
	{name: "status-302", weight: 5, api: sends("302 Odd", "Location: http://127.0.0.1:1/v1\r\n", soakHTML), status: 502, typ: "network_error", code: "bad_upstream_answer"},
	{name: "status-401", weight: 5, api: sends("401 Odd", "", soakHTML), status: 401, typ: "authentication_error", code: "invalid_api_key"},
	{name: "status-429", weight: 5, api: sends("429 Odd", "Retry-After: 7\r\n", soakLimited), status: 429, typ: "limit_requests", code: "rate_limited"},
	{name: "status-429-empty", weight: 5, api: sends("429 Odd", "Retry-After: 7\r\n", ""), status: 429, typ: "rate_limit_error", code: "upstream_error"},
	{name: "leave-stream", weight: 5, stream: true, api: (*apiCall).endless, client: (*soak).leave},
	{name: "leave-silence", weight: 5, api: (*apiCall).silent, client: (*soak).leave},
	{name: "take-nothing", weight: 1, stream: true, content: 64 << 10, api: (*apiCall).endless, client: (*soak).raw},
	{name: "body-left", weight: 5, client: (*soak).raw},
	{name: "body-half", weight: 5, client: (*soak).raw, status: 400, typ: "invalid_request_error", code: "broken_body"},
	{name: "body-stall", weight: 1, client: (*soak).raw, status: 408, typ: "invalid_request_error", code: "request_timeout"},
	{name: "body-too-large", weight: 5, client: (*soak).raw, status: 413, typ: "invalid_request_error", code: "request_too_large"},
	{name: "body-bad-json", weight: 5, status: 400, typ: "invalid_request_error", code: "invalid_json"},
}

// next returns the kind of the next request: each once, then at random by weight.
func (s *soak) next() *soakKind {
	if n := int(s.started.Add(1)) - 1; n < len(soakKinds) {
		return soakKinds[n]
	}
	for {
		if k := soakKinds[mathrand.IntN(len(soakKinds))]; mathrand.IntN(10) < k.weight {
			return k
		}
	}
}

// A soakRequest is one request on its way.
type soakRequest struct {
	*soakKind
	id     string
	body   []byte
	pieces []string      // the API's answer: events, or the JSON in one
	sent   string        // of them, what is sent before a cut
	dead   atomic.Bool   // a kept-alive connection has been closed under it
	began  chan struct{} // closed once the client has a byte of the answer
	ended  chan struct{} // closed once the API is done with it
}

func (r *soakRequest) whole() string { return strings.Join(r.pieces, "") }

// ask makes a request of kind k, and checks what comes of it.
func (s *soak) ask(k *soakKind) {
	r := &soakRequest{soakKind: k, id: fmt.Sprintf("%s.%d", k.name, mathrand.Uint64()), began: make(chan struct{}), ended: make(chan struct{})}
	format, events := `{"choices":[{"message":{"content":"%s"}}],"usage":{"total_tokens":3}}`, 1
	if k.stream {
		format, events = "data: {\"choices\":[{\"delta\":{\"content\":\"%s\"}}]}\n\n", 3+mathrand.IntN(12)
	}
	for range events {
		text := strings.Repeat(fmt.Sprintf(`%x <é>\n`, mathrand.Uint64()), 1+k.content/24*(1+mathrand.IntN(4))/4)
		r.pieces = append(r.pieces, fmt.Sprintf(format, text))
	}
	least := 0
	if k.stream {
		least = len(r.pieces[0])
		r.pieces = append(r.pieces, "data: [DONE]\n\n")
	}
	r.sent = r.whole()
	if k.cut {
		r.sent = r.sent[:least+mathrand.IntN(len(r.sent)-least)]
	}
	size := 1 << mathrand.IntN(22) // up to 2 MiB
	if k.name == "json-early" {
		size = 1 << 20
	}
	r.body = fmt.Appendf(nil, `{"model":"m","stream":%t,"messages":[{"role":"user","content":"%s"}]}`, k.stream, strings.Repeat("x", size))
	s.requests.Store(r.id, r)
	defer s.requests.Delete(r.id)
	s.mu.Lock()
	s.asked[k.name]++
	s.mu.Unlock()
	if k.client != nil {
		k.client(s, r)
	} else {
		s.ordinary(r)
	}
}

// send sends the request, its body in chunks one time in four.
func (s *soak) send(ctx context.Context, r *soakRequest) (*http.Response, error) {
	body := r.body
	if r.name == "body-bad-json" {
		body = body[:len(body)-1]
	}
	var reader io.Reader = bytes.NewReader(body)
	if mathrand.IntN(4) == 0 {
		reader = struct{ io.Reader }{reader}
	}
	req, err := http.NewRequestWithContext(ctx, "POST", s.url+"/v1/chat/completions", reader)
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Request-ID", r.id)
	return s.transport.RoundTrip(req)
}

// ordinary makes the request and reads its answer, in "stream-slowly" with a pause between any two reads.
func (s *soak) ordinary(r *soakRequest) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	res, err := s.send(ctx, r)
	if err != nil {
		if !r.passesCut() { // a cut answer may end before its header has left the proxy
			s.fail(r, "no answer: %v", err)
		}
		return
	}
	defer res.Body.Close()
	var body bytes.Buffer
	for buf := make([]byte, 16<<10); err == nil; {
		var n int
		n, err = res.Body.Read(buf)
		if n > 0 && body.Len() == 0 {
			close(r.began)
		}
		body.Write(buf[:n])
		if r.name == "stream-slowly" {
			time.Sleep(5 * time.Millisecond)
		}
	}
	s.check(r, res, body.String(), err)
}

// passesCut reports whether what has come of a cut JSON answer is passed on. A short one is read whole first.
func (r *soakRequest) passesCut() bool {
	return r.cut && !r.stream && r.sent != "" && len(r.whole()) > 4<<10
}

// check judges an answer, whose body has ended with err.
func (s *soak) check(r *soakRequest, res *http.Response, body string, err error) {
	status := cmp.Or(r.status, 200)
	if r.passesCut() {
		status = 200
	}
	if id := res.Header.Get("X-Request-ID"); id != r.id || res.StatusCode != status {
		s.fail(r, "status %d, want %d, X-Request-ID %q: %.300s", res.StatusCode, status, id, body)
		return
	}
	if r.stream { // comments stand between two events
		for before := ""; body != before; {
			before, body = body, strings.TrimPrefix(strings.Replace(body, "\n\n: keep-alive\n\n", "\n\n", 1), ": keep-alive\n\n")
		}
	}
	last := body[max(0, len(body)-300):]
	switch lost := strings.HasPrefix(r.sent, body) && r.name == "stream-reset"; { // by the API's system
	case status != 200:
		if retry := res.Header.Get("Retry-After"); err != io.EOF || (retry == "7") != (status == 429) {
			s.fail(r, "the error answer ended with %v, Retry-After %q", err, retry)
		}
		s.checkError(r, body)
	case r.code == "":
		if err != io.EOF || body != r.whole() {
			s.fail(r, "%d bytes, want %d, %v: …%q", len(body), len(r.whole()), err, last)
		}
	case err == io.EOF:
		s.fail(r, "a clean end: …%q", last)
	case !r.stream:
		if !strings.HasPrefix(r.sent, body) {
			s.fail(r, "%d bytes that are not the first of the answer's: …%q", len(body), last)
		}
	case strings.Contains(body, "data: [DONE]"): // an error event would come too late
		if body != r.sent && !lost {
			s.fail(r, "%d bytes, want %d: …%q", len(body), len(r.sent), last)
		}
	default:
		at := strings.LastIndex(body, "\n\ndata: {\"error\":")
		if at < 0 {
			s.fail(r, "no error event: …%q, %v", last, err)
			return
		}
		lost = r.name == "stream-reset" && strings.HasPrefix(r.sent, body[:at]) && strings.HasPrefix(body, r.pieces[0])
		if body[:at] != r.sent && !lost {
			s.fail(r, "%d bytes before the error event, want %d: …%q", at, len(r.sent), last)
		}
		s.checkError(r, strings.TrimPrefix(body[at:], "\n\ndata: "))
	}
}

func (s *soak) checkError(r *soakRequest, body string) {
	var e struct {
		Error struct{ Message, Type, Code string }
		ID    string `json:"request_id"`
	}
	err := json.Unmarshal([]byte(body), &e)
	if err != nil || e.Error.Message == "" || e.Error.Type != r.typ || e.Error.Code != r.code || e.ID != r.id && r.name != "status-429" {
		s.fail(r, "%.300q, %v; want an error of type %s and code %s", body, err, r.typ, r.code)
	}
}

// leave goes away in the middle of an answer, or before it.
func (s *soak) leave(r *soakRequest) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if r.name == "leave-silence" {
		time.AfterFunc(time.Duration(mathrand.IntN(100))*time.Millisecond, cancel)
	}
	res, err := s.send(ctx, r)
	if (err == nil) != r.stream {
		s.fail(r, "want an answer: %t, got %v, %v", r.stream, res, err)
		return
	}
	if !r.stream {
		return
	}
	if _, err := io.CopyN(io.Discard, res.Body, 1+mathrand.Int64N(1000)); err != nil {
		s.fail(r, "the answer ended: %v", err)
	}
	cancel()
	res.Body.Close()
	s.awaitEnd(r)
}

// awaitEnd waits for the API to be left alone.
func (s *soak) awaitEnd(r *soakRequest) {
	select {
	case <-r.ended:
	case <-time.After(25 * time.Second):
		s.fail(r, "the call to the API has not ended")
	}
}

// raw reads nothing of an endless answer, or sends half of a body, and then leaves, closes its own end, waits, or
// announced too much in the first place.
func (s *soak) raw(r *soakRequest) {
	length, part := len(r.body), r.body[:mathrand.IntN(len(r.body))]
	switch r.name {
	case "take-nothing":
		part = r.body
	case "body-too-large":
		length, part = 1<<40, nil
	}
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		s.fail(r, "%v", err)
		return
	}
	c := conn.(*net.TCPConn)
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	fmt.Fprintf(c, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: %s\r\nContent-Length: %d\r\n\r\n%s", r.id, length, part)
	switch r.name {
	case "take-nothing":
		s.awaitEnd(r)
		return
	case "body-left":
		c.SetLinger(mathrand.IntN(2) - 1) // by a reset, or not
		return
	case "body-half":
		c.CloseWrite()
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		s.fail(r, "no answer: %v", err)
		return
	}
	body, err := io.ReadAll(res.Body)
	s.check(r, res, string(body), cmp.Or(err, io.EOF))
}

// listen starts the API and returns its base URL.
func (s *soak) listen(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	fatalIf(t, err)
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go s.serve(c.(*net.TCPConn))
		}
	}()
	return "http://" + ln.Addr().String() + "/v1"
}

// An apiCall is a request at the API.
type apiCall struct {
	*soakRequest
	s      *soak
	conn   *net.TCPConn
	in     *bufio.Reader
	req    *http.Request
	reused bool // the connection
}

func (s *soak) serve(c *net.TCPConn) {
	s.mu.Lock()
	s.conns[c] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		c.Close()
	}()
	in := bufio.NewReader(c)
	for reused := false; ; reused = true {
		c.SetDeadline(time.Time{})
		req, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		c.SetDeadline(time.Now().Add(20 * time.Second)) // by which the proxy has given up whatever it is
		v, ok := s.requests.Load(req.Header.Get("X-Request-Id"))
		if !ok {
			return // its client has left
		}
		a := &apiCall{v.(*soakRequest), s, c, in, req, reused}
		if a.api == nil {
			s.fail(a.soakRequest, "it has reached the API")
			return
		}
		if a.name != "json-early" && a.name != "json-dead" && !a.readBody() || !a.api(a) {
			return
		}
	}
}

// readBody reads the request's body, and reports whether it is the right one.
func (a *apiCall) readBody() bool {
	body, err := io.ReadAll(a.req.Body)
	if err == nil && !bytes.Equal(body, a.body) {
		a.s.fail(a.soakRequest, "another body has reached the API: %.300q", body)
	}
	return err == nil
}

// chunk returns s as one chunk of a chunked body.
func chunk(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }

func (a *apiCall) json() bool {
	body := fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(a.whole()), a.whole())
	if mathrand.IntN(2) == 0 {
		body = "Transfer-Encoding: chunked\r\n\r\n" + chunk(a.whole()) + "0\r\n\r\n"
	}
	io.WriteString(a.conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"+body)
	return true
}

// dead closes a kept-alive connection when a request comes on it, with its body unread or read. It does so once.
func (a *apiCall) dead() bool {
	if a.reused && a.soakRequest.dead.CompareAndSwap(false, true) {
		if mathrand.IntN(2) == 0 {
			a.readBody()
		}
		return false
	}
	return a.readBody() && a.json()
}

const soakStreamHeader = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

// events sends the stream. "stream-slow" is silent for more than SSE_KEEPALIVE.
func (a *apiCall) events() bool {
	io.WriteString(a.conn, soakStreamHeader)
	for i, e := range a.pieces {
		if a.name == "stream-slow" && i == 1 {
			time.Sleep(600 * time.Millisecond)
		}
		io.WriteString(a.conn, chunk(e))
	}
	io.WriteString(a.conn, "0\r\n\r\n")
	return true
}

// part sends the stream up to its cut and without its last chunk, and then closes, resets or falls silent.
func (a *apiCall) part() bool {
	io.WriteString(a.conn, soakStreamHeader)
	left := len(a.sent)
	for i, e := range a.pieces {
		if left < len(e) {
			if left > 0 && mathrand.IntN(2) == 0 { // net/http keeps a part of a chunk back until the rest comes, or fails
				fmt.Fprintf(a.conn, "%x\r\n%s", len(e), e[:left])
			} else if left > 0 {
				io.WriteString(a.conn, chunk(e[:left]))
			}
			break
		}
		io.WriteString(a.conn, chunk(e))
		left -= len(e)
		if i == 0 && a.name == "stream-reset" {
			select {
			case <-a.began: // else the reset might overtake the header
			case <-time.After(10 * time.Second):
			}
		}
	}
	switch a.name {
	case "stream-reset":
		return a.reset()
	case "stream-stall":
		return a.silent()
	}
	return false
}

// short announces more bytes than it sends, and then closes or falls silent.
func (a *apiCall) short() bool {
	contentType := "application/json"
	if a.stream {
		contentType = "text/event-stream"
	}
	fmt.Fprintf(a.conn, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", contentType, len(a.whole()), a.sent)
	return a.name == "json-stall" && a.silent()
}

func (a *apiCall) reset() bool {
	a.conn.SetLinger(0)
	return false
}

// silent sends nothing more, and waits for the proxy to hang up.
func (a *apiCall) silent() bool {
	if _, err := a.in.ReadByte(); errors.Is(err, os.ErrDeadlineExceeded) || err == nil {
		a.s.fail(a.soakRequest, "the proxy has not hung up: %v", err)
	}
	return false
}

// sends returns what answers with a page, or with what else body is.
func sends(status, header, body string) func(*apiCall) bool {
	answer := fmt.Sprintf("HTTP/1.1 %s\r\nContent-Type: text/html\r\n%sContent-Length: %d\r\n\r\n%s", status, header, len(body), body)
	return func(a *apiCall) bool {
		io.WriteString(a.conn, answer)
		return true
	}
}

// endless sends events until the proxy hangs up.
func (a *apiCall) endless() bool {
	defer close(a.ended)
	_, err := io.WriteString(a.conn, soakStreamHeader)
	for err == nil {
		_, err = io.WriteString(a.conn, chunk(a.pieces[0]))
		if a.name == "leave-stream" {
			time.Sleep(10 * time.Millisecond)
		}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		a.s.fail(a.soakRequest, "the proxy has not hung up")
	}
	return false
}

// fail notes a wrong outcome.
func (s *soak) fail(r *soakRequest, format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wrong = append(s.wrong, fmt.Sprintf("%s (%d bytes): ", r.id, len(r.body))+fmt.Sprintf(format, args...))
}

// drained waits, once all idle connections are closed, until the process holds no more than most and no request.
func (s *soak) drained(most footprint) footprint {
	s.t.Helper()
	return s.until(fmt.Sprintf("at most %+v once all requests are over", most), func(u footprint) bool {
		s.transport.CloseIdleConnections()
		s.mu.Lock()
		defer s.mu.Unlock()
		for c := range s.conns {
			c.Close()
		}
		return len(s.conns) == 0 && u.inFlight == 0 && u.goroutines <= most.goroutines && u.descriptors <= most.descriptors
	})
}
