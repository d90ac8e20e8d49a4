package trial

// Other users of the host, and an operator's misbehaving programs.

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// nobody is the UID of the user nobody, which is neither root nor the operator.
const nobody = 65534

// dialAs opens a connection to the helper on B as another user. The kernel records the
// connecting user. The thread that changed its UID ends afterwards.
func (m *Mesh) dialAs(uid uintptr) (conn net.Conn, err error) {
	err = m.B.Do(func() (err error) {
		// The raw system call changes one thread; Go's and the C library's change all.
		if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); e != 0 && e != unix.EPERM {
			return e
		}
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if _, _, e := unix.RawSyscall(call, uid, uid, uid); e != 0 {
				return e
			}
		}
		conn, err = net.Dial("unix", socketPath)
		return err
	})
	return conn, err
}

// answerTo sends a request unchanged and returns the answer's status line.
func answerTo(conn net.Conn, request string) (string, error) {
	conn.SetDeadline(time.Now().Add(generous))
	if _, err := io.WriteString(conn, request); err != nil {
		return "", err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line), err
}

// stranger is an attack of a local user on the helper. It goes on until its connections
// are closed.
type stranger struct {
	name  string
	start func(m *Mesh, dial func() (net.Conn, error), run *errgroup.Group) ([]net.Conn, error)
}

// many opens connections and sends the same on each.
func many(n int, say string) func(*Mesh, func() (net.Conn, error), *errgroup.Group) ([]net.Conn, error) {
	return func(_ *Mesh, dial func() (net.Conn, error), _ *errgroup.Group) (conns []net.Conn, err error) {
		for range n {
			conn, err := dial()
			if err != nil {
				return conns, err
			}
			conns = append(conns, conn)
			// The helper closes connections over a user's limit.
			_, _ = io.WriteString(conn, say)
		}
		return conns, nil
	}
}

const post = "POST /v1/peers HTTP/1.1\r\nHost: m\r\nContent-Type: application/json\r\n"

// bodies has some connections send a body of 1 GiB each, as fast as the helper reads it.
func bodies(_ *Mesh, dial func() (net.Conn, error), run *errgroup.Group) (conns []net.Conn, err error) {
	chunk := []byte(`{"name":"` + strings.Repeat("x", 1<<16))
	for range 4 {
		conn, err := dial()
		if err != nil {
			return conns, err
		}
		conns = append(conns, conn)
		run.Go(func() error {
			_, err := fmt.Fprintf(conn, post+"Content-Length: %d\r\n\r\n", 1<<30)
			for left := 1 << 30; left > 0 && err == nil; left -= len(chunk) {
				_, err = conn.Write(chunk)
			}
			return nil // refused, or closed at the end
		})
	}
	return conns, nil
}

var strangers = []stranger{
	{"1,000 silent connections", many(1000, "")},
	{"100 half requests", many(100, "GET /v1/sta")},
	{"100 half bodies", many(100, post+"Content-Length: 1000\r\n\r\n{\"name\":")},
	{"4 bodies of 1 GiB", bodies},
}

// slower limits the operator's median answer time during an attack, as a multiple of the
// time without one. Both are measured on the same machine, one after the other.
const slower = 20

// TestLocalUser has another user and an operator's misbehaving programs attack the socket
// in every way they can. The other user is refused, and the operator is answered.
func TestLocalUser(t *testing.T) {
	m := newMesh(t)
	probe, err := m.dialAs(nobody)
	dial := func() (net.Conn, error) { return m.dialAs(nobody) }
	if err != nil {
		t.Logf("can't connect as another user here (%v): the attacks run as root", err)
		dial = m.dial
	} else {
		probe.Close()
		mustRefuse(t, dial)
	}
	operator := m.client(t)
	before := loadOf(t, m.Helper.PID())
	for _, s := range strangers {
		quiet := answers(t, m, operator, 100)
		var run errgroup.Group
		conns, err := s.start(m, dial, &run)
		if err != nil {
			t.Fatalf("%s: after %d connections: %v", s.name, len(conns), err)
		}
		took := answers(t, m, operator, 100)
		t.Logf("%-26s operator answered in %s (median), %s (90%%), %s (slowest of %d); without them in %s, %s, %s", s.name+":",
			took[len(took)/2], took[len(took)*9/10], took[len(took)-1], len(took), quiet[len(took)/2], quiet[len(took)*9/10], quiet[len(took)-1])
		if with, without := took[len(took)/2], quiet[len(took)/2]; with > slower*without {
			t.Errorf("%s: the operator's median answer takes %s, and %s without the attack; want at most %d times that", s.name, with, without, slower)
		}
		for _, c := range conns {
			c.Close()
		}
		run.Wait()
	}
	operator.CloseIdleConnections()
	var after load
	for until := time.Now().Add(generous); ; time.Sleep(20 * time.Millisecond) {
		if after = loadOf(t, m.Helper.PID()); after.fds <= before.fds {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("%d files open before, %d after", before.fds, after.fds)
		}
	}
	if grown := after.kilobytes - before.kilobytes; grown > 128<<10 {
		t.Errorf("the helper's memory grew by %d KiB", grown)
	}
	t.Logf("files before and after: %d and %d; memory: %d and %d KiB", before.fds, after.fds, before.kilobytes, after.kilobytes)
	if !m.reaches(t, m.A, status(t, m).Address().V4, true) {
		t.Error("A doesn't reach B afterwards")
	}
}

// mustRefuse has another user send every kind of request.
func mustRefuse(t *testing.T, dial func() (net.Conn, error)) {
	t.Helper()
	for _, request := range []string{
		"GET /v1/status", "GET /v1/peers", "GET /v1/peers/C", "GET /v1/peers/C/config", "GET /v1/rules", "GET /v1/doctor",
		"GET /v1/events", "GET /v1/metrics", "GET /v1/explain?peer=C&to=192.0.2.1&proto=tcp",
		"POST /v1/peers", "PATCH /v1/peers/C", "DELETE /v1/peers/C",
	} {
		conn, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		line, err := answerTo(conn, request+" HTTP/1.1\r\nHost: m\r\nContent-Length: 2\r\n\r\n{}")
		conn.Close()
		if err != nil || !strings.Contains(line, " 403 ") {
			t.Errorf("another user's %s: %q, %v; want 403", request, line, err)
		}
	}
}

// answers returns the operator's sorted waiting times for status and for changes.
func answers(t *testing.T, m *Mesh, operator *http.Client, n int) (took []time.Duration) {
	t.Helper()
	for i := range n {
		var answer Status
		var changed struct{}
		start := time.Now()
		err := ask(operator, "GET", "/v1/status", nil, &answer)
		if i%5 == 4 {
			start = time.Now()
			err = ask(operator, "PATCH", "/v1/peers/C", toggle("routing", i%2 == 0), &changed)
		}
		took = append(took, time.Since(start))
		if err != nil {
			t.Fatal(err)
		}
		if i%20 == 0 {
			operator.CloseIdleConnections() // new connections must be answered, too
		}
	}
	slices.Sort(took)
	return took
}
