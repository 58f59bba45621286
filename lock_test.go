package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// never is an acquireLock caller's need that nothing else satisfies.
func never() bool { return false }

// acquire returns the lock at path, which must be free.
func acquire(t *testing.T, path string) *fileLock {
	t.Helper()
	l, err := acquireLock(t.Context(), path, &lockWatch{}, never)
	fatalIf(t, err)
	return l
}

// readLock returns the id in the lock file at path, "" where there is none.
func readLock(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

// leaveLock puts another process's lock at path, last touched age ago. In a bubble that is by the bubble's clock,
// which files know nothing of.
func leaveLock(t *testing.T, path string, age time.Duration) {
	t.Helper()
	writeFile(t, path, "another's")
	setAge(t, path, age)
}

func setAge(t *testing.T, path string, age time.Duration) {
	t.Helper()
	at := time.Now().Add(-age)
	fatalIf(t, os.Chtimes(path, at, at))
}

// wantLockAlone checks that nothing but the lock file is left in its directory, and not even that where id is "".
func wantLockAlone(t *testing.T, path, id string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	fatalIf(t, err)
	got, want := map[string]string{}, map[string]string{}
	for _, e := range entries {
		got[e.Name()] = readLock(t, filepath.Join(filepath.Dir(path), e.Name()))
	}
	if id != "" {
		want[filepath.Base(path)] = id
	}
	wantEqual(t, "files", want, got)
}

func TestLockHoldsAnIDUntilReleased(t *testing.T) {
	path := filepath.Join(t.TempDir(), lockFile)
	ids := map[string]bool{}
	for range 3 {
		l := acquire(t, path)
		if l.id == "" || ids[l.id] {
			t.Errorf("id %q: want a new one", l.id)
		}
		ids[l.id] = true
		wantLockAlone(t, path, l.id)
		l.release()
		wantLockAlone(t, path, "")
	}
}

func TestLockErrorsOfTheFileSystemAreNotWaitedFor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "missing", lockFile)
	l, err := acquireLock(t.Context(), path, &lockWatch{}, func() bool {
		t.Error("asked whether there is a need")
		return false
	})
	if l != nil || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, %v; want fs.ErrNotExist", l, err)
	}
}

func TestLockIsKeptAndReleasedOnlyWhileOurs(t *testing.T) {
	for _, tt := range []struct {
		name            string
		change          func(t *testing.T, path string)
		kept, untouched bool // whether the file holds our id after a while; whether release leaves it
	}{
		{"left alone", func(*testing.T, string) {}, true, false},
		{"deleted by somebody", func(t *testing.T, path string) {
			fatalIf(t, os.Remove(path))
		}, true, false},
		{"replaced by another's", func(t *testing.T, path string) { leaveLock(t, path, 0) }, false, true},
	} {
		testInBubble(t, tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), lockFile)
			l := acquire(t, path)
			tt.change(t, path)
			before := readLock(t, path)
			time.Sleep(lockBeat)
			synctest.Wait()
			if got := readLock(t, path); (got == l.id) != tt.kept || !tt.kept && got != before {
				t.Errorf("the file holds %q; ours is %q, it held %q", got, l.id, before)
			}
			l.release()
			want := ""
			if tt.untouched {
				want = before
			}
			wantLockAlone(t, path, want)
		})
	}
}

// Another's lock must not look alive because of the process that lost its own to it.
func TestLostLockIsNotKeptFresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), lockFile)
		l := acquire(t, path)
		leaveLock(t, path, 0)
		left := time.Now()
		time.Sleep(time.Minute)
		info, err := os.Stat(path)
		fatalIf(t, err)
		if !info.ModTime().Equal(left) {
			t.Errorf("another's lock was touched %v later", info.ModTime().Sub(left))
		}
		l.release()
	})
}

func TestHeldLockNeverLooksStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), lockFile)
		l := acquire(t, path)
		setAge(t, path, 0)
		for range 350 {
			time.Sleep(100 * time.Millisecond)
			info, err := os.Stat(path)
			fatalIf(t, err)
			if age := time.Since(info.ModTime()); age >= 10*time.Second { // where older versions of Qwen Code break it
				t.Fatalf("the lock looks %v old", age)
			}
		}
		l.release()
		time.Sleep(2 * lockBeat)
		wantLockAlone(t, path, "")
	})
}

// touched has another process, whose clock is slow by that much, hold the lock at path with id and touch it like ours, for d.
func touched(t *testing.T, path, id string, slow, d time.Duration) {
	t.Helper()
	for range int(d / lockBeat) {
		if err := os.WriteFile(path, []byte(id), 0o600); err != nil {
			t.Error(err)
		}
		setAge(t, path, slow)
		time.Sleep(lockBeat)
	}
}

// TestLeftLock finds a lock whose holder is dead. How old it looks depends on the clock of that holder's host, and says
// nothing up to ten minutes.
func TestLeftLock(t *testing.T) {
	const mine, foreign = lockMark + "ABC", "0b7c1c8e-2f6a-4f5e-8c51-6d1d3c2b1a09"
	for _, tt := range []struct {
		name     string
		id       string
		age      time.Duration // when it is found
		min, max time.Duration // how long it is waited for
	}{
		{"a day old", foreign, 24 * time.Hour, 0, settleTime},
		{"ten minutes old", foreign, 10 * time.Minute, 0, settleTime},
		{"nearly ten minutes old", foreign, 10*time.Minute - time.Second, time.Second, 2 * time.Second},
		{"a minute old", foreign, time.Minute, 40 * time.Second, 43 * time.Second},
		{"new", foreign, 0, 40 * time.Second, 43 * time.Second},
		{"from the future", foreign, -time.Hour, 40 * time.Second, 43 * time.Second},
		{"from the far future", foreign, -1000 * time.Hour, 40 * time.Second, 43 * time.Second},
		{"ours, a minute old", mine, time.Minute, 10 * time.Second, 12 * time.Second},
		{"ours, new", mine, 0, 10 * time.Second, 12 * time.Second},
		{"ours, from the future", mine, -time.Hour, 10 * time.Second, 12 * time.Second},
	} {
		testInBubble(t, tt.name, func(t *testing.T) {
			store := &credentialStore{dir: t.TempDir()}
			path := filepath.Join(store.dir, lockFile)
			writeFile(t, path, tt.id)
			setAge(t, path, tt.age)
			started := time.Now()
			l, err := store.lock(t.Context(), never)
			for errors.Is(err, errLocked) && time.Since(started) < 2*time.Minute {
				time.Sleep(time.Second) // as the token source does
				l, err = store.lock(t.Context(), never)
			}
			fatalIf(t, err)
			if took := time.Since(started); took < tt.min || took > tt.max {
				t.Errorf("taken over after %v, want %v to %v", took, tt.min, tt.max)
			}
			wantLockAlone(t, path, l.id)
			l.release()
			wantLockAlone(t, path, "")
		})
	}
}

// TestLockOfAHolderWhoseClockIsWrong: it lives, since it changes, whatever its clock says. Qwen Code's does not change, and is
// left alone for as long as Qwen Code may hold it.
func TestLockOfAHolderWhoseClockIsWrong(t *testing.T) {
	for name, slow := range map[string]time.Duration{"right": 0, "a minute slow": time.Minute, "nine minutes slow": 9 * time.Minute, "an hour fast": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := &credentialStore{dir: t.TempDir()}
				path := filepath.Join(store.dir, lockFile)
				const id = lockMark + "another"
				go touched(t, path, id, slow, 4*time.Minute)
				time.Sleep(time.Second)
				for range 5 {
					if l, err := store.lock(t.Context(), never); !errors.Is(err, errLocked) {
						t.Fatalf("got %v, %v from a holder that lives; want errLocked", l, err)
					}
				}
				wantLockAlone(t, path, id)
				time.Sleep(4 * time.Minute) // the holder is done
			})
			synctest.Test(t, func(t *testing.T) {
				store := &credentialStore{dir: t.TempDir()}
				path := filepath.Join(store.dir, lockFile)
				leaveLock(t, path, slow)
				started := time.Now()
				for time.Since(started) < leftLock-2*time.Second {
					ctx, cancel := context.WithTimeout(t.Context(), time.Second)
					if l, err := store.lock(ctx, never); l != nil {
						t.Fatalf("broke a lock of Qwen Code's after %v, %v", time.Since(started), err)
					}
					cancel()
				}
			})
		})
	}
}

