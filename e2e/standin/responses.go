package main

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"maps"
	"math"
	"net/http"
	"strings"
	"time"
)

// A responsesRequest is a request of OpenAI's Responses API, with the members that the stand-in reads.
type responsesRequest struct {
	Model           string         `json:"model"`
	Instructions    string         `json:"instructions"`
	Input           responsesInput `json:"input"`
	MaxOutputTokens int            `json:"max_output_tokens"`
	Stream          bool           `json:"stream"`
	EnableThinking  bool           `json:"enable_thinking"`
	Tools           []functionTool `json:"tools"`
	ToolChoice      toolChoice     `json:"tool_choice"`
	Text            struct {
		Format struct {
			Type   string `json:"type"`
			Schema any    `json:"schema"`
		} `json:"format"`
	} `json:"text"`
}

// A responsesInput is the input of a response: a string, or an array of messages, calls and their outputs.
type responsesInput []chatMessage

func (in *responsesInput) UnmarshalJSON(b []byte) error {
	var text *string
	if json.Unmarshal(b, &text) == nil {
		if text != nil {
			*in = responsesInput{{Role: "user", Content: chatContent{text: *text}}}
		}
		return nil
	}
	var items []struct {
		Type   string      `json:"type"`
		Output chatContent `json:"output"`
		chatMessage
	}
	if json.Unmarshal(b, &items) != nil {
		return errors.New("input must be a string or an array of items")
	}
	for _, item := range items {
		if item.Type == "function_call_output" {
			item.chatMessage = chatMessage{Role: "tool", Content: item.Output}
		}
		*in = append(*in, item.chatMessage)
	}
	return nil
}

// chat returns the same request as one for a chat completion.
func (req *responsesRequest) chat() *chatRequest {
	c := &chatRequest{Model: req.Model, Messages: req.Input, N: 1, MaxTokens: req.MaxOutputTokens, MaxCompletionTokens: math.MaxInt,
		Stream: req.Stream, EnableThinking: req.EnableThinking, Tools: req.Tools, ToolChoice: req.ToolChoice}
	if req.Instructions != "" {
		system := chatMessage{Role: "system", Content: chatContent{text: req.Instructions}}
		c.Messages = append([]chatMessage{system}, c.Messages...)
	}
	c.ResponseFormat.Type = req.Text.Format.Type
	c.ResponseFormat.JSONSchema.Schema = req.Text.Format.Schema
	return c
}

// responses answers a request of the Responses API.
func (s *standIn) responses(w http.ResponseWriter, r *http.Request) *apiError {
	req := &responsesRequest{MaxOutputTokens: math.MaxInt}
	if failure := s.read(w, r, req); failure != nil {
		return failure
	}
	switch {
	case req.Model == "":
		return invalidRequest("model", "missing_required_parameter", "model is missing.")
	case len(req.Input) == 0:
		return invalidRequest("input", "missing_required_parameter", "input must be a string, or hold an item at least.")
	case req.MaxOutputTokens < 1:
		return invalidRequest("max_output_tokens", "invalid_value", "max_output_tokens must be 1 at least.")
	}
	c := req.chat()
	answer, failure := s.answer(c)
	if failure != nil {
		return failure
	}
	res := c.response(req, answer)
	if req.Stream {
		res.stream(s.newStream(w, r, c.Model))
	} else {
		writeJSON(w, http.StatusOK, res.done())
	}
	return nil
}

// A response is a response of the Responses API.
type response struct {
	items  []responseItem
	begun  object // as it is before it has any output
	status string // that it ends with, also the name of the last event
	ending object // the members of begun that change at the end, except the output
}

// A responseItem is an item of a response's output.
type responseItem struct {
	pieces []string
	delta  string // the events that bring the pieces are response.….delta, and response.….done the last
	whole  string // the member that holds the whole text at the end
	part   string // the part's events are response.….added and response.….done; "" if the item has none
	index  string // the member that numbers the parts; "" if the item has none

	// of returns the item with the given status and text, and its part.
	of func(status, text string) (item, part object)
}

