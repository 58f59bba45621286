package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestAClientThatTakesNoneOfAShortAnswerIsCutOff: the answer fits into the kernel's buffers, so that no write of it waits.
func TestAClientThatTakesNoneOfAShortAnswerIsCutOff(t *testing.T) {
	const timeout = time.Second
	p := serveAPI(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		answerJSON(w, 200, `{"text":"`+strings.Repeat("x", 20<<10)+`"}`)
	}, map[string]string{"WRITE_TIMEOUT": timeout.String(), "LOG_LEVEL": "info"})
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 2048) })
	}}
	c, err := dialer.DialContext(context.Background(), "tcp", strings.TrimPrefix(p.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, rawChat)
	p.stderr.await(t, `"msg":"request".*"bytes":20`) // for the proxy it is done
	done := time.Now()
	_, err = io.WriteString(c, "GET /health HTTP/1.1\r\nX-Slow: ")
	for err == nil && time.Since(done) < 20*time.Second {
		time.Sleep(20 * time.Millisecond)
		_, err = c.Write([]byte("x")) // only this shows that nobody is there any more
	}
	if took := time.Since(done); err == nil || took < timeout/2 {
		t.Errorf("after %v: %v, want the connection gone after %v", took, err, timeout)
	}
}
