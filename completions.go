package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"slices"
)

// asksNothing lists the parameters that chat completions lack, with the values that ask for nothing: those can be dropped.
// logprobs is a number here, and 0 asks for the sampled token's. false is how chat completions spell null.
var asksNothing = []struct {
	name   string
	values []string
}{
	{"best_of", []string{"null", "0", "1"}},
	{"echo", []string{"null", "false"}},
	{"logprobs", []string{"null", "false"}},
	{"suffix", []string{"null", `""`}},
}

// promptToChat translates the body of a text completion request (OpenAI API reference, POST /v1/completions) to that of a chat
// completion request. The prompt becomes the user's message. Members that both know, or neither, keep their order and their
// bytes. It does not check model and stream. The error is an *apiError (400) that names the param.
func promptToChat(body *requestBody) error {
	names := []string{"messages", "prompt"}
	for _, p := range asksNothing {
		names = append(names, p.name)
	}
	found, err := findMembers(body.data, names...)
	if err != nil {
		return err
	}
	messages, prompt, dropped := found[0], found[1], found[2:]
	if messages.end != 0 {
		return invalidRequest("messages", "unsupported_parameter",
			"\"messages\" belongs to chat completions. Send the request to /v1/chat/completions, or send a prompt here.")
	}
	start, end := singlePrompt(body.data, prompt)
	if end == 0 {
		return invalidRequest("prompt", "invalid_prompt",
			"prompt must be a string, or an array of exactly one string. Several prompts and token arrays are not supported: send one request for each prompt.")
	}
	for i, m := range dropped {
		if m.end == 0 {
			continue
		}
		if p := asksNothing[i]; !slices.Contains(p.values, string(m.of(body.data))) {
			return invalidRequest(p.name, "unsupported_parameter",
				"%s is not supported: the proxy translates text completions to chat. Leave it out.", p.name)
		}
		from, to := m.name, skipSpace(body.data, m.end)+1 // with the comma behind it
		if m.name > prompt.name {                         // it may be the last: the comma before it goes
			from, to = bytes.LastIndexByte(body.data[:m.name], ','), m.end
		}
		for ; from < to; from++ {
			body.data[from] = ' '
		}
	}
	body.replace(end, prompt.end, `}]`)
	body.replace(prompt.name, start, `"messages":[{"role":"user","content":`)
	return nil
}

// singlePrompt returns where in data the one string is that prompt is or, as an array, holds; 0, 0 for anything else.
func singlePrompt(data []byte, prompt member) (start, end int) {
	start, last := prompt.start, prompt.end
	if byteAt(data, start) == '[' {
		start, last = skipSpace(data, start+1), last-1
	}
	end, err := skipString(data, start)
	if err != nil || skipSpace(data[:last], end) != last {
		return 0, 0
	}
	return start, end
}

var errNotChat = errors.New("not a chat completion")

// maxChoices is the most that OpenAI's API lets a request ask for.
const maxChoices = 128

// translate makes a text completion of a chat completion. Each choice's text is in its member part: "message", or "delta" in a
// stream's chunk. Reasoning is not text. The result uses chat's memory. The error quotes nothing of chat.
func translate(chat []byte, part string) (text net.Buffers, err error) {
	if !json.Valid(chat) {
		return nil, errNotChat
	}
	found, err := findMembers(chat, "id", "created", "model", "choices", "usage")
	if err != nil {
		return nil, errNotChat
	}
	value := func(i int) []byte { return found[i].of(chat) }
	choices := value(3)
	if byteAt(choices, 0) != '[' {
		return nil, errNotChat
	}
	add := func(s string, value []byte) { text = append(text, []byte(s), value) }
	add(`{"id":`, orElse(value(0), `""`))
	add(`,"object":"text_completion","created":`, orElse(value(1), "0"))
	add(`,"model":`, orElse(value(2), `""`))
	add(`,"choices":[`, nil)
	for i, n := skipSpace(choices, 1), 0; choices[i] != ']'; n++ {
		end, err := skipValue(choices, i)
		if err != nil || n == maxChoices {
			return nil, errNotChat
		}
		content, index, reason, err := readChoice(choices[i:end], part)
		if err != nil {
			return nil, errNotChat
		}
		add(`{"text":`, content)
		add(`,"index":`, index)
		add(`,"logprobs":null,"finish_reason":`, reason)
		add("}", nil)
		if i = skipSpace(choices, end); choices[i] == ',' {
			add(",", nil)
			i = skipSpace(choices, i+1)
		}
	}
	add(`],"usage":`, orElse(value(4), "null"))
	add("}", nil)
	return text, nil
}

