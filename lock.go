package main

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// The lock file's protocol is Qwen Code's, so that both can share a directory.
const (
	lockFile = "oauth_creds.lock"

	// A lock counts as left behind when this process has seen it unchanged for leftLock. Qwen Code holds one for at most 35 s
	// and never touches it. Our own change every lockBeat, so they count sooner.
	leftLock    = 40 * time.Second
	leftOwnLock = 10 * time.Second
	// ancientLock is the age by the clock at which a lock counts as left behind at once. The clock of the host that wrote it
	// may be wrong, but not by this much.
	ancientLock = 10 * time.Minute
	// lockBeat is how often a holder sets its lock's time to now. Older versions of Qwen Code break one of 10 s.
	lockBeat = 2 * time.Second
	// lockMark is how the ids of our own locks begin. To Qwen Code an id is any text.
	lockMark = "qwen-go-proxy-"

	// settleTime is how long a process that took over a lock waits to see whether another one did too. The few system calls
	// of a takeover take much less.
	settleTime = 20 * time.Millisecond

	// A process that finds the lock taken tries again after lockPause, then 1.5 times longer each time up to maxLockPause:
	// 29 s in all.
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

// A lockSight is what a lock file looks like at one time.
type lockSight struct {
	id       string // what it holds; "" if it can't be read
	modified int64  // Unix time in ns, by the clock of the host that wrote it
}

// seeLock returns what the lock file at path looks like now.
func seeLock(path string) (lockSight, error) {
	info, err := os.Stat(path)
	if err != nil {
		return lockSight{}, err
	}
	id, read, err := readRegular(path, 1<<10)
	if err == nil {
		info = read // opening a file refreshes what NFS knows of it
	}
	return lockSight{string(id), info.ModTime().UnixNano()}, nil
}

// A lockWatch knows since when this process has seen the same lock. It outlives an attempt to get the lock,
// which gives up before a lock counts as left behind. The zero value is ready to use. It is safe for concurrent use.
type lockWatch struct {
	mu    sync.Mutex
	seen  lockSight // at the last look
	since time.Time // when it was first seen so; zero if there was no lock
}

// left looks at the lock at path, and reports whether it was left behind by its holder.
func (w *lockWatch) left(path string) (lockSight, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	sight, err := seeLock(path)
	if err != nil {
		w.since = time.Time{}
		return sight, false
	}
	if w.since.IsZero() || sight != w.seen {
		w.seen, w.since = sight, time.Now()
	}
	life := leftLock
	if strings.HasPrefix(sight.id, lockMark) {
		life = leftOwnLock
	}
	return sight, time.Since(w.since) >= life || time.Since(time.Unix(0, sight.modified)) >= ancientLock
}

// acquireLock creates the lock file at path. It takes over one that was left behind, as watch says. While another process holds
// the lock, it calls enough before every try. If that returns true, nobody needs the lock any more, and the result is nil.
func acquireLock(ctx context.Context, path string, watch *lockWatch, enough func() bool) (*fileLock, error) {
	l := &fileLock{path: path, id: lockMark + rand.Text(), stop: make(chan struct{})}
	pause := lockPause
	for try := 1; ; try++ {
		tookOver := l.takeOver(watch)
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

// settled reports whether the lock is still ours after a moment. If two processes found the same lock left behind, one may have
// moved the other's new lock aside, taking it for the old one.
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

// takeOver removes a lock that was left behind, and reports whether it did.
func (l *fileLock) takeOver(watch *lockWatch) bool {
	sight, left := watch.left(l.path)
	if !left {
		return false
	}
	aside := l.path + ".stale." + l.id
	if os.Rename(l.path, aside) != nil {
		return false
	}
	defer os.Remove(aside)
	if moved, err := seeLock(aside); err != nil || moved != sight {
		os.Link(aside, l.path) // another process was faster, and this is its lock: put it back
		return false
	}
	return true
}

// keep touches the lock until it is released, so that it does not count as left behind.
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
			l.create() // Qwen Code deletes the lock when it exits, even if another process holds it
		case err == nil && string(holder) == l.id:
			now := time.Now()
			os.Chtimes(l.path, now, now)
		case err == nil:
			return // another process has taken it over
		}
	}
}

// release deletes the lock, but only if it is still ours. A nil lock has nothing to release.
func (l *fileLock) release() {
	if l == nil {
		return
	}
	close(l.stop)
	l.beat.Wait()
	if l.holds() {
		os.Remove(l.path)
	}
}

// lock locks the store for a refresh; see acquireLock. The lock is nil if nothing is stored.
func (s *credentialStore) lock(ctx context.Context, enough func() bool) (*fileLock, error) {
	if s.dir == "" {
		return nil, nil
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	return acquireLock(ctx, filepath.Join(s.dir, lockFile), &s.watch, enough)
}
