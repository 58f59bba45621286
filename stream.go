package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// errBroken ends an answer that Qwen did not finish.
var errBroken = &apiError{status: http.StatusBadGateway, typ: typeStreaming, code: "upstream_broken",
	message: "The connection to Qwen broke in the middle of its answer. Try again."}

// An upstreamBody is the body of Qwen's answer as it comes. It bounds Qwen's silences: every byte counts, whatever
// becomes of it. A client that takes its time does not.
type upstreamBody struct {
	io.ReadCloser
	x       *exchange
	silence *time.Timer
	limit   time.Duration
}

func (b *upstreamBody) Read(p []byte) (int, error) {
	b.silence.Reset(b.limit)
	defer b.silence.Stop()
	n, err := b.ReadCloser.Read(p)
	if n > 0 && b.x.firstByte.IsZero() {
		b.x.firstByte = time.Now()
	}
	return n, err
}

// A responseBody is Qwen's answer on its way through ReverseProxy. It passes every byte as it came. An answer that breaks
// off must not look whole: an event stream gets an error event, unless its last event has passed, and Read's error makes
// ReverseProxy cut the client's connection short.
type responseBody struct {
	call      *call
	res       *http.Response
	src       io.ReadCloser
	text      io.Reader // what the client gets: src, or its translation
	sse       bool
	ending    ending // looks for the answer's end; nil for none
	delimited bool   // only the connection's end ends the answer: without an ending before it, the answer is broken
	pending   []byte // to be read before src: what peek read, or the error event
	err       error  // how src ended; nil while it has not
	onClose   func() // runs at Close; nil for nothing
}

func (b *responseBody) Read(p []byte) (int, error) {
	if len(b.pending) > 0 {
		n := copy(p, b.pending)
		b.pending = b.pending[n:]
		return n, nil
	}
	if b.err != nil {
		return 0, b.err
	}
	n, err := b.text.Read(p)
	if b.ending != nil {
		b.ending.follow(p[:n])
	}
	if err == nil {
		return n, nil
	}
	if err == io.EOF && b.delimited && !b.sawEnding() {
		err = io.ErrUnexpectedEOF
	}
	if b.err = err; err == io.EOF {
		b.res.Trailer = nil // no header of the upstream's passes that is not on the list
		return n, err
	}
	e := b.broken(err)
	b.err = e
	b.call.x.fail(e)
	if b.sse && !b.sawEnding() && e.status != statusClientClosedRequest {
		// A blank line goes first: the event must not join a line that was cut.
		b.pending = append([]byte("\n\n"), b.call.errorEvent(e)...)
	}
	switch {
	case n > 0:
		return n, nil
	case len(b.pending) > 0:
		return b.Read(p)
	}
	return 0, b.err
}

// sawEnding reports whether the answer's end has passed, where anybody looks for it.
func (b *responseBody) sawEnding() bool { return b.ending != nil && b.ending.seen() }

// errorEvent returns e as an event of the stream that the client expects.
func (c *call) errorEvent(e *apiError) []byte {
	body := c.x.errorBody(e)
	if c.x.anthropic { // such a client reads the event's name
		return fmt.Appendf(nil, "event: error\ndata: %s\n\n", body)
	}
	return fmt.Appendf(nil, "data: %s\n\n", body)
}

// broken returns what the client is told of an answer that ended with err.
func (b *responseBody) broken(err error) *apiError {
	switch cause, ok := errors.AsType[*apiError](context.Cause(b.call.ctx)); {
	case ok:
		return cause // silent for too long, or shutting down
	case errors.Is(context.Cause(b.call.ctx), context.Canceled):
		return toAPIError(context.Canceled)
	}
	e := *errBroken
	e.err = b.call.token.redactError(err)
	return &e
}

func (b *responseBody) Close() error {
	if b.onClose != nil {
		b.onClose()
		b.onClose = nil
	}
	return b.src.Close()
}

// maxPeekTime bounds how long peek collects the beginning of an answer that comes in pieces.
const maxPeekTime = 10 * time.Second

// peek reads the beginning of a JSON answer, all of it where it is short, while the client can still be told
// that it is none: an HTML page, an empty body, a connection that breaks. After limit the answer passes as it comes.
func (b *responseBody) peek(buffers *copyBuffers, limit time.Duration) error {
	b.res.Body = b
	if isCompressed(b.res.Header) {
		return nil
	}
	buf := buffers.Get()
	b.onClose = func() { buffers.Put(buf) }
	began, n := time.Now(), 0
	for n < len(buf) && b.err == nil && time.Since(began) < limit {
		m, err := b.Read(buf[n:])
		n += m
		start := bytes.TrimLeft(buf[:n], " \t\r\n")
		switch {
		case len(start) > 0 && start[0] != '{' && start[0] != '[', len(start) == 0 && err == io.EOF:
			return notAnAnswer(b.res.StatusCode, nil)
		case err != nil && err != io.EOF:
			return err
		}
	}
	if b.delimited && b.err == io.EOF && !json.Valid(buf[:n]) {
		return b.broken(io.ErrUnexpectedEOF)
	}
	b.pending = buf[:n]
	if b.err == nil && n < len(buf) {
		b.res.ContentLength = -1 // ReverseProxy passes each piece on at once then
	}
	return nil
}

// endsWithConnection reports whether nothing but the connection's end tells the end of an answer (RFC 9112 §6.3, rule 8).
// Call it before anything changes res.
func endsWithConnection(res *http.Response) bool {
	return res.ProtoMajor == 1 && res.ContentLength < 0 && len(res.TransferEncoding) == 0
}

// An ending tells from an answer that passes in pieces whether it has come to its end.
type ending interface {
	follow(p []byte) // p has passed
	seen() bool      // reports whether the end has passed
}

// A doneEnding looks for the line data: [DONE], the end of a chat completion's stream.
type doneEnding struct {
	line []byte // the beginning of the line under way
	done bool
}

func (e *doneEnding) seen() bool { return e.done }

func (e *doneEnding) follow(p []byte) {
	for !e.done && len(p) > 0 {
		line, rest, ended := bytes.Cut(p, []byte("\n"))
		if len(e.line) < 16 {
			e.line = append(e.line, line[:min(len(line), 16)]...)
			data, ok := bytes.CutPrefix(e.line, []byte("data:"))
			e.done = ok && string(bytes.TrimSpace(data)) == "[DONE]"
		}
		if p = rest; ended {
			e.line = e.line[:0]
		}
	}
}

// A jsonEnding looks for the end of a JSON object or array, which it takes for correct.
type jsonEnding struct {
	open            int // brackets that are not closed yet
	quoted, escaped bool
	closed          bool // the first bracket has been closed
}

func (e *jsonEnding) seen() bool { return e.closed }

func (e *jsonEnding) follow(p []byte) {
	for _, c := range p {
		switch {
		case e.escaped:
			e.escaped = false
		case e.quoted:
			e.escaped, e.quoted = c == '\\', c != '"'
		case c == '"':
			e.quoted = true
		case c == '{', c == '[':
			e.open++
		case c == '}', c == ']':
			e.open--
			e.closed = e.open == 0
		}
	}
}
