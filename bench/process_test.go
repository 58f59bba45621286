//go:build linux

package main

import (
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	for text, want := range map[string][2]int{
		"12 (nginx) S 1 12 12 0 -1":         {12, 1},
		"345 (a) (b c) R 12 345 345 0 -1":   {345, 12},
		"9 (worker: 1) 7 (x) S 345 9 9 0 1": {9, 345},
	} {
		if pid, parent, err := parseStat([]byte(text)); err != nil || [2]int{pid, parent} != want {
			t.Errorf("parseStat(%q) = %d, %d, %v; want %v", text, pid, parent, err, want)
		}
	}
	for _, text := range []string{"", "12", "12 (a)", "x (a) S 1"} {
		if _, _, err := parseStat([]byte(text)); err == nil {
			t.Errorf("parseStat(%q) has no error", text)
		}
	}
}

func TestParseSmaps(t *testing.T) {
	text := []byte("00400000-7ffc [rollup]\nRss:     5120 kB\nPss:     4096 kB\nPss_Dirty:    1 kB\n")
	if kb, err := parseSmaps(text, "Pss:"); err != nil || kb != 4096 {
		t.Errorf("Pss = %d, %v; want 4096", kb, err)
	}
	if _, err := parseSmaps(text, "Swap:"); err == nil {
		t.Error("a field that is not there has no error")
	}
}

func TestFamilyAndItsFigures(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	pids, err := family(os.Getpid())
	if err != nil || pids[0] != os.Getpid() || !slices.Contains(pids, cmd.Process.Pid) {
		t.Errorf("family = %v, %v; want this process first, and %d", pids, err, cmd.Process.Pid)
	}
	self := pids[:1]
	before, err := cpuTime(self)
	if err != nil {
		t.Fatal(err)
	}
	const work = 20 * time.Millisecond
	for {
		after, err := cpuTime(self)
		if err != nil {
			t.Fatal(err)
		}
		if after-before >= work { // or this never ends
			break
		}
	}
	if rss, err := memory(self); err != nil || rss < 1<<20 {
		t.Errorf("memory = %d, %v; want some MB", rss, err)
	}
}
