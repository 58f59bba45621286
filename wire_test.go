package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// dialRaw opens a connection to p for a test that writes its own bytes.
func dialRaw(t *testing.T, p *program) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}

const rawChat = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n{\"messages\":[]}"

func TestAnAnswerThatEndsLateIsWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, map[string]string{"WRITE_TIMEOUT": "10s", "SSE_KEEPALIVE": "0"}, func(w http.ResponseWriter, r *http.Request) {
			sse(w, "data: 1\n\n", "data: [DONE]\n\n")
			time.Sleep(time.Minute) // the last chunk comes when the deadline of the last write has long passed
		})
		res := b.post(t, "/v1/chat/completions", `{"messages":[]}`)
		if body, err := io.ReadAll(res.Body); err != nil || string(body) != "data: 1\n\ndata: [DONE]\n\n" {
			t.Errorf("got %q, %v", body, err)
		}
	})
}

func TestSilenceOverHTTP2IsNoWriteTimeout(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		sse(w, "data: 1\n\n")
		time.Sleep(500 * time.Millisecond)
		sse(w, "data: [DONE]\n\n")
	}, withTLS(t, map[string]string{"WRITE_TIMEOUT": "200ms", "SSE_KEEPALIVE": "0"}))
	res, err := clientOf(t, p).Post(p.url+"/v1/chat/completions", "application/json", strings.NewReader(`{"messages":[]}`))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, err := io.ReadAll(res.Body); err != nil || res.ProtoMajor != 2 || string(body) != "data: 1\n\ndata: [DONE]\n\n" {
		t.Errorf("%s: %q, %v", res.Proto, body, err)
	}
}

func TestAnHTTP2ClientThatTakesNothingIsCutOff(t *testing.T) {
	ended := make(chan struct{})
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		for r.Context().Err() == nil {
			sse(w, "data: "+strings.Repeat("x", 10000)+"\n\n")
		}
		close(ended)
	}, withTLS(t, map[string]string{"WRITE_TIMEOUT": "200ms"}))
	res, err := clientOf(t, p).Post(p.url+"/v1/chat/completions", "application/json", strings.NewReader(`{"messages":[]}`))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close() // of which nothing is read
	<-ended
	p.stderr.await(t, `"error_type":"network_error","error":"The client`)
}

// TestABodyThatNobodyReadsHoldsNoConnection: what a handler leaves of a body net/http reads, before it answers or after.
func TestABodyThatNobodyReadsHoldsNoConnection(t *testing.T) {
	p := startWith(t, nil, map[string]string{"READ_TIMEOUT": "200ms", "PROXY_API_KEYS": "key"})
	for _, request := range []string{
		"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
		"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
		"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
		"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n",
	} {
		c := dialRaw(t, p)
		io.WriteString(c, request)
		if b, err := io.ReadAll(c); err != nil {
			t.Errorf("%.40q: still open: %.40q, %v", request, b, err)
		}
	}
}

func TestAHalfClosedClientGetsNoEmptySuccess(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	}, nil)
	c := dialRaw(t, p)
	io.WriteString(c, rawChat)
	c.(*net.TCPConn).CloseWrite()
	if b, _ := io.ReadAll(c); len(b) != 0 {
		t.Errorf("got %q", b)
	}
}

func TestAnHTTP10ClientSeesACut(t *testing.T) {
	p := start(t, map[string]string{"QWEN_API_KEY": "sk-test", "API_BASE_URL": rawAPI(t,
		"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n{"+strings.Repeat(" ", 0xfffe)+"\r\n")})
	c := dialRaw(t, p)
	io.WriteString(c, strings.Replace(rawChat, "HTTP/1.1", "HTTP/1.0", 1))
	if b, err := io.ReadAll(c); err == nil {
		t.Errorf("%d bytes and a clean end", len(b))
	}
}

func TestACutAnswerIsNoSuccessInTheLog(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "text/event-stream")
		big := []byte("data: " + strings.Repeat("x", 1<<20) + "\n\n")
		for r.Context().Err() == nil {
			w.Write(big)
		}
	}, map[string]string{"WRITE_TIMEOUT": "100ms"})
	io.WriteString(dialRaw(t, p), rawChat) // and nothing is read
	p.stderr.await(t, `"msg":"request".*"error_type":"network_error"`)
}

