package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxTokenWait bounds how long a request waits for a token.
	maxTokenWait = 30 * time.Second
	// maxRefreshPause bounds the growing pauses between attempts to refresh.
	maxRefreshPause = 30 * time.Second
	// maxNap bounds how long run sleeps, so that it notices a wall clock that jumped and a laptop that slept.
	maxNap = 5 * time.Second
	// refusalTime without a success makes a server whose credentials are refused not ready. For refusalTime after the last 401
	// to a fresh token, no 401 causes a refresh.
	refusalTime = time.Minute
)

// A tokenSource hands out what requests to Qwen carry. It is a keySource or an oauthSource. It is safe for concurrent use.
type tokenSource interface {
	// Token returns a token that is good now. The error is an *apiError, or the cause of ctx.
	Token(ctx context.Context) (*token, error)
	// Replace returns a token to use instead of rejected, to which Qwen has answered 401. Its error is as Token's.
	Replace(ctx context.Context, rejected *token) (*token, error)
	// accepted notes that Qwen has accepted a token.
	accepted()
	// refused notes that Qwen has answered 401 to the token that Replace returned. It returns the answer to the client.
	refused() *apiError
	// ready returns nil if a usable token is at hand, otherwise the error that a request would get.
	ready() *apiError
	// status describes the credentials.
	status() sourceStatus
	// files returns the files that the token comes from.
	files() []*watchedFile
	// run keeps the token fresh until ctx ends. A refresh under way is finished first; abort ends that too.
	run(ctx, abort context.Context)
}

// A sourceStatus describes the credentials of a tokenSource at one time.
type sourceStatus struct {
	method    string                             // "oauth" or "api_key"
	token     *token                             // nil if nobody is signed in
	problem   *apiError                          // what is wrong, even if requests are served for now; nil if nothing is
	flow      *deviceFlow                        // nil with an API key
	refreshes *[len(refreshResults)]atomic.Int64 // how often each of refreshResults happened; nil with an API key
}

// needsSignIn reports whether a sign-in solves the problem.
func (st sourceStatus) needsSignIn() bool {
	return st.flow != nil && st.problem != nil && st.problem.status == http.StatusUnauthorized
}

// newSource returns the source of the credentials that cfg names.
func newSource(cfg *config, log *slog.Logger, prompt io.Writer) tokenSource {
	if cfg.apiKey != "" {
		return newKeySource(cfg, log)
	}
	return newOAuthSource(newOAuthClient(cfg), &credentialStore{dir: cfg.qwenDir}, cfg, log, prompt)
}

// An oauthSource hands out Qwen's access token and renews it before it expires. Requests read one atomic pointer. Only run
// renews the token, and all requests that wait for it wait for one refresh.
type oauthSource struct {
	oauth  *oauthClient
	store  *credentialStore
	base   *url.URL      // API_BASE_URL; nil: the token names it
	buffer time.Duration // TOKEN_REFRESH_BUFFER
	log    *slog.Logger
	flow   deviceFlow // signs in if there is no token, or none that can be renewed

	state atomic.Pointer[authState]
	mu    sync.Mutex    // held while state is replaced
	wake  chan struct{} // 1 slot: there may be something to do for run
	turn  chan struct{} // 1 slot: held by a refresh, a look at the credential file, and a sign-in that is being stored

	verdict
	refreshes [len(refreshResults)]atomic.Int64
}

// An authState is what is known of the credentials at one time. It does not change; a new one replaces it.
type authState struct {
	token    *token        // nil if nobody is signed in
	rejected bool          // Qwen answered 401 to token
	attempts int           // failed attempts to renew token
	failed   error         // why the last one failed
	retryAt  time.Time     // the next one
	final    error         // why token can't be renewed at all; nil while it may be
	changed  chan struct{} // closed when another state has replaced this one
}

// The results of a refresh, as indices into refreshResults.
const (
	refreshed      = iota // by this process, or by another that was faster
	refreshRefused        // another attempt is useless
	refreshFailed         // to be tried again
)

var refreshResults = [...]string{"success", "refused", "failed"}

