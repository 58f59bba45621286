package e2e

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// The files in QWEN_DIR, which Qwen Code names.
const (
	credentialFile = "oauth_creds.json"
	lockFile       = "oauth_creds.lock"
)

// A witness is a stand-in for Qwen's OAuth server and its chat that takes its time to answer, and notes what became of
// refreshes. A sign-in is approved at once.
type witness struct {
	t        *testing.T
	url, dir string        // dir is QWEN_DIR of the processes under test
	life     time.Duration // of an access token

	issuing chan struct{} // 1 slot: a request that is to issue a token has arrived

	mu       sync.Mutex           // guards all below
	delay    func() time.Duration // of a pause before, and another after, a token is issued
	under    int                  // refreshes under way
	most     int                  // at one time
	refresh  string               // the refresh token issued last: the only one that is good
	expiry   map[string]time.Time // of access tokens
	redeemed map[string]bool      // refresh tokens
	counted  counts
	by       map[string]int  // refreshes and sign-ins, by program
	stored   map[string]bool // access tokens that have been in the file
	seen     map[string]bool // access tokens that API requests have carried
	unstored int             // of those, the ones that were not in the file by then
}

// counts says what a witness has been asked for.
type counts struct {
	deviceAuthorizations int // device codes issued
	signIns              int // device codes redeemed for tokens
	refreshes            int // refresh tokens redeemed for new ones
	refreshesRefused     int // replays included
	replays              int // refresh tokens sent again after they had been redeemed
	unauthorized         int // API requests refused with 401
}

// newWitness serves a witness, with a credential file in dir whose token has expired and can be refreshed.
func newWitness(t *testing.T, dir string, life time.Duration) *witness {
	t.Helper()
	w := &witness{
		t: t, dir: dir, life: life, delay: func() time.Duration { return 10 * time.Millisecond },
		issuing: make(chan struct{}, 1), refresh: "first",
		expiry: map[string]time.Time{}, redeemed: map[string]bool{}, by: map[string]int{}, stored: map[string]bool{}, seen: map[string]bool{},
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/api/v1/oauth2/device/code", w.authorize)
	mux.HandleFunc("/api/v1/oauth2/token", w.token)
	mux.HandleFunc("/v1/chat/completions", w.chat)
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	w.url = srv.URL
	fatalIf(t, os.MkdirAll(dir, 0o700))
	writeCredentials(t, dir, "expired", w.refresh, w.url, time.Now().Add(-time.Minute))
	return w
}

// writeCredentials writes a credential file.
func writeCredentials(t *testing.T, dir, access, refresh, resource string, expiry time.Time) {
	t.Helper()
	content := fmt.Sprintf(`{"access_token":%q,"refresh_token":%q,"token_type":"Bearer","resource_url":%q,"expiry_date":%d}`,
		access, refresh, resource, expiry.UnixMilli())
	writeFile(t, filepath.Join(dir, credentialFile), content)
}

// credentials returns a directory with a credential file whose token is good for an hour.
func credentials(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	writeCredentials(t, dir, "good-token", "refresh-1", "", time.Now().Add(time.Hour))
	return dir
}

// A credential is what is in the credential file.
type credential struct {
	Access  string `json:"access_token"`
	Refresh string `json:"refresh_token"`
	Expiry  int64  `json:"expiry_date"` // Unix milliseconds
}

// load reads the credential file.
func (w *witness) load() (c credential, err error) {
	b, err := os.ReadFile(w.file())
	if err != nil {
		return c, err
	}
	return c, json.Unmarshal(b, &c)
}

// file is the credential file.
func (w *witness) file() string { return filepath.Join(w.dir, credentialFile) }

// env is that of a process under test.
func (w *witness) env() map[string]string {
	return map[string]string{"QWEN_OAUTH_BASE_URL": w.url, "QWEN_DIR": w.dir}
}

// counts returns the counters as they stand.
func (w *witness) counts() counts {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.counted
}

// authorize answers a device authorization request, RFC 8628 §3.1.
func (w *witness) authorize(rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	w.counted.deviceAuthorizations++
	w.mu.Unlock()
	answerJSON(rw, 200, fmt.Sprintf(`{"device_code":"d","user_code":"ABCD-EFGH","verification_uri":"%s/authorize",
		"verification_uri_complete":"%[1]s/authorize?user_code=ABCD-EFGH","expires_in":900,"interval":1}`, w.url))
}

// token answers a token request.
func (w *witness) token(rw http.ResponseWriter, r *http.Request) {
	w.look()
	refresh := r.PostFormValue("refresh_token")
	w.mu.Lock()
	good := refresh == w.refresh
	if refresh != "" {
		w.under++
		w.most = max(w.most, w.under)
		defer func() {
			w.mu.Lock()
			w.under--
			w.mu.Unlock()
		}()
	}
	w.mu.Unlock()
	if good {
		wakeUp(w.issuing)
	}
	w.pause()
	status, answer := w.issue(r, refresh)
	if status == 200 {
		wakeUp(w.issuing)
	}
	w.pause()
	answerJSON(rw, status, answer)
}

// pause takes the witness's time.
func (w *witness) pause() {
	w.mu.Lock()
	delay := w.delay
	w.mu.Unlock()
	time.Sleep(delay())
}

// setDelay sets how long pauses are.
func (w *witness) setDelay(delay func() time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.delay = delay
}

// issue redeems a refresh token, or a device code where refresh is "".
func (w *witness) issue(r *http.Request, refresh string) (status int, answer string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case refresh == "":
		w.counted.signIns++
	case refresh != w.refresh || w.redeemed[refresh]:
		w.counted.refreshesRefused++
		if w.redeemed[refresh] {
			w.counted.replays++
		}
		return 400, `{"error":"invalid_grant"}`
	default:
		w.counted.refreshes++
		w.redeemed[refresh] = true
	}
	agent, _, _ := strings.Cut(r.UserAgent(), "/")
	w.by[agent]++
	access := rand.Text()
	w.refresh, w.expiry[access] = rand.Text(), time.Now().Add(w.life)
	return 200, fmt.Sprintf(`{"access_token":%q,"refresh_token":%q,"token_type":"Bearer","expires_in":%d,"resource_url":%q}`,
		access, w.refresh, int(w.life.Seconds()), w.url)
}

