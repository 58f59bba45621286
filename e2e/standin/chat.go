package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	intro   = "This is qwen-go-proxy's stand-in for Qwen, not a model."
	thought = "I repeat what the user said."

	// pacedWords is how many words of a stream come one by one. The others come at once: coding agents send prompts of
	// thousands of words, and the stand-in repeats them.
	pacedWords = 100
)

// A chatRequest is a chat completion request, with the members that the stand-in reads.
type chatRequest struct {
	Model               string        `json:"model"`
	Messages            []chatMessage `json:"messages"`
	N                   int           `json:"n"`
	MaxTokens           int           `json:"max_tokens"`
	MaxCompletionTokens int           `json:"max_completion_tokens"`
	Stop                stringList    `json:"stop"`
	Stream              bool          `json:"stream"`
	StreamOptions       struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
	EnableThinking bool           `json:"enable_thinking"`
	Tools          []functionTool `json:"tools"`
	ToolChoice     toolChoice     `json:"tool_choice"`
	ResponseFormat struct {
		Type       string `json:"type"`
		JSONSchema struct {
			Schema any `json:"schema"`
		} `json:"json_schema"`
	} `json:"response_format"`
}

type chatMessage struct {
	Role    string      `json:"role"`
	Content chatContent `json:"content"`
}

// A chatContent is a message's content: a string, or an array of parts whose texts are joined. The types of the parts
// are those of all three APIs.
type chatContent struct {
	text   string
	images int
	result bool // it has a tool's result
}

func (c *chatContent) UnmarshalJSON(b []byte) error {
	if json.Unmarshal(b, &c.text) == nil {
		return nil
	}
	var parts []struct {
		Type    string      `json:"type"`
		Text    string      `json:"text"`
		Content chatContent `json:"content"`
	}
	if json.Unmarshal(b, &parts) != nil {
		return errors.New("content must be a string or an array of parts")
	}
	var texts []string
	for _, part := range parts {
		switch part.Type {
		case "text", "input_text", "output_text":
			texts = append(texts, part.Text)
		case "image_url", "input_image", "image":
			c.images++
		case "tool_result":
			texts = append(texts, part.Content.text)
			c.result = true
		}
	}
	c.text = strings.Join(texts, " ")
	return nil
}

// A stringList is a string or an array of strings. null is an empty one.
type stringList []string

func (s *stringList) UnmarshalJSON(b []byte) error {
	if bytes.HasPrefix(b, []byte(`"`)) {
		b = slices.Concat([]byte("["), b, []byte("]"))
	}
	return json.Unmarshal(b, (*[]string)(s))
}

// chat answers a chat completion request.
func (s *standIn) chat(w http.ResponseWriter, r *http.Request) *apiError {
	c := &chatRequest{N: 1, MaxTokens: math.MaxInt, MaxCompletionTokens: math.MaxInt} // null keeps these values
	if failure := s.read(w, r, c); failure != nil {
		return failure
	}
	switch {
	case c.Model == "":
		return invalidRequest("model", "missing_required_parameter", "model is missing.")
	case len(c.Messages) == 0:
		return invalidRequest("messages", "missing_required_parameter", "messages must hold a message at least.")
	case c.N < 1 || c.N > 8:
		return invalidRequest("n", "invalid_value", "n must be between 1 and 8.")
	case c.MaxTokens < 1:
		return invalidRequest("max_tokens", "invalid_value", "max_tokens must be 1 at least.")
	case c.MaxCompletionTokens < 1:
		return invalidRequest("max_completion_tokens", "invalid_value", "max_completion_tokens must be 1 at least.")
	}
	answer, failure := s.answer(c)
	if failure != nil {
		return failure
	}
	if c.Stream {
		c.stream(s.newStream(w, r, c.Model), answer)
		return nil
	}
	choices := make([]object, c.N)
	for i := range choices {
		choices[i] = object{"index": i, "message": answer.message(), "finish_reason": answer.finish}
	}
	writeJSON(w, http.StatusOK, object{
		"id": "chatcmpl-" + rand.Text(), "object": "chat.completion", "created": time.Now().Unix(), "model": c.Model,
		"choices": choices, "usage": c.usage(answer),
	})
	return nil
}

