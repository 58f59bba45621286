package main

import (
	"net/http"
	"strings"
	"testing"
)

// namedEvents returns the data of each event of a stream whose events have names, which the data says too.
func namedEvents(t testing.TB, stream string) []object {
	t.Helper()
	var events []object
	for event := range strings.SplitSeq(strings.TrimSuffix(stream, "\n\n"), "\n\n") {
		name, data, ok := strings.Cut(event, "\ndata: ")
		if !ok {
			t.Fatalf("not an event: %q", event)
		}
		o := parseObject(t, data)
		wantEqual(t, "name", name, "event: "+o["type"].(string))
		events = append(events, o)
	}
	return events
}

// withoutIDs returns v without what differs from answer to answer.
func withoutIDs(v any) any {
	switch v := v.(type) {
	case object:
		for name := range v {
			if name == "id" || name == "call_id" || name == "item_id" || name == "created_at" {
				delete(v, name)
			} else {
				withoutIDs(v[name])
			}
		}
	case []any:
		for _, item := range v {
			withoutIDs(item)
		}
	}
	return v
}

func TestResponses(t *testing.T) {
	const now = `"tools":[{"type":"function","name":"now","parameters":{"type":"object","required":["zone"],"properties":{"zone":{"type":"string"}}}}]`
	const hi = `This is qwen-go-proxy's stand-in for Qwen, not a model. You said: "Hi"`
	message := func(text, status string) object {
		return object{"type": "message", "role": "assistant", "status": status,
			"content": []any{object{"type": "output_text", "text": text, "annotations": []any{}, "logprobs": []any{}}}}
	}
	thinking := object{"type": "reasoning", "summary": []any{object{"type": "summary_text", "text": thought}}}
	call := object{"type": "function_call", "status": "completed", "name": "now", "arguments": `{"zone":"Hi"}`}
	for _, test := range []struct {
		name   string
		body   string
		status string
		output []any
		events string // without response., delta once
	}{
		{"text", `"input":"Hi"`, "completed", []any{message(hi, "completed")},
			"output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done"},
		{"messages and parts", `"instructions":"Be brief.","input":[{"role":"user","content":[{"type":"input_text","text":"Hi"},{"type":"input_image","image_url":"x"}]}]`,
			"completed", []any{message(hi+" Images sent along: 1.", "completed")},
			"output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done"},
		{"too long", `"input":"Hi","max_output_tokens":2`, "incomplete", []any{message("This is", "incomplete")},
			"output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done"},
		{"thinking", `"input":"Hi","enable_thinking":true`, "completed", []any{thinking, message(hi, "completed")},
			"output_item.added reasoning_summary_part.added reasoning_summary_text.delta reasoning_summary_text.done reasoning_summary_part.done output_item.done " +
				"output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done"},
		{"call", `"input":"Hi",` + now, "completed", []any{call},
			"output_item.added function_call_arguments.delta function_call_arguments.done output_item.done"},
		{"output of a call", `"input":[{"role":"user","content":"Hi"},{"type":"function_call","call_id":"c","name":"now","arguments":"{}"},` +
			`{"type":"function_call_output","call_id":"c","output":"noon"}],` + now, "completed",
			[]any{message(`This is qwen-go-proxy's stand-in for Qwen, not a model. The tool answered: "noon"`, "completed")},
			"output_item.added content_part.added output_text.delta output_text.done content_part.done output_item.done"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newStandIn()
			s.wordDelay = 0
			c := newClient(t, s)
			c.signIn()
			status, whole := c.post("/v1/responses", `{"model":"m",`+test.body+`}`)
			if status != http.StatusOK {
				t.Fatalf("%d %v", status, whole)
			}
			if id, _ := whole["id"].(string); !strings.HasPrefix(id, "resp_") {
				t.Errorf("id %q", id)
			}
			withoutIDs(whole)
			wantEqual(t, "response", []any{"response", "m", test.status, test.output},
				[]any{whole["object"], whole["model"], whole["status"], whole["output"]})

			resp, stream := c.do("POST", "/v1/responses", "application/json", `{"model":"m",`+strings.Replace(test.body, `,"stream":null`, "", 1)+`,"stream":true}`)
			wantEqual(t, "Content-Type", "text/event-stream;charset=UTF-8", resp.Header.Get("Content-Type"))
			var names []string
			deltas, last := "", object(nil)
			for i, event := range namedEvents(t, stream) {
				wantEqual(t, "sequence_number", any(float64(i)), event["sequence_number"])
				name := strings.TrimPrefix(event["type"].(string), "response.")
				if len(names) == 0 || names[len(names)-1] != name {
					names = append(names, name)
				}
				switch kind := name[strings.LastIndex(name, ".")+1:]; {
				case kind == "delta":
					deltas += event["delta"].(string)
				case event["text"] != nil:
					wantEqual(t, name, any(deltas), event["text"])
					deltas = ""
				case event["arguments"] != nil:
					wantEqual(t, name, any(deltas), event["arguments"])
					deltas = ""
				}
				last = event
			}
			wantEqual(t, "events", "created in_progress "+test.events+" "+test.status, strings.Join(names, " "))
			wantEqual(t, "the last event's response", any(whole), withoutIDs(last["response"]))
		})
	}
}
