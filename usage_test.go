package main

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// figures returns what u has of each kind; – is not known.
func (u *tokenUsage) figures() string {
	var texts []string
	for i, n := range u.tokens {
		text := "–"
		if u.known[i] {
			text = fmt.Sprint(n)
		}
		texts = append(texts, text)
	}
	return strings.Join(texts, " ")
}

// Answers as the APIs give them, with their input, output and cached tokens.
var usageAnswers = map[string]struct{ answer, want string }{
	"chat of OpenAI": {`{"id":"chatcmpl-1","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"Hello"},"finish_reason":"stop"}],` +
		`"usage":{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":7,"audio_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}},"service_tier":"default"}`,
		"19 10 7"},
	"chat of OpenAI, indented": {"{\n  \"choices\": [],\n  \"usage\": {\n    \"prompt_tokens\": 19,\n    \"completion_tokens\": 10\n  }\n}", "19 10 –"},
	"chat of DashScope": {`{"choices":[{"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop","index":0,"logprobs":null}],"object":"chat.completion",` +
		`"usage":{"prompt_tokens":3019,"completion_tokens":104,"total_tokens":3123,"prompt_tokens_details":{"cached_tokens":2048}},"created":1735120033,"system_fingerprint":null,"model":"qwen-plus","id":"chatcmpl-6ada9ed2"}`,
		"3019 104 2048"},
	"stream of DashScope": {`data: {"choices":[{"delta":{"content":"","role":"assistant"},"index":0,"logprobs":null,"finish_reason":null}],"object":"chat.completion.chunk","usage":null,"created":1,"model":"qwen-plus","id":"c"}` + "\n\n" +
		`data: {"choices":[{"finish_reason":null,"delta":{"content":"\"usage\":{\"prompt_tokens\":999999}"},"index":0}],"object":"chat.completion.chunk","usage":null}` + "\n\n" +
		`data: {"choices":[],"object":"chat.completion.chunk","usage":{"prompt_tokens":22,"completion_tokens":17,"total_tokens":39,"prompt_tokens_details":{"cached_tokens":0}},"created":1}` + "\n\ndata: [DONE]\n\n",
		"22 17 0"},
	"stream without usage": {`data: {"choices":[{"delta":{"content":"a"}}]}` + "\n\ndata: [DONE]\n\n", "– – –"},
	"stream whose usage grows": {`data: {"usage":{"prompt_tokens":5,"completion_tokens":1}}` + "\n\n" + `data: {"usage":{"prompt_tokens":5,"completion_tokens":2}}` + "\n\n",
		"5 2 –"},
	"embeddings of DashScope": {`{"data":[{"embedding":[0.0023,-0.0093],"index":0,"object":"embedding"}],"model":"text-embedding-v4","object":"list","usage":{"prompt_tokens":26,"total_tokens":26},"id":"f62c2ae7"}`,
		"26 – –"},
	"stream of the responses API": {"event: response.created\ndata: {\"type\":\"response.created\",\"response\":{\"id\":\"r\",\"usage\":null}}\n\n" +
		"event: response.completed\ndata: {\"type\":\"response.completed\",\"response\":{\"usage\":{\"input_tokens\":37,\"input_tokens_details\":{\"cached_tokens\":4},\"output_tokens\":11,\"output_tokens_details\":{\"reasoning_tokens\":0},\"total_tokens\":48},\"user\":null}}\n\n",
		"37 11 4"},
	"message of Anthropic": {`{"id":"msg_1","type":"message","content":[{"type":"text","text":"Hi"}],"stop_reason":"end_turn","usage":{"input_tokens":12,"cache_creation_input_tokens":0,"cache_read_input_tokens":5,"output_tokens":6,"service_tier":"standard"}}`,
		"12 6 5"},
	"stream of Anthropic through DashScope": {"event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"msg_1\",\"usage\":{\"input_tokens\":25,\"cache_read_input_tokens\":8,\"output_tokens\":1}}}\n\n" +
		"event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"Hello \\\\\\\"usage\\\":{\"}}\n\n" +
		"event: message_delta\ndata: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"},\"usage\":{\"output_tokens\":15}}\n\nevent: message_stop\ndata: {\"type\":\"message_stop\"}\n\n",
		"25 15 8"},
	"strings with brackets and quotes": {`{"usage":{"plan":"}]\"\\","x_details":[{"y":"{"}],"prompt_tokens":4,"completion_tokens":3},"usage_2":{"prompt_tokens":9}}`, "4 3 –"},
	"wrong types, negative figures":    {`{"usage":{"prompt_tokens":"many","completion_tokens":-3,"prompt_tokens_details":[]}}`, "– – –"},
	"impossible figures":               {`{"usage":{"prompt_tokens":9223372036854775807,"completion_tokens":1.5,"cache_read_input_tokens":3}}`, "– – 3"},
	"no object":                        {`{"usage":[],"usage":"x","usage":1}`, "– – –"},
	"an object without end":            {`{"usage":{"prompt_tokens":1`, "– – –"},
	"an object that is too large":      {`{"usage":{"x":"` + strings.Repeat("x", maxUsage) + `"}} {"usage":{"prompt_tokens":2}}`, "2 – –"},
	"half a mark before a mark":        {`"usa"usage":{"prompt_tokens":1}`, "1 – –"},
}

