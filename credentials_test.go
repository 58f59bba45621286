package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// fileContent is a credential file as Qwen Code writes it, with a member that the proxy does not know.
const fileContent = `{
  "access_token": "access-s3cret",
  "refresh_token": "refresh-s3cret",
  "token_type": "Bearer",
  "resource_url": "portal.qwen.ai",
  "expiry_date": 1753142400123,
  "id_token": "id-s3cret",
  "scope": "openid profile",
  "endpoint": {"of": ["another", "version", 1e2]}
}
`

// tokenFields are a token's fields that the credential file keeps.
func tokenFields(t *token) map[string]any {
	return map[string]any{
		"access": t.access, "refresh": t.refresh, "typ": t.typ, "resourceURL": t.resourceURL,
		"idToken": t.idToken, "scope": t.scope, "expiry": t.expiry.UnixMilli(),
	}
}

func TestParseCredentials(t *testing.T) {
	modified := time.Now()
	got, err := parseCredentials([]byte(fileContent), modified)
	fatalIf(t, err)
	want := map[string]any{
		"access": "access-s3cret", "refresh": "refresh-s3cret", "typ": "Bearer", "resourceURL": "portal.qwen.ai",
		"idToken": "id-s3cret", "scope": "openid profile", "expiry": int64(1753142400123),
	}
	wantEqual(t, "token", want, tokenFields(got))
	if !got.obtained.Equal(modified) || got.obtained != got.obtained.Round(0) {
		t.Errorf("obtained %v, want %v without a monotonic reading", got.obtained, modified)
	}
}

func TestParseCredentialsErrors(t *testing.T) {
	const broken = "not a JSON object, or cut short"
	for _, tt := range []struct{ name, content, want string }{
		{"empty", "", broken},
		{"blank", " \r\n\t", broken},
		{"an empty object", "{}", errSignedOut.Error()},
		{"null", "null\n", broken},
		{"an array", "[]", broken},
		{"a string", `"s3cret"`, broken},
		{"a number", "1", broken},
		{"not JSON", "access_token=s3cret", broken},
		{"something behind it", fileContent + "{}", broken},
		{"NULs, as after a crash", strings.Repeat("\x00", 100), broken},
		{"another program's", `{"installed":{"client_id":"x","client_secret":"s3cret"}}`, "it has neither access_token nor refresh_token"},
		{"neither token", `{"token_type":"Bearer","expiry_date":1753142400123}`, "it has neither access_token nor refresh_token"},
		{"both tokens null", `{"access_token":null,"refresh_token":null}`, "it has neither access_token nor refresh_token"},
		{"names in another case", `{"Access_Token":"s3cret"}`, "it has neither access_token nor refresh_token"},
		{"access_token a number", `{"access_token":1,"refresh_token":"s3cret"}`, "its access_token is not a string"},
		{"refresh_token an object", `{"access_token":"s3cret","refresh_token":{}}`, "its refresh_token is not a string"},
		{"token_type an array", `{"access_token":"s3cret","token_type":["Bearer"]}`, "its token_type is not a string"},
		{"resource_url a boolean", `{"access_token":"s3cret","resource_url":true}`, "its resource_url is not a string"},
		{"scope an array", `{"access_token":"s3cret","scope":["openid"]}`, "its scope is not a string"},
		{"a line break in access_token", `{"access_token":"s3cret\r\nX-Evil: 1"}`, "its access_token has spaces or control characters"},
		{"expiry_date a word", `{"access_token":"s3cret","expiry_date":"tomorrow"}`, "its expiry_date is not a number"},
		{"expiry_date an object", `{"access_token":"s3cret","expiry_date":{}}`, "its expiry_date is not a number"},
		{"expiry_date a boolean", `{"access_token":"s3cret","expiry_date":true}`, "its expiry_date is not a number"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseCredentials([]byte(tt.content), time.Now())
			if got != nil || err == nil || !strings.HasPrefix(err.Error(), tt.want) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("got %v, %v; want the error %q", got, err, tt.want)
			}
			if want := tt.want == errSignedOut.Error(); errors.Is(err, errSignedOut) != want {
				t.Errorf("errSignedOut: %t, want %t", !want, want)
			}
		})
	}
}

