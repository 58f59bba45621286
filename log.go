package main

import (
	"bytes"
	"io"
	"log/slog"
	"sync"
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

const (
	// logBufferSize is how many bytes may wait while nobody reads the log: about 3,000 access lines.
	logBufferSize = 1 << 20
	// logWriteSize is the most that is written at once, in bytes. A pipe takes this much whole or not at all (PIPE_BUF on
	// Linux), so that processes that share it do not mix their lines, and none is cut when the program ends.
	logWriteSize = 4096
)

// A logWriter passes lines on to w in their order. A reader of the log that stalls or is gone must not stop the server: Write
// never waits for w and never fails. It drops what does not fit in the buffer. It is safe for concurrent use.
type logWriter struct {
	w       io.Writer
	dropped *atomic.Int64 // lines

	mu      sync.Mutex    // guards all below
	waiting []byte        // whole lines, at most logBufferSize
	spare   []byte        // the buffer that takes turns with waiting
	writing bool          // a goroutine runs drain
	idle    chan struct{} // closed when drain ends; nil unless flush waits for it
}

// Write takes p, which ends with the end of a line, as a whole or drops it.
func (l *logWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiting)+len(p) > logBufferSize {
		l.dropped.Add(countLines(p))
		return len(p), nil
	}
	l.waiting = append(l.waiting, p...)
	if !l.writing {
		l.writing = true
		go l.drain()
	}
	return len(p), nil
}

// drain writes until nothing waits any more.
func (l *logWriter) drain() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.waiting) > 0 {
		lines := l.waiting
		l.waiting = l.spare[:0]
		l.mu.Unlock()
		l.dropped.Add(writeLines(l.w, lines))
		l.mu.Lock()
		l.spare = lines
	}
	if cap(l.waiting)+cap(l.spare) > 64<<10 {
		l.waiting, l.spare = nil, nil // a burst is over
	}
	l.writing = false
	if l.idle != nil {
		close(l.idle)
		l.idle = nil
	}
}

// writeLines writes lines to w, at most logWriteSize at once and each line whole. It returns how many lines it could not write.
func writeLines(w io.Writer, lines []byte) (lost int64) {
	for len(lines) > 0 {
		n := len(lines)
		if n > logWriteSize {
			n = 1 + bytes.LastIndexByte(lines[:logWriteSize], '\n')
			if n == 0 { // one long line
				n = len(lines)
				if i := bytes.IndexByte(lines, '\n'); i >= 0 {
					n = i + 1
				}
			}
		}
		if wrote, err := w.Write(lines[:n]); err != nil {
			lost += countLines(lines[wrote:n])
		}
		lines = lines[n:]
	}
	return lost
}

func countLines(p []byte) int64 {
	return int64(max(1, bytes.Count(p, []byte("\n"))))
}

// flush waits until all lines are written, but no longer than limit.
func (l *logWriter) flush(limit time.Duration) {
	l.mu.Lock()
	if !l.writing {
		l.mu.Unlock()
		return
	}
	if l.idle == nil {
		l.idle = make(chan struct{})
	}
	idle := l.idle
	l.mu.Unlock()
	select {
	case <-idle:
	case <-time.After(limit):
	}
}
