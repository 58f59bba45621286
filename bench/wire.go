//go:build linux

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http/httputil"
	"strconv"
	"strings"
	"time"
)

// A head is what the bench needs to know of the head of an HTTP/1.1 message.
type head struct {
	status  int   // 0 in a request
	length  int64 // of the body; -1 where no Content-Length says it
	chunked bool
	close   bool // the connection ends behind the message
}

// readHead reads the head of a message. It is lean, not strict: the messages come from programs that keep to HTTP. The
// error is io.EOF where the connection ends before a message begins.
func readHead(br *bufio.Reader) (head, error) {
	h := head{length: -1}
	line, err := br.ReadSlice('\n')
	if err != nil {
		if err == io.EOF && len(line) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return h, err
	}
	if bytes.HasPrefix(line, []byte("HTTP/1.")) {
		if len(line) < 12 {
			return h, fmt.Errorf("status line %q", line)
		}
		if h.status, err = strconv.Atoi(string(line[9:12])); err != nil {
			return h, fmt.Errorf("status line %q", line)
		}
	}
	for {
		line, err = br.ReadSlice('\n')
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return h, err
		}
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			return h, nil
		}
		name, value, _ := bytes.Cut(line, []byte{':'})
		switch len(name) { // most headers are none of the three
		case len("Connection"):
			if bytes.EqualFold(name, []byte("Connection")) {
				h.close = bytes.EqualFold(bytes.TrimSpace(value), []byte("close"))
			}
		case len("Content-Length"):
			if bytes.EqualFold(name, []byte("Content-Length")) {
				if h.length, err = strconv.ParseInt(string(bytes.TrimSpace(value)), 10, 64); err != nil || h.length < 0 {
					return h, fmt.Errorf("header line %q", line)
				}
			}
		case len("Transfer-Encoding"):
			if bytes.EqualFold(name, []byte("Transfer-Encoding")) {
				h.chunked = bytes.EqualFold(bytes.TrimSpace(value), []byte("chunked"))
			}
		}
	}
}

// readWhole reads a body that has to be want, byte for byte. Where it is, and the connection can be used again, the error is nil.
func readWhole(br *bufio.Reader, h head, want, buf []byte) error {
	switch {
	case h.status != 200:
		text, _ := br.Peek(min(br.Buffered(), 300))
		return fmt.Errorf("status %d: %s", h.status, text)
	case h.close:
		return errors.New("the connection does not stay open")
	}
	var n int
	var err error
	if h.chunked {
		n, err = io.ReadFull(httputil.NewChunkedReader(br), buf[:len(want)+1])
		if err == io.ErrUnexpectedEOF { // shorter than want+1, as it has to be
			err = endOfChunks(br)
		}
	} else {
		if h.length != int64(len(want)) {
			return fmt.Errorf("a body of %d bytes, want %d", h.length, len(want))
		}
		n, err = io.ReadFull(br, buf[:len(want)])
	}
	if err != nil {
		return err
	}
	if !bytes.Equal(buf[:n], want) {
		return fmt.Errorf("another body than the upstream's: %.200q", buf[:n])
	}
	return nil
}

// endOfChunks reads the empty trailer behind the last chunk, which NewChunkedReader leaves.
func endOfChunks(br *bufio.Reader) error {
	line, err := br.ReadSlice('\n')
	if err == nil && len(bytes.TrimRight(line, "\r\n")) > 0 {
		err = fmt.Errorf("a trailer: %q", line)
	}
	return err
}

// A spec says what the upstream answers. It travels in the request's "user" member, which every proxy leaves alone. The zero spec
// asks for the JSON answer.
type spec struct {
	chunks int           // events of a stream, [DONE] not counted
	every  time.Duration // between two writes
	burst  int           // events in one write; 0 is 1
	hold   bool          // after half of them the upstream waits until it is told to go on
}

const specMark = `"user":"bench `

func (s spec) String() string {
	return fmt.Sprintf("bench %d %d %d %t", s.chunks, s.every, s.burst, s.hold)
}

// parseSpec finds the spec in the beginning of a request's body.
func parseSpec(body []byte) (s spec, err error) {
	_, rest, ok := bytes.Cut(body, []byte(specMark))
	if !ok {
		return s, errors.New("the request is not of the bench's: it has no spec")
	}
	_, err = fmt.Sscanf(string(rest), `%d %d %d %t`, &s.chunks, &s.every, &s.burst, &s.hold)
	return s, err
}

// answerBody is the upstream's JSON answer, of about 1 KB.
var answerBody = func() []byte {
	b, err := json.Marshal(map[string]any{
		"id": "chatcmpl-0e2a6e7c-6a0e-9a51-b2b1-3c1a63b1f0d4", "object": "chat.completion", "created": 1767225600, "model": "qwen3-coder-plus",
		"choices": []any{map[string]any{"index": 0, "finish_reason": "stop", "message": map[string]any{
			"role": "assistant", "content": prose(700)}}},
		"usage": map[string]any{"prompt_tokens": 512, "completion_tokens": 148, "total_tokens": 660, "prompt_tokens_details": map[string]any{"cached_tokens": 0}},
	})
	if err != nil {
		panic(err)
	}
	return b
}()