// readChoice returns what a text completion has of a choice.
func readChoice(choice []byte, part string) (content, index, reason []byte, err error) {
	found, err := findMembers(choice, part, "index", "finish_reason")
	if err != nil {
		return nil, nil, nil, err
	}
	message := found[0].of(choice)
	inside, err := findMembers(message, "content")
	if err != nil {
		return nil, nil, nil, err
	}
	if content = orElse(inside[0].of(message), `""`); content[0] != '"' {
		return nil, nil, nil, errNotChat
	}
	return content, orElse(found[1].of(choice), "0"), orElse(found[2].of(choice), "null"), nil
}

// isNull reports whether v, the value of a member, is missing or null.
func isNull(v []byte) bool { return len(v) == 0 || string(v) == "null" }

// orElse returns v, or other if v is null.
func orElse(v []byte, other string) []byte {
	if isNull(v) {
		return []byte(other)
	}
	return v
}

// maxEventBytes bounds the memory for one event: 128 KiB. A chunk takes less than 1 KiB.
const maxEventBytes = 128 << 10

// A completionStream reads a stream of chat completion chunks (server-sent events, whose lines end in LF or CRLF), translated to
// text completion chunks. Read returns as soon as one event has come in whole. Events without data, [DONE] and error events pass
// as they came, and so does data after [DONE] that is no chunk. Other data that is no chunk ends the stream with an error, and so
// does an event of more than maxEventBytes. The last event need not have its blank line.
type completionStream struct {
	lines *bufio.Reader // of the chat completion
	event []byte        // the lines of the event under way
	done  bool          // [DONE] has come
	out   bytes.Buffer  // translated events
	err   error         // what follows them
}

func (s *completionStream) Read(p []byte) (int, error) {
	for s.out.Len() == 0 {
		if s.err != nil {
			return 0, s.err
		}
		s.err = s.readLine()
	}
	return s.out.Read(p)
}

// readLine reads a line, or a part of it, and translates the event that it ends.
func (s *completionStream) readLine() error {
	line, err := s.lines.ReadSlice('\n')
	s.event = append(s.event, line...)
	if err == io.EOF && len(s.event) > 0 {
		for !endsEvent(s.event) {
			s.event = append(s.event, '\n')
		}
		err = nil
	}
	switch {
	case len(s.event) > maxEventBytes:
		return errors.New("the stream has an event of more than 128 KiB")
	case err != nil && err != bufio.ErrBufferFull:
		return err
	case !endsEvent(s.event):
		return nil
	}
	err = s.translateEvent(s.event)
	s.event = s.event[:0]
	return err
}

// endsEvent reports whether b, the end of an event stream, ends in a blank line.
func endsEvent(b []byte) bool {
	line, ok := bytes.CutSuffix(b, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	return ok && (len(line) == 0 || line[len(line)-1] == '\n')
}

// translateEvent writes the translation of a whole event to s.out.
func (s *completionStream) translateEvent(event []byte) error {
	var data, others []byte // others are the comments and the fields but data
	for line := range bytes.Lines(event) {
		switch name, value, _ := bytes.Cut(line, []byte(":")); {
		case string(name) == "data":
			data = append(append(data, bytes.TrimSpace(value)...), ' ') // in JSON, a line end is as good as a space
		case len(bytes.TrimSpace(line)) > 0:
			others = append(others, line...)
		}
	}
	data = bytes.TrimSpace(data)
	s.done = s.done || string(data) == "[DONE]"
	failed := false
	if found, err := findMembers(data, "error"); err == nil {
		failed = !isNull(found[0].of(data)) && json.Valid(data)
	}
	text, err := translate(data, "delta")
	switch {
	case len(data) == 0 || failed || err != nil && s.done:
		s.out.Write(event)
	case err != nil:
		return errors.New("the stream has data that is not a chat completion chunk")
	default:
		s.out.Write(others)
		s.out.WriteString("data: ")
		text.WriteTo(&s.out)
		s.out.WriteString("\n\n")
	}
	return nil
}
