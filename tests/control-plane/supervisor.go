package main

// The supervisor: starts the servers in order, answers commands, and takes
// everything down with it, whatever it is that ends it.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	// readyTimeout is for a loaded machine; an idle one needs 2 to 3 s.
	readyTimeout = 2 * time.Minute
	// probeEvery is short against the start of an API server, long against a probe.
	probeEvery = 20 * time.Millisecond
	// commandGrace is how long a server may take to stop when a command asks it to.
	commandGrace = 15 * time.Second
	// shutdownGrace is short: the state is throw-away, and etcd's log survives a SIGKILL.
	shutdownGrace = 3 * time.Second
)

// process is one start of a server.
type process struct {
	server string
	cmd    *exec.Cmd
	// done is closed when it has ended and was reaped.
	done chan struct{}
	// wanted is set before we end it ourselves. Only the supervisor's goroutine uses it.
	wanted bool
}

// supervisor runs in one goroutine, on the main thread (see init in main.go).
type supervisor struct {
	state state
	tools toolDir
	ports ports
	probe *probe
	// args of every server of this control plane, in the order of their start.
	args  map[string][]string
	order []string
	// running has what was started and not seen to end. Only this goroutine uses it.
	running map[string]*process
	// deaths gets each process that ended, wanted or not.
	deaths chan *process
}

// run is the command of that name; it returns when everything has stopped.
func run(ctx context.Context, o options, in io.Reader, out io.Writer) error {
	if o.detached {
		syscall.CloseOnExec(readyDescriptor) // the servers must not hold it open
	}
	tools, err := findTools(ctx)
	if err != nil {
		return err
	}
	s, err := openState(o.stateDir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	lock, err := s.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	sup, err := newSupervisor(s, tools, o)
	if err != nil {
		return err
	}
	defer sup.shutdown()

	var commands <-chan string
	if !o.detached {
		ctx, commands = lifeline(ctx, in)
	}
	for _, server := range sup.order {
		if err := sup.start(ctx, server); err != nil {
			if ctx.Err() != nil {
				return nil // asked to stop while starting
			}
			return err
		}
	}
	fmt.Fprintf(out, "ready kubeconfig=%s server=%s\n", s.kubeconfig(), sup.ports.apiserverURL())
	if o.detached {
		tellReady()
	}
	return sup.serve(ctx, commands, out)
}

// lifeline reads commands from in, and cancels the context when in ends: the
// one sign of its user's death that reaches us even after a SIGKILL.
func lifeline(ctx context.Context, in io.Reader) (context.Context, <-chan string) {
	ctx, cancel := context.WithCancel(ctx)
	commands := make(chan string)
	go func() {
		defer cancel()
		for lines := bufio.NewScanner(in); lines.Scan(); {
			select {
			case commands <- lines.Text():
			case <-ctx.Done():
				return
			}
		}
	}()
	return ctx, commands
}

// newSupervisor prepares the directory and everybody's flags; nothing runs yet.
func newSupervisor(s state, tools toolDir, o options) (*supervisor, error) {
	if err := s.create(); err != nil {
		return nil, err
	}
	if err := s.writePid("supervisor", os.Getpid()); err != nil {
		return nil, err
	}
	chosen, err := choosePorts(s.savedPort())
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.savePort(chosen.apiserver), writeServerFiles(s, chosen)); err != nil {
		return nil, err
	}
	probe, err := s.newProbe(chosen.apiserver)
	if err != nil {
		return nil, err
	}
	sup := &supervisor{
		state: s, tools: tools, ports: chosen, probe: probe,
		args: map[string][]string{}, running: map[string]*process{}, deaths: make(chan *process),
	}
	if !o.noControllerManager && tools.own && !tools.has(controllerManager) {
		progress("%s has no %s: going without it", tools.dir, controllerManager) // envtest's directories have none
		o.noControllerManager = true
	}
	sup.add(etcd, etcdArgs(s, chosen))
	sup.add(apiserver, apiserverArgs(s, chosen, o))
	if !o.noControllerManager {
		sup.add(controllerManager, controllerManagerArgs(s))
	}
	if o.scheduler {
		sup.add(scheduler, schedulerArgs(s))
	}
	if o.kwok {
		args, err := kwokArgs(s, chosen, tools)
		if err != nil {
			return nil, err
		}
		sup.add(kwok, args)
	}
	return sup, nil
}

// add makes a server part of this control plane, and forgets its log of an earlier run.
func (sup *supervisor) add(server string, args []string) {
	sup.args[server] = args
	sup.order = append(sup.order, server)
	_ = os.Remove(sup.log(server))
}

// serve answers commands until the context ends or a server dies.
func (sup *supervisor) serve(ctx context.Context, commands <-chan string, out io.Writer) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case dead := <-sup.deaths:
			if err := sup.mourn(dead); err != nil {
				return err
			}
		case line := <-commands:
			err := sup.obey(ctx, line)
			if err == nil {
				fmt.Fprintln(out, "ok")
				continue
			}
			fmt.Fprintln(out, "error:", strings.ReplaceAll(err.Error(), "\n", " | "))
			if errors.As(err, new(*deathError)) {
				return err
			}
		}
	}
}

