package main

import (
	"bytes"
	"cmp"
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
	// perRequest is what a request with a larger body takes beside it: connections, goroutines, and buffers for copying.
	perRequest = 96 << 10
	// The last eighth of MAX_BUFFERED_BYTES is for the first smallShare of each body, so that large bodies don't keep small
	// ones out.
	smallShare = 64 << 10
	// Buffers of spareSize are kept for the next body. They are at most maxSpares, and not charged while nobody uses them.
	spareSize = 256 << 10
	maxSpares = 32
	// largestBody bounds MAX_BODY_BYTES: address space is reserved for a body of unknown length.
	largestBody = min(64<<30, math.MaxInt) - 1
	// In each READ_TIMEOUT readQuantum of a body has to arrive, and a sixteenth of what is there already.
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
	return bodyReader{max: largest, timeout: cfg.readTimeout, memory: newBufferMemory(cfg.maxBuffered, largest)}
}

// A requestBody is a request's body in memory, with the changes that the proxy makes to it. Its readers may outlive it.
type requestBody struct {
	buffer
	edits []edit
	size  int64 // of what goes to Qwen, once sealed

	mu       sync.Mutex // guards the buffer against the readers, and what follows
	pieces   [][]byte   // what goes to Qwen; nil before seal and after release
	latest   *bodyUse   // the reader opened last; nil before the first
	answered bool       // no reader will be opened any more
}

// An edit puts text in the place of the bytes from start to end.
type edit struct {
	start, end int
	text       []byte
}

// read reads r's body to its end. The caller releases it. The error is an *apiError.
func (b *bodyReader) read(w http.ResponseWriter, r *http.Request) (*requestBody, error) {
	body := &requestBody{buffer: buffer{memory: b.memory}}
	if err := b.fill(body, w, r); err != nil {
		body.release()
		closeAfter(w, r)
		return nil, err
	}
	return body, nil
}

func (b *bodyReader) fill(body *requestBody, w http.ResponseWriter, r *http.Request) error {
	for _, coding := range r.Header["Content-Encoding"] {
		if coding != "" && !strings.EqualFold(coding, "identity") {
			return &apiError{status: http.StatusUnsupportedMediaType, typ: typeInvalidRequest, code: "compressed_body",
				message: "The request body is compressed (Content-Encoding). Send it uncompressed."}
		}
	}
	if r.ContentLength > b.max {
		return b.tooLarge()
	}
	length := r.ContentLength
	if length < 0 {
		length = b.max
	}
	rc := http.NewResponseController(w)
	due := 0 // the length at which the deadline moves
	if r.ProtoMajor == 1 {
		due = readQuantum // the exchange began with a deadline
	}
	err := body.fill(r.Body, length, func(n int) {
		if n >= due {
			rc.SetReadDeadline(time.Now().Add(b.timeout))
			due = n + max(readQuantum, n/16)
		}
	})
	// A deadline that is left would end the request while the answer streams. In HTTP/2 its timer also holds a stream that was
	// reset. In HTTP/1 the rest of a body that failed needs it.
	if err == nil || r.ProtoMajor == 2 {
		rc.SetReadDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return nil
	case err == errTooLong:
		return b.tooLarge()
	case err == errOverloaded:
		return err
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &apiError{status: http.StatusRequestTimeout, typ: typeInvalidRequest, code: "request_timeout",
			message: fmt.Sprintf("The request body came too slowly. In each %v (READ_TIMEOUT) at least %d bytes have to arrive, and of a large body a sixteenth of what has arrived before.", b.timeout, readQuantum)}
	}
	return &apiError{status: http.StatusBadRequest, typ: typeInvalidRequest, code: "broken_body",
		message: "The request body broke off or is malformed. Send the request again.", err: err}
}

// closeAfter closes the connection behind an answer to a request whose body was not read to its end.
func closeAfter(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor == 1 { // in HTTP/2 it would end the other streams too
		w.Header()["Connection"] = valueClose
	}
}

func (b *bodyReader) tooLarge() *apiError {
	return &apiError{status: http.StatusRequestEntityTooLarge, typ: typeInvalidRequest, code: "request_too_large",
		message: fmt.Sprintf("The request body is larger than %d bytes. Send less, or raise MAX_BODY_BYTES on the proxy.", b.max)}
}

// replace puts text in the place of the bytes from start to end of what was read.
func (body *requestBody) replace(start, end int, text []byte) {
	body.edits = append(body.edits, edit{start, end, text})
}

// seal ends the changes. Edits at one place keep their order.
func (body *requestBody) seal() {
	slices.SortStableFunc(body.edits, func(a, b edit) int { return cmp.Or(a.start-b.start, a.end-b.end) })
	add := func(piece []byte) {
		if len(piece) > 0 {
			body.pieces = append(body.pieces, piece)
			body.size += int64(len(piece))
		}
	}
	at := 0
	for _, e := range body.edits {
		add(body.data[at:e.start])
		add(e.text)
		at = e.end
	}
	add(body.data[at:])
	body.edits = nil
	if body.mapped == nil && len(body.pieces) > 1 {
		body.pieces = [][]byte{bytes.Join(body.pieces, nil)}
	}
}

// open returns a new reader of what goes to Qwen.
func (body *requestBody) open() io.ReadCloser {
	body.mu.Lock()
	defer body.mu.Unlock()
	if body.mapped == nil && len(body.pieces) == 1 {
		// net/http sends header and body in one write where it knows the reader to be in memory. That takes a
		// system call less, and a connection that turns out dead then shows it before anything is sent.
		return io.NopCloser(bytes.NewReader(body.pieces[0]))
	}
	body.latest = &bodyUse{body: body, left: body.size}
	return body.latest
}

