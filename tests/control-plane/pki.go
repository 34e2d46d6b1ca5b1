package main

// Certificates, keys and kubeconfigs of one control plane.

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// validity of everything: state directories are throw-away, but some are kept for long.
const validity = 10 * 365 * 24 * time.Hour

// authority is a CA that signs leaves. Keys are P-256 throughout: RSA keys take
// a tenth of a second and more each, which every test would pay for.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// makePKI fills dir with the files that the servers' flags name. It does
// nothing if dir exists: the directory gets its name when it is complete.
func makePKI(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	staging := dir + ".new"
	if err := os.RemoveAll(staging); err != nil {
		return err
	}
	if err := os.MkdirAll(staging, 0o700); err != nil {
		return err
	}
	if err := writePKI(staging); err != nil {
		return fmt.Errorf("making certificates: %w", err)
	}
	return os.Rename(staging, dir)
}

func writePKI(dir string) error {
	cluster, err := newAuthority(dir, "ca", "local-kube-ca")
	if err != nil {
		return err
	}
	// The aggregation layer's clients must not be mistaken for the cluster's own.
	frontProxy, err := newAuthority(dir, "front-proxy-ca", "local-front-proxy-ca")
	if err != nil {
		return err
	}
	server := &x509.Certificate{
		Subject:     pkix.Name{CommonName: "kube-apiserver"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv4(10, 96, 0, 1)},
	}
	leaves := []struct {
		name   string
		signer *authority
		leaf   *x509.Certificate
	}{
		{"apiserver", cluster, server},
		{"admin", cluster, client("admin", "system:masters")},
		{"kube-controller-manager", cluster, client("system:kube-controller-manager")},
		{"kube-scheduler", cluster, client("system:kube-scheduler")},
		{"front-proxy", frontProxy, client("front-proxy-client")},
	}
	for _, l := range leaves {
		if err := l.signer.issue(dir, l.name, l.leaf); err != nil {
			return err
		}
	}
	return writeTokenKeys(dir)
}

func client(user string, groups ...string) *x509.Certificate {
	return &x509.Certificate{
		Subject:     pkix.Name{CommonName: user, Organization: groups},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
}

func newAuthority(dir, name, commonName string) (*authority, error) {
	ca := &authority{cert: &x509.Certificate{
		Subject:               pkix.Name{CommonName: commonName},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
	}}
	return ca, ca.issue(dir, name, ca.cert)
}

// issue signs leaf and writes NAME.crt and NAME.key. An authority without a key signs itself.
func (ca *authority) issue(dir, name string, leaf *x509.Certificate) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	signer := ca.key
	if signer == nil {
		ca.key, signer = key, key
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	leaf.SerialNumber = serial
	leaf.NotBefore = time.Now().Add(-time.Hour) // a clock that is set back a little does no harm
	leaf.NotAfter = time.Now().Add(validity)
	if leaf.KeyUsage == 0 {
		leaf.KeyUsage = x509.KeyUsageDigitalSignature
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca.cert, key.Public(), signer)
	if err != nil {
		return err
	}
	if ca.cert.Raw == nil { // self-signed: leaves need the authority's key id, which signing made
		if ca.cert, err = x509.ParseCertificate(der); err != nil {
			return err
		}
	}
	if err := writePEM(filepath.Join(dir, name+".crt"), "CERTIFICATE", der); err != nil {
		return err
	}
	return writeKey(filepath.Join(dir, name+".key"), key)
}

// writeTokenKeys makes the pair that signs and checks ServiceAccount tokens.
func writeTokenKeys(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	if err := writePEM(filepath.Join(dir, "sa.pub"), "PUBLIC KEY", public); err != nil {
		return err
	}
	return writeKey(filepath.Join(dir, "sa.key"), key)
}

// writeKey uses PKCS #8, which every TLS library reads.
func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

// writeKubeconfig writes a self-contained kubeconfig for one of the PKI's clients.
func writeKubeconfig(path, pki, user, server string) error {
	var text bytes.Buffer
	encoded := map[string]string{}
	for _, name := range []string{"ca.crt", user + ".crt", user + ".key"} {
		data, err := os.ReadFile(filepath.Join(pki, name))
		if err != nil {
			return err
		}
		encoded[name] = base64.StdEncoding.EncodeToString(data)
	}
	fmt.Fprintf(&text, `apiVersion: v1
kind: Config
current-context: wasm-operator
contexts:
- name: wasm-operator
  context: {cluster: wasm-operator, user: %[1]s, namespace: default}
clusters:
- name: wasm-operator
  cluster: {server: %[2]q, certificate-authority-data: %[3]s}
users:
- name: %[1]s
  user: {client-certificate-data: %[4]s, client-key-data: %[5]s}
`, user, server, encoded["ca.crt"], encoded[user+".crt"], encoded[user+".key"])
	// Renamed into place: a client may be reading the one of an earlier run.
	if err := os.WriteFile(path+".new", text.Bytes(), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// adminTLS lets this program ask the API server whether it is ready.
func adminTLS(pki string) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(pki, "admin.crt"), filepath.Join(pki, "admin.key"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(filepath.Join(pki, "ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}, nil
}
