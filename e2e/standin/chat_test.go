package main

import (
	"math"
	"net/http"
	"strings"
	"testing"
	"time"
)

func TestChat(t *testing.T) {
	const weather = `{"type":"function","function":{"name":"weather","parameters":{"type":"object","required":["city","unit","days"],
		"properties":{"city":{"type":"string"},"unit":{"type":"string","enum":["C","F"]},"days":{"type":"integer"},"more":{"type":"string"}}}}}`
	const now = `{"type":"function","function":{"name":"now"}}`
	const hi = `"messages":[{"role":"system","content":"Be brief."},{"role":"user","content":"Hi there"}]`
	const hiAnswer = `This is qwen-go-proxy's stand-in for Qwen, not a model. You said: "Hi there"`
	const result = `"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":null},{"role":"tool","content":"20 °C"}]`

	for _, test := range []struct {
		name       string
		body       string
		want       string // the content
		finish     string
		tool, args string // the tool call
		thoughts   string
	}{
		{name: "text", body: hi, want: hiAnswer, finish: "stop"},
		{name: "null members", body: hi + `,"n":null,"max_tokens":null,"stop":null,"tools":null,"tool_choice":null,"stream_options":null,"response_format":null`,
			want: hiAnswer, finish: "stop"},
		{name: "parts", body: `"messages":[{"role":"user","content":[{"type":"text","text":"What is"},{"type":"image_url","image_url":{"url":"x"}},{"type":"text","text":"this?"}]}]`,
			want: `This is qwen-go-proxy's stand-in for Qwen, not a model. You said: "What is this?" Images sent along: 1.`, finish: "stop"},
		{name: "the last message of the user", body: `"messages":[{"role":"user","content":"a"},{"role":"user","content":"b\n\n c"},{"role":"assistant","content":"d"}]`,
			want: "This is qwen-go-proxy's stand-in for Qwen, not a model. You said: \"b\n\n c\"", finish: "stop"},
		{name: "max_tokens", body: hi + `,"max_tokens":3`, want: "This is qwen-go-proxy's", finish: "length"},
		{name: "max_completion_tokens", body: hi + `,"max_tokens":3,"max_completion_tokens":1`, want: "This", finish: "length"},
		{name: "max_tokens enough", body: hi + `,"max_tokens":13`, want: hiAnswer, finish: "stop"},
		{name: "stop", body: hi + `,"stop":" stand"`, want: "This is qwen-go-proxy's", finish: "stop"},
		{name: "stops", body: hi + `,"stop":["not a","","-proxy","nowhere"]`, want: "This is qwen-go", finish: "stop"},
		{name: "stop at once", body: hi + `,"stop":"This"`, want: "", finish: "stop"},
		{name: "tool", body: hi + `,"tools":[` + weather + `,` + now + `]`,
			finish: "tool_calls", tool: "weather", args: `{"city":"Hi there","days":1,"unit":"C"}`},
		{name: "tool in other scripts", body: `"messages":[{"role":"user","content":"天气怎么样？今天在北京，明天在上海"}],"tools":[` + weather + `]`,
			finish: "tool_calls", tool: "weather", args: `{"city":"天气怎么样？今天在北京，明天在上海","days":1,"unit":"C"}`},
		{name: "named tool", body: hi + `,"tools":[` + weather + `,` + now + `],"tool_choice":{"type":"function","function":{"name":"now"}}`,
			finish: "tool_calls", tool: "now", args: `{}`},
		{name: "no tool wanted", body: hi + `,"tools":[` + weather + `],"tool_choice":"none"`, want: hiAnswer, finish: "stop"},
		{name: "no tools", body: hi + `,"tools":[],"tool_choice":"auto"`, want: hiAnswer, finish: "stop"},
		{name: "tool result", body: result + `,"tools":[` + weather + `]`,
			want: `This is qwen-go-proxy's stand-in for Qwen, not a model. The tool answered: "20 °C"`, finish: "stop"},
		{name: "thinking", body: hi + `,"enable_thinking":true`, want: hiAnswer, finish: "stop", thoughts: thought},
		{name: "thinking before a call", body: hi + `,"enable_thinking":true,"tools":[` + now + `]`,
			finish: "tool_calls", tool: "now", args: `{}`, thoughts: thought},
		{name: "json_object", body: hi + `,"response_format":{"type":"json_object"}`,
			want: `{"answer":"This is qwen-go-proxy's stand-in for Qwen, not a model. You said: \"Hi there\""}`, finish: "stop"},
		{name: "json_schema", body: hi + `,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":"object","required":["s","n","b","a","o","z","m"],
			"properties":{"s":{"type":"string"},"n":{"type":"number"},"b":{"type":"boolean"},"a":{"type":"array"},"z":{"type":["null","string"]},
			"o":{"type":"object","required":["e"],"properties":{"e":{"enum":[2]}}},"m":{"anyOf":[{"type":"integer"},{"type":"null"}]}}}}}`,
			want: `{"a":[],"b":true,"m":1,"n":1,"o":{"e":2},"s":"Hi there","z":null}`, finish: "stop"},
		{name: "json_schema that is none", body: hi + `,"response_format":{"type":"json_schema","json_schema":{"schema":true}}`, want: `{}`, finish: "stop"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newStandIn()
			s.wordDelay = 0
			c := newClient(t, s)
			c.signIn()

			status, answer := c.post("/v1/chat/completions", `{"model":"m",`+test.body+`}`)
			if status != http.StatusOK {
				t.Fatalf("%d %v", status, answer)
			}
			message := dig(answer, "choices", 0, "message")
			content, _ := dig(message, "content").(string)
			tool, _ := dig(message, "tool_calls", 0, "function", "name").(string)
			args, _ := dig(message, "tool_calls", 0, "function", "arguments").(string)
			thoughts, _ := dig(message, "reasoning_content").(string)
			want := []any{test.want, test.finish, test.tool, test.args, test.thoughts}
			wantEqual(t, "completion", want, []any{content, dig(answer, "choices", 0, "finish_reason"), tool, args, thoughts})

			resp, stream := c.do("POST", "/v1/chat/completions", "application/json", `{"model":"m","stream":true,`+test.body+`}`)
			wantEqual(t, "Content-Type", "text/event-stream;charset=UTF-8", resp.Header.Get("Content-Type"))
			content, tool, args, thoughts = "", "", "", ""
			var finish any
			for _, chunk := range chatEvents(t, stream) {
				delta := dig(chunk, "choices", 0, "delta")
				more, _ := dig(delta, "content").(string)
				content += more
				more, _ = dig(delta, "tool_calls", 0, "function", "name").(string)
				tool += more
				more, _ = dig(delta, "tool_calls", 0, "function", "arguments").(string)
				args += more
				more, _ = dig(delta, "reasoning_content").(string)
				thoughts += more
				finish = dig(chunk, "choices", 0, "finish_reason")
			}
			wantEqual(t, "stream", want, []any{content, finish, tool, args, thoughts})
			if got := s.counts().chats; got != 2 {
				t.Errorf("%d chats counted, want 2", got)
			}
		})
	}
}

