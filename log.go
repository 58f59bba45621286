package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
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
		return slog.New(newTerminalHandler(w, cfg.logLevel, cfg.colors))
	case cfg.logFormat == "text":
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}

// A terminalHandler writes the log for a user who reads along at a terminal.
type terminalHandler struct {
	slog.Handler // writes the attributes of a line to attrs
	w            io.Writer
	colors       bool
	mu           *sync.Mutex // guards attrs
	attrs        *bytes.Buffer
}

func newTerminalHandler(w io.Writer, level slog.Leveler, colors bool) terminalHandler {
	attrs := &bytes.Buffer{}
	return terminalHandler{w: w, colors: colors, mu: &sync.Mutex{}, attrs: attrs,
		Handler: slog.NewTextHandler(attrs, &slog.HandlerOptions{Level: level, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey) {
				return slog.Attr{}
			}
			if a.Value.Kind() == slog.KindTime {
				a.Value = slog.StringValue(a.Value.Time().Local().Format(time.DateTime))
			}
			return a
		}})}
}

func (h terminalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.Handler = h.Handler.WithAttrs(attrs)
	return h
}

func (h terminalHandler) WithGroup(name string) slog.Handler {
	h.Handler = h.Handler.WithGroup(name)
	return h
}

// Colors, as the numbers of ECMA-48's SGR.
const (
	dim    = 2
	red    = 31
	green  = 32
	yellow = 33
)

// paint returns s in a color.
func (h terminalHandler) paint(color int, s string) string {
	if !h.colors || s == "" {
		return s
	}
	return fmt.Sprintf("\x1b[%dm%s\x1b[m", color, s)
}

// visible returns s with a question mark for each character that a terminal does not print.
func visible(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) && r != utf8.RuneError {
			return r
		}
		return '?'
	}, s)
}

// Handle writes a request as one line of at most terminalWidth columns. The error follows on a line of its own, and at debug
// level so do all attributes. Any other line has its message and its attributes.
func (h terminalHandler) Handle(ctx context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.attrs.Reset()
	if err := h.Handler.Handle(ctx, r); err != nil {
		return err
	}
	attrs := h.paint(dim, visible(strings.TrimSpace(h.attrs.String())))
	text, gap := visible(r.Message), "  "
	switch {
	case r.Message == accessMessage:
		text, gap = h.request(r), "\n"+indent
		if !h.Enabled(ctx, slog.LevelDebug) {
			attrs = ""
		}
	case r.Level >= slog.LevelError:
		text = h.paint(red, "error: "+text)
	case r.Level >= slog.LevelWarn:
		text = h.paint(yellow, "warning: "+text)
	}
	if attrs != "" {
		text += gap + attrs
	}
	_, err := fmt.Fprintf(h.w, "%s %s\n", h.paint(dim, r.Time.Format(time.TimeOnly)), text)
	return err
}

// terminalWidth is the width of a request's line, in columns.
const terminalWidth = 100

// indent aligns what stands below a line with the text behind its time.
const indent = "         "

// request returns the access line of r, from its status on.
func (h terminalHandler) request(r slog.Record) string {
	of, text := map[string]slog.Value{}, map[string]string{}
	r.Attrs(func(a slog.Attr) bool {
		of[a.Key], text[a.Key] = a.Value, visible(a.Value.String())
		return true
	})
	status := of["status"].Int64()
	color := green
	switch {
	case status >= 500 || status < 400 && text["error"] != "":
		color = red
	case status >= 400:
		color = yellow
	}
	took := time.Duration(of["duration_ms"].Float64() * float64(time.Millisecond))
	tail := ""
	if text["model"] != "" {
		tail = "  " + fit(text["model"], 24)
	}
	if text["key"] != "" {
		tail += "  " + fit(text["key"], 12)
	}
	if tokens, ok := of["input_tokens"]; ok {
		tail += "  " + shortCount(tokens.Int64()) + " tokens in"
		if tokens, ok := of["output_tokens"]; ok {
			tail += ", " + shortCount(tokens.Int64()) + " out"
		}
	}
	head := fmt.Sprintf(" %7s  ", shortDuration(took))
	room := terminalWidth - len(indent) - len("200") - len(head) - columns(tail)
	line := h.paint(color, text["status"]) + head + fit(text["method"]+" "+text["path"], room) + h.paint(dim, tail)
	if text["error"] != "" {
		line += "\n" + indent + h.paint(color, text["error"])
	}
	return line
}

// columns returns how many columns of a terminal s takes at most. Characters from U+1100 on may take two.
func columns(s string) (n int) {
	for _, r := range s {
		n++
		if r >= 0x1100 {
			n++
		}
	}
	return n
}

// fit returns s, cut if it takes more than n columns.
func fit(s string, n int) string {
	if columns(s) <= n {
		return s
	}
	for columns(s) > n-len("...") {
		_, size := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-size]
	}
	return s + "..."
}

// shortDuration returns d for a reader: 85 ms, 1.2 s, 2m5s.
func shortDuration(d time.Duration) string {
	switch d = d.Round(time.Millisecond); {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}

// shortCount returns n for a reader: 999, 1.2k, 3.4M.
func shortCount(n int64) string {
	switch {
	case n < 1000:
		return strconv.FormatInt(n, 10)
	case n < 999_950:
		return fmt.Sprintf("%.1fk", float64(n)/1e3)
	}
	return fmt.Sprintf("%.1fM", float64(n)/1e6)
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
