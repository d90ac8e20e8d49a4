package netlab

// A host: a thread in a network and a mount namespace of its own, and the calls that
// run there.

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// Host is a network namespace with a mount namespace of its own, held by file
// descriptors only.
type Host struct {
	Name string

	lab          *Lab
	netFD, mntFD int
	nl           *nlconn.Handle
	// calls are run, one at a time, by the thread that created the namespaces. It lives
	// as long as the host, because programs die with the thread that started them
	// (PR_SET_PDEATHSIG).
	calls chan func()

	witness *witness            // set by Serve
	forger  func() (int, error) // the socket of Forge, opened when first used
}

// hostDefaults are a host's sysctls before its first interface exists. Otherwise IPv4's
// are inherited from the machine (net.core.devconf_inherit_init_net), and results would
// depend on it. Duplicate address detection is disabled: it takes a second for each
// address, and addresses here are unique.
var hostDefaults = []struct{ name, value string }{
	{"net.ipv4.ip_forward", "0"},
	{"net.ipv4.conf.all.rp_filter", "0"},
	{"net.ipv4.conf.default.rp_filter", "0"},
	{"net.ipv4.conf.all.accept_redirects", "1"},
	{"net.ipv4.conf.default.accept_redirects", "1"},
	{"net.ipv4.conf.all.send_redirects", "1"},
	{"net.ipv4.conf.default.send_redirects", "1"},
	{"net.ipv6.conf.all.disable_ipv6", "0"},
	{"net.ipv6.conf.default.disable_ipv6", "0"},
	{"net.ipv6.conf.all.accept_dad", "0"},
	{"net.ipv6.conf.default.accept_dad", "0"},
	{"net.ipv6.conf.default.dad_transmits", "0"},
	{"net.ipv6.conf.default.use_tempaddr", "0"},
	{"net.ipv6.conf.default.addr_gen_mode", "0"},
}

// Host adds a host that has only a loopback interface. The name is for messages and
// files; it should be unique.
func (l *Lab) Host(name string) (*Host, error) {
	h := &Host{Name: name, lab: l, netFD: -1, mntFD: -1, calls: make(chan func())}
	h.forger = sync.OnceValues(h.openForger)
	ready := make(chan error, 1)
	l.run.Go(func() error {
		runtime.LockOSThread() // never unlocked: the thread ends in the host
		err := h.create()
		ready <- err
		if err != nil {
			return nil
		}
		for call := range h.calls {
			call()
		}
		return nil
	})
	if err := <-ready; err != nil {
		h.release()
		return nil, fmt.Errorf("make host %q: %w", name, err)
	}
	l.mu.Lock()
	l.hosts = append(l.hosts, h)
	l.mu.Unlock()
	if err := h.prepare(); err != nil {
		return nil, fmt.Errorf("prepare host %q: %w", name, err)
	}
	return h, nil
}

// create moves the calling thread into new namespaces and keeps them open.
func (h *Host) create() (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := privateMounts(); err != nil {
		return err
	}
	if h.netFD, err = openNamespace("net"); err != nil {
		return err
	}
	if h.mntFD, err = openNamespace("mnt"); err != nil {
		return err
	}
	h.nl, err = nlconn.NewHandle(unix.NETLINK_ROUTE)
	return err
}

// privateMounts gives the calling thread's mount namespace its own /run, where
// programs put their sockets, and its own view of the interfaces in /sys.
func privateMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	run, err := filepath.EvalSymlinks("/var/run")
	if err != nil {
		return fmt.Errorf("find /var/run: %w", err)
	}
	if err := unix.Mount("netlab", run, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount %s: %w", run, err)
	}
	// A container without root may refuse sysfs. Then programs see the machine's list
	// of interfaces there, but no program of the tests reads it.
	_ = unix.Mount("netlab", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	return nil
}

func openNamespace(kind string) (int, error) {
	path := "/proc/thread-self/ns/" + kind
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
	return fd, nil
}

// prepare sets the host's defaults and its loopback interface.
func (h *Host) prepare() error {
	for _, d := range hostDefaults {
		if err := h.SetSysctl(d.name, d.value); err != nil {
			return err
		}
	}
	return h.SetUp("lo", true)
}

// leave ends the host's own thread; release closes the namespaces, which end with the
// last process and socket in them.
func (h *Host) leave() { close(h.calls) }

func (h *Host) release() {
	if h.nl != nil {
		h.nl.Close()
	}
	for _, fd := range []int{h.netFD, h.mntFD} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// Do runs f inside the host, on a thread that is discarded afterwards, and returns its
// error. Sockets and files that f opens belong to the host and may be used outside Do. f
// must not end its goroutine (no t.Fatal), and goroutines that it starts don't run in
// the host. The working directory is "/".
func (h *Host) Do(f func() error) error {
	done := make(chan error, 1)
	h.lab.run.Go(func() error {
		runtime.LockOSThread() // never unlocked, so that the thread goes with the goroutine
		if err := h.enter(); err != nil {
			done <- fmt.Errorf("enter host %s: %w", h.Name, err)
			return nil
		}
		done <- f()
		return nil
	})
	return <-done
}

// enter moves the calling thread into the host permanently. Only a thread that shares
// its root and working directory with no other can enter a mount namespace (setns(2)).
func (h *Host) enter() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare file system attributes: %w", err)
	}
	if err := unix.Setns(h.mntFD, unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("set mount namespace: %w", err)
	}
	if err := unix.Setns(h.netFD, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("set network namespace: %w", err)
	}
	return nil
}

// call runs f on the host's own thread, which lives as long as the host does.
func (h *Host) call(f func() error) error {
	done := make(chan error, 1)
	select {
	case h.calls <- func() { done <- f() }:
		return <-done
	case <-h.lab.ctx.Done():
		return fmt.Errorf("use host %s: the lab is closed", h.Name)
	}
}

// Sysctl reads a sysctl of the host by its dotted name, or by its name with slashes if a
// component, such as an interface's name, contains a dot.
func (h *Host) Sysctl(name string) (string, error) {
	var value []byte
	err := h.Do(func() (err error) {
		value, err = os.ReadFile(sysctlPath(name))
		return err
	})
	if err != nil {
		return "", fmt.Errorf("read sysctl of %s: %w", h.Name, err)
	}
	return strings.TrimSpace(string(value)), nil
}

// SetSysctl writes a sysctl of the host; names are as for Sysctl.
func (h *Host) SetSysctl(name, value string) error {
	err := h.Do(func() error { return os.WriteFile(sysctlPath(name), []byte(value), 0) })
	if err != nil {
		return fmt.Errorf("write sysctl of %s: %w", h.Name, err)
	}
	return nil
}

func sysctlPath(name string) string {
	if !strings.Contains(name, "/") {
		name = strings.ReplaceAll(name, ".", "/")
	}
	return "/proc/sys/" + name
}
