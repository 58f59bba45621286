package main

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestFIFOInPlaceOfTheCredentialFile: to open one waits for a writer.
func TestFIFOInPlaceOfTheCredentialFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	fatalIf(t, syscall.Mkfifo(filepath.Join(dir, "key"), 0o600))
	if _, err := readKeyFile(filepath.Join(dir, "key")); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a key file that is a FIFO: %v", err)
	}
	fatalIf(t, syscall.Mkfifo(filepath.Join(dir, credentialFile), 0o600))
	p := start(t, map[string]string{"QWEN_DIR": dir, "QWEN_OAUTH_BASE_URL": "http://127.0.0.1:1"})
	if res, body := p.get("/health"); res.StatusCode != http.StatusOK {
		t.Errorf("/health: %s %s", res.Status, body)
	}
	p.stderr.await(t, `the credential file can't be used.*not a regular file`)
	p.stop()
	p.wantExit(0)
}

// TestRootLeavesTheCredentialsToTheServicesUser: root runs login and logout for a service with a user of its own.
func TestRootLeavesTheCredentialsToTheServicesUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("takes root")
	}
	const user = 12345
	_, env := qwenEnv(t)
	dir := env["QWEN_DIR"]
	fatalIf(t, os.Mkdir(dir, 0o700))
	if err := os.Chown(dir, user, user+1); err != nil {
		t.Skip(err)
	}
	wantOwner := func() {
		t.Helper()
		info, err := os.Stat(filepath.Join(dir, credentialFile))
		fatalIf(t, err)
		if stat := info.Sys().(*syscall.Stat_t); stat.Uid != user || stat.Gid != user+1 || info.Mode() != 0o600 {
			t.Errorf("the file belongs to %d:%d, with mode %v", stat.Uid, stat.Gid, info.Mode())
		}
	}
	login := runCommand(t, env, "login", "-no-browser")
	decideAt(t, login.stdout.await(t, linkLine), "approve")
	if status, out := login.wait(t); status != 0 {
		t.Fatalf("login: exit status %d:\n%s", status, out)
	}
	wantOwner()
	if status, out := runCommand(t, env, "logout").wait(t); status != 0 {
		t.Fatalf("logout: exit status %d:\n%s", status, out)
	}
	wantOwner()
}