func TestUsageOfAnswers(t *testing.T) {
	for name, tt := range usageAnswers {
		t.Run(name, func(t *testing.T) {
			for split := range len(tt.answer) + 1 {
				var u tokenUsage
				u.look([]byte(tt.answer[:split]))
				u.look([]byte(tt.answer[split:]))
				if diff := cmp.Diff(tt.want, u.figures()); diff != "" {
					t.Fatalf("split at byte %d: (-want +got):\n%s", split, diff)
				}
			}
			var u tokenUsage
			for i := range len(tt.answer) {
				u.look([]byte(tt.answer[i : i+1]))
			}
			if diff := cmp.Diff(tt.want, u.figures()); diff != "" {
				t.Errorf("byte by byte: (-want +got):\n%s", diff)
			}
		})
	}
}

// startUsage runs the proxy with two keys in front of an API that answers with answer, whatever it is asked.
func startUsage(t *testing.T, answer func(w http.ResponseWriter)) *program {
	keys := filepath.Join(t.TempDir(), "keys")
	fatalIf(t, os.WriteFile(keys, []byte("sk-a alice\nsk-b\n"), 0o600))
	return startWith(t, func(w http.ResponseWriter, r *http.Request) { answer(w) }, map[string]string{
		"QWEN_API_KEY": "sk-test", "PROXY_API_KEYS_FILE": keys, "MODEL_ALIASES": "gpt-4o=qwen3.7-plus"})
}

// spend posts body to path with a key, and returns the answer and the access line.
func (p *program) spend(key, path, body string) (answer string, line map[string]any) {
	p.t.Helper()
	id := rand.Text()
	req, err := http.NewRequest("POST", p.url+path, strings.NewReader(body))
	fatalIf(p.t, err)
	req.Header.Set("X-Api-Key", key)
	req.Header.Set("X-Request-ID", id)
	res, err := http.DefaultClient.Do(req)
	fatalIf(p.t, err)
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body) // some break off
	fatalIf(p.t, json.Unmarshal([]byte(p.stderr.await(p.t, `(?m)^(.*"msg":"request".*`+id+`.*)$`)), &line))
	return string(b), line
}

// tokens returns the samples of qwen_proxy_tokens_total that are not zero, and the tokens of /health/detailed.
func (p *program) tokens() (samples map[string]float64, health map[string]float64) {
	p.t.Helper()
	_, text := p.send("GET", "/metrics", header("X-Api-Key", "sk-a"))
	page, err := parsePage(text)
	fatalIf(p.t, err)
	samples = page.of("qwen_proxy_tokens_total")
	maps.DeleteFunc(samples, func(_ string, n float64) bool { return n == 0 })
	var detailed struct{ Tokens map[string]float64 }
	_, text = p.send("GET", "/health/detailed", header("X-Api-Key", "sk-a"))
	fatalIf(p.t, json.Unmarshal([]byte(text), &detailed))
	return samples, detailed.Tokens
}