// chatEvents returns the JSON of each event of a stream that ends with [DONE].
func chatEvents(t testing.TB, stream string) []object {
	t.Helper()
	stream, ok := strings.CutSuffix(stream, "data: [DONE]\n\n")
	if !ok {
		t.Fatalf("the stream does not end with [DONE]:\n%s", stream)
	}
	var chunks []object
	for event := range strings.SplitSeq(strings.TrimSuffix(stream, "\n\n"), "\n\n") {
		data, ok := strings.CutPrefix(event, "data: ")
		if !ok {
			t.Fatalf("not an event: %q", event)
		}
		chunks = append(chunks, parseObject(t, data))
	}
	return chunks
}

func TestChatShape(t *testing.T) {
	c := newClient(t, newStandIn())
	c.signIn()
	resp, body := c.do("POST", "/v1/chat/completions", "application/json",
		`{"model":"qwen3-coder-plus","messages":[{"role":"user","content":"one two"}],"max_tokens":2,"n":2}`)
	answer := parseObject(t, body)
	id, _ := answer["id"].(string)
	created, _ := answer["created"].(float64)
	if !strings.HasPrefix(id, "chatcmpl-") || math.Abs(float64(time.Now().Unix())-created) > 60 || resp.Header.Get("X-Request-Id") == "" {
		t.Errorf("id %q, created %v, header %v", id, created, resp.Header)
	}
	delete(answer, "id")
	delete(answer, "created")
	choice := func(i float64) object {
		return object{"index": i, "finish_reason": "length", "message": object{"role": "assistant", "content": "This is"}}
	}
	wantEqual(t, "completion", object{
		"object": "chat.completion", "model": "qwen3-coder-plus", "choices": []any{choice(0), choice(1)},
		"usage": object{"prompt_tokens": 2.0, "completion_tokens": 4.0, "total_tokens": 6.0},
	}, answer)
}

