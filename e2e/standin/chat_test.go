package main

import (
	"net/http"
	"strings"
	"testing"
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
		{name: "stop", body: hi + `,"stop":" stand"`, want: "This is qwen-go-proxy's", finish: "stop"},
		{name: "tool", body: hi + `,"tools":[` + weather + `,` + now + `]`,
			finish: "tool_calls", tool: "weather", args: `{"city":"Hi there","days":1,"unit":"C"}`},
		{name: "named tool", body: hi + `,"tools":[` + weather + `,` + now + `],"tool_choice":{"type":"function","function":{"name":"now"}}`,
			finish: "tool_calls", tool: "now", args: `{}`},
		{name: "no tool wanted", body: hi + `,"tools":[` + weather + `],"tool_choice":"none"`, want: hiAnswer, finish: "stop"},
		{name: "tool result", body: result + `,"tools":[` + weather + `]`,
			want: `This is qwen-go-proxy's stand-in for Qwen, not a model. The tool answered: "20 °C"`, finish: "stop"},
		{name: "thinking", body: hi + `,"enable_thinking":true`, want: hiAnswer, finish: "stop", thoughts: thought},
		{name: "json_schema", body: hi + `,"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":{"type":"object","required":["s","n","b","a","o","z","m"],
			"properties":{"s":{"type":"string"},"n":{"type":"number"},"b":{"type":"boolean"},"a":{"type":"array"},"z":{"type":["null","string"]},
			"o":{"type":"object","required":["e"],"properties":{"e":{"enum":[2]}}},"m":{"anyOf":[{"type":"integer"},{"type":"null"}]}}}}}`,
			want: `{"a":[],"b":true,"m":1,"n":1,"o":{"e":2},"s":"Hi there","z":null}`, finish: "stop"},
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
