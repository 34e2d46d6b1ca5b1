package support

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"syscall"
)

// apiServer is the name by which the parent serves the API server to its children.
const apiServer = "kubernetes.default"

// roundTrip answers a request in place of an [http.Transport]; ok is false for those that stay in
// this program: what it serves on its own loopback.
func (all *operations) roundTrip(req *http.Request) (resp *http.Response, ok bool, err error) {
	if req.URL == nil || req.Header == nil {
		return nil, false, nil
	}
	host := req.URL.Hostname()
	if isLoopback(host) {
		return nil, false, nil
	}
	if !isAPIServer(host) {
		closeBody(req)
		reason := &unavailable{"a child operator reaches the Kubernetes API server and nothing else", syscall.EHOSTUNREACH}
		return nil, true, &net.OpError{Op: "dial", Net: "tcp", Addr: address(req.URL.Host), Err: reason}
	}
	resp, err = all.call(req)
	return resp, true, err
}

// address is a host as an error names it.
type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }

func isLoopback(host string) bool {
	if host == "localhost" || host == "" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && (ip.IsLoopback() || ip.IsUnspecified())
}

func isAPIServer(host string) bool {
	rest, found := strings.CutPrefix(strings.TrimSuffix(host, "."), apiServer)
	return found && (rest == "" || rest == ".svc" || strings.HasPrefix(rest, ".svc."))
}

func closeBody(req *http.Request) {
	if req.Body != nil {
		req.Body.Close()
	}
}

// call sends a request to the API server.
func (all *operations) call(req *http.Request) (*http.Response, error) {
	ctx := req.Context()
	if err := context.Cause(ctx); err != nil {
		closeBody(req)
		return nil, err
	}
	message, err := encode(req)
	if err != nil {
		return nil, err
	}
	o, err := all.start(message)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { o.cancel(context.Cause(ctx)) })
	head, err := o.awaitHead()
	if err != nil {
		stop()
		return nil, err
	}
	resp, err := decode(head)
	if err != nil {
		stop()
		o.cancel(err)
		return nil, err
	}
	resp.Request = req
	resp.Body = body{o, stop}
	if req.Method == http.MethodHead {
		o.cancel(io.EOF)
		stop()
		resp.Body = http.NoBody
	}
	return resp, nil
}

// encode writes a request as `kube_v1.request` takes it.
func encode(req *http.Request) ([]byte, error) {
	defer closeBody(req)
	method := req.Method
	if method == "" {
		method = http.MethodGet
	}
	var message bytes.Buffer
	fmt.Fprintf(&message, "%s %s\n", method, req.URL.RequestURI())
	for name, values := range req.Header {
		for _, value := range values {
			if strings.ContainsAny(name, "\r\n:") || strings.ContainsAny(value, "\r\n") {
				return nil, fmt.Errorf("net/http: invalid header %q", name)
			}
			fmt.Fprintf(&message, "%s: %s\n", name, value)
		}
	}
	message.WriteByte('\n')
	if req.Body != nil {
		if _, err := message.ReadFrom(req.Body); err != nil {
			return nil, err
		}
	}
	return message.Bytes(), nil
}

// decode reads the payload of a `head` event.
func decode(head []byte) (*http.Response, error) {
	line, rest, _ := bytes.Cut(head, []byte("\n"))
	code, err := strconv.Atoi(string(line))
	if err != nil {
		return nil, fmt.Errorf("the parent operator's answer begins with %q", line)
	}
	lines := bufio.NewReader(io.MultiReader(bytes.NewReader(rest), strings.NewReader("\n")))
	header, err := textproto.NewReader(lines).ReadMIMEHeader()
	if err != nil {
		return nil, fmt.Errorf("the parent operator's answer: %w", err)
	}
	length, err := strconv.ParseInt(header.Get("Content-Length"), 10, 64)
	if err != nil {
		length = -1
	}
	return &http.Response{
		Status:        fmt.Sprintf("%d %s", code, http.StatusText(code)),
		StatusCode:    code,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        http.Header(header),
		ContentLength: length,
	}, nil
}

// body is a response's body.
type body struct {
	*operation
	stop func() bool
}

var errClosed = errors.New("http: read on closed response body")

// Close ends the operation, if it has not ended yet.
func (b body) Close() error {
	b.stop()
	b.cancel(errClosed)
	return nil
}
