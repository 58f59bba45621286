package main

import (
	"net/http"
	"strings"
	"testing"
)

func TestMessages(t *testing.T) {
	const tool = `"tools":[{"name":"now","input_schema":{"type":"object","required":["zone"],"properties":{"zone":{"type":"string"}}}}]`
	const hi = `"messages":[{"role":"user","content":"Hi"}],"max_tokens":100`
	const hiAnswer = `This is qwen-go-proxy's stand-in for Qwen, not a model. You said: "Hi"`
	text := func(s string) object { return object{"type": "text", "text": s} }
	thinking := object{"type": "thinking", "thinking": thought, "signature": thoughtSignature}
	call := object{"type": "tool_use", "name": "now", "input": object{"zone": "Hi"}}
	for _, test := range []struct {
		name, body   string
		content      []any
		reason, stop any
	}{
		{"text", hi, []any{text(hiAnswer)}, "end_turn", nil},
		{"parts", `"messages":[{"role":"user","content":[{"type":"image","source":{"type":"base64"}},{"type":"text","text":"Hi"}]}],"max_tokens":100`,
			[]any{text(hiAnswer + " Images sent along: 1.")}, "end_turn", nil},
		{"stop sequence", hi + `,"stop_sequences":["no"," for"]`, []any{text("This is qwen-go-proxy's stand-in")}, "stop_sequence", " for"},
		{"thinking", hi + `,"thinking":{"type":"enabled","budget_tokens":1024}`, []any{thinking, text(hiAnswer)}, "end_turn", nil},
		{"call", hi + "," + tool, []any{call}, "tool_use", nil},
		{"result of a call", `"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":[{"type":"tool_use","id":"c","name":"now","input":{}}]},
			{"role":"user","content":[{"type":"tool_result","tool_use_id":"c","content":[{"type":"text","text":"noon"}]}]}],"max_tokens":100,` + tool,
			[]any{text(`This is qwen-go-proxy's stand-in for Qwen, not a model. The tool answered: "noon"`)}, "end_turn", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newStandIn()
			s.wordDelay = 0
			c := newClient(t, s)
			c.signIn()
			status, whole := c.post("/apps/anthropic/v1/messages", `{"model":"m",`+test.body+`}`)
			if status != http.StatusOK {
				t.Fatalf("%d %v", status, whole)
			}
			withoutIDs(whole)
			wantEqual(t, "message", []any{"message", "assistant", "m", test.content, test.reason, test.stop},
				[]any{whole["type"], whole["role"], whole["model"], whole["content"], whole["stop_reason"], whole["stop_sequence"]})

			resp, stream := c.do("POST", "/apps/anthropic/v1/messages", "application/json", `{"model":"m","stream":true,`+test.body+`}`)
			wantEqual(t, "Content-Type", "text/event-stream;charset=UTF-8", resp.Header.Get("Content-Type"))
			wantEqual(t, "the stream's message", any(whole), withoutIDs(streamedMessage(t, stream)))
		})
	}
}

// streamedMessage returns the message that a stream's events make.
func streamedMessage(t testing.TB, stream string) object {
	t.Helper()
	events := namedEvents(t, stream)
	if first, last := events[0]["type"], events[len(events)-1]["type"]; first != "message_start" || last != "message_stop" {
		t.Fatalf("the stream begins with %v and ends with %v", first, last)
	}
	message := events[0]["message"].(object)
	var content []any
	var block object // the open one; nil where none is
	var input string
	for _, event := range events {
		if name, _ := event["type"].(string); strings.HasPrefix(name, "content_block_") {
			index := float64(len(content))
			if name != "content_block_start" {
				index--
			}
			wantEqual(t, name+" index", any(index), event["index"])
			if (block == nil) != (name == "content_block_start") {
				t.Fatalf("%s in the wrong place:\n%s", name, stream)
			}
		}
		switch event["type"] {
		case "content_block_start":
			block, input = event["content_block"].(object), ""
			content = append(content, block)
		case "content_block_delta":
			delta := event["delta"].(object)
			for _, member := range []string{"text", "thinking", "signature"} {
				if piece, ok := delta[member].(string); ok {
					block[member] = block[member].(string) + piece
				}
			}
			piece, _ := delta["partial_json"].(string)
			input += piece
		case "content_block_stop":
			if block["type"] == "tool_use" {
				block["input"] = parseObject(t, input)
			}
			block = nil
		case "message_delta":
			message["stop_reason"], message["stop_sequence"] = dig(event, "delta", "stop_reason"), dig(event, "delta", "stop_sequence")
			message["usage"].(object)["output_tokens"] = dig(event, "usage", "output_tokens")
		}
	}
	message["content"] = content
	return message
}
