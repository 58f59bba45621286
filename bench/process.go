//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
	"unsafe"
)

// clock reads one of Linux's clocks.
func clock(id int) (time.Duration, error) {
	var ts syscall.Timespec
	if _, _, e := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, uintptr(id), uintptr(unsafe.Pointer(&ts)), 0); e != 0 {
		return 0, e
	}
	return time.Duration(ts.Nano()), nil
}

// monotonic returns the time since the machine started. Unlike the monotonic clock in a time.Time it means the same in all processes.
func monotonic() time.Duration {
	const clockMonotonic = 1
	d, err := clock(clockMonotonic)
	if err != nil {
		panic(err) // every Linux has it
	}
	return d
}

// cpuTime returns the CPU time, user's and system's, that the processes have had, with that of threads that have ended. It is
// what /proc/PID/stat tells in ticks of 10 ms, to the nanosecond.
func cpuTime(pids []int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		const clockSched = 2 // CPUCLOCK_SCHED, see clock_getcpuclockid(3)
		d, err := clock(^pid<<3 | clockSched)
		if err != nil {
			return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
		}
		sum += d
	}
	return sum, nil
}

// family returns pid and the processes that descend from it.
func family(pid int) ([]int, error) {
	parents := map[int]int{}
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // it has ended
		}
		child, parent, err := parseStat(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		parents[child] = parent
	}
	if _, ok := parents[pid]; !ok {
		return nil, fmt.Errorf("process %d has ended", pid)
	}
	pids := []int{pid}
	for i := 0; i < len(pids); i++ {
		for child, parent := range parents {
			if parent == pids[i] {
				pids = append(pids, child)
			}
		}
	}
	return pids, nil
}

// parseStat reads the ids of a process and its parent from /proc/PID/stat: "pid (name) state ppid …", where the name may
// hold anything, parentheses too.
func parseStat(text []byte) (pid, parent int, err error) {
	id, _, ok := bytes.Cut(text, []byte(" ("))
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if !ok || len(fields) < 2 {
		return 0, 0, fmt.Errorf("%q is not as proc(5) says", text)
	}
	pid, err = strconv.Atoi(string(id))
	parent, parentErr := strconv.Atoi(string(fields[1]))
	return pid, parent, errors.Join(err, parentErr)
}

// memory returns the resident memory of the processes, in bytes: of one its RSS, of several
// the sum of their PSS, so that what they share counts once.
func memory(pids []int) (int64, error) {
	field := "Rss:"
	if len(pids) > 1 {
		field = "Pss:"
	}
	var sum int64
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, err
		}
		kb, err := parseSmaps(text, field)
		if err != nil {
			return 0, err
		}
		sum += kb << 10
	}
	return sum, nil
}

// parseSmaps returns a field of /proc/PID/smaps_rollup, in kB.
func parseSmaps(text []byte, field string) (int64, error) {
	for line := range bytes.Lines(text) {
		if f := bytes.Fields(line); len(f) == 3 && string(f[0]) == field {
			return strconv.ParseInt(string(f[1]), 10, 64)
		}
	}
	return 0, fmt.Errorf("no %s in smaps_rollup", field)
}