func TestStreamShape(t *testing.T) {
	s := newStandIn()
	s.wordDelay = 0
	c := newClient(t, s)
	c.signIn()
	post := func(body string) []object {
		_, stream := c.do("POST", "/v1/chat/completions", "application/json", body)
		chunks := chatEvents(t, stream)
		id := chunks[0]["id"]
		for i, chunk := range chunks {
			wantEqual(t, "id", id, chunk["id"])
			wantEqual(t, "object and model", []any{"chat.completion.chunk", "m"}, []any{chunk["object"], chunk["model"]})
			chunks[i] = object{"choices": chunk["choices"]}
			if usage, ok := chunk["usage"]; ok {
				chunks[i]["usage"] = usage
			}
		}
		return chunks
	}
	choice := func(index float64, delta object, finish any) []any {
		return []any{object{"index": index, "delta": delta, "finish_reason": finish}}
	}

	wantEqual(t, "text with usage", []object{
		{"choices": choice(0, object{"role": "assistant", "content": ""}, nil), "usage": nil},
		{"choices": choice(0, object{"content": "This"}, nil), "usage": nil},
		{"choices": choice(0, object{"content": " is"}, nil), "usage": nil},
		{"choices": choice(0, object{}, "length"), "usage": nil},
		{"choices": []any{}, "usage": object{"prompt_tokens": 1.0, "completion_tokens": 2.0, "total_tokens": 3.0}},
	}, post(`{"model":"m","messages":[{"role":"user","content":"Hi"}],"max_tokens":2,"stream":true,"stream_options":{"include_usage":true}}`))

	wantEqual(t, "two choices", []object{
		{"choices": choice(0, object{"role": "assistant", "content": ""}, nil)},
		{"choices": choice(1, object{"role": "assistant", "content": ""}, nil)},
		{"choices": choice(0, object{"content": "This"}, nil)},
		{"choices": choice(1, object{"content": "This"}, nil)},
		{"choices": choice(0, object{}, "length")},
		{"choices": choice(1, object{}, "length")},
	}, post(`{"model":"m","messages":[{"role":"user","content":"Hi"}],"max_tokens":1,"n":2,"stream":true}`))

	chunks := post(`{"model":"m","messages":[{"role":"user","content":"Hi"}],"stream":true,"tools":[{"type":"function",
		"function":{"name":"f","parameters":{"type":"object","required":["a"],"properties":{"a":{"type":"string"}}}}}]}`)
	call := dig(chunks[1], "choices", 0, "delta", "tool_calls", 0)
	if id, _ := dig(call, "id").(string); !strings.HasPrefix(id, "call_") {
		t.Errorf("tool call %v has no id", call)
	} else {
		delete(call.(object), "id")
	}
	wantEqual(t, "tool call", []object{
		{"choices": choice(0, object{"role": "assistant", "content": ""}, nil)},
		{"choices": choice(0, object{"tool_calls": []any{object{"index": 0.0, "type": "function",
			"function": object{"name": "f", "arguments": ""}}}}, nil)},
		{"choices": choice(0, object{"tool_calls": []any{object{"index": 0.0, "function": object{"arguments": `{"a":"Hi`}}}}, nil)},
		{"choices": choice(0, object{"tool_calls": []any{object{"index": 0.0, "function": object{"arguments": `"}`}}}}, nil)},
		{"choices": choice(0, object{}, "tool_calls")},
	}, chunks)
}
