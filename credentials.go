package main

import (
	"bytes"
	"cmp"
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
	"reflect"
	"strconv"
	"strings"
	"syscall"
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

	unstored bool // it is in memory alone, since it could not be stored

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

// isKey reports whether t is an API key.
func (t *token) isKey() bool { return t.expiry.IsZero() }

// quotedIn reports whether s contains the access token. One of less than 6 characters, which only tests have, may be part
// of any text and is not looked for.
func (t *token) quotedIn(s string) bool { return len(t.access) >= 6 && strings.Contains(s, t.access) }

// redact returns s without the access token.
func (t *token) redact(s string) string {
	if !t.quotedIn(s) {
		return s
	}
	return strings.ReplaceAll(s, t.access, "(not shown)")
}

// redactError returns err, or where that quotes the access token, its text without it.
func (t *token) redactError(err error) error {
	if err == nil || !t.quotedIn(err.Error()) {
		return err
	}
	return errors.New(t.redact(err.Error()))
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

// errSignedOut says that the file holds an empty object: whoever was signed in has signed out.
var errSignedOut = errors.New("signed out")

// A credentialStore reads and writes the credential file in dir. It is safe for concurrent use; lock keeps
// other processes away.
type credentialStore struct {
	dir   string    // "" stores nothing: the demo's sign-in is kept in memory
	watch lockWatch // over the locks of other processes
}

// path returns the file's path, "" where nothing is stored.
func (s *credentialStore) path() string {
	if s.dir == "" {
		return ""
	}
	return filepath.Join(s.dir, credentialFile)
}

// load reads the token. The error is an fs.ErrNotExist where there is no file, errSignedOut, or says why the file
// can't be used without quoting it.
func (s *credentialStore) load() (*token, error) {
	b, info, err := readRegular(s.path(), maxCredentialFile)
	if err != nil {
		return nil, err
	}
	t, err := parseCredentials(b, info.ModTime())
	if err != nil && !errors.Is(err, errSignedOut) {
		err = fmt.Errorf("credentials file %q: %w", s.path(), err)
	}
	return t, err
}

// unusable reports whether load's err says that there is a file that can't be used.
func unusable(err error) bool {
	return err != nil && !errors.Is(err, errSignedOut) && !errors.Is(err, fs.ErrNotExist)
}

// readRegular reads at most limit bytes of a regular file. It opens nothing else: to open a FIFO waits for a writer.
func readRegular(path string, limit int64) ([]byte, fs.FileInfo, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, nil, err
	case info.IsDir():
		return nil, nil, &fs.PathError{Op: "read", Path: path, Err: syscall.EISDIR}
	case !info.Mode().IsRegular():
		return nil, nil, &fs.PathError{Op: "read", Path: path, Err: errors.New("not a regular file")}
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil {
		return nil, nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, limit))
	return b, info, err
}

// sameFile reports whether two looks at a path found the same file, unchanged. A nil look found none.
func sameFile(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == b
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

// check returns why the directory can't be written, in words that say what to do; nil where it can.
func (s *credentialStore) check() error {
	if s.dir == "" {
		return nil
	}
	err := os.MkdirAll(s.dir, 0o700)
	if err == nil {
		var f *os.File
		if f, err = os.CreateTemp(s.dir, ".write-check-*"); err == nil {
			f.Close()
			os.Remove(f.Name())
		}
	}
	if err == nil {
		return nil
	}
	dir, absErr := filepath.Abs(s.dir)
	if absErr != nil {
		dir = s.dir
	}
	hint := "set QWEN_DIR to a directory that it can write"
	if errors.Is(err, fs.ErrPermission) {
		hint = fmt.Sprintf("run: sudo mkdir -p %[1]q && sudo chown -R %[2]d %[1]q", dir, os.Getuid())
	}
	return fmt.Errorf("user id %d can't write the directory %q, so that a sign-in would be lost when the proxy stops; %s: %w", os.Getuid(), dir, hint, err)
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
	if members == nil {
		return nil, errors.New("not a JSON object, or cut short")
	}
	if len(members) == 0 {
		return nil, errSignedOut
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

// errInPlace is no failure: the file could not be replaced, and was written in place.
var errInPlace = errors.New("the file is a mount point by itself, so that a crash while it is written can cut it short; mount its directory instead")

// A newFile is the room for the next credential file, on the disk before there is anything to put in.
type newFile struct {
	f      *os.File
	target string
}

// reserve makes room for the next file: where a token is fetched that must not be lost, a full or read-only disk
// shall show before.
func (s *credentialStore) reserve() (*newFile, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	target := s.path()
	if real, err := filepath.EvalSymlinks(target); err == nil {
		target = real
	}
	removeLeft(filepath.Dir(target))
	f, err := os.CreateTemp(filepath.Dir(target), "."+credentialFile+".*.tmp") // mode 0600
	if err != nil {
		return nil, err
	}
	giveToOwner(f, filepath.Dir(target))
	n := &newFile{f: f, target: target}
	if _, err := f.Write(make([]byte, 16<<10)); err != nil {
		n.discard()
		return nil, err
	}
	return n, nil
}

// giveToOwner makes the owner of dir the owner of f, if root writes it: a service whose administrator runs login has to read
// the file under a user of its own.
func giveToOwner(f *os.File, dir string) {
	info, err := os.Stat(dir)
	if err != nil || os.Geteuid() != 0 {
		return
	}
	stat := reflect.Indirect(reflect.ValueOf(info.Sys())) // a syscall.Stat_t, which not every system has
	if stat.Kind() != reflect.Struct || !stat.FieldByName("Uid").IsValid() || !stat.FieldByName("Gid").IsValid() {
		return
	}
	f.Chown(int(stat.FieldByName("Uid").Uint()), int(stat.FieldByName("Gid").Uint())) // a root without that right keeps the file
}

// removeLeft removes the temporary files that crashes have left in dir: they hold tokens. What is in use is younger.
func removeLeft(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && strings.HasPrefix(e.Name(), "."+credentialFile+".") && strings.HasSuffix(e.Name(), ".tmp") &&
			time.Since(info.ModTime()) > time.Minute {
			os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}

// discard gives the room up. It does nothing after commit.
func (n *newFile) discard() {
	if n.f != nil {
		n.f.Close()
		os.Remove(n.f.Name())
		n.f = nil
	}
}

// commit makes content the credential file. A crash at any instant leaves the old file or the new one, whole; where
// the error is errInPlace the content is stored, but not in that way.
func (n *newFile) commit(content []byte) error {
	defer n.discard()
	if _, err := n.f.WriteAt(content, 0); err != nil {
		return err
	}
	if err := errors.Join(n.f.Truncate(int64(len(content))), n.f.Sync(), n.f.Close()); err != nil {
		return err
	}
	err := os.Rename(n.f.Name(), n.target)
	if errors.Is(err, syscall.EBUSY) {
		if err = writeInPlace(n.target, content); err == nil {
			err = errInPlace
		}
	} else if err == nil {
		n.f = nil
		if d, err := os.Open(filepath.Dir(n.target)); err == nil { // the rename itself is on disk once the directory is
			d.Sync() // not every system can; the file is whole either way
			d.Close()
		}
	}
	return err
}

// writeInPlace overwrites path, which can't be replaced.
func writeInPlace(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(content, 0)
	return errors.Join(err, f.Truncate(int64(len(content))), f.Sync(), f.Close())
}

// save writes t, with the members that it was read with.
func (s *credentialStore) save(t *token) error {
	if s.dir == "" {
		return nil
	}
	n, err := s.reserve()
	if err != nil {
		return err
	}
	defer n.discard()
	content, err := t.fileContent()
	if err != nil {
		return err
	}
	return n.commit(content)
}

// replace writes t in the place of whatever is there. It keeps the members that it does not know.
func (s *credentialStore) replace(t *token) error {
	if stored, err := s.load(); err == nil {
		t.members = stored.members // of another program that shares the file
	}
	return s.save(t)
}

// signOut makes the file say that nobody is signed in.
func (s *credentialStore) signOut() error {
	n, err := s.reserve()
	if err != nil {
		return err
	}
	return n.commit([]byte("{}\n"))
}

// fileContent returns the credential file that holds t.
func (t *token) fileContent() ([]byte, error) {
	if t.refresh == "" || t.access == "" {
		return nil, errors.New("the sign-in has no refresh token: it is kept in memory alone, since other programs take such a file for a foreign one")
	}
	members := maps.Clone(t.members)
	if members == nil {
		members = map[string]json.RawMessage{}
	}
	for name, value := range map[string]string{
		"access_token": t.access, "refresh_token": t.refresh, "token_type": cmp.Or(t.typ, "Bearer"),
		"resource_url": t.resourceURL, "id_token": t.idToken, "scope": t.scope,
	} {
		delete(members, name)
		if value != "" {
			members[name] = jsonString(value)
		}
	}
	members["expiry_date"] = strconv.AppendInt(nil, t.expiry.UnixMilli(), 10)
	b, err := json.MarshalIndent(members, "", "  ")
	return append(b, '\n'), err
}
