package time

import "runtime"

// wasmOperatorPeriod is the period that NewTicker uses: that of tickers which only keep house is an
// hour, so that they do not wake an operator that has nothing to do.
//
// Not of every ticker: most do real work, time.Tick's above all (controller-runtime's priority queue
// waits for RequeueAfter with it).
func wasmOperatorPeriod(period Duration) Duration {
	if period <= 0 || period >= Hour {
		return period
	}
	var callers [6]uintptr
	// Callers, this function and NewTicker are not of interest.
	frames := runtime.CallersFrames(callers[:runtime.Callers(3, callers[:])])
	for {
		frame, more := frames.Next()
		for _, housekeeper := range wasmOperatorHousekeepers {
			if wasmOperatorIs(frame.Function, housekeeper) {
				return Hour
			}
		}
		if !more {
			return period
		}
	}
}

// wasmOperatorIs says whether a function is the one of that name, generic or not. In
// `package.*.method` any receiver is meant.
func wasmOperatorIs(function, pattern string) bool {
	if n := len(pattern); len(function) >= n && function[:n] == pattern {
		return len(function) == n || function[n] == '['
	}
	for i := 0; i+2 < len(pattern); i++ {
		if pattern[i:i+3] != ".*." {
			continue
		}
		start, end := pattern[:i+1], pattern[i+2:]
		return len(function) > len(start)+len(end) && function[:len(start)] == start && function[len(function)-len(end):] == end
	}
	return false
}

// wasmOperatorHousekeepers make tickers for a metric, a log file or a file that never changes.
var wasmOperatorHousekeepers = [...]string{
	// Seconds that the oldest item is being worked on, every 0.5 s; and the queue's length, for the log.
	"k8s.io/client-go/util/workqueue.*.updateUnfinishedWorkLoop",
	"sigs.k8s.io/controller-runtime/pkg/controller/priorityqueue.*.updateUnfinishedWorkLoop",
	// "Insurance against weird things happening" to its exact timers, every 10 s.
	"k8s.io/client-go/util/workqueue.newDelayingQueue",
	"sigs.k8s.io/controller-runtime/pkg/controller/priorityqueue.*.logState",
	// Certificates of servers that nobody reaches, every 10 s.
	"sigs.k8s.io/controller-runtime/pkg/certwatcher.*.Start",
	// Log files, of which there are none.
	"k8s.io/klog/v2.*.run.func1",
	"k8s.io/klog/v2.*.flushDaemon",
	"k8s.io/klog.*.flushDaemon",
	"github.com/golang/glog.*.flushDaemon",
	// Metrics that nobody collects, every 10 s.
	"go.opencensus.io/stats/view.*.start",
}
