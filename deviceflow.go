package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// maxSignInPause bounds the growing pauses between attempts to start a sign-in.
const maxSignInPause = time.Minute

// The statuses of a sign-in, as /auth tells them.
const (
	signInNone     = ""
	signInStarting = "starting" // no code yet; err says why where there was an attempt
	signInPending  = "pending"  // link and code are there, the user has yet to follow them
	signInComplete = "complete"
	signInDenied   = "denied"
	signInExpired  = "expired"
	signInFailed   = "failed"
)

// A signIn is the state of a sign-in. It does not change; the next state takes its place.
type signIn struct {
	status  string
	auth    *deviceAuth   // nil while starting
	err     error         // why it is in this state; may be nil
	ended   time.Time     // zero while it is under way
	changed chan struct{} // closed when another state has taken this one's place
}

func (s *signIn) active() bool { return s.status == signInStarting || s.status == signInPending }

// A deviceFlow signs in to Qwen with the device flow, RFC 8628. At most one sign-in is under way at a time. Only that
// one changes the state: a sign-in that was ended from outside can do nothing more. It is safe for concurrent use.
type deviceFlow struct {
	oauth  *oauthClient
	log    *slog.Logger
	prompt io.Writer // where people read the link
	demo   bool      // a stand-in answers in Qwen's place
	// complete stores the token of a sign-in and puts it into use. It reports false where the sign-in was ended before
	// that: ctx then says why.
	complete func(ctx context.Context, t *token) bool

	current atomic.Pointer[signIn]
	running sync.WaitGroup

	mu     sync.Mutex              // guards all below, and is held while current is replaced
	cancel context.CancelCauseFunc // ends the sign-in under way; nil before the first
	closed bool                    // no more sign-ins
}

// noSignIn is the state of a deviceFlow that can't sign in.
var noSignIn = &signIn{}

// state returns how the sign-in stands that is under way, or the last one.
func (f *deviceFlow) state() *signIn {
	if st := f.current.Load(); st != nil {
		return st
	}
	return noSignIn
}

// start starts a sign-in unless one is under way. It does not wait for it.
func (f *deviceFlow) start() {
	if f.state().active() {
		return // the usual case on the path of a request, and it takes no lock
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.state().active() {
		return
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	f.cancel = cancel
	f.replace(&signIn{status: signInStarting})
	f.running.Go(func() {
		defer cancel(nil)
		f.run(ctx)
	})
}

// startAndWait starts a sign-in unless one is under way. It returns once that has a link or has failed, or after wait.
func (f *deviceFlow) startAndWait(ctx context.Context, wait time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	f.start()
	for in := f.state(); in.status == signInStarting && in.err == nil; in = f.state() {
		select {
		case <-in.changed:
		case <-ctx.Done():
			return
		}
	}
}

// end ends the sign-in under way for that reason, if there is one. Its state is status from then on.
func (f *deviceFlow) end(status string, reason error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.state().active() {
		f.cancel(reason)
		f.replace(&signIn{status: status, ended: time.Now()})
	}
}

// close ends the sign-in under way, and lets no other start. It returns once nothing of it runs any more.
func (f *deviceFlow) close() {
	f.mu.Lock()
	f.closed = true
	if f.cancel != nil {
		f.cancel(errShuttingDown)
	}
	f.mu.Unlock()
	f.running.Wait()
}

// replace puts st in the place of the current state. The caller holds mu.
func (f *deviceFlow) replace(st *signIn) {
	st.changed = make(chan struct{})
	if old := f.current.Swap(st); old != nil {
		close(old.changed)
	}
}

// set puts st in the place of the current state, and reports whether the sign-in of ctx still goes on. If it does not, set does nothing.
func (f *deviceFlow) set(ctx context.Context, st *signIn) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ctx.Err() != nil {
		return false
	}
	f.replace(st)
	return true
}

// run carries out one sign-in, until ctx ends.
func (f *deviceFlow) run(ctx context.Context) {
	auth, err := f.oauth.authorize(ctx)
	said := ""
	for n := 0; err != nil; n++ {
		if ctx.Err() != nil {
			return
		}
		if refused(err) {
			f.log.Error("Qwen refused to start a sign-in", "error", err)
			f.set(ctx, &signIn{status: signInFailed, err: err, ended: time.Now()})
			return
		}
		if why := f.oauth.trouble(err); why != said {
			said = why
			f.log.Warn("a sign-in is needed and can't be started yet; the proxy keeps trying. With QWEN_API_KEY none is needed", "error", why)
		}
		f.set(ctx, &signIn{status: signInStarting, err: err})
		if !sleep(ctx, backoff(n, maxSignInPause)) {
			return
		}
		auth, err = f.oauth.authorize(ctx)
	}
	if !f.set(ctx, &signIn{status: signInPending, auth: auth}) {
		return
	}
	f.log.Warn("waiting for sign-in", "expires", auth.expires)
	printSignIn(f.prompt, auth, f.demo)

	t, err := f.oauth.poll(ctx, auth)
	if err == nil {
		if !f.complete(ctx, t) {
			f.log.Warn("a sign-in was completed too late and is not used", "reason", context.Cause(ctx))
			return
		}
		f.set(ctx, &signIn{status: signInComplete, auth: auth, ended: time.Now()})
		f.log.Info("signed in", "expires", t.expiry)
		if t.baseErr != nil {
			f.log.Error(baseRefused(t.baseErr).message)
		}
		return
	}
	if ctx.Err() != nil {
		return
	}
	status := signInFailed
	if e, ok := errors.AsType[*oauthError](err); ok {
		switch e.Code {
		case "access_denied":
			status = signInDenied
		case "expired_token":
			status = signInExpired
		}
	}
	f.log.Warn("sign-in ended without success; open /auth on the proxy to start again", "status", status, "error", err)
	f.set(ctx, &signIn{status: status, auth: auth, err: err, ended: time.Now()})
}

// printSignIn tells people how to sign in; link and code stand alone on their lines, to be copied.
func printSignIn(w io.Writer, d *deviceAuth, demo bool) {
	note := `The free tier of Qwen accounts ended on 2026-04-15. If yours is not served,
set QWEN_API_KEY to an API key instead.
`
	if demo {
		note = fmt.Sprintf("Left alone, the demo's sign-in approves itself %v after it began.\n", demoApproval)
	}
	fmt.Fprintf(w, `
To sign in to Qwen, open this page in a browser on any device:

%s

and check that it shows this code:

%s

%s
`, d.verificationURIComplete, d.userCode, note)
}
