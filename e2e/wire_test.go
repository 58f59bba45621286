package e2e

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
)

const rawChat = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n{\"messages\":[]}"

// serveRaw returns the base URL of an API for tests that write their own bytes: answer has each connection, from
// behind its first request on, until it returns.
func serveRaw(t *testing.T, answer func(c *net.TCPConn, br *bufio.Reader)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	fatalIf(t, err)
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if br := bufio.NewReader(c); readRaw(br) {
					answer(c.(*net.TCPConn), br)
				}
			}()
		}
	}()
	return "http://" + ln.Addr().String() + "/v1"
}

// readRaw reads a request, body and all, and reports whether there was one.
func readRaw(br *bufio.Reader) bool {
	req, err := http.ReadRequest(br)
	if err == nil {
		_, err = io.Copy(io.Discard, req.Body)
	}
	return err == nil
}

// startRaw runs serve in front of an API that answers each request with the bytes that were set last, and closes.
func startRaw(t *testing.T, env map[string]string) (p *program, set func(answer string)) {
	t.Helper()
	var answer atomic.Value
	full := map[string]string{"QWEN_API_KEY": "sk-test", "API_BASE_URL": serveRaw(t, func(c *net.TCPConn, _ *bufio.Reader) {
		io.WriteString(c, answer.Load().(string))
	})}
	maps.Copy(full, env)
	return start(t, full), func(s string) { answer.Store(s) }
}

// exchange writes a request's bytes, and returns the answer to it without its body.
func (p *program) exchange(request string) *http.Response {
	p.t.Helper()
	c := p.dial()
	io.WriteString(c, request)
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	fatalIf(p.t, err)
	return res
}

func TestHeadersHaveALimit(t *testing.T) {
	t.Parallel()
	p := startWith(t, nil, nil)
	for _, tt := range []struct{ size, want int }{{60 << 10, 200}, {80 << 10, 431}} {
		if res := p.exchange("GET /health HTTP/1.1\r\nHost: localhost\r\nX-Large: " + strings.Repeat("x", tt.size) + "\r\n\r\n"); res.StatusCode != tt.want {
			t.Errorf("%d bytes: %s, want %d", tt.size, res.Status, tt.want)
		}
	}
}

// TestABodyThatNobodyReadsHoldsNoConnection: what a handler leaves of a body net/http reads, before it answers or after.
func TestABodyThatNobodyReadsHoldsNoConnection(t *testing.T) {
	t.Parallel()
	p := startWith(t, nil, map[string]string{"READ_TIMEOUT": "200ms", "PROXY_API_KEYS": "key"})
	for _, request := range []string{
		"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
		"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
		"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
		"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
	} {
		c := p.dial()
		io.WriteString(c, request)
		if b, err := io.ReadAll(c); err != nil {
			t.Errorf("%.40q: still open: %.40q, %v", request, b, err)
		}
	}
}

func TestAHalfClosedClientGetsNoEmptySuccess(t *testing.T) {
	t.Parallel()
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	}, nil)
	c := p.dial()
	io.WriteString(c, rawChat)
	c.(*net.TCPConn).CloseWrite()
	if b, _ := io.ReadAll(c); len(b) != 0 {
		t.Errorf("got %q", b)
	}
}

func TestACutAnswerIsNoSuccessInTheLog(t *testing.T) {
	t.Parallel()
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "text/event-stream")
		big := []byte("data: " + strings.Repeat("x", 1<<20) + "\n\n")
		for r.Context().Err() == nil {
			w.Write(big)
		}
	}, map[string]string{"WRITE_TIMEOUT": "100ms", "LOG_LEVEL": "info"})
	io.WriteString(p.dial(), rawChat) // and nothing is read
	p.stderr.await(t, `"msg":"request".*"error_type":"network_error"`)
}