func TestParseCredentialsCutShort(t *testing.T) {
	for n := range len(strings.TrimSpace(fileContent)) {
		got, err := parseCredentials([]byte(fileContent[:n]), time.Now())
		if got != nil || err == nil || errors.Is(err, errSignedOut) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("cut to %d bytes: got %v, %v; want an error of its own", n, got, err)
		}
	}
}

func TestParseCredentialsIncomplete(t *testing.T) {
	now := time.Now()
	for _, tt := range []struct {
		content string
		good    bool
	}{
		{`{"access_token":"a","expiry_date":4102444800000}`, true},
		{`{"access_token":"a","refresh_token":null,"expiry_date":4102444800000}`, true},
		{`{"access_token":"a"}`, false},
		{`{"refresh_token":"r"}`, false},
		{`{"refresh_token":"r","expiry_date":4102444800000}`, false},
		{`{"access_token":null,"refresh_token":"r","token_type":null,"resource_url":null,"expiry_date":null}`, false},
	} {
		got, err := parseCredentials([]byte(tt.content), now)
		if err != nil {
			t.Errorf("%s: %v", tt.content, err)
		} else if got.good(now) != tt.good {
			t.Errorf("%s: good %t, want %t", tt.content, !tt.good, tt.good)
		}
	}
}

func TestParseCredentialsExpiry(t *testing.T) {
	const july2025 = 1753142400000
	for expiry, want := range map[string]int64{
		"1753142400123":   july2025 + 123,
		`"1753142400123"`: july2025 + 123,
		"1753142400123.9": july2025 + 123,
		"1.7531424e12":    july2025,
		"null":            1,
		"0":               1,
		"-1":              1,
		"-1753142400123":  1,
		"-1e400":          1,
		"1e-400":          1,
	} {
		got, err := parseCredentials([]byte(`{"access_token":"a","refresh_token":"r","expiry_date":`+expiry+`}`), time.Now())
		if err != nil {
			t.Errorf("%s: %v", expiry, err)
		} else if ms := got.expiry.UnixMilli(); ms != want {
			t.Errorf("expiry_date %s is read as %d, want %d", expiry, ms, want)
		}
	}
	for _, expiry := range []string{"1753142400123000", "1e18", "1e300", "1e400"} {
		got, err := parseCredentials([]byte(`{"access_token":"a","expiry_date":`+expiry+`}`), time.Now())
		if err != nil {
			t.Errorf("%s: %v", expiry, err)
		} else if !got.good(time.Now()) {
			t.Errorf("expiry_date %s is read as %v, want a time to come", expiry, got.expiry)
		}
	}
}

func TestLoadCredentials(t *testing.T) {
	store := &credentialStore{dir: filepath.Join(t.TempDir(), "missing")}
	if got, err := store.load(); got != nil || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: got %v, %v; want fs.ErrNotExist", got, err)
	}
	store.dir = t.TempDir()
	if got, err := store.load(); got != nil || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: got %v, %v; want fs.ErrNotExist", got, err)
	}
	writeFile(t, store.path(), "{}")
	if got, err := store.load(); got != nil || err != errSignedOut {
		t.Errorf("an empty object: got %v, %v; want errSignedOut", got, err)
	}
	writeFile(t, store.path(), `{"access_token":"s3cret`)
	if got, err := store.load(); got != nil || err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", store.path())) || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("broken: got %v, %v; want an error that names the file", got, err)
	}
	writeFile(t, store.path(), fileContent+strings.Repeat(" ", maxCredentialFile))
	if got, err := store.load(); err != nil || got.access != "access-s3cret" {
		t.Errorf("blanks up to the bound: got %v, %v", got, err)
	}
	writeFile(t, store.path(), strings.Repeat(" ", maxCredentialFile)+fileContent)
	if got, err := store.load(); got != nil || err == nil {
		t.Errorf("beyond the bound: got %v, %v; want an error", got, err)
	}
	modified := time.Date(2025, 7, 22, 0, 0, 0, 0, time.UTC)
	writeFile(t, store.path(), fileContent)
	fatalIf(t, os.Chtimes(store.path(), modified, modified))
	if got, err := store.load(); err != nil || !got.obtained.Equal(modified) {
		t.Errorf("got %v, %v; want it obtained at %v", got, err, modified)
	}
}

