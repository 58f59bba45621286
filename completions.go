package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
)

// A completion is what the translation of an answer back to a text completion needs of its request.
type completion struct {
	model string // for answers that name no model; "" if the request names none
}

// asksNothing lists the values with which a parameter that chat completions lack asks for nothing, so
// that dropping it changes nothing. logprobs is a number here, and 0 asks for the sampled token's;
// false is how chat completions spell null.
var asksNothing = []struct {
	name   string
	values []string
}{
	{"best_of", []string{"null", "0", "1"}},
	{"echo", []string{"null", "false"}},
	{"logprobs", []string{"null", "false"}},
	{"suffix", []string{"null", `""`}},
}

// newCompletion translates the body of a text completion request (OpenAI API reference, POST
// /v1/completions) to that of a chat completion request: prompt becomes the user's message, and members
// that both know, or neither, keep their order and their bytes. It does not check model and stream. The error is an
// *apiError (400) that names the param.
func newCompletion(body *requestBody) (*completion, error) {
	names := []string{"model", "messages", "prompt"}
	for _, p := range asksNothing {
		names = append(names, p.name)
	}
	found, err := findMembers(body.data, names...)
	if err != nil {
		return nil, err
	}
	model, messages, prompt, dropped := found[0], found[1], found[2], found[3:]
	if messages.end != 0 {
		return nil, invalidRequest("messages", "unsupported_parameter",
			"messages belongs to a chat completion: send it to /v1/chat/completions, or send a prompt here.")
	}
	text := singlePrompt(body.data[prompt.start:prompt.end])
	if text == nil {
		return nil, invalidRequest("prompt", "invalid_prompt",
			"prompt must be a string, or an array of exactly one string. Several prompts and token arrays are not supported: send one request for each prompt.")
	}
	end := bytes.LastIndexByte(body.data, '}')
	comma := "," // after the last member, where the messages go
	cut := func(m member) {
		if m.next == end {
			comma = ""
		}
		body.replace(m.name, m.next, nil)
	}
	cut(prompt)
	for i, m := range dropped {
		if m.end == 0 {
			continue
		}
		if p := asksNothing[i]; !slices.Contains(p.values, string(body.data[m.start:m.end])) {
			return nil, invalidRequest(p.name, "unsupported_parameter",
				"%s is not supported, because a chat endpoint serves text completions here. Leave it out.", p.name)
		}
		cut(m)
	}
	body.replace(end, end, []byte(comma+`"messages":[{"role":"user","content":`))
	body.replace(end, end, text)
	body.replace(end, end, []byte(`}]`))
	return &completion{model: modelName(body.data[model.start:model.end])}, nil
}

// singlePrompt returns the JSON of the one string that v is or, as an array, holds; nil for anything else.
func singlePrompt(v []byte) []byte {
	if byteAt(v, 0) != '[' {
		if byteAt(v, 0) != '"' {
			return nil
		}
		return v
	}
	start := skipSpace(v, 1)
	end, err := skipString(v, start)
	if err != nil || skipSpace(v, end) != len(v)-1 {
		return nil
	}
	return v[start:end]
}

// maxModel bounds the models' names that are looked at, as JSON, in bytes.
const maxModel = 1 << 10

// modelName returns the string that v is as JSON; "" if v is something else or too long for a model's name.
func modelName(v []byte) (name string) {
	if len(v) > maxModel || json.Unmarshal(v, &name) != nil {
		return ""
	}
	return name
}

// An answerHead is what chat and text completions have in common.
type answerHead struct {
	ID                string          `json:"id"`
	Object            string          `json:"object"`
	Created           json.Number     `json:"created"` // Unix seconds
	Model             string          `json:"model"`
	SystemFingerprint json.RawMessage `json:"system_fingerprint,omitempty"`
}

// A chatAnswer is a chat completion, or a chunk of one's stream.
type chatAnswer struct {
	answerHead
	Choices chatChoices     `json:"choices"`
	Usage   json.RawMessage `json:"usage"`
	Error   json.RawMessage `json:"error"` // in place of all else, when a stream fails
}

// chatChoices are at most maxChoices: decoded, a choice takes many times its size as JSON.
type chatChoices []chatChoice

const maxChoices = 128 // the most that OpenAI's API lets a request ask for