func TestTrailersPassInNeitherDirection(t *testing.T) {
	t.Parallel()
	var got atomic.Value
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		got.Store(fmt.Sprint(r.ProtoMajor, r.Trailer))
		w.Header().Set("Trailer", "X-Envoy-Secret")
		sse(w, "data: 1\n\n")
		w.Header().Set("X-Envoy-Secret", "v")
	}))
	res := startOverTLS(t, api, nil).exchange("POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTrailer: X-Leak\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n{\"messages\":[]}\r\n0\r\nX-Leak: 10.1.2.3\r\nCookie: s=1\r\n\r\n")
	io.ReadAll(res.Body)
	if got.Load() != "2 map[]" {
		t.Errorf("the API got protocol and trailers %v", got.Load())
	}
	if len(res.Trailer) != 0 || res.Header.Get("Trailer") != "" {
		t.Errorf("the client got trailers %v", res.Trailer)
	}
}

func TestAnUpgradeNeverPasses(t *testing.T) {
	t.Parallel()
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" || r.Header.Get("Connection") != "" {
			t.Errorf("headers %v", r.Header)
		}
		answerJSON(w, 200, "{}")
	}, nil)
	for _, protocol := range []string{"websocket", "\x80", "h2c"} {
		res := p.exchange(strings.Replace(rawChat, "Content-Length", "Connection: Upgrade\r\nUpgrade: "+protocol+"\r\nContent-Length", 1))
		if res.StatusCode != 200 {
			t.Errorf("Upgrade: %q: %s", protocol, res.Status)
		}
	}
}

func TestOddRequestTargetsGetAnErrorOfOurs(t *testing.T) {
	t.Parallel()
	p := startWith(t, nil, nil)
	for request, status := range map[string]int{
		"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n":                      404,
		"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n":                          405,
		"TRACE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n":               405,
		"GET /v1/./models HTTP/1.1\r\nHost: localhost\r\n\r\n":               200,
		"GET /v1/x/../models/ HTTP/1.1\r\nHost: localhost\r\n\r\n":           200,
		"GET http://localhost/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n": 200,
		"GET http://localhost HTTP/1.1\r\nHost: localhost\r\n\r\n":           200,
	} {
		res := p.exchange(request)
		if body, _ := io.ReadAll(res.Body); res.StatusCode != status || res.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%q: %s %s", request, res.Status, body)
		}
	}
}

