package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
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
