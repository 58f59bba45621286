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
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestSoak runs the program as a process of its own between clients and an API that misbehave in every way they can,
// for QWEN_SOAK (2 s where it is not set): each outcome has to be the right one, and all that was held is given back.
func TestSoak(t *testing.T) {
	t.Parallel()
	const shutdownTimeout = 5 * time.Second
	d, err := time.ParseDuration(cmp.Or(os.Getenv("QWEN_SOAK"), "2s"))
	if err != nil {
		t.Fatalf("QWEN_SOAK: %v", err)
	}
	if end, ok := t.Deadline(); ok && time.Until(end) < d+2*time.Minute && os.Getenv("QWEN_SOAK") != "" {
		t.Fatalf("a soak of %v takes up to two minutes more: raise -timeout", d)
	}
	clients, timeout := 32, "2s"
	if os.Getenv("QWEN_SOAK") == "" { // beside other tests, with the race detector
		clients, timeout = 6, "5s"
	}
	s := &soak{kinds: soakKinds(), conns: map[*net.TCPConn]bool{}, faults: map[string]int{}, asked: map[string]int{}}
	s.names = slices.Sorted(maps.Keys(s.kinds))
	p := start(t, map[string]string{
		"API_BASE_URL": s.listen(t), "QWEN_API_KEY": "sk-test", "LOG_LEVEL": "error", "SHUTDOWN_TIMEOUT": shutdownTimeout.String(),
		"READ_TIMEOUT": timeout, "WRITE_TIMEOUT": timeout, "UPSTREAM_TIMEOUT": timeout, "STREAM_IDLE_TIMEOUT": timeout, "SSE_KEEPALIVE": "200ms",
	}, func(cmd *exec.Cmd) { cmd.Stderr = &soakLog{soak: s, w: cmd.Stderr} })
	s.url, s.host = p.url, strings.TrimPrefix(p.url, "http://")
	s.client = &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}
	pid := p.cmd.Process.Pid

	s.ask("json", 1)
	idle := s.drained(t, pid, soakState{Goroutines: 1 << 20, descriptors: 1 << 20})
	started := time.Now()
	var running sync.WaitGroup
	for range clients {
		running.Go(func() {
			for time.Since(started) < d || int(s.started.Load()) < len(s.names) {
				s.ask(s.next(), mathrand.Uint64())
			}
		})
	}
	var peaks [10]int64 // of the resident memory, by tenth of the run: single figures move with the garbage collector
	for elapsed := time.Duration(0); elapsed < d; elapsed = time.Since(started) {
		i := elapsed * 10 / d
		peaks[i] = max(peaks[i], residentBytes(pid))
		time.Sleep(d / 200)
	}
	running.Wait()
	took := time.Since(started)
	end := s.drained(t, pid, soakState{Goroutines: idle.Goroutines + 2, descriptors: idle.descriptors + 2})
	if growth := peaks[9] - peaks[1]; d >= 30*time.Second && growth > 32<<20 {
		t.Errorf("resident memory grew by %d MiB", growth>>20)
	}

	if runtime.GOOS != "windows" { // there is no SIGTERM
		before := s.injected("stream-slow")
		for range 16 {
			running.Go(func() { s.ask("stream-slow", mathrand.Uint64()) })
		}
		for deadline := time.Now().Add(20 * time.Second); s.injected("stream-slow") < before+16 && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		s.client.CloseIdleConnections()
		signalled := time.Now()
		p.terminate()
		stopped := time.Since(signalled)
		if stopped > shutdownTimeout {
			t.Errorf("the process took %v to stop, of %v", stopped, shutdownTimeout)
		}
		running.Wait()
		t.Logf("stopped %v after SIGTERM, amid 16 streams", stopped.Round(time.Millisecond))
	}
	s.log(t, took)
	t.Logf("resident memory up to %d MiB in the second tenth, %d MiB in the last; goroutines %d before, %d after; descriptors %d before, %d after",
		peaks[1]>>20, peaks[9]>>20, idle.Goroutines, end.Goroutines, idle.descriptors, end.descriptors)
}

