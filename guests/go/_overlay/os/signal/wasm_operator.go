package signal

import "os"

// wasmOperatorDeliver hands a signal to those who are notified of it; false when nobody is.
func wasmOperatorDeliver(sig os.Signal) bool {
	n := signum(sig)
	handlers.Lock()
	isWanted := n >= 0 && handlers.ref[n] > 0
	handlers.Unlock()
	if isWanted {
		process(sig)
	}
	return isWanted
}