func wakeUp(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// chat answers with the first message's text, in a stream word by word.
func (w *witness) chat(rw http.ResponseWriter, r *http.Request) {
	access := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	w.mu.Lock()
	first, good := !w.seen[access], time.Now().Before(w.expiry[access])
	w.seen[access] = true
	if !good {
		w.counted.unauthorized++
	}
	w.mu.Unlock()
	if first {
		w.look()
		w.mu.Lock()
		if !w.stored[access] {
			w.unstored++
		}
		w.mu.Unlock()
	}
	if !good {
		answerJSON(rw, 401, `{"error":{"message":"invalid access token or token expired","type":"invalid_request_error","code":"invalid_api_key"}}`)
		return
	}
	var request struct {
		Stream   bool
		Messages []struct{ Content string }
	}
	if json.NewDecoder(r.Body).Decode(&request) != nil || len(request.Messages) == 0 {
		answerJSON(rw, 400, `{"error":{"message":"no message","type":"invalid_request_error"}}`)
		return
	}
	if text := request.Messages[0].Content; request.Stream {
		for word := range strings.FieldsSeq(text) {
			sse(rw, fmt.Sprintf(`data: {"choices":[{"delta":{"content":%q}}]}`+"\n\n", word+" "))
			time.Sleep(50 * time.Millisecond)
		}
		sse(rw, "data: [DONE]\n\n")
	} else {
		answerJSON(rw, 200, fmt.Sprintf(`{"choices":[{"message":{"content":%q}}]}`, text))
	}
}

// look notes the access token in the file.
func (w *witness) look() {
	if c, err := w.load(); err == nil {
		w.mu.Lock()
		w.stored[c.Access] = true
		w.mu.Unlock()
	}
}

// settled returns the refresh token issued last, once no refresh is under way.
func (w *witness) settled() (refresh string) {
	w.t.Helper()
	until(w.t, "no refresh is under way", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		refresh = w.refresh
		return w.under == 0
	})
	return refresh
}

// left counts what is in the directory of the credential file, temporary files by their kind.
func (w *witness) left() map[string]int {
	entries, _ := os.ReadDir(w.dir)
	left := map[string]int{}
	for _, e := range entries {
		name := e.Name()
		switch {
		case strings.HasSuffix(name, ".tmp"):
			name = "*.tmp"
		case strings.Contains(name, ".stale."):
			name = "*.stale.*"
		}
		left[name]++
	}
	return left
}
