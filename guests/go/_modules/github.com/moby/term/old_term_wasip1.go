package term

import (
	"errors"
	"io"
	"os"
	"syscall"
)

// ErrInvalidState is as elsewhere.
var ErrInvalidState = errors.New("invalid terminal state")

// State is empty: a child operator has no terminal.
type State struct{}

// Winsize is the size of a window.
type Winsize struct {
	Height uint16
	Width  uint16
	x      uint16
	y      uint16
}

// StdStreams are the three standard files.
func StdStreams() (stdIn io.ReadCloser, stdOut, stdErr io.Writer) {
	return os.Stdin, os.Stdout, os.Stderr
}

// GetFdInfo tells a file's descriptor.
func GetFdInfo(in interface{}) (uintptr, bool) {
	if file, ok := in.(*os.File); ok {
		return file.Fd(), false
	}
	return 0, false
}

// The others say that there is no terminal.

func IsTerminal(uintptr) bool                      { return false }
func GetWinsize(uintptr) (*Winsize, error)         { return nil, syscall.ENOTTY }
func SetWinsize(uintptr, *Winsize) error           { return syscall.ENOTTY }
func RestoreTerminal(uintptr, *State) error        { return syscall.ENOTTY }
func SaveState(uintptr) (*State, error)            { return nil, syscall.ENOTTY }
func DisableEcho(uintptr, *State) error            { return syscall.ENOTTY }
func SetRawTerminal(uintptr) (*State, error)       { return nil, syscall.ENOTTY }
func SetRawTerminalOutput(uintptr) (*State, error) { return nil, syscall.ENOTTY }
func MakeRaw(uintptr) (*State, error)              { return nil, syscall.ENOTTY }