// answer returns the answer to c, or the failure that its model's name asks for.
func (s *standIn) answer(c *chatRequest) (*chatAnswer, *apiError) {
	if failure := fault(c.Model); failure != nil {
		return nil, failure
	}
	answer, failure := c.answer()
	if failure != nil {
		return nil, failure
	}
	if c.Model == breakingModel && !c.Stream {
		panic(http.ErrAbortHandler)
	}
	s.mu.Lock()
	s.counted.chats++
	s.mu.Unlock()
	return answer, nil
}

// An eventStream sends server-sent events, and the pieces of an answer at the pace of the stand-in.
type eventStream struct {
	ctx    context.Context
	w      http.ResponseWriter
	delay  time.Duration
	breaks bool // in the middle
	sent   int  // pieces so far
}

// newStream begins the stream that answers r.
func (s *standIn) newStream(w http.ResponseWriter, r *http.Request, model string) *eventStream {
	w.Header().Set("Content-Type", "text/event-stream;charset=UTF-8")
	w.Header().Set("Cache-Control", "no-cache")
	return &eventStream{ctx: r.Context(), w: w, delay: s.wordDelay, breaks: model == breakingModel}
}

// send sends one event. name may be "".
func (e *eventStream) send(name string, data object) {
	b, _ := json.Marshal(data) // strings and numbers alone always marshal
	if name != "" {
		fmt.Fprintf(e.w, "event: %s\n", name)
	}
	fmt.Fprintf(e.w, "data: %s\n\n", b)
	_ = http.NewResponseController(e.w).Flush() // a client that has left ends ctx
}

// pace returns the pieces with pauses between them, until the client has left.
func (e *eventStream) pace(pieces []string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, piece := range pieces {
			if e.sent == 2 && e.breaks {
				panic(http.ErrAbortHandler)
			}
			if e.sent > 0 && e.sent < pacedWords {
				select {
				case <-e.ctx.Done():
					return
				case <-time.After(e.delay):
				}
			}
			if e.sent++; !yield(piece) {
				return
			}
		}
	}
}

// stream sends answer as chunks of a chat completion.
func (c *chatRequest) stream(events *eventStream, answer *chatAnswer) {
	id, created := "chatcmpl-"+rand.Text(), time.Now().Unix()
	send := func(choices []object, usage any) {
		chunk := object{"id": id, "object": "chat.completion.chunk", "created": created, "model": c.Model, "choices": choices}
		if c.StreamOptions.IncludeUsage {
			chunk["usage"] = usage
		}
		events.send("", chunk)
	}
	sendDelta := func(delta object, finish any) {
		for i := range c.N {
			send([]object{{"index": i, "delta": delta, "finish_reason": finish}}, nil)
		}
	}

	sendDelta(object{"role": "assistant", "content": ""}, nil)
	for piece := range events.pace(answer.thoughts) {
		sendDelta(object{"content": nil, "reasoning_content": piece}, nil)
	}
	if answer.tool != "" { // a call begins with its name, and its arguments follow
		sendDelta(object{"tool_calls": []object{{
			"index": 0, "id": answer.callID, "type": "function", "function": object{"name": answer.tool, "arguments": ""},
		}}}, nil)
	}
	for piece := range events.pace(answer.pieces) {
		if answer.tool == "" {
			sendDelta(object{"content": piece}, nil)
		} else {
			sendDelta(object{"tool_calls": []object{{"index": 0, "function": object{"arguments": piece}}}}, nil)
		}
	}
	sendDelta(object{}, answer.finish)
	if c.StreamOptions.IncludeUsage {
		send([]object{}, c.usage(answer))
	}
	fmt.Fprint(events.w, "data: [DONE]\n\n")
}

