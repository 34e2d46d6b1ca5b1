package fsnotify

// quiet watches nothing: a child operator's files never change. An error, as the original has it for
// systems that it does not know, would end programs that need no more than this.
type quiet struct {
	events chan Event
	errors chan error
}

var defaultBufferSize = 0

func newBackend(events chan Event, errors chan error) (backend, error) {
	return &quiet{events, errors}, nil
}

func (q *quiet) Close() error {
	if q.events != nil {
		close(q.events)
		close(q.errors)
		q.events = nil
	}
	return nil
}

func (*quiet) WatchList() []string             { return nil }
func (*quiet) Add(string) error                { return nil }
func (*quiet) AddWith(string, ...addOpt) error { return nil }
func (*quiet) Remove(string) error             { return nil }
func (*quiet) xSupports(Op) bool               { return false }

// Version 1.8 wants this one as well.
func newBufferedBackend(_ uint, events chan Event, errors chan error) (backend, error) {
	return newBackend(events, errors)
}
