package e2e

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"qwen-go-proxy/e2e/testkit"
)

// TestAStreamCutAnywhereNeverLooksWhole cuts a stream of three events at every byte: at every fourth in each test, or at all of them
// in the long tests. Nothing follows a [DONE].
func TestAStreamCutAnywhereNeverLooksWhole(t *testing.T) {
	t.Parallel()
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
	step, tests := 4, 0
	if longTests() {
		step = 1
	}
	for name, answer := range answers {
		for _, reset := range []bool{false, true} {
			for _, path := range []string{"/v1/chat/completions", "/v1/completions"} {
				for _, protocol := range []string{"HTTP/1.1", "HTTP/2.0"} {
					first := tests % step
					tests++
					t.Run(fmt.Sprintf("%s reset=%v %s %s", name, reset, protocol, path), func(t *testing.T) {
						t.Parallel()
						var cut atomic.Int64
						api := serveRaw(t, func(c *net.TCPConn, _ *bufio.Reader) {
							io.WriteString(c, answer[:cut.Load()])
							if reset {
								c.SetLinger(0)
							}
						})
						env := map[string]string{"API_BASE_URL": api, "QWEN_API_KEY": "sk-test", "LOG_LEVEL": "error"}
						if protocol == "HTTP/2.0" {
							env = withTLS(t, env)
						}
						p := start(t, env)
						client := p.client()
						request := `{"messages":[],"stream":true}`
						if path == "/v1/completions" {
							request = `{"prompt":"x","stream":true}`
						}
						for n := first; n < len(answer); n += step {
							cut.Store(int64(n))
							res, body, err := testkit.Ask(t, client, "POST", p.url+path, strings.NewReader(request))
							if res == nil || res.Proto != protocol {
								t.Fatalf("cut at %d: %v, %v; want an answer by %s", n, res, err, protocol)
							}
							if res.StatusCode == 200 && err == nil {
								t.Errorf("cut at %d of %d: a clean end: %q", n, len(answer), body)
							}
							done, failed := strings.Contains(body, "data: [DONE]"), strings.Contains(body, `data: {"error":`)
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
	t.Parallel()
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
	p := startOverTLS(t, api, nil)
	for n := range len(events) + 1 {
		cut.Store(int64(n))
		_, body, err := p.try("/v1/chat/completions", `{"messages":[],"stream":true}`)
		done, failed := strings.Contains(events[:n], "data: [DONE]"), strings.Contains(body, `data: {"error":`)
		if err == nil || !strings.HasPrefix(body, events[:n]) || done == failed {
			t.Errorf("cut at %d: %q, %v", n, body, err)
		}
	}
}

func TestUpstreamsThatCannotBeReached(t *testing.T) {
	t.Parallel()
	selfSigned := httptest.NewUnstartedServer(http.NotFoundHandler())
	selfSigned.Config.ErrorLog = log.New(io.Discard, "", 0) // of the handshake that fails
	selfSigned.StartTLS()
	defer selfSigned.Close()
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	for name, base := range map[string]string{
		"connection refused":         "http://127.0.0.1:1", // nobody listens there
		"no such name":               "http://qwen.invalid/v1",
		"a certificate of its own":   selfSigned.URL,
		"TLS to a server without it": strings.Replace(plain.URL, "http:", "https:", 1),
	} {
		t.Run(name, func(t *testing.T) {
			p := start(t, map[string]string{"API_BASE_URL": base, "QWEN_API_KEY": "sk-test"})
			res, body := p.post("/v1/chat/completions", `{"messages":[]}`)
			wantError(t, res, body, 502, "network_error", "upstream_unreachable")
			if strings.Contains(body, "127.0.0.1") || strings.Contains(body, "invalid:") {
				t.Errorf("the client is told what is the log's alone: %s", body)
			}
		})
	}
}

func TestStrangeButWholeAnswersPass(t *testing.T) {
	t.Parallel()
	p, set := startRaw(t, nil)
	const stream, ownError = "Content-Type: text/event-stream", "data: {\"error\":{\"message\":\"overloaded\"}}\n\n"
	for name, tt := range map[string]struct{ header, body string }{ // of an answer; the first header has to pass
		"packed though nobody asked": {"Content-Encoding: gzip\r\nContent-Type: application/json", gzipped(`{"packed":true}`)},
		"a line of 2 MB":             {stream, "data: " + strings.Repeat("x", 2<<20) + "\n\ndata: [DONE]\n\n"},
		"an error event of its own":  {stream, ownError},
		"a stream without [DONE]":    {stream, "data: 1\n\n"},
		"an empty stream":            {stream, ""},
		"a header of 100 KB":         {"Content-Type: application/json\r\nX-Big: " + strings.Repeat("x", 100<<10), "{}"},
		"JSON that says it's a text": {"Content-Type: text/plain", "{}"},
	} {
		for _, chunked := range []bool{false, true} {
			if end := fmt.Sprintf("\r\nContent-Length: %d\r\n\r\n%s", len(tt.body), tt.body); !chunked {
				set("HTTP/1.1 200 OK\r\n" + tt.header + end)
			} else {
				set("HTTP/1.1 200 OK\r\n" + tt.header + "\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.TrimPrefix(chunk(tt.body), "0\r\n\r\n") + "0\r\n\r\n")
			}
			client := &http.Client{Transport: &http.Transport{DisableCompression: true, DisableKeepAlives: true}}
			res, body, err := testkit.Ask(t, client, "POST", p.url+"/v1/chat/completions", strings.NewReader(`{"messages":["`+strings.Repeat("x", 1<<17)+`"]}`))
			if err != nil || res.StatusCode != 200 || body != tt.body {
				t.Errorf("%s: %v, %v, %d bytes: %.100q", name, res, err, len(body), body)
				continue
			}
			first, _, _ := strings.Cut(tt.header, "\r\n")
			if name, value, _ := strings.Cut(first, ": "); !strings.HasPrefix(res.Header.Get(name), value) {
				t.Errorf("%s is %q, want %s", name, res.Header.Get(name), value)
			}
		}
	}
}

// TestFastAnswersArriveWhole: an API that answers within microseconds makes proxies that stream the request's body
// through cut some of its streams (golang/go#40747).
func TestFastAnswersArriveWhole(t *testing.T) {
	t.Parallel()
	want := strings.Repeat("data: x\n\n", 20) + "data: [DONE]\n\n"
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) { sse(w, want) }, map[string]string{"LOG_LEVEL": "error"})
	n := 300
	if longTests() {
		n = 10_000
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

// TestABrokenStreamOfMessages: Anthropic's clients know an error by the event's name.
func TestABrokenStreamOfMessages(t *testing.T) {
	t.Parallel()
	p, set := startRaw(t, nil)
	set("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n16\r\nevent: ping\ndata: {}\n\n\r\n")
	_, got, err := p.try("/v1/messages", `{"messages":[]}`)
	event, ok := strings.CutPrefix(got, "event: ping\ndata: {}\n\n\n\nevent: error\ndata: ")
	var data struct {
		Type  string
		Error struct{ Type, Message string }
	}
	if jsonErr := json.Unmarshal([]byte(event), &data); jsonErr != nil || !ok || data.Type != "error" || data.Error.Type != "streaming_error" || data.Error.Message == "" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%q, %v, %v", got, err, jsonErr)
	}
}

func TestABrokenAnswerDoesNotLookWhole(t *testing.T) {
	t.Parallel()
	p, set := startRaw(t, nil)
	for name, tt := range map[string]struct {
		answer string
		code   string // of a 502; "" for an answer that is cut
	}{
		"nothing at all":           {"", "upstream_unreachable"},
		"half a header":            {"HTTP/1.1 200 OK\r\nContent-Ty", "upstream_unreachable"},
		"not HTTP":                 {"SSH-2.0-OpenSSH_9\r\n", "upstream_unreachable"},
		"no byte of the body":      {"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n", "upstream_broken"},
		"half the body":            {"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{\"a\"", "upstream_broken"},
		"no last chunk":            {"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n{\"a\"\r\n", ""},
		"half a large body":        {"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99999\r\n\r\n{\"a\"" + strings.Repeat(" ", 50000), ""},
		"switching protocols":      {"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", "bad_upstream_answer"},
		"an early answer, then it": {"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", "upstream_unreachable"},
	} {
		t.Run(name, func(t *testing.T) {
			set(tt.answer)
			res, body, err := p.try("/v1/chat/completions", `{"messages":[]}`)
			if tt.code == "" {
				if err == nil { // the header may not have left the proxy yet
					t.Errorf("got %s %q, want it cut", res.Status, body)
				}
				return
			}
			typ := "network_error"
			if tt.code == "upstream_broken" {
				typ = "streaming_error"
			}
			wantError(t, res, body, 502, typ, tt.code)
		})
	}
}

// TestOurCredentialsComeBackToNobody: an upstream that quotes the key tells neither the client nor the log.
func TestOurCredentialsComeBackToNobody(t *testing.T) {
	t.Parallel()
	const key = "sk-of+the/proxy="
	p, set := startRaw(t, map[string]string{"QWEN_API_KEY": key, "DEBUG_MODE": "true"})
	lines := 0
	openAI := `{"error":{"message":"wrong key KEY","type":"invalid_request_error","code":"x"}}`
	answer := func(status, header, body string) string {
		body = strings.ReplaceAll(body, "KEY", key)
		return fmt.Sprintf("HTTP/1.1 %s\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n%s", status, header, len(body), body)
	}
	for name, tt := range map[string]struct {
		answer string
		status int
	}{
		"an error":                        {answer("400 Bad Request", "", openAI), 400},
		"an error's type":                 {answer("400 Bad Request", "", `{"error":{"message":"m","type":"`+strings.Repeat("x", 50)+` KEY"}}`), 400},
		"an error's code":                 {answer("403 Forbidden", "", `{"error":{"message":"m","code":"KEY"}}`), 403},
		"an error with slashes escaped":   {answer("400 Bad Request", "", strings.ReplaceAll(openAI, "KEY", `sk-of+the\/proxy=`)), 400},
		"an error that is escaped":        {answer("400 Bad Request", "", strings.ReplaceAll(openAI, "KEY", `sk-of\u002bthe/proxy\u003d`)), 400},
		"an error that is escaped, twice": {answer("400 Bad Request", "", `{"error":{"message":"sk-of\u002bthe/proxy\u003d","message":"m"}}`), 400},
		"an error in gzip":                {answer("400 Bad Request", "Content-Encoding: gzip\r\n", gzipped(strings.ReplaceAll(openAI, "KEY", key))), 400},
		"a page":                          {answer("500 Oops", "", "<html>KEY"), 500},
		"a 401":                           {answer("401 Unauthorized", "", openAI), 401},
		"the reason behind a status":      {answer("400 wrong key KEY", "", strings.ReplaceAll(openAI, "KEY", "")), 400},
		"the request's id":                {answer("200 OK", "X-Request-Id: KEY\r\n", "{}"), 200},
		"the end of the request's id":     {answer("200 OK", "X-Request-Id: "+strings.Repeat("x", 120)+"KEY\r\n", "{}"), 200},
		"the request's id of an error":    {answer("400 Bad Request", "X-Request-Id: q-KEY\r\n", "<html>"), 400},
		"a header that passes":            {answer("200 OK", "X-Ratelimit-Reset-Tokens: KEY\r\n", "{}"), 200},
		"a header that is none":           {"HTTP/1.1 200 OK\r\nBearer KEY\r\n\r\n", 502},
		"a status line that is none":      {"HTTP/1.1 KEY\r\n\r\n", 502},
		"the length of a chunk of a body": {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nKEY\r\n", 502},
	} {
		set(strings.ReplaceAll(tt.answer, "KEY", key))
		res, body := p.post("/v1/chat/completions", `{"messages":[]}`)
		if res.StatusCode != tt.status {
			t.Errorf("%s: %s %s, want %d", name, res.Status, body, tt.status)
		}
		lines++
		p.stderr.await(t, fmt.Sprintf(`(?s)(?:"msg":"request".*){%d}`, lines))
		for where, s := range map[string]string{"client's header": fmt.Sprint(res.Header), "client's body": body, "log": p.stderr.String()} {
			for _, part := range []string{key, "sk-of", "the/pr", `the\/pr`} {
				if strings.Contains(s, part) {
					t.Fatalf("%s: the key is in the %s: %s", name, where, s)
				}
			}
		}
	}
}

// TestAnswersThatEndWithTheConnection: nobody but the answer itself can tell whether it is whole.
func TestAnswersThatEndWithTheConnection(t *testing.T) {
	t.Parallel()
	const chunk = "data: {\"choices\":[{\"delta\":{\"content\":\"[DONE]\"}}]}\n\n"
	p, set := startRaw(t, nil)
	long := `{"a":"` + strings.Repeat(`}]\\\"`, 20000) + `","b":[{}]`
	for _, tt := range []struct {
		name, path, contentType, body string
		code                          string // of an error in its place, or "cut", or "" where it is whole
	}{
		{"JSON", "chat/completions", "application/json", ` {"a":[1]} `, ""},
		{"JSON cut short", "chat/completions", "application/json", `{"a":[1]`, "upstream_broken"},
		{"JSON cut short in a string", "chat/completions", "application/json", `{"a":"}`, "upstream_broken"},
		{"JSON that does not parse", "chat/completions", "application/json", `{"a":}`, "upstream_broken"},
		{"HTML", "chat/completions", "text/html", "<html>", "bad_upstream_answer"},
		{"nothing", "chat/completions", "application/json", "", "upstream_broken"},
		{"JSON of an embedding cut short", "embeddings", "application/json", `{"a":[1]`, "upstream_broken"},
		{"JSON of a text completion cut short", "completions", "application/json", `{"choices":[`, "upstream_broken"},
		{"long JSON", "chat/completions", "application/json", long + "}\n", ""},
		{"long JSON cut short", "chat/completions", "application/json", long, "upstream_broken"},
		{"long JSON cut short in a string", "chat/completions", "application/json", long[:100000], "upstream_broken"},
		{"a stream", "chat/completions", "text/event-stream", chunk + "data: [DONE]\n\n", ""},
		{"a stream with CRLF", "chat/completions", "text/event-stream", "data: 1\r\n\r\ndata:[DONE]\r\n\r\n", ""},
		{"a stream without its last line end", "chat/completions", "text/event-stream", chunk + "data: [DONE]", ""},
		{"a stream without [DONE]", "chat/completions", "text/event-stream", chunk, "cut"},
		{"a stream cut within [DONE]", "chat/completions", "text/event-stream", chunk + "data: [DON", "cut"},
		{"a stream without anything", "chat/completions", "text/event-stream", "", "cut"},
		{"a stream of a text completion", "completions", "text/event-stream", chunk + "data: [DONE]\n\n", ""},
		{"a stream of a text completion without [DONE]", "completions", "text/event-stream", chunk, "cut"},
		{"a stream of responses", "responses", "text/event-stream", "event: response.completed\ndata: {}\n\n", ""},
		{"a stream of responses cut short", "responses", "text/event-stream", "event: response.created\ndata: {}\n\n", "cut"},
		{"a stream of messages", "messages", "text/event-stream", "event: message_stop\ndata: {}\n\n", ""},
		{"a stream of messages cut short", "messages", "text/event-stream", "event: message_start\ndata: {}\n\n", "cut"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, protocol := range []string{"1.0", "1.1"} {
				set("HTTP/" + protocol + " 200 OK\r\nContent-Type: " + tt.contentType + "\r\n\r\n" + tt.body)
				request := cmp.Or(map[string]string{"completions": `{"prompt":"x"}`, "embeddings": `{"input":"x"}`}[tt.path], `{"messages":[]}`)
				res, body, err := p.try("/v1/"+tt.path, request)
				switch failed := strings.Contains(body, `"error":{`); tt.code {
				case "":
					if err != nil || res.StatusCode != 200 || failed || tt.path != "completions" && body != tt.body {
						t.Errorf("HTTP/%s: %s, %v: %d bytes %.200q", protocol, res.Status, err, len(body), body)
					}
				case "cut":
					if err == nil || res.StatusCode != 200 || failed != (tt.contentType == "text/event-stream") {
						t.Errorf("HTTP/%s: %s, %v: %d bytes %.200q", protocol, res.Status, err, len(body), body)
					}
				case "upstream_broken":
					wantError(t, res, body, 502, "streaming_error", tt.code)
				default:
					wantError(t, res, body, 502, "network_error", tt.code)
				}
			}
		})
	}
}

// TestDataAfterDone: the stream is complete, whatever Qwen says after that.
func TestDataAfterDone(t *testing.T) {
	t.Parallel()
	const done = "data: [DONE]\n\n"
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		sse(w, `data: {"choices":[{"delta":{"content":"Hello"}}]}`+"\n\n", done, "data: took 1 s\n\n")
	}, nil)
	for path, request := range map[string]string{"chat/completions": `{"messages":[]}`, "completions": `{"prompt":"x"}`} {
		_, body, err := p.try("/v1/"+path, request)
		if err != nil || strings.Contains(body, "error") || !strings.HasSuffix(body, done+"data: took 1 s\n\n") {
			t.Errorf("%s: %q, %v", path, body, err)
		}
	}
}
