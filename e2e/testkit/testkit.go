// Package testkit has what the tests of the program and those in e2e share.
package testkit

import (
	"bytes"
	"compress/gzip"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// FatalIf ends the test if err is not nil.
func FatalIf(t testing.TB, err error) {
	if err != nil {
		t.Helper()
		t.Fatal(err)
	}
}

// WantEqual reports how got differs from want. It returns whether they are equal.
func WantEqual(t testing.TB, what string, want, got any, opts ...cmp.Option) bool {
	t.Helper()
	diff := cmp.Diff(want, got, opts...)
	if diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
	return diff == ""
}

// A Log is what a program has written so far. It can be waited on.
type Log struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	changed chan struct{}
}

func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
	return l.buf.Write(p)
}

func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// Reset forgets what has been written.
func (l *Log) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf.Reset()
}

// Await waits for the first match of re and returns its last group. It ends the test after a minute.
func (l *Log) Await(t testing.TB, re string) string {
	t.Helper()
	pattern := regexp.MustCompile(re)
	deadline := time.After(time.Minute)
	for {
		l.mu.Lock()
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		m, changed := pattern.FindStringSubmatch(l.buf.String()), l.changed
		l.mu.Unlock()
		if m != nil {
			return m[len(m)-1]
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("nothing matched %q in:\n%s", re, l)
		}
	}
}

// Until waits until ok returns true. It ends the test after a minute.
func Until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited a minute: %s", what)
		}
	}
}

// A WireError is an error's body as a client decodes it.
type WireError struct {
	Error struct {
		Message, Type string
		Param, Code   *string
	}
	RequestID string `json:"request_id"`
}

// WantError checks that an answer is an error of OpenAI's shape.
func WantError(t testing.TB, res *http.Response, body string, status int, typ, code string) WireError {
	t.Helper()
	if res == nil {
		t.Fatalf("no answer, want %d %s", status, code)
	}
	var e WireError
	if err := json.Unmarshal([]byte(body), &e); err != nil {
		t.Fatalf("status %d, body is not JSON: %v\n%.300s", res.StatusCode, err, body)
	}
	got := ""
	if e.Error.Code != nil {
		got = *e.Error.Code
	}
	if res.StatusCode != status || e.Error.Type != typ || got != code || e.Error.Message == "" {
		t.Errorf("got %d %s %s %q, want %d %s %s", res.StatusCode, e.Error.Type, got, e.Error.Message, status, typ, code)
	}
	if id := res.Header.Get("X-Request-ID"); id == "" || e.RequestID != id {
		t.Errorf("request_id %q, X-Request-ID %q: want the same", e.RequestID, id)
	}
	return e
}

// Ask sends a request. It returns the answer and its body. Where no answer or only a part of one came, it returns an error too.
func Ask(t testing.TB, client *http.Client, method, url string, body io.Reader) (*http.Response, string, error) {
	t.Helper()
	req, err := http.NewRequest(method, url, body)
	FatalIf(t, err)
	res, err := client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res, string(b), err
}

// SSE answers with an event stream. It flushes the header and each event.
func SSE(w http.ResponseWriter, events ...string) {
	w.Header().Set("Content-Type", "text/event-stream;charset=UTF-8")
	http.NewResponseController(w).Flush()
	for _, e := range events {
		io.WriteString(w, e)
		http.NewResponseController(w).Flush()
	}
}

// AnswerJSON answers with body.
func AnswerJSON(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	io.WriteString(w, body)
}

// Gzipped returns s compressed.
func Gzipped(s string) string {
	var b strings.Builder
	w := gzip.NewWriter(&b)
	io.WriteString(w, s)
	w.Close()
	return b.String()
}

// WriteFile writes a file that only its owner may read.
func WriteFile(t testing.TB, path, content string) {
	t.Helper()
	FatalIf(t, os.WriteFile(path, []byte(content), 0o600))
}

// ReadFile returns the content of a file.
func ReadFile(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	FatalIf(t, err)
	return string(b)
}

// Certificate writes a certificate for localhost and its key, and returns their files.
func Certificate(t testing.TB) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	FatalIf(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	FatalIf(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	FatalIf(t, err)
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	WriteFile(t, certFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})))
	WriteFile(t, keyFile, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})))
	return certFile, keyFile
}