// A soak is the clients, the API, and what came of it.
type soak struct {
	url, host string // of the program
	kinds     map[string]*soakKind
	names     []string // of kinds, sorted
	client    *http.Transport
	requests  sync.Map // of *soakRequest, by id
	started   atomic.Int64

	mu         sync.Mutex // guards all below
	conns      map[*net.TCPConn]bool
	asked      map[string]int // requests, by kind
	faults     map[string]int // that the API has injected, by kind
	keepAlives int
	wrongs     int
	wrong      []string // the first of them
}

// A soakKind is a kind of request: what the API does, and what has to come of it.
type soakKind struct {
	weight  int                                        // how often, against other kinds
	stream  bool                                       // a stream is asked for
	content int                                        // at most so many bytes of text in the answer, or in each event
	cut     bool                                       // the API sends not all of its answer
	api     func(s *soak, a *apiCall) (stays bool)     // reports whether the connection can be used again; nil where nothing may arrive
	client  func(s *soak, k *soakKind, r *soakRequest) // nil for post
	status  int                                        // 0 for 200, or for what client makes of it
	typ     string                                     // the error's, in the answer or in the last event; "" for a whole answer
	code    string
}

// soakKinds returns the kinds by name. The last part of a name is for the API or the client that serves several.
func soakKinds() map[string]*soakKind {
	return map[string]*soakKind{
		"json":               {weight: 10, content: 2000, api: (*soak).apiJSON},
		"json-large":         {weight: 4, content: 2 << 20, api: (*soak).apiJSON},
		"json-early":         {weight: 4, content: 2000, api: (*soak).apiEarly},
		"json-dead":          {weight: 10, content: 2000, api: (*soak).apiDead},
		"stream":             {weight: 10, stream: true, content: 500, api: (*soak).apiStream},
		"stream-slow":        {weight: 3, stream: true, content: 500, api: (*soak).apiSlow},
		"stream-large":       {weight: 4, stream: true, content: 100 << 10, api: (*soak).apiStream},
		"stream-slowly":      {weight: 4, stream: true, content: 40 << 10, api: (*soak).apiStream, client: (*soak).postSlowly},
		"close":              {weight: 5, api: (*soak).apiClose, status: 502, typ: "network_error", code: "upstream_unreachable"},
		"reset":              {weight: 5, api: (*soak).apiReset, status: 502, typ: "network_error", code: "upstream_unreachable"},
		"silent":             {weight: 1, api: (*soak).apiSilent, status: 504, typ: "network_error", code: "upstream_timeout"},
		"stream-close":       {weight: 10, stream: true, content: 500, cut: true, api: (*soak).apiCut, typ: "streaming_error", code: "upstream_broken"},
		"stream-reset":       {weight: 10, stream: true, content: 500, cut: true, api: (*soak).apiCut, typ: "streaming_error", code: "upstream_broken"},
		"stream-no-end":      {weight: 5, stream: true, content: 500, api: (*soak).apiNoEnd, typ: "streaming_error", code: "upstream_broken"},
		"stream-short":       {weight: 5, stream: true, content: 500, cut: true, api: (*soak).apiShort, typ: "streaming_error", code: "upstream_broken"},
		"stream-stall":       {weight: 1, stream: true, content: 500, cut: true, api: (*soak).apiStall, typ: "streaming_error", code: "upstream_idle"},
		"json-short":         {weight: 5, content: 2000, cut: true, api: (*soak).apiShort, status: 502, typ: "streaming_error", code: "upstream_broken"},
		"json-large-short":   {weight: 3, content: 2 << 20, cut: true, api: (*soak).apiShort, typ: "streaming_error", code: "upstream_broken"},
		"json-stall":         {weight: 1, content: 2000, cut: true, api: (*soak).apiStall, status: 504, typ: "streaming_error", code: "upstream_idle"},
		"status-500-html":    {weight: 5, api: (*soak).apiStatus, status: 500, typ: "server_error", code: "upstream_error"},
		"status-200-html":    {weight: 5, api: (*soak).apiStatus, status: 502, typ: "network_error", code: "bad_upstream_answer"},
		"status-302":         {weight: 5, api: (*soak).apiStatus, status: 502, typ: "network_error", code: "bad_upstream_answer"},
		"status-401":         {weight: 5, api: (*soak).apiStatus, status: 401, typ: "authentication_error", code: "invalid_api_key"},
		"status-429":         {weight: 5, api: (*soak).apiStatus, status: 429, typ: "limit_requests", code: "rate_limited"}, // Qwen's own, as it is
		"status-429-empty":   {weight: 5, api: (*soak).apiStatus, status: 429, typ: "rate_limit_error", code: "upstream_error"},
		"leave-stream":       {weight: 5, stream: true, api: (*soak).apiEndless, client: (*soak).leave},
		"leave-silence":      {weight: 5, api: (*soak).apiSilent, client: (*soak).leave},
		"take-nothing":       {weight: 1, stream: true, content: 64 << 10, api: (*soak).apiEndless, client: (*soak).takeNothing},
		"body-left":          {weight: 5, client: (*soak).halfBody},
		"body-half":          {weight: 5, client: (*soak).halfBody, status: 400, typ: "invalid_request_error", code: "broken_body"},
		"body-stall":         {weight: 1, client: (*soak).halfBody, status: 408, typ: "invalid_request_error", code: "request_timeout"},
		"body-too-large":     {weight: 5, client: (*soak).halfBody, status: 413, typ: "invalid_request_error", code: "request_too_large"},
		"body-bad-json":      {weight: 5, status: 400, typ: "invalid_request_error", code: "invalid_json"},
		"method-not-allowed": {weight: 5, status: 405, typ: "invalid_request_error", code: "method_not_allowed"},
		"unknown-path":       {weight: 5, status: 404, typ: "invalid_request_error", code: "unknown_url"},
	}
}

