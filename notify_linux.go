package main

import (
	"syscall"
	"unsafe"
)

// monotonic returns the time of CLOCK_MONOTONIC in µs, by which the service manager knows which reload has ended.
func monotonic() int64 {
	const clockMonotonic = 1
	var now syscall.Timespec
	syscall.Syscall(syscall.SYS_CLOCK_GETTIME, clockMonotonic, uintptr(unsafe.Pointer(&now)), 0)
	return now.Nano() / 1000
}
