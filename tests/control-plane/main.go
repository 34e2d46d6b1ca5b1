// control-plane runs a real Kubernetes control plane on loopback, from Go
// modules alone: etcd, kube-apiserver, kube-controller-manager and, when asked
// for, kube-scheduler and kwok. The demo, the tests and people use the same one.
//
// Room by room: tools.go builds the pinned binaries once, state.go owns the
// state directory, pki.go fills its certificates, servers.go knows each
// server's flags, supervisor.go keeps the servers running and answers commands,
// updown.go detaches a supervisor and finds it again.
//
// Only the standard library is imported, so that building this program fetches
// nothing; the tools' modules are fetched when they are built.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
)

const usage = `usage: control-plane COMMAND

  build                    build the pinned tools unless they are cached; print their directory
  path TOOL                print the path of a tool, such as kubectl or crane
  run STATE_DIR [OPTIONS]  run a control plane in the foreground; print "ready kubeconfig=PATH server=URL".
                           It stops at SIGTERM, SIGINT or the end of standard input, which takes lines:
                           stop SERVER | kill SERVER | start SERVER, each answered by "ok" or "error: ..."
  up STATE_DIR [OPTIONS]   the same in the background, unless it runs already; print the kubeconfig's path
  down STATE_DIR [--purge] stop it; with --purge remove its state too

options: --no-controller-manager   without kube-controller-manager
         --scheduler               with kube-scheduler
         --kwok                    with kwok: pods on fake nodes become Running
         --apiserver-flag=FLAG     one more flag for kube-apiserver; can be repeated

KUBEBUILDER_ASSETS=DIR takes etcd, kube-apiserver and the rest from DIR instead of building them.
`

// errUsage makes main print the usage text and exit as sysexits.h says.
var errUsage = errors.New("usage")

func init() {
	// Servers die with the thread that started them (PR_SET_PDEATHSIG is per
	// thread). The main goroutine starts them all, and this keeps it on the main
	// thread, which lives as long as the process.
	runtime.LockOSThread()
}

func main() {
	// SIGINT and SIGTERM end whatever runs; the deferred clean-up of each command does the rest.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := dispatch(ctx, os.Args[1:])
	stop()
	switch {
	case err == nil:
	case errors.Is(err, errUsage):
		fmt.Fprint(os.Stderr, usage)
		os.Exit(64)
	default:
		progress("%v", err)
		os.Exit(1)
	}
}

func dispatch(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errUsage
	}
	command, args := args[0], args[1:]
	switch {
	case command == "build" && len(args) == 0:
		tools, err := findTools(ctx)
		if err == nil {
			fmt.Println(tools.dir)
		}
		return err
	case command == "path" && len(args) == 1:
		tools, err := findTools(ctx)
		if err != nil {
			return err
		}
		path, err := tools.path(args[0])
		if err == nil {
			fmt.Println(path)
		}
		return err
	case command == "run" || command == "up" || command == "down":
		options, err := parseOptions(args)
		if err != nil {
			return err
		}
		switch command {
		case "run":
			return run(ctx, options, os.Stdin, os.Stdout)
		case "up":
			return up(ctx, options, args)
		default:
			return down(ctx, options)
		}
	case command == "help" || command == "--help" || command == "-h":
		_, err := io.WriteString(os.Stdout, usage)
		return err
	}
	return errUsage
}

// options of run, up and down.
type options struct {
	stateDir            string
	noControllerManager bool
	scheduler           bool
	kwok                bool
	apiserverFlags      []string
	purge               bool
	// detached is passed by up to its supervisor only: standard input is not a
	// lifeline, and file descriptor 3 wants the word "ready".
	detached bool
}

func parseOptions(args []string) (options, error) {
	var o options
	for _, arg := range args {
		switch {
		case arg == "--no-controller-manager":
			o.noControllerManager = true
		case arg == "--scheduler":
			o.scheduler = true
		case arg == "--kwok":
			o.kwok = true
		case arg == "--purge":
			o.purge = true
		case arg == "--detached":
			o.detached = true
		case strings.HasPrefix(arg, "--apiserver-flag="):
			o.apiserverFlags = append(o.apiserverFlags, strings.TrimPrefix(arg, "--apiserver-flag="))
		case strings.HasPrefix(arg, "-"):
			return o, fmt.Errorf("unknown option %s", arg)
		case o.stateDir == "":
			o.stateDir = arg
		default:
			return o, errUsage
		}
	}
	if o.stateDir == "" {
		return o, errUsage
	}
	return o, nil
}

// progress tells a person what is going on; standard output is for programs.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "control-plane: "+format+"\n", args...)
}
