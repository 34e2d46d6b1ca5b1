package runtime

// Goroutines that poll.
//
// Elsewhere a monitor thread interrupts a goroutine after 10 ms, and other threads run the others.
// Here nobody does, and a loop around a select that is always ready, like the one in which
// controller-runtime waits for runnables while its context is cancelled already, runs for ever: what
// it waits for never comes. So goroutines count the channel operations that they do without waiting.
// One that does nothing else lets the others run as often as elsewhere, and sleeps ever longer
// between two turns once it has polled for a while: only when all goroutines sleep does the program
// return to its parent, which has the answers.

const (
	// wasmOperatorOften is how many operations go by between two looks at the clock.
	wasmOperatorOften = 64
	// wasmOperatorTurn is how long a goroutine may poll in one go, in nanoseconds.
	wasmOperatorTurn = 10_000_000
	// wasmOperatorPatience is how many turns it has before it must sleep.
	wasmOperatorPatience = 10
	// wasmOperatorSleep is what each turn adds to the sleep, until polling takes a tenth of the time.
	wasmOperatorSleep    = 1_000_000
	wasmOperatorSleepMax = 90_000_000
)

// wasmOperatorPolls is what a goroutine has done since it last waited.
type wasmOperatorPolls struct {
	count uint32
	turns uint32
	// since is when this turn began.
	since int64
}

// wasmOperatorPoll is called where a goroutine is about to use a channel, and holds no lock.
func wasmOperatorPoll() {
	polls := &getg().wasmOperator
	polls.count++
	if polls.count%wasmOperatorOften == 0 {
		wasmOperatorPause(polls)
	}
}

//go:noinline
func wasmOperatorPause(polls *wasmOperatorPolls) {
	gp := getg()
	if gp != gp.m.curg || !canPreemptM(gp.m) {
		return // a timer's function, or the runtime's own affairs
	}
	now := nanotime()
	if polls.count == wasmOperatorOften {
		polls.turns, polls.since = 0, now
		return
	}
	if now-polls.since < wasmOperatorTurn {
		return
	}
	polls.turns++
	if polls.turns <= wasmOperatorPatience {
		mcall(gosched_m)
	} else {
		count := polls.count
		timeSleep(min(int64(polls.turns-wasmOperatorPatience)*wasmOperatorSleep, wasmOperatorSleepMax))
		polls.count = count // this was no waiting
	}
	polls.since = nanotime()
}
