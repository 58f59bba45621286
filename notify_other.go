//go:build !linux

package main

// monotonic returns 0: only systemd asks for it.
func monotonic() int64 { return 0 }
