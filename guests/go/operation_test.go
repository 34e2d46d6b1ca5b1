package support

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// parentFake notes what it is asked for.
type parentFake struct {
	mu        sync.Mutex
	last      int64
	refusal   int64
	messages  chan string
	cancelled []uint64
	held      map[uint64]bool
	waited    func() error
}

func newFake() *parentFake {
	return &parentFake{messages: make(chan string, 16), held: map[uint64]bool{}}
}

func (p *parentFake) request(message []byte) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refusal != 0 {
		return p.refusal
	}
	p.last++
	p.messages <- string(message)
	return p.last
}

func (p *parentFake) cancel(operation uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cancelled = append(p.cancelled, operation)
}

func (p *parentFake) hold(operation uint64, held bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held[operation] = held
}

func (p *parentFake) isHeld(operation uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held[operation]
}

func (p *parentFake) wait() error { return p.waited() }

// running is a program whose initialisers are done.
func running(p *parentFake) *operations {
	all := newOperations(p)
	all.isRunning = true
	return all
}

func get(t *testing.T, all *operations, ctx context.Context, url string) (*http.Response, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, ok, err := all.roundTrip(req)
	if !ok {
		t.Fatal("not served")
	}
	return resp, err
}

func TestAResponseIsReadAsItComes(t *testing.T) {
	p := newFake()
	all := running(p)
	go func() {
		<-p.messages
		all.deliver(1, kindHead, []byte("200\ncontent-type: application/json\ncontent-length: 5\nx: 1\nx: 2\n"))
		all.deliver(1, kindData, []byte("ab"))
		all.deliver(1, kindData, []byte("cde"))
		all.deliver(1, kindEnd, nil)
	}()
	resp, err := get(t, all, t.Context(), "https://kubernetes.default:443/api")
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 200 || resp.ContentLength != 5 || len(resp.Header["X"]) != 2 {
		t.Errorf("%+v", resp)
	}
	text, err := io.ReadAll(resp.Body)
	if string(text) != "abcde" || err != nil {
		t.Errorf("%q, %v", text, err)
	}
	if err := resp.Body.Close(); err != nil || len(p.cancelled) != 0 {
		t.Errorf("%v, cancelled %v", err, p.cancelled)
	}
}

