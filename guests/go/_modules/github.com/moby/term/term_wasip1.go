package term

import (
	"errors"
	"io"
	"os"
	"syscall"
)

// ErrInvalidState is as elsewhere.
var ErrInvalidState = errors.New("invalid terminal state")

// terminalState is empty: a child operator has no terminal.
type terminalState struct{}

func stdStreams() (stdIn io.ReadCloser, stdOut, stdErr io.Writer) {
	return os.Stdin, os.Stdout, os.Stderr
}

func getFdInfo(in interface{}) (uintptr, bool) {
	if file, ok := in.(*os.File); ok {
		return file.Fd(), false
	}
	return 0, false
}

func getWinsize(uintptr) (*Winsize, error)         { return nil, syscall.ENOTTY }
func setWinsize(uintptr, *Winsize) error           { return syscall.ENOTTY }
func isTerminal(uintptr) bool                      { return false }
func restoreTerminal(uintptr, *State) error        { return syscall.ENOTTY }
func saveState(uintptr) (*State, error)            { return nil, syscall.ENOTTY }
func disableEcho(uintptr, *State) error            { return syscall.ENOTTY }
func setRawTerminal(uintptr) (*State, error)       { return nil, syscall.ENOTTY }
func setRawTerminalOutput(uintptr) (*State, error) { return nil, syscall.ENOTTY }
func makeRaw(uintptr) (*State, error)              { return nil, syscall.ENOTTY }
