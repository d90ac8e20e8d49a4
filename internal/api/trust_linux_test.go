package api

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// otherUser is the user id of nobody on Linux.
const otherUser = 65534

// as runs do as another user, on a thread of its own that ends with the goroutine.
func as(t *testing.T, uid uintptr, do func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		// The raw system call changes this thread only; Go's wrapper and the C library's
		// change all threads.
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if _, _, e := unix.RawSyscall(call, uid, uid, uid); e != 0 {
				done <- e
				return
			}
		}
		done <- do()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// impostor answers like a helper, on a socket on which another user listens. asked returns the
// number of requests that arrived.
func impostor(t *testing.T, path string) (asked func() int) {
	t.Helper()
	var l net.Listener
	as(t, otherUser, func() (err error) {
		l, err = net.Listen("unix", path)
		return err
	})
	f := newFakeService()
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.note("%s %s", r.Method, r.URL)
		writeJSON(w, http.StatusOK, f.Status())
	})}
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
	return func() int { return len(f.calls()) }
}

// TestClientTrustsNoOtherUser has another user answer at each path where it can put a socket:
// the client returns ErrUntrusted and sends no request.
func TestClientTrustsNoOtherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can listen as another user")
	}
	// own returns a folder in which the other user may create its socket.
	own := func(t *testing.T) string {
		dir := filepath.Join(shortDir(t), "d")
		if err := errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Mkdir(dir, 0o777), os.Chmod(dir, 0o777)); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	must := func(t *testing.T, errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		// spoil changes owners and modes after the socket was created.
		spoil func(t *testing.T, dir, path string)
		says  string
	}{
		"in a folder for all": {func(*testing.T, string, string) {}, "others could make or replace the socket"},
		"in a folder for all, sticky": {func(t *testing.T, dir, _ string) {
			must(t, os.Chmod(dir, 0o777|os.ModeSticky))
		}, "others could make or replace the socket"},
		"in a folder of a group": {func(t *testing.T, dir, _ string) {
			must(t, os.Chown(dir, 0, 100), os.Chmod(dir, 0o775))
		}, "others could make or replace the socket"},
		"in its own folder": {func(t *testing.T, dir, _ string) {
			must(t, os.Chmod(dir, 0o755), os.Chown(dir, otherUser, otherUser))
		}, "belongs to user 65534, not to root"},
		"in a folder in its own": {func(t *testing.T, dir, path string) {
			// The owner of the parent can replace the folder by one of its own.
			must(t, os.Chmod(dir, 0o755), os.Chown(path, 0, 0))
			t.Cleanup(func() { os.Chown(filepath.Dir(dir), 0, 0) })
			must(t, os.Chown(filepath.Dir(dir), otherUser, otherUser))
		}, "belongs to user 65534, not to root"},
		"its own file": {func(t *testing.T, dir, _ string) {
			must(t, os.Chmod(dir, 0o755))
		}, "belongs to user 65534, not to root"},
		"behind root's file": {func(t *testing.T, dir, path string) {
			must(t, os.Chmod(dir, 0o755), os.Chown(path, 0, 0))
		}, "user 65534 answers there, not root"},
		"by a link": {func(t *testing.T, dir, path string) {
			must(t, os.Chmod(dir, 0o755), os.Rename(path, path+".real"), os.Symlink(path+".real", path))
		}, "is not a socket"},
		"by a link of its own to root's folder": {func(t *testing.T, dir, path string) {
			must(t, os.Chmod(dir, 0o755), os.Chown(path, 0, 0))
			real := dir + ".real"
			must(t, os.Rename(dir, real), os.Symlink(real, dir), os.Lchown(dir, otherUser, otherUser))
			t.Cleanup(func() { os.RemoveAll(real) })
		}, "belongs to user 65534, not to root"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := own(t)
			path := filepath.Join(dir, "s")
			asked := impostor(t, path)
			c.spoil(t, dir, path)
			_, err := NewClient(path).AddPeer(t.Context(), NewPeer{Name: "phone"})
			if !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), c.says) || errors.Is(err, ErrUnreachable) {
				t.Errorf("got %v, want %q", err, c.says)
			}
			if n := asked(); n != 0 {
				t.Errorf("the other user got %d requests, want none", n)
			}
		})
	}
}

// TestClientTrustsSystemGroup checks that the client accepts a folder to which a system group
// may write, as with /var/run on macOS.
func TestClientTrustsSystemGroup(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a folder to another group")
	}
	path := serve(t, newFakeService())
	dir := filepath.Dir(path)
	if err := errors.Join(os.Chown(dir, 0, systemGroup), os.Chmod(dir, 0o775)); err != nil {
		t.Fatal(err)
	}
	if _, err := NewClient(path).Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestListenChecksOwner checks that Listen refuses a folder of another user, a link of
// another user, and a folder in a folder of another user.
func TestListenChecksOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a folder to another user")
	}
	dir := shortDir(t)
	if err := os.Chown(dir, otherUser, otherUser); err != nil {
		t.Fatal(err)
	}
	link := shortDir(t) + "/link"
	if err := errors.Join(os.Symlink(shortDir(t), link), os.Lchown(link, otherUser, otherUser)); err != nil {
		t.Fatal(err)
	}
	above := shortDir(t)
	if err := errors.Join(os.Mkdir(above+"/in", 0o755), os.Chown(above, otherUser, otherUser)); err != nil {
		t.Fatal(err)
	}
	for _, folder := range []string{dir, link, above + "/in"} {
		l, err := Listen(filepath.Join(folder, "s"))
		if err == nil {
			l.Close()
		}
		if !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), "belongs to user 65534") {
			t.Errorf("%s: %v", folder, err)
		}
	}
}

// TestFullQueue connects while the socket's accept queue is full, which strangers can cause
// with many connections: the client waits for room.
func TestFullQueue(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 1)); err != nil {
		t.Fatal(err)
	}
	full := false
	for range 8 {
		c, err := net.Dial("unix", path)
		if err != nil {
			if full = errors.Is(err, unix.EAGAIN); !full {
				t.Fatal(err)
			}
			break
		}
		defer c.Close()
	}
	if !full {
		t.Fatal("the queue doesn't fill up, so the test shows nothing")
	}
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const limit = 50 * time.Millisecond
	start := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	// The deadline may end an attempt, or the pause between two attempts.
	_, err = dialTrusted(ctx, path)
	if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, context.DeadlineExceeded) || time.Since(start) < limit {
		t.Errorf("while the queue is full: %v after %v", err, time.Since(start))
	}
	dialled := make(chan error)
	go func() {
		c, err := dialTrusted(t.Context(), path)
		if err == nil {
			c.Close()
		}
		dialled <- err
	}()
	for range 3 {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
	}
	if err := <-dialled; err != nil {
		t.Error(err)
	}
}