// newOAuthSource returns a source over the credential file, which it reads.
func newOAuthSource(oauth *oauthClient, store *credentialStore, cfg *config, log *slog.Logger, prompt io.Writer) *oauthSource {
	s := &oauthSource{
		oauth: oauth, store: store, base: cfg.apiBase, buffer: cfg.refreshBuffer, log: log, wake: make(chan struct{}, 1), turn: make(chan struct{}, 1),
		flow:    deviceFlow{oauth: oauth, log: log, prompt: prompt, demo: cfg.demo},
		verdict: verdict{refusal: errNotServed, success: time.Now(), log: log},
	}
	s.flow.complete = s.signedIn
	s.flow.current.Store(&signIn{changed: make(chan struct{})})
	if err := store.check(); err != nil {
		log.Error("the credentials can't be stored", "error", err)
	} else if store.isMount() {
		log.Warn("the credential file is a mount point by itself, and a crash while it is written can cut it short; mount its directory instead")
	}
	t, _ := store.load() // readFile tells of the error
	s.state.Store(&authState{token: s.prepare(t), changed: make(chan struct{})})
	return s
}

// prepare computes what the request path needs of t.
func (s *oauthSource) prepare(t *token) *token {
	if t == nil {
		return nil
	}
	t.authorization = "Bearer " + t.access
	t.base, t.baseErr = apiBase(s.base, t)
	buffer := s.buffer
	if life := t.expiry.Sub(t.obtained); life > 0 {
		buffer = min(buffer, life/2)
	}
	t.refreshAt = t.expiry.Add(-buffer)
	return t
}

// Token waits only if the token at hand has expired.
func (s *oauthSource) Token(ctx context.Context) (*token, error) {
	if t := s.state.Load().token; t.good(time.Now()) {
		return t, nil
	}
	return s.wait(ctx, nil)
}

// Replace returns the token that has replaced rejected already, or a refreshed one. It does not refresh within a minute
// after a fresh token was refused too.
func (s *oauthSource) Replace(ctx context.Context, rejected *token) (*token, error) {
	if s.refusedLately() {
		return nil, errNotServed
	}
	if st := s.state.Load(); st.token == rejected && !st.rejected {
		s.update(func(st *authState) { st.rejected = st.rejected || st.token == rejected })
	}
	return s.wait(ctx, rejected)
}

// wait returns a good token other than not. It makes run renew the token at hand.
func (s *oauthSource) wait(ctx context.Context, not *token) (*token, error) {
	timeout := time.NewTimer(maxTokenWait)
	defer timeout.Stop()
	for {
		st, now := s.state.Load(), time.Now()
		if st.token != not && st.token.good(now) {
			return st.token, nil
		}
		if err := s.problem(st, now); err != nil {
			if err.status == http.StatusUnauthorized && now.Sub(s.flow.signIn().ended) > time.Minute {
				s.flow.start() // the last link is dead, and the message says that there is one in the log
			}
			return nil, err
		}
		s.wakeRun()
		select {
		case <-st.changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-timeout.C:
			return nil, unavailable(time.Second, nil)
		}
	}
}

// problem returns why st has no good token at now. It returns nil if there is one, and while a refresh is under way or due.
func (s *oauthSource) problem(st *authState, now time.Time) *apiError {
	good := st.token.good(now) && !st.rejected
	switch {
	case good && st.token.baseErr != nil:
		return baseRefused(st.token.baseErr)
	case good:
		return nil
	case st.token == nil:
		message := "The proxy is not signed in to Qwen. Set QWEN_API_KEY on the proxy, or sign in: open /auth on the proxy, or follow the link in its log."
		if s.flow.demo {
			message = fmt.Sprintf("The demo is not signed in yet. Its sign-in approves itself after %v. Try again then.", demoApproval)
		}
		return &apiError{status: http.StatusUnauthorized, typ: typeAuthentication, code: "not_signed_in", message: message}
	case st.final != nil:
		return signInRefused(st.final)
	case st.retryAt.After(now):
		return unavailable(st.retryAt.Sub(now), st.failed)
	}
	return nil
}

