package e2e

import (
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestEnvFileOfTheWorkingDirectory starts a process where there is one.
func TestEnvFileOfTheWorkingDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, ".env"), "QWEN_API_KEY='sk-1'\nMODELS=from-file\nLOG_LEVEL=error\nSERVER_HOST=127.0.0.9\n")
	p := start(t, map[string]string{"LOG_LEVEL": "info"}, func(cmd *exec.Cmd) { cmd.Dir = dir })
	p.stderr.await(t, `"msg":"settings were read from a file; the environment wins","file":".*/\.env"`)
	if !strings.HasPrefix(p.url, "http://127.0.0.1:") {
		t.Errorf("it listens on %s: the file has won over the environment", p.url)
	}
	res, err := http.Get(p.url + "/health/ready")
	fatalIf(t, err)
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		t.Errorf("/health/ready: %s: the file's key is not in use", res.Status)
	}
}
