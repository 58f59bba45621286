package main

import (
	"crypto/rand"
	"encoding/json"
	"math"
	"net/http"
	"strings"
)

// A messagesRequest is a request of Anthropic's Messages API, with the members that the stand-in reads.
type messagesRequest struct {
	Model         string         `json:"model"`
	System        chatContent    `json:"system"`
	Messages      []chatMessage  `json:"messages"`
	MaxTokens     int            `json:"max_tokens"`
	StopSequences []string       `json:"stop_sequences"`
	Stream        bool           `json:"stream"`
	Tools         []functionTool `json:"tools"`
	ToolChoice    toolChoice     `json:"tool_choice"`
	Thinking      struct {
		Type string `json:"type"`
	} `json:"thinking"`
	OutputConfig struct {
		Format struct {
			Type   string `json:"type"`
			Schema any    `json:"schema"`
		} `json:"format"`
	} `json:"output_config"`
}

// chat returns the same request as one for a chat completion.
func (req *messagesRequest) chat() *chatRequest {
	c := &chatRequest{Model: req.Model, N: 1, MaxTokens: req.MaxTokens, MaxCompletionTokens: math.MaxInt, Stop: req.StopSequences,
		Stream: req.Stream, EnableThinking: req.Thinking.Type != "" && req.Thinking.Type != "disabled", Tools: req.Tools, ToolChoice: req.ToolChoice,
		Messages: []chatMessage{{Role: "system", Content: req.System}}}
	for _, m := range req.Messages {
		if m.Content.result { // a tool's result has the role user here
			m.Role = "tool"
		}
		c.Messages = append(c.Messages, m)
	}
	c.ResponseFormat.Type = req.OutputConfig.Format.Type
	c.ResponseFormat.JSONSchema.Schema = req.OutputConfig.Format.Schema
	return c
}

// readMessages reads a request of the Messages API.
func (s *standIn) readMessages(w http.ResponseWriter, r *http.Request, req *messagesRequest) *apiError {
	if failure := s.read(w, r, req); failure != nil {
		return failure
	}
	switch {
	case req.Model == "":
		return invalidRequest("model", "missing_required_parameter", "model: Field required")
	case len(req.Messages) == 0:
		return invalidRequest("messages", "missing_required_parameter", "messages: at least one message is required")
	}
	return fault(req.Model)
}

// messages answers a request of the Messages API.
func (s *standIn) messages(w http.ResponseWriter, r *http.Request) *apiError {
	req := &messagesRequest{}
	if failure := s.readMessages(w, r, req); failure != nil {
		return failure
	}
	if req.MaxTokens < 1 {
		return invalidRequest("max_tokens", "invalid_value", "max_tokens: must be 1 at least")
	}
	c := req.chat()
	answer, failure := s.answer(c)
	if failure != nil {
		return failure
	}
	if req.Stream {
		c.streamMessage(s.newStream(w, r, c.Model), answer)
		return nil
	}
	message, content := c.messageBegun(), []object{}
	for _, b := range answer.blocks() {
		b.fill(b.begun)
		content = append(content, b.begun)
	}
	message["content"] = content
	message["stop_reason"], message["stop_sequence"] = answer.stopReason()
	message["usage"] = object{"input_tokens": c.promptTokens(), "output_tokens": answer.tokens()}
	writeJSON(w, http.StatusOK, message)
	return nil
}

// countTokens answers how many tokens a request of the Messages API has.
func (s *standIn) countTokens(w http.ResponseWriter, r *http.Request) *apiError {
	req := &messagesRequest{}
	if failure := s.readMessages(w, r, req); failure != nil {
		return failure
	}
	writeJSON(w, http.StatusOK, object{"input_tokens": req.chat().promptTokens()})
	return nil
}

// messageBegun returns the message as it is before it has any content.
func (c *chatRequest) messageBegun() object {
	return object{"id": "msg_" + rand.Text(), "type": "message", "role": "assistant", "model": c.Model, "content": []object{},
		"stop_reason": nil, "stop_sequence": nil, "usage": object{"input_tokens": c.promptTokens(), "output_tokens": 0}}
}

// stopReason returns the stop_reason and the stop_sequence.
func (a *chatAnswer) stopReason() (reason string, sequence any) {
	switch {
	case a.stop != "":
		return "stop_sequence", a.stop
	case a.finish == "length":
		return "max_tokens", nil
	case a.finish == "tool_calls":
		return "tool_use", nil
	}
	return "end_turn", nil
}

// A messageBlock is a block of a message's content.
type messageBlock struct {
	begun  object // as it is before its pieces
	pieces []string
	delta  string       // the type of the deltas that bring the pieces
	member string       // of those deltas that holds the piece
	fill   func(object) // turns begun into the whole block
}

// thoughtSignature stands for the proof that a model's thoughts are its own.
const thoughtSignature = "c3RhbmQtaW4="

// blocks returns the answer as the blocks of a message.
func (a *chatAnswer) blocks() []messageBlock {
	var blocks []messageBlock
	if len(a.thoughts) > 0 {
		blocks = append(blocks, messageBlock{
			begun: object{"type": "thinking", "thinking": "", "signature": ""}, pieces: a.thoughts, delta: "thinking_delta", member: "thinking",
			fill: func(b object) { b["thinking"], b["signature"] = strings.Join(a.thoughts, ""), thoughtSignature },
		})
	}
	if a.tool == "" {
		return append(blocks, messageBlock{
			begun: object{"type": "text", "text": ""}, pieces: a.pieces, delta: "text_delta", member: "text",
			fill: func(b object) { b["text"] = a.text() },
		})
	}
	return append(blocks, messageBlock{
		begun:  object{"type": "tool_use", "id": a.callID, "name": a.tool, "input": object{}},
		pieces: a.pieces, delta: "input_json_delta", member: "partial_json",
		fill: func(b object) { b["input"] = json.RawMessage(a.text()) },
	})
}

// streamMessage sends the answer as the events of the Messages API.
func (c *chatRequest) streamMessage(events *eventStream, answer *chatAnswer) {
	send := func(name string, event object) {
		event["type"] = name
		events.send(name, event)
	}
	send("message_start", object{"message": c.messageBegun()})
	send("ping", object{})
	for i, b := range answer.blocks() {
		send("content_block_start", object{"index": i, "content_block": b.begun})
		for piece := range events.pace(b.pieces) {
			send("content_block_delta", object{"index": i, "delta": object{"type": b.delta, b.member: piece}})
		}
		if b.delta == "thinking_delta" {
			send("content_block_delta", object{"index": i, "delta": object{"type": "signature_delta", "signature": thoughtSignature}})
		}
		send("content_block_stop", object{"index": i})
	}
	reason, sequence := answer.stopReason()
	send("message_delta", object{"delta": object{"stop_reason": reason, "stop_sequence": sequence}, "usage": object{"output_tokens": answer.tokens()}})
	send("message_stop", object{})
}
