package main

import (
	"context"
	"io"
	"log/slog"
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

// BenchmarkLogToAPipe is what a line costs the request that logs it.
func BenchmarkLogToAPipe(b *testing.B) {
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	go func() {
		defer r.Close()
		io.Copy(io.Discard, r)
	}()
	defer w.Close()
	var dropped atomic.Int64
	buffered := newLogWriter(b.Context(), w, &dropped)
	for _, tt := range []struct {
		name string
		w    io.Writer
	}{{"direct", w}, {"buffered", buffered}} {
		b.Run(tt.name, func(b *testing.B) {
			log := newLogger(&config{logFormat: "json"}, tt.w)
			b.ReportAllocs()
			for n := 1; b.Loop(); n++ {
				log.LogAttrs(b.Context(), slog.LevelInfo, "request", slog.String("request_id", "4YQHZQ6R5JNXGK2MHUS7T3WLDA"), slog.String("method", "POST"),
					slog.String("path", "/v1/chat/completions"), slog.Int("status", 200), slog.Float64("duration_ms", 2000.5), slog.String("client", "192.0.2.1"))
				if n%100 == 0 {
					buffered.flush(time.Second) // a load that the reader keeps up with
				}
			}
		})
	}
	if n := dropped.Load(); n != 0 {
		b.Errorf("%d lines dropped", n)
	}
}

func TestIsTerminal(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	file, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
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
