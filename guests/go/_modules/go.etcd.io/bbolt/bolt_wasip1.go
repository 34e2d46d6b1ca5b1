package bbolt

import (
	"syscall"
	"time"
)

// A child operator has no files to keep a database in: opening one fails.

func flock(*DB, bool, time.Duration) error { return syscall.ENOSYS }
func funlock(*DB) error                    { return nil }
func mmap(*DB, int) error                  { return syscall.ENOSYS }
func munmap(*DB) error                     { return nil }
func mlock(*DB, int) error                 { return nil }
func munlock(*DB, int) error               { return nil }
