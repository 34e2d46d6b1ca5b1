package main

// The state directory: who supervises it, which port it has, where its files are.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// state is a control plane's directory.
//
//	admin.kubeconfig   system:masters      lock   held by the supervisor while it lives
//	log/NAME.log       and log/audit.log   port   the API server's, kept over restarts
//	pids/NAME.pid      of what runs now    pki/   certificates and keys
//	etcd/              the data
type state struct{ dir string }

func openState(dir string) (state, error) {
	dir, err := filepath.Abs(dir)
	return state{dir}, err
}

func (s state) path(parts ...string) string {
	return filepath.Join(append([]string{s.dir}, parts...)...)
}

func (s state) kubeconfig() string { return s.path("admin.kubeconfig") }

// create makes what is missing. Only its owner may look in: there are keys of an administrator.
func (s state) create() error {
	for _, dir := range []string{s.dir, s.path("log"), s.path("pids"), s.path("etcd")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	return makePKI(s.path("pki"))
}

var errInUse = errors.New("is in use")

// Open-file-description locks, unlike flock, can be asked about without being
// taken: a look must not get in the way of a supervisor that starts just then.
// The numbers are Linux's; package syscall does not name them.
const (
	ofdGetLock = 36 // F_OFD_GETLK
	ofdSetLock = 37 // F_OFD_SETLK
)

// lock takes the directory until the file is closed. The kernel releases it
// when its holder dies, however it dies, so that it never lies as a pid file can.
func (s state) lock() (*os.File, error) {
	file, err := os.OpenFile(s.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.FcntlFlock(file.Fd(), ofdSetLock, &syscall.Flock_t{Type: syscall.F_WRLCK}); err != nil {
		file.Close()
		return nil, fmt.Errorf("%s %w by a running control plane; stop it by: control-plane down %s", s.dir, errInUse, s.dir)
	}
	return file, nil
}

// isSupervised says whether a supervisor holds the lock.
func (s state) isSupervised() bool {
	file, err := os.Open(s.path("lock"))
	if err != nil {
		return false
	}
	defer file.Close()
	holder := syscall.Flock_t{Type: syscall.F_RDLCK}
	err = syscall.FcntlFlock(file.Fd(), ofdGetLock, &holder)
	return err == nil && holder.Type != syscall.F_UNLCK
}

func (s state) writePid(name string, pid int) error {
	return os.WriteFile(s.path("pids", name+".pid"), fmt.Appendln(nil, pid), 0o600)
}

// forgetPid ignores errors: a stale file only costs a look at /proc.
func (s state) forgetPid(name string) { _ = os.Remove(s.path("pids", name+".pid")) }

// supervisorPid returns the recorded pid if /proc says that it still is a
// control-plane program in charge of this directory; pids are reused.
func (s state) supervisorPid() (int, error) {
	text, err := os.ReadFile(s.path("pids", "supervisor.pid"))
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, err
	}
	command, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return 0, err
	}
	if !isSupervisor(command) {
		return 0, fmt.Errorf("pid %d is another program now", pid)
	}
	return pid, nil
}

// isSupervisor looks at a /proc/PID/cmdline: words that end in NUL.
func isSupervisor(command []byte) bool {
	words := strings.Split(string(command), "\x00")
	return filepath.Base(words[0]) == "control-plane" && slices.Contains(words, "run")
}

// savedPort is the API server's port in an earlier run, or 0.
func (s state) savedPort() int {
	text, _ := os.ReadFile(s.path("port"))
	port, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return port
}

func (s state) savePort(port int) error {
	return os.WriteFile(s.path("port"), fmt.Appendln(nil, port), 0o600)
}

// probe asks the API server whether it is ready.
type probe struct {
	client *http.Client
	url    string
}

func (s state) newProbe(port int) (*probe, error) {
	config, err := adminTLS(s.path("pki"))
	if err != nil {
		return nil, err
	}
	// Each question comes on its own connection: the server may have been restarted since.
	transport := &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}
	return &probe{
		client: &http.Client{Transport: transport, Timeout: 2 * time.Second},
		url:    fmt.Sprintf("https://127.0.0.1:%d/readyz", port),
	}, nil
}

func (p *probe) isReady(ctx context.Context) bool { return isOK(ctx, p.client, p.url) }

func isOK(ctx context.Context, client *http.Client, url string) bool {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	response, err := client.Do(request)
	if err != nil {
		return false
	}
	response.Body.Close()
	return response.StatusCode == http.StatusOK
}

// tail returns the last lines of a log.
func tail(path string, lines int) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
