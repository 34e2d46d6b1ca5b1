package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
)

func readCert(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func newPKI(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pki")
	if err := makePKI(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func verify(cert, ca *x509.Certificate, usage x509.ExtKeyUsage, name string) error {
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	_, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}, DNSName: name})
	return err
}

func TestTheServerCertificateIsGoodForEveryNameThatClientsUse(t *testing.T) {
	dir := newPKI(t)
	ca, cert := readCert(t, dir+"/ca.crt"), readCert(t, dir+"/apiserver.crt")
	for _, name := range []string{"127.0.0.1", "localhost", "kubernetes.default.svc", "10.96.0.1"} {
		if err := verify(cert, ca, x509.ExtKeyUsageServerAuth, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestOnlyTheAdminIsAMaster(t *testing.T) {
	dir := newPKI(t)
	ca := readCert(t, dir+"/ca.crt")
	for _, name := range []string{"admin", "kube-controller-manager", "kube-scheduler"} {
		cert := readCert(t, filepath.Join(dir, name+".crt"))
		if err := verify(cert, ca, x509.ExtKeyUsageClientAuth, ""); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		isMaster := len(cert.Subject.Organization) == 1 && cert.Subject.Organization[0] == "system:masters"
		if isMaster != (name == "admin") {
			t.Errorf("%s has groups %q", name, cert.Subject.Organization)
		}
	}
}

func TestAFrontProxyCertificateIsNoClusterClient(t *testing.T) {
	dir := newPKI(t)
	cert := readCert(t, dir+"/front-proxy.crt")
	if err := verify(cert, readCert(t, dir+"/front-proxy-ca.crt"), x509.ExtKeyUsageClientAuth, ""); err != nil {
		t.Error(err)
	}
	if err := verify(cert, readCert(t, dir+"/ca.crt"), x509.ExtKeyUsageClientAuth, ""); err == nil {
		t.Error("the cluster's CA accepts it")
	}
}

func TestAnExistingPKIIsKept(t *testing.T) {
	dir := newPKI(t)
	before := readCert(t, dir+"/ca.crt")
	if err := makePKI(dir); err != nil {
		t.Fatal(err)
	}
	if !before.Equal(readCert(t, dir+"/ca.crt")) {
		t.Error("a second start made a new CA, which running clients do not trust")
	}
}

func TestKeysAreReadableByTheirOwnerOnly(t *testing.T) {
	dir := newPKI(t)
	keys, _ := filepath.Glob(dir + "/*.key")
	if len(keys) != 8 {
		t.Errorf("%d keys: %q", len(keys), keys)
	}
	for _, path := range append(keys, dir) {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	if _, err := tls.LoadX509KeyPair(dir+"/admin.crt", dir+"/admin.key"); err != nil {
		t.Error(err)
	}
}