// response returns answer in the shape of the Responses API.
func (c *chatRequest) response(req *responsesRequest, answer *chatAnswer) *response {
	prompt := c.promptTokens()
	res := &response{
		begun: object{
			"id": "resp_" + rand.Text(), "object": "response", "created_at": time.Now().Unix(), "status": "in_progress", "model": c.Model,
			"output": []object{}, "error": nil, "incomplete_details": nil, "instructions": nil, "metadata": object{}, "usage": nil,
			"parallel_tool_calls": true, "previous_response_id": nil, "temperature": 1, "top_p": 1, "tool_choice": "auto", "tools": []object{},
		},
		status: "completed",
		ending: object{"usage": object{
			"input_tokens": prompt, "input_tokens_details": object{"cached_tokens": 0},
			"output_tokens": answer.tokens(), "output_tokens_details": object{"reasoning_tokens": len(answer.thoughts)},
			"total_tokens": prompt + answer.tokens(),
		}},
	}
	if req.Instructions != "" {
		res.begun["instructions"] = req.Instructions
	}
	if answer.finish == "length" {
		res.status = "incomplete"
		res.ending["incomplete_details"] = object{"reason": "max_output_tokens"}
	}
	res.ending["status"] = res.status

	if len(answer.thoughts) > 0 {
		id := "rs_" + rand.Text()
		res.items = append(res.items, responseItem{
			pieces: answer.thoughts, delta: "reasoning_summary_text", whole: "text", part: "reasoning_summary_part", index: "summary_index",
			of: func(_, text string) (item, part object) {
				part = object{"type": "summary_text", "text": text}
				return object{"id": id, "type": "reasoning", "summary": partsOf(part, text)}, part
			},
		})
	}
	if answer.tool != "" {
		id := "fc_" + rand.Text()
		res.items = append(res.items, responseItem{
			pieces: answer.pieces, delta: "function_call_arguments", whole: "arguments",
			of: func(status, text string) (item, part object) {
				return object{"id": id, "type": "function_call", "status": status, "call_id": answer.callID, "name": answer.tool, "arguments": text}, nil
			},
		})
	} else {
		id := "msg_" + rand.Text()
		res.items = append(res.items, responseItem{
			pieces: answer.pieces, delta: "output_text", whole: "text", part: "content_part", index: "content_index",
			of: func(status, text string) (item, part object) {
				part = object{"type": "output_text", "text": text, "annotations": []object{}, "logprobs": []object{}}
				return object{"id": id, "type": "message", "role": "assistant", "status": status, "content": partsOf(part, text)}, part
			},
		})
	}
	return res
}

// partsOf returns an item's parts: none before there is a text.
func partsOf(part object, text string) []object {
	if text == "" {
		return []object{}
	}
	return []object{part}
}

// done returns the whole response.
func (res *response) done() object {
	done := maps.Clone(res.begun)
	maps.Copy(done, res.ending)
	var output []object
	for _, item := range res.items {
		whole, _ := item.of(res.status, strings.Join(item.pieces, ""))
		output = append(output, whole)
	}
	done["output"] = output
	return done
}

// stream sends the response as the events of the Responses API.
func (res *response) stream(events *eventStream) {
	sequence := 0
	send := func(name string, members ...object) {
		event := object{"type": "response." + name, "sequence_number": sequence}
		for _, m := range members {
			maps.Copy(event, m)
		}
		events.send("response."+name, event)
		sequence++
	}

	send("created", object{"response": res.begun})
	send("in_progress", object{"response": res.begun})
	for i, item := range res.items {
		text := strings.Join(item.pieces, "")
		begun, noPart := item.of("in_progress", "")
		done, part := item.of(res.status, text)
		output := object{"output_index": i}
		at := object{"output_index": i, "item_id": begun["id"]}
		if item.index != "" {
			at[item.index] = 0
		}
		send("output_item.added", output, object{"item": begun})
		if item.part != "" {
			send(item.part+".added", at, object{"part": noPart})
		}
		for piece := range events.pace(item.pieces) {
			send(item.delta+".delta", at, object{"delta": piece})
		}
		send(item.delta+".done", at, object{item.whole: text})
		if item.part != "" {
			send(item.part+".done", at, object{"part": part})
		}
		send("output_item.done", output, object{"item": done})
	}
	send(res.status, object{"response": res.done()})
}