// next returns the kind of the next request: each once, then at random by weight.
func (s *soak) next() string {
	if n := int(s.started.Add(1)) - 1; n < len(s.names) {
		return s.names[n]
	}
	all := 0
	for _, k := range s.kinds {
		all += k.weight
	}
	n := mathrand.IntN(all)
	for _, name := range s.names {
		if n -= s.kinds[name].weight; n < 0 {
			return name
		}
	}
	panic("unreachable")
}

// A soakRequest is one request on its way. Its id names the kind and the seed of all that is random about it.
type soakRequest struct {
	name, id string
	rand     *mathrand.Rand // the client's
	text     bool           // a text completion
	body     []byte         // as the client sends it
	upstream []byte         // as it has to arrive
	answer   *soakAnswer    // as the client has to get it
	dead     atomic.Bool    // a kept-alive connection has been closed under it
	began    chan struct{}  // closed once the client has a byte of the answer
	ended    chan struct{}  // closed once the API is done with it
}

// A soakAnswer is what the API sends; it follows from the request's id.
type soakAnswer struct {
	pieces []string // events, or the JSON in one
	n      int      // pieces that are sent before a cut
	part   int      // bytes of the piece behind them that are
}

func (a *soakAnswer) whole() string { return strings.Join(a.pieces, "") }

// sent returns what is sent before a cut.
func (a *soakAnswer) sent() string {
	s := strings.Join(a.pieces[:a.n], "")
	if a.n < len(a.pieces) {
		s += a.pieces[a.n][:a.part]
	}
	return s
}

// newSoakAnswer returns the answer to a request of kind k: as the API sends it, or as a text completion.
func newSoakAnswer(k *soakKind, seed uint64, text bool) *soakAnswer {
	rng := mathrand.New(mathrand.NewPCG(seed, 1))
	content := func() string {
		return strings.Repeat(fmt.Sprintf(`%x <é>\n`, rng.Uint64()), 1+k.content/24*(1+rng.IntN(4))/4)
	}
	chat, translated := `{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"%s"},"finish_reason":"stop"}],"usage":{"total_tokens":3}}`,
		`{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"text":"%s","index":0,"logprobs":null,"finish_reason":"stop"}],"usage":{"total_tokens":3}}`
	a := &soakAnswer{}
	if !k.stream {
		a.pieces = []string{fmt.Sprintf(pick(text, translated, chat), content())}
	} else {
		chat = "data: " + `{"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}` + "\n\n"
		translated = "data: " + `{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","choices":[{"text":"%s","index":0,"logprobs":null,"finish_reason":null}]}` + "\n\n"
		n := 3 + rng.IntN(12)
		for range n {
			a.pieces = append(a.pieces, fmt.Sprintf(pick(text, translated, chat), content()))
		}
		a.pieces = append(a.pieces, "data: [DONE]\n\n")
	}
	a.n = len(a.pieces)
	if k.cut {
		a.n = rng.IntN(len(a.pieces))
		if k.stream {
			a.n = max(a.n, 1)
		}
		if k.stream && text {
			a.part = 0 // half an event is none
		} else {
			a.part = rng.IntN(len(a.pieces[a.n]))
		}
	}
	return a
}

