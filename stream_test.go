package main

import (
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