// TestSaveCredentials: the file is as Qwen Code writes it, with the members that the proxy does not know, and for nobody else to read.
func TestSaveCredentials(t *testing.T) {
	store := &credentialStore{dir: filepath.Join(t.TempDir(), "a", "b")}
	tok := &token{access: "a1", refresh: "r1", expiry: time.UnixMilli(1784678400123)}
	fatalIf(t, store.save(tok))
	wantCredentialFileAlone(t, store)
	writeFile(t, store.path(), fileContent)
	fatalIf(t, os.Chmod(store.path(), 0o644))
	old, err := store.load()
	fatalIf(t, err)
	before := anyMembers(t, old.members)
	tok.typ, tok.resourceURL, tok.scope, tok.members = "bearer", "dashscope.aliyuncs.com", "openid", old.members
	fatalIf(t, store.save(tok))
	wantCredentialFileAlone(t, store)
	wantEqual(t, "members of the token that was loaded", before, anyMembers(t, old.members))
	wantEqual(t, "file", `{
  "access_token": "a1",
  "endpoint": {
    "of": [
      "another",
      "version",
      1e2
    ]
  },
  "expiry_date": 1784678400123,
  "refresh_token": "r1",
  "resource_url": "dashscope.aliyuncs.com",
  "scope": "openid",
  "token_type": "bearer"
}
`, readFile(t, store.path()))
}

// wantCredentialFileAlone checks that the directory holds the file and no more, and that nobody else may read them.
func wantCredentialFileAlone(t *testing.T, store *credentialStore) {
	t.Helper()
	entries, err := os.ReadDir(store.dir)
	fatalIf(t, err)
	if len(entries) != 1 || entries[0].Name() != credentialFile {
		t.Errorf("the directory holds %v, want %s alone", entries, credentialFile)
	}
	for path, want := range map[string]fs.FileMode{store.path(): 0o600, store.dir: 0o700, filepath.Dir(store.dir): 0o700} {
		info, err := os.Stat(path)
		fatalIf(t, err)
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %o, want %o", path, got, want)
		}
	}
}

func TestSaveLeavesNothingBehindWhereItFails(t *testing.T) {
	for name, tt := range map[string]struct {
		put   func(store *credentialStore) error
		token token
		left  int // files in the directory, as they were
	}{
		"a directory in the file's place":        {func(s *credentialStore) error { return os.Mkdir(s.path(), 0o700) }, token{access: "s3cret", refresh: "s3cret"}, 1},
		"a foreign member that is not JSON":      {nil, token{access: "s3cret", refresh: "s3cret", members: map[string]json.RawMessage{"x": json.RawMessage("{")}}, 0},
		"no refresh token, foreign to Qwen Code": {func(s *credentialStore) error { return os.WriteFile(s.path(), []byte(fileContent), 0o600) }, token{access: "s3cret"}, 1},
	} {
		store := &credentialStore{dir: t.TempDir()}
		if tt.put != nil {
			fatalIf(t, tt.put(store))
		}
		before, _ := os.ReadFile(store.path())
		if err := store.save(&tt.token); err == nil || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: error %v, want one without a token", name, err)
		}
		after, _ := os.ReadFile(store.path())
		if entries, err := os.ReadDir(store.dir); err != nil || len(entries) != tt.left || !bytes.Equal(before, after) {
			t.Errorf("%s: the directory holds %v, %v; want what was there", name, entries, err)
		}
	}
	store := &credentialStore{dir: filepath.Join(t.TempDir(), "file")}
	writeFile(t, store.dir, "mine")
	if err := store.save(&token{access: "s3cret", refresh: "s3cret"}); err == nil || readFile(t, store.dir) != "mine" {
		t.Errorf("a file in the directory's place: error %v", err)
	}
}

// TestCredentialsAreWholeAtAnyTime reads the file while others replace it by longer and shorter ones.
func TestCredentialsAreWholeAtAnyTime(t *testing.T) {
	t.Parallel()
	store := &credentialStore{dir: t.TempDir()}
	save := func(i int) error {
		text := strings.Repeat(string(rune('a'+i%26)), 1+i*997%5000)
		return store.save(&token{access: text, refresh: text, idToken: text, expiry: time.UnixMilli(1753142400000)})
	}
	fatalIf(t, save(0))
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 25 {
				if err := save(g*40 + i); err != nil {
					t.Errorf("save: %v", err)
					return
				}
				got, err := store.load()
				if err != nil {
					t.Errorf("load: %v", err)
					return
				}
				if got.access != got.refresh || got.access != got.idToken {
					t.Errorf("a mixture of two tokens: %.10s… %.10s… %.10s…", got.access, got.refresh, got.idToken)
				}
			}
		})
	}
	wg.Wait()
	if entries, err := os.ReadDir(store.dir); err != nil || len(entries) != 1 {
		t.Errorf("the directory holds %v, %v; want the file alone", entries, err)
	}
}

