package main

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
)

// portPicker hands out loopback ports below the kernel's ephemeral range. A
// port inside it could become the source port of anybody's outgoing connection
// in the moments when its server is not bound: between choosing and starting,
// and, in tests, while the API server is stopped and must come back on it.
type portPicker struct {
	first, last int
	taken       map[int]bool
}

func newPortPicker() *portPicker {
	first, last := 15000, 32767
	var low int
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		if _, err := fmt.Sscan(string(text), &low); err == nil && low < 20000 {
			first, last = 61000, 65535 // a widened range usually leaves the top free
		} else if err == nil {
			last = low - 1
		}
	}
	return &portPicker{first: first, last: last, taken: map[int]bool{}}
}

// pick returns the preferred port if it is free, else a random one: control
// planes that start at the same moment then choose differently.
func (p *portPicker) pick(preferred int) (int, error) {
	for attempt := range 200 {
		port := preferred
		if attempt > 0 || port == 0 {
			port = p.first + rand.IntN(p.last-p.first+1)
		}
		if p.taken[port] || !isFree(port) {
			continue
		}
		p.taken[port] = true
		return port, nil
	}
	return 0, fmt.Errorf("no free port between %d and %d", p.first, p.last)
}

func isFree(port int) bool {
	listener, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return false
	}
	listener.Close()
	return true
}
