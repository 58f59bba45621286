package main

import (
	"net/http"
	"path/filepath"
	"syscall"
	"testing"
)

// TestFIFOInPlaceOfTheCredentialFile: to open one waits for a writer.
func TestFIFOInPlaceOfTheCredentialFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(dir, credentialFile), 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, map[string]string{"QWEN_DIR": dir, "QWEN_OAUTH_BASE_URL": "http://127.0.0.1:1"})
	if res, body := p.get("/health"); res.StatusCode != http.StatusOK {
		t.Errorf("/health: %s %s", res.Status, body)
	}
	p.stderr.await(t, `the credential file can't be used.*not a regular file`)
	p.stop()
	if status := p.wait(); status != 0 {
		t.Errorf("exit status %d, want 0", status)
	}
}
