package logrus

// isTerminal: a child operator's output is the parent's log.
func isTerminal(fd int) bool { return false }