// signInRefused is the answer if Qwen does not renew the token any more.
func signInRefused(err error) *apiError {
	return &apiError{status: http.StatusUnauthorized, typ: typeAuthentication, code: "sign_in_expired",
		message: "Qwen no longer accepts the proxy's sign-in. Sign in again: open /auth on the proxy, or follow the link in its log.", err: err}
}

// baseRefused is the answer if the credentials name an API that is not Qwen's.
func baseRefused(err error) *apiError {
	return &apiError{status: http.StatusInternalServerError, typ: typeConfiguration, code: "resource_url_refused",
		message: "The proxy did not send the request: " + err.Error() + "."}
}

// errNotServed is the answer while the API refuses even fresh tokens.
var errNotServed = &apiError{status: http.StatusUnauthorized, typ: typeAuthentication, code: "qwen_oauth_unavailable",
	message: "Qwen's API does not serve this account: its free tier for sign-ins ended on 2026-04-15, and a fresh token was refused too. Set QWEN_API_KEY on the proxy to use an API key."}

// errNotStorable says that the new token could not be stored, so the refresh token was not spent.
var errNotStorable = errors.New("the new token could not be stored")

// unavailable is the answer while a token can't be renewed for now, because of err. A nil err means that it is being renewed.
func unavailable(retryAfter time.Duration, err error) *apiError {
	typ, why := typeServer, "and is being renewed"
	e, ok := errors.AsType[*oauthError](err)
	switch {
	case errors.Is(err, errNotStorable):
		typ = typeConfiguration
		why = "and is not renewed because the new one could not be stored; the proxy's log says why. Make QWEN_DIR writable. Repair or delete " +
			credentialFile + " in it if that is broken"
	case ok:
		typ, why = typeNetwork, "and was not renewed: "+e.text
	case errors.Is(err, errLocked):
		why = "and was not renewed: " + errLocked.Error()
	}
	return &apiError{status: http.StatusServiceUnavailable, typ: typ, code: "token_refresh_failed", retryAfter: retryAfter, err: err,
		message: "The proxy's access token has expired " + why + ". Try again; the proxy keeps trying."}
}

// update replaces the state by a changed copy, and wakes those who wait for a change.
func (s *oauthSource) update(change func(*authState)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.state.Load()
	next := *old
	change(&next)
	next.changed = make(chan struct{})
	s.state.Store(&next)
	close(old.changed)
}

// setToken puts t into use.
func (s *oauthSource) setToken(t *token) {
	s.prepare(t)
	s.update(func(st *authState) { *st = authState{token: t} })
	s.wakeRun()
}

// wakeRun makes run see whether a refresh is due.
func (s *oauthSource) wakeRun() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run also starts the first sign-in, and ends the one under way.
func (s *oauthSource) run(ctx, abort context.Context) {
	defer s.flow.close()
	if s.state.Load().token == nil {
		s.flow.start()
	}
	nap := time.NewTimer(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		case <-nap.C:
		}
		for ctx.Err() == nil && s.due(time.Now()) <= 0 {
			s.refresh(ctx, abort)
		}
		nap.Reset(min(s.due(time.Now()), maxNap))
	}
}

func (s *oauthSource) files() []*watchedFile {
	if s.store.dir == "" {
		return nil
	}
	return []*watchedFile{{name: "the credential file", fallback: "it is left as it is until a token is stored", read: s.readFile}}
}

// readFile puts into use what another process has done to the credential file. The error says why the file can't be used.
func (s *oauthSource) readFile() error {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	st, now := s.state.Load(), time.Now()
	t, err := s.newest(st.token)
	switch {
	case unusable(err):
		return err
	case st.token == nil && t == nil: // signed out as before
	case err != nil:
		s.signedOut()
	case t == st.token: // there is no file, or only one that is older than t
		if !t.unstored {
			return errors.New("the credential file has vanished; the token in memory stays in use, and the next refresh writes the file again")
		}
	case st.token == nil ||
		t.access != st.token.access && (t.good(now) || !st.token.good(now)) ||
		t.refresh != st.token.refresh && st.final != nil:
		s.setToken(t)
		s.log.Info("another process has changed the credentials; using them", "token", t)
		s.restart()
		s.flow.end(signInComplete, errors.New("another process has signed in"))
	}
	return nil
}

