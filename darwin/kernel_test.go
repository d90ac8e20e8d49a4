package darwin_test

import (
	"errors"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/darwin/darwintest"
)

// TestForwarding enables and disables forwarding in each family, repeatedly, and reads it
// back. Both are off at the end.
func TestForwarding(t *testing.T) {
	k := darwintest.NewKernel()
	s := darwin.NewSysctl(k, k)
	ctx := t.Context()
	for f, other := range map[darwin.Family]string{darwin.IPv4: "net.inet6.ip6.forwarding", darwin.IPv6: "net.inet.ip.forwarding"} {
		for _, want := range []bool{false, true, true, false} {
			if err := s.SetForwarding(ctx, f, want); err != nil {
				t.Fatal(err)
			}
			if got, err := s.Forwarding(f); err != nil || got != want {
				t.Errorf("%v forwarding %v, %v, want %v", f, got, err, want)
			}
			if k.Variable(other) != "0" {
				t.Errorf("setting %v forwarding to %v set %s", f, want, other)
			}
		}
	}
	if k.Variable("net.inet.ip.forwarding") != "0" || k.Variable("net.inet6.ip6.forwarding") != "0" {
		t.Error("disabling both families left one of them on")
	}
}

// variables is a kernel that answers every variable with value and err.
type variables struct {
	darwin.Kernel
	value string
	err   error
}

func (v variables) Sysctl(string) (string, error) { return v.value, v.err }

// TestSysctlOddAnswers has sysctl fail or give unexpected answers: reading and setting
// return errors.
func TestSysctlOddAnswers(t *testing.T) {
	ctx := t.Context()
	for name, v := range map[string]variables{
		"nothing":     {},
		"unknown":     {err: syscall.ENOENT},
		"not allowed": {err: syscall.EPERM},
	} {
		s := darwin.NewSysctl(scripted{}, v)
		if on, err := s.Forwarding(darwin.IPv4); err == nil || v.err != nil && !errors.Is(err, v.err) {
			t.Errorf("%s: forwarding %v, %v", name, on, err)
		}
		if err := s.SetForwarding(ctx, darwin.IPv4, true); err == nil {
			t.Errorf("%s: no error", name)
		}
		if id, err := s.BootSession(); err == nil {
			t.Errorf("%s: boot session %q", name, id)
		}
	}
	for name, r := range map[string]scripted{
		"not run":     {err: errors.New("timeout")},
		"unknown":     {stderr: "sysctl: unknown oid 'x'\n", status: 1},
		"not allowed": {stderr: "sysctl: net.inet.ip.forwarding: Operation not permitted\n", status: 1},
	} {
		if err := darwin.NewSysctl(r, variables{value: "1"}).SetForwarding(ctx, darwin.IPv4, true); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	// Another program resets the variable at once.
	if err := darwin.NewSysctl(scripted{stdout: "0\n"}, variables{value: "0"}).SetForwarding(ctx, darwin.IPv6, true); err == nil {
		t.Error("no error for a value that didn't last")
	}
}

// TestSysctlReadsWithoutAProcess checks that reading a variable starts no process, since
// every inspection reads some.
func TestSysctlReadsWithoutAProcess(t *testing.T) {
	k := darwintest.NewKernel()
	s := darwin.NewSysctl(scripted{err: errors.New("a process was started")}, k)
	if _, err := s.BootSession(); err != nil {
		t.Error(err)
	}
	for _, f := range []darwin.Family{darwin.IPv4, darwin.IPv6} {
		if on, err := s.Forwarding(f); err != nil || on {
			t.Errorf("%v forwarding %v, %v", f, on, err)
		}
	}
	if v, err := k.Sysctl("kern.nonsense"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("a missing variable: %q, %v", v, err)
	}
}

// TestBoot checks that a boot changes the boot session and resets forwarding and tunnels.
func TestBoot(t *testing.T) {
	k := darwintest.NewKernel()
	s := darwin.NewSysctl(k, k)
	ctx := t.Context()
	before, err := s.BootSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SetForwarding(ctx, darwin.IPv4, true); err != nil {
		t.Fatal(err)
	}
	if _, err := k.CreateTunnel("utun", 1420); err != nil {
		t.Fatal(err)
	}
	k.Boot()
	after, err := s.BootSession()
	if err != nil || after == before || len(after) != 36 {
		t.Errorf("boot session %q, was %q, %v", after, before, err)
	}
	if on, err := s.Forwarding(darwin.IPv4); err != nil || on {
		t.Errorf("forwarding after boot: %v, %v", on, err)
	}
	if k.Has("utun0") {
		t.Error("a tunnel survived the boot")
	}
}

// TestTunnelNumbersClimb checks that the fake kernel, like a Mac's, doesn't reuse the
// number of a removed tunnel at once, and creates no tunnel with another kind of name.
func TestTunnelNumbersClimb(t *testing.T) {
	k := darwintest.NewKernel()
	first, err := k.CreateTunnel("utun", 1420)
	if err != nil {
		t.Fatal(err)
	}
	k.RemoveInterface(first)
	second, err := k.CreateTunnel("utun", 1420)
	if err != nil || second == first {
		t.Errorf("second tunnel %q, first %q, %v", second, first, err)
	}
	if _, err := k.CreateTunnel(second, 1420); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("a number in use: %v", err)
	}
	if _, err := k.CreateTunnel("wg0", 1420); err == nil {
		t.Error("created a tunnel with another name")
	}
}