func TestTokenInALogShowsItsExpiryAlone(t *testing.T) {
	tok, err := parseCredentials([]byte(fileContent), time.Now())
	fatalIf(t, err)
	tok.authorization = "Bearer " + tok.access
	none := (*token)(nil)
	var b bytes.Buffer
	for _, handler := range []slog.Handler{slog.NewJSONHandler(&b, nil), slog.NewTextHandler(&b, nil)} {
		b.Reset()
		slog.New(handler).With("with", tok).Info("a token", "token", tok, slog.Group("group", "nested", tok), "none", none)
		for _, secret := range []string{"s3cret", "portal.qwen.ai", "openid"} {
			if strings.Contains(b.String(), secret) {
				t.Errorf("the log tells %q: %s", secret, &b)
			}
		}
		if strings.Count(b.String(), "expires") != 3 || !strings.Contains(b.String(), "2025-07-2") {
			t.Errorf("the log lacks the expiry: %s", &b)
		}
	}
}

func TestAPIBase(t *testing.T) {
	const notQwens = "not a host of Qwen's"
	for _, tt := range []struct{ resourceURL, want string }{ // a URL, or what the error says
		{"", "https://portal.qwen.ai/v1"},
		{"portal.qwen.ai", "https://portal.qwen.ai/v1"},
		{"portal.qwen.ai/", "https://portal.qwen.ai/v1"},
		{"portal.qwen.ai/v1", "https://portal.qwen.ai/v1"},
		{"portal.qwen.ai/v1///", "https://portal.qwen.ai/v1"},
		{"portal.qwen.ai:8443", "https://portal.qwen.ai:8443/v1"},
		{"https://portal.qwen.ai", "https://portal.qwen.ai/v1"},
		{"https://portal.qwen.ai/v1/", "https://portal.qwen.ai/v1"},
		{"https://portal.qwen.ai:443/api", "https://portal.qwen.ai:443/api/v1"},
		{"https://portal.qwen.ai/xv1", "https://portal.qwen.ai/xv1/v1"},
		{"https://qwen.ai", "https://qwen.ai/v1"},
		{"HTTPS://Portal.QWEN.ai/v1", "https://Portal.QWEN.ai/v1"},
		{"https://dashscope-intl.aliyuncs.com/compatible-mode/v1", "https://dashscope-intl.aliyuncs.com/compatible-mode/v1"},
		{"aliyuncs.com", "https://aliyuncs.com/v1"},
		{"a.b.maas.aliyuncs.com/compatible-mode/v1", "https://a.b.maas.aliyuncs.com/compatible-mode/v1"},
		{"http://127.0.0.1:8000", "http://127.0.0.1:8000/v1"},
		{"http://127.9.9.9/v1", "http://127.9.9.9/v1"},
		{"http://localhost:8000/v1", "http://localhost:8000/v1"},
		{"http://[::1]:8000", "http://[::1]:8000/v1"},
		{"[::1]:8000", "https://[::1]:8000/v1"},
		{"localhost", "https://localhost/v1"},

		{"http://portal.qwen.ai/v1", notQwens},
		{"ftp://portal.qwen.ai", notQwens},
		{"http://10.0.0.1", notQwens},
		{"https://evil.com/v1", notQwens},
		{"evilqwen.ai", notQwens},
		{"https://evilaliyuncs.com", notQwens},
		{"qwen.ai.evil.com", notQwens},
		{"https://localhost.evil.com", notQwens},
		{"127.0.0.1.evil.com", notQwens},
		{"https://evil.com/portal.qwen.ai", notQwens},
		{"https://evil.com#.qwen.ai", notQwens},
		{"https://evil.com?.qwen.ai", notQwens},
		{"https://portal.qwen.ai@evil.com", notQwens},
		{"https://me:s3cret@portal.qwen.ai/v1", notQwens},
		{"me@portal.qwen.ai", notQwens},
		{"https://portal.qwen.ai/v1?key=s3cret", notQwens},
		{"https://portal.qwen.ai/v1#s3cret", notQwens},
		{"//portal.qwen.ai", notQwens},
		{"/", notQwens},
		{".", notQwens},
		{"https://" + strings.Repeat("a", 5000) + ".com", notQwens},
		{"https://portal.qwen.ai:port", "not a URL"},
		{" portal.qwen.ai", "not a URL"},
		{"portal.qwen.ai\r\nHost: evil.com", "not a URL"},
		{"evil.com%2f.qwen.ai", "not a URL"},
		{"https://[::1", "not a URL"},
	} {
		u, err := apiBase(nil, &token{resourceURL: tt.resourceURL})
		if err == nil {
			wantEqual(t, tt.resourceURL, tt.want, u.String())
		} else if s := err.Error(); u != nil || !strings.Contains(s, tt.want) || !strings.Contains(s, "API_BASE_URL") || strings.Contains(s, "s3cret") || len(s) > 500 {
			t.Errorf("%s: got %v, %v; want %s", tt.resourceURL, u, err, tt.want)
		}
	}
}