// newest returns the token to go on with: the one in the credential file, or current if there is no file, or only one that is
// older than current, which could not be stored. The error is errSignedOut, or says why the file can't be used.
func (s *oauthSource) newest(current *token) (*token, error) {
	if current != nil && current.unstored {
		if info, err := os.Stat(s.store.path()); err == nil && info.ModTime().Before(current.obtained) {
			return current, nil
		}
	}
	t, err := s.store.load()
	if errors.Is(err, fs.ErrNotExist) {
		return current, nil
	}
	return t, err
}

// signedOut drops the token, because the credential file says so, and starts a sign-in. It ends the one under way, whose link
// is from before the logout.
func (s *oauthSource) signedOut() {
	s.flow.end(signInNone, errSignedOut) // first: a request that sees no token starts the next one
	s.update(func(st *authState) { *st = authState{} })
	s.log.Warn("signed out by another process")
	s.flow.start()
}

// signedIn stores the token of a completed sign-in and puts it into use. It returns false if the sign-in was ended before.
func (s *oauthSource) signedIn(ctx context.Context, t *token) bool {
	s.turn <- struct{}{}
	defer func() { <-s.turn }()
	lock, _ := s.store.lock(ctx, func() bool { return false }) // a lock that is held forever must not cost the user a sign-in
	defer lock.release()
	st := s.state.Load()
	if _, err := s.newest(st.token); errors.Is(err, errSignedOut) && st.token != nil {
		s.signedOut() // by the process that held the lock before; this ends the sign-in
	}
	if reason := context.Cause(ctx); reason != nil && reason != errShuttingDown {
		return false
	}
	s.stored(t, s.store.save(t))
	s.setToken(t)
	s.accepted() // it may be another account's
	if t.baseErr != nil {
		s.log.Error(baseRefused(t.baseErr).message)
	}
	return true
}

// due returns how long it is from now until the token is to be renewed.
func (s *oauthSource) due(now time.Time) time.Duration {
	st := s.state.Load()
	switch {
	case st.token == nil || st.final != nil:
		return maxNap
	case st.rejected:
		return st.retryAt.Sub(now)
	}
	return max(st.token.refreshAt.Sub(now), st.retryAt.Sub(now))
}

// refresh renews the token once, if that is still due. If that fails, it notes why.
func (s *oauthSource) refresh(ctx, abort context.Context) {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return
	}
	if s.due(time.Now()) > 0 {
		return // another token, or none, has come into use meanwhile
	}
	st := s.state.Load()
	fresh, err := s.redeem(ctx, abort, st.token)
	switch {
	case err == nil:
		s.refreshes[refreshed].Add(1)
		s.setToken(fresh)
		s.log.Info("token refreshed", "expires", fresh.expiry)
	case errors.Is(err, errSignedOut):
		s.signedOut()
	case isFinal(err):
		s.refreshes[refreshRefused].Add(1)
		s.update(func(st *authState) { st.final = err })
		s.log.Error(signInRefused(err).message, "error", err)
		s.flow.start()
	default:
		s.refreshes[refreshFailed].Add(1)
		pause := backoff(st.attempts, maxRefreshPause)
		if errors.Is(err, errNotStorable) {
			pause = min(pause, maxNap) // a change of the directory comes into use as soon as one of the file
		}
		s.update(func(st *authState) {
			st.failed, st.retryAt = err, time.Now().Add(pause)
			st.attempts++
		})
		level := slog.LevelWarn
		if ctx.Err() != nil || st.failed != nil && st.failed.Error() == err.Error() {
			level = slog.LevelDebug // the program stops, or the log says it already
		}
		s.log.Log(ctx, level, "token refresh failed; trying again", "error", err, "attempt", st.attempts+1,
			"in", pause.Round(time.Millisecond).String(), "token", st.token)
	}
}

