package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// tmpfs mounts a file system of its own on a new directory below dir, and returns the directory.
func tmpfs(t *testing.T, dir string) string {
	t.Helper()
	dir = filepath.Join(dir, "qwen")
	fatalIf(t, os.Mkdir(dir, 0o700))
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		t.Skipf("mounting a file system is not permitted here: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(dir, syscall.MNT_DETACH) })
	return dir
}

// remount makes the file system on dir read-only, or writable again.
func remount(t *testing.T, dir string, readOnly bool) {
	t.Helper()
	flags := uintptr(syscall.MS_REMOUNT)
	if readOnly {
		flags |= syscall.MS_RDONLY
	}
	fatalIf(t, syscall.Mount("tmpfs", dir, "tmpfs", flags, ""))
}

// serving checks that p answers chat requests with status until done, and that of errors the body holds want.
func (p *program) serving(done func() bool, status int, want string) {
	p.t.Helper()
	until(p.t, "the end of answers with "+fmt.Sprint(status), func() bool {
		over := done()
		got, body, err := p.chat()
		if over || done() {
			return true // what came of the last one depends on when it came
		}
		if err != nil || got != status || !strings.Contains(body, want) {
			p.t.Fatalf("got %d %s, %v; want %d and %q", got, body, err, status, want)
		}
		return false
	})
}

// becomes waits until p answers a chat request with status.
func (p *program) becomes(status int) {
	p.t.Helper()
	until(p.t, fmt.Sprint("an answer with ", status), func() bool {
		got, _, err := p.chat()
		return err == nil && got == status
	})
}

// warned returns what p has logged at level warn and above, but for requests and changes of readiness, which follow from it.
func (p *program) warned() (lines []string) {
	for line := range strings.Lines(p.stderr.String()) {
		if strings.HasPrefix(line, "{") && !strings.Contains(line, `"msg":"request"`) && !strings.Contains(line, `"msg":"the server is not ready"`) {
			lines = append(lines, line)
		}
	}
	return lines
}

// expired reports whether the token that was issued last has expired.
func (w *witness) expired() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, at := range w.expiry {
		if time.Now().Before(at) {
			return false
		}
	}
	return true
}

// refreshed reports whether w has issued more than n tokens.
func (w *witness) refreshed(n int) func() bool {
	return func() bool { return w.counts().refreshes > n }
}

func after(d time.Duration) func() bool {
	at := time.Now().Add(d)
	return func() bool { return time.Now().After(at) }
}

// TestStorageThatFails has the directory turn against the process while it serves: it says so, spends no refresh token
// whose successor it could not store, serves from memory, and goes on once the directory is good again.
func TestStorageThatFails(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name          string
		breaks, mends func(t *testing.T, dir string)
		log, answer   string
	}{
		{"read-only",
			func(t *testing.T, dir string) { remount(t, dir, true) },
			func(t *testing.T, dir string) { remount(t, dir, false) },
			"read-only file system", "Make QWEN_DIR writable"},
		{"full",
			func(t *testing.T, dir string) {
				f, err := os.Create(filepath.Join(dir, "ballast"))
				fatalIf(t, err)
				defer f.Close()
				for err == nil {
					_, err = f.Write(make([]byte, 4096))
				}
				if !errors.Is(err, syscall.ENOSPC) {
					t.Fatal(err)
				}
			},
			func(t *testing.T, dir string) { fatalIf(t, os.Remove(filepath.Join(dir, "ballast"))) },
			"no space left on device", "Make QWEN_DIR writable"},
		{"a directory in the file's place",
			func(t *testing.T, dir string) {
				path := filepath.Join(dir, credentialFile)
				fatalIf(t, errors.Join(os.Rename(path, path+".away"), os.Mkdir(path, 0o700)))
			},
			func(t *testing.T, dir string) {
				path := filepath.Join(dir, credentialFile)
				fatalIf(t, errors.Join(os.Remove(path), os.Rename(path+".away", path)))
			},
			"is a directory", "Repair or delete " + credentialFile},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWitness(t, tmpfs(t, t.TempDir()), 3*time.Second)
			p := start(t, w.env())
			p.becomes(http.StatusOK)
			tt.breaks(t, w.dir)
			n := w.counts().refreshes
			p.serving(w.expired, http.StatusOK, "")
			p.becomes(http.StatusServiceUnavailable)
			p.serving(after(500*time.Millisecond), http.StatusServiceUnavailable, tt.answer)
			if w.refreshed(n)() {
				t.Error("a refresh token was spent")
			}
			if log := p.stderr.String(); !strings.Contains(log, tt.log) {
				t.Errorf("%q is not in the log:\n%s", tt.log, log)
			}
			tt.mends(t, w.dir)
			p.becomes(http.StatusOK)
			if c := w.counts(); c.replays+c.refreshesRefused+c.deviceAuthorizations != 0 {
				t.Errorf("%+v: want no refresh refused, no sign-in", c)
			}
			p.terminate()
		})
	}
}

