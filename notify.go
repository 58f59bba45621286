package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// A notifier tells the service manager how the program is, in the protocol of systemd's sd_notify(3): datagrams of
// VARIABLE=value lines. It is not safe for concurrent use.
//
// There is no watchdog. It could only ask the own listener for /health, and so find out that the Go runtime runs. What it
// would kill is a server on a machine that is short of CPU, with the streams under way, and at worst a refresh token that
// is spent and whose successor is not stored yet.
type notifier struct {
	socket string // $NOTIFY_SOCKET: a path, or @ and the name of an abstract socket; "" tells nobody
	log    *slog.Logger
	failed bool // and it has been logged
	status string
}

// send sends lines as one datagram. The server serves whether or not anybody takes it.
func (n *notifier) send(lines ...string) {
	if n.socket == "" {
		return
	}
	conn, err := net.Dial("unixgram", n.socket)
	if err == nil {
		defer conn.Close()
		conn.SetWriteDeadline(time.Now().Add(time.Second)) // the manager's queue may be full
		_, err = conn.Write([]byte(strings.Join(lines, "\n")))
	}
	if err != nil && !n.failed {
		n.failed = true
		n.log.Warn("the service manager can't be told how the server is", "NOTIFY_SOCKET", n.socket, "error", err)
	}
}

// sendStatus sends the line that people read in systemctl status, where it is another than the last.
func (n *notifier) sendStatus(status string) {
	if status != n.status {
		n.status = status
		n.send("STATUS=" + strings.ReplaceAll(status, "\n", " "))
	}
}

// hangups returns where each SIGHUP arrives from now on, for good: once nobody asks for it, it ends the program, and with it
// the streams that a shutdown waits for. At a terminal none arrives: there it says that the terminal is gone, and ends the
// program, or under nohup does not.
func hangups() <-chan os.Signal {
	c := make(chan os.Signal, 1)
	if tty, err := os.Open("/dev/tty"); err == nil {
		tty.Close()
	} else {
		signal.Notify(c, syscall.SIGHUP)
	}
	return c
}

// run says that the server at url is ready, and from then on how it is, until ctx ends. It calls reload at each of hangups. The
// sign-in's link is shown only where open says that /auth shows it to everybody on this machine too.
func (n *notifier) run(ctx context.Context, tokens *tokenSource, url string, open bool, hangups <-chan os.Signal, reload func()) {
	n.send("READY=1")
	for ctx.Err() == nil {
		st, in := tokens.state.Load(), tokens.flow.state()
		n.sendStatus(tokens.status(st, url, open))
		select {
		case <-ctx.Done():
		case <-st.changed:
		case <-in.changed:
		case <-time.After(time.Minute): // what is not announced: 401s, and tokens that expire
		case <-hangups:
			n.log.Info("looking at the files again", "cause", "SIGHUP")
			n.send("RELOADING=1", fmt.Sprintf("MONOTONIC_USEC=%d", monotonic()))
			reload()
			n.send("READY=1")
		}
	}
}

// stopping says that the server ends, and asks for the time that takes where the requests under way take timeout.
func (n *notifier) stopping(inFlight int64, timeout time.Duration) {
	timeout += oauthTimeout + 5*time.Second // streams are cut off, and a refresh is finished and stored
	n.send("STOPPING=1", fmt.Sprintf("STATUS=Shutting down, requests in flight: %d", inFlight),
		fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", timeout.Microseconds()))
}

// status returns in words how things stand with the source in state st, of a server at url.
func (s *tokenSource) status(st *authState, url string, open bool) string {
	err, in := s.ready(), s.flow.state()
	switch {
	case err == nil:
		return "Serving at " + url
	case in.status == signInPending && open:
		return "Waiting for sign-in: " + in.auth.verificationURIComplete
	case in.status == signInPending:
		return "Waiting for sign-in: the link is in the log"
	case in.status == signInStarting:
		return "Waiting for Qwen, to start a sign-in"
	case st.refreshing:
		return "Renewing the token"
	}
	return err.message
}

// looks yields when it is time to look at a file that others may change: every maxNap, and whenever somebody asks on now,
// until ctx ends. What was sent on now is closed once the look is over.
func looks(ctx context.Context, now <-chan chan struct{}) func(yield func() bool) {
	return func(yield func() bool) {
		for {
			var done chan struct{}
			select {
			case <-ctx.Done():
				return
			case <-time.After(maxNap):
			case done = <-now:
			}
			if !yield() {
				return
			}
			if done != nil {
				close(done)
			}
		}
	}
}

// lookNow asks on now for a look, and returns when it is over or ctx has ended. Nobody looks where now is nil.
func lookNow(ctx context.Context, now chan<- chan struct{}) {
	if now == nil {
		return
	}
	done := make(chan struct{})
	select {
	case now <- done:
	case <-ctx.Done():
		return
	}
	select {
	case <-done:
	case <-ctx.Done():
	}
}
