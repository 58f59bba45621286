package main

import (
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
	access      string // "" if the file has only a refresh token
	refresh     string // "" if it can't be refreshed
	typ         string // token_type; "" is Bearer
	resourceURL string // the API to use, as the server sent it
	idToken     string
	scope       string
	obtained    time.Time // wall clock; when the server issued it, or later
	expiry      time.Time // wall clock; zero for an API key, which does not expire
	unstored    bool      // it is only in memory, since it could not be stored

	// members are those of the credential file that it was read from. They are kept when the file is written again.
	members map[string]json.RawMessage

	// A tokenSource computes these for the request path.
	authorization string // the Authorization header's value
	refreshAt     time.Time
	base          *url.URL // of the API
	baseErr       error    // why base is nil
}

// fields returns t's fields by their names in the credential file and in answers of the token endpoint.
func (t *token) fields() map[string]*string {
	return map[string]*string{
		"access_token": &t.access, "refresh_token": &t.refresh, "token_type": &t.typ,
		"resource_url": &t.resourceURL, "id_token": &t.idToken, "scope": &t.scope,
	}
}

// good reports whether t can be used at now.
func (t *token) good(now time.Time) bool {
	return t != nil && t.access != "" && (t.expiry.IsZero() || now.Before(t.expiry))
}

// isKey reports whether t is an API key.
func (t *token) isKey() bool { return t.expiry.IsZero() }

// quotedIn reports whether s contains the access token. A token of less than 6 characters may be part of any text and is not
// looked for; only tests have such.
func (t *token) quotedIn(s string) bool { return len(t.access) >= 6 && strings.Contains(s, t.access) }

// redact returns s without the access token.
func (t *token) redact(s string) string {
	if !t.quotedIn(s) {
		return s
	}
	return strings.ReplaceAll(s, t.access, "(not shown)")
}

// redactError returns err. If its text contains the access token, it returns an error with the rest of that text.
func (t *token) redactError(err error) error {
	if err == nil || !t.quotedIn(err.Error()) {
		return err
	}
	return errors.New(t.redact(err.Error()))
}

// LogValue shows only the expiry.
func (t *token) LogValue() slog.Value {
	if t == nil {
		return slog.StringValue("none")
	}
	return slog.GroupValue(slog.Time("expires", t.expiry))
}

