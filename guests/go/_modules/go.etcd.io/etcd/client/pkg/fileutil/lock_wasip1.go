package fileutil

import "os"

// TryLockFile is LockFile: nobody shares a child operator's files.
func TryLockFile(path string, flag int, perm os.FileMode) (*LockedFile, error) {
	return LockFile(path, flag, perm)
}

// LockFile opens a file.
func LockFile(path string, flag int, perm os.FileMode) (*LockedFile, error) {
	f, err := os.OpenFile(path, flag, perm)
	if err != nil {
		return nil, err
	}
	return &LockedFile{f}, nil
}
