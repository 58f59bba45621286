package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	deviceGrant = "urn:ietf:params:oauth:grant-type:device_code" // RFC 8628 §3.4

	// defaultInterval is the pause between polls if the server names none, RFC 8628 §3.2.
	defaultInterval = 5 * time.Second
	// slowDownStep is added to the poll interval after each slow_down, RFC 8628 §3.5.
	slowDownStep = 5 * time.Second
	// maxInterval bounds an interval that a broken server announces.
	maxInterval = time.Minute

	// defaultCodeLife and maxCodeLife bound the life of a device code, whose expires_in is required (RFC 8628 §3.2).
	defaultCodeLife = 15 * time.Minute
	maxCodeLife     = time.Hour

	// defaultTokenLife is assumed if a token answer has no usable expires_in (RFC 6749 §5.1 only recommends it). If the
	// token dies sooner, the API's 401 says so.
	defaultTokenLife = time.Hour
	maxTokenLife     = 366 * 24 * time.Hour

	// oauthTimeout bounds one call to the OAuth server. It is below the 30 s that Qwen Code waits for a lock.
	oauthTimeout = 25 * time.Second
	// maxOAuthAnswer bounds the bytes of an answer that are read.
	maxOAuthAnswer = 1 << 20

	// maxSignInPause bounds the growing pauses between attempts to start a sign-in.
	maxSignInPause = time.Minute
)

// An oauthClient calls Qwen's OAuth server: the device authorization grant (RFC 8628) with PKCE (RFC 7636), and refreshes
// (RFC 6749 §6). It is safe for concurrent use.
type oauthClient struct {
	http     *http.Client // follows no redirects
	base     *url.URL
	clientID string
	scope    string
}