// redeem exchanges the refresh token of current, the token in use, for a fresh token and stores that, with other processes
// locked out. If one of them was faster, it returns that one's token.
func (s *oauthSource) redeem(ctx, abort context.Context, current *token) (*token, error) {
	// A refresh token is not spent while the next one can't be stored: at the next start it would be lost.
	notStored := func(err error) (*token, error) { return nil, fmt.Errorf("%w: %w", errNotStorable, err) }
	file, noRoom := s.store.reserve()
	if noRoom == nil {
		defer file.discard()
		var theirs *token
		lock, err := s.store.lock(ctx, func() bool {
			if t, err := s.newest(current); err == nil && t.access != current.access && t.good(time.Now()) {
				theirs = t
			}
			return theirs != nil
		})
		defer lock.release()
		switch {
		case theirs != nil:
			return theirs, nil
		case err == nil:
		case errors.Is(err, errLocked), ctx.Err() != nil:
			return nil, err
		default:
			return notStored(err)
		}
	} else if !current.unstored {
		return notStored(noRoom)
	}

	// From here on a refresh token may be spent, so only abort ends this. All calls together take less time than other
	// processes wait for the lock.
	calls, cancel := context.WithTimeout(abort, oauthTimeout)
	defer cancel()
	var old, fresh *token
	var err error
	for {
		t, fileErr := s.newest(current)
		switch {
		case errors.Is(fileErr, errSignedOut):
			return nil, fileErr
		case err != nil && (fileErr != nil || t.refresh == old.refresh):
			return nil, err
		case fileErr != nil:
			return notStored(fileErr)
		case t.access != current.access && t.good(time.Now()):
			return t, nil
		case t.refresh == "":
			return nil, &oauthError{final: true, text: "there is no refresh token"}
		}
		old = t
		fresh, err = s.oauth.refresh(calls, old.refresh)
		if !isFinal(err) {
			break
		}
		// A process that ignores the lock may have spent the refresh token and stored the next one.
	}
	if err != nil {
		return nil, err
	}
	fresh.members = old.members
	kept := old.fields()
	for name, field := range fresh.fields() {
		*field = cmp.Or(*field, *kept[name])
	}
	if noRoom != nil {
		fresh.unstored = true // as current is
		s.log.Warn("the refreshed token is only kept in memory", "file", s.store.path(), "error", noRoom)
		return fresh, nil
	}
	_, err = s.newest(current)
	switch {
	case errors.Is(err, errSignedOut):
		return nil, err // a logout that waited for the lock has given up waiting
	case err == nil:
		err = file.commit(fresh)
	} // else another program's file has come into its place, and stays
	s.stored(fresh, err)
	return fresh, nil
}

// stored notes and logs whether t was stored, which err says. The token is good all the same, until the process ends.
func (s *oauthSource) stored(t *token, err error) {
	t.unstored = err != nil
	if err != nil {
		s.log.Error("the credentials could not be stored and are lost when the proxy stops; fix this and sign in again",
			"file", s.store.path(), "error", err)
	}
}

func (s *oauthSource) ready() *apiError {
	st, now := s.state.Load(), time.Now()
	if err := cmp.Or(s.verdict.ready(), s.problem(st, now)); err != nil {
		return err
	}
	if !st.token.good(now) {
		return unavailable(0, nil)
	}
	return nil
}

func (s *oauthSource) status() sourceStatus {
	st := s.state.Load()
	status := sourceStatus{method: "oauth", token: st.token, problem: s.ready(), flow: &s.flow, refreshes: &s.refreshes}
	if status.problem == nil {
		if s.refusing() {
			status.problem = errNotServed // the server counts as ready again, but a sign-in would help
		} else if st.final != nil {
			status.problem = signInRefused(st.final) // the token is still good for a while
		}
	}
	return status
}

// A verdict knows whether Qwen accepts the credentials. It is safe for concurrent use.
type verdict struct {
	refusal *apiError // the answer to clients if it does not
	log     *slog.Logger

	mu      sync.Mutex // guards what follows
	success time.Time  // the last success, or when the source began; zero for a key that Qwen never accepted
	fresh   time.Time  // the last 401 to a fresh token or a key since Qwen last accepted one; zero for none
	last    time.Time  // the last 401 to any token
}

// accepted notes that Qwen has accepted the credentials.
func (v *verdict) accepted() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.success, v.fresh = time.Now(), time.Time{}
}

// reset forgets everything: there is a new key.
func (v *verdict) reset() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.success, v.fresh = time.Time{}, time.Time{}
}