// TestUsageOfEachEndpoint: the answer passes as it is, and the access line, the metric and /health/detailed have its tokens.
func TestUsageOfEachEndpoint(t *testing.T) {
	answer := ""
	p := startUsage(t, func(w http.ResponseWriter) {
		if strings.HasPrefix(answer, "{") {
			answerJSON(w, http.StatusOK, answer)
			return
		}
		half := len(answer) / 2
		sse(w, answer[:half], answer[half:])
	})
	want := map[string]float64{}
	for _, tt := range []struct{ key, path, body, answer, model, name string }{
		{"sk-a", "/v1/chat/completions", `{"messages":[]}`, "chat of DashScope", "qwen3-coder-plus", "alice"},
		{"sk-b", "/v1/chat/completions", `{"model":"gpt-4o","messages":[],"stream":true}`, "stream of DashScope", "qwen3.7-plus", "key-18519d"},
		{"sk-a", "/v1/completions", `{"model":"a\u002db","prompt":"x"}`, "chat of OpenAI", "a-b", "alice"},
		{"sk-a", "/v1/completions", `{"model":"a-b","prompt":"x","stream":true}`, "stream of DashScope", "a-b", "alice"},
		{"sk-a", "/v1/embeddings", `{"model":"text-embedding-v4","input":"x"}`, "embeddings of DashScope", "text-embedding-v4", "alice"},
		{"sk-b", "/v1/responses", `{"model":"r","input":"x","stream":true}`, "stream of the responses API", "r", "key-18519d"},
		{"sk-a", "/v1/messages", `{"model":"m","messages":[]}`, "message of Anthropic", "m", "alice"},
		{"sk-a", "/v1/messages", `{"model":"m","messages":[],"stream":true}`, "stream of Anthropic through DashScope", "m", "alice"},
		{"sk-a", "/v1/chat/completions", `{"model":"quiet","messages":[],"stream":true}`, "stream without usage", "quiet", "alice"},
	} {
		answer = usageAnswers[tt.answer].answer
		got, line := p.spend(tt.key, tt.path, tt.body)
		if got != answer && tt.path != "/v1/completions" {
			t.Errorf("%s: %s is not what the client gets: %s", tt.path, tt.answer, got)
		}
		wantLine := map[string]any{"key": tt.name, "model": tt.model, "stream": strings.Contains(tt.body, `"stream":true`)}
		for i, figure := range strings.Fields(usageAnswers[tt.answer].want) {
			n, err := strconv.ParseFloat(figure, 64)
			if err != nil {
				continue // not known
			}
			wantLine[tokenKinds[i]+"_tokens"] = n
			if n > 0 {
				want[fmt.Sprintf(`{model="%s",key="%s",kind="%s"}`, tt.model, tt.name, tokenKinds[i])] += n
			}
		}
		maps.DeleteFunc(line, func(name string, _ any) bool {
			return name != "key" && name != "model" && name != "stream" && !strings.HasSuffix(name, "_tokens")
		})
		wantEqual(t, tt.path+", access line", wantLine, line)
	}
	samples, health := p.tokens()
	wantEqual(t, "metric", want, samples)
	sums := map[string]float64{}
	for series, n := range want {
		for _, kind := range tokenKinds {
			if strings.Contains(series, `kind="`+kind) {
				sums[kind] += n
			}
		}
	}
	wantEqual(t, "/health/detailed", sums, health)
}