// apiBase returns the base URL of the API that t is for. set, which is API_BASE_URL, wins over t's resource_url. A resource_url
// gets https:// if it has no scheme, and /v1 if it does not end so. Tokens go only to Qwen's own hosts, or to this machine.
func apiBase(set *url.URL, t *token) (*url.URL, error) {
	if set != nil {
		return set, nil
	}
	s := strings.TrimRight(cmp.Or(t.resourceURL, "https://portal.qwen.ai/v1"), "/")
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

// errSignedOut says that the file holds an empty object: the user has signed out.
var errSignedOut = errors.New("signed out")

// A credentialStore reads and writes the credential file in dir. It is safe for concurrent use; lock keeps
// other processes away.
type credentialStore struct {
	dir   string    // "" stores nothing: the demo's sign-in is kept in memory
	watch lockWatch // over the locks of other processes
}

// path returns the file's path, "" if nothing is stored.
func (s *credentialStore) path() string {
	if s.dir == "" {
		return ""
	}
	return filepath.Join(s.dir, credentialFile)
}

// load reads the token. The error is an fs.ErrNotExist if there is no file, errSignedOut, or says why the file can't be used.
// It never quotes the file.
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

// unusable reports whether err, from load, says that there is a file that can't be used.
func unusable(err error) bool {
	return err != nil && !errors.Is(err, errSignedOut) && !errors.Is(err, fs.ErrNotExist)
}

// readRegular reads at most limit bytes of a regular file. It opens nothing else: opening a FIFO waits for a writer.
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

// check returns why the credentials can't be stored, and what to do about it; nil if they can.
func (s *credentialStore) check() error {
	n, err := s.reserve()
	if err == nil {
		n.discard()
		return nil
	}
	dir, uid := absolute(s.dir), os.Getuid()
	return fmt.Errorf("user id %d can't write the directory %q, so a sign-in would be lost when the proxy stops. "+
		"Run the command as the directory's owner, or make this user its owner (sudo chown -R %d %q), or set QWEN_DIR to another directory: %w", uid, dir, uid, dir, err)
}

// parseCredentials reads the content of a credential file that was written at modified.
func parseCredentials(b []byte, modified time.Time) (*token, error) {
	var members map[string]json.RawMessage
	switch err := json.Unmarshal(b, &members); {
	case err != nil || members == nil:
		return nil, errors.New("not a JSON object, or cut short")
	case len(members) == 0:
		return nil, errSignedOut
	}
	t := &token{members: members, obtained: modified.Round(0)}
	if err := stringMembers(members, t.fields()); err != nil {
		return nil, err
	}
	if t.access == "" && t.refresh == "" {
		return nil, errors.New("it has neither access_token nor refresh_token: it seems to belong to another program")
	}
	if t.access != "" && !validKey(t.access) {
		return nil, errors.New("its access_token has spaces or control characters")
	}
	var expiry json.Number // null and absent are 0: expired, but refreshable
	if raw, ok := members["expiry_date"]; ok && json.Unmarshal(raw, &expiry) != nil {
		return nil, errors.New("its expiry_date is not a number")
	}
	ms, _ := expiry.Float64()
	t.expiry = time.UnixMilli(int64(min(max(ms, 1), 1e14))) // the year 5138: JSON has no times beyond 9999
	return t, nil
}

// A newFile is the room on disk for the next credential file, reserved before there is anything to write.
type newFile struct {
	f      *os.File // nil after commit or discard, and if nothing is stored
	target string
}

// reserve makes room for the next file. So a full or read-only disk shows before a refresh token is spent.
func (s *credentialStore) reserve() (*newFile, error) {
	if s.dir == "" {
		return &newFile{}, nil
	}
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

// isMount reports whether the file is a mount point by itself: a hard link can't leave a mount.
func (s *credentialStore) isMount() bool {
	link := s.path() + ".link"
	err := os.Link(s.path(), link)
	if err == nil {
		os.Remove(link)
	}
	return errors.Is(err, syscall.EXDEV)
}

// giveToOwner makes the owner of dir the owner of f if root writes it: after an administrator's login, a service that runs as
// another user has to read the file.
func giveToOwner(f *os.File, dir string) {
	info, err := os.Stat(dir)
	if err != nil || os.Geteuid() != 0 {
		return
	}
	stat := reflect.Indirect(reflect.ValueOf(info.Sys())) // a syscall.Stat_t, which not every system has
	if stat.Kind() != reflect.Struct || !stat.FieldByName("Uid").IsValid() || !stat.FieldByName("Gid").IsValid() {
		return
	}
	f.Chown(int(stat.FieldByName("Uid").Uint()), int(stat.FieldByName("Gid").Uint())) // without the right to do so, root keeps the file
}

// removeLeft removes the temporary files that crashes have left in dir, because they hold tokens. Files in use are younger.
func removeLeft(dir string) {
	left, _ := fs.Glob(os.DirFS(dir), "."+credentialFile+".*.tmp")
	for _, name := range left {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && time.Since(info.ModTime()) > time.Minute {
			os.Remove(path)
		}
	}
}

// discard gives the room up. It does nothing after a successful commit.
func (n *newFile) discard() {
	if n.f != nil {
		n.f.Close()
		os.Remove(n.f.Name())
		n.f = nil
	}
}

// commit makes t the content of the credential file. It ends the use of n, also if it fails.
func (n *newFile) commit(t *token) error {
	defer n.discard()
	content, err := t.fileContent()
	if err != nil {
		return err
	}
	return n.write(content)
}

// write makes content the credential file. A crash at any instant leaves the old file or the new one, whole, unless the file is a
// mount point by itself: then it can't be replaced, and is overwritten.
func (n *newFile) write(content []byte) error {
	if n.f == nil {
		return nil
	}
	defer n.discard()
	if _, err := n.f.WriteAt(content, 0); err != nil {
		return err
	}
	if err := errors.Join(n.f.Truncate(int64(len(content))), n.f.Sync(), n.f.Close()); err != nil {
		return err
	}
	err := os.Rename(n.f.Name(), n.target)
	if errors.Is(err, syscall.EBUSY) {
		f, err := os.OpenFile(n.target, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(content, 0)
		return errors.Join(err, f.Truncate(int64(len(content))), f.Sync(), f.Close())
	} else if err != nil {
		return err
	}
	n.f = nil
	if d, err := os.Open(filepath.Dir(n.target)); err == nil { // the rename itself is on disk once the directory is
		d.Sync() // not every system can; the file is whole either way
		d.Close()
	}
	return nil
}

// save writes t in place of whatever is there. It keeps the members of another program that shares the file.
func (s *credentialStore) save(t *token) error {
	if stored, err := s.load(); err == nil {
		t.members = stored.members
	}
	n, err := s.reserve()
	if err != nil {
		return err
	}
	return n.commit(t)
}

// signOut writes that nobody is signed in.
func (s *credentialStore) signOut() error {
	n, err := s.reserve()
	if err != nil {
		return err
	}
	return n.write([]byte("{}\n"))
}

// fileContent returns the credential file that holds t.
func (t *token) fileContent() ([]byte, error) {
	if t.refresh == "" || t.access == "" {
		return nil, errors.New("the sign-in has no refresh token and is only kept in memory, because other programs take such a file for a foreign one")
	}
	members := maps.Clone(t.members)
	if members == nil {
		members = map[string]json.RawMessage{}
	}
	for name, value := range t.fields() {
		delete(members, name)
		if *value != "" {
			members[name] = json.RawMessage(jsonString(*value))
		}
	}
	if t.typ == "" {
		members["token_type"] = json.RawMessage(`"Bearer"`)
	}
	members["expiry_date"] = strconv.AppendInt(nil, t.expiry.UnixMilli(), 10)
	b, err := json.MarshalIndent(members, "", "  ")
	return append(b, '\n'), err
}
