package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestEveryByteOfQwenEndsItsSilence: what the translation of a text completion drops, such as thoughts, counts too.
func TestEveryByteOfQwenEndsItsSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := inBubble(t, map[string]string{"STREAM_IDLE_TIMEOUT": "1m", "SSE_KEEPALIVE": "15s"}, func(w http.ResponseWriter, r *http.Request) {
			for range 5 {
				sse(w, `data: {"choices":[{"delta":{"content":null,"reasoning_content":"hm"}}]}`+"\n\n")
				sleep(r.Context(), 50*time.Second)
			}
			sse(w, `data: {"choices":[{"delta":`)
			sleep(r.Context(), 50*time.Second)
			sse(w, `{"content":"Hello"}}]}`+"\n\n", "data: [DONE]\n\n")
		})
		res := b.post(t, "/v1/completions", `{"prompt":"x","stream":true}`)
		body, err := io.ReadAll(res.Body)
		if err != nil || !strings.Contains(string(body), `"text":"Hello"`) || !strings.HasSuffix(string(body), "data: [DONE]\n\n") {
			t.Errorf("%q, %v", body, err)
		}
		if n := strings.Count(string(body), ": keep-alive\n\n"); n < 19 { // one after every 15 s, but where the text comes
			t.Errorf("%d keep-alives in five minutes", n)
		}
	})
}

// TestA401IsNotReadToItsEnd: its status says all that the proxy has to know, and its body may never end.
func TestA401IsNotReadToItsEnd(t *testing.T) {
	t.Parallel()
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		switch {
		case strings.HasSuffix(r.URL.Path, "/oauth2/token"):
			answerJSON(w, 200, `{"access_token":"fresh","refresh_token":"r","token_type":"Bearer","expires_in":3600}`)
		case r.Header.Get("Authorization") == "Bearer fresh":
			answerJSON(w, 200, `{}`)
		default:
			w.WriteHeader(401)
			answerJSONPart(w, "{")
			<-r.Context().Done()
		}
	}, map[string]string{"UPSTREAM_TIMEOUT": "5s"})
	started := time.Now()
	res, body := p.post("/v1/chat/completions", `{"messages":[]}`)
	if took := time.Since(started); res.StatusCode != 200 || took > 2*time.Second {
		t.Errorf("%s %s after %v", res.Status, body, took)
	}
}

// TestASlowAnswerIsNotWaitedForWithoutEnd: an API that sends a byte each second is never silent.
func TestASlowAnswerIsNotWaitedForWithoutEnd(t *testing.T) {
	drip := func(status int, length, head string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Content-Type", "application/json")
			if length != "" {
				w.Header().Set("Content-Length", length)
			}
			w.WriteHeader(status)
			io.WriteString(w, head)
			for http.NewResponseController(w).Flush() == nil && sleep(r.Context(), time.Second) {
				io.WriteString(w, " ")
			}
		}
	}
	for _, tt := range []struct {
		name, path string
		api        http.HandlerFunc
		status     int
		code       string // of an error
		after      time.Duration
	}{
		{"an error", "chat/completions", drip(429, "", `{"error":{"message":"x"`), 429, "upstream_error", maxErrorTime},
		{"an error of a text completion", "completions", drip(500, "100000", `{"error":{"message":"x"`), 500, "upstream_error", maxErrorTime},
		{"an answer", "chat/completions", drip(200, "", `{"a":1`), 200, "", maxPeekTime},
		{"an answer of a known length", "chat/completions", drip(200, "100000", `{"a":1`), 200, "", maxPeekTime},
		{"one that has not begun", "chat/completions", drip(200, "", " "), 200, "", maxPeekTime},
		{"one that is none", "chat/completions", drip(200, "", "<html>"), 502, "bad_upstream_answer", maxPeekTime},
		{"one to translate", "completions", drip(200, "", `{"a":1`), 504, "upstream_timeout", 7 * time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := inBubble(t, map[string]string{"UPSTREAM_TIMEOUT": "2m", "STREAM_IDLE_TIMEOUT": "5m"}, tt.api)
				began := time.Now()
				request := `{"messages":[]}`
				if tt.path == "completions" {
					request = `{"prompt":"x"}`
				}
				res := b.post(t, "/v1/"+tt.path, request)
				if took := time.Since(began).Round(time.Second); took > tt.after || res.StatusCode != tt.status {
					t.Errorf("%s after %v, want %d after %v", res.Status, took, tt.status, tt.after)
				}
				if tt.code != "" {
					body, _ := io.ReadAll(res.Body)
					if !strings.Contains(string(body), `"code":"`+tt.code+`"`) {
						t.Errorf("%s, want code %s", body, tt.code)
					}
				} else if n, err := io.ReadAtLeast(res.Body, make([]byte, 100), 20); err != nil { // each piece passes as it comes
					t.Errorf("%d bytes, %v", n, err)
				}
				res.Body.Close()
			})
		})
	}
}

func TestACompressedErrorPassesAsItCame(t *testing.T) {
	packed := gzipped(`{"error":{"message":"no such model","type":"invalid_request_error"}}`)
	p := startWith(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json;charset=UTF-8")
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(429)
		io.WriteString(w, packed)
	}, nil)
	req, err := http.NewRequest("POST", p.url+"/v1/chat/completions", strings.NewReader(`{"messages":[]}`))
	if err != nil {
		t.Fatal(err)
	}
	res, err := (&http.Transport{DisableCompression: true}).RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	h := res.Header
	if err != nil || res.StatusCode != 429 || string(body) != packed || h.Get("Content-Encoding") != "gzip" || h.Get("Retry-After") != "7" || h.Get("Content-Type") != "application/json;charset=UTF-8" {
		t.Errorf("%s %v %q, %v", res.Status, h, body, err)
	}
	p.stderr.await(t, `"status":429.*"error_type":"rate_limit_error"`)
}