// A chatAnswer is what each choice of a chat completion holds: a text, or a call of a tool.
type chatAnswer struct {
	thoughts []string // word by word; empty if thinking was not asked for
	pieces   []string // of the text, word by word, or of the call's arguments, in JSON
	tool     string   // the function's name; "" for a text
	callID   string
	finish   string // the finish_reason: stop, length or tool_calls
	stop     string // the stop sequence that ended the text; "" for none
}

// text returns the answer in one piece.
func (a *chatAnswer) text() string { return strings.Join(a.pieces, "") }

// tokens counts pieces for tokens.
func (a *chatAnswer) tokens() int { return len(a.thoughts) + len(a.pieces) }

// wordPattern matches a word with the white space before it, and white space at the end: the matches together are the
// whole text.
var wordPattern = regexp.MustCompile(`\s*\S+|\s+$`)

// answer returns the answer to c: a tool call if c allows one, else a text.
func (c *chatRequest) answer() (*chatAnswer, *apiError) {
	tool, failure := c.tool()
	if failure != nil {
		return nil, failure
	}
	a := &chatAnswer{finish: "stop"}
	if c.EnableThinking {
		a.thoughts = wordPattern.FindAllString(thought, -1)
	}
	if tool != nil {
		a.tool, a.callID, a.finish = tool.name, "call_"+rand.Text(), "tool_calls"
		a.pieces = toolArguments(tool.schema, c.said().text)
		return a, nil
	}

	text := c.text()
	for _, stop := range c.Stop {
		if before, _, found := strings.Cut(text, stop); found && stop != "" {
			text, a.stop = before, stop
		}
	}
	a.pieces = wordPattern.FindAllString(text, -1)
	if limit := min(c.MaxTokens, c.MaxCompletionTokens); len(a.pieces) > limit {
		a.pieces, a.finish, a.stop = a.pieces[:limit], "length", ""
	}
	return a, nil
}

// text returns the answer as a sentence, or as JSON if response_format says so.
func (c *chatRequest) text() string {
	said := c.said()
	text := fmt.Sprintf(`%s You said: "%s"`, intro, said.text)
	if said.images > 0 {
		text += fmt.Sprintf(" Images sent along: %d.", said.images)
	}
	if last := c.Messages[len(c.Messages)-1]; last.Role == "tool" {
		text = fmt.Sprintf(`%s The tool answered: "%s"`, intro, last.Content.text)
	}
	switch c.ResponseFormat.Type {
	case "json_schema":
		return marshalText(exampleObject(c.ResponseFormat.JSONSchema.Schema, said.text))
	case "json_object":
		return marshalText(object{"answer": text})
	default:
		return text
	}
}

// said returns the content of the user's last message. It is empty if there is none.
func (c *chatRequest) said() chatContent {
	for _, m := range slices.Backward(c.Messages) {
		if m.Role == "user" {
			return m.Content
		}
	}
	return chatContent{}
}

// usage counts words for tokens.
func (c *chatRequest) usage(answer *chatAnswer) object {
	prompt, completion := c.promptTokens(), c.N*answer.tokens()
	usage := object{"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
	if thoughts := len(answer.thoughts); thoughts > 0 {
		usage["completion_tokens_details"] = object{"reasoning_tokens": c.N * thoughts}
	}
	return usage
}

// promptTokens counts the words of the messages.
func (c *chatRequest) promptTokens() int {
	n := 0
	for _, m := range c.Messages {
		n += len(strings.Fields(m.Content.text))
	}
	return n
}

// message returns the answer as the message of a chat completion.
func (a *chatAnswer) message() object {
	m := object{"role": "assistant", "content": a.text()}
	if a.tool != "" {
		m["content"] = nil
		m["tool_calls"] = []object{{"id": a.callID, "type": "function", "function": object{"name": a.tool, "arguments": a.text()}}}
	}
	if len(a.thoughts) > 0 {
		m["reasoning_content"] = strings.Join(a.thoughts, "")
	}
	return m
}