func newOAuthClient(cfg *config) *oauthClient {
	client := &http.Client{
		Transport: newTransport(),
		// A redirect would send refresh tokens elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return &oauthClient{http: client, base: cfg.oauthBase, clientID: cfg.oauthClientID, scope: cfg.oauthScope}
}

// An oauthError says why the OAuth server did not do what it was asked for.
type oauthError struct {
	status int    // HTTP; 0 if there was no answer
	code   string // the error member of RFC 6749 §5.2; "" if there is none
	final  bool   // trying the same again is useless
	text   string // for clients
	cause  error  // of a failure of the network, for the log and the terminal only; nil for others
}

func (e *oauthError) Error() string {
	if e.cause == nil {
		return e.text
	}
	return fmt.Sprintf("%s: %v; check the network (HTTPS_PROXY is used if it is set)", e.text, e.cause)
}

func (e *oauthError) Unwrap() error { return e.cause }

// errorf returns an error whose text names the server and goes on with format.
func (c *oauthClient) errorf(format string, args ...any) *oauthError {
	return &oauthError{text: fmt.Sprintf("Qwen's sign-in server %s ", c.base.Host) + fmt.Sprintf(format, args...)}
}

var (
	errSignInExpired = &oauthError{code: "expired_token", final: true, text: "nobody approved the sign-in in time"}
	errSignInDenied  = &oauthError{code: "access_denied", final: true, text: "the sign-in was denied"}
)

// isFinal reports whether err is the server's last word: trying the same again is useless.
func isFinal(err error) bool {
	e, ok := errors.AsType[*oauthError](err)
	return ok && e.final
}

// A deviceAuth is a sign-in that waits for its user: the answer of RFC 8628 §3.2 and the PKCE verifier.
type deviceAuth struct {
	deviceCode              string
	userCode                string
	verificationURI         string
	verificationURIComplete string // verificationURI if the server sent none
	expires                 time.Time
	interval                time.Duration
	verifier                string
}

// authorize asks for a device code.
func (c *oauthClient) authorize(ctx context.Context) (*deviceAuth, error) {
	verifier := make([]byte, 32)
	rand.Read(verifier) // never fails
	d := &deviceAuth{verifier: base64.RawURLEncoding.EncodeToString(verifier)}
	challenge := sha256.Sum256([]byte(d.verifier))
	answer, err := c.post(ctx, "/api/v1/oauth2/device/code", url.Values{
		"client_id":             {c.clientID},
		"scope":                 {c.scope},
		"code_challenge":        {base64.RawURLEncoding.EncodeToString(challenge[:])},
		"code_challenge_method": {"S256"},
	}, map[string]*string{
		"device_code": &d.deviceCode, "user_code": &d.userCode,
		"verification_uri": &d.verificationURI, "verification_uri_complete": &d.verificationURIComplete,
	})
	if err != nil {
		return nil, err
	}
	d.verificationURIComplete = cmp.Or(d.verificationURIComplete, d.verificationURI)
	d.verificationURI = cmp.Or(d.verificationURI, d.verificationURIComplete)
	d.expires = wallClock().Add(seconds(answer["expires_in"], defaultCodeLife, maxCodeLife))
	d.interval = seconds(answer["interval"], defaultInterval, maxInterval)
	if d.deviceCode == "" || !validKey(d.userCode) || len(d.userCode) > 100 || !c.showable(d.verificationURI) || !c.showable(d.verificationURIComplete) {
		return nil, c.errorf("answered without a usable device_code, user_code and verification_uri")
	}
	return d, nil
}

// showable reports whether a link from the server may be shown to a user: an http or https URL of printable ASCII, https
// unless the OAuth server itself is called over http.
func (c *oauthClient) showable(link string) bool {
	u, err := url.Parse(link)
	return err == nil && u.Host != "" && (u.Scheme == "https" || u.Scheme == "http" && c.base.Scheme == "http") &&
		len(link) < 2048 && validKey(link)
}

// poll asks for the token until the user has approved or denied the sign-in, or its code has expired (RFC 8628 §3.4 and
// §3.5). Failures of the network or of the server do not end it. The error is errSignInDenied, errSignInExpired, another
// *oauthError, or the cause of ctx.
func (c *oauthClient) poll(ctx context.Context, d *deviceAuth) (*token, error) {
	interval := d.interval
	pause := interval
	for {
		if !sleep(ctx, pause) {
			return nil, context.Cause(ctx)
		}
		if !time.Now().Before(d.expires) {
			return nil, errSignInExpired
		}
		t, err := c.token(ctx, url.Values{
			"grant_type":    {deviceGrant},
			"client_id":     {c.clientID},
			"device_code":   {d.deviceCode},
			"code_verifier": {d.verifier},
		})
		if err == nil {
			return t, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		e, _ := errors.AsType[*oauthError](err) // as all errors here are
		switch {
		case e.code == "authorization_pending":
			pause = interval
		case e.code == "slow_down":
			interval += slowDownStep
			pause = interval
		case !e.final || e.code == "" && e.status == http.StatusBadRequest:
			// "On encountering a connection timeout, clients MUST unilaterally reduce their polling
			// frequency before retrying" (RFC 8628 §3.5). An HTML page or a 502 is treated alike.
			pause = min(2*pause, max(interval, 30*time.Second))
		case e.code == errSignInDenied.code:
			return nil, errSignInDenied
		case e.code == errSignInExpired.code || e.status == http.StatusUnauthorized:
			return nil, errSignInExpired // Qwen answers 401 for a code that it no longer knows
		default:
			return nil, e
		}
	}
}

// refresh redeems refreshToken (RFC 6749 §6). If the new token has no refresh token, the old one stays valid.
func (c *oauthClient) refresh(ctx context.Context, refreshToken string) (*token, error) {
	return c.token(ctx, url.Values{
		"grant_type":    {"refresh_token"},
		"refresh_token": {refreshToken},
		"client_id":     {c.clientID},
	})
}

// token posts form to the token endpoint and reads the token of the answer.
func (c *oauthClient) token(ctx context.Context, form url.Values) (*token, error) {
	t := &token{}
	answer, err := c.post(ctx, "/api/v1/oauth2/token", form, t.fields())
	if err != nil {
		return nil, err
	}
	if !validKey(t.access) {
		return nil, c.errorf("answered without a usable access_token")
	}
	t.obtained = wallClock()
	t.expiry = t.obtained.Add(seconds(answer["expires_in"], defaultTokenLife, maxTokenLife))
	return t, nil
}

// post sends form to path and returns the members of the JSON object in the answer. It stores those that fields names. The
// error member decides, not the status: errors have been seen with 200, and slow_down with 429. No error holds what was sent.
func (c *oauthClient) post(ctx context.Context, path string, form url.Values, fields map[string]*string) (map[string]json.RawMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, oauthTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base.JoinPath(path).String(), strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", userAgent)
	res, err := c.http.Do(req)
	var body []byte
	if err == nil {
		defer res.Body.Close()
		body, err = io.ReadAll(io.LimitReader(res.Body, maxOAuthAnswer))
	}
	if err != nil {
		e := c.errorf("can't be reached")
		e.cause = err
		if withURL, ok := errors.AsType[*url.Error](err); ok {
			e.cause = withURL.Err
		}
		if strings.Contains(e.cause.Error(), "malformed") { // net/http quotes the line, which may hold a token
			e.cause = errors.New("the answer is not HTTP")
		}
		return nil, e
	}

	var answer map[string]json.RawMessage
	isJSON := json.Unmarshal(body, &answer) == nil && answer != nil
	text := func(member string, limit int) (s string) {
		json.Unmarshal(answer[member], &s) // a mistyped member counts as absent
		for _, name := range []string{"refresh_token", "device_code", "code_verifier"} {
			if secret := form.Get(name); len(secret) >= 8 { // some servers repeat what they refuse; a shorter one is part of any text
				s = strings.ReplaceAll(s, secret, "(not shown)")
			}
		}
		return clip(s, limit)
	}
	code, description, what := text("error", 100), text("error_description", 300), res.Status
	switch {
	case code != "" && description != "":
		what = fmt.Sprintf("%q (%q)", code, description) // quoted, because it is foreign
	case code != "":
		what = fmt.Sprintf("%q", code)
	case res.StatusCode == http.StatusOK && isJSON && stringMembers(answer, fields) == nil:
		return answer, nil
	case res.StatusCode == http.StatusOK:
		what = "something other than the JSON of RFC 6749"
	}
	e := c.errorf("answered %s", what)
	e.status, e.code = res.StatusCode, code
	switch code {
	case "temporarily_unavailable", "server_error", "slow_down", "rate_limit_exceeded":
	case "":
		e.final = isJSON && (e.status == http.StatusBadRequest || e.status == http.StatusUnauthorized)
	default:
		e.final = e.status < 500 && e.status != http.StatusTooManyRequests
	}
	return nil, e
}

// stringMembers stores the members that fields names. An absent one leaves its field as it is. The error names a member that
// is not a string.
func stringMembers(members map[string]json.RawMessage, fields map[string]*string) error {
	for name, field := range fields {
		if raw, ok := members[name]; ok && json.Unmarshal(raw, field) != nil {
			return fmt.Errorf("its %s is not a string", name)
		}
	}
	return nil
}

// seconds returns the number of seconds in raw, which some servers put in quotes, as a duration from 1 s to high. It returns
// def if there is no positive number.
func seconds(raw json.RawMessage, def, high time.Duration) time.Duration {
	var n json.Number // takes a quoted number too
	json.Unmarshal(raw, &n)
	f, err := n.Float64()
	if err != nil || !(f > 0) {
		return def
	}
	return time.Duration(min(max(f, 1), high.Seconds()) * float64(time.Second))
}

// The statuses of a sign-in, as /auth tells them.
const (
	signInNone     = ""
	signInStarting = "starting" // no code yet; if an attempt has failed, err says why
	signInPending  = "pending"  // there is a link and a code, which the user has to follow
	signInComplete = "complete"
	signInDenied   = "denied"
	signInExpired  = "expired"
	signInFailed   = "failed"
)

// A signIn is the state of a sign-in. It does not change; the next state replaces it.
type signIn struct {
	status  string
	auth    *deviceAuth   // nil before there is a link
	err     error         // why it is in this state; may be nil
	ended   time.Time     // zero while it is under way
	changed chan struct{} // closed when another state has replaced this one
}

func (s *signIn) active() bool { return s.status == signInStarting || s.status == signInPending }

// A deviceFlow signs in to Qwen with the device flow, RFC 8628. At most one sign-in is under way at a time, and only that
// one changes the state. A sign-in that was ended from outside changes nothing any more. It is safe for concurrent use.
type deviceFlow struct {
	oauth  *oauthClient
	log    *slog.Logger
	prompt io.Writer // shows people the link
	demo   bool      // a stand-in answers in Qwen's place
	// complete stores the token of a sign-in and puts it into use. It reports false if the sign-in was ended before that; ctx
	// says why.
	complete func(ctx context.Context, t *token) bool

	current atomic.Pointer[signIn]
	running sync.WaitGroup

	mu     sync.Mutex              // guards what follows, and is held while current is replaced
	cancel context.CancelCauseFunc // ends the sign-in under way; nil before the first
	closed bool                    // no more sign-ins
}

// signIn returns the state of the sign-in under way, or of the last one.
func (f *deviceFlow) signIn() *signIn { return f.current.Load() }

// start starts a sign-in unless one is under way. It does not wait for it.
func (f *deviceFlow) start() {
	if f.signIn().active() {
		return // the usual case for a request, and it takes no lock
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.signIn().active() {
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
	for in := f.signIn(); in.status == signInStarting && in.err == nil; in = f.signIn() {
		select {
		case <-in.changed:
		case <-ctx.Done():
			return
		}
	}
}

// end ends the sign-in under way, if there is one, and sets its status.
func (f *deviceFlow) end(status string, reason error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.signIn().active() {
		f.cancel(reason)
		f.replace(&signIn{status: status, ended: time.Now()})
	}
}

// close ends the sign-in under way and allows no other. It returns when the sign-in has stopped running.
func (f *deviceFlow) close() {
	f.mu.Lock()
	f.closed = true
	if f.cancel != nil {
		f.cancel(errShuttingDown)
	}
	f.mu.Unlock()
	f.running.Wait()
}

// replace makes st the current state. The caller holds mu.
func (f *deviceFlow) replace(st *signIn) {
	st.changed = make(chan struct{})
	close(f.current.Swap(st).changed)
}

// set makes st the current state and returns true. If ctx, the context of the sign-in, has ended it does nothing.
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
	for n := 0; err != nil && !isFinal(err) && ctx.Err() == nil; n++ {
		if n == 0 {
			f.log.Warn("a sign-in is needed, but can't be started yet; the proxy keeps trying. With QWEN_API_KEY no sign-in is needed", "error", err)
		}
		f.set(ctx, &signIn{status: signInStarting, err: err})
		sleep(ctx, backoff(n, maxSignInPause))
		auth, err = f.oauth.authorize(ctx)
	}
	var t *token
	if err == nil {
		if !f.set(ctx, &signIn{status: signInPending, auth: auth}) {
			return
		}
		f.log.Warn("waiting for sign-in", "expires", auth.expires)
		printSignIn(f.prompt, auth, f.demo)
		t, err = f.oauth.poll(ctx, auth)
	}

	status := signInComplete
	switch {
	case err == nil && !f.complete(ctx, t):
		f.log.Warn("a sign-in was completed too late and is not used", "reason", context.Cause(ctx))
		return
	case err == nil:
		f.log.Info("signed in", "expires", t.expiry)
	case ctx.Err() != nil:
		return
	case errors.Is(err, errSignInDenied):
		status = signInDenied
	case errors.Is(err, errSignInExpired):
		status = signInExpired
	default:
		status = signInFailed
	}
	f.set(ctx, &signIn{status: status, err: err, ended: time.Now()})
	if err != nil {
		f.log.Warn("sign-in ended without success; open /auth on the proxy to start again", "status", status, "error", err)
	}
}

// printSignIn tells people how to sign in. Link and code stand alone on their lines, to be copied.
func printSignIn(w io.Writer, d *deviceAuth, demo bool) {
	note := `The free tier of Qwen accounts ended on 2026-04-15. If yours is not served,
set QWEN_API_KEY to an API key instead.
`
	if demo {
		note = fmt.Sprintf("The demo's sign-in approves itself after %v.\n", demoApproval)
	}
	fmt.Fprintf(w, `
To sign in to Qwen, open this page in a browser on any device:

%s

and check that it shows this code:

%s

%s
`, d.verificationURIComplete, d.userCode, note)
}

// clip returns s cut to at most n bytes.
func clip(s string, n int) string { return s[:min(len(s), n)] }

// wallClock is the time without its monotonic reading, which stands still while a laptop sleeps. Tokens expire meanwhile.
func wallClock() time.Time { return time.Now().Round(0) }

// sleep waits for d, and reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// backoff returns the pause before attempt n (from 0): 1 s doubled each time up to high, less up to a fifth, so that the
// clients of a server that comes back do not return all at once.
func backoff(n int, high time.Duration) time.Duration {
	d := min(time.Second<<min(n, 20), high)
	return d - mathrand.N(d/5+1)
}
