package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
)

// clientOf returns a client that speaks to p by HTTP/1.1, or by HTTP/2 where p serves TLS.
func clientOf(t *testing.T, p *program) *http.Client {
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: true, DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

// withTLS adds a certificate to env.
func withTLS(t *testing.T, env map[string]string) map[string]string {
	env["ENABLE_TLS"] = "true"
	env["TLS_CERT_FILE"], env["TLS_KEY_FILE"] = certificate(t)
	return env
}

// A cutAPI answers each request with the first n bytes of answer, and then closes or resets the connection.
type cutAPI struct {
	answer string
	n      atomic.Int64
	reset  bool
	url    string
}

func startCutAPI(t *testing.T, answer string, reset bool) *cutAPI {
	a := &cutAPI{answer: answer, reset: reset}
	a.url = serveRaw(t, func(c *net.TCPConn, _ *bufio.Reader) {
		io.WriteString(c, a.answer[:a.n.Load()])
		if a.reset {
			c.SetLinger(0)
		}
	})
	return a
}

// TestAStreamCutAnywhereNeverLooksWhole cuts a stream of three events at every byte. Nothing follows a [DONE].
func TestAStreamCutAnywhereNeverLooksWhole(t *testing.T) {
	const events = "data: {\"choices\":[{\"delta\":{\"content\":\"1\"}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"2\"}}]}\n\ndata: [DONE]\n\n"
	chunked := "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
	for e := range strings.SplitSeq(strings.TrimSuffix(events, "\n\n"), "\n\n") {
		chunked += fmt.Sprintf("%x\r\n%s\n\n\r\n", len(e)+2, e)
	}
	announced := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n%s", len(events), events)
	answers := map[string]string{
		"chunked":        chunked + "0\r\n\r\n", // cut before its last bytes, the last chunk is missing
		"Content-Length": announced,             // cut, it is short
		"connection":     "HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + strings.TrimSuffix(events, "\n\n"),
	}
	for name, answer := range answers {
		for _, reset := range []bool{false, true} {
			for _, path := range []string{"/v1/chat/completions", "/v1/completions"} {
				for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
					t.Run(fmt.Sprintf("%s reset=%v %s %s", name, reset, protocol, path), func(t *testing.T) {
						api := startCutAPI(t, answer, reset)
						env := map[string]string{"API_BASE_URL": api.url, "QWEN_API_KEY": "sk-test", "LOG_LEVEL": "error"}
						if protocol == "HTTP/2.0" {
							env = withTLS(t, env)
						}
						p := start(t, env)
						client := clientOf(t, p)
						request := `{"messages":[],"stream":true}`
						if path == "/v1/completions" {
							request = `{"prompt":"x","stream":true}`
						}
						for n := range len(answer) {
							api.n.Store(int64(n))
							res, err := client.Post(p.url+path, "application/json", strings.NewReader(request))
							if err != nil {
								t.Fatalf("cut at %d: %v", n, err)
							}
							if res.Proto != protocol {
								t.Fatalf("protocol %s", res.Proto)
							}
							body, err := io.ReadAll(res.Body)
							res.Body.Close()
							if res.StatusCode == 200 && err == nil {
								t.Errorf("cut at %d of %d: a clean end: %q", n, len(answer), body)
							}
							done, failed := bytes.Contains(body, []byte("data: [DONE]")), bytes.Contains(body, []byte(`data: {"error":`))
							if res.StatusCode == 200 && done == failed {
								t.Errorf("cut at %d of %d: want an error event or [DONE]: %q, %v", n, len(answer), body, err)
							}
						}
					})
				}
			}
		}
	}
}

// TestAStreamCutByHTTP2NeverLooksWhole: the API speaks HTTP/2 and ends the stream by RST_STREAM after every byte.
func TestAStreamCutByHTTP2NeverLooksWhole(t *testing.T) {
	const events = "data: {\"n\":1}\n\ndata: {\"n\":2}\n\ndata: [DONE]\n\n"
	var cut atomic.Int64
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 {
			t.Errorf("the API was asked by %s", r.Proto)
		}
		io.Copy(io.Discard, r.Body)
		sse(w, events[:cut.Load()])
		panic(http.ErrAbortHandler)
	}))
	api.EnableHTTP2 = true
	api.StartTLS()
	defer api.Close()
	cfg, err := loadConfig(lookup(map[string]string{"QWEN_API_KEY": "sk-test", "API_BASE_URL": api.URL + "/v1", "LOG_LEVEL": "error", "RATE_LIMIT_RPS": "0"}))
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(handlerOver(t, cfg, api))
	defer srv.Close()
	for n := range len(events) + 1 {
		cut.Store(int64(n))
		res, err := http.Post(srv.URL+"/v1/chat/completions", "application/json", strings.NewReader(`{"messages":[],"stream":true}`))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		done, failed := strings.Contains(events[:n], "data: [DONE]"), bytes.Contains(body, []byte(`data: {"error":`))
		if err == nil || !bytes.HasPrefix(body, []byte(events[:n])) || done == failed {
			t.Errorf("cut at %d: %q, %v", n, body, err)
		}
	}
}