// restart gives a token of another process a minute, because it may be another account's. The next 401 still causes no refresh:
// the other process would refresh that token in turn, and so on.
func (v *verdict) restart() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.success = time.Now()
}

// refused notes a 401 to a fresh token or a key, and logs the first. It returns the answer to the client.
func (v *verdict) refused() *apiError {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.fresh.IsZero() {
		v.log.Error(v.refusal.message)
	}
	v.fresh = time.Now()
	v.last = v.fresh
	return v.refusal
}

// refusedLately reports whether a fresh token got a 401 within the last minute, and notes one more 401 if so.
func (v *verdict) refusedLately() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	lately := time.Since(v.fresh) < refusalTime
	if lately {
		v.last = time.Now()
	}
	return lately
}

// refusing reports whether Qwen has refused the credentials for a minute or longer, without a success.
func (v *verdict) refusing() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return !v.fresh.IsZero() && time.Since(v.success) >= refusalTime
}

// ready returns nil again a minute after the last 401. A load balancer then sends a request, which shows whether Qwen accepts the
// credentials.
func (v *verdict) ready() *apiError {
	refusing := v.refusing()
	v.mu.Lock()
	defer v.mu.Unlock()
	if refusing && time.Since(v.last) < refusalTime {
		return v.refusal
	}
	return nil
}

// A keySource hands out an API key. A key that Qwen never accepted makes it not ready at the first 401.
type keySource struct {
	file string // QWEN_API_KEY_FILE; "" if it is not set
	base *url.URL
	log  *slog.Logger
	key  atomic.Pointer[token]
	verdict
}

func newKeySource(cfg *config, log *slog.Logger) *keySource {
	s := &keySource{file: cfg.apiKeyFile, base: keyBase(cfg), log: log}
	s.verdict = verdict{log: log, refusal: &apiError{status: http.StatusUnauthorized, typ: typeAuthentication, code: "invalid_api_key",
		message: fmt.Sprintf("Qwen refused the proxy's API key. A key only works with its own plan's base URL: check QWEN_API_KEY and API_BASE_URL. The base URL in use is %s.", s.base)}}
	s.setKey(cfg.apiKey)
	return s
}

func (s *keySource) setKey(key string) {
	s.key.Store(&token{access: key, authorization: "Bearer " + key, base: s.base})
	s.reset()
}

func (s *keySource) Token(context.Context) (*token, error) { return s.key.Load(), nil }

// Replace returns no token: the key can't be renewed.
func (s *keySource) Replace(context.Context, *token) (*token, error) { return nil, s.refused() }

func (s *keySource) status() sourceStatus {
	return sourceStatus{method: "api_key", token: s.key.Load(), problem: s.ready()}
}

func (s *keySource) run(context.Context, context.Context) {}

func (s *keySource) files() []*watchedFile {
	if s.file == "" {
		return nil
	}
	return []*watchedFile{{name: "QWEN_API_KEY_FILE", fallback: "the last key stays in use", read: s.readFile}}
}

// readFile puts the key in the file into use.
func (s *keySource) readFile() error {
	key, err := readKeyFile(s.file)
	if err == nil && key != s.key.Load().access {
		s.setKey(key)
		s.log.Info("the API key has changed")
	}
	return err
}

// readKeyFile returns the key in file, which may hold nothing else but white space.
func readKeyFile(file string) (string, error) {
	b, _, err := readRegular(file, maxCredentialFile)
	if err != nil {
		return "", err
	}
	key := strings.TrimSpace(string(b))
	switch {
	case key == "":
		return "", errors.New("the file is empty")
	case !validKey(key):
		return "", errors.New("the file holds more than one key of printable characters")
	case quoted(key):
		return "", errors.New("the key is in quotes: write it without them")
	}
	return key, nil
}

// keyBase returns the base URL that the API key is sent to: API_BASE_URL, or international pay as you go.
func keyBase(cfg *config) *url.URL {
	if cfg.apiBase != nil {
		return cfg.apiBase
	}
	return &url.URL{Scheme: "https", Host: "dashscope-intl.aliyuncs.com", Path: "/compatible-mode/v1"}
}
