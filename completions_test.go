package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
)

// translateRequest returns what promptToChat makes of a body.
func translateRequest(data []byte) (chat []byte, err error) {
	body := &requestBody{buffer: buffer{data: bytes.Clone(data)}}
	if err = promptToChat(body); err != nil {
		return nil, err
	}
	return body.data, nil
}

// blanks matches what is left in the place of a parameter.
var blanks = regexp.MustCompile("  +")

func TestPromptToChat(t *testing.T) {
	for _, tt := range []struct{ name, body, want string }{
		{"a prompt becomes the user's message", `{"model":"m","prompt":"Say hi"}`,
			`{"model":"m","messages":[{"role":"user","content":"Say hi"}]}`},
		{"a prompt alone", `{"prompt":""}`,
			`{"messages":[{"role":"user","content":""}]}`},
		{"an array of one string", ` { "prompt" : [ "a\nb" ] } `,
			` { "messages":[{"role":"user","content":"a\nb"}] } `},
		{"other members keep order, bytes and case", `{"top_k":20,"prompt":"p","seed":12345678901234567890,"temperature":0.10,"stop":[ "<a>", "&" ],"Prompt":1,"n":2,"stream":true,"stream_options":{"include_usage":true},"logit_bias":{"50256": -100},"a<b":1E400}`,
			`{"top_k":20,"messages":[{"role":"user","content":"p"}],"seed":12345678901234567890,"temperature":0.10,"stop":[ "<a>", "&" ],"Prompt":1,"n":2,"stream":true,"stream_options":{"include_usage":true},"logit_bias":{"50256": -100},"a<b":1E400}`},
		{"parameters that ask for nothing are dropped", `{"suffix":null,"best_of":1,"logprobs":null,"echo":false,"prompt":"p"}`,
			`{"messages":[{"role":"user","content":"p"}]}`},
		{"their other spellings are too", `{"suffix":"","best_of":null,"logprobs":false,"echo":null,"prompt":"p","stream":null}`,
			`{"messages":[{"role":"user","content":"p"}],"stream":null}`},
		{"invalid UTF-8, escapes and lone surrogates pass", "{\"pro\\u006Dpt\":[\"a <b> \xff\\ud800\"], \"\xff\":1}",
			"{\"messages\":[{\"role\":\"user\",\"content\":\"a <b> \xff\\ud800\"}], \"\xff\":1}"},
		{"parameters are dropped from the end", `{ "n": 1 , "prompt":"p" , "echo":null, "suffix":null }`,
			`{ "n": 1 , "messages":[{"role":"user","content":"p"}]}`},
		{"and from between others", `{"echo":null,"n":1,"prompt":"p","suffix":null,"seed":2}`,
			`{"n":1,"messages":[{"role":"user","content":"p"}],"seed":2}`},
		{"a model of the wrong type is for the chat request's check", `{"model":5,"prompt":"p"}`,
			`{"model":5,"messages":[{"role":"user","content":"p"}]}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			chat, err := translateRequest([]byte(tt.body))
			fatalIf(t, err)
			wantEqual(t, "chat request", tt.want, blanks.ReplaceAllString(string(chat), ""))
		})
	}
}

func TestPromptToChatErrors(t *testing.T) {
	tests := []struct {
		body    string
		param   string
		message string // a part of it
	}{
		{``, "", "can't be read"},
		{`{`, "", "can't be read"},
		{`[]`, "", "want a JSON object"},
		{`{"prompt":"a","p\u0072ompt":"b"}`, "prompt", "twice"},
		{`{"prompt":"a","echo":null,"echo":null}`, "echo", "twice"},
		{`{"prompt":["a",]}`, "prompt", "exactly one string"},
		{`{}`, "prompt", "exactly one string"},
		{`{"Prompt":"p"}`, "prompt", "exactly one string"},
		{`{"prompt":null}`, "prompt", "exactly one string"},
		{`{"prompt":[null]}`, "prompt", "exactly one string"},
		{`{"prompt":["a","b"]}`, "prompt", "exactly one string"},
		{`{"prompt":[1,2]}`, "prompt", "token arrays are not supported"},
		{`{"prompt":[[1,2]]}`, "prompt", "token arrays are not supported"},
		{`{"prompt":5}`, "prompt", "exactly one string"},
		{`{"prompt":{}}`, "prompt", "exactly one string"},
		{`{"prompt":"p","suffix":"s"}`, "suffix", "Leave it out"},
		{`{"prompt":"p","best_of":2}`, "best_of", "Leave it out"},
		{`{"prompt":"p","best_of":"1"}`, "best_of", "Leave it out"},
		{`{"prompt":"p","logprobs":0}`, "logprobs", "Leave it out"},
		{`{"prompt":"p","logprobs":true}`, "logprobs", "Leave it out"},
		{`{"prompt":"p","echo":true}`, "echo", "Leave it out"},
		{`{"prompt":"p","messages":[]}`, "messages", "/v1/chat/completions"},
		{`{"model":"m","messages":[{"role":"user","content":"hi"}]}`, "messages", "/v1/chat/completions"},
	}
	for _, tt := range tests {
		t.Run(tt.body[:min(len(tt.body), 60)], func(t *testing.T) {
			_, err := translateRequest([]byte(tt.body))
			e, ok := errors.AsType[*apiError](err)
			if !ok {
				t.Fatalf("error is %v, want an apiError", err)
			}
			if e.status != 400 || e.param != tt.param || !strings.Contains(e.message, tt.message) {
				t.Errorf("got %d, param %q, message %q; want 400, param %q, message with %q",
					e.status, e.param, e.message, tt.param, tt.message)
			}
		})
	}
}

// translateAnswer returns what translate makes of a whole answer.
func translateAnswer(chat string) ([]byte, error) {
	text, err := translate([]byte(chat), "message")
	if err != nil {
		return nil, err
	}
	return bytes.Join(text, nil), nil
}

func TestCompletionResponse(t *testing.T) {
	for _, tt := range []struct{ name, chat, want string }{
		{"an answer of Qwen's", `{"choices":[{"message":{"role":"assistant","content":"a <b>","reasoning_content":"hm"},"finish_reason":"stop","index":0,"logprobs":null}],"object":"chat.completion","usage":{"prompt_tokens":3,"total_tokens":12345678901234567890,"x":"<"},"created":1735120033,"system_fingerprint":null,"model":"qwen3-coder-plus","id":"chatcmpl-6ada9ed2"}`,
			`{"id":"chatcmpl-6ada9ed2","object":"text_completion","created":1735120033,"model":"qwen3-coder-plus","choices":[{"text":"a <b>","index":0,"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"total_tokens":12345678901234567890,"x":"<"}}`},
		{"tool calls", `{"id":"x-1","created":1,"model":"m","system_fingerprint":"fp","choices":[{"index":0,"message":{"content":"a"},"finish_reason":"length"},{"index":1,"message":{"content":null},"finish_reason":"tool_calls"},{"index":2,"message":{},"finish_reason":"function_call"}]}`,
			`{"id":"x-1","object":"text_completion","created":1,"model":"m","choices":[{"text":"a","index":0,"logprobs":null,"finish_reason":"length"},{"text":"","index":1,"logprobs":null,"finish_reason":"tool_calls"},{"text":"","index":2,"logprobs":null,"finish_reason":"function_call"}],"usage":null}`},
		{"as little as can be", `{"choices":[{"message":{"content":"a"}}],"usage":null}`,
			`{"id":"","object":"text_completion","created":0,"model":"","choices":[{"text":"a","index":0,"logprobs":null,"finish_reason":null}],"usage":null}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := translateAnswer(tt.chat)
			fatalIf(t, err)
			wantEqual(t, "text completion", tt.want, string(got))
		})
	}
}

func TestCompletionResponseErrors(t *testing.T) {
	for _, chat := range []string{
		``, `<html>secret`, `null`, `[]`, `{}`, `"secret"`,
		`{"error":{"message":"secret"}}`,
		`{"choices":"secret"}`,
		`{"choices":[{"delta":{"content":"secret"}}]}`,
		`{"choices":[{"message":{"content":["secret"]}}]}`,
		`{"choices":[{"message":{"content":"a"}}]}secret`,
		`{"choices":[{"message":{"content":"secret"},}]}`,
		`{"choices":[{"message":{"content":"secret"},"message":{"content":"a"}}]}`,
	} {
		got, err := translateAnswer(chat)
		if err == nil {
			t.Errorf("translate(%s) = %s, want an error", chat, got)
		} else if s := err.Error(); strings.Contains(s, "secret") || strings.Contains(s, "314") {
			t.Errorf("translate(%s): the error %q quotes the answer", chat, s)
		}
	}
}

func newStream(chat io.Reader) io.Reader { return &completionStream{lines: bufio.NewReader(chat)} }

// textChunk returns the event of a text completion chunk: the head that streamTests share, then rest.
func textChunk(rest string) string {
	if !strings.Contains(rest, `"usage":`) {
		rest += `,"usage":null`
	}
	return `data: {"id":"chatcmpl-1","object":"text_completion","created":1,"model":"m",` + rest + "}\n\n"
}

// streamTests are whole streams; err is what ends them, nil for io.EOF.
var streamTests = []struct {
	name string
	in   string
	want string
	err  string
}{
	{
		name: "empty",
	},
	{
		name: "a stream of Qwen's",
		in: `data: {"choices":[{"delta":{"content":"","role":"assistant"},"index":0,"logprobs":null,"finish_reason":null}],"object":"chat.completion.chunk","usage":null,"created":1,"system_fingerprint":null,"model":"m","id":"chatcmpl-1"}

data: {"choices":[{"finish_reason":null,"delta":{"content":null,"reasoning_content":"hm"},"index":0}],"object":"chat.completion.chunk","usage":null,"created":1,"system_fingerprint":null,"model":"m","id":"chatcmpl-1"}

data: {"choices":[{"finish_reason":null,"delta":{"content":"a <b>"},"index":0}],"object":"chat.completion.chunk","usage":null,"created":1,"system_fingerprint":null,"model":"m","id":"chatcmpl-1"}

data: {"choices":[{"finish_reason":"stop","delta":{"content":""},"index":0}],"object":"chat.completion.chunk","usage":null,"created":1,"system_fingerprint":null,"model":"m","id":"chatcmpl-1"}

data: {"choices":[],"object":"chat.completion.chunk","usage":{"prompt_tokens":1},"created":1,"system_fingerprint":null,"model":"m","id":"chatcmpl-1"}

data: [DONE]

`,
		want: textChunk(`"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":null}]`) +
			textChunk(`"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":null}]`) +
			textChunk(`"choices":[{"text":"a <b>","index":0,"logprobs":null,"finish_reason":null}],"usage":null`) +
			textChunk(`"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":"stop"}],"usage":null`) +
			textChunk(`"choices":[],"usage":{"prompt_tokens":1}`) +
			"data: [DONE]\n\n",
	},
	{
		name: "several choices",
		in: `data: {"id":"chatcmpl-1","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"a"}},{"index":1,"delta":{"content":""}}]}

data: {"id":"chatcmpl-1","created":1,"model":"m","choices":[{"index":1,"delta":{"content":"c"}}]}

data: {"id":"chatcmpl-1","created":1,"model":"m","choices":[{"index":1,"delta":{},"finish_reason":"length"}]}

`,
		want: textChunk(`"choices":[{"text":"a","index":0,"logprobs":null,"finish_reason":null},{"text":"","index":1,"logprobs":null,"finish_reason":null}]`) +
			textChunk(`"choices":[{"text":"c","index":1,"logprobs":null,"finish_reason":null}]`) +
			textChunk(`"choices":[{"text":"","index":1,"logprobs":null,"finish_reason":"length"}]`),
	},
	{
		name: "usage",
		in: `data: {"id":"chatcmpl-1","created":1,"model":"m","choices":[{"delta":{"role":"assistant"}}],"usage":{"a":1}}

data: {"id":"chatcmpl-1","created":1,"model":"m","choices":[{"delta":{"content":"a"}}],"usage":{"a":2}}

data: {"id":"chatcmpl-1","created":1,"model":"m","choices":[],"usage":{"a":3}}

`,
		want: textChunk(`"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":null}],"usage":{"a":1}`) +
			textChunk(`"choices":[{"text":"a","index":0,"logprobs":null,"finish_reason":null}],"usage":{"a":2}`) +
			textChunk(`"choices":[],"usage":{"a":3}`),
	},
	{
		name: "line ends, no space, data in several lines",
		in: "data:{\"id\":\"chatcmpl-1\",\ndata:\"created\":1,\"model\":\"m\",\r\ndata: \"choices\":[{\"delta\":{\"content\":\"\\r\\n\"}}],\ndata:\"usage\":{\ndata:}\ndata: }\n\r\n" +
			"data: [DONE]\r\n\r\n" + ": one\n\n" + ":two\r\n\n" + ":three\n\r\n" + "\r\n\n",
		want: textChunk(`"choices":[{"text":"\r\n","index":0,"logprobs":null,"finish_reason":null}],"usage":{ }`) +
			"data: [DONE]\r\n\r\n" + ": one\n\n" + ":two\r\n\n" + ":three\n\r\n" + "\r\n\n",
	},
	{
		name: "comments and other fields",
		in: ": keep-alive\n\n" +
			"retry: 3000\n\n" +
			"id: 1\nevent: result\n:c\ndata: {\"id\":\"chatcmpl-1\",\"created\":1,\"model\":\"m\",\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n" +
			"data:\n\n" +
			"id: 4\ndata: [DONE] \n\n",
		want: ": keep-alive\n\n" +
			"retry: 3000\n\n" +
			"id: 1\nevent: result\n:c\n" + textChunk(`"choices":[{"text":"a","index":0,"logprobs":null,"finish_reason":null}]`) +
			"data:\n\n" +
			"id: 4\ndata: [DONE] \n\n",
	},
	{
		name: "an error passes unchanged",
		in:   "event: error\ndata:{\"error\": {\"message\":\"<\"},\n:c\ndata: \"id\":5}\n\ndata: [DONE]\n\n",
		want: "event: error\ndata:{\"error\": {\"message\":\"<\"},\n:c\ndata: \"id\":5}\n\ndata: [DONE]\n\n",
	},
	{
		name: "data that isn't JSON ends the stream",
		in:   ": c\n\ndata: <html>secret\n\ndata: [DONE]\n\n",
		want: ": c\n\n",
		err:  "the stream has data that is not a chat completion chunk",
	},
	{
		name: "so does JSON that isn't a chunk",
		in:   ": c\n\ndata: {\"code\":\"secret\",\"choices\":null,\"usage\":null}\n\ndata: [DONE]\n\n",
		want: ": c\n\n",
		err:  "the stream has data that is not a chat completion chunk",
	},
	{
		name: "and a chunk of the wrong types",
		in:   `data: {"id":"","choices":[{"delta":{"content":["secret"]}}]}` + "\n\n",
		err:  "the stream has data that is not a chat completion chunk",
	},
	{
		name: "data after [DONE] passes, translated where it is a chunk",
		in: "data: [DONE]\n\ndata: x\n\ndata: {\"trace\":1}\n\ndata: [DONE]\n\n" +
			`data: {"id":"chatcmpl-1","created":1,"model":"m","choices":[],"usage":{"a":1}}` + "\n\n",
		want: "data: [DONE]\n\ndata: x\n\ndata: {\"trace\":1}\n\ndata: [DONE]\n\n" + textChunk(`"choices":[],"usage":{"a":1}`),
	},
	{
		name: "the last event without its blank line",
		in:   ": c\n\ndata: [DONE]\n",
		want: ": c\n\ndata: [DONE]\n\n",
	},
	{
		name: "the last line without its end",
		in:   ": c\r\n\r\ndata: [DONE]",
		want: ": c\r\n\r\ndata: [DONE]\n\n",
	},
}

func TestCompletionStream(t *testing.T) {
	for _, tt := range streamTests {
		t.Run(tt.name, func(t *testing.T) {
			check := func(how string, r io.Reader) {
				t.Helper()
				got, err := io.ReadAll(newStream(r))
				if diff := cmp.Diff(tt.want, string(got)); diff != "" {
					t.Fatalf("%s: stream (-want +got):\n%s", how, diff)
				}
				if got := errorText(err); got != tt.err {
					t.Fatalf("%s: error %q, want %q", how, got, tt.err)
				}
			}
			check("whole", strings.NewReader(tt.in))
			check("bytewise", iotest.OneByteReader(strings.NewReader(tt.in)))
			check("error beside data", iotest.DataErrReader(strings.NewReader(tt.in)))
			for i := range tt.in {
				check("split", splitReader(tt.in, i))
			}
			if tt.err == "" {
				if err := iotest.TestReader(newStream(strings.NewReader(tt.in)), []byte(tt.want)); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// splitReader returns a reader of s that takes two reads, the first up to i.
func splitReader(s string, i int) io.Reader {
	return io.MultiReader(strings.NewReader(s[:i]), strings.NewReader(s[i:]))
}

// errorText returns what err says, "" for nil.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestCompletionStreamWaitsForOneEventAlone(t *testing.T) {
	for _, end := range []string{"\n\n", "\r\n\r\n", "\n\r\n", "\r\n\n"} {
		synctest.Test(t, func(t *testing.T) {
			upstream, w := io.Pipe()
			stream := newStream(upstream)
			var got strings.Builder
			done := make(chan error)
			go func() {
				_, err := io.Copy(&got, stream)
				done <- err
			}()
			write := func(s, want string) {
				t.Helper()
				if _, err := io.WriteString(w, s); err != nil {
					t.Error(err)
				}
				synctest.Wait() // the reader waits for more
				wantEqual(t, fmt.Sprintf("after an event that ends in %q", end), want, got.String())
				got.Reset()
			}
			event := `data: {"id":"chatcmpl-1","created":1,"model":"m","choices":[{"delta":{"content":"a"}}]}`
			want := textChunk(`"choices":[{"text":"a","index":0,"logprobs":null,"finish_reason":null}]`)
			write(event+end, want)
			write(event[:30], "")
			write(event[30:]+end, want)
			write(": keep-alive"+end, ": keep-alive"+end)
			if err := errors.Join(w.Close(), <-done); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestCompletionStreamUpstreamError(t *testing.T) {
	broken := errors.New("connection reset")
	for _, rest := range []string{"", "data: half"} {
		r := newStream(io.MultiReader(strings.NewReader(": c\n\n"+rest), iotest.ErrReader(broken)))
		got, err := io.ReadAll(r)
		if string(got) != ": c\n\n" || err != broken {
			t.Errorf("got %q and error %v, want the whole event and the error of the upstream", got, err)
		}
		if _, err := r.Read(make([]byte, 1)); err != broken {
			t.Errorf("a later Read: error %v, want the same as before", err)
		}
	}
}

func TestCompletionStreamEventSize(t *testing.T) {
	for _, n := range []int{maxEventBytes, maxEventBytes + 1} {
		in := ":" + strings.Repeat("x", n-3) + "\n\n"
		got, err := io.Copy(io.Discard, newStream(strings.NewReader(in)))
		if fits := n == maxEventBytes; fits && (err != nil || got != int64(len(in))) || !fits && (err == nil || got != 0) {
			t.Errorf("an event of %d bytes: %d bytes, error %v", n, got, err)
		}
	}
}

func FuzzPromptToChat(f *testing.F) {
	f.Add([]byte(`{"model":"m","prompt":"p","echo":true,"max_tokens":1E400}`))
	f.Add([]byte(`{"prompt":["\ud800<\u0000"],"stream":false,"suffix":null}`))
	f.Add([]byte(`{"prompt":[[1,2]],"x":{"y":[{}]}}`))
	f.Add([]byte("{\"\xff\":\"\xff\",\"prompt\":\"\xff\",\"prompt\":[]}"))
	f.Add([]byte(`{"messages":[]} 1`))
	f.Fuzz(func(t *testing.T, body []byte) {
		chat, err := translateRequest(body)
		if err != nil {
			if _, ok := err.(*apiError); !ok || chat != nil {
				t.Fatalf("promptToChat = %q, %v: want an apiError alone", chat, err)
			}
			return
		}
		// A map, whose keys compare exactly.
		var request map[string]json.RawMessage
		if json.Unmarshal(body, &request) != nil {
			return // Qwen judges it
		}
		var prompt string
		if json.Unmarshal(request["prompt"], &prompt) != nil {
			var prompts []string
			if err := json.Unmarshal(request["prompt"], &prompts); err != nil || len(prompts) != 1 {
				t.Fatalf("accepted prompt %s", request["prompt"])
			}
			prompt = prompts[0]
		}
		var got map[string]json.RawMessage
		if err := json.Unmarshal(chat, &got); err != nil {
			t.Fatalf("%q: %v", chat, err)
		}
		var messages []map[string]string
		if err := json.Unmarshal(got["messages"], &messages); err != nil {
			t.Fatalf("%q: %v", chat, err)
		}
		wantEqual(t, "messages", []map[string]string{{"role": "user", "content": prompt}}, messages)
		for _, name := range []string{"prompt", "best_of", "echo", "logprobs", "suffix"} {
			delete(request, name)
		}
		delete(got, "messages")
		wantEqual(t, "other members", request, got)
	})
}

func FuzzCompletionResponse(f *testing.F) {
	f.Add([]byte(`{"id":"chatcmpl-1","created":1,"model":"m","choices":[{"index":0,"message":{"content":"a\ud800"},"finish_reason":"stop"}],"usage":{"a":[1.0]}}`))
	f.Add([]byte(`{"choices":[{"message":{}},{"message":{"content":null},"finish_reason":"tool_calls"}],"system_fingerprint":{}}`))
	f.Add([]byte(`{"created":"1e5","choices":[]}`))
	f.Add([]byte(`{"error":{}}`))
	f.Fuzz(func(t *testing.T, chat []byte) {
		text, err := translateAnswer(string(chat))
		if (err == nil) == (text == nil) {
			t.Fatalf("translate = %q, %v: want one of both", text, err)
		}
		if err != nil {
			return
		}
		var in map[string]json.RawMessage // its keys compare exactly
		var choices []map[string]json.RawMessage
		var out struct {
			Object  string
			Choices []struct{ Text string }
		}
		fatalIf(t, errors.Join(json.Unmarshal(chat, &in), json.Unmarshal(in["choices"], &choices), json.Unmarshal(text, &out)))
		var want, got []string
		for _, c := range choices {
			var message map[string]json.RawMessage
			var content string
			fatalIf(t, json.Unmarshal(c["message"], &message))
			if raw := message["content"]; raw != nil {
				fatalIf(t, json.Unmarshal(raw, &content))
			}
			want = append(want, content)
		}
		for _, c := range out.Choices {
			got = append(got, c.Text)
		}
		if diff := cmp.Diff(want, got); diff != "" || out.Object != "text_completion" {
			t.Errorf("object %q, texts (-want +got):\n%s", out.Object, diff)
		}
	})
}

func FuzzCompletionStream(f *testing.F) {
	for _, tt := range streamTests {
		f.Add(tt.in, uint(len(tt.in)/2))
	}
	f.Add("data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\n\r\ndata\r:\r\r\uFEFF\n", uint(49))
	f.Fuzz(func(t *testing.T, in string, i uint) {
		want, wantErr := io.ReadAll(newStream(strings.NewReader(in)))
		for _, r := range []io.Reader{
			splitReader(in, int(i%uint(len(in)+1))),
			iotest.OneByteReader(strings.NewReader(in)),
			iotest.DataErrReader(iotest.HalfReader(strings.NewReader(in))),
		} {
			got, err := io.ReadAll(newStream(r))
			if diff := cmp.Diff(string(want), string(got)); diff != "" || errorText(err) != errorText(wantErr) {
				t.Fatalf("error %v, want %v; stream (-whole +split):\n%s", err, wantErr, diff)
			}
		}
		if len(want) > 0 && !endsEvent(want) {
			t.Errorf("the stream ends within an event: %q", want)
		}
	})
}