func TestUpstreamsThatCannotBeReached(t *testing.T) {
	refused, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused.Close()
	selfSigned := httptest.NewUnstartedServer(http.NotFoundHandler())
	selfSigned.Config.ErrorLog = log.New(io.Discard, "", 0) // of the handshake that fails
	selfSigned.StartTLS()
	defer selfSigned.Close()
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	for name, base := range map[string]string{
		"connection refused":         "http://" + refused.Addr().String(),
		"no such name":               "http://qwen.invalid/v1",
		"a certificate of its own":   selfSigned.URL,
		"TLS to a server without it": strings.Replace(plain.URL, "http:", "https:", 1),
	} {
		t.Run(name, func(t *testing.T) {
			p := start(t, map[string]string{"API_BASE_URL": base, "QWEN_API_KEY": "sk-test"})
			res, body := p.post("/v1/chat/completions", `{"messages":[]}`)
			wantError(t, res, body, 502, typeNetwork, "upstream_unreachable")
			if strings.Contains(body, "127.0.0.1") || strings.Contains(body, "invalid:") {
				t.Errorf("the client is told what is the log's alone: %s", body)
			}
		})
	}
}

func TestStrangeButWholeAnswersPass(t *testing.T) {
	t.Parallel()
	var packed bytes.Buffer
	gz := gzip.NewWriter(&packed)
	io.WriteString(gz, `{"packed":true}`)
	gz.Close()
	long := "data: " + strings.Repeat("x", 10<<20) + "\n\ndata: [DONE]\n\n"
	own := "data: {\"error\":{\"message\":\"overloaded\"}}\n\n"
	for name, tt := range map[string]struct {
		handler http.HandlerFunc
		want    string
		header  string // Name: value that has to pass
	}{
		"packed though nobody asked": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Encoding", "gzip")
			w.Write(packed.Bytes())
		}, packed.String(), "Content-Encoding: gzip"},
		"a line of 10 MB":           {func(w http.ResponseWriter, r *http.Request) { sse(w, long) }, long, ""},
		"an error event of its own": {func(w http.ResponseWriter, r *http.Request) { sse(w, own) }, own, ""},
		"a stream without [DONE]":   {func(w http.ResponseWriter, r *http.Request) { sse(w, "data: 1\n\n") }, "data: 1\n\n", ""},
		"an empty stream":           {func(w http.ResponseWriter, r *http.Request) { sse(w) }, "", ""},
		"an answer before the body": {func(w http.ResponseWriter, r *http.Request) { answerJSON(w, 200, `{"early":true}`) }, `{"early":true}`, ""},
		"a header of 100 KB": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Big", strings.Repeat("x", 100<<10))
			answerJSON(w, 200, "{}")
		}, "{}", ""},
		"JSON that trickles in": {func(w http.ResponseWriter, r *http.Request) {
			for _, s := range []string{"{", `"a"`, ":1", "}"} {
				answerJSONPart(w, s)
			}
		}, `{"a":1}`, ""},
		"JSON that says it's a text": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			io.WriteString(w, "{}")
		}, "{}", "Content-Type: text/plain"},
	} {
		t.Run(name, func(t *testing.T) {
			p := startWith(t, tt.handler, nil)
			req, _ := http.NewRequest("POST", p.url+"/v1/chat/completions", strings.NewReader(`{"messages":["`+strings.Repeat("x", 1<<20)+`"]}`))
			res, err := (&http.Transport{DisableCompression: true}).RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			if err != nil || res.StatusCode != 200 || string(body) != tt.want {
				t.Errorf("%s, %v, %d bytes: %.100q", res.Status, err, len(body), body)
			}
			if name, value, ok := strings.Cut(tt.header, ": "); ok && res.Header.Get(name) != value {
				t.Errorf("%s is %q", name, res.Header.Get(name))
			}
		})
	}
}

func answerJSONPart(w http.ResponseWriter, s string) {
	w.Header().Set("Content-Type", "application/json")
	io.WriteString(w, s)
	http.NewResponseController(w).Flush()
}

// TestFastAnswersArriveWhole: an API that answers within microseconds makes proxies that stream the request's body
// through cut some of its streams (golang/go#40747).
func TestFastAnswersArriveWhole(t *testing.T) {
	want := strings.Repeat("data: x\n\n", 20) + "data: [DONE]\n\n"
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) { sse(w, want) }, map[string]string{"LOG_LEVEL": "error"})
	n := 1000
	switch {
	case os.Getenv("QWEN_LONG_TESTS") != "":
		n = 10_000
	case testing.Short():
		n = 100
	}
	for i := range n {
		// Beyond some buffer the body is still being written when the answer comes.
		content := strings.Repeat("x", []int{1, 8 << 10, 256 << 10}[i%3])
		res, body := p.post("/v1/chat/completions", `{"stream":true,"messages":[{"role":"user","content":"`+content+`"}]}`)
		if res.StatusCode != 200 || body != want {
			t.Fatalf("answer %d: %s, %d bytes", i, res.Status, len(body))
		}
	}
}