func TestTrailersPassInNeitherDirection(t *testing.T) {
	var got atomic.Value
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		got.Store(fmt.Sprint(r.ProtoMajor, r.Trailer))
		w.Header().Set("Trailer", "X-Envoy-Secret")
		sse(w, "data: 1\n\n")
		w.Header().Set("X-Envoy-Secret", "v")
	}))
	api.EnableHTTP2 = true
	api.StartTLS()
	defer api.Close()
	cfg, err := loadConfig(lookup(map[string]string{"QWEN_API_KEY": "sk-test", "API_BASE_URL": api.URL + "/v1", "LOG_LEVEL": "error"}))
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewServer(handlerOver(t, cfg, api))
	defer front.Close()
	c, err := net.Dial("tcp", strings.TrimPrefix(front.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTrailer: X-Leak\r\nTransfer-Encoding: chunked\r\n\r\nf\r\n{\"messages\":[]}\r\n0\r\nX-Leak: 10.1.2.3\r\nCookie: s=1\r\n\r\n")
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	io.ReadAll(res.Body)
	if got.Load() != "2 map[]" {
		t.Errorf("the API got protocol and trailers %v", got.Load())
	}
	if len(res.Trailer) != 0 || res.Header.Get("Trailer") != "" {
		t.Errorf("the client got trailers %v", res.Trailer)
	}
}

// handlerOver returns the whole handler for cfg, in front of an API whose certificate it trusts.
func handlerOver(t *testing.T, cfg *config, api *httptest.Server) http.Handler {
	transport := newTransport()
	transport.TLSClientConfig = api.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	t.Cleanup(transport.CloseIdleConnections)
	log := newLogger(cfg, io.Discard)
	tokens := newSource(cfg, log, io.Discard)
	m := newMetrics()
	return newHandler(cfg, log, tokens, newAccess(cfg, log), m, &health{tokens: tokens, metrics: m}, transport)
}

func TestAnUpgradeNeverPasses(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" || r.Header.Get("Connection") != "" {
			t.Errorf("headers %v", r.Header)
		}
		answerJSON(w, 200, "{}")
	}, nil)
	for _, protocol := range []string{"websocket", "\x80", "h2c"} {
		c := dialRaw(t, p)
		io.WriteString(c, strings.Replace(rawChat, "Content-Length", "Connection: Upgrade\r\nUpgrade: "+protocol+"\r\nContent-Length", 1))
		if res, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || res.StatusCode != 200 {
			t.Errorf("Upgrade: %q: %v, %v", protocol, res, err)
		}
	}
}

func TestOddRequestTargetsGetAnErrorOfOurs(t *testing.T) {
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
		c := dialRaw(t, p)
		io.WriteString(c, request)
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Errorf("%q: %v", request, err)
			continue
		}
		if body, _ := io.ReadAll(res.Body); res.StatusCode != status || res.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%q: %s %s", request, res.Status, body)
		}
	}
}

// TestNoReplayOnceAnAnswerHasBegun: a kept-alive connection that dies after the first bytes of an answer has done
// something with the request.
func TestNoReplayOnceAnAnswerHasBegun(t *testing.T) {
	for _, begun := range []string{"HTTP/1.1 20", "HTTP/1.1 102 Processing\r\n\r\n"} {
		var served atomic.Int32
		api := serveRaw(t, func(c *net.TCPConn, br *bufio.Reader) {
			for ok := true; ok; ok = readRaw(br) {
				if served.Add(1) == 2 {
					io.WriteString(c, begun)
					time.Sleep(50 * time.Millisecond) // it has arrived before the reset, which would overtake it
					c.SetLinger(0)
					return
				}
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
			}
		})
		p := start(t, map[string]string{"API_BASE_URL": api, "QWEN_API_KEY": "sk-test"})
		p.post("/v1/chat/completions", `{"messages":[]}`)
		res, body := p.post("/v1/chat/completions", `{"messages":[]}`)
		wantError(t, res, body, 502, typeNetwork, "upstream_unreachable")
		if n := served.Load(); n != 2 {
			t.Errorf("%q: the API saw %d requests, want 2", begun, n)
		}
	}
}

func TestABodyIsGivenBackWhenItsAnswerBegins(t *testing.T) {
	var calls atomic.Int32
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if calls.Add(1) == 1 {
			sse(w, "data: 1\n\n")
			<-r.Context().Done()
			return
		}
		answerJSON(w, 200, "{}")
	}, map[string]string{"MAX_BODY_BYTES": "1000000", "MAX_BUFFERED_BYTES": "1000000"})
	big := fmt.Sprintf(`{"messages":[%q]}`, strings.Repeat("x", 600000))
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	req, _ := http.NewRequestWithContext(ctx, "POST", p.url+"/v1/chat/completions", strings.NewReader(big))
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if _, err := res.Body.Read(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	for i := range 1000 { // the transport may take a moment to close its reader
		if res, body := p.post("/v1/chat/completions", big); res.StatusCode == 200 {
			break
		} else if i == 999 {
			t.Errorf("beside an open stream: %s %s", res.Status, body)
		}
	}
}

func TestEveryUpstreamIDComesBack(t *testing.T) {
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Request-Id", "qwen-1")
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, "<html>")
	}, map[string]string{"MAX_BODY_BYTES": "9223372036854775807", "MAX_BUFFERED_BYTES": "9223372036854775807"})
	res, _ := p.post("/v1/chat/completions", fmt.Sprintf(`{"messages":[%q]}`, strings.Repeat("x", 6000)))
	if res.StatusCode != 502 || res.Header.Get("X-Upstream-Request-Id") != "qwen-1" {
		t.Errorf("%s %v", res.Status, res.Header)
	}
}

// TestNoRequestHidesInAnother sends requests that announce their body's length twice, Transfer-Encoding in the disguises
// that request smuggling is tried with (those of the public corpora: an odd byte around name or value, lists, repeats, line
// folding). Two ends may read such a request differently, so none may make the server answer twice.
func TestNoRequestHidesInAnother(t *testing.T) {
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
			c := dialRaw(t, p)
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
