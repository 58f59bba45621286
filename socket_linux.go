package main

import (
	"syscall"
	"time"
)

// tcpUserTimeout is the socket option of that name (RFC 5482), in ms. Package syscall lacks it on some architectures.
const tcpUserTimeout = 0x12

// boundUnsent has the kernel end the connections that the listening socket fd accepts once what was sent on them has found
// no taker for d. A write is done when the kernel has taken it, so no write deadline sees a client that stops reading
// behind a short answer.
func boundUnsent(fd uintptr, d time.Duration) error {
	return syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(d.Milliseconds()))
}
