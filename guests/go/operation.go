package support

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
)

// Kinds of events, as in docs/abi.md.
const (
	kindStart = 1
	kindStop  = 2
	kindTimer = 3
	kindHead  = 6
	kindData  = 7
	kindEnd   = 8
	kindError = 9
)

// A body that nobody reads is held by the parent once that many bytes of it wait here, and goes on
// when most of them are read.
const (
	holdAbove   = 1 << 20
	resumeBelow = 1 << 18
)

// host is what the parent does for this program.
type host interface {
	// request starts an operation: its number, or an error code below 1.
	request(message []byte) int64
	// cancel ends an operation; no event of it comes afterwards.
	cancel(operation uint64)
	// hold stops the data of an operation, or lets it flow again.
	hold(operation uint64, held bool)
	// wait delivers one event while package initialisers run, when the parent cannot call.
	wait() error
}

// operations are the requests under way.
type operations struct {
	host host
	mu   sync.Mutex
	open map[uint64]*operation
	// isRunning is set once initialisers are done, and events come by themselves.
	isRunning bool
}

func newOperations(host host) *operations {
	return &operations{host: host, open: map[uint64]*operation{}}
}

// operation is one request: its head, and what is there of its body. It is the body's reader, too.
type operation struct {
	all     *operations
	number  uint64
	changed sync.Cond
	head    []byte
	data    [][]byte
	unread  int
	isHeld  bool
	// err ends the body: io.EOF, or why there is none.
	err error
}

// start hands a request to the parent.
func (all *operations) start(message []byte) (*operation, error) {
	all.mu.Lock()
	defer all.mu.Unlock()
	number := all.host.request(message)
	if number < 1 {
		return nil, callError(number)
	}
	o := &operation{all: all, number: uint64(number)}
	o.changed.L = &all.mu
	all.open[o.number] = o
	return o, nil
}

// deliver takes one event of an operation; payload belongs to it from now on.
func (all *operations) deliver(number uint64, kind uint32, payload []byte) {
	all.mu.Lock()
	defer all.mu.Unlock()
	o := all.open[number]
	if o == nil {
		return
	}
	switch kind {
	case kindHead:
		o.head = payload
	case kindData:
		o.data = append(o.data, payload)
		o.unread += len(payload)
		if !o.isHeld && o.unread > holdAbove {
			o.isHeld = true
			all.host.hold(number, true)
		}
	case kindEnd:
		o.err = io.EOF
	case kindError:
		o.err = statusError(payload, o.head != nil)
	default:
		return
	}
	if o.err != nil {
		delete(all.open, number)
	}
	o.changed.Broadcast()
}

// wait waits for the next event of o; all.mu is held.
func (o *operation) wait() {
	if o.all.isRunning {
		o.changed.Wait()
		return
	}
	o.all.mu.Unlock()
	err := o.all.host.wait()
	o.all.mu.Lock()
	if err != nil {
		o.end(err)
	}
}

// end ends o early: its readers get err, and nothing of it comes any more. all.mu is held.
func (o *operation) end(err error) {
	if o.all.open[o.number] == o {
		delete(o.all.open, o.number)
		o.all.host.cancel(o.number)
	}
	if o.err == nil || o.err == io.EOF {
		o.err = err
	}
	o.data, o.unread = nil, 0
	o.changed.Broadcast()
}

// cancel is end for those who do not hold the lock.
func (o *operation) cancel(err error) {
	o.all.mu.Lock()
	defer o.all.mu.Unlock()
	o.end(err)
}

// awaitHead waits for status and headers.
func (o *operation) awaitHead() ([]byte, error) {
	o.all.mu.Lock()
	defer o.all.mu.Unlock()
	for o.head == nil && o.err == nil {
		o.wait()
	}
	if o.head != nil {
		return o.head, nil
	}
	if o.err == io.EOF {
		return nil, io.ErrUnexpectedEOF
	}
	return nil, o.err
}

// Read reads the body.
func (o *operation) Read(p []byte) (int, error) {
	o.all.mu.Lock()
	defer o.all.mu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	for len(o.data) == 0 && o.err == nil {
		o.wait()
	}
	if len(o.data) == 0 {
		return 0, o.err
	}
	n := copy(p, o.data[0])
	o.unread -= n
	if o.data[0] = o.data[0][n:]; len(o.data[0]) == 0 {
		o.data[0] = nil
		o.data = o.data[1:]
	}
	if o.isHeld && o.unread < resumeBelow {
		o.isHeld = false
		o.all.host.hold(o.number, false)
	}
	return n, nil
}

// callError says why the parent did not take a request.
func callError(code int64) error {
	switch code {
	case -2:
		return errors.New("the parent operator finds the request malformed; its log says what")
	case -3:
		return &unavailable{"this child operator has too many requests under way (limits.operations)", syscall.EAGAIN}
	case -4:
		return errors.New("the request is too large for the parent operator")
	case -6:
		return errors.New("not available to a child operator (exec, attach, port-forward and other upgraded connections)")
	}
	return fmt.Errorf("the parent operator refuses the request: %d", code)
}

// unavailable is a connection that failed. client-go tries again after those.
type unavailable struct {
	message string
	errno   syscall.Errno
}

func (e *unavailable) Error() string   { return e.message }
func (e *unavailable) Unwrap() error   { return e.errno }
func (e *unavailable) Timeout() bool   { return e.errno == syscall.ETIMEDOUT }
func (e *unavailable) Temporary() bool { return true }

// statusError turns an `error` event into what a connection of net/http would have said.
func statusError(payload []byte, hasHead bool) error {
	var status struct{ Reason, Message string }
	if err := json.Unmarshal(payload, &status); err != nil {
		return fmt.Errorf("the parent operator's error: %w", err)
	}
	switch {
	case status.Reason == "TimedOut":
		return &unavailable{status.Message, syscall.ETIMEDOUT}
	case hasHead:
		// What net/http says of a body that broke off; watches go on quietly after it.
		return io.ErrUnexpectedEOF
	case status.Reason == "ConnectionFailed":
		return &unavailable{status.Message, syscall.ECONNREFUSED}
	}
	return errors.New(status.Message)
}
