// Command standin stands in for Qwen in tests and examples: it is an OAuth server, with the page where a sign-in is
// approved, and an API whose answers repeat what the user said. With a key:
//
//	go run ./e2e/standin -key sk-any
//	QWEN_API_KEY=sk-any API_BASE_URL=http://127.0.0.1:1234/compatible-mode/v1 qwen-go-proxy
//
// With a sign-in:
//
//	go run ./e2e/standin
//	QWEN_OAUTH_BASE_URL=http://127.0.0.1:1234 QWEN_DIR=/tmp/standin qwen-go-proxy
//
// It prints its URL on stdout, on one line, once it listens. SIGTERM and SIGINT end it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run serves until ctx ends and returns the exit status: 0 done, 1 failed, 2 wrong usage.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	s := newStandIn()
	flags := flag.NewFlagSet("standin", flag.ContinueOnError)
	flags.SetOutput(stderr)
	address := flags.String("address", "127.0.0.1:0", "where to listen; port 0 picks a free one")
	flags.StringVar(&s.key, "key", s.key, "an API key that is good beside the access tokens; none by default")
	flags.DurationVar(&s.approveAfter, "approve-after", s.approveAfter, "a sign-in approves itself after this; 0 means never")
	flags.DurationVar(&s.tokenLife, "token-life", s.tokenLife, "how long an access token is good, in whole seconds")
	flags.DurationVar(&s.codeLife, "code-life", s.codeLife, "how long a device code is good, in whole seconds")
	flags.DurationVar(&s.interval, "interval", s.interval, "pause between polls, in whole seconds; 0 announces none and allows any")
	flags.DurationVar(&s.wordDelay, "word-delay", s.wordDelay, "pause between the words of a stream")
	flags.Int64Var(&s.maxBody, "max-body", s.maxBody, "largest body of an API request, in bytes")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "standin: unexpected argument %q\n", flags.Arg(0))
		return 2
	}

	listener, err := net.Listen("tcp", *address)
	if err != nil {
		fmt.Fprintf(stderr, "standin: %v\n", err)
		return 1
	}
	server := &http.Server{Handler: s, ReadHeaderTimeout: 10 * time.Second}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	fmt.Fprintf(stdout, "http://%s\n", listener.Addr())
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		fmt.Fprintf(stderr, "standin: %v\n", err)
		return 1
	}
	return 0
}