func TestFailuresAreThoseOfConnections(t *testing.T) {
	status := func(reason string) []byte { return []byte(`{"code":0,"reason":"` + reason + `","message":"why"}`) }
	for _, test := range []struct {
		name    string
		events  func(all *operations)
		matches func(error) bool
	}{
		{"refused", func(all *operations) { all.deliver(1, kindError, status("ConnectionFailed")) },
			func(err error) bool {
				return errors.Is(err, syscall.ECONNREFUSED) && strings.Contains(err.Error(), "why")
			}},
		{"timed out", func(all *operations) { all.deliver(1, kindError, status("TimedOut")) },
			func(err error) bool { var e net.Error; return errors.As(err, &e) && e.Timeout() }},
		{"ended without a head", func(all *operations) { all.deliver(1, kindEnd, nil) },
			func(err error) bool { return err == io.ErrUnexpectedEOF }},
		{"no status", func(all *operations) { all.deliver(1, kindHead, []byte("x\n")) },
			func(err error) bool { return strings.Contains(err.Error(), "begins with") }},
		{"not JSON", func(all *operations) { all.deliver(1, kindError, []byte("{")) },
			func(err error) bool { return err != nil }},
	} {
		p := newFake()
		all := running(p)
		go func() {
			<-p.messages
			test.events(all)
		}()
		if _, err := get(t, all, t.Context(), "http://kubernetes.default/"); err == nil || !test.matches(err) {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

func TestABodyThatBreaksOffIsAnUnexpectedEnd(t *testing.T) {
	p := newFake()
	all := running(p)
	go func() {
		<-p.messages
		all.deliver(1, kindHead, []byte("200\n"))
		all.deliver(1, kindData, []byte("half"))
		all.deliver(1, kindError, []byte(`{"reason":"ConnectionFailed","message":"why"}`))
	}()
	resp, err := get(t, all, t.Context(), "http://kubernetes.default.svc.cluster.local/")
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(resp.Body)
	if string(text) != "half" || err != io.ErrUnexpectedEOF {
		t.Errorf("%q, %v", text, err)
	}
}

func TestACancelledContextCancelsTheOperation(t *testing.T) {
	p := newFake()
	all := running(p)
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("enough")
	go func() {
		<-p.messages
		cancel(reason)
	}()
	if _, err := get(t, all, ctx, "http://kubernetes.default/"); err != reason {
		t.Errorf("%v", err)
	}
	if len(p.cancelled) != 1 || len(all.open) != 0 {
		t.Errorf("cancelled %v, open %v", p.cancelled, all.open)
	}
	// In the middle of the body, and by closing it.
	for _, end := range []func(context.CancelFunc, io.Closer){
		func(cancel context.CancelFunc, _ io.Closer) { cancel() },
		func(_ context.CancelFunc, body io.Closer) { body.Close() },
	} {
		p := newFake()
		all := running(p)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-p.messages
			all.deliver(1, kindHead, []byte("200\n"))
		}()
		resp, err := get(t, all, ctx, "http://kubernetes.default/")
		if err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(time.Millisecond, func() { end(cancel, resp.Body) })
		if _, err := resp.Body.Read(make([]byte, 1)); err == nil {
			t.Error("no error")
		}
		all.deliver(1, kindData, []byte("late"))
		if len(p.cancelled) != 1 || len(all.open) != 0 {
			t.Errorf("cancelled %v, open %v", p.cancelled, all.open)
		}
		cancel()
	}
}

func TestABodyThatNobodyReadsIsHeld(t *testing.T) {
	p := newFake()
	all := running(p)
	go func() {
		<-p.messages
		all.deliver(1, kindHead, []byte("200\n"))
	}()
	resp, err := get(t, all, t.Context(), "http://kubernetes.default/")
	if err != nil {
		t.Fatal(err)
	}
	piece := 1 << 16
	sent := 0
	for ; !p.isHeld(1); sent += piece {
		if sent > 2*holdAbove {
			t.Fatal("not held")
		}
		all.deliver(1, kindData, make([]byte, piece))
	}
	read := 0
	for ; p.isHeld(1); read += piece {
		if _, err := io.ReadFull(resp.Body, make([]byte, piece)); err != nil {
			t.Fatal(err)
		}
	}
	if left := sent - read; left >= resumeBelow {
		t.Errorf("goes on with %d bytes unread", left)
	}
}

func TestInitialisersWaitForTheParent(t *testing.T) {
	p := newFake()
	all := newOperations(p)
	steps := []func(){
		func() { all.deliver(1, kindHead, []byte("204\n")) },
		func() { all.deliver(1, kindEnd, nil) },
	}
	p.waited = func() error {
		if len(steps) == 0 {
			return syscall.ETIMEDOUT
		}
		steps[0]()
		steps = steps[1:]
		return nil
	}
	resp, err := get(t, all, t.Context(), "http://kubernetes.default/")
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(resp.Body); len(text) != 0 || err != nil {
		t.Errorf("%q, %v", text, err)
	}
	if _, err := get(t, all, t.Context(), "http://kubernetes.default/"); err != syscall.ETIMEDOUT {
		t.Errorf("%v", err)
	}
	if len(p.cancelled) != 1 {
		t.Errorf("cancelled %v", p.cancelled)
	}
}

func TestRefusalsOfTheParent(t *testing.T) {
	for code, part := range map[int64]string{-2: "malformed", -3: "limits.operations", -4: "too large", -6: "port-forward", -9: "-9"} {
		p := newFake()
		p.refusal = code
		if _, err := get(t, running(p), t.Context(), "http://kubernetes.default/"); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%d: %v", code, err)
		}
	}
}
