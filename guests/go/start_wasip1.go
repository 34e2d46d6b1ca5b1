//go:build go1.24

package support

import (
	"net/http"
	"os"
	_ "os/signal" // for the functions linked to
	"syscall"
	_ "unsafe" // for linkname
)

// idleDescriptor is readable exactly when no goroutine can run (docs/abi.md, poll_oneoff).
const idleDescriptor = 65536

const eTimedOut = syscall.ETIMEDOUT

var (
	requests = newOperations(parent{})
	idle     syscall.RawConn
)

//go:linkname mainMain main.main
func mainMain()

// deliverSignal hands a signal to the channels of signal.Notify; false when there are none. Like the
// hook below, it is added to the standard library by build-go (_overlay). Linking to them takes
// -ldflags=-checklinkname=0.
//
//go:linkname deliverSignal os/signal.wasmOperatorDeliver
func deliverSignal(os.Signal) bool

// roundTripHook is what (*http.Transport).RoundTrip asks first.
//
//go:linkname roundTripHook net/http.wasmOperatorRoundTrip
var roundTripHook func(*http.Request) (*http.Response, bool, error)

func init() {
	roundTripHook = requests.roundTrip
	// The parent says that the descriptor does not block, so Go's poller takes it.
	connection, err := os.NewFile(idleDescriptor, "idle").SyscallConn()
	if err != nil {
		panic(err)
	}
	idle = connection
}

//go:wasmexport on_event
func onEvent(operation uint64, kind, pointer, length uint32) {
	var payload []byte
	if length > 0 {
		payload = take(pointer)
	}
	switch kind {
	case kindStart:
		requests.isRunning = true
		go func() {
			mainMain()
			os.Exit(0)
		}()
	case kindStop:
		if !deliverSignal(syscall.SIGTERM) {
			// What a signal does to a program that does not handle it.
			os.Exit(0)
		}
	case kindTimer: // The scheduler looks at its timers itself.
	default:
		requests.deliver(operation, kind, payload)
	}
	// Waits until no goroutine can run. Go's scheduler then calls poll_oneoff with the time until the
	// next timer, the parent notes it and reports the descriptor readable, and this call returns. All
	// other goroutines stay parked in linear memory.
	hasWaited := false
	idle.Read(func(uintptr) bool {
		done := hasWaited
		hasWaited = true
		return done
	})
}
