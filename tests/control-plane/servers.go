package main

// The servers of a control plane and their flags.

import (
	"fmt"
	"os"
	"path/filepath"
)

// Names of the servers: of their binaries, logs and pid files, and in commands.
const (
	etcd              = "etcd"
	apiserver         = "kube-apiserver"
	controllerManager = "kube-controller-manager"
	scheduler         = "kube-scheduler"
	kwok              = "kwok"
)

// ports of one control plane, all on loopback.
type ports struct{ etcd, etcdPeer, apiserver, kwok int }

func choosePorts(saved int) (ports, error) {
	var chosen ports
	picker := newPortPicker()
	for _, p := range []struct {
		port      *int
		preferred int
	}{{&chosen.apiserver, saved}, {&chosen.etcd, 0}, {&chosen.etcdPeer, 0}, {&chosen.kwok, 0}} {
		port, err := picker.pick(p.preferred)
		if err != nil {
			return ports{}, err
		}
		*p.port = port
	}
	return chosen, nil
}

func (p ports) apiserverURL() string { return fmt.Sprintf("https://127.0.0.1:%d", p.apiserver) }

func etcdArgs(s state, p ports) []string {
	client := fmt.Sprintf("http://127.0.0.1:%d", p.etcd)
	peer := fmt.Sprintf("http://127.0.0.1:%d", p.etcdPeer)
	return []string{
		"--name=local", "--data-dir=" + s.path("etcd"), "--log-level=warn",
		"--listen-client-urls=" + client, "--advertise-client-urls=" + client,
		"--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer, "--initial-cluster=local=" + peer,
		// Alone it wins every election, and need not wait a second before it holds one.
		"--heartbeat-interval=10", "--election-timeout=100",
		// The data need to outlive the process, not the machine.
		"--unsafe-no-fsync",
	}
}

func apiserverArgs(s state, p ports, o options) []string {
	pki := func(name string) string { return s.path("pki", name) }
	issuer := "https://kubernetes.default.svc.cluster.local"
	args := []string{
		fmt.Sprintf("--etcd-servers=http://127.0.0.1:%d", p.etcd),
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", p.apiserver),
		// Nobody routes to the "kubernetes" Service here; a reconciler would only reject the loopback address.
		"--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.96.0.0/16",
		"--tls-cert-file=" + pki("apiserver.crt"), "--tls-private-key-file=" + pki("apiserver.key"),
		"--client-ca-file=" + pki("ca.crt"),
		"--authorization-mode=Node,RBAC", "--allow-privileged=true", "--profiling=false",
		"--service-account-key-file=" + pki("sa.pub"), "--service-account-signing-key-file=" + pki("sa.key"),
		"--service-account-issuer=" + issuer, "--api-audiences=" + issuer,
		"--requestheader-client-ca-file=" + pki("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file=" + pki("front-proxy.crt"), "--proxy-client-key-file=" + pki("front-proxy.key"),
		// Else a stop waits a minute for watches, which do not end by themselves.
		"--shutdown-watch-termination-grace-period=200ms",
		// In the default, blocking, mode a request is in the log before its answer is out: tests can rely on it.
		"--audit-policy-file=" + s.path("audit-policy.yaml"), "--audit-log-path=" + s.path("log", "audit.log"),
	}
	if o.noControllerManager {
		// Without its token controller no namespace gets a default ServiceAccount, which pods would need.
		args = append(args, "--disable-admission-plugins=ServiceAccount")
	}
	return append(args, o.apiserverFlags...)
}

const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
`

func controllerManagerArgs(s state) []string {
	return []string{
		"--kubeconfig=" + s.path(controllerManager+".kubeconfig"), "--leader-elect=false", "--secure-port=0",
		"--use-service-account-credentials=true",
		// The default of 20 calls a second alone would keep the controllers from working for five seconds.
		"--kube-api-qps=1000", "--kube-api-burst=2000",
		// The controllers left out want nodes with networks or a cloud.
		"--controllers=*,-node-ipam-controller,-service-lb-controller,-node-route-controller,-cloud-node-lifecycle-controller",
		"--service-account-private-key-file=" + s.path("pki", "sa.key"), "--root-ca-file=" + s.path("pki", "ca.crt"),
		"--cluster-signing-cert-file=" + s.path("pki", "ca.crt"), "--cluster-signing-key-file=" + s.path("pki", "ca.key"),
	}
}

func schedulerArgs(s state) []string {
	return []string{"--kubeconfig=" + s.path(scheduler+".kubeconfig"), "--leader-elect=false", "--secure-port=0"}
}

func kwokArgs(s state, p ports, tools toolDir) ([]string, error) {
	stages, err := filepath.Glob(filepath.Join(tools.dir, kwokStages, "*.yaml"))
	if err == nil && len(stages) == 0 {
		err = fmt.Errorf("kwok needs its stages in %s", filepath.Join(tools.dir, kwokStages))
	}
	args := []string{"--kubeconfig=" + s.kubeconfig(), "--manage-all-nodes=true", fmt.Sprintf("--server-address=127.0.0.1:%d", p.kwok)}
	for _, stage := range stages {
		args = append(args, "--config="+stage)
	}
	return args, err
}

// writeServerFiles writes what the flags above name, beside the PKI.
func writeServerFiles(s state, p ports) error {
	for file, user := range map[string]string{
		"admin.kubeconfig":                "admin",
		controllerManager + ".kubeconfig": controllerManager,
		scheduler + ".kubeconfig":         scheduler,
	} {
		if err := writeKubeconfig(s.path(file), s.path("pki"), user, p.apiserverURL()); err != nil {
			return err
		}
	}
	return os.WriteFile(s.path("audit-policy.yaml"), []byte(auditPolicy), 0o600)
}
