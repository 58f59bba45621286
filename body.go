package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
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
	if r.ContentLength > b.max {
		return nil, b.refuse(w, r, b.tooLarge())
	}
	body, _ := b.pool.Get().(*requestBody)
	if body == nil {
		body = &requestBody{owner: b, data: make([]byte, 0, firstBuffer)}
	}
	body.refs.Store(1)
	if err := b.fill(body, w, r); err != nil {
		body.release()
		return nil, b.refuse(w, r, err)
	}
	return body, nil
}

func (b *bodyReader) fill(body *requestBody, w http.ResponseWriter, r *http.Request) error {
	if err := body.charge(); err != nil {
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
			body.data = append(make([]byte, 0, min(2*int64(cap(body.data)), b.max+1)), body.data...)
			if err := body.charge(); err != nil {
				return err
			}
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

// refuse sees to it that the connection closes behind a body that was not read to its end.
func (b *bodyReader) refuse(w http.ResponseWriter, r *http.Request, err error) error {
	if r.ProtoMajor == 1 { // in HTTP/2 it would end the other streams too
		w.Header()["Connection"] = valueClose
	}
	return err
}

func (b *bodyReader) tooLarge() *apiError {
	return &apiError{status: http.StatusRequestEntityTooLarge, typ: typeInvalidRequest, code: "request_too_large",
		message: fmt.Sprintf("The request body is larger than %d bytes. Send less, or raise MAX_BODY_BYTES on the proxy.", b.max)}
}

// charge accounts for the buffer's capacity as it is now.
func (body *requestBody) charge() error {
	more := int64(cap(body.data)) - body.held
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

// set makes data the content.
func (body *requestBody) set(data []byte) { body.data = data }

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

// maxCopied is the size up to which a body is copied for its readers, in bytes.
const maxCopied = 32 << 10

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
// close it in the middle of a read; the buffer goes to another request only when both have ended.
type bodyUse struct {
	body *requestBody

	mu     sync.Mutex
	read   int // bytes read so far
	closed bool
}

// hold returns the bytes yet to be read, which stay as they are until release.
func (u *bodyUse) hold() ([]byte, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return nil, os.ErrClosed
	}
	u.body.refs.Add(1)
	return u.body.data[u.read:], nil
}

func (u *bodyUse) Read(p []byte) (int, error) {
	rest, err := u.hold()
	if err != nil {
		return 0, err
	}
	defer u.body.release()
	if len(rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, rest)
	u.read += n
	return n, nil
}

// WriteTo hands the buffer itself to w, which spares io.Copy one of its own.
func (u *bodyUse) WriteTo(w io.Writer) (int64, error) {
	rest, err := u.hold()
	if err != nil {
		return 0, err
	}
	defer u.body.release()
	n, err := w.Write(rest)
	u.read += n
	return int64(n), err
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
