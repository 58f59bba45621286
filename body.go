package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// firstBuffer is the capacity of a new body's buffer, which grows with what arrives and never by what
	// Content-Length announces.
	firstBuffer = 4 << 10
	// maxPooled bounds the capacity of buffers that are kept for another request.
	maxPooled = 1 << 20
	// readQuantum is how much of a body has to arrive in READ_TIMEOUT.
	readQuantum = 4 << 10
)

// A bodyReader reads requests' bodies whole, within limits. It is safe for concurrent use.
type bodyReader struct {
	max     int64         // bytes of one body
	budget  int64         // bytes of all bodies' buffers together
	timeout time.Duration // for every readQuantum bytes

	held atomic.Int64 // bytes of buffers in use
	pool sync.Pool    // of *requestBody without readers
}

// A requestBody is a request's body, in memory while anybody reads it.
type requestBody struct {
	data  []byte
	owner *bodyReader
	held  int64        // bytes charged to owner
	refs  atomic.Int32 // the handler and each open reader
}

// read reads r's body to its end. The caller releases it. The error is an *apiError.
func (b *bodyReader) read(w http.ResponseWriter, r *http.Request) (*requestBody, error) {
	for _, coding := range r.Header["Content-Encoding"] {
		if coding != "" && !strings.EqualFold(coding, "identity") {
			closeAfter(w, r)
			return nil, &apiError{status: http.StatusUnsupportedMediaType, typ: typeInvalidRequest, code: "compressed_body",
				message: "The request body is compressed (Content-Encoding). Send it uncompressed."}
		}
	}
	if r.ContentLength > b.max {
		closeAfter(w, r)
		return nil, b.tooLarge()
	}
	body, _ := b.pool.Get().(*requestBody)
	if body == nil {
		body = &requestBody{owner: b, data: make([]byte, 0, firstBuffer)}
	}
	body.refs.Store(1)
	if err := b.fill(body, w, r); err != nil {
		body.release()
		closeAfter(w, r)
		return nil, err
	}
	return body, nil
}

func (b *bodyReader) fill(body *requestBody, w http.ResponseWriter, r *http.Request) error {
	if err := body.charge(cap(body.data)); err != nil {
		return err
	}
	rc := http.NewResponseController(w)
	due := 0 // the length of data at which the deadline moves
	for {
		if len(body.data) >= due {
			rc.SetReadDeadline(time.Now().Add(b.timeout))
			due = len(body.data) + readQuantum
		}
		if len(body.data) == cap(body.data) {
			size := int(min(2*int64(cap(body.data))-1, b.max) + 1) // b.max+1 might overflow
			if err := body.charge(size); err != nil {
				return err
			}
			body.data = append(make([]byte, 0, size), body.data...)
		}
		n, err := r.Body.Read(body.data[len(body.data):cap(body.data)])
		body.data = body.data[:len(body.data)+n]
		switch {
		case int64(len(body.data)) > b.max:
			return b.tooLarge()
		case err == io.EOF:
			rc.SetReadDeadline(time.Time{}) // else it would end the request while the answer streams
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			return &apiError{status: http.StatusRequestTimeout, typ: typeInvalidRequest, code: "request_timeout",
				message: fmt.Sprintf("The request body came too slowly: at least %d bytes have to arrive in %v (READ_TIMEOUT).", readQuantum, b.timeout)}
		case err != nil:
			return &apiError{status: http.StatusBadRequest, typ: typeInvalidRequest, code: "broken_body",
				message: "The request body broke off or is malformed. Send the request again.", err: err}
		}
	}
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

// charge accounts for a buffer of the given capacity, which is about to take the place of the one there is. The byte
// by which a body may turn out too large is free, so that MAX_BUFFERED_BYTES has room for one of MAX_BODY_BYTES.
func (body *requestBody) charge(capacity int) error {
	more := min(int64(capacity), body.owner.max) - body.held
	body.held += more
	if body.owner.held.Add(more) > body.owner.budget {
		return &apiError{status: http.StatusServiceUnavailable, typ: typeServer, code: "overloaded", retryAfter: time.Second,
			message: "The proxy holds as many request bodies as it may (MAX_BUFFERED_BYTES). Try again in a moment."}
	}
	return nil
}

// replace puts with in the place of the bytes from start to end.
func (body *requestBody) replace(start, end int, with []byte) {
	body.data = slices.Replace(body.data, start, end, with...)
}

// set makes data the content. The error says that there is no room for it.
func (body *requestBody) set(data []byte) error {
	body.data = data
	return body.charge(cap(data))
}

// release ends the handler's or one reader's use of body.
func (body *requestBody) release() {
	if body.refs.Add(-1) > 0 {
		return
	}
	body.owner.held.Add(-body.held)
	body.held = 0
	if cap(body.data) <= maxPooled {
		body.data = body.data[:0]
		body.owner.pool.Put(body)
	}
}

// maxCopied is the size up to which a body is copied for its readers, in bytes: what fits into one write of net/http's. Its
// transport keeps the copy until the answer ends, which may be hours.
const maxCopied = 4 << 10

// open returns a new reader of body.
func (body *requestBody) open() io.ReadCloser {
	if len(body.data) <= maxCopied {
		// net/http sends header and body in one write where it knows the reader to be in memory. That takes a
		// system call less, and a connection that turns out dead then shows it before anything is sent.
		return io.NopCloser(bytes.NewReader(bytes.Clone(body.data)))
	}
	body.refs.Add(1)
	return &bodyUse{body: body}
}

// A bodyUse is one reader of a requestBody. A transport may hold it after its answer is through, and may
// close it in the middle of a read.
type bodyUse struct {
	body *requestBody

	mu     sync.Mutex
	read   int // bytes read so far
	closed bool
}

func (u *bodyUse) Read(p []byte) (int, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.closed:
		return 0, os.ErrClosed
	case u.read == len(u.body.data):
		return 0, io.EOF
	}
	n := copy(p, u.body.data[u.read:])
	u.read += n
	return n, nil
}

func (u *bodyUse) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.closed {
		u.closed = true
		u.body.release()
	}
	return nil
}