// appendEvent appends event k of a stream, which has eventSize bytes whatever k and the stamp are: the time when it was sent.
func appendEvent(b []byte, k int, stamp time.Duration) []byte {
	return fmt.Appendf(b, eventMark+"%019d,\"id\":\"chatcmpl-0e2a6e7c-6a0e-9a51\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,"+
		"\"model\":\"qwen3-coder-plus\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word%06d\"},\"finish_reason\":null}]}\n\n", int64(stamp), k)
}

const (
	eventMark = `data: {"stamp":1` // the 1 makes a number of the zeroes that follow
	doneEvent = "data: [DONE]\n\n"
)

var eventSize = len(appendEvent(nil, 0, 0))

// checkEvent reports an error where b is not event k as the upstream sends it. It returns when that was.
func checkEvent(b []byte, k int, scratch []byte) (stamp time.Duration, err error) {
	if len(b) == eventSize {
		n, _ := strconv.ParseInt(string(b[len(eventMark):len(eventMark)+19]), 10, 64)
		stamp = time.Duration(n)
	}
	if want := appendEvent(scratch[:0], k, stamp); !bytes.Equal(b, want) {
		return 0, fmt.Errorf("event %d arrived as %q", k, b)
	}
	return stamp, nil
}

// readEvent fills b from an event stream, without the comments that a proxy may put between two events.
func readEvent(r io.Reader, b []byte) error {
	for {
		if _, err := io.ReadFull(r, b[:1]); err != nil {
			return err
		}
		if b[0] != ':' {
			_, err := io.ReadFull(r, b[1:])
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		for last := byte(0); last != '\n' || b[0] != '\n'; {
			last = b[0]
			if _, err := io.ReadFull(r, b[:1]); err != nil {
				return err
			}
		}
	}
}

// request returns a chat completion request of size bytes of body as OpenAI's Python client sends it.
func request(host string, size int, s spec) []byte {
	type message struct {
		Role    string `json:"role"`
		Content string `json:"content"`
	}
	chat := struct {
		Model       string    `json:"model"`
		User        string    `json:"user"`
		Stream      bool      `json:"stream"`
		Temperature float64   `json:"temperature"`
		Messages    []message `json:"messages"`
	}{Model: "qwen3-coder-plus", User: s.String(), Stream: s.chunks > 0, Temperature: 0.2,
		Messages: []message{{"system", "You are a careful programmer. Answer briefly."}}}
	encode := func() []byte {
		var b bytes.Buffer
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(false)
		if err := e.Encode(chat); err != nil {
			panic(err)
		}
		return bytes.TrimSuffix(b.Bytes(), []byte{'\n'})
	}
	// A conversation of turns of some 1,500 bytes; the last one makes up the size.
	for roles := 0; len(encode()) < size-2000; roles++ {
		chat.Messages = append(chat.Messages, message{[]string{"user", "assistant"}[roles%2], code(1500)})
	}
	chat.Messages = append(chat.Messages, message{Role: "user"})
	last := &chat.Messages[len(chat.Messages)-1]
	last.Content = prose(max(size-len(encode()), 0))
	body := encode()
	return fmt.Appendf(nil, "POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"+
		"Accept: application/json\r\nContent-Type: application/json\r\nUser-Agent: OpenAI/Python 1.109.1\r\nX-Stainless-Lang: python\r\n"+
		"X-Stainless-Package-Version: 1.109.1\r\nX-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\nX-Stainless-Runtime: CPython\r\n"+
		"X-Stainless-Runtime-Version: 3.12.3\r\nAuthorization: Bearer sk-client\r\nX-Stainless-Async: false\r\nx-stainless-retry-count: 0\r\n"+
		"x-stainless-read-timeout: 600\r\nContent-Length: %d\r\n\r\n%s", host, len(body), body)
}

// prose returns n bytes of text that JSON holds as it stands.
func prose(n int) string {
	const text = "The quick answer is that the second reader never sees the value, since the first one has taken it from the channel before. "
	return strings.Repeat(text, n/len(text)+1)[:n]
}

// code returns n bytes of text with the quotes, tabs and line ends that JSON has to escape.
func code(n int) string {
	const text = "func (s *store) load(name string) ([]byte, error) {\n\tb, err := os.ReadFile(filepath.Join(s.dir, name))\n\tif err != nil {\n" +
		"\t\treturn nil, fmt.Errorf(\"load %q: %w\", name, err) // the caller says why\n\t}\n\treturn b, nil\n}\n\n"
	return strings.Repeat(text, n/len(text)+1)[:n]
}
