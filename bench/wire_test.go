//go:build linux

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func TestReadHead(t *testing.T) {
	tests := map[string]struct {
		text string
		want head
		rest string
	}{
		"a request":            {"POST /x HTTP/1.1\r\nHost: a\r\ncontent-length:  12 \r\n\r\nbody", head{length: 12}, "body"},
		"an answer":            {"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", head{status: 200}, ""},
		"chunks":               {"HTTP/1.1 429 Too Many\r\nTRANSFER-ENCODING: Chunked\r\n\r\n5", head{status: 429, length: -1, chunked: true}, "5"},
		"neither":              {"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n", head{status: 200, length: -1, close: true}, ""},
		"no reason":            {"HTTP/1.1 204\r\n\r\n", head{status: 204, length: -1}, ""},
		"names of that length": {"HTTP/1.1 200 OK\r\nX-Content-Lengt: 3\r\nXxxxxxxxxx: close\r\n\r\n", head{status: 200, length: -1}, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			br := bufio.NewReader(iotest.OneByteReader(strings.NewReader(test.text)))
			got, err := readHead(br)
			if err != nil || got != test.want {
				t.Errorf("readHead = %+v, %v; want %+v", got, err, test.want)
			}
			if rest, _ := io.ReadAll(br); string(rest) != test.rest {
				t.Errorf("it left %q, want %q", rest, test.rest)
			}
		})
	}
	for text, want := range map[string]error{
		"":                            io.EOF,
		"HTTP/1.1 2":                  io.ErrUnexpectedEOF,
		"HTTP/1.1 200 OK\r\nConte":    io.ErrUnexpectedEOF,
		"HTTP/1.1 200 OK\r\nA: b\r\n": io.ErrUnexpectedEOF,
	} {
		if _, err := readHead(bufio.NewReader(strings.NewReader(text))); err != want {
			t.Errorf("readHead of %q: %v, want %v", text, err, want)
		}
	}
	for _, text := range []string{"HTTP/1.1\r\n\r\n", "HTTP/1.1 abc\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"} {
		if h, err := readHead(bufio.NewReader(strings.NewReader(text))); err == nil {
			t.Errorf("readHead of %q = %+v, want an error", text, h)
		}
	}
}

func TestReadWhole(t *testing.T) {
	const want = "hello, world"
	tests := map[string]struct {
		answer string
		ok     bool
	}{
		"a length":         {"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello, world", true},
		"chunks":           {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n7;x=y\r\n, world\r\n0\r\n\r\n", true},
		"too few":          {"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\nhello, worl", false},
		"too many":         {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nd\r\nhello, world!\r\n0\r\n\r\n", false},
		"cut":              {"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello, w", false},
		"no last chunk":    {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nc\r\nhello, world\r\n", false},
		"no trailer's end": {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nc\r\nhello, world\r\n0\r\n", false},
		"another text":     {"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\nhello, World", false},
		"another status":   {"HTTP/1.1 429 No\r\nContent-Length: 12\r\n\r\nhello, world", false},
		"a last answer":    {"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 12\r\n\r\nhello, world", false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			br := bufio.NewReader(strings.NewReader(test.answer))
			h, err := readHead(br)
			if err == nil {
				err = readWhole(br, h, []byte(want), make([]byte, len(want)+1))
			}
			if (err == nil) != test.ok {
				t.Errorf("readWhole: %v, want an error: %t", err, !test.ok)
			}
			if rest, _ := io.ReadAll(br); test.ok && len(rest) > 0 {
				t.Errorf("it left %q for the next answer", rest)
			}
		})
	}
}

func TestRequestHasItsSizeAndSpec(t *testing.T) {
	for _, size := range []int{smallBody, largeBody} {
		want := spec{chunks: 12, every: 10 * time.Millisecond, burst: 3, hold: true}
		req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(request("127.0.0.1:80", size, want))))
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(req.Body)
		if err != nil || len(body) != size || !json.Valid(body) {
			t.Errorf("a body of %d bytes, valid: %t, %v; want %d", len(body), json.Valid(body), err, size)
		}
		if got, err := parseSpec(body[:specReach]); err != nil || got != want {
			t.Errorf("parseSpec = %+v, %v; want %+v", got, err, want)
		}
	}
	if s, err := parseSpec([]byte(`{"user":"someone"}`)); err == nil {
		t.Errorf("parseSpec of another request = %+v, want an error", s)
	}
}

func TestEvents(t *testing.T) {
	const stamp = 123456789 * time.Microsecond
	event := appendEvent(nil, 7, stamp)
	if text := strings.TrimPrefix(string(event), "data: "); !json.Valid([]byte(text)) || !strings.HasSuffix(text, "}\n\n") {
		t.Errorf("the event %q is not one of JSON", event)
	}
	if len(event) != eventSize {
		t.Errorf("an event of %d bytes, want %d", len(event), eventSize)
	}
	if got, err := checkEvent(event, 7, nil); err != nil || got != stamp {
		t.Errorf("checkEvent = %v, %v; want %v", got, err, stamp)
	}
	for i := range event {
		if wrong := bytes.Clone(event); i < len(eventMark) || i >= len(eventMark)+19 { // any stamp will do
			wrong[i] ^= 1
			if _, err := checkEvent(wrong, 7, nil); err == nil {
				t.Errorf("checkEvent takes %q", wrong)
			}
		}
	}
	if _, err := checkEvent(event, 8, nil); err == nil {
		t.Error("checkEvent takes an event for another")
	}
}

func TestReadEventSkipsComments(t *testing.T) {
	text := ": keep-alive\n\naaaa: more\nof it\n\n:\n\nbbbb"
	var got []string
	r := iotest.HalfReader(strings.NewReader(text))
	b := make([]byte, 4)
	for readEvent(r, b) == nil {
		got = append(got, string(b))
	}
	if want := []string{"aaaa", "bbbb"}; !reflect.DeepEqual(got, want) {
		t.Errorf("events %q, want %q", got, want)
	}
	for text, want := range map[string]error{"": io.EOF, "aa": io.ErrUnexpectedEOF, "a": io.ErrUnexpectedEOF, ": x\n": io.EOF} {
		if err := readEvent(strings.NewReader(text), b); err != want {
			t.Errorf("readEvent of %q: %v, want %v", text, err, want)
		}
	}
}
