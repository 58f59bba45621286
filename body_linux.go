package main

import "syscall"

// mapMemory returns size bytes outside of Go's heap. The kernel gives each page when it is first written to, and
// unmapMemory gives all of them back at once, where the collector lets the heap grow to twice of what is in use.
func mapMemory(size int) ([]byte, error) {
	b, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE|syscall.MAP_NORESERVE)
	if err == nil {
		syscall.Madvise(b, syscall.MADV_NOHUGEPAGE) // a huge page is 2 MiB for the first byte
	}
	return b, err
}

func unmapMemory(b []byte) { syscall.Munmap(b) }
