package main

// Where the servers' binaries come from: a directory of the user's own
// (KUBEBUILDER_ASSETS), or built from the pinned modules into the user's cache.

import (
	"bufio"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// The pins travel inside the program: it builds the same tools wherever it runs,
// and they are the key of the cache.
var (
	//go:embed go.mod
	goMod string
	//go:embed go.sum
	goSum string
)

// buildRecipe is part of the cache's key: raise it when the flags below change what is built.
const buildRecipe = "1"

// built are the binaries that `go build tool` leaves, after etcd got its name back.
var built = []string{
	"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler",
	"kubectl", "kwok", "nats-server", "crane",
}

// toolDir is a directory of binaries.
type toolDir struct {
	dir string
	// own is true for KUBEBUILDER_ASSETS, which may lack some tools.
	own bool
}

func (t toolDir) has(name string) bool {
	info, err := os.Stat(filepath.Join(t.dir, name))
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

func (t toolDir) path(name string) (string, error) {
	if t.has(name) {
		return filepath.Join(t.dir, name), nil
	}
	if t.own {
		return "", fmt.Errorf("KUBEBUILDER_ASSETS=%s has no %s: unset it, and the pinned one is built", t.dir, name)
	}
	return "", fmt.Errorf("no tool is called %s; there are: %s", name, strings.Join(built, ", "))
}

// findTools returns the directory with the binaries, building them first if need be.
func findTools(ctx context.Context) (toolDir, error) {
	if dir := os.Getenv("KUBEBUILDER_ASSETS"); dir != "" {
		dir, err := filepath.Abs(dir)
		tools := toolDir{dir: dir, own: true}
		for _, name := range []string{"etcd", "kube-apiserver", "kubectl"} {
			if _, missing := tools.path(name); err == nil {
				err = missing
			}
		}
		return tools, err
	}
	root, err := cacheRoot()
	if err != nil {
		return toolDir{}, err
	}
	tools := toolDir{dir: filepath.Join(root, cacheKey())}
	if isComplete(tools.dir) {
		return tools, nil
	}
	return tools, buildLocked(ctx, root, tools.dir)
}

func cacheRoot() (string, error) {
	cache, err := os.UserCacheDir() // XDG_CACHE_HOME, or .cache in HOME
	if err != nil {
		return "", fmt.Errorf("no place for the tools: %w", err)
	}
	return filepath.Join(cache, "wasm-operator", "control-plane"), nil
}

func cacheKey() string {
	sum := sha256.Sum256([]byte(strings.Join([]string{buildRecipe, runtime.GOARCH, goMod, goSum}, "\x00")))
	return hex.EncodeToString(sum[:])[:16]
}

// isComplete needs no look inside: directories get their final name only when everything is in them.
func isComplete(dir string) bool {
	_, err := os.Stat(dir)
	return err == nil
}

// buildLocked builds the tools unless somebody else did so while we waited for the lock.
func buildLocked(ctx context.Context, root, dir string) error {
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(root, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close() // closing releases it
	if syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		progress("waiting for another build of the control plane")
		if err := flockUntil(ctx, lock); err != nil {
			return err
		}
	}
	if isComplete(dir) {
		return nil
	}
	// We hold the lock, so what an interrupted build left is nobody's.
	leftovers, _ := filepath.Glob(filepath.Join(root, "*.building"))
	for _, left := range leftovers {
		_ = os.RemoveAll(left)
	}
	staging := dir + ".building"
	defer os.RemoveAll(staging)
	started := time.Now()
	progress("building Kubernetes %s, etcd %s and tools from Go modules (about 5 minutes on 2 cores, the first time)",
		strings.TrimPrefix(pinned("k8s.io/kubernetes"), "v"), strings.TrimPrefix(pinned("go.etcd.io/etcd/server/v3"), "v"))
	if err := buildTools(ctx, staging); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(staging, "bin"), dir); err != nil {
		return err
	}
	progress("built in %s: %s", time.Since(started).Round(time.Second), dir)
	return nil
}

// flockUntil waits for the lock, but not longer than the context lives.
func flockUntil(ctx context.Context, lock *os.File) error {
	for syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
	return nil
}

// pinned returns a module's version in go.mod.
func pinned(module string) string {
	for line := range strings.Lines(goMod) {
		if words := strings.Fields(line); len(words) >= 2 && words[0] == module {
			return words[1]
		}
	}
	return ""
}

// buildTools leaves the binaries in staging/bin.
func buildTools(ctx context.Context, staging string) error {
	source, bin, temp := filepath.Join(staging, "src"), filepath.Join(staging, "bin"), filepath.Join(staging, "tmp")
	for _, dir := range []string{source, bin, temp} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{"go.mod": goMod, "go.sum": goSum} {
		if err := os.WriteFile(filepath.Join(source, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	build := goCommand(ctx, source, temp, "build", "-buildvcs=false", "-mod=readonly", "-v", "-ldflags", "-s -w"+versionStamp(), "-o", bin+"/", "tool")
	if err := runBuild(build); err != nil {
		return err
	}
	// go.etcd.io/etcd/server/v3 is named after its last folder.
	if err := os.Rename(filepath.Join(bin, "server"), filepath.Join(bin, "etcd")); err != nil {
		return err
	}
	out, err := goCommand(ctx, source, temp, "list", "-mod=readonly", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok").Output()
	if err != nil {
		return fmt.Errorf("finding kwok's stages: %w", err)
	}
	return copyKwokStages(strings.TrimSpace(string(out)), filepath.Join(bin, kwokStages))
}

// goCommand runs the user's go on the pinned modules, and on nothing else of theirs.
func goCommand(ctx context.Context, dir, temp string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	// Without cgo the binaries are static and need no C compiler.
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOTMPDIR="+temp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	return cmd
}

// versionStamp: clients parse the API server's version, and Kubernetes gets its
// version from the linker; without it kube-apiserver says v0.0.0-master.
func versionStamp() string {
	version := pinned("k8s.io/kubernetes")
	major, minor, _ := strings.Cut(strings.TrimPrefix(version, "v"), ".")
	minor, _, _ = strings.Cut(minor, ".")
	var flags strings.Builder
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		fmt.Fprintf(&flags, " -X %[1]s.gitVersion=%[2]s -X %[1]s.gitMajor=%[3]s -X %[1]s.gitMinor=%[4]s", pkg, version, major, minor)
	}
	return flags.String()
}

// runBuild runs a verbose go build, condenses its output to a line now and
// then, and shows what else it said if it fails.
func runBuild(build *exec.Cmd) error {
	output, err := build.StderrPipe()
	if err != nil {
		return err
	}
	if err := build.Start(); errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("Go is missing: install Go %s or later", pinned("go"))
	} else if err != nil {
		return err
	}
	fetched, compiled, said := watchBuild(output, 20*time.Second)
	if err := build.Wait(); err != nil {
		return fmt.Errorf("building the control plane failed after %d modules and %d packages: %w\n%s",
			fetched, compiled, err, strings.Join(said, "\n"))
	}
	return nil
}

// watchBuild reads go build -v to its end. It returns how many modules were
// fetched, how many packages compiled, and the last lines that say something else.
func watchBuild(output io.Reader, every time.Duration) (fetched, compiled int, said []string) {
	started, last := time.Now(), time.Now()
	for lines := bufio.NewScanner(output); lines.Scan(); {
		line := lines.Text()
		switch {
		case strings.HasPrefix(line, "go: downloading "):
			fetched++
		case !strings.ContainsAny(line, " \t:"): // an import path
			compiled++
		default:
			said = append(said, line)
			said = said[max(0, len(said)-20):]
		}
		if time.Since(last) >= every {
			last = time.Now()
			progress("  %s: %d modules fetched, %d packages compiled", time.Since(started).Round(time.Second), fetched, compiled)
		}
	}
	return fetched, compiled, said
}

// kwokStages is the folder beside kwok's binary with the rules by which it plays kubelet.
const kwokStages = "kwok-stages"

func copyKwokStages(module, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	stages := filepath.Join(module, "kustomize", "stage")
	for _, pattern := range []string{"node/fast/node-initialize.yaml", "pod/fast/pod-*.yaml"} {
		files, err := filepath.Glob(filepath.Join(stages, pattern))
		if err == nil && len(files) == 0 {
			err = fmt.Errorf("kwok has no %s: %w", pattern, fs.ErrNotExist)
		}
		if err != nil {
			return err
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(to, filepath.Base(file)), text, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}
