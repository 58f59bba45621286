package main

import "syscall"

// The kernel gives each page when it is first written to, and takes all of them back at once. Go's collector would let the heap
// grow to twice what is in use.
func init() {
	mapMemory = func(size int) ([]byte, error) {
		b, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE|syscall.MAP_NORESERVE)
		if err == nil {
			syscall.Madvise(b, syscall.MADV_NOHUGEPAGE) // a huge page takes 2 MiB for the first byte
		}
		return b, err
	}
	unmapMemory = func(b []byte) { syscall.Munmap(b) }
}