// pick returns a where cond holds, else b.
func pick[T any](cond bool, a, b T) T {
	if cond {
		return a
	}
	return b
}

// ask makes a request of the kind name, and checks what comes of it.
func (s *soak) ask(name string, seed uint64) {
	k := s.kinds[name]
	r := &soakRequest{name: name, id: fmt.Sprintf("%s.%d", name, seed), rand: mathrand.New(mathrand.NewPCG(seed, 2)),
		began: make(chan struct{}), ended: make(chan struct{})}
	r.text = r.rand.IntN(4) == 0 && name != "stream-large" // an event of a text completion has a bound of 128 KiB
	r.answer = newSoakAnswer(k, seed, r.text)
	size := 1 << r.rand.IntN(22) // up to 2 MiB
	if name == "json-early" {
		size = 1 << 20
	}
	start := fmt.Sprintf(`{"model":"m","stream":%t,`, k.stream)
	content := `"` + strings.Repeat("x", size) + `"`
	r.upstream = []byte(start + `"messages":[{"role":"user","content":` + content + `}]}`)
	r.body = pick(r.text, []byte(start+`"prompt":`+content+`}`), r.upstream)
	s.requests.Store(r.id, r)
	defer s.requests.Delete(r.id)
	s.mu.Lock()
	s.asked[name]++
	s.mu.Unlock()
	if k.client != nil {
		k.client(s, k, r)
	} else {
		s.post(k, r)
	}
}

func (r *soakRequest) path() string { return pick(r.text, "/v1/completions", "/v1/chat/completions") }

// send sends the request, its body in chunks one time in four.
func (s *soak) send(ctx context.Context, r *soakRequest) (*http.Response, error) {
	method, path, body := "POST", r.path(), r.body
	switch r.name {
	case "body-bad-json":
		body = body[:len(body)-1]
	case "method-not-allowed":
		method, body = "PUT", nil
	case "unknown-path":
		path, body = "/v1/nothing", nil
	}
	var reader io.Reader = bytes.NewReader(body)
	if r.rand.IntN(4) == 0 {
		reader = struct{ io.Reader }{reader}
	}
	req, err := http.NewRequestWithContext(ctx, method, s.url+path, reader)
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Request-ID", r.id)
	return s.client.RoundTrip(req)
}

func (s *soak) post(k *soakKind, r *soakRequest)       { s.postAt(k, r, 0) }
func (s *soak) postSlowly(k *soakKind, r *soakRequest) { s.postAt(k, r, 5*time.Millisecond) }

// postAt makes the request and reads its answer, with a pause between any two reads.
func (s *soak) postAt(k *soakKind, r *soakRequest, pause time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	res, err := s.send(ctx, r)
	if err != nil {
		s.fail(r, "no answer: %v", err)
		return
	}
	defer res.Body.Close()
	var body bytes.Buffer
	var once sync.Once
	buf := make([]byte, 16<<10)
	for err == nil {
		var n int
		n, err = res.Body.Read(buf)
		body.Write(buf[:n])
		if n > 0 {
			once.Do(func() { close(r.began) })
		}
		time.Sleep(pause)
	}
	s.check(k, r, res, body.String(), err)
}