// TestFileMountedByItself can't be replaced, and is written in place. The log says once what to mount.
func TestFileMountedByItself(t *testing.T) {
	t.Parallel()
	w := newWitness(t, filepath.Join(t.TempDir(), "qwen"), 2*time.Second)
	other := filepath.Join(t.TempDir(), "elsewhere")
	content := readFile(t, w.file())
	writeFile(t, other, content)
	if err := syscall.Mount(other, w.file(), "", syscall.MS_BIND, ""); err != nil {
		t.Skipf("a bind mount is not permitted here: %v", err)
	}
	t.Cleanup(func() { syscall.Unmount(w.file(), syscall.MNT_DETACH) })
	p := start(t, w.env())
	p.becomes(http.StatusOK)
	p.serving(w.refreshed(3), http.StatusOK, "")
	p.terminate()
	if got := p.warned(); len(got) != 1 || !strings.Contains(got[0], "mount its directory instead") {
		t.Errorf("warnings %v, want one that says what to mount", got)
	}
	stored, err := w.load()
	if refresh := w.settled(); err != nil || stored.Refresh != refresh {
		t.Errorf("the file does not hold the last token, but %v, %v", stored, err)
	}
	if c := w.counts(); c.refreshesRefused+c.deviceAuthorizations != 0 || w.unstored != 0 { // a 401 leads to a refresh: the witness's clock is ahead
		t.Errorf("%+v", c)
	}
	w.wantFileAlone()
}

// TestShutdownDuringARefreshThatHangs: the refresh is finished first and stored, and the log says so. A second signal gives it
// up, and leaves no lock behind.
func TestShutdownDuringARefreshThatHangs(t *testing.T) {
	t.Parallel()
	for _, signals := range []int{1, 2} {
		t.Run(fmt.Sprint(signals, " signals"), func(t *testing.T) {
			t.Parallel()
			w := newWitness(t, t.TempDir(), time.Hour)
			answer := make(chan struct{})
			finish := sync.OnceFunc(func() { close(answer) })
			defer finish()
			w.setDelay(func() time.Duration { <-answer; return 0 })
			env := w.env()
			env["LOG_LEVEL"] = "info"
			p := start(t, env)
			<-w.issuing
			p.cmd.Process.Signal(syscall.SIGTERM)
			p.stderr.await(t, `"msg":"waiting until the token refresh under way is done and stored`)
			if strings.Contains(p.stderr.String(), `"msg":"stopped`) {
				t.Error("the log says that the server has stopped, and it has not")
			}
			status := 0
			if signals == 1 {
				finish()
			} else {
				p.cmd.Process.Signal(syscall.SIGTERM)
				status = 1
			}
			p.awaitEnd()
			if got := p.cmd.ProcessState.ExitCode(); got != status {
				t.Errorf("exit status %d, want %d", got, status)
			}
			if !strings.Contains(p.stderr.String(), `"msg":"stopped`) {
				t.Error("the log does not say that the server has stopped")
			}
			w.mu.Lock()
			refresh := w.refresh // the first, or the one that was issued
			w.mu.Unlock()
			if stored, err := w.load(); err != nil || stored.Refresh != refresh {
				t.Errorf("the file holds %v, %v; want %s in it", stored, err, refresh)
			}
			w.wantFileAlone()
		})
	}
}
