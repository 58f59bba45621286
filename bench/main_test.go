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
				want := 7
				if name == direct {
					want = 5 // it is no process that has memory, or starts
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

func TestTrust(t *testing.T) {
	for _, tt := range []struct {
		name       string
		load, copy float64
		want       string
	}{
		{"a quiet machine", 0.5, 1.02, "The bare proxy against its copy: 2k 1.020. The figures can be believed."},
		{"a busy machine", 0.51, 1, "UNRELIABLE: the load average at the start was 0.51"},
		{"copies that differ", 0, 0.96, "UNRELIABLE: the two copies of the bare proxy differ by more than 3 % in 2k"},
		{"no copy", 0, 0, "UNRELIABLE: the bare proxy did not run"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := &comparison{measurements: measurements(100), results: results{}, load: tt.load}
			if tt.copy > 0 {
				c.results.add("2k", "bare", 0, 100)
				c.results.add("2k", "bare-2", 0, 100*tt.copy)
			}
			if got := c.trust(); !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want %q in it", got, tt.want)
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