// check judges an answer, whose body has ended with err.
func (s *soak) check(k *soakKind, r *soakRequest, res *http.Response, body string, err error) {
	status := cmp.Or(k.status, 200)
	if r.name == "json-large-short" && (r.text || len(r.answer.sent()) < 16<<10) {
		status = 502 // it is translated as a whole, or breaks while the client can still be told
	}
	if id := res.Header.Get("X-Request-ID"); id != r.id {
		s.fail(r, "X-Request-ID %q", id)
	}
	if res.StatusCode != status {
		s.fail(r, "status %d, want %d: %.300s", res.StatusCode, status, body)
		return
	}
	if status != 200 {
		if err != io.EOF {
			s.fail(r, "the error answer ended with %v", err)
		}
		if retry := res.Header.Get("Retry-After"); retry != pick(status == 429, "7", "") {
			s.fail(r, "Retry-After %q", retry)
		}
		s.checkError(k, r, body)
		return
	}
	if k.stream {
		body = s.withoutKeepAlives(r, body)
	}
	if k.code == "" {
		if err != io.EOF || body != r.answer.whole() {
			s.fail(r, "%d bytes, want %d, %v: …%q", len(body), len(r.answer.whole()), err, last(body, 300))
		}
		return
	}
	if err == io.EOF {
		s.fail(r, "a clean end: …%q", last(body, 300))
	}
	if !k.stream {
		if !strings.HasPrefix(r.answer.sent(), body) {
			s.fail(r, "%d bytes that are not the first of the answer's: …%q", len(body), last(body, 300))
		}
		return
	}
	if strings.Contains(body, "data: [DONE]") { // an error event would come too late
		if body != r.answer.sent() && !(r.name == "stream-reset" && strings.HasPrefix(r.answer.sent(), body)) {
			s.fail(r, "%d bytes, want %d: …%q", len(body), len(r.answer.sent()), last(body, 300))
		}
		return
	}
	at := strings.LastIndex(body, "\n\ndata: {\"error\":")
	if at < 0 {
		s.fail(r, "no error event: …%q, %v", last(body, 300), err)
		return
	}
	got, want := body[:at], r.answer.sent()
	lost := r.name == "stream-reset" && strings.HasPrefix(want, got) && strings.HasPrefix(got, r.answer.pieces[0]) // by the API's system
	if got != want && !lost {
		s.fail(r, "%d bytes before the error event, want %d: …%q", len(got), len(want), last(body, 600))
	}
	s.checkError(k, r, strings.TrimPrefix(body[at:], "\n\ndata: "))
}

func (s *soak) checkError(k *soakKind, r *soakRequest, body string) {
	var e struct {
		Error struct{ Message, Type, Code string }
		ID    string `json:"request_id"`
	}
	err := json.Unmarshal([]byte(body), &e)
	if err != nil || e.Error.Message == "" || e.Error.Type != k.typ || e.Error.Code != k.code || e.ID != pick(r.name == "status-429", "", r.id) {
		s.fail(r, "%.300q, %v; want an error of type %s and code %s", body, err, k.typ, k.code)
	}
}

// withoutKeepAlives removes the comments that stand between two events.
func (s *soak) withoutKeepAlives(r *soakRequest, body string) string {
	const comment = "\n\n: keep-alive\n\n" // behind an event, or the beginning
	n := 0
	for body = "\n\n" + body; strings.Contains(body, comment); n++ {
		body = strings.Replace(body, comment, "\n\n", 1)
	}
	body = body[2:]
	if r.name == "stream-slow" && n == 0 { // on a busy machine others have them too
		s.fail(r, "no keep-alive")
	}
	s.mu.Lock()
	s.keepAlives += n
	s.mu.Unlock()
	return body
}

// leave goes away in the middle of an answer, or before it.
func (s *soak) leave(_ *soakKind, r *soakRequest) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if r.name == "leave-silence" {
		time.AfterFunc(time.Duration(r.rand.IntN(100))*time.Millisecond, cancel)
	}
	res, err := s.send(ctx, r)
	if r.name == "leave-silence" {
		if err == nil {
			res.Body.Close()
			s.fail(r, "an answer: %s", res.Status)
		}
		return
	}
	if err != nil {
		s.fail(r, "no answer: %v", err)
		return
	}
	if _, err := io.CopyN(io.Discard, res.Body, 1+r.rand.Int64N(1000)); err != nil {
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
	case <-time.After(15 * time.Second):
		s.fail(r, "the call to the API has not ended")
	}
}