func TestLockThatIsHeldForever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), lockFile)
		held := acquire(t, path)
		setAge(t, path, 0)
		started := time.Now()
		var asked []time.Duration
		l, err := acquireLock(t.Context(), path, &lockWatch{}, func() bool {
			asked = append(asked, time.Since(started).Round(time.Millisecond))
			return false
		})
		if l != nil || !errors.Is(err, errLocked) {
			t.Errorf("got %v, %v; want errLocked", l, err)
		}
		if took := time.Since(started); took < 28*time.Second || took > 29*time.Second {
			t.Errorf("waited for %v, want 29 s", took)
		}
		want := []time.Duration{0, 100, 250, 475, 813, 1319, 2078, 3217, 4926, 6926, 8926, 10926, 12926, 14926, 16926, 18926, 20926, 22926, 24926, 26926, 28926}
		for i := range want {
			want[i] *= time.Millisecond
		}
		wantEqual(t, "times of the tries", want, asked)
		wantLockAlone(t, path, held.id)
		held.release()
	})
}

func TestLockWaitEndsEarly(t *testing.T) {
	quit := errors.New("the program stops")
	for name, want := range map[string]error{"there is no need any more": nil, "its context ends": quit} {
		testInBubble(t, name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), lockFile)
			leaveLock(t, path, 0)
			started := time.Now()
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if want != nil {
				time.AfterFunc(time.Second, func() { cancel(want) })
			}
			l, err := acquireLock(ctx, path, &lockWatch{}, func() bool { return want == nil && time.Since(started) > time.Second })
			if took := time.Since(started); l != nil || err != want || took < time.Second || took > 2*time.Second {
				t.Errorf("got %v, %v after %v; want %v after little more than 1 s", l, err, took, want)
			}
			wantLockAlone(t, path, "another's")
		})
	}
}

// TestStaleLockIsTakenOverByOne has two find the same stale lock at the same time, on real files: a file system may give
// the new lock the number of the one that was just deleted.
func TestStaleLockIsTakenOverByOne(t *testing.T) {
	t.Parallel()
	rounds := 30
	if os.Getenv("QWEN_LONG_TESTS") == "1" {
		rounds = 200
	}
	path := filepath.Join(t.TempDir(), lockFile)
	for round := range rounds {
		leaveLock(t, path, ancientLock)
		var locks [2]*fileLock
		var both sync.WaitGroup
		start := make(chan struct{})
		for i := range locks {
			both.Go(func() {
				<-start
				var err error
				if locks[i], err = acquireLock(t.Context(), path, &lockWatch{}, func() bool { return true }); err != nil {
					t.Error(err)
				}
			})
		}
		close(start)
		both.Wait()
		if (locks[0] == nil) == (locks[1] == nil) {
			t.Fatalf("round %d: held by the first: %t, by the second: %t; want one of them", round, locks[0] != nil, locks[1] != nil)
		}
		for _, l := range locks {
			if l != nil {
				wantLockAlone(t, path, l.id)
				l.release()
			}
		}
		if t.Failed() {
			t.Fatalf("round %d", round)
		}
	}
	wantLockAlone(t, path, "")
}
