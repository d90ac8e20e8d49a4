package api

import (
	"bufio"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// serveStrangers listens on a new socket without an operator or groups that grant rights: to
// this listener every user but root is a stranger.
func serveStrangers(t *testing.T, s Service) *limited {
	t.Helper()
	path := filepath.Join(shortDir(t), "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	return newLimited(l, Access{Operator: NoOperator}, usualSlots)
}

// asStranger is a listener whose connections have the credentials of one stranger.
type asStranger struct{ *limited }

func (l asStranger) Accept() (net.Conn, error) {
	c, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	return l.enter(c, Credentials{UID: 12345}), nil
}

// TestStrangerIsOnlyRefused sends all forms of requests that net/http or its mux would answer
// by itself. A stranger gets 403 for each, before the body is read, and the connection is
// closed.
func TestStrangerIsOnlyRefused(t *testing.T) {
	f := newFakeService()
	l := serveStrangers(t, f)
	s := NewServer(ServerOptions{Listener: l.UnixListener, Service: f, Access: l.access, Logger: slog.New(slog.DiscardHandler)})
	server := s.server(t.Context())
	done := make(chan error)
	go func() { done <- server.Serve(asStranger{l}) }()
	defer func() { server.Close(); <-done }()
	for _, request := range []string{
		"GET /v1/status", "GET //v1/status", "GET /v1//status", "GET /v1/./status", "GET /v1/../v1/status", "GET /v1/status/",
		"GET /", "GET //", "GET /v1/peers/", "GET /v1/nothing", "GET /%2e%2e/v1/status", "GET http://other/v1/status", "GET http://other//v1/status",
		"HEAD //v1/status", "OPTIONS *", "OPTIONS /v1/status", "CONNECT /v1/status", "CONNECT other:80", "TRACE /v1/status",
		"PUT /v1/status", "POST /v1/peers", "POST //v1/peers", "PATCH /v1/peers/a", "DELETE /v1/peers/a", "PRI *",
	} {
		c, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(time.Minute))
		// The request announces a body and doesn't send it.
		if _, err := io.WriteString(c, request+" HTTP/1.1\r\nHost: m\r\nContent-Length: 1000000\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		answer, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: strings.Fields(request)[0]})
		if err != nil {
			t.Errorf("%s: %v", request, err)
			continue
		}
		if answer.StatusCode != http.StatusForbidden || !answer.Close {
			t.Errorf("%s: status %d, closed %t; want 403 and a closed connection", request, answer.StatusCode, answer.Close)
		}
		if _, err := io.ReadAll(answer.Body); err != nil {
			t.Errorf("%s: %v", request, err)
		}
		if n, err := c.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the connection stays open: %v", request, err)
		}
		c.Close()
	}
	if got := f.calls(); len(got) != 0 {
		t.Errorf("the service got the calls %q, want none", got)
	}
}

// TestMalformedRequests sends requests that net/http refuses itself before a handler is
// called: the answer has the text of the status alone, and the service gets no call.
func TestMalformedRequests(t *testing.T) {
	f := newFakeService()
	l := serveStrangers(t, f)
	s := NewServer(ServerOptions{Listener: l.UnixListener, Service: f, Access: l.access, Logger: slog.New(slog.DiscardHandler)})
	server := s.server(t.Context())
	done := make(chan error)
	go func() { done <- server.Serve(asStranger{l}) }()
	defer func() { server.Close(); <-done }()
	for name, c := range map[string]struct {
		text string
		want int
	}{
		"no request":          {"hello\r\n\r\n", http.StatusBadRequest},
		"no host":             {"GET /v1/status HTTP/1.1\r\n\r\n", http.StatusBadRequest},
		"bad header":          {"GET /v1/status HTTP/1.1\r\nHost: m\r\na b: c\r\n\r\n", http.StatusBadRequest},
		"header without end":  {"GET /v1/status HTTP/1.1\r\nHost: m\r\nA: " + strings.Repeat("a", 1<<17) + "\r\n\r\n", http.StatusRequestHeaderFieldsTooLarge},
		"unknown coding":      {"POST /v1/peers HTTP/1.1\r\nHost: m\r\nTransfer-Encoding: gzip\r\n\r\n", http.StatusNotImplemented},
		"unknown version":     {"GET /v1/status HTTP/3.0\r\nHost: m\r\n\r\n", http.StatusHTTPVersionNotSupported},
		"unknown expectation": {"GET /v1/status HTTP/1.1\r\nHost: m\r\nExpect: more\r\n\r\n", http.StatusExpectationFailed},
	} {
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(time.Minute))
		_, _ = io.WriteString(conn, c.text) // the server may refuse it before all is written
		answer, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		body, _ := io.ReadAll(answer.Body) // the connection may end with a reset
		if answer.StatusCode != c.want || len(body) > 100 || len(answer.Header) > 2 {
			t.Errorf("%s: status %d, %q, header %v; want %d and nothing else", name, answer.StatusCode, body, answer.Header, c.want)
		}
		conn.Close()
	}
	if got := f.calls(); len(got) != 0 {
		t.Errorf("the service got the calls %q, want none", got)
	}
}

// TestRemovesDeadSocketOnly replaces a dead socket by a live one between the check and the
// removal: the live one stays.
func TestRemovesDeadSocketOnly(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	was, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := removeSame(path, was); !errors.Is(err, ErrHeld) {
		t.Errorf("got %v, want ErrHeld", err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatalf("the live socket was removed: %v", err)
	}
	c.Close()
	if err := removeSame(path+".old", was); err != nil {
		t.Errorf("remove a dead socket: %v", err)
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(left) != 1 || left[0].Type() != fs.ModeSocket {
		t.Errorf("the folder has %v, want the live socket alone; error %v", left, err)
	}
}
