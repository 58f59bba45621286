package main

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Sizes in bytes.
const (
	// A body of up to smallBody stays in Go's heap. net/http sends it in one write with the header.
	smallBody = 4 << 10
	// perRequest is charged for a request with a larger body: connections, goroutines and buffers for copying.
	perRequest = 96 << 10
	// The last eighth of MAX_BUFFERED_BYTES is for the first smallShare of each body, so that large bodies leave room for small ones.
	smallShare = 64 << 10
	// At most maxSpares buffers of spareSize are kept for the next body. They are not charged while they are unused.
	spareSize = 256 << 10
	maxSpares = 32
	// editRoom bytes behind a body are for what the proxy puts into it. A body that reaches into them is too long.
	editRoom = 128
	// largestBody bounds MAX_BODY_BYTES: a body of unknown length reserves as much address space.
	largestBody = min(64<<30, math.MaxInt) - editRoom
	// In each READ_TIMEOUT readQuantum of a body has to arrive, and a sixteenth of what has arrived before.
	readQuantum = 4 << 10
)

// A bodyReader reads requests' bodies whole, within limits. It is safe for concurrent use.
type bodyReader struct {
	max     int64 // bytes of one body
	timeout time.Duration
	memory  *bufferMemory
}

func newBodyReader(cfg *config) bodyReader {
	largest := min(cfg.maxBody, largestBody)
	large := max(cfg.maxBuffered-cfg.maxBuffered/8, largest+perRequest+smallShare) // a largest body always fits
	memory := &bufferMemory{all: max(cfg.maxBuffered, large), large: large, spares: make(chan []byte, maxSpares)}
	return bodyReader{max: largest, timeout: cfg.readTimeout, memory: memory}
}

// read reads r's body to its end. The caller releases it. The error is an *apiError.
func (b *bodyReader) read(x *exchange, r *http.Request) (*requestBody, error) {
	body := &requestBody{buffer: buffer{memory: b.memory}}
	if err := b.fill(&body.buffer, x, r); err != nil {
		body.release()
		if !x.http2 { // the rest of the body may still come; HTTP/2 needs no new connection
			x.Header().Set("Connection", "close")
		}
		return nil, err
	}
	if body.mapped != nil {
		body.data = body.mapped[:len(body.data)] // with the room behind it, for replace
	}
	return body, nil
}

func (b *bodyReader) fill(buf *buffer, x *exchange, r *http.Request) error {
	for _, coding := range r.Header["Content-Encoding"] {
		if coding != "" && !strings.EqualFold(coding, "identity") {
			return &apiError{status: http.StatusUnsupportedMediaType, typ: typeInvalidRequest, code: "compressed_body",
				message: "The request body is compressed (Content-Encoding). Send it uncompressed."}
		}
	}
	length := r.ContentLength
	if length < 0 {
		length = b.max
	}
	due := 0 // the deadline moves when this many bytes have come
	if !x.http2 {
		due = readQuantum // track has set the first deadline
	}
	err := errTooLong
	if length <= b.max {
		err = buf.fill(r.Body, length, func(n int) {
			if n >= due {
				x.rc.SetReadDeadline(time.Now().Add(b.timeout))
				due = n + max(readQuantum, n/16)
			}
		})
	}
	// A deadline that is left would end the request while the answer streams. In HTTP/2 its timer also holds a stream that was
	// reset. In HTTP/1 the rest of a body that failed needs it.
	if err == nil || x.http2 {
		x.rc.SetReadDeadline(time.Time{})
	}
	switch {
	case err == nil || err == errOverloaded:
		return err
	case err == errTooLong:
		return &apiError{status: http.StatusRequestEntityTooLarge, typ: typeInvalidRequest, code: "request_too_large",
			message: fmt.Sprintf("The request body is larger than %d bytes. Send less, or raise MAX_BODY_BYTES on the proxy.", b.max)}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &apiError{status: http.StatusRequestTimeout, typ: typeInvalidRequest, code: "request_timeout",
			message: fmt.Sprintf("The request body came too slowly. In each %v (READ_TIMEOUT), at least %d bytes must arrive; of a large body, a sixteenth of what has already arrived.", b.timeout, readQuantum)}
	}
	return &apiError{status: http.StatusBadRequest, typ: typeInvalidRequest, code: "broken_body",
		message: "The request body broke off or is malformed. Send the request again.", err: err}
}

