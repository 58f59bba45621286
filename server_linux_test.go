package main

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// TestALiveUnixSocketIsNeverTakenOver: a process that is slow to accept still listens.
func TestALiveUnixSocketIsNeverTakenOver(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	fatalIf(t, err)
	die := sync.OnceFunc(func() { syscall.Close(fd) })
	defer die()
	fatalIf(t, syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}))
	fatalIf(t, syscall.Listen(fd, 0))
	full := false
	for range 10 {
		c, err := net.Dial("unix", path)
		if full = err != nil; full {
			break
		}
		defer c.Close()
	}
	if !full {
		t.Fatal("the backlog does not fill up")
	}
	before, err := os.Stat(path)
	fatalIf(t, err)

	cfg := &config{host: "unix:" + path}
	if ln, err := listen(cfg); err == nil {
		ln.Close()
		t.Error("the socket of a live process was taken over")
	} else if !strings.Contains(err.Error(), "SERVER_HOST") {
		t.Errorf("error %q: want it to name SERVER_HOST", err)
	}
	if after, err := os.Stat(path); err != nil || !os.SameFile(before, after) {
		t.Fatalf("the socket of a live process is gone: %v", err)
	}

	die()
	ln, err := listen(cfg)
	if err != nil {
		t.Fatalf("a dead process's socket is not taken over: %v", err)
	}
	ln.Close()

	fatalIf(t, os.WriteFile(path, nil, 0o600))
	if ln, err := listen(cfg); err == nil {
		ln.Close()
		t.Error("a file that is no socket was taken over")
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Type() == fs.ModeSocket {
		t.Errorf("a file that is no socket is gone: %v", err)
	}
}
