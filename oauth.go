package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

const (
	deviceGrant = "urn:ietf:params:oauth:grant-type:device_code" // RFC 8628 §3.4

	// defaultInterval is the pause between polls where the server names none, RFC 8628 §3.2.
	defaultInterval = 5 * time.Second
	// slowDownStep is added to the poll interval after each slow_down, RFC 8628 §3.5.
	slowDownStep = 5 * time.Second
	// maxInterval bounds an interval that a broken server announces.
	maxInterval = time.Minute

	// defaultCodeLife and maxCodeLife bound the life of a device code, whose expires_in is required (RFC 8628 §3.2).
	defaultCodeLife = 15 * time.Minute
	maxCodeLife     = time.Hour

	// defaultTokenLife is assumed where a token answer has no expires_in (RFC 6749 §5.1 only recommends it) or one
	// that makes no sense. A token that dies sooner is found out by the API's 401.
	defaultTokenLife = time.Hour
	maxTokenLife     = 366 * 24 * time.Hour

	// oauthTimeout bounds one call to the OAuth server. It is below the 30 s that Qwen Code waits for a lock.
	oauthTimeout = 25 * time.Second
	// maxOAuthAnswer bounds the bytes of an answer that are read.
	maxOAuthAnswer = 1 << 20
)

// An oauthClient speaks to Qwen's OAuth server: the device authorization grant (RFC 8628) with PKCE
// (RFC 7636), and refreshes (RFC 6749 §6). It is safe for concurrent use.
type oauthClient struct {
	http     *http.Client // follows no redirects
	base     *url.URL
	clientID string
	scope    string
}

// An oauthError is an error response of RFC 6749 §5.2.
type oauthError struct {
	Status      int
	Code        string // the error member; "" where a 400 or 401 in JSON has none
	Description string // foreign text: quoted wherever it is shown
}

func (e *oauthError) Error() string {
	switch {
	case e.Code == "":
		return fmt.Sprintf("status %d", e.Status)
	case e.Description != "":
		return fmt.Sprintf("%q (%q)", e.Code, e.Description)
	}
	return fmt.Sprintf("%q", e.Code)
}

// A strangeAnswer says that the server answered, but not as RFC 6749 has it: too many requests, a gateway's page.
type strangeAnswer string

func (e strangeAnswer) Error() string { return string(e) }

// unanswered reports whether err says that the server could not be reached, and not that its answer was no good.
func unanswered(err error) bool {
	_, oauth := errors.AsType[*oauthError](err)
	_, strange := errors.AsType[strangeAnswer](err)
	return !oauth && !strange
}

// trouble says why a sign-in could not be started or ended, for err.
func (c *oauthClient) trouble(err error) string {
	var timeout interface{ Timeout() bool }
	if e, ok := errors.AsType[*oauthError](err); ok && refused(err) {
		return fmt.Sprintf("Qwen's sign-in server refused the sign-in: %v.", e)
	} else if ok {
		return fmt.Sprintf("Qwen's sign-in server can't take a sign-in now: %v.", e)
	} else if e, ok := errors.AsType[strangeAnswer](err); ok {
		return fmt.Sprintf("Qwen's sign-in server can't take a sign-in now: %v.", e)
	} else if e, ok := errors.AsType[*net.DNSError](err); ok {
		err = errors.New(e.Err)
	} else if errors.As(err, &timeout) && timeout.Timeout() {
		err = errors.New("no answer in time")
	} else if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err // without the URL
	}
	return fmt.Sprintf("Qwen's sign-in server %s can't be reached: %v. Check the network (HTTPS_PROXY is used if it is set).", c.base.Host, err)
}

// refused reports whether err is the server's last word: to try the same again is useless.
func refused(err error) bool {
	e, ok := errors.AsType[*oauthError](err)
	if !ok {
		return false
	}
	switch e.Code {
	case "temporarily_unavailable", "server_error", "slow_down", "rate_limit_exceeded":
		return false
	}
	return e.Status < 500 && e.Status != http.StatusTooManyRequests
}

// A deviceAuth is a sign-in that waits for its user: the answer of RFC 8628 §3.2 and the PKCE verifier.
type deviceAuth struct {
	deviceCode              string
	userCode                string
	verificationURI         string
	verificationURIComplete string // verificationURI where the server gave none
	expires                 time.Time
	interval                time.Duration
	verifier                string
}