func (c *chatChoices) UnmarshalJSON(array []byte) error {
	if array[0] != '[' {
		return json.Unmarshal(array, (*[]chatChoice)(c)) // null, or an error
	}
	*c = chatChoices{}
	for i := skipSpace(array, 1); array[i] != ']'; i = skipSpace(array, i) {
		end, err := skipValue(array, i)
		if err != nil {
			return err
		}
		if len(*c) == maxChoices {
			return errors.New("too many choices")
		}
		var choice chatChoice
		if err := json.Unmarshal(array[i:end], &choice); err != nil {
			return err
		}
		*c = append(*c, choice)
		if i = skipSpace(array, end); array[i] == ',' {
			i = skipSpace(array, i+1)
		}
	}
	return nil
}

type chatChoice struct {
	Index        int          `json:"index"`
	Message      *chatContent `json:"message"` // of a whole answer
	Delta        chatContent  `json:"delta"`   // of a chunk
	FinishReason *string      `json:"finish_reason"`
}

// A chatContent is the part of a message that is its text: reasoning_content isn't.
type chatContent struct {
	Content rawString `json:"content"`
}

// A rawString is a string as it stands in JSON. null and the zero value are the empty one. Text may be megabytes, and decoding
// and encoding it would take ten times that.
type rawString []byte

func (s *rawString) UnmarshalJSON(b []byte) error {
	switch b[0] {
	case '"':
		*s = bytes.Clone(b)
	case 'n':
		*s = nil
	default:
		return errors.New("not a string")
	}
	return nil
}

func (s rawString) MarshalJSON() ([]byte, error) {
	if s == nil {
		return []byte(`""`), nil
	}
	return s, nil
}

func (s rawString) empty() bool { return len(s) <= len(`""`) }

// A textAnswer is a text completion, or a chunk of one's stream.
type textAnswer struct {
	answerHead
	Choices []textChoice    `json:"choices"`
	Usage   json.RawMessage `json:"usage,omitempty"`
}

type textChoice struct {
	Text         rawString `json:"text"`
	Index        int       `json:"index"`
	Logprobs     *struct{} `json:"logprobs"` // always null
	FinishReason *string   `json:"finish_reason"`
}

// newAnswer returns the text completion for a, as yet without choices.
func (c *completion) newAnswer(a *chatAnswer) *textAnswer {
	t := &textAnswer{answerHead: a.answerHead, Choices: make([]textChoice, 0, len(a.Choices)), Usage: a.Usage}
	t.Object = "text_completion"
	if id, ok := strings.CutPrefix(t.ID, "chatcmpl-"); ok {
		t.ID = "cmpl-" + id
	}
	if t.Model == "" {
		t.Model = c.model
	}
	return t
}

// add appends the choice with its text. Why it finished stays, but for reasons that text completions lack.
func (t *textAnswer) add(choice chatChoice, text rawString) {
	if r := choice.FinishReason; r != nil && (*r == "tool_calls" || *r == "function_call") {
		*r = "stop"
	}
	t.Choices = append(t.Choices, textChoice{Text: text, Index: choice.Index, FinishReason: choice.FinishReason})
}

// response translates a whole chat completion to a text completion. What isn't a chat completion is an
// error, which quotes nothing of it.
func (c *completion) response(chat []byte) ([]byte, error) {
	errNoChat := errors.New("the answer is not a chat completion")
	var a chatAnswer
	if err := json.Unmarshal(chat, &a); err != nil || a.Choices == nil {
		return nil, errNoChat
	}
	t := c.newAnswer(&a)
	for _, choice := range a.Choices {
		if choice.Message == nil {
			return nil, errNoChat
		}
		t.add(choice, choice.Message.Content)
	}
	return plainJSON(t)
}

// stream translates a stream of chat completion chunks (server-sent events) into one of text completion
// chunks. Read returns as soon as one event has come in whole and never waits for a second one. [DONE],
// error events, comments and fields other than data pass; lines end in \n then, whatever they ended in.
//
// After the events before it, an error of r is returned as it is. Data that isn't a chat completion chunk is an error,
// but passes after [DONE]. An event of more than maxEventBytes is an error. Neither quotes anything of the stream. The last
// event need not have its blank line.
func (c *completion) stream(r io.Reader) io.Reader {
	return &completionStream{completion: c, r: r}
}

// maxEventBytes bounds the memory for one event: 1 MiB, where a chunk takes less than 1 KiB.
const maxEventBytes = 1 << 20

