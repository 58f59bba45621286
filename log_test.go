package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
)

// A stalledWriter takes what is written only once it is released.
type stalledWriter struct {
	release chan struct{}
	logBuffer
}

func (w *stalledWriter) Write(p []byte) (int, error) {
	<-w.release
	return w.logBuffer.Write(p)
}

func TestLogWriterWithAStalledReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dropped atomic.Int64
		w := &stalledWriter{release: make(chan struct{})}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		out := newLogWriter(ctx, w, &dropped)
		io.WriteString(out, "first\n")
		synctest.Wait() // it is being written
		line := strings.Repeat("x", 999) + "\n"
		const n = 2 * logBufferSize / 1000
		for range n {
			if wrote, err := io.WriteString(out, line); wrote != len(line) || err != nil {
				t.Fatalf("Write returned %d, %v", wrote, err)
			}
		}
		fits := (logBufferSize - len("first\n")) / len(line)
		if want := int64(n - fits); dropped.Load() != want {
			t.Errorf("%d lines dropped, want %d", dropped.Load(), want)
		}
		start := time.Now()
		out.flush(time.Second)
		if took := time.Since(start).Round(10 * time.Millisecond); took != time.Second {
			t.Errorf("flush returned after %v, want 1s", took)
		}

		close(w.release)
		out.flush(time.Second)
		if took := time.Since(start).Round(10 * time.Millisecond); took != time.Second {
			t.Error("flush waited although the reader was back")
		}
		if got := w.String(); got != "first\n"+strings.Repeat(line, fits) {
			t.Errorf("%d bytes were written, want the first %d lines whole", len(got), fits+1)
		}
		out.flush(time.Second) // nothing to wait for
		io.WriteString(out, "last\n")
		synctest.Wait()
		if !strings.HasSuffix(w.String(), "x\nlast\n") {
			t.Error("the log does not go on after the stall")
		}
	})
}

func TestIsTerminal(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	fatalIf(t, err)
	defer null.Close()
	file, err := os.Create(filepath.Join(t.TempDir(), "log"))
	fatalIf(t, err)
	defer file.Close()
	r, pipe, err := os.Pipe()
	fatalIf(t, err)
	defer r.Close()
	defer pipe.Close()
	for _, tt := range []struct {
		name string
		w    io.Writer
		want bool
	}{{"/dev/null", null, false}, {"file", file, false}, {"pipe", pipe, false}, {"no file", io.Discard, false}} {
		if got := isTerminal(tt.w); got != tt.want {
			t.Errorf("isTerminal of %s is %t", tt.name, got)
		}
	}
}

// atTerminal returns what the user reads of the line that write logs.
func atTerminal(level slog.Level, colors bool, write func(log *slog.Logger)) string {
	var b strings.Builder
	write(newLogger(&config{greet: true, logLevel: level, colors: colors}, &b))
	return regexp.MustCompile(`\d\d:\d\d:\d\d(\x1b\[m)? `).ReplaceAllString(b.String(), "15:04:05$1 ")
}

// accessLine returns what the user reads of a request.
func accessLine(colors bool, x *exchange, target string, took time.Duration) string {
	return atTerminal(slog.LevelInfo, colors, func(log *slog.Logger) {
		path, _ := url.PathUnescape(target)
		r := &http.Request{Method: "POST", URL: &url.URL{Path: path}}
		x.log(r, log, took, false)
	})
}