// authorize asks for a device code.
func (c *oauthClient) authorize(ctx context.Context) (*deviceAuth, error) {
	verifier := base64.RawURLEncoding.EncodeToString(randomBytes(32))
	challenge := sha256.Sum256([]byte(verifier))
	var answer struct {
		DeviceCode              string  `json:"device_code"`
		UserCode                string  `json:"user_code"`
		VerificationURI         string  `json:"verification_uri"`
		VerificationURIComplete string  `json:"verification_uri_complete"`
		ExpiresIn               seconds `json:"expires_in"`
		Interval                seconds `json:"interval"`
	}
	err := c.post(ctx, "/api/v1/oauth2/device/code", url.Values{
		"client_id":             {c.clientID},
		"scope":                 {c.scope},
		"code_challenge":        {base64.RawURLEncoding.EncodeToString(challenge[:])},
		"code_challenge_method": {"S256"},
	}, &answer)
	if err != nil {
		return nil, fmt.Errorf("device authorization: %w", err)
	}
	if answer.VerificationURIComplete == "" {
		answer.VerificationURIComplete = answer.VerificationURI
	}
	if answer.VerificationURI == "" {
		answer.VerificationURI = answer.VerificationURIComplete
	}
	switch {
	case answer.DeviceCode == "":
		return nil, strangeAnswer("the answer has no device_code")
	case !validKey(answer.UserCode) || len(answer.UserCode) > 100:
		return nil, strangeAnswer("the answer has no usable user_code")
	case !c.showable(answer.VerificationURI) || !c.showable(answer.VerificationURIComplete):
		return nil, strangeAnswer("the answer has no usable verification_uri")
	}
	return &deviceAuth{
		deviceCode:              answer.DeviceCode,
		userCode:                answer.UserCode,
		verificationURI:         answer.VerificationURI,
		verificationURIComplete: answer.VerificationURIComplete,
		expires:                 wallClock().Add(answer.ExpiresIn.within(defaultCodeLife, maxCodeLife)),
		interval:                answer.Interval.within(defaultInterval, maxInterval),
		verifier:                verifier,
	}, nil
}

// showable reports whether a link of the server's may be put before a user: an http or https URL of
// printable ASCII, https unless the OAuth server itself is spoken to over http.
func (c *oauthClient) showable(link string) bool {
	u, err := url.Parse(link)
	return err == nil && u.Host != "" && (u.Scheme == "https" || u.Scheme == "http" && c.base.Scheme == "http") &&
		len(link) < 2048 && validKey(link)
}

// errCodeExpired ends a sign-in that nobody completed in time.
var errCodeExpired = &oauthError{Status: http.StatusBadRequest, Code: "expired_token"}