// gzipped returns s compressed.
func gzipped(s string) string {
	var b strings.Builder
	w := gzip.NewWriter(&b)
	io.WriteString(w, s)
	w.Close()
	return b.String()
}

// TestOurCredentialsComeBackToNobody: an upstream that quotes the key tells neither the client nor the log.
func TestOurCredentialsComeBackToNobody(t *testing.T) {
	t.Parallel()
	const key = "sk-of+the/proxy="
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
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := start(t, map[string]string{"API_BASE_URL": rawAPI(t, strings.ReplaceAll(tt.answer, "KEY", key)), "QWEN_API_KEY": key, "DEBUG_MODE": "true"})
			res, body := p.post("/v1/chat/completions", `{"messages":[]}`)
			if res.StatusCode != tt.status {
				t.Errorf("%s %s, want %d", res.Status, body, tt.status)
			}
			line := p.stderr.await(t, `(?m)^(.*"msg":"request".*)$`)
			for where, s := range map[string]string{"client's header": fmt.Sprint(res.Header), "client's body": body, "log": line} {
				for _, part := range []string{key, "sk-of", "the/pr", `the\/pr`} {
					if strings.Contains(s, part) {
						t.Errorf("the key is in the %s: %s", where, s)
					}
				}
			}
		})
	}
}

// TestAnswersThatEndWithTheConnection: nobody but the answer itself can tell whether it is whole.
func TestAnswersThatEndWithTheConnection(t *testing.T) {
	t.Parallel()
	const chunk = "data: {\"choices\":[{\"delta\":{\"content\":\"[DONE]\"}}]}\n\n"
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
		{"long JSON cut short", "chat/completions", "application/json", long, "cut"},
		{"long JSON cut short in a string", "chat/completions", "application/json", long[:100000], "cut"},
		{"a stream", "chat/completions", "text/event-stream", chunk + "data: [DONE]\n\n", ""},
		{"a stream with CRLF", "chat/completions", "text/event-stream", "data: 1\r\n\r\ndata:[DONE]\r\n\r\n", ""},
		{"a stream without its last line end", "chat/completions", "text/event-stream", chunk + "data: [DONE]", ""},
		{"a stream without [DONE]", "chat/completions", "text/event-stream", chunk, "cut"},
		{"a stream cut within [DONE]", "chat/completions", "text/event-stream", chunk + "data: [DON", "cut"},
		{"a stream without anything", "chat/completions", "text/event-stream", "", "cut"},
		{"a stream of a text completion", "completions", "text/event-stream", chunk + "data: [DONE]\n\n", ""},
		{"a stream of a text completion without [DONE]", "completions", "text/event-stream", chunk, "cut"},
		{"a stream of another kind", "responses", "text/event-stream", "event: response.completed\ndata: {}\n\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, protocol := range []string{"1.0", "1.1"} {
				p := start(t, map[string]string{"QWEN_API_KEY": "sk-test", "API_BASE_URL": rawAPI(t,
					"HTTP/"+protocol+" 200 OK\r\nContent-Type: "+tt.contentType+"\r\n\r\n"+tt.body)})
				request := map[string]string{"completions": `{"prompt":"x"}`, "embeddings": `{"input":"x"}`}[tt.path]
				if request == "" {
					request = `{"messages":[]}`
				}
				res, err := http.Post(p.url+"/v1/"+tt.path, "application/json", strings.NewReader(request))
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(res.Body)
				res.Body.Close()
				switch failed := strings.Contains(string(body), `{"error":`); tt.code {
				case "":
					if err != nil || res.StatusCode != 200 || failed || tt.path != "completions" && string(body) != tt.body {
						t.Errorf("HTTP/%s: %s, %v: %d bytes %.200q", protocol, res.Status, err, len(body), body)
					}
				case "cut":
					if err == nil || res.StatusCode != 200 || failed != (tt.contentType == "text/event-stream") {
						t.Errorf("HTTP/%s: %s, %v: %d bytes %.200q", protocol, res.Status, err, len(body), body)
					}
				case "upstream_broken":
					wantError(t, res, string(body), 502, typeStreaming, tt.code)
				default:
					wantError(t, res, string(body), 502, typeNetwork, tt.code)
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
		res, err := http.Post(p.url+"/v1/"+path, "application/json", strings.NewReader(request))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		res.Body.Close()
		if err != nil || strings.Contains(string(body), "error") || !strings.HasSuffix(string(body), done+"data: took 1 s\n\n") {
			t.Errorf("%s: %q, %v", path, body, err)
		}
	}
}

// FuzzJSONEnding: of JSON that parses, the end is seen at its last bracket and not before.
func FuzzJSONEnding(f *testing.F) {
	f.Add([]byte(`{"a":"}\\\"]","b":[{},[]]}`))
	f.Add([]byte("[\"\\\\\"]\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if trimmed := bytes.TrimSpace(text); !json.Valid(text) || trimmed[0] != '{' && trimmed[0] != '[' {
			return
		}
		var e jsonEnding
		for i := range text {
			e.follow(text[i : i+1])
			if want := json.Valid(text[:i+1]); e.seen() != want {
				t.Fatalf("%q: seen %v behind %q", text, e.seen(), text[:i+1])
			}
		}
	})
}
