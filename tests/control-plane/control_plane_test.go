package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestPortsOfOneControlPlaneDifferAndAreOutsideTheEphemeralRange(t *testing.T) {
	picker := newPortPicker()
	seen := map[int]bool{}
	for range 50 {
		port, err := picker.pick(0)
		if err != nil {
			t.Fatal(err)
		}
		if seen[port] || port < picker.first || port > picker.last {
			t.Errorf("port %d", port)
		}
		seen[port] = true
	}
}

func TestASavedPortIsUsedAgainWhileItIsFree(t *testing.T) {
	first, err := choosePorts(0)
	if err != nil {
		t.Fatal(err)
	}
	again, err := choosePorts(first.apiserver)
	if err != nil || again.apiserver != first.apiserver {
		t.Errorf("%d, then %d, %v", first.apiserver, again.apiserver, err)
	}
}

func TestTheLockSaysWhetherAStateIsSupervised(t *testing.T) {
	s := state{t.TempDir()}
	if s.isSupervised() {
		t.Error("an empty directory is supervised")
	}
	lock, err := s.lock()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.lock(); !errors.Is(err, errInUse) || !s.isSupervised() {
		t.Errorf("a second lock: %v", err)
	}
	lock.Close()
	if s.isSupervised() {
		t.Error("still supervised after its end")
	}
}

func TestDownDoesNotStopAnotherProgram(t *testing.T) {
	s := state{t.TempDir()}
	if err := s.create(); err != nil {
		t.Fatal(err)
	}
	if err := s.writePid("supervisor", os.Getpid()); err != nil { // this test is no supervisor
		t.Fatal(err)
	}
	if pid, err := s.supervisorPid(); err == nil {
		t.Errorf("would stop %d", pid)
	}
	for command, want := range map[string]bool{
		"/cache/program-1/control-plane\x00run\x00--detached\x00/state\x00": true,
		"/cache/program-1/control-plane\x00build\x00":                       false,
		"vi\x00control-plane\x00run\x00":                                    false,
		"":                                                                  false,
	} {
		if isSupervisor([]byte(command)) != want {
			t.Errorf("%q", command)
		}
	}
}

func TestPurgeKeepsWhatIsNotOurs(t *testing.T) {
	s := state{t.TempDir()}
	if err := s.create(); err != nil {
		t.Fatal(err)
	}
	theirs := s.path("thesis.tex")
	if err := os.WriteFile(theirs, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.purge(); err != nil {
		t.Fatal(err)
	}
	left, _ := filepath.Glob(s.path("*"))
	if !slices.Equal(left, []string{theirs}) {
		t.Errorf("left: %q", left)
	}
}

func TestEveryToolIsPinned(t *testing.T) {
	for _, module := range []string{
		"k8s.io/kubernetes", "go.etcd.io/etcd/server/v3", "sigs.k8s.io/kwok",
		"github.com/nats-io/nats-server/v2", "github.com/google/go-containerregistry",
	} {
		if version := pinned(module); !strings.HasPrefix(version, "v") {
			t.Errorf("%s: %q", module, version)
		}
	}
	if stamp := versionStamp(); !strings.Contains(stamp, "client-go/pkg/version.gitVersion="+pinned("k8s.io/kubernetes")) {
		t.Error(stamp)
	}
}

func TestABuildsOutputIsCondensedToItsErrors(t *testing.T) {
	output := "go: downloading k8s.io/api v0.36.3\ninternal/abi\nk8s.io/api/core/v1\n# k8s.io/api\nx.go:1:2: syntax error\n"
	fetched, compiled, said := watchBuild(strings.NewReader(output), time.Hour)
	if fetched != 1 || compiled != 2 || len(said) != 2 {
		t.Errorf("%d fetched, %d compiled, %q", fetched, compiled, said)
	}
}

func TestOptionsMayStandAnywhere(t *testing.T) {
	o, err := parseOptions([]string{"--kwok", "dir", "--apiserver-flag=--v=4", "--scheduler"})
	if err != nil || o.stateDir != "dir" || !o.kwok || !o.scheduler || !slices.Equal(o.apiserverFlags, []string{"--v=4"}) {
		t.Errorf("%+v, %v", o, err)
	}
	for _, wrong := range [][]string{{}, {"a", "b"}, {"a", "--typo"}} {
		if _, err := parseOptions(wrong); err == nil {
			t.Errorf("%q is accepted", wrong)
		}
	}
}

func TestTheLifelineEndsWithItsInput(t *testing.T) {
	in, user := io.Pipe()
	ctx, commands := lifeline(t.Context(), in)
	go func() { _, _ = io.WriteString(user, "stop etcd\n"); user.Close() }()
	if line := <-commands; line != "stop etcd" {
		t.Errorf("%q", line)
	}
	<-ctx.Done()
}

func TestTailReturnsTheLastLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("a\nb\nc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := tail(path, 2); got != "b\nc" {
		t.Errorf("%q", got)
	}
}
