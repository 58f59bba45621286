package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestEveryByteOfQwenEndsItsSilence: a piece of an event counts too, which the translation of a text completion holds back.
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
		if n := strings.Count(string(body), ": keep-alive\n\n"); n != 18 { // three in every 50 s
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
	}, map[string]string{"UPSTREAM_TIMEOUT": "2m"})
	started := time.Now()
	res, body := p.post("/v1/chat/completions", `{"messages":[]}`)
	if took := time.Since(started); res.StatusCode != 200 || took > time.Minute {
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
		{"an error", "chat/completions", drip(429, "", `{"error":{"message":"x"`), 429, "upstream_error", maxWait},
		{"an error of a text completion", "completions", drip(500, "100000", `{"error":{"message":"x"`), 500, "upstream_error", maxWait},
		{"an answer", "chat/completions", drip(200, "", `{"a":1`), 200, "", maxWait},
		{"one that has not begun", "chat/completions", drip(200, "", " "), 200, "", maxWait},
		{"one that is none", "chat/completions", drip(200, "", "<html>"), 502, "bad_upstream_answer", maxWait},
		{"one to translate", "completions", drip(200, "", `{"a":1`), 504, "upstream_timeout", 7 * time.Minute},
	} {
		testInBubble(t, tt.name, func(t *testing.T) {
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
	res, body := p.send("POST", "/v1/chat/completions", header("Accept-Encoding", "gzip")) // else the client unpacks
	h := res.Header
	if res.StatusCode != 429 || body != packed || h.Get("Content-Encoding") != "gzip" || h.Get("Retry-After") != "7" || h.Get("Content-Type") != "application/json;charset=UTF-8" {
		t.Errorf("%s %v %q", res.Status, h, body)
	}
	p.stderr.await(t, `"status":429.*"error_type":"rate_limit_error"`)
}

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

func answerJSONPart(w http.ResponseWriter, s string) {
	w.Header().Set("Content-Type", "application/json")
	io.WriteString(w, s)
	http.NewResponseController(w).Flush()
}

// TestAnAnswerCutInItsMiddle: a short JSON answer gets a 502, and a stream an error event, also in the data of its last event.
func TestAnAnswerCutInItsMiddle(t *testing.T) {
	last := "event: response.completed\ndata: {\"response\":{\"output\":[{\"te"
	for _, tt := range []struct{ name, header, body, want string }{
		{"JSON of a length", "Content-Type: application/json\r\nContent-Length: 500", `{"a":1`, `"code":"upstream_broken"`},
		{"a stream in chunks", "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked", fmt.Sprintf("%x\r\n%s\r\n", len(last), last), "\n\ndata: {\"error\":"},
		{"a stream without a length", "Content-Type: text/event-stream\r\nConnection: close", last, "\n\ndata: {\"error\":"},
	} {
		testInBubble(t, tt.name, func(t *testing.T) {
			b := inBubble(t, nil, func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				conn, _, err := http.NewResponseController(w).Hijack()
				fatalIf(t, err)
				fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\n%s\r\n\r\n%s", tt.header, tt.body)
				conn.Close()
			})
			res := b.post(t, "/v1/responses", `{"stream":true,"input":"x"}`)
			body, err := io.ReadAll(res.Body)
			if !strings.Contains(string(body), tt.want) || (res.StatusCode == 502) != (err == nil) {
				t.Errorf("%s %q, %v; want %q in it", res.Status, body, err, tt.want)
			}
		})
	}
}