// A requestBody is a request's body in memory. Its readers may outlive it.
type requestBody struct {
	buffer

	mu       sync.Mutex   // guards the buffer against the readers, and what follows
	latest   *sentRequest // the reader opened last; nil before the first
	answered bool         // no reader will be opened any more
}

// replace puts text in the place of the bytes from start to end. It must not be called after open.
func (body *requestBody) replace(start, end int, text string) {
	body.data = slices.Replace(body.data, start, end, []byte(text)...)
}

// open returns a new reader of the body.
func (body *requestBody) open() io.ReadCloser {
	body.mu.Lock()
	defer body.mu.Unlock()
	if body.mapped == nil {
		// net/http sends header and body in one write if it knows that the reader is in memory. That takes a system call less,
		// and a dead connection shows before anything is sent.
		return io.NopCloser(bytes.NewReader(body.data))
	}
	body.latest = &sentRequest{body: body, rest: body.data}
	return body.latest
}

// answerBegan says that Qwen's answer has begun: the request is not sent again. The body is released as soon as its last reader has
// read it; an answer may come before that.
func (body *requestBody) answerBegan() {
	body.mu.Lock()
	defer body.mu.Unlock()
	body.answered = true
	body.releaseIfSent()
}

func (body *requestBody) releaseIfSent() {
	if body.answered && (body.latest == nil || body.latest.closed || len(body.latest.rest) == 0) {
		body.buffer.release()
	}
}

// release gives the memory back. Readers that are still open fail.
func (body *requestBody) release() {
	body.mu.Lock()
	defer body.mu.Unlock()
	body.buffer.release()
}

// A sentRequest is one reader of a requestBody. A transport may read it after the answer has ended, and may close it in the
// middle of a read.
type sentRequest struct {
	body *requestBody

	// Guarded by body.mu.
	rest   []byte // what is not read yet
	frame  int    // the size of the transport's buffer, if it is larger than perRequest allows for
	closed bool
}

