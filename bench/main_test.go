//go:build linux

package main

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"
)

// TestMain lets the test's executable be the upstream and the bare proxy that the bench starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "upstream" || os.Args[1] == "bare") {
		os.Exit(command(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// TestSmoke runs the whole, with the shortest slices.
func TestSmoke(t *testing.T) {
	for mode, programs := range map[string][]string{
		"plain": {"qwen-go-proxy", "bare", "direct"},
		"tls1":  {"qwen-go-proxy", "bare"},
		"tls2":  {"qwen-go-proxy", "bare"},
	} {
		t.Run(mode, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			args := []string{"-upstream", mode, "-only", strings.Join(programs, ","), "-rounds", "1", "-duration", "100ms", "-streams", "100"}
			if status := command(t.Context(), args, nil, &stdout, &stderr); status != 0 {
				t.Fatalf("status %d\n%s", status, stderr.String())
			}
			lines := map[string]int{}
			for line := range strings.Lines(stdout.String()) {
				if f := strings.Fields(line); len(f) > 3 {
					lines[f[0]]++
				}
			}
			for _, name := range programs {
				want := 5
				if name == direct {
					want = 3 // it is no process that has memory, or starts
				}
				// The first line of the report begins with a name too.
				if name == "qwen-go-proxy" {
					want++
				}
				if lines[name] != want {
					t.Errorf("%d lines of %s, want %d, in\n%s", lines[name], name, want, stdout.String())
				}
			}
		})
	}
}

func TestWrongUsage(t *testing.T) {
	for want, args := range map[string][]string{
		`-what: there is no "4k"`:           {"-what", "2k,4k"},
		`-only: there is no "apache"`:       {"-only", "apache"},
		`-upstream quic: want plain`:        {"-upstream", "quic"},
		`unknown argument "x"`:              {"x"},
		`have to be positive`:               {"-rounds", "0"},
		`no such file or directory`:         {"-proxy", "a=/nowhere"},
		`there are two builds named "true"`: {"-proxy", "true=/bin/true", "-proxy", "true=/bin/true"},
	} {
		var stdout, stderr bytes.Buffer
		if status := command(t.Context(), args, nil, &stdout, &stderr); status != 1 || !strings.Contains(stderr.String(), want) {
			t.Errorf("%q: status %d and %q, want %q", args, status, stderr.String(), want)
		}
	}
}