// dial writes the header of a request that announces length bytes of body, and part of it.
func (s *soak) dial(r *soakRequest, length int64, part []byte) (*net.TCPConn, error) {
	c, err := net.Dial("tcp", s.host)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	_, err = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: %s\r\nX-Request-ID: %s\r\nContent-Length: %d\r\n\r\n%s", r.path(), s.host, r.id, length, part)
	return c.(*net.TCPConn), err
}

// takeNothing reads nothing of an endless answer.
func (s *soak) takeNothing(_ *soakKind, r *soakRequest) {
	c, err := s.dial(r, int64(len(r.body)), r.body)
	if err != nil {
		s.fail(r, "%v", err)
		return
	}
	defer c.Close()
	s.awaitEnd(r)
}

// halfBody sends half of a body, and then leaves, closes its own end, waits, or announced too much in the first place.
func (s *soak) halfBody(k *soakKind, r *soakRequest) {
	length, half := int64(len(r.body)), r.body[:r.rand.IntN(len(r.body))]
	if r.name == "body-too-large" {
		length, half = 1<<40, nil
	}
	c, err := s.dial(r, length, half)
	if err != nil {
		s.fail(r, "%v", err)
		return
	}
	defer c.Close()
	switch r.name {
	case "body-left":
		c.SetLinger(r.rand.IntN(2) - 1) // by a reset, or not
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
	s.check(k, r, res, string(body), cmp.Or(err, io.EOF))
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
	conn   *net.TCPConn
	in     *bufio.Reader
	req    *http.Request
	answer *soakAnswer // before any translation
	rand   *mathrand.Rand
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
		c.SetDeadline(time.Now().Add(10 * time.Second)) // by which the proxy has given up whatever it is
		id := req.Header.Get("X-Request-Id")
		name, digits, _ := strings.Cut(id, ".")
		k := s.kinds[name]
		if k == nil || k.api == nil {
			s.fail(&soakRequest{id: id}, "it has reached the API")
			return
		}
		v, ok := s.requests.Load(id)
		if !ok {
			return // its client has left
		}
		r := v.(*soakRequest)
		seed, _ := strconv.ParseUint(digits, 10, 64)
		a := &apiCall{soakRequest: r, conn: c, in: in, req: req, answer: newSoakAnswer(k, seed, false), rand: mathrand.New(mathrand.NewPCG(seed, 3)), reused: reused}
		if r.name != "json-early" && r.name != "json-dead" && !s.readBody(a) {
			return
		}
		if !k.api(s, a) {
			return
		}
	}
}

// readBody reads the request's body, and reports whether it is the right one.
func (s *soak) readBody(a *apiCall) bool {
	body, err := io.ReadAll(a.req.Body)
	if err == nil && !bytes.Equal(body, a.upstream) {
		s.fail(a.soakRequest, "another body has reached the API: %.300q", body)
	}
	return err == nil
}

// inject counts a fault.
func (s *soak) inject(a *apiCall) {
	s.mu.Lock()
	s.faults[a.name]++
	s.mu.Unlock()
}

// injected returns how many faults of a kind the API has injected.
func (s *soak) injected(name string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.faults[name]
}

func (s *soak) apiJSON(a *apiCall) bool {
	if a.rand.IntN(2) == 0 {
		fmt.Fprintf(a.conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(a.answer.whole()), a.answer.whole())
	} else {
		fmt.Fprintf(a.conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n%s0\r\n\r\n", chunk(a.answer.whole()))
	}
	return true
}

// apiEarly answers before it reads the request's body.
func (s *soak) apiEarly(a *apiCall) bool {
	s.inject(a)
	s.apiJSON(a)
	return s.readBody(a)
}

// apiDead closes a kept-alive connection when the first request of an id comes on it, with its body unread or read.
func (s *soak) apiDead(a *apiCall) bool {
	if a.reused && a.dead.CompareAndSwap(false, true) {
		s.inject(a)
		if a.rand.IntN(2) == 0 {
			s.readBody(a)
		}
		return false
	}
	return s.readBody(a) && s.apiJSON(a)
}

const soakStreamHeader = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

// chunk returns s as one chunk of a chunked body.
func chunk(s string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(s), s) }