// TestAddresses sets a tunnel's addresses and MTU, and removes the addresses.
func TestAddresses(t *testing.T) {
	k := darwintest.NewKernel()
	ctx := t.Context()
	name, err := k.CreateTunnel("utun", 1500)
	if err != nil {
		t.Fatal(err)
	}
	c := darwin.NewIfconfig(k)
	v4, v6 := netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("fd00::1")
	for _, a := range []netip.Addr{v4, v6} {
		if err := c.AddAddress(ctx, name, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.SetMTU(ctx, name, 1420); err != nil {
		t.Fatal(err)
	}
	n, err := darwin.Observe(k)
	if err != nil {
		t.Fatal(err)
	}
	i := n.Interface(name)
	if i.MTU != 1420 || len(i.Addresses) != 2 || i.Addresses[0].Prefix != netip.PrefixFrom(v4, 32) ||
		i.Addresses[0].Peer != v4 || i.Addresses[1].Prefix != netip.PrefixFrom(v6, 128) {
		t.Errorf("the interface is %+v", i)
	}
	if err := c.AddAddress(ctx, name, v4); err == nil || !strings.Contains(err.Error(), "File exists") {
		t.Errorf("the same address twice: %v", err)
	}
	for _, a := range []netip.Addr{v4, v6} {
		if err := c.RemoveAddress(ctx, name, a); err != nil {
			t.Error(err)
		}
	}
	if err := c.RemoveAddress(ctx, name, v4); err == nil {
		t.Error("removed an address that didn't exist")
	}
	if n, err := darwin.Observe(k); err != nil || len(n.Interface(name).Addresses) != 0 {
		t.Errorf("addresses left: %+v, %v", n.Interface(name), err)
	}
}

// TestIfconfigRefuses checks that invalid interface names, addresses and MTUs are refused,
// and that a warning of ifconfig is an error.
func TestIfconfigRefuses(t *testing.T) {
	k := darwintest.NewKernel()
	ctx := t.Context()
	c := darwin.NewIfconfig(k)
	good := netip.MustParseAddr("100.64.0.1")
	for _, name := range []string{"", "-a", "utun7", "utun0 up", "averyverylongname0"} {
		if err := c.AddAddress(ctx, name, good); err == nil {
			t.Errorf("interface %q was accepted", name)
		}
	}
	for _, a := range []netip.Addr{{}, netip.MustParseAddr("fe80::1%en0"), netip.MustParseAddr("::ffff:1.2.3.4")} {
		if err := c.AddAddress(ctx, "lo0", a); err == nil {
			t.Errorf("address %v was accepted", a)
		}
	}
	if err := c.SetMTU(ctx, "lo0", 70000); err == nil {
		t.Error("accepted an invalid MTU")
	}
	// ifconfig's warnings come with exit status 0.
	warned := darwin.NewIfconfig(scripted{stderr: "ifconfig: ioctl (set mtu): Invalid argument\n"})
	if err := warned.SetMTU(ctx, "utun0", 1420); err == nil {
		t.Error("a warning counts as success")
	}
}
