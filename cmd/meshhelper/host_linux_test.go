package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inNamespace runs a command in a new network namespace that has an uplink:
// netns COMMAND...
func inNamespace() {
	if err := enterNamespace(); err != nil {
		fmt.Fprintln(os.Stderr, "netns:", err)
		os.Exit(1)
	}
	path, err := exec.LookPath(os.Args[1])
	if err == nil {
		err = unix.Exec(path, os.Args[1:], os.Environ())
	}
	fmt.Fprintln(os.Stderr, "netns:", err)
	os.Exit(1)
}

// enterNamespace moves this thread, which becomes the command's, to a namespace
// with a host that has a LAN-less uplink wan0.
func enterNamespace() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	// Not Linux's default, so that `rules` can be seen to print what holds here. What is
	// below /proc/sys/net is of the namespace of the thread that opens it.
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("1024 40000"), 0); err != nil {
		return err
	}
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wan0"}, PeerName: "far0"}
	if err := netlink.LinkAdd(pair); err != nil {
		return err
	}
	for _, name := range []string{"lo", "wan0", "far0"} {
		link, err := netlink.LinkByName(name)
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
		if err != nil {
			return err
		}
	}
	link, err := netlink.LinkByName("wan0")
	if err != nil {
		return err
	}
	address, err := netlink.ParseAddr("203.0.113.2/24")
	if err == nil {
		err = netlink.AddrAdd(link, address)
	}
	if err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.IPv4(203, 0, 113, 1)})
}

// TestOnLinux runs the real helper with the real platform.
func TestOnLinux(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a network namespace with a tunnel device needs root; the packet tests do without")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("no tunnel device: %v", err)
	}
	testscript.Run(t, scripts("testdata/linux"))
}