func (s *sentRequest) Read(p []byte) (int, error) {
	s.body.mu.Lock()
	defer s.body.mu.Unlock()
	switch {
	case len(s.rest) == 0:
		return 0, io.EOF
	case s.closed || s.body.data == nil:
		return 0, os.ErrClosed
	}
	if more := len(p) - s.frame; more > 0 && len(p) > 32<<10 {
		// HTTP/2 reads into a frame as large as the peer takes it, of up to 512 KiB.
		s.frame = len(p)
		if err := s.body.charge(more); err != nil {
			return 0, err
		}
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	s.body.releaseIfSent()
	return n, nil
}

func (s *sentRequest) Close() error {
	s.body.mu.Lock()
	defer s.body.mu.Unlock()
	s.closed = true
	s.body.releaseIfSent()
	return nil
}

var (
	errTooLong    = errors.New("longer than allowed")
	errOverloaded = &apiError{status: http.StatusServiceUnavailable, typ: typeServer, code: "overloaded", retryAfter: time.Second,
		message: "The proxy's memory for requests is full (MAX_BUFFERED_BYTES). Try again in a moment."}
)

// mapMemory returns memory outside of Go's heap where the system has it. unmapMemory gives it back.
var (
	mapMemory   = func(size int) ([]byte, error) { return make([]byte, size), nil }
	unmapMemory = func([]byte) {}
)

// A bufferMemory is MAX_BUFFERED_BYTES, of which buffers take their parts.
type bufferMemory struct {
	all    int64        // bytes of all buffers
	large  int64        // of those, what buffers may use beyond their first smallShare
	held   atomic.Int64 // bytes in use
	spares chan []byte  // mapped memory of spareSize that is not in use
}

// A buffer holds what has come over the network. It is outside of Go's heap unless it is small: the collector
// would let the heap grow to twice the buffers' size.
type buffer struct {
	memory *bufferMemory
	data   []byte // its capacity is charged
	mapped []byte // memory outside of the heap that data is in; nil if it is small
	held   int64  // bytes charged
}

// fill reads src, of at most length bytes, to its end. It calls before with the number of bytes read so far before each
// Read. The error is errTooLong, errOverloaded, or src's.
func (b *buffer) fill(src io.Reader, length int64, before func(n int)) error {
	for {
		before(len(b.data))
		if len(b.data) == cap(b.data) {
			if err := b.grow(int(length) + editRoom); err != nil {
				return err
			}
		}
		n, err := src.Read(b.data[len(b.data):cap(b.data)])
		b.data = b.data[:len(b.data)+n]
		switch {
		case int64(len(b.data)) > length:
			return errTooLong
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

// grow makes room for more of something that has size bytes at most. The charge goes by what has come, not by the size.
func (b *buffer) grow(size int) (err error) {
	room := cap(b.data)
	if room == 0 {
		b.data = make([]byte, 0, min(size, smallBody))
		return b.charge(smallBody)
	}
	if b.mapped == nil {
		if err := b.charge(perRequest); err != nil {
			return err
		}
		if size <= spareSize {
			select {
			case b.mapped = <-b.memory.spares:
			default:
			}
		}
		if b.mapped == nil {
			if b.mapped, err = mapMemory(max(size, spareSize)); err != nil {
				return errOverloaded
			}
		}
		copy(b.mapped, b.data)
	}
	more := min(max(room, 16<<10-room), 64<<10, size-room)
	b.data = b.mapped[: len(b.data) : room+more]
	return b.charge(more)
}

// charge accounts for n bytes more.
func (b *buffer) charge(n int) error {
	b.held += int64(n)
	limit := b.memory.all
	if len(b.data) > smallShare {
		limit = b.memory.large
	}
	if b.memory.held.Add(int64(n)) > limit {
		return errOverloaded
	}
	return nil
}

// release gives the memory back. A buffer may be released more than once.
func (b *buffer) release() {
	if len(b.mapped) == spareSize {
		select {
		case b.memory.spares <- b.mapped:
			b.mapped = nil
		default: // there are enough
		}
	}
	if b.mapped != nil {
		unmapMemory(b.mapped)
	}
	b.memory.held.Add(-b.held)
	*b = buffer{memory: b.memory}
}

// A member is where one member of a JSON object stands in its text. The zero member is not there.
type member struct {
	name       int // the index of the name's opening quote
	start, end int // the value, without the white space around it
}

// of returns the value of m in data; nil if it is not there.
func (m member) of(data []byte) []byte {
	if m.end == 0 {
		return nil
	}
	return data[m.start:m.end]
}

// findMembers finds the members called names in data, which has to be one JSON object (RFC 8259). The names are ASCII
// letters and underscores. The result has a member for each name. The error is an *apiError (400): the object is malformed,
// or has one of the names twice.
//
// It reads the outermost object alone. Inside a value it only finds the ends of strings and counts brackets, of both kinds
// together, so {"a":[1}} passes: Qwen judges what is inside values. In a valid object it finds what encoding/json finds.
func findMembers(data []byte, names ...string) ([]member, error) {
	i := skipSpace(data, 0)
	if byteAt(data, i) != '{' {
		return nil, badJSON("want a JSON object: UTF-8 text that begins with {, without a byte order mark")
	}
	found := make([]member, len(names))
	i = skipSpace(data, i+1)
	for more := byteAt(data, i) != '}'; more; {
		m := member{name: i}
		nameEnd, err := skipString(data, i)
		if err != nil {
			return nil, err
		}
		if i = skipSpace(data, nameEnd); byteAt(data, i) != ':' {
			return nil, unexpected(data, i)
		}
		m.start = skipSpace(data, i+1)
		if m.end, err = skipValue(data, m.start); err != nil {
			return nil, err
		}
		i = skipSpace(data, m.end)
		if more = byteAt(data, i) == ','; more {
			i = skipSpace(data, i+1)
		} else if byteAt(data, i) != '}' {
			return nil, unexpected(data, i)
		}
		for k, name := range names {
			if !spells(data[m.name+1:nameEnd-1], name) {
				continue
			}
			if found[k].end != 0 { // Qwen may take the other one than we do
				return nil, invalidRequest(name, "duplicate_member", "The request has %q twice. Send it once.", name)
			}
			found[k] = m
		}
	}
	if i = skipSpace(data, i+1); i < len(data) {
		return nil, badJSON("unexpected data after the JSON object at byte %d", i)
	}
	return found, nil
}

// spells reports whether text, the inside of a JSON string, stands for name.
func spells(text []byte, name string) bool {
	for _, c := range []byte(name) {
		switch {
		case len(text) == 0:
			return false
		case text[0] == c:
			text = text[1:]
		case len(text) >= 6 && text[0] == '\\' && text[1] == 'u':
			var code [2]byte
			if n, _ := hex.Decode(code[:], text[2:6]); n != 2 || code != [2]byte{0, c} {
				return false
			}
			text = text[6:]
		default: // no short escape stands for a letter
			return false
		}
	}
	return len(text) == 0
}

// skipValue returns the index after the value that starts at i. It only counts brackets: a body may be nothing but brackets.
func skipValue(data []byte, i int) (int, error) {
	start := i
	switch byteAt(data, i) {
	case '"':
		return skipString(data, i)
	case '{', '[':
		for depth := 0; i < len(data); i++ {
			switch data[i] {
			case '"':
				end, err := skipString(data, i)
				if err != nil {
					return 0, err
				}
				i = end - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1, nil
				}
			}
		}
		return 0, unexpected(data, i)
	}
	// A number, true, false or null consists of these.
	for i < len(data) && strings.IndexByte("+-.0123456789Eaeflnrstu", data[i]) >= 0 {
		i++
	}
	if i == start {
		return 0, unexpected(data, i)
	}
	return i, nil
}

// skipString returns the index after the string whose opening quote is expected at i.
func skipString(data []byte, i int) (int, error) {
	if byteAt(data, i) != '"' {
		return 0, unexpected(data, i)
	}
	for start := i + 1; ; {
		n := bytes.IndexByte(data[i+1:], '"')
		if n < 0 {
			return 0, unexpected(data, len(data))
		}
		i += 1 + n
		text := i
		for text > start && data[text-1] == '\\' {
			text--
		}
		if (i-text)%2 == 0 { // else the last backslash escapes the quote
			return i + 1, nil
		}
	}
}

// skipSpace returns the index of the first byte from i on that is not white space, or len(data).
func skipSpace(data []byte, i int) int {
	for i < len(data) && (data[i] == ' ' || data[i] == '\n' || data[i] == '\r' || data[i] == '\t') {
		i++
	}
	return i
}

// byteAt returns data[i], or 0 at the end. JSON allows no NUL outside of strings, so callers refuse both.
func byteAt(data []byte, i int) byte {
	if i < len(data) {
		return data[i]
	}
	return 0
}

// unexpected returns the error for the byte at i, or for the end of data there.
func unexpected(data []byte, i int) error {
	if i >= len(data) {
		return badJSON("unexpected end at byte %d", len(data))
	}
	return badJSON("unexpected character at byte %d", i)
}

// badJSON returns the error for a body that is malformed. The text never quotes the body.
func badJSON(format string, args ...any) error {
	return invalidRequest("", "invalid_json", "The request body can't be read: %s.", fmt.Sprintf(format, args...))
}
