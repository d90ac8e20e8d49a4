package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/events"
)

// dialAs connects as another user, on a thread that ends with it.
func dialAs(uid uintptr, path string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread()
		// By the raw call, because Go's and the C library's change all threads.
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if _, _, e := unix.RawSyscall(call, uid, uid, uid); e != 0 {
				done <- result{nil, e}
				return
			}
		}
		c, err := net.Dial("unix", path)
		done <- result{c, err}
	}()
	r := <-done
	return r.conn, r.err
}

// TestFewFiles has 100 users open what they can, and root, too, while the helper may
// have few files: root is answered, and a change is saved and in force.
func TestFewFiles(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can connect as other users")
	}
	for _, files := range []int{64, 128, 256} {
		t.Run(fmt.Sprint(files), func(t *testing.T) {
			p := startProcess(t, fmt.Sprintf("ulimit -n %d;", files), nil)
			if err := os.Chmod(filepath.Dir(p.socket), 0o755); err != nil {
				t.Fatal(err)
			}
			var conns []net.Conn
			defer func() {
				for _, c := range conns {
					c.Close()
				}
			}()
			for uid := range uintptr(100) {
				for range 5 {
					c, err := dialAs(70000+uid, p.socket)
					if errors.Is(err, unix.EAGAIN) {
						continue // the queue is full, which is as much as can be had
					}
					if err != nil {
						t.Fatal(err)
					}
					conns = append(conns, c)
				}
			}
			p.toggle(20)
			if n := p.files(); n > files {
				t.Errorf("%d files are open", n)
			} else {
				t.Logf("%d files are open beside %d connections", n, len(conns))
			}
		})
	}
}

// files counts the files that the helper has open.
func (p *process) files() int {
	p.t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	return len(all)
}

// TestEventsSurviveACrowd has 300 users ask: the journal still has what was before,
// and says how many they were.
func TestEventsSurviveACrowd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can connect as other users")
	}
	p := startProcess(t, "", nil)
	if err := os.Chmod(filepath.Dir(p.socket), 0o755); err != nil {
		t.Fatal(err)
	}
	p.toggle(2)
	for uid := range uintptr(300) {
		c, err := dialAs(70000+uid, p.socket)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, "GET //v1/status HTTP/1.1\r\nHost: m\r\n\r\n")
		answer := make([]byte, 100)
		n, err := c.Read(answer)
		if err != nil || !strings.HasPrefix(string(answer[:n]), "HTTP/1.1 403 ") {
			t.Fatalf("user %d: %q, %v", 70000+uid, answer[:n], err)
		}
		c.Close()
	}
	denied, changed := p.events("denied"), p.events("change")
	if denied != 8 || changed != 3 {
		t.Errorf("%d events of refusals, %d of changes; want 8 and 3", denied, changed)
	}
}

// events counts the remembered events of a kind.
func (p *process) events(kind events.Kind) (n int) {
	p.t.Helper()
	err := p.client.Events(p.t.Context(), 0, false, func(e events.Event) error {
		if e.Kind == kind {
			n++
		}
		return nil
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}