// anyMembers decodes members, without those that the proxy knows.
func anyMembers(t *testing.T, members map[string]json.RawMessage) map[string]any {
	t.Helper()
	decoded := map[string]any{}
	for name, raw := range members {
		switch name {
		case "access_token", "refresh_token", "token_type", "resource_url", "id_token", "scope", "expiry_date":
			continue
		}
		var v any
		d := json.NewDecoder(bytes.NewReader(raw))
		d.UseNumber()
		fatalIf(t, d.Decode(&v))
		decoded[name] = v
	}
	return decoded
}

// FuzzParseCredentials checks that there is either a token or an error, that the error tells no token, and that what was
// read is the same after it was saved and loaded.
func FuzzParseCredentials(f *testing.F) {
	for _, content := range []string{
		fileContent, "", " ", "{}", "null", "[]",
		`{"access_token":"s3cret","refresh_token":"s3cret","expiry_date":null,"x":"\ud800<&>\u2028"}`,
		`{"access_token":"s3cret","refresh_token":"r","token_type":"","expiry_date":"1e400","y":1e400,"":[{}]}`,
		`{"access_token":"s3cret\n","expiry_date":-1}`, `{"access_token":{"s3cret":1}}`, `{"refresh_token":"s3cret","scope":[]}`,
		"{\"access_token\":\"s3cret\",\"refresh_token\":\"\xff\",\"\xff\":\"\xff\",\"expiry_date\":1753142400}",
	} {
		f.Add([]byte(content))
	}
	store := &credentialStore{dir: f.TempDir()}
	f.Fuzz(func(t *testing.T, content []byte) {
		const secret = "s3cret"
		if len(content) > 1000 { // deep nesting grows, indented, beyond the bound of what is read
			t.Skip()
		}
		got, err := parseCredentials(content, time.Now())
		if (got == nil) == (err == nil) {
			t.Fatalf("got %v, %v: want exactly one", got, err)
		}
		if err != nil {
			if strings.Contains(err.Error(), secret) {
				t.Errorf("the error tells a token: %v", err)
			}
			return
		}
		if got.access == "" && got.refresh == "" || got.expiry.IsZero() {
			t.Fatalf("accepted without tokens or expiry: %s", content)
		}
		if got.access == "" {
			return // is never saved so: only a fresh token is
		}
		if err := store.save(got); err != nil {
			if got.refresh != "" {
				t.Errorf("save: %v", err)
			}
			return
		}
		again, err := store.load()
		if err != nil {
			t.Fatalf("load after save: %v", err)
		}
		want, fields := tokenFields(got), tokenFields(again)
		if got.typ == "" {
			want["typ"] = "Bearer"
		}
		wantEqual(t, "token", want, fields)
		wantEqual(t, "members", anyMembers(t, got.members), anyMembers(t, again.members))
		for _, name := range []string{"access_token", "refresh_token", "token_type", "expiry_date"} {
			if raw := again.members[name]; len(raw) == 0 || string(raw) == `""` || string(raw) == "0" || string(raw) == "null" {
				t.Errorf("the file has %s %s", name, raw)
			}
		}
	})
}
