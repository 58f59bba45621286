package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"sync/atomic"
	"time"
)

func newLogger(cfg *config, w io.Writer) *slog.Logger {
	opts := &slog.HandlerOptions{Level: cfg.logLevel}
	if cfg.greet {
		opts.ReplaceAttr = clockTime
	}
	if cfg.logFormat == "text" {
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}

// clockTime shortens a line's time to hours, minutes and seconds, for a user who reads along at a terminal.
func clockTime(groups []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey && len(groups) == 0 && a.Value.Kind() == slog.KindTime {
		a.Value = slog.StringValue(a.Value.Time().Format(time.TimeOnly))
	}
	return a
}

// isTerminal reports whether w is a terminal, or another character device except the null device.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull)
	return err != nil || !os.SameFile(info, null)
}

const (
	logBufferSize  = 1 << 20 // bytes that may wait while nobody reads the log: about 3,000 access lines
	logBufferLines = 1 << 12
)

// A logWriter passes lines on to a writer in their order. A reader of the log that stalls or is gone must not stop the server:
// Write never waits and never fails. It drops what does not fit in the buffer. It is safe for concurrent use.
type logWriter struct {
	lines   chan []byte
	waiting atomic.Int64  // bytes that are not written yet
	dropped *atomic.Int64 // lines
}

// newLogWriter returns a logWriter that writes to w until ctx ends, and counts dropped lines.
func newLogWriter(ctx context.Context, w io.Writer, dropped *atomic.Int64) *logWriter {
	l := &logWriter{lines: make(chan []byte, logBufferLines), dropped: dropped}
	go func() {
		for {
			select {
			case line := <-l.lines:
				if _, err := w.Write(line); err != nil {
					dropped.Add(1)
				}
				l.waiting.Add(-int64(len(line)))
			case <-ctx.Done():
				return
			}
		}
	}()
	return l
}

// Write takes p as a whole or drops it.
func (l *logWriter) Write(p []byte) (int, error) {
	if l.waiting.Add(int64(len(p))) <= logBufferSize {
		select {
		case l.lines <- bytes.Clone(p):
			return len(p), nil
		default:
		}
	}
	l.waiting.Add(-int64(len(p)))
	l.dropped.Add(1)
	return len(p), nil
}

// flush waits until all lines are written, but no longer than limit.
func (l *logWriter) flush(limit time.Duration) {
	for end := time.Now().Add(limit); l.waiting.Load() > 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
}
