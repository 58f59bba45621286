package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"
)

// A notifier tells the service manager the server's state, in the protocol of systemd's sd_notify(3): datagrams of
// VARIABLE=value lines. It is not safe for concurrent use.
//
// There is no watchdog. It could only request /health from the server's own listener, which proves that the Go runtime runs. It
// would kill a server on a machine that is short of CPU, and with it all open streams. At worst a new refresh token would be
// lost before it is stored.
type notifier struct {
	socket string // $NOTIFY_SOCKET: a path, or @ and the name of an abstract socket; "": there is no service manager
	log    *slog.Logger
	failed bool // a failure has been logged
	status string
}

// send sends lines as one datagram. A failure is logged once and changes nothing else.
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
		n.log.Warn("the service manager can't be notified of the server's state", "NOTIFY_SOCKET", n.socket, "error", err)
	}
}

// sendStatus sends the line that systemctl status shows, if it has changed.
func (n *notifier) sendStatus(status string) {
	if status != n.status {
		n.status = status
		n.send("STATUS=" + strings.ReplaceAll(status, "\n", " "))
	}
}

// run sends that the server at url is ready, and then each change of its status, until ctx ends. The status shows the sign-in's link only if open: then /auth shows it to everybody on this machine too.
func (n *notifier) run(ctx context.Context, tokens *tokenSource, url string, open bool) {
	n.send("READY=1")
	for ctx.Err() == nil {
		st, in := tokens.state.Load(), tokens.flow.state()
		n.sendStatus(tokens.status(st, url, open))
		select {
		case <-ctx.Done():
		case <-st.changed:
		case <-in.changed:
		case <-time.After(time.Minute): // for changes without an event: 401s, and tokens that expire
		}
	}
}

// stopping sends that the server is shutting down, and asks for enough time. The requests in flight may take timeout.
func (n *notifier) stopping(inFlight int64, timeout time.Duration) {
	timeout += oauthTimeout + 5*time.Second // streams are cut off, and a refresh is finished and stored
	n.send("STOPPING=1", fmt.Sprintf("STATUS=Shutting down, requests in flight: %d", inFlight),
		fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", timeout.Microseconds()))
}

// status returns the status line of a server at url whose source is in state st.
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
