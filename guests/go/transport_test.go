package support

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
)

func request(t *testing.T, method, url, body string) *http.Request {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	return req
}

func TestRequestsAreWrittenAsTheParentReadsThem(t *testing.T) {
	req := request(t, "PATCH", "https://kubernetes.default:443/api/v1/x?a=b%20c&d", "{}\n\n{}")
	req.Header.Set("content-type", "application/json")
	message, err := encode(req)
	want := "PATCH /api/v1/x?a=b%20c&d\nContent-Type: application/json\n\n{}\n\n{}"
	if string(message) != want || err != nil {
		t.Errorf("%q, %v", message, err)
	}
	req = request(t, "", "http://kubernetes.default", "")
	if message, err := encode(req); string(message) != "GET /\n\n" || err != nil {
		t.Errorf("%q, %v", message, err)
	}
}

func TestHeadersCannotBeSmuggled(t *testing.T) {
	for name, value := range map[string]string{"X": "a\nauthorization: b", "X\r\nY": "a", "X: y": "a"} {
		req := request(t, "GET", "http://kubernetes.default", "")
		req.Header[name] = []string{value}
		if message, err := encode(req); err == nil {
			t.Errorf("%q", message)
		}
	}
}

type failing struct{ closed bool }

func (*failing) Read([]byte) (int, error) { return 0, errors.New("no more") }
func (f *failing) Close() error           { f.closed = true; return nil }

func TestABodyThatFailsFailsItsRequest(t *testing.T) {
	req := request(t, "POST", "http://kubernetes.default", "")
	body := &failing{}
	req.Body = body
	if _, err := encode(req); err == nil || !body.closed {
		t.Errorf("%v, closed %v", err, body.closed)
	}
}

func TestWhoServesAHost(t *testing.T) {
	all := running(newFake())
	for url, served := range map[string]string{
		"http://localhost:8080/metrics":               "here",
		"http://127.0.0.1/":                           "here",
		"https://[::1]:6443/":                         "here",
		"https://0.0.0.0:9443/":                       "here",
		"https://kubernetes.default.evil.example/":    "nobody",
		"https://kubernetes.default.svcx/":            "nobody",
		"https://example.com/":                        "nobody",
		"http://169.254.169.254/latest/meta-data/":    "nobody",
		"https://kubernetes.default.svc/api":          "parent",
		"https://kubernetes.default.svc.other.zone./": "parent",
	} {
		req := request(t, "GET", url, "")
		if served == "parent" {
			if !isAPIServer(req.URL.Hostname()) {
				t.Errorf("%s is not the API server", url)
			}
			continue
		}
		_, ok, err := all.roundTrip(req)
		if ok != (served == "nobody") {
			t.Errorf("%s: served %v", url, ok)
		}
		var operation *net.OpError
		if ok && (!errors.As(err, &operation) || !errors.Is(err, syscall.EHOSTUNREACH)) {
			t.Errorf("%s: %v", url, err)
		}
	}
}

func TestHeadRequestsHaveNoBody(t *testing.T) {
	p := newFake()
	all := running(p)
	go func() {
		<-p.messages
		all.deliver(1, kindHead, []byte("200\ncontent-length: 9\n"))
	}()
	resp, ok, err := all.roundTrip(request(t, "HEAD", "http://kubernetes.default/", ""))
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	if text, err := io.ReadAll(resp.Body); len(text) != 0 || err != nil || resp.ContentLength != 9 {
		t.Errorf("%q, %v, %d", text, err, resp.ContentLength)
	}
}
