package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// A token is an access token with all that came with it, or an API key. It does not change once a tokenSource has it.
type token struct {
	access      string // "" where the file has only a refresh token
	refresh     string // "" where it can't be refreshed
	typ         string // token_type; "" is Bearer
	resourceURL string // the API to use, as the server gave it
	idToken     string
	scope       string
	obtained    time.Time // wall clock; when the server issued it, at the latest
	expiry      time.Time // wall clock; zero for an API key, which has none

	// members are those of the credential file that it was read from, kept when the file is written again.
	members map[string]json.RawMessage

	// What tokenSource.prepare makes of these, ready for the request path.
	authorization string // the Authorization header's value
	refreshAt     time.Time
	base          *url.URL // of the API
	baseErr       error    // why base is nil
}

// good reports whether t can be used at now.
func (t *token) good(now time.Time) bool {
	return t != nil && t.access != "" && (t.expiry.IsZero() || now.Before(t.expiry))
}

// LogValue shows the expiry alone.
func (t *token) LogValue() slog.Value {
	if t == nil {
		return slog.StringValue("none")
	}
	return slog.GroupValue(slog.Time("expires", t.expiry))
}

// apiBase returns the base URL of the API that resourceURL names: https where it has no scheme, /v1 put behind
// it where it does not end so. Tokens go only to Qwen's own hosts, or to this machine.
func apiBase(resourceURL string) (*url.URL, error) {
	if resourceURL == "" {
		resourceURL = "https://portal.qwen.ai/v1"
	}
	s := strings.TrimRight(resourceURL, "/")
	if !strings.Contains(s, "://") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("the credentials' resource_url is not a URL; set API_BASE_URL to the API to use")
	}
	host := strings.ToLower(u.Hostname())
	qwens := host == "qwen.ai" || strings.HasSuffix(host, ".qwen.ai") ||
		host == "aliyuncs.com" || strings.HasSuffix(host, ".aliyuncs.com")
	allowed := u.Scheme == "https" && qwens || (u.Scheme == "https" || u.Scheme == "http") && isLoopback(host)
	if !allowed || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("the credentials' resource_url names %q, which is not a host of Qwen's over https; "+
			"if the token may go there, set API_BASE_URL to it", clip(u.Host, 100))
	}
	if !strings.HasSuffix(u.Path, "/v1") {
		u.Path += "/v1"
	}
	u.RawPath = ""
	return u, nil
}

// credentialFile is the name of the file within QWEN_DIR, which Qwen Code shares.
const credentialFile = "oauth_creds.json"

// maxCredentialFile bounds what is read of it, in bytes.
const maxCredentialFile = 1 << 20

// errNoCredentials says that nobody is signed in: there is no file, or it holds an empty object.
var errNoCredentials = errors.New("no credentials")

// A credentialStore reads and writes the credential file in dir.
type credentialStore struct {
	dir string
}

func (s *credentialStore) path() string { return filepath.Join(s.dir, credentialFile) }

// load reads the token. The error is errNoCredentials, or says why the file can't be used without quoting it.
func (s *credentialStore) load() (*token, error) {
	f, err := os.Open(s.path())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoCredentials
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxCredentialFile))
	if err != nil {
		return nil, err
	}
	t, err := parseCredentials(b, info.ModTime())
	if err != nil && !errors.Is(err, errNoCredentials) {
		err = fmt.Errorf("credentials file %q: %w", s.path(), err)
	}
	return t, err
}

// parseCredentials reads the content of a credential file that was written at modified.
func parseCredentials(b []byte, modified time.Time) (*token, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(b, &members); err != nil {
		if len(bytes.TrimSpace(b)) == 0 {
			return nil, errors.New("the file is empty")
		}
		return nil, errors.New("not a JSON object, or cut short")
	}
	if len(members) == 0 {
		return nil, errNoCredentials
	}
	t := &token{members: members, obtained: modified.Round(0)}
	for name, field := range map[string]*string{
		"access_token": &t.access, "refresh_token": &t.refresh, "token_type": &t.typ,
		"resource_url": &t.resourceURL, "id_token": &t.idToken, "scope": &t.scope,
	} {
		if raw, ok := members[name]; ok && json.Unmarshal(raw, field) != nil {
			return nil, fmt.Errorf("its %s is not a string", name)
		}
	}
	if t.access == "" && t.refresh == "" {
		return nil, errors.New("neither access_token nor refresh_token is in it: it seems to be another program's")
	}
	if t.access != "" && !validKey(t.access) {
		return nil, errors.New("its access_token has blanks or control characters")
	}
	var expiry json.Number // null and absent are 0: expired, but refreshable
	if raw, ok := members["expiry_date"]; ok && json.Unmarshal(raw, &expiry) != nil {
		return nil, errors.New("its expiry_date is not a number")
	}
	ms, _ := expiry.Float64()
	if ms < 1e11 {
		ms *= 1000 // seconds by mistake: as milliseconds it would be before 1974
	}
	t.expiry = time.UnixMilli(int64(min(max(ms, 1), 1e14))) // the year 5138: JSON has no times beyond 9999
	return t, nil
}

// save writes t, with the members that it was read with, so that a crash at any instant leaves the old file or
// the new one, whole.
func (s *credentialStore) save(t *token) error {
	if t.refresh == "" || t.access == "" {
		return errors.New("the sign-in has no refresh token: it is kept in memory alone, since other programs take such a file for a foreign one")
	}
	typ := t.typ
	if typ == "" {
		typ = "Bearer"
	}
	members := maps.Clone(t.members)
	if members == nil {
		members = map[string]json.RawMessage{}
	}
	for name, value := range map[string]string{
		"access_token": t.access, "refresh_token": t.refresh, "token_type": typ,
		"resource_url": t.resourceURL, "id_token": t.idToken, "scope": t.scope,
	} {
		delete(members, name)
		if value != "" {
			members[name], _ = json.Marshal(value)
		}
	}
	members["expiry_date"], _ = json.Marshal(t.expiry.UnixMilli())
	b, err := json.MarshalIndent(members, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	return writeFileAtomic(s.path(), append(b, '\n'))
}

// writeFileAtomic writes content to path with mode 0600 by way of a temporary file beside it.
func writeFileAtomic(path string, content []byte) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*.tmp") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(content); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	if d, err := os.Open(dir); err == nil { // the rename itself is on disk once the directory is
		d.Sync() // not every system can; the file is whole either way
		d.Close()
	}
	return nil
}
