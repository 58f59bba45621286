package main

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// The lock file's protocol is Qwen Code's, so that both can share a directory.
const (
	lockFile = "oauth_creds.lock"

	// staleLock is the age at which a lock counts as left behind. Qwen Code holds one for 35 s at the most.
	staleLock = 40 * time.Second
	// lockBeat is how often a holder sets its lock's time to now. Older versions of Qwen Code break one of 10 s.
	lockBeat = 2 * time.Second

	// settleTime is how long a process that took a stale lock over waits to see whether another one did too. It is
	// much longer than the few system calls of a takeover.
	settleTime = 20 * time.Millisecond

	// A process that finds the lock taken tries again after lockPause, then after 1.5 times longer each time up
	// to maxLockPause: 29 s in all.
	lockTries    = 20
	lockPause    = 100 * time.Millisecond
	maxLockPause = 2 * time.Second
)

// errLocked says that another process has held the lock all the time.
var errLocked = errors.New("another process holds " + lockFile)

// A fileLock is a lock file held by this process.
type fileLock struct {
	path string
	id   string // what the file holds while it is ours
	stop chan struct{}
	beat sync.WaitGroup
}

// acquireLock creates the lock file at path, taking over one that is stale. While another process holds it,
// enough is asked before every try whether there is still a need; where there is none the lock is nil.
func acquireLock(ctx context.Context, path string, enough func() bool) (*fileLock, error) {
	l := &fileLock{path: path, id: rand.Text(), stop: make(chan struct{})}
	pause := lockPause
	for try := 1; ; try++ {
		tookOver := l.takeOver()
		err := l.create()
		if err == nil && tookOver && !l.settled(ctx) {
			err = fs.ErrExist
		}
		switch {
		case err == nil:
			l.beat.Go(l.keep)
			return l, nil
		case !errors.Is(err, fs.ErrExist):
			return nil, err
		case enough():
			return nil, nil
		case try > lockTries:
			return nil, errLocked
		case !sleep(ctx, pause):
			return nil, context.Cause(ctx)
		}
		pause = min(pause*3/2, maxLockPause)
	}
}

// holds reports whether the file holds our id.
func (l *fileLock) holds() bool {
	holder, err := os.ReadFile(l.path)
	return err == nil && string(holder) == l.id
}

// settled reports whether the lock is still ours after a moment. Of several processes that found the same stale
// lock, one may have moved the other's new one aside in the belief that it is the old.
func (l *fileLock) settled(ctx context.Context) bool {
	return sleep(ctx, settleTime) && l.holds()
}

// create makes the file with our id in it, or fails.
func (l *fileLock) create() error {
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(l.id)
	if err = errors.Join(err, f.Close()); err != nil {
		os.Remove(l.path)
	}
	return err
}

// takeOver removes a lock that is stale, and reports whether it did.
func (l *fileLock) takeOver() bool {
	if !stale(l.path) {
		return false
	}
	aside := l.path + ".stale." + l.id
	if os.Rename(l.path, aside) != nil {
		return false
	}
	defer os.Remove(aside)
	if !stale(aside) {
		// Another process was faster, and this is its own: back it goes. Only its time tells them apart, for a
		// file system may give it the inode of the one just deleted.
		os.Link(aside, l.path)
		return false
	}
	return true
}

// stale reports whether there is a lock at path that counts as left behind.
func stale(path string) bool {
	info, err := os.Stat(path)
	return err == nil && time.Since(info.ModTime()) >= staleLock
}

// keep keeps the lock from looking stale until it is released.
func (l *fileLock) keep() {
	tick := time.NewTicker(lockBeat)
	defer tick.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-tick.C:
		}
		switch holder, err := os.ReadFile(l.path); {
		case errors.Is(err, fs.ErrNotExist):
			l.create() // Qwen Code deletes the lock at its exit, whoever holds it
		case err == nil && string(holder) == l.id:
			now := time.Now()
			os.Chtimes(l.path, now, now)
		case err == nil:
			return // somebody else's by now
		}
	}
}

// release deletes the lock, but only if it is still ours.
func (l *fileLock) release() {
	close(l.stop)
	l.beat.Wait()
	if l.holds() {
		os.Remove(l.path)
	}
}

// lock locks the store for a refresh; see acquireLock. The lock is nil where nothing is stored.
func (s *credentialStore) lock(ctx context.Context, enough func() bool) (*fileLock, error) {
	if s.dir == "" {
		return nil, nil
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	return acquireLock(ctx, filepath.Join(s.dir, lockFile), enough)
}
