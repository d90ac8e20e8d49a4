package netlab

// Snapshots show every kind of change, and nothing that changes by itself.

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables"
)

// TestSnapshotShowsEveryChange takes a snapshot before and after each kind of
// change that a program could leave behind.
func TestSnapshotShowsEveryChange(t *testing.T) {
	p := newPicture(t)
	if err := p.B.InstallForeignTable(); err != nil {
		t.Fatal(err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: "other"}
	for _, change := range []struct {
		name string
		do   func() error
		want string // in one of the lines that differ
	}{
		{"address", func() error { return p.B.AddAddr(LAN, netip.MustParsePrefix("10.1.2.3/32")) }, "+ address lan0 10.1.2.3/32"},
		{"route", func() error {
			return p.B.AddRoute(Route{To: netip.MustParsePrefix("10.2.0.0/16"), Via: Addresses().L.V4})
		}, "10.2.0.0/16"},
		{"MTU", func() error { return p.B.SetMTU(LAN, 1400) }, "mtu 1400"},
		{"redirects", func() error { return p.B.SetSysctl("net.ipv4.conf.lan0.accept_redirects", "0") }, "+ sysctl net/ipv4/conf/lan0/accept_redirects = 0"},
		{"forwarding", func() error { return p.B.SetSysctl("net.ipv4.ip_forward", "1") }, "+ sysctl net/ipv4/ip_forward = 1"},
		{"Docker", p.B.InstallDockerChain, "FORWARD"},
		{"set element", func() error {
			return p.B.nft(func(c *nftables.Conn) {
				_ = c.SetAddElements(&nftables.Set{Table: table, Name: "ports", KeyType: nftables.TypeInetService},
					[]nftables.SetElement{{Key: []byte{0, 80}}})
			})
		}, "+ element"},
		{"table", func() error { return p.B.nft(func(c *nftables.Conn) { c.DelTable(table) }) }, "- rule"},
	} {
		before := snapshot(t, p.B)
		if diff := before.Diff(snapshot(t, p.B)); len(diff) > 0 {
			t.Fatalf("before %s the host changes by itself:\n%s", change.name, strings.Join(diff, "\n"))
		}
		if err := change.do(); err != nil {
			t.Fatalf("%s: %v", change.name, err)
		}
		if diff := strings.Join(before.Diff(snapshot(t, p.B)), "\n"); !strings.Contains(diff, change.want) {
			t.Errorf("%s: want %q in the difference:\n%s", change.name, change.want, diff)
		}
	}
}

// TestSnapshotLeavesCountersAside sends packets through a counter.
func TestSnapshotLeavesCountersAside(t *testing.T) {
	p := newPicture(t)
	if err := p.B.InstallForeignTable(); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, p.B)
	if err := hello(p.C, p.B, portOf(Addresses().BUplink.V4, 7)); err != nil {
		t.Fatal(err)
	}
	if diff := before.Diff(snapshot(t, p.B)); len(diff) > 0 {
		t.Errorf("after some packets:\n%s", strings.Join(diff, "\n"))
	}
}

func snapshot(t *testing.T, h *Host) Snapshot {
	t.Helper()
	s, err := h.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	return s
}
