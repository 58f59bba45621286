package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"time"
)

// isTerminal reports whether w is a terminal. It may also say so of other character devices, but for the one that swallows
// everything: nobody reads a log from those.
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

// greet tells whoever started the server at a terminal what to do with it. This machine reaches it by base.
func greet(w io.Writer, cfg *config, base string, tokens *tokenSource) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "  %-9s %s\n", name, fmt.Sprintf(format, args...))
	}
	everywhere := ""
	if addr, err := netip.ParseAddr(cfg.host); err == nil && addr.IsUnspecified() {
		everywhere = " and all other addresses"
	}
	fmt.Fprintf(w, "\nqwen-go-proxy listens on %s%s.\n\n", base, everywhere)
	auth := base + "/auth"
	if path, unix := strings.CutPrefix(base, "unix:"); unix {
		auth = "/auth"
		line("Try", "curl --unix-socket %s http://localhost/v1/models", path)
	} else if cfg.tls {
		line("Base URL", "%s/v1, by a name in the certificate", base)
	} else {
		line("Base URL", "%s/v1", base)
	}
	if len(cfg.proxyKeys) > 0 {
		line("API key", "one of the proxy's keys (PROXY_API_KEYS)")
	} else {
		line("API key", "any text")
	}
	switch {
	case tokens.keyed():
		line("Account", "an API key, at %s", keyBase(cfg).Host)
	case tokens.state.Load().token != nil:
		line("Account", "signed in to Qwen")
	default:
		line("Account", "none: set QWEN_API_KEY, or sign in at %s", auth)
	}
	line("Stop", "Ctrl-C; twice to cut off what is under way\n")
}

// clockTime leaves of a log line's time what somebody who reads along needs, so that more of the line fits.
func clockTime(groups []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey && len(groups) == 0 && a.Value.Kind() == slog.KindTime {
		a.Value = slog.StringValue(a.Value.Time().Format(time.TimeOnly))
	}
	return a
}
