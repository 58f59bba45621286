package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"
)

func newLogger(cfg *config, w io.Writer) *slog.Logger {
	opts := &slog.HandlerOptions{Level: cfg.logLevel}
	switch {
	case cfg.greet:
		attrs := &bytes.Buffer{}
		opts.ReplaceAttr = forTerminal
		return slog.New(terminalHandler{slog.NewTextHandler(attrs, opts), attrs, &sync.Mutex{}, w, cfg.colors})
	case cfg.logFormat == "text":
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}

// A terminalHandler writes the log for a user who reads along at a terminal.
type terminalHandler struct {
	slog.Handler // writes the attributes of a line to attrs
	attrs        *bytes.Buffer
	mu           *sync.Mutex // guards attrs
	w            io.Writer
	colors       bool
}

// forTerminal leaves out the attributes that Handle writes, and shortens times.
func forTerminal(groups []string, a slog.Attr) slog.Attr {
	switch {
	case len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey):
		return slog.Attr{}
	case a.Value.Kind() == slog.KindTime:
		a.Value = slog.StringValue(a.Value.Time().Local().Format(time.DateTime))
	}
	return a
}

func (h terminalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return terminalHandler{h.Handler.WithAttrs(attrs), h.attrs, h.mu, h.w, h.colors}
}

func (h terminalHandler) WithGroup(name string) slog.Handler {
	return terminalHandler{h.Handler.WithGroup(name), h.attrs, h.mu, h.w, h.colors}
}

const dim, red, green, yellow = 2, 31, 32, 33 // colors (ECMA-48, SGR)

func (h terminalHandler) paint(color int, s string) string {
	if !h.colors || s == "" {
		return s
	}
	return fmt.Sprintf("\x1b[%dm%s\x1b[m", color, s)
}

// visible returns s with a question mark for each character that can't be printed.
func visible(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) && r != utf8.RuneError {
			return r
		}
		return '?'
	}, s)
}

// indent is what lines below the first begin with. It is as wide as the time.
const indent = "\n         "

// Handle writes a request as one line, with its error below and, at debug level, its attributes. Any other line has its message
// and its attributes.
func (h terminalHandler) Handle(ctx context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.attrs.Reset()
	h.Handler.Handle(ctx, r) // a Buffer takes everything
	text, gap, attrs := visible(r.Message), "  ", visible(strings.TrimSpace(h.attrs.String()))
	switch {
	case r.Message == "request":
		if text, gap = h.request(r), indent; !h.Enabled(ctx, slog.LevelDebug) {
			attrs = ""
		}
	case r.Level >= slog.LevelError:
		text = h.paint(red, "error: "+text)
	case r.Level >= slog.LevelWarn:
		text = h.paint(yellow, "warning: "+text)
	}
	if attrs != "" {
		text += gap + h.paint(dim, attrs)
	}
	_, err := fmt.Fprintln(h.w, h.paint(dim, r.Time.Format(time.TimeOnly)), text)
	return err
}

// request returns what the line of a request has behind its time. The whole line takes at most 100 columns.
func (h terminalHandler) request(r slog.Record) string {
	of, text := map[string]slog.Value{}, map[string]string{}
	r.Attrs(func(a slog.Attr) bool {
		of[a.Key], text[a.Key] = a.Value, visible(a.Value.String())
		return true
	})
	color := green
	if status := of["status"].Int64(); status >= 500 || status < 400 && text["error"] != "" {
		color = red
	} else if status >= 400 {
		color = yellow
	}
	tokens, tail := "", ""
	if n, ok := of["input_tokens"]; ok {
		tokens = shortCount(n.Int64()) + " tokens in"
	}
	if n, ok := of["output_tokens"]; ok {
		tokens += ", " + shortCount(n.Int64()) + " out"
	}
	for _, part := range []string{fit(text["model"], 24), fit(text["key"], 12), fit(tokens, 30)} {
		if part != "" {
			tail += "  " + part
		}
	}
	took := fmt.Sprintf(" %7s  ", shortDuration(time.Duration(of["duration_ms"].Float64()*float64(time.Millisecond))))
	room := 100 - len("15:04:05 200") - len(took) - len(tail)
	line := h.paint(color, text["status"]) + took + fit(text["method"]+" "+text["path"], room) + h.paint(dim, tail)
	if text["error"] != "" {
		line += indent + h.paint(color, text["error"])
	}
	return line
}

// fit returns s, cut to at most n bytes. In a terminal, no character takes more columns than bytes.
func fit(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:max(0, n-3)], "") + "..."
}

// shortDuration returns d as 85 ms, 1.2 s or 2m5s.
func shortDuration(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	} else if d < time.Minute {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}

// shortCount returns n as 999 or 1.2k.
func shortCount(n int64) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%.1fk", float64(n)/1000)
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
