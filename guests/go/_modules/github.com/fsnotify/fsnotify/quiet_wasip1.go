package fsnotify

import (
	"os"
	"sync"
)

// quiet is a backend that never reports: a child operator's files do not change.
type quiet struct {
	events chan Event
	errors chan error
	once   sync.Once
}

var defaultBufferSize = 0

func newBackend(events chan Event, errors chan error) (backend, error) {
	return &quiet{events: events, errors: errors}, nil
}

func newBufferedBackend(_ uint, events chan Event, errors chan error) (backend, error) {
	return newBackend(events, errors)
}

func (q *quiet) Close() error {
	q.once.Do(func() {
		close(q.events)
		close(q.errors)
	})
	return nil
}

func (q *quiet) Add(name string) error {
	_, err := os.Lstat(name)
	return err
}

func (q *quiet) AddWith(name string, _ ...addOpt) error { return q.Add(name) }
func (q *quiet) Remove(string) error                    { return nil }
func (q *quiet) WatchList() []string                    { return nil }
func (q *quiet) xSupports(Op) bool                      { return false }