func (s *soak) apiStream(a *apiCall) bool {
	io.WriteString(a.conn, soakStreamHeader)
	for _, e := range a.answer.pieces {
		io.WriteString(a.conn, chunk(e))
	}
	io.WriteString(a.conn, "0\r\n\r\n")
	return true
}

// apiSlow is silent twice for more than SSE_KEEPALIVE.
func (s *soak) apiSlow(a *apiCall) bool {
	s.inject(a)
	io.WriteString(a.conn, soakStreamHeader)
	for i, e := range a.answer.pieces {
		if i == 1 || i == 3 {
			time.Sleep(600 * time.Millisecond)
		}
		io.WriteString(a.conn, chunk(e))
	}
	io.WriteString(a.conn, "0\r\n\r\n")
	return true
}

func (s *soak) apiClose(a *apiCall) bool {
	s.inject(a)
	return false
}

func (s *soak) apiReset(a *apiCall) bool {
	s.inject(a)
	a.conn.SetLinger(0)
	return false
}

// apiSilent sends nothing more, and waits for the proxy to hang up.
func (s *soak) apiSilent(a *apiCall) bool {
	s.inject(a)
	if _, err := a.in.ReadByte(); errors.Is(err, os.ErrDeadlineExceeded) || err == nil {
		s.fail(a.soakRequest, "the proxy has not hung up: %v", err)
	}
	return false
}

// writeCut writes a stream up to its cut, and calls first behind its first event.
func (a *apiCall) writeCut(first func()) {
	io.WriteString(a.conn, soakStreamHeader)
	for i, e := range a.answer.pieces[:a.answer.n] {
		io.WriteString(a.conn, chunk(e))
		if i == 0 {
			first()
		}
	}
	if a.answer.part > 0 {
		e := a.answer.pieces[a.answer.n]
		length := len(e)
		if a.rand.IntN(2) == 0 {
			length = a.answer.part // net/http keeps a part of a chunk back until the rest comes, or fails
		}
		fmt.Fprintf(a.conn, "%x\r\n%s", length, e[:a.answer.part])
		if length == a.answer.part {
			io.WriteString(a.conn, "\r\n")
		}
	}
}

func (s *soak) apiCut(a *apiCall) bool {
	s.inject(a)
	if a.name == "stream-close" {
		a.writeCut(func() {})
		return false
	}
	a.writeCut(func() {
		select {
		case <-a.began: // else the reset might overtake the header
		case <-time.After(5 * time.Second):
		}
	})
	a.conn.SetLinger(0)
	return false
}

// apiNoEnd leaves out the last chunk.
func (s *soak) apiNoEnd(a *apiCall) bool {
	s.inject(a)
	a.writeCut(func() {})
	return false
}

// apiShort announces more bytes than it sends.
func (s *soak) apiShort(a *apiCall) bool {
	s.inject(a)
	fmt.Fprintf(a.conn, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s",
		pick(s.kinds[a.name].stream, "text/event-stream", "application/json"), len(a.answer.whole()), a.answer.sent())
	return false
}

// apiStall falls silent in the middle of its answer.
func (s *soak) apiStall(a *apiCall) bool {
	if s.kinds[a.name].stream {
		a.writeCut(func() {})
	} else {
		fmt.Fprintf(a.conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(a.answer.whole()), a.answer.sent())
	}
	return s.apiSilent(a)
}

// apiStatus sends what the kind's name says.
func (s *soak) apiStatus(a *apiCall) bool {
	s.inject(a)
	const html = "<!DOCTYPE html><title>blocked</title>"
	const limited = `{"error":{"message":"Too many requests","type":"limit_requests","param":null,"code":"rate_limited"}}`
	header, body := "", html
	switch a.name {
	case "status-302":
		header = "Location: http://" + a.conn.LocalAddr().String() + "/v1/elsewhere\r\n"
	case "status-429":
		header, body = "Retry-After: 7\r\n", limited
	case "status-429-empty":
		header, body = "Retry-After: 7\r\n", ""
	}
	status := strings.Split(a.name, "-")[1]
	fmt.Fprintf(a.conn, "HTTP/1.1 %s Odd\r\nContent-Type: text/html\r\n%sContent-Length: %d\r\n\r\n%s", status, header, len(body), body)
	return true
}

