package main

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fakeServer makes a supervisor of one "kube-scheduler", a server without a
// readiness check, that runs the given shell script.
func fakeServer(t *testing.T, script string) *supervisor {
	t.Helper()
	runtime.LockOSThread() // servers die with the thread that started them
	bin, s := t.TempDir(), state{t.TempDir()}
	if err := os.WriteFile(filepath.Join(bin, scheduler), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"log", "pids"} {
		if err := os.Mkdir(s.path(dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	sup := &supervisor{
		state: s, tools: toolDir{dir: bin}, order: []string{scheduler}, args: map[string][]string{},
		running: map[string]*process{}, deaths: make(chan *process),
	}
	t.Cleanup(sup.shutdown)
	return sup
}

func (sup *supervisor) mustObey(t *testing.T, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if err := sup.obey(t.Context(), line); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
	}
}

func TestAServerCanBeStoppedKilledAndStartedAgain(t *testing.T) {
	sup := fakeServer(t, "exec sleep 600")
	sup.mustObey(t, "start kube-scheduler", "stop kube-scheduler", "start kube-scheduler", "kill kube-scheduler", "start kube-scheduler")
	for _, wrong := range []string{"start kube-scheduler", "stop etcd", "bless kube-scheduler", "stop", ""} {
		if err := sup.obey(t.Context(), wrong); err == nil || errors.As(err, new(*deathError)) {
			t.Errorf("%q: %v", wrong, err)
		}
	}
}

func TestAServerThatIgnoresSIGTERMIsKilled(t *testing.T) {
	sup := fakeServer(t, "trap '' TERM; echo trapped; while :; do sleep 1; done")
	sup.mustObey(t, "start kube-scheduler")
	for !strings.Contains(tail(sup.log(scheduler), 1), "trapped") {
		time.Sleep(time.Millisecond)
	}
	p := sup.running[scheduler]
	sup.end(50*time.Millisecond, p)
	if status := p.cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGKILL {
		t.Errorf("ended by %s", p.cmd.ProcessState)
	}
}

func TestADeathNobodyWantedEndsTheSupervisorWithTheServersLastWords(t *testing.T) {
	sup := fakeServer(t, "echo no space left >&2; exit 3")
	if _, err := sup.launch(scheduler); err != nil {
		t.Fatal(err)
	}
	err := sup.serve(t.Context(), nil, nil)
	var death *deathError
	if !errors.As(err, &death) || death.how != "exit status 3" || death.lastWords != "no space left" {
		t.Errorf("%v", err)
	}
}