// TestUsageThatDoesNotCount: of errors and compressed answers nothing counts, of a stream that is cut what had come before.
func TestUsageThatDoesNotCount(t *testing.T) {
	status, cut, encoding := 200, false, ""
	p := startUsage(t, func(w http.ResponseWriter) {
		if cut {
			sse(w, `data: {"message":{"usage":{"input_tokens":25,"output_tokens":1}}}`+"\n\n", `data: {"usage":{"output_tok`)
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("Content-Encoding", encoding)
		answerJSON(w, status, `{"error":{"message":"no"},"usage":{"prompt_tokens":7}}`)
	})
	const body = `{"model":"m","messages":[]}`
	status = 400
	p.spend("sk-a", "/v1/chat/completions", body)
	status, encoding = 200, "br"
	p.spend("sk-a", "/v1/chat/completions", body)
	samples, _ := p.tokens()
	wantEqual(t, "metric", map[string]float64{}, samples)
	cut = true
	if _, line := p.spend("sk-a", "/v1/messages", body); line["input_tokens"] != 25.0 || line["output_tokens"] != 1.0 || line["error"] == nil {
		t.Errorf("access line of the cut stream: %v", line)
	}
	samples, _ = p.tokens()
	wantEqual(t, "metric", map[string]float64{`{model="m",key="alice",kind="input"}`: 25, `{model="m",key="alice",kind="output"}`: 1}, samples)
}

func TestTokenSeriesAreBounded(t *testing.T) {
	m := newMetrics()
	spend := func(model, key string) {
		m.countTokens(&exchange{record: record{model: model, key: key, usage: tokenUsage{tokens: [3]int64{1, 0, 0}, known: [3]bool{true, false, false}}}})
	}
	m.countTokens(&exchange{record: record{model: "reports nothing"}})
	for i := range 2 * maxModelSeries {
		spend(fmt.Sprint("model ", i), "alice")
	}
	spend("model 1", "bob")
	spend("\x1b\"\\\n", "bob")
	var p page
	p.counts(m)
	got, err := parsePage(p.String())
	fatalIf(t, err)
	samples := got.of("qwen_proxy_tokens_total")
	if n := len(samples); n != 3*(maxModelSeries+3) {
		t.Errorf("%d samples", n)
	}
	for series, want := range map[string]float64{`{model="other",key="alice",kind="input"}`: maxModelSeries, `{model="other",key="bob",kind="input"}`: 1, `{model="model 1",key="bob",kind="input"}`: 1} {
		if samples[series] != want {
			t.Errorf("%s is %v, want %v", series, samples[series], want)
		}
	}
	spend("model 1", "a\"b\\c\x1bé") // with what the format escapes, and what it has no escape for
	p = page{}
	p.counts(m)
	got, err = parsePage(p.String())
	fatalIf(t, err)
	if got["qwen_proxy_tokens_total{model=\"model 1\",key=\"a\\\"b\\\\c?é\",kind=\"input\"}"] != 1 {
		t.Errorf("a name with quotes and control characters:\n%s", &p)
	}
}

// FuzzUsage: how an answer is cut into pieces makes no difference, and what a model writes is never counted.
func FuzzUsage(f *testing.F) {
	for _, tt := range usageAnswers {
		f.Add([]byte(tt.answer), 7, "x")
	}
	f.Fuzz(func(t *testing.T, answer []byte, size int, text string) {
		var whole, pieces tokenUsage
		whole.look(answer)
		for piece := range slices.Chunk(answer, max(1, size&0xff)) {
			pieces.look(piece)
			if len(pieces.rest) > maxUsage {
				t.Fatalf("%d bytes are kept", len(pieces.rest))
			}
		}
		if diff := cmp.Diff(whole.figures(), pieces.figures()); diff != "" {
			t.Errorf("in one piece and in many:\n%s", diff)
		}
		chunk, err := json.Marshal(map[string]any{"choices": []any{map[string]any{"delta": map[string]any{"content": text}}}})
		if err != nil {
			t.Fatal(err)
		}
		var said tokenUsage
		said.look(chunk)
		if got := said.figures(); got != "– – –" {
			t.Errorf("the text %q counts as %s", text, got)
		}
	})
}

func BenchmarkUsage(b *testing.B) {
	event := []byte(`data: {"choices":[{"delta":{"content":" word"},"index":0,"logprobs":null,"finish_reason":null}],"object":"chat.completion.chunk","usage":null,"created":1735120033,"model":"qwen-plus","id":"chatcmpl-6ada9ed2"}` + "\n\n")
	b.ReportAllocs()
	var u tokenUsage
	for b.Loop() {
		u.look(event)
	}
}
