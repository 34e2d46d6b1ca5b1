//go:build go1.24

package support

import (
	"errors"
	"unsafe"
)

// The host functions of docs/abi.md.

//go:wasmimport kube_v1 request
func hostRequest(message unsafe.Pointer, length uint32) int64

//go:wasmimport host_v1 cancel
func hostCancel(operation uint64) int32

//go:wasmimport host_v1 hold
func hostHold(operation uint64, held uint32) int32

//go:wasmimport host_v1 wait
func hostWait(head unsafe.Pointer) int32

//go:wasmimport host_v1 take
func hostTake(payload unsafe.Pointer, length uint32) int32

// parent is the real host.
type parent struct{}

func (parent) request(message []byte) int64 {
	return hostRequest(unsafe.Pointer(unsafe.SliceData(message)), uint32(len(message)))
}

// An operation that has just ended by itself is unknown, which is no harm.
func (parent) cancel(operation uint64) { hostCancel(operation) }

func (parent) hold(operation uint64, held bool) {
	var flag uint32
	if held {
		flag = 1
	}
	hostHold(operation, flag)
}

func (parent) wait() error {
	var head struct {
		operation    uint64
		kind, length uint32
	}
	if code := hostWait(unsafe.Pointer(&head)); code != 0 {
		return &unavailable{"the answer took too long: package initialisers may wait for some seconds only", eTimedOut}
	}
	payload := make([]byte, head.length)
	if len(payload) > 0 && hostTake(unsafe.Pointer(unsafe.SliceData(payload)), head.length) != 0 {
		return errors.New("the parent operator's event is lost")
	}
	requests.deliver(head.operation, head.kind, payload)
	return nil
}

// buffers were handed out by alloc, and live until their event comes.
var buffers = map[uintptr][]byte{}

//go:wasmexport alloc
func alloc(length uint32) unsafe.Pointer {
	buffer := make([]byte, length)
	pointer := unsafe.Pointer(unsafe.SliceData(buffer))
	buffers[uintptr(pointer)] = buffer
	return pointer
}

// take is the buffer of an event.
func take(pointer uint32) []byte {
	buffer := buffers[uintptr(pointer)]
	delete(buffers, uintptr(pointer))
	return buffer
}
