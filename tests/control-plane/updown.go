package main

// A supervisor in the background: starting one, finding it again, stopping it.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// up starts a supervisor in a session of its own unless one is there, and prints the kubeconfig's path.
func up(ctx context.Context, o options, args []string) error {
	s, err := openState(o.stateDir)
	if err != nil {
		return err
	}
	for range 2 { // the second time if the one that we found was about to stop
		if !s.isSupervised() {
			if err := detach(ctx, s, args); err != nil && !s.isSupervised() {
				return err // unless somebody else was faster: then theirs is as good
			}
		}
		if err = s.waitReady(ctx); !errors.Is(err, errStopped) {
			break
		}
	}
	if err == nil {
		fmt.Println(s.kubeconfig())
	}
	return err
}

// detach starts the supervisor and returns when it has said that it is ready, or died.
func detach(ctx context.Context, s state, args []string) error {
	if _, err := findTools(ctx); err != nil { // here, where its progress is seen
		return err
	}
	if err := os.MkdirAll(s.path("log"), 0o700); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(s.path("log", "supervisor.log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	ready, tellsReady, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	cmd := exec.Command(self, append([]string{"run", "--detached"}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{tellsReady} // becomes readyDescriptor
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	tellsReady.Close() // the supervisor has the only copy now: its death ends the pipe
	if err != nil {
		return err
	}
	interrupted := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
	defer interrupted()
	said, err := io.ReadAll(ready)
	if err == nil && string(said) == readyWord {
		return nil
	}
	_ = cmd.Wait()
	return fmt.Errorf("the control plane did not start:\n%s", tail(log.Name(), 25))
}

const (
	readyWord       = "ready"
	readyDescriptor = 3
)

// tellReady is the other end of detach.
func tellReady() {
	pipe := os.NewFile(readyDescriptor, "ready")
	_, _ = pipe.WriteString(readyWord) // nobody may listen any more
	_ = pipe.Close()
}

var errStopped = errors.New("stopped")

// waitReady waits for somebody else's supervisor.
func (s state) waitReady(ctx context.Context) error {
	for deadline := time.Now().Add(readyTimeout); s.isSupervised(); {
		// The port and the certificates appear early in a supervisor's life, but not at once.
		if probe, err := s.newProbe(s.savedPort()); err == nil && probe.isReady(ctx) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the control plane in %s is not ready after %s", s.dir, readyTimeout)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(probeEvery):
		}
	}
	return fmt.Errorf("the control plane in %s %w:\n%s", s.dir, errStopped, tail(s.path("log", "supervisor.log"), 25))
}

// down stops the directory's supervisor, which stops the servers.
func down(ctx context.Context, o options) error {
	s, err := openState(o.stateDir)
	if err != nil {
		return err
	}
	if s.isSupervised() {
		if err := s.stopSupervisor(ctx); err != nil {
			return err
		}
	}
	if o.purge {
		return s.purge()
	}
	return nil
}

// stopSupervisor asks it to stop, kills it if it does not, and waits until the lock says that it is gone.
func (s state) stopSupervisor(ctx context.Context) error {
	pid, err := s.supervisorPid()
	if err != nil {
		return fmt.Errorf("%s is in use, but not by a control plane that can be found: %w", s.dir, err)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return err
	}
	killAt := time.Now().Add(2 * shutdownGrace)
	for s.isSupervised() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(probeEvery):
		}
		if again, err := s.supervisorPid(); err == nil && again == pid && time.Now().After(killAt) {
			_ = syscall.Kill(pid, syscall.SIGKILL) // the kernel then kills its servers
		}
	}
	return nil
}

// purge removes what this program made and nothing else: the directory may have been a wrong one.
func (s state) purge() error {
	var failed []error
	for _, name := range strings.Fields("admin.kubeconfig kube-controller-manager.kubeconfig kube-scheduler.kubeconfig audit-policy.yaml port lock log pids pki etcd") {
		failed = append(failed, os.RemoveAll(s.path(name)))
	}
	if err := os.Remove(s.dir); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}