func TestARequestAtATerminal(t *testing.T) {
	tokens := func(input, output int64) tokenUsage {
		return tokenUsage{tokens: [3]int64{input, output}, known: [3]bool{input > 0, output > 0}}
	}
	const chat = "/v1/chat/completions"
	answered := func(status int, rec record) *exchange { return &exchange{answerWriter{status: status}, rec} }
	for _, tt := range []struct {
		x    *exchange
		path string
		took time.Duration
		want string
	}{
		{answered(200, record{}), "/v1/models", 1499 * time.Microsecond, "15:04:05 200    1 ms  POST /v1/models\n"},
		{answered(200, record{model: "qwen3-coder-plus", key: "alice", usage: tokens(1234, 999)}), chat, 1234 * time.Millisecond,
			"15:04:05 200   1.2 s  POST /v1/chat/completions  qwen3-coder-plus  alice  1.2k tokens in, 999 out\n"},
		{answered(200, record{model: "text-embedding-v4", usage: tokens(999_960, 0)}), "/v1/embeddings", 125 * time.Second,
			"15:04:05 200    2m5s  POST /v1/embeddings  text-embedding-v4  1000.0k tokens in\n"},
		{answered(502, record{model: "m", err: errBroken}), chat, 1234 * time.Millisecond,
			"15:04:05 502   1.2 s  POST /v1/chat/completions  m\n         The connection to Qwen broke in the middle of its answer. Try again.\n"},
		{answered(404, record{}), "/%1b[31m\r\n" + strings.Repeat("長", 50), 0,
			"15:04:05 404    0 ms  POST /?[31m??" + strings.Repeat("長", 20) + "...\n"},
	} {
		got := accessLine(false, tt.x, tt.path, tt.took)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
}

// TestWidthAtATerminal: a request is one line of at most 100 columns, whatever the client sends.
func TestWidthAtATerminal(t *testing.T) {
	for _, long := range []string{strings.Repeat("x", 300), strings.Repeat("長", 300), strings.Repeat("\n", 300), strings.Repeat("\xff", 300), strings.Repeat("\u202e", 300)} {
		for _, took := range []time.Duration{0, 999 * time.Hour} {
			const most = math.MaxInt64
			rec := record{model: long, key: long, usage: tokenUsage{tokens: [3]int64{most, most, most}, known: [3]bool{true, true, true}}}
			got := accessLine(false, &exchange{answerWriter{status: 200}, rec}, "/"+long, took)
			line, rest, _ := strings.Cut(got, "\n")
			columns := 0 // CJK characters take two
			for _, r := range line {
				columns++
				if r >= 0x2E80 && r != '\uFFFD' {
					columns++
				}
			}
			if columns > 100 || rest != "" || strings.ContainsFunc(line, unicode.IsControl) {
				t.Errorf("%d columns: %q", columns, got)
			}
		}
	}
}

func TestColorsAtATerminal(t *testing.T) {
	for status, color := range map[int]string{200: "32", 302: "32", 404: "33", 499: "33", 503: "31"} {
		want := fmt.Sprintf("\x1b[2m15:04:05\x1b[m \x1b[%sm%d\x1b[m    0 ms  POST /\n", color, status)
		if got := accessLine(true, &exchange{answerWriter{status: status}, record{}}, "/", 0); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	if got := accessLine(true, &exchange{answerWriter{status: 200}, record{err: errBroken}}, "/", 0); strings.Count(got, "\x1b[31m") != 2 {
		t.Errorf("a stream that failed is not red: %q", got)
	}
}

func TestOtherLinesAtATerminal(t *testing.T) {
	for want, write := range map[string]func(log *slog.Logger){
		"15:04:05 listening  url=http://localhost:8080\n": func(log *slog.Logger) { log.Info("listening", "url", "http://localhost:8080") },
		"15:04:05 stopped\n":                              func(log *slog.Logger) { log.Info("stopped") },
		"15:04:05 warning: careful  file=/x error=\"a\\x1bb\\nc\" more.n=1\n": func(log *slog.Logger) {
			log.With("file", "/x").Warn("careful", "error", errors.New("a\x1bb\nc"), slog.Group("more", "n", 1))
		},
		"15:04:05 error: a?[2Jb?  x=?\n": func(log *slog.Logger) { log.Error("a\x1b[2Jb\n", "x", "\x7f") },
		"15:04:05 signed in  t.expires=\"2026-01-02 03:04:05\"\n": func(log *slog.Logger) {
			log.Info("signed in", slog.Group("t", "expires", time.Date(2026, 1, 2, 3, 4, 5, 6, time.Local)))
		},
	} {
		if diff := cmp.Diff(want, atTerminal(slog.LevelInfo, false, write)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	got := atTerminal(slog.LevelDebug, false, func(log *slog.Logger) {
		r := &http.Request{Method: "GET", URL: &url.URL{Path: "/"}, Header: http.Header{"User-Agent": {"curl"}}}
		(&exchange{}).log(r, log, 0, true)
	})
	if !strings.Contains(got, "\n         request_id=") || !strings.Contains(got, "headers.User-Agent=curl") {
		t.Errorf("DEBUG_MODE's details are missing:\n%s", got)
	}
}