// apiEndless sends events until the proxy hangs up.
func (s *soak) apiEndless(a *apiCall) bool {
	defer close(a.ended)
	s.inject(a)
	_, err := io.WriteString(a.conn, soakStreamHeader)
	for i := 0; err == nil; i++ {
		_, err = io.WriteString(a.conn, chunk(a.answer.pieces[0]))
		if a.name == "leave-stream" {
			time.Sleep(10 * time.Millisecond)
		}
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		s.fail(a.soakRequest, "the proxy has not hung up")
	}
	return false
}

// fail notes a wrong outcome.
func (s *soak) fail(r *soakRequest, format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wrongs++; len(s.wrong) < 10 {
		s.wrong = append(s.wrong, fmt.Sprintf("%s (text completion: %t, %d bytes): ", r.id, r.text, len(r.body))+fmt.Sprintf(format, args...))
	}
}

// A soakLog passes on what the program writes but the lines of its access log, which a long run has millions of.
type soakLog struct {
	soak *soak
	w    io.Writer
	line []byte
}

func (l *soakLog) Write(p []byte) (int, error) {
	for line := range bytes.Lines(p) {
		l.line = append(l.line, line...)
		if !bytes.HasSuffix(line, []byte("\n")) {
			break
		}
		if !bytes.Contains(l.line, []byte(`"msg":"request"`)) {
			l.w.Write(l.line)
		}
		if bytes.Contains(l.line, []byte("a defect of the proxy")) {
			l.soak.fail(&soakRequest{}, "%s", l.line)
		}
		l.line = l.line[:0]
	}
	return len(p), nil
}

// last returns the last n bytes of s.
func last(s string, n int) string { return s[max(0, len(s)-n):] }

// A soakState is what the process holds.
type soakState struct {
	InFlight    int `json:"in_flight"`
	Streams     int `json:"open_streams"`
	Goroutines  int
	descriptors int // 0 where the system doesn't tell
}

// open returns what /health/detailed tells.
func (s *soak) open(t *testing.T) soakState {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	res, err := client.Get(s.url + "/health/detailed")
	fatalIf(t, err)
	defer res.Body.Close()
	var all struct {
		Requests   soakState
		Goroutines int
	}
	fatalIf(t, json.NewDecoder(res.Body).Decode(&all))
	all.Requests.Goroutines = all.Goroutines
	return all.Requests
}

// drained waits, once all idle connections are closed, until the process holds no more than most and no request.
func (s *soak) drained(t *testing.T, pid int, most soakState) soakState {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		s.client.CloseIdleConnections()
		s.mu.Lock()
		for c := range s.conns {
			c.Close()
		}
		open := len(s.conns)
		s.mu.Unlock()
		st := s.open(t)
		entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		st.descriptors = len(entries)
		if open == 0 && st.InFlight == 1 && st.Streams == 0 && st.Goroutines <= most.Goroutines && st.descriptors <= most.descriptors {
			return st
		}
		if time.Now().After(deadline) {
			t.Errorf("after 30 s without requests the process holds %+v, want one request, no stream and at most %+v", st, most)
			return st
		}
	}
}

// residentBytes returns the resident memory of a process, 0 where the system doesn't tell.
func residentBytes(pid int) int64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(fields[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

// log reports what came of it.
func (s *soak) log(t *testing.T, took time.Duration) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	asked, faults := 0, 0
	var kinds []string
	for _, name := range s.names {
		asked += s.asked[name]
		faults += s.faults[name]
		kinds = append(kinds, fmt.Sprintf("%s %d/%d", name, s.asked[name], s.faults[name]))
	}
	t.Logf("%d requests in %v, %d faults of the API's, %d keep-alives, %d wrong outcomes", asked, took.Round(time.Millisecond), faults, s.keepAlives, s.wrongs)
	t.Logf("requests/faults by kind: %s", strings.Join(kinds, ", "))
	for _, w := range s.wrong {
		t.Error(w)
	}
}
