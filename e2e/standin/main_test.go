package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestRunServesUntilItIsEnded(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	stdout, print := io.Pipe()
	ended := make(chan int, 1)
	var stderr bytes.Buffer
	go func() {
		ended <- run(ctx, []string{"-key", "sk-test", "-interval", "7s", "-code-life", "1m", "-word-delay", "1h"}, print, &stderr)
		print.Close()
	}()
	base, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("no URL: %v, exit status %d, %s", err, <-ended, &stderr)
	}
	c := &client{t: t, client: http.DefaultClient, base: strings.TrimSuffix(base, "\n"), token: "sk-test"}
	if status, answer := c.post("/compatible-mode/v1/chat/completions", `{"model":"m","messages":[{"role":"user","content":"Hi"}]}`); status != http.StatusOK {
		t.Errorf("chat: %d %v", status, answer)
	}
	device := c.authorize()
	wantEqual(t, "interval and life of the device code", []any{7.0, 60.0}, []any{device["interval"], device["expires_in"]})

	r, err := http.NewRequest("POST", c.base+"/v1/chat/completions", strings.NewReader(`{"model":"m","messages":[{}],"stream":true}`))
	fatalIf(t, err)
	r.Header.Set("Authorization", "Bearer sk-test")
	res, err := http.DefaultClient.Do(r)
	fatalIf(t, err)
	defer res.Body.Close()
	stop() // also ends a stream
	if status := <-ended; status != 0 {
		t.Errorf("exit status %d: %s", status, &stderr)
	}
	if body, err := io.ReadAll(res.Body); err == nil {
		t.Errorf("the stream ended as if it were whole: %s", body)
	}
}

func TestRunRefusesBadUsage(t *testing.T) {
	for _, tt := range []struct {
		args   []string
		status int
		stderr string
	}{
		{[]string{"-h"}, 0, "-approve-after"},
		{[]string{"-port", "1"}, 2, "-port"},
		{[]string{"serve"}, 2, `unexpected argument "serve"`},
		{[]string{"-address", "nowhere"}, 1, "nowhere"},
	} {
		var stdout, stderr bytes.Buffer
		if status := run(t.Context(), tt.args, &stdout, &stderr); status != tt.status || !strings.Contains(stderr.String(), tt.stderr) || stdout.Len() > 0 {
			t.Errorf("%q: exit status %d, %s%s; want %d, %q", tt.args, status, &stdout, &stderr, tt.status, tt.stderr)
		}
	}
}