// answer says that Qwen's answer has begun, so that nothing is sent again. The body goes as soon as its last reader has
// read it: an answer may come before that.
func (body *requestBody) answer() {
	body.mu.Lock()
	defer body.mu.Unlock()
	body.answered = true
	body.releaseIfRead()
}

func (body *requestBody) releaseIfRead() {
	if body.answered && (body.latest == nil || body.latest.left == 0 || body.latest.closed) {
		body.free()
	}
}

// release gives the memory back. Readers that are still open fail.
func (body *requestBody) release() {
	body.mu.Lock()
	defer body.mu.Unlock()
	body.free()
}

func (body *requestBody) free() {
	body.pieces, body.edits = nil, nil
	body.buffer.release()
}

// A bodyUse is one reader of a requestBody. A transport may hold it after the answer has ended, and may close it
// in the middle of a read.
type bodyUse struct {
	body *requestBody

	// Guarded by body.mu.
	piece, at int   // what to read next
	left      int64 // bytes
	buffer    int   // the size of the transport's buffer, if it is larger than perRequest allows for
	closed    bool
}

func (u *bodyUse) Read(p []byte) (int, error) {
	u.body.mu.Lock()
	defer u.body.mu.Unlock()
	pieces := u.body.pieces
	switch {
	case u.left == 0:
		return 0, io.EOF
	case u.closed || pieces == nil:
		return 0, os.ErrClosed
	}
	if more := len(p) - u.buffer; more > 0 && len(p) > 32<<10 {
		// HTTP/2 reads into a frame as large as the peer takes it, of up to 512 KiB.
		u.buffer = len(p)
		if err := u.body.charge(more); err != nil {
			return 0, err
		}
	}
	n := copy(p, pieces[u.piece][u.at:])
	if u.at += n; u.at == len(pieces[u.piece]) {
		u.piece, u.at = u.piece+1, 0
	}
	u.left -= int64(n)
	u.body.releaseIfRead()
	return n, nil
}

func (u *bodyUse) Close() error {
	u.body.mu.Lock()
	defer u.body.mu.Unlock()
	u.closed = true
	u.body.releaseIfRead()
	return nil
}

// A bufferMemory is MAX_BUFFERED_BYTES, of which buffers take their parts.
type bufferMemory struct {
	all   int64        // bytes of all buffers
	large int64        // of those, what buffers may use beyond their first smallShare
	held  atomic.Int64 // bytes in use

	spares chan []byte // those not in use; nil is one that is yet to be made
}

// newBufferMemory returns memory of size bytes. There is always room for a body of largest bytes.
func newBufferMemory(size, largest int64) *bufferMemory {
	m := &bufferMemory{large: max(size-size/8, largest+perRequest+smallShare), spares: make(chan []byte, maxSpares)}
	m.all = max(size, m.large)
	for range maxSpares {
		m.spares <- nil
	}
	return m
}

var (
	errTooLong    = errors.New("longer than allowed")
	errOverloaded = &apiError{status: http.StatusServiceUnavailable, typ: typeServer, code: "overloaded", retryAfter: time.Second,
		message: "The proxy's memory for requests is full (MAX_BUFFERED_BYTES). Try again in a moment."}
)

// A buffer holds what has come over the network. It is outside of Go's heap unless it is small: the collector
// would let the heap grow to twice the buffers' size.
type buffer struct {
	memory *bufferMemory
	data   []byte
	room   int    // how long data may get; this much is charged
	mapped []byte // memory outside of the heap that data is in; nil if it is small
	spare  bool   // mapped is one of memory's spares
	held   int64  // bytes charged
}

// fill reads src, of at most length bytes, to its end. It calls before with the number of bytes read so far before each
// Read. The error is errTooLong, errOverloaded, or src's.
func (b *buffer) fill(src io.Reader, length int64, before func(n int)) error {
	for {
		before(len(b.data))
		if len(b.data) == b.room {
			if err := b.grow(length + 1); err != nil { // one more byte shows that it is too long
				return err
			}
		}
		n, err := src.Read(b.data[len(b.data):b.room])
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

// grow makes room for more of what has size bytes at most. What is charged goes by what has come, not by the size.
func (b *buffer) grow(size int64) error {
	switch {
	case b.room == 0:
		b.room = int(min(size, smallBody))
		b.data = make([]byte, 0, b.room)
		return b.charge(smallBody)
	case b.mapped == nil:
		if err := b.charge(perRequest); err != nil {
			return err
		}
		if err := b.mapMemory(int(size)); err != nil {
			return errOverloaded
		}
		b.data = append(b.mapped[:0], b.data...)
	}
	more := min(max(b.room, 16<<10-b.room), 64<<10, int(size)-b.room)
	b.room += more
	return b.charge(more)
}

func (b *buffer) mapMemory(size int) (err error) {
	if size <= spareSize {
		size = spareSize
		select {
		case b.mapped = <-b.memory.spares:
			b.spare = true
		default: // all are in use
		}
	}
	if b.mapped == nil {
		b.mapped, err = mapMemory(size)
	}
	return err
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
	b.memory.held.Add(-b.held)
	switch {
	case b.spare:
		b.memory.spares <- b.mapped
	case b.mapped != nil:
		unmapMemory(b.mapped)
	}
	*b = buffer{memory: b.memory}
}
