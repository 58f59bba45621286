package main

import (
	"strings"
	"testing"
)

// said returns what part of an answer says: its text, thoughts and arguments.
func said(v any) (s string) {
	switch v := v.(type) {
	case string:
		return v
	case []any:
		for _, item := range v {
			s += said(item)
		}
	case object:
		for _, name := range []string{"summary", "content", "text", "thinking", "arguments", "partial_json"} {
			s += said(v[name])
		}
		if input, ok := v["input"].(object); ok && len(input) > 0 {
			s += marshalText(input)
		}
	}
	return s
}

// TestResponsesAndMessages: an answer says the same whole and in a stream. The SDKs in examples/sdk check the shapes.
func TestResponsesAndMessages(t *testing.T) {
	const responses, messages = "/v1/responses", "/apps/anthropic/v1/messages"
	const schema = `{"type":"object","required":["zone"],"properties":{"zone":{"type":"string"}}}`
	const function, tool = `"tools":[{"type":"function","name":"now","parameters":` + schema + `}]`, `"tools":[{"name":"now","input_schema":` + schema + `}]`
	const hi = `"max_tokens":100,"messages":[{"role":"user","content":"Hi"}`
	const intro = `This is qwen-go-proxy's stand-in for Qwen, not a model. `
	const answer = intro + `You said: "Hi"`
	for _, test := range []struct{ name, path, body, want, last string }{
		{"text", responses, `"input":"Hi"`, answer, "response.completed"},
		{"parts", responses, `"instructions":"Be brief.","input":[{"role":"user","content":[{"type":"input_text","text":"Hi"},{"type":"input_image","image_url":"x"}]}]`,
			answer + " Images sent along: 1.", "response.completed"},
		{"too long", responses, `"input":"Hi","max_output_tokens":2`, "This is", "response.incomplete"},
		{"thinking", responses, `"input":"Hi","enable_thinking":true`, thought + answer, "response.completed"},
		{"call", responses, `"input":"Hi",` + function, `{"zone":"Hi"}`, "response.completed"},
		{"output of a call", responses, `"input":[{"role":"user","content":"Hi"},{"type":"function_call","call_id":"c","name":"now","arguments":"{}"},` +
			`{"type":"function_call_output","call_id":"c","output":"noon"}],` + function, intro + `The tool answered: "noon"`, "response.completed"},
		{"text", messages, hi + `]`, answer, "message_stop"},
		{"stop sequence", messages, hi + `],"stop_sequences":["no"," for"]`, "This is qwen-go-proxy's stand-in", "message_stop"},
		{"thinking", messages, hi + `],"thinking":{"type":"enabled","budget_tokens":1024}`, thought + answer, "message_stop"},
		{"call", messages, hi + `],` + tool, `{"zone":"Hi"}`, "message_stop"},
		{"result of a call", messages, hi + `,{"role":"assistant","content":[{"type":"tool_use","id":"c","name":"now","input":{}}]},` +
			`{"role":"user","content":[{"type":"tool_result","tool_use_id":"c","content":[{"type":"text","text":"noon"}]}]}],` + tool, intro + `The tool answered: "noon"`, "message_stop"},
	} {
		t.Run(test.path+" "+test.name, func(t *testing.T) {
			s := newStandIn()
			s.wordDelay = 0
			c := newClient(t, s)
			c.signIn()
			_, whole := c.post(test.path, `{"model":"m",`+test.body+`}`)
			wantEqual(t, "answer", test.want, said(whole["output"])+said(whole["content"]))
			_, stream := c.do("POST", test.path, "application/json", `{"model":"m","stream":true,`+test.body+`}`)
			var got, last string
			for event := range strings.SplitSeq(strings.TrimSuffix(stream, "\n\n"), "\n\n") {
				name, data, _ := strings.Cut(event, "\ndata: ")
				o := parseObject(t, data)
				last, _ = o["type"].(string)
				wantEqual(t, "name of the event", "event: "+last, name)
				if strings.HasSuffix(last, "delta") {
					got += said(o["delta"])
				}
			}
			wantEqual(t, "stream", test.want+" "+test.last, got+" "+last)
		})
	}
}
