package main

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// readBody has b read a body that comes from r.
func readBody(b *bodyReader, r io.Reader) (*requestBody, error) {
	return b.read(&discard{http.Header{}}, httptest.NewRequest("POST", "/", r))
}

func TestBodiesShareABudget(t *testing.T) {
	b := &bodyReader{max: 40000, budget: 50000, timeout: time.Minute}
	text := strings.Repeat("x", 30000)
	r, w := io.Pipe()
	var first *requestBody
	var firstErr error
	var reading sync.WaitGroup
	reading.Go(func() { first, firstErr = readBody(b, r) })
	io.WriteString(w, text) // returns when it has been read: 32768 bytes are in use then

	_, err := readBody(b, strings.NewReader(text))
	if e, ok := errors.AsType[*apiError](err); !ok || e.status != http.StatusServiceUnavailable || e.retryAfter == 0 {
		t.Errorf("over the budget: %v, want a 503 with Retry-After", err)
	}
	w.Close()
	reading.Wait()
	if firstErr != nil || string(first.data) != text {
		t.Fatalf("the one that was there first: %v", firstErr)
	}
	first.release()
	second, err := readBody(b, strings.NewReader(text))
	if err != nil {
		t.Fatalf("after the first is gone: %v", err)
	}
	second.release()
	if n := b.held.Load(); n != 0 {
		t.Errorf("%d bytes are still charged", n)
	}
}

// TestABodyOutlivesItsHandler: a transport may read on, or close in the middle of a read, when the handler is
// through and its buffer would go to the next request.
func TestABodyOutlivesItsHandler(t *testing.T) {
	b := &bodyReader{max: 1 << 20, budget: 1 << 30, timeout: time.Minute}
	var wg sync.WaitGroup
	for i := range 50 {
		text := strings.Repeat(string(rune('a'+i%26)), maxCopied+1+i*1000)
		body, err := readBody(b, strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		whole, closed := body.open(), body.open()
		wg.Go(func() {
			defer whole.Close()
			var got bytes.Buffer
			if _, err := io.Copy(&got, struct{ io.Reader }{whole}); err != nil || got.String() != text {
				t.Errorf("read %d bytes of another body, or %v", got.Len(), err)
			}
		})
		wg.Go(func() { io.Copy(io.Discard, closed) })
		wg.Go(func() { closed.Close(); closed.Close() })
		body.release()
	}
	wg.Wait()
	if n := b.held.Load(); n != 0 {
		t.Errorf("%d bytes are still charged", n)
	}
}

func TestAnAnnouncedLengthReservesNothing(t *testing.T) {
	b := &bodyReader{max: 32 << 20, budget: 1 << 30, timeout: time.Minute}
	r, w := io.Pipe()
	req := httptest.NewRequest("POST", "/", r)
	req.ContentLength = 32 << 20
	var reading sync.WaitGroup
	reading.Go(func() {
		if _, err := b.read(&discard{http.Header{}}, req); err == nil {
			t.Error("a body that broke off was taken")
		}
	})
	w.Write([]byte("x"))
	if n := b.held.Load(); n > 8<<10 {
		t.Errorf("%d bytes are held for one that came", n)
	}
	w.CloseWithError(io.ErrUnexpectedEOF)
	reading.Wait()
}
