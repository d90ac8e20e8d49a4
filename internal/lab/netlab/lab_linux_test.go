package netlab

// Hosts of the lab: their isolation, links and cleanup.

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/meshhelper/meshhelper/internal/owned"
)

// newLab is a lab that ends with the test.
func newLab(t *testing.T) *Lab {
	t.Helper()
	if err := Unavailable(); err != nil {
		t.Skip("no hosts to try things on:", err)
	}
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error("close lab:", err)
		}
	})
	return l
}

func newPicture(t *testing.T) *Picture {
	t.Helper()
	p, err := NewPicture(newLab(t))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestHostsAreApart proves that a host has its own network, its own /run, and
// that the process keeps what it had.
func TestHostsAreApart(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	l := newLab(t)
	seen := map[string]string{before: "the process"}
	for _, name := range []string{"one", "two"} {
		h, err := l.Host(name)
		if err != nil {
			t.Fatal(err)
		}
		var ns string
		var links []net.Interface
		if err := h.Do(func() (err error) {
			if ns, err = os.Readlink("/proc/thread-self/ns/net"); err != nil {
				return err
			}
			if err := os.WriteFile("/run/mark", []byte(name), 0o600); err != nil {
				return err
			}
			links, err = net.Interfaces()
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if other, ok := seen[ns]; ok {
			t.Errorf("%s shares its network namespace with %s", name, other)
		}
		seen[ns] = name
		if len(links) != 1 || links[0].Name != "lo" || links[0].Flags&net.FlagUp == 0 {
			t.Errorf("%s has interfaces %v, want lo up", name, links)
		}
	}
	if _, err := os.Stat("/run/mark"); err == nil {
		t.Error("a host's /run is the machine's")
	}
	if after, _ := os.Readlink("/proc/self/ns/net"); after != before {
		t.Errorf("the process moved from %s to %s", before, after)
	}
}

// TestWithoutRoot runs some of these tests again in a user namespace.
func TestWithoutRoot(t *testing.T) {
	if os.Getenv(userNamespaceEnv) != "" {
		t.Skip("this is a user namespace")
	}
	if err := Unavailable(); err != nil {
		t.Skip("no hosts to try things on:", err)
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, "-test.v", "-test.run=^(TestHostsAreApart|TestProcessRunsInHost|TestPictureIsConnected)$")
	cmd.Env = append(os.Environ(), userNamespaceEnv+"=force")
	out, err := cmd.CombinedOutput()
	if strings.Contains(string(out), "netlab: no user namespace") {
		t.Skipf("the machine allows none:\n%s", out)
	}
	if passed := strings.Count(string(out), "--- PASS"); err != nil || passed != 3 {
		t.Errorf("%d of 3 tests passed in a user namespace, %v:\n%s", passed, err, out)
	}
}

// TestRootIsOwn runs itself in a user namespace, as a user who isn't root outside: there
// a program trusts the folders on the way to where temporary files are.
func TestRootIsOwn(t *testing.T) {
	if os.Getenv(userNamespaceEnv) == "inside" {
		if err := owned.CheckAbove(filepath.Join(t.TempDir(), "state")); err != nil {
			t.Error(err)
		}
		return
	}
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	// Where another user can run it.
	dir, err := os.MkdirTemp("", "netlab-test-*")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	copied := filepath.Join(dir, "netlab.test")
	for _, err := range []error{os.WriteFile(copied, text, 0o755), os.Chmod(dir, 0o755)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), copied, "-test.v", "-test.run=^TestRootIsOwn$")
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), userNamespaceEnv+"=force")
	if os.Geteuid() == 0 {
		const someUser = 12345
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: someUser, Gid: someUser}}
	}
	out, err := cmd.CombinedOutput()
	if strings.Contains(string(out), "netlab: no user namespace") {
		t.Skipf("the machine allows none:\n%s", out)
	}
	if err != nil || strings.Count(string(out), "--- PASS") != 1 {
		t.Errorf("in a user namespace: %v\n%s", err, out)
	}
}

// TestProcessRunsInHost proves that a program runs in the host's network.
func TestProcessRunsInHost(t *testing.T) {
	l := newLab(t)
	h, err := l.Host("one")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.SetSysctl("net.ipv4.ip_default_ttl", "77"); err != nil {
		t.Fatal(err)
	}
	out, _, status, err := h.Run(t.Context(), "", "cat", "/proc/sys/net/ipv4/ip_default_ttl")
	if err != nil || status != 0 || strings.TrimSpace(out) != "77" {
		t.Errorf("cat printed %q with status %d, %v; want 77", out, status, err)
	}
	if _, stderr, status, err := h.Run(t.Context(), "", "cat", "/no/such/file"); err != nil || status != 1 || stderr == "" {
		t.Errorf("cat of a missing file: status %d, stderr %q, %v; want 1 and a message", status, stderr, err)
	}
}

// TestPictureIsConnected dials over the underlay: neighbours, and across the internet.
func TestPictureIsConnected(t *testing.T) {
	p := newPicture(t)
	at := Addresses()
	for _, to := range []struct {
		host *Host
		addr netip.Addr
		from *Host
	}{
		{p.W, at.W.V4, p.B}, {p.W, at.W.V6, p.B},
		{p.W, at.Metadata.V4, p.B}, {p.W, at.Metadata.V6, p.B},
		{p.I, at.I.V4, p.B}, {p.I, at.I.V6, p.B},
		{p.B, at.BUplink.V4, p.C}, {p.B, at.BUplink.V6, p.C},
		{p.L, at.L.V4, p.B}, {p.L, at.L.V6, p.B},
		{p.P, at.P.V4, p.B}, {p.P, at.P.V6, p.B},
		{p.V, at.Behind.V4, p.B}, {p.V, at.Behind.V6, p.B},
	} {
		if err := hello(to.from, to.host, netip.AddrPortFrom(to.addr, 7)); err != nil {
			t.Errorf("%s to %s at %s: %v", to.from.Name, to.host.Name, to.addr, err)
		}
	}
}

// hello exchanges a word over TCP.
func hello(from, to *Host, addr netip.AddrPort) error {
	var listener *net.TCPListener
	if err := to.Do(func() (err error) {
		listener, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr))
		return err
	}); err != nil {
		return err
	}
	defer listener.Close()
	var conn *net.TCPConn
	if err := from.Do(func() (err error) {
		conn, err = net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(addr))
		return err
	}); err != nil {
		return err
	}
	defer conn.Close()
	accepted, err := listener.Accept()
	if err != nil {
		return err
	}
	fmt.Fprint(accepted, "hello")
	accepted.Close()
	word, err := io.ReadAll(conn)
	if err == nil && string(word) != "hello" {
		err = fmt.Errorf("heard %q", word)
	}
	return err
}
