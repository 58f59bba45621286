package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

// errBroken ends an answer that Qwen did not finish.
var errBroken = &apiError{status: http.StatusBadGateway, typ: typeStreaming, code: "upstream_broken",
	message: "The connection to Qwen broke in the middle of its answer. Try again."}

// An upstreamBody is the body of Qwen's answer as it comes. It cuts the call off when Qwen is silent for too long, and only
// while it waits for Qwen: a client may take its time.
type upstreamBody struct {
	io.ReadCloser
	call  *call
	count bool // look for token usage in what is read
}

func (b *upstreamBody) Read(p []byte) (int, error) {
	b.call.silence.Reset(b.call.cfg.idleTimeout)
	defer b.call.silence.Stop()
	n, err := b.ReadCloser.Read(p)
	if n > 0 && b.call.x.firstByte.IsZero() {
		b.call.x.firstByte = time.Now()
	}
	if b.count {
		b.call.x.usage.look(p[:n])
	}
	return n, err
}

// An answerBody is Qwen's answer on its way through ReverseProxy. An answer that breaks off must not look whole: Read's error
// makes ReverseProxy cut the client's connection. The client of an event stream gets an error event before that, unless the
// stream's last event has passed.
type answerBody struct {
	io.Closer // of the upstreamBody
	call      *call
	text      io.Reader // the upstreamBody, or its translation
	stream    bool      // it is an event stream that can be read
	delimited bool      // only the connection's end ends it
	end       error     // how text ended; nil while it has not
}

func (b *answerBody) Read(p []byte) (n int, err error) {
	if b.end == nil {
		// An error that comes beside data waits until the data has been passed on.
		if n, b.end = b.text.Read(p); n > 0 || b.end == nil {
			return n, nil
		}
	}
	c := b.call
	complete := b.stream && c.out.isComplete()
	if b.end == io.EOF && (complete || !b.stream || !b.delimited) {
		return 0, io.EOF
	}
	e := c.brokenBy(b.end)
	c.x.fail(e)
	if b.stream && !complete && e != errClientLeft {
		c.out.writeError(e)
	}
	return 0, e
}

func (b *answerBody) Close() error {
	if b.stream {
		b.call.metrics.streams.Add(-1)
	}
	return b.Closer.Close()
}

// checkBegin reads the first piece of a JSON answer. Its error is for an HTML page, an empty body, or a connection that broke before
// that: the client can still get a 502.
func (b *answerBody) checkBegin(status int) error {
	text := bufio.NewReaderSize(b.text, 64)
	_, err := text.Peek(1)
	begin, _ := text.Peek(text.Buffered())
	switch {
	case err == io.EOF || !mayBeJSON(begin):
		return notAnAnswer(status, nil)
	case err != nil:
		return b.call.brokenBy(err)
	}
	b.text = text
	return nil
}

// mayBeJSON reports whether a JSON object or array can begin with text.
func mayBeJSON(text []byte) bool {
	first := byteAt(text, skipSpace(text, 0))
	return first == 0 || first == '{' || first == '['
}

// A streamWriter passes Qwen's answer on to the client. Between two events of a stream that is silent it writes comments
// (WHATWG EventSource: "authors can include a comment line every 15 seconds or so").
type streamWriter struct {
	*exchange

	mu       sync.Mutex // guards all of this and the exchange's answerWriter: comments are written from another goroutine
	active   bool       // it is an event stream, and not stopped
	every    time.Duration
	beat     *time.Timer // writes a comment; nil for none
	line     []byte      // the beginning of the line under way
	blank    bool        // the last line was blank, or there was none
	last     bool        // the last event of the stream has begun
	complete bool        // it has passed
}

// start says that the answer is an event stream, and that a comment is due when the client has got nothing for every; 0 for none.
func (s *streamWriter) start(every time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.active, s.every, s.blank = true, every, true
	if every > 0 {
		s.beat = time.AfterFunc(every, s.keepAlive)
	}
}

// stop ends the comments.
func (s *streamWriter) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.active = false
	if s.beat != nil {
		s.beat.Stop()
	}
}

func (s *streamWriter) keepAlive() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.active || s.complete {
		return
	}
	if s.status != 0 && s.blank && len(s.line) == 0 {
		if _, err := io.WriteString(s.exchange, ": keep-alive\n\n"); err == nil {
			s.exchange.FlushError()
		}
	}
	s.beat.Reset(s.every)
}

func (s *streamWriter) WriteHeader(status int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exchange.WriteHeader(status)
	if s.active {
		// The client learns at once that it is served. And net/http needs much stack to write a header: here there is less on it.
		s.exchange.FlushError()
	}
}

func (s *streamWriter) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.exchange.Write(p)
	if s.active {
		s.follow(p[:n])
		if s.beat != nil {
			s.beat.Reset(s.every)
		}
	}
	return n, err
}

// writeError puts the error event for e into the stream. A blank line goes first: the event must not join a line that was cut.
func (s *streamWriter) writeError(e *apiError) {
	name := ""
	if s.anthropic { // such a client reads the event's name
		name = "event: error\n"
	}
	fmt.Fprintf(s, "\n\n%sdata: %s\n\n", name, s.errorBody(e))
	s.FlushError()
}

func (s *streamWriter) FlushError() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exchange.FlushError()
}

// isComplete reports whether the stream's last event has passed.
func (s *streamWriter) isComplete() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.complete
}

// follow notes which lines have passed, in p and before.
func (s *streamWriter) follow(p []byte) {
	const enough = 40 // bytes to know a line by
	for len(p) > 0 {
		line, rest, ended := bytes.Cut(p, []byte("\n"))
		s.line = append(s.line, line[:min(len(line), enough-len(s.line))]...)
		s.last = s.last || endsStream(s.line)
		s.complete = s.complete || s.last && string(s.line[:min(len(s.line), 4)]) == "data" && endsStream(s.line)
		if ended {
			s.blank = len(bytes.TrimSuffix(s.line, []byte("\r"))) == 0
			s.complete = s.complete || s.last && s.blank
			s.line = s.line[:0]
		}
		p = rest
	}
}

// endsStream reports whether line is from the last event of a stream: of chat completions, of messages, or of the responses API.
func endsStream(line []byte) bool {
	name, value, _ := bytes.Cut(line, []byte(":"))
	switch string(bytes.TrimSpace(value)) {
	case "[DONE]":
		return string(name) == "data"
	case "message_stop", "response.completed", "response.incomplete", "response.failed":
		return string(name) == "event"
	}
	return false
}