// poll asks for the token until the user has approved or denied the sign-in, or its code has expired
// (RFC 8628 §3.4 and §3.5). Failures of the network or of the server do not end it. The error is an *oauthError
// (access_denied, expired_token, …) or that of ctx.
func (c *oauthClient) poll(ctx context.Context, d *deviceAuth) (*token, error) {
	interval := d.interval
	pause := interval
	for {
		if !sleep(ctx, pause) {
			return nil, context.Cause(ctx)
		}
		if !time.Now().Before(d.expires) {
			return nil, errCodeExpired
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
		e, ok := errors.AsType[*oauthError](err)
		switch {
		case ok && e.Code == "authorization_pending":
			pause = interval
		case ok && e.Code == "slow_down":
			interval += slowDownStep
			pause = interval
		case !refused(err) || e.Code == "" && e.Status == http.StatusBadRequest:
			// "On encountering a connection timeout, clients MUST unilaterally reduce their polling
			// frequency before retrying" (RFC 8628 §3.5); an HTML page or a 502 is treated alike.
			pause = min(2*pause, max(interval, 30*time.Second))
		case e.Status == http.StatusUnauthorized && e.Code != "access_denied":
			return nil, errCodeExpired // Qwen answers so for a code it no longer knows
		default:
			return nil, e
		}
	}
}

// refresh redeems refreshToken (RFC 6749 §6). The new token has no refresh token where the answer has none: the
// old one stays valid then.
func (c *oauthClient) refresh(ctx context.Context, refreshToken string) (*token, error) {
	t, err := c.token(ctx, url.Values{
		"grant_type":    {"refresh_token"},
		"refresh_token": {refreshToken},
		"client_id":     {c.clientID},
	})
	if err != nil {
		return nil, fmt.Errorf("token refresh: %w", err)
	}
	return t, nil
}

// token posts form to the token endpoint and reads the token of the answer.
func (c *oauthClient) token(ctx context.Context, form url.Values) (*token, error) {
	var answer struct {
		AccessToken  string  `json:"access_token"`
		RefreshToken string  `json:"refresh_token"`
		TokenType    string  `json:"token_type"`
		ExpiresIn    seconds `json:"expires_in"`
		ResourceURL  string  `json:"resource_url"`
		IDToken      string  `json:"id_token"`
		Scope        string  `json:"scope"`
	}
	if err := c.post(ctx, "/api/v1/oauth2/token", form, &answer); err != nil {
		return nil, err
	}
	if !validKey(answer.AccessToken) {
		return nil, errors.New("the answer has no usable access_token")
	}
	now := wallClock()
	return &token{
		access:      answer.AccessToken,
		refresh:     answer.RefreshToken,
		typ:         answer.TokenType,
		resourceURL: answer.ResourceURL,
		idToken:     answer.IDToken,
		scope:       answer.Scope,
		obtained:    now,
		expiry:      now.Add(answer.ExpiresIn.within(defaultTokenLife, maxTokenLife)),
	}, nil
}

// post sends form to path and decodes the JSON object of a 200 into answer. Where the answer has an error
// member, or is a 400 or 401 in JSON, the error is an *oauthError. No error holds what was sent.
func (c *oauthClient) post(ctx context.Context, path string, form url.Values, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, oauthTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base.JoinPath(path).String(), strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", userAgent)
	res, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxOAuthAnswer+1))
	if err != nil {
		return fmt.Errorf("%s: reading the answer: %w", c.base.Host, err)
	}
	if len(body) > maxOAuthAnswer {
		return strangeAnswer(fmt.Sprintf("%s answered %s with more than %d bytes", c.base.Host, res.Status, maxOAuthAnswer))
	}

	// The error member decides, not the status: errors have been seen with 200, and slow_down with 429.
	var failure struct {
		Error       string `json:"error"`
		Description string `json:"error_description"`
	}
	json.Unmarshal(body, &failure) // a mistyped member is as good as none
	isJSON := json.Valid(body)
	for _, name := range []string{"refresh_token", "device_code", "code_verifier"} {
		if secret := form.Get(name); len(secret) >= 8 { // some servers repeat what they refuse; a shorter one is part of any text
			failure.Error = strings.ReplaceAll(failure.Error, secret, "(not shown)")
			failure.Description = strings.ReplaceAll(failure.Description, secret, "(not shown)")
		}
	}
	switch {
	case isJSON && failure.Error != "":
		return &oauthError{Status: res.StatusCode, Code: clip(failure.Error, 100), Description: clip(failure.Description, 300)}
	case isJSON && (res.StatusCode == http.StatusBadRequest || res.StatusCode == http.StatusUnauthorized):
		return &oauthError{Status: res.StatusCode}
	case res.StatusCode != http.StatusOK:
		return strangeAnswer(fmt.Sprintf("%s answered %s", c.base.Host, res.Status))
	}
	if err := json.Unmarshal(body, answer); err != nil {
		return strangeAnswer(c.base.Host + " answered something other than the JSON of RFC 6749") // err may quote a token
	}
	return nil
}

// seconds is a number of seconds in an answer, as a number or, as some servers have it, in a string.
type seconds float64

func (s *seconds) UnmarshalJSON(b []byte) error {
	var n json.Number // takes a quoted number too
	if err := json.Unmarshal(b, &n); err != nil || n == "" {
		return nil // not a number: as if it were absent
	}
	f, err := n.Float64()
	if err == nil {
		*s = seconds(f)
	}
	return nil
}

// within returns s as a duration from 1 s to high, and def where s is absent, zero or negative.
func (s seconds) within(def, high time.Duration) time.Duration {
	switch {
	case !(s > 0):
		return def
	case float64(s) >= high.Seconds():
		return high
	}
	return time.Duration(max(float64(s), 1) * float64(time.Second))
}

// clip returns s cut to at most n bytes.
func clip(s string, n int) string {
	return s[:min(len(s), n)]
}

// wallClock is the time without its monotonic reading: that stands still while a laptop sleeps, and tokens
// expire all the same.
func wallClock() time.Time { return time.Now().Round(0) }

// sleep waits for d, and reports false when ctx ended first.
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

// backoff returns the pause before attempt n (from 0): 1 s doubled each time up to high, less up to a
// fifth, so that clients of a server that comes back do not return all at once.
func backoff(n int, high time.Duration) time.Duration {
	d := min(time.Second<<min(n, 20), high)
	return d - mathrand.N(d/5+1)
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return b
}

func newOAuthClient(cfg *config) *oauthClient {
	client := &http.Client{
		Transport: newTransport(),
		// A redirect would carry refresh tokens elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return &oauthClient{http: client, base: cfg.oauthBase, clientID: cfg.oauthClientID, scope: cfg.oauthScope}
}