// TestNoRequestHidesInAnother sends requests that announce their body's length twice, Transfer-Encoding in the disguises
// that request smuggling is tried with (those of the public corpora: an odd byte around name or value, lists, repeats, line
// folding). Two ends may read such a request differently, so none may make the server answer twice.
func TestNoRequestHidesInAnother(t *testing.T) {
	t.Parallel()
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) { answerJSON(w, 200, `{}`) }, map[string]string{"RATE_LIMIT_RPS": "0", "LOG_LEVEL": "error"})
	disguises := []string{
		"Transfer-Encoding: chunked", "TRANSFER-ENCODING: CHUNKED", "tRANSFER-eNCODING: cHUNKED", "Transfer-Encoding:chunked", "Transfer-Encoding:  chunked",
		"Transfer-Encoding: chunked, identity", "Transfer-Encoding: identity, chunked", "Transfer-Encoding: cow, chunked", "Transfer-Encoding: chunked, chunked",
		"Transfer-Encoding: cow\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: cow", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
		"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "Transfer-Encoding: identity", "Transfer-Encoding:", "Transfer-Encoding: chunk", "Transfer-Encoding: chunkedx",
		"Transfer-Encoding: cow chunked bar", `Transfer-Encoding: "chunked"`, "Transfer-Encoding: 'chunked'", "Transfer-Encoding: chunked;q=1", "Transfer-Encoding: gzip, chunked",
		"Transfer-Encoding:\r\n chunked", "Transfer-Encoding:\n chunked", "Transfer-Encoding: chun\r\n ked", "Transfer-Encoding\r\n: chunked", " Transfer-Encoding: chunked",
		"Transfer Encoding: chunked", "Transfer\r-Encoding: chunked", "Transfer-Encoding: chunked\r", "X: X\rTransfer-Encoding: chunked", "X: X\nTransfer-Encoding: chunked",
		"Transfer-Encoding: ch\x96nked", "Transf\x82r-Encoding: chunked", "Content-Length: 0", "Content-Length: 5", "Content-Length: +5", "Content-Length: 5, 5", "Content-Length : 5", "Content-Length:\x0b5",
	}
	for b := range 256 {
		if b > ' ' && b%16 != 0 && b != 0x7f && b != 0x85 && b != 0xff && !strings.ContainsRune("\"'(),:;_=", rune(b)) && !longTests() {
			continue // these are like their neighbors
		}
		if b != '\n' && !(b >= '0' && b <= '9') && !(b >= 'a' && b <= 'z') && !(b >= 'A' && b <= 'Z') && b != '-' {
			c := string([]byte{byte(b)})
			disguises = append(disguises, "Transfer-Encoding:"+c+"chunked", "Transfer-Encoding: chunked"+c, c+"Transfer-Encoding: chunked", "Transfer-Encoding"+c+": chunked", "Transfer"+c+"Encoding: chunked")
		}
	}
	const hidden = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
	outcomes := map[string]int{}
	for _, header := range disguises {
		name, _, _ := strings.Cut(header, ":")
		for kind, request := range map[string]string{
			// One end ends the body with the last chunk, the other by its length: the hidden request is in between.
			"length behind chunks": fmt.Sprintf("Content-Length: %d\r\n%s\r\n\r\n0\r\n\r\n%s", len("0\r\n\r\n"+hidden), header, hidden),
			"chunks behind length": fmt.Sprintf("Content-Length: 4\r\n%s\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", header, len(hidden), hidden),
		} {
			c := p.dial()
			io.WriteString(c, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"+request)
			c.(*net.TCPConn).CloseWrite()
			answer, _ := io.ReadAll(c) // the server may reset what it does not read
			c.Close()
			answers := strings.Count(string(answer), "HTTP/1.1 ")
			status, _, _ := strings.Cut(strings.TrimPrefix(string(answer), "HTTP/1.1 "), " ")
			outcomes[fmt.Sprintf("%s: %d answers, %s", kind, answers, status)]++
			if strings.Contains(string(answer), `"healthy"`) {
				// A name that is another header's is nobody's Transfer-Encoding: the length alone counts, and what follows is a request.
				if kind == "chunks behind length" && validToken(name) && !strings.EqualFold(name, "Transfer-Encoding") {
					continue
				}
				t.Errorf("%q, %s: the hidden request was answered", header, kind)
			}
		}
	}
	t.Logf("%d headers: %v", len(disguises), outcomes)
}

// validToken reports whether s is a token, RFC 9110 §5.6.2.
func validToken(s string) bool {
	return s != "" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("!#$%&'*+-.^_`|~", r))
	}) < 0
}

// TestADeadKeptAliveConnectionCostsNoRequest: the API closes each connection once it has been idle, at
// the moment when the next request comes.
func TestADeadKeptAliveConnectionCostsNoRequest(t *testing.T) {
	t.Parallel()
	var served atomic.Int32
	api := serveRaw(t, func(c *net.TCPConn, br *bufio.Reader) {
		served.Add(1)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
		br.ReadByte() // the next request's first byte: now the connection dies
		c.SetLinger(0)
	})
	p := start(t, map[string]string{"API_BASE_URL": api, "QWEN_API_KEY": "sk-test"})
	const n = 200
	// What fits into one write, what takes two, and what takes many.
	sizes := []int{0, 4 << 10, 16 << 10, 100 << 10}
	for i := range n {
		if res, body := p.post("/v1/chat/completions", `{"messages":["`+strings.Repeat("x", sizes[i%len(sizes)])+`"]}`); res.StatusCode != 200 {
			t.Fatalf("request %d: %s %s", i, res.Status, body)
		}
	}
	if got := served.Load(); got != n {
		t.Errorf("the API served %d requests, want %d", got, n)
	}
}
