package main

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestWatchFilesLogsEachCauseOnce has a file break, break in another way, and be repaired, twice.
func TestWatchFilesLogsEachCauseOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logBuffer
		var broken error
		file := &watchedFile{name: "KEYS", fallback: "the last keys stay in use", read: func() error { return broken }}
		go watchFiles(t.Context(), newLogger(&config{logFormat: "text"}, &log), 5*time.Second, []*watchedFile{file})
		for range 2 {
			for _, broken = range []error{nil, errors.New("empty"), errors.New("gone"), nil} {
				time.Sleep(time.Minute)
			}
		}
		synctest.Wait()
		var got []string
		for line := range strings.Lines(log.String()) {
			_, line, _ = strings.Cut(line, "level=")
			got = append(got, strings.TrimSpace(line))
		}
		once := []string{
			`ERROR msg="KEYS can't be used; the last keys stay in use" error=empty`,
			`ERROR msg="KEYS can't be used; the last keys stay in use" error=gone`,
			`INFO msg="KEYS can be used again"`,
		}
		if diff := cmp.Diff(append(once, once...), got); diff != "" {
			t.Errorf("log (-want +got):\n%s", diff)
		}
	})
}
