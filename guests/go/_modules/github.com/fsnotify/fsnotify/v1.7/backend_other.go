package fsnotify

// Watcher watches nothing: a child operator's files never change. An error, as the original has it
// for systems that it does not know, would end programs that need no more than this.
type Watcher struct {
	Events chan Event
	Errors chan error
	closed bool
}

// NewWatcher makes a watcher.
func NewWatcher() (*Watcher, error) {
	return &Watcher{Events: make(chan Event), Errors: make(chan error)}, nil
}

// NewBufferedWatcher makes a watcher.
func NewBufferedWatcher(uint) (*Watcher, error) { return NewWatcher() }

// Close ends it.
func (w *Watcher) Close() error {
	if !w.closed {
		w.closed = true
		close(w.Events)
		close(w.Errors)
	}
	return nil
}

// WatchList is empty.
func (*Watcher) WatchList() []string { return nil }

// Add does nothing.
func (*Watcher) Add(string) error { return nil }

// AddWith does nothing.
func (*Watcher) AddWith(string, ...addOpt) error { return nil }

// Remove does nothing.
func (*Watcher) Remove(string) error { return nil }