// obey carries out one line of input.
func (sup *supervisor) obey(ctx context.Context, line string) error {
	words := strings.Fields(line)
	if len(words) != 2 {
		return fmt.Errorf("expected stop, kill or start and a server, got %q", line)
	}
	verb, server := words[0], words[1]
	if !slices.Contains(sup.order, server) {
		return fmt.Errorf("no server %q here; there are: %s", server, strings.Join(sup.order, ", "))
	}
	switch p := sup.running[server]; {
	case verb == "start" && p != nil:
		return fmt.Errorf("%s runs already", server)
	case verb == "start":
		return sup.start(ctx, server)
	case verb != "stop" && verb != "kill":
		return fmt.Errorf("unknown command %q", verb)
	case p == nil:
		return fmt.Errorf("%s does not run", server)
	case verb == "stop":
		sup.end(commandGrace, p)
	default:
		sup.end(0, p)
	}
	return nil
}

// start launches a server and waits until it serves.
func (sup *supervisor) start(ctx context.Context, server string) error {
	p, err := sup.launch(server)
	if err != nil {
		return err
	}
	isReady := sup.readiness(server)
	for deadline := time.Now().Add(readyTimeout); !isReady(ctx); {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case dead := <-sup.deaths:
			if err := sup.mourn(dead); err != nil {
				return err
			}
		case <-time.After(probeEvery):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is not ready after %s; its log says last:\n%s", server, readyTimeout, tail(sup.log(p.server), 20))
		}
	}
	return nil
}

// readiness of the two servers that others depend on. The rest retry until
// these answer, and what they do shows in the API.
func (sup *supervisor) readiness(server string) func(context.Context) bool {
	switch server {
	case etcd:
		return func(ctx context.Context) bool {
			return isOK(ctx, http.DefaultClient, fmt.Sprintf("http://127.0.0.1:%d/health", sup.ports.etcd))
		}
	case apiserver:
		return sup.probe.isReady
	}
	return func(context.Context) bool { return true }
}

func (sup *supervisor) log(server string) string { return sup.state.path("log", server+".log") }

// launch starts a server's process. It must run on the main thread.
func (sup *supervisor) launch(server string) (*process, error) {
	path, err := sup.tools.path(server)
	if err != nil {
		return nil, err
	}
	log, err := os.OpenFile(sup.log(server), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the server has its own copy
	cmd := exec.Command(path, sup.args[server]...)
	cmd.Dir = sup.state.dir
	cmd.Stdout, cmd.Stderr = log, log
	// A process group of its own: Ctrl-C in a terminal reaches the supervisor
	// only, which then stops the servers. If even the supervisor is killed, the
	// kernel kills them.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", server, err)
	}
	p := &process{server: server, cmd: cmd, done: make(chan struct{})}
	sup.running[server] = p
	go func() {
		_ = cmd.Wait() // how it ended is in cmd.ProcessState
		close(p.done)
		sup.deaths <- p // may wait: nobody needs this goroutine
	}()
	return p, sup.state.writePid(server, cmd.Process.Pid)
}

// deathError: a server ended that should not have; the control plane is of no use any more.
type deathError struct{ server, how, lastWords string }

func (e *deathError) Error() string {
	return fmt.Sprintf("%s ended by itself (%s); its log says last:\n%s", e.server, e.how, e.lastWords)
}

// mourn is a deathError unless we ended the process ourselves.
func (sup *supervisor) mourn(dead *process) error {
	if dead.wanted {
		return nil
	}
	sup.forget(dead)
	return &deathError{dead.server, dead.cmd.ProcessState.String(), tail(sup.log(dead.server), 20)}
}

func (sup *supervisor) forget(p *process) {
	delete(sup.running, p.server)
	sup.state.forgetPid(p.server)
}

// end stops processes at the same time: SIGTERM, and SIGKILL when the grace is over. No grace: SIGKILL.
func (sup *supervisor) end(grace time.Duration, processes ...*process) {
	for _, p := range processes {
		p.wanted = true
		if grace > 0 {
			_ = p.cmd.Process.Signal(syscall.SIGTERM)
		}
	}
	deadline := time.After(grace)
	for _, p := range processes {
		select {
		case <-p.done:
		case <-deadline:
			for _, late := range processes {
				_ = late.cmd.Process.Kill() // one that has ended is not signalled
			}
			<-p.done
		}
		sup.forget(p)
	}
}

// shutdown stops what runs: etcd last, or the API server would wait for it in vain.
func (sup *supervisor) shutdown() {
	var first, last []*process
	for server, p := range sup.running {
		if server == etcd {
			last = append(last, p)
		} else {
			first = append(first, p)
		}
	}
	sup.end(shutdownGrace, first...)
	sup.end(shutdownGrace, last...)
	sup.state.forgetPid("supervisor")
}