// A completionStream is the reader that completion.stream returns.
type completionStream struct {
	*completion
	r   io.Reader
	buf [4096]byte

	event   []byte // the lines of the event under way, each but the last with a \n
	started bool   // the first line is over, before which a byte order mark may stand
	afterCR bool   // the last line ended in \r: a \n right behind it belongs to it
	done    bool   // [DONE] has come

	out bytes.Buffer // translated events
	err error        // what follows them
}

func (s *completionStream) Read(p []byte) (int, error) {
	for s.out.Len() == 0 {
		if s.err != nil {
			return 0, s.err
		}
		n, err := s.r.Read(s.buf[:])
		s.err = s.take(s.buf[:n])
		switch {
		case s.err != nil:
		case err == io.EOF && len(s.event) > 0:
			// The transport would have told a cut: the blank line behind the last event was left out.
			for s.err = nil; s.err == nil && len(s.event) > 0; {
				s.err = s.take([]byte("\n"))
			}
			if s.err == nil {
				s.err = io.EOF
			}
		default:
			s.err = err
		}
	}
	return s.out.Read(p)
}

// take adds b to the stream and translates each event that it completes. Lines and events are those of
// WHATWG HTML §9.2.6. A \r ends its line at once: waiting for the \n of a \r\n would hold the event back.
func (s *completionStream) take(b []byte) error {
	for len(b) > 0 {
		if s.afterCR && b[0] == '\n' {
			s.afterCR = false
			b = b[1:]
			continue
		}
		s.afterCR = false
		line, end := b, bytes.IndexAny(b, "\r\n")
		if end >= 0 {
			line = b[:end]
		}
		if len(s.event)+len(line) > maxEventBytes {
			return errors.New("the stream has an event of more than 1 MiB")
		}
		s.event = append(s.event, line...)
		if end < 0 {
			return nil
		}
		s.afterCR = b[end] == '\r'
		b = b[end+1:]
		if !s.started {
			s.started = true
			s.event = bytes.TrimPrefix(s.event, []byte("\uFEFF"))
		}
		if len(s.event) > 0 && s.event[len(s.event)-1] != '\n' {
			s.event = append(s.event, '\n')
			continue
		}
		if err := s.translate(s.event); err != nil {
			return err
		}
		s.event = s.event[:0]
	}
	return nil
}

// translate writes the translation of a whole event to s.out.
func (s *completionStream) translate(event []byte) error {
	var data, comments, fields []byte
	for line := range bytes.Lines(event) {
		name, value, _ := bytes.Cut(line[:len(line)-1], []byte(":"))
		switch string(name) {
		case "data":
			data = append(append(data, bytes.TrimPrefix(value, []byte(" "))...), '\n')
		case "":
			comments = append(comments, line...)
		default:
			fields = append(fields, line...)
		}
	}
	data = bytes.TrimSpace(data)

	var a chatAnswer
	err := json.Unmarshal(data, &a)
	// An error counts whatever else is wrong with the chunk: one that has decoded is there beside err.
	isChunk := err == nil && (a.Choices != nil || present(a.Usage))
	s.done = s.done || string(data) == "[DONE]"
	if len(data) == 0 || present(a.Error) || s.done && !isChunk {
		s.out.Write(event)
		s.out.WriteByte('\n')
		return nil
	}
	if !isChunk {
		return errors.New("the stream has data that is not a chat completion chunk")
	}
	keep := present(a.Usage)
	t := s.newAnswer(&a)
	for _, choice := range a.Choices {
		text := choice.Delta.Content
		if !text.empty() || choice.FinishReason != nil {
			keep = true
		}
		t.add(choice, text)
	}
	s.out.Write(comments)
	if keep {
		chunk, err := plainJSON(t)
		if err != nil {
			return err
		}
		s.out.Write(fields)
		s.out.WriteString("data: ")
		s.out.Write(chunk)
		s.out.WriteByte('\n')
	}
	// Nothing is left of a dropped chunk but its comments: clients take fields without data for an
	// event, whose empty data they can't parse.
	if keep || len(comments) > 0 {
		s.out.WriteByte('\n')
	}
	return nil
}

// present reports whether v, a member of an object, is there and not null.
func present(v json.RawMessage) bool {
	return len(v) > 0 && string(v) != "null"
}

// plainJSON returns the JSON of v on one line. Unlike json.Marshal it leaves <, > and & as they are.
func plainJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}
