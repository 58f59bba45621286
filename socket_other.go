//go:build !linux

package main

import "time"

// boundUnsent does nothing: only Linux knows the option.
func boundUnsent(uintptr, time.Duration) error { return nil }
