package linux

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/nlconn"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestHostIsLeftAsFound compares the whole host before and after a run, with other
// software's table present the whole time.
func TestHostIsLeftAsFound(t *testing.T) {
	for _, found := range []string{"0", "1"} {
		t.Run("forwarding found "+found, func(t *testing.T) {
			w := newWorld(t)
			w.findForwarding(found)
			w.software(nftables.TableFamilyIPv4, "docker", docker)
			before := w.snapshot()
			w.open()
			for _, m := range []policy.Mesh{meshOf(grants{ann: all}), meshOf(grants{bob: mesh.Routing})} {
				r := w.enforce(m)
				if report := w.inspect(r); len(report.Drift) > 0 || !report.Forwarding.IPv4 || !report.Forwarding.IPv6 {
					t.Errorf("after Enforce: %+v", report)
				}
				if w.journalExists() == (found == "1") {
					t.Error("the journal exists where nothing was changed, or doesn't where something was")
				}
			}
			if left := w.close(); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			if diff := before.Diff(w.snapshot()); len(diff) > 0 {
				t.Errorf("the host isn't as it was: %v", diff)
			}
			if w.journalExists() {
				t.Error("the journal is still there")
			}
		})
	}
}

// die does what a SIGKILL does: the kernel closes the files, and nothing cleans up.
func (g *rig) die() {
	g.t.Helper()
	if g.p == nil {
		return
	}
	g.do(func() error {
		g.p.unlock()
		if g.p.dev != nil {
			g.p.dev.Close()
		}
		return g.p.release()
	})
	g.p, g.dev = nil, nil
}

// TestKilledHelperIsCleanedUp kills the backend while everything is open. Until the next
// one cleans up, nothing for a peer leaves unencrypted and nothing is forwarded.
func TestKilledHelperIsCleanedUp(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	before := w.snapshot()
	w.open()
	w.enforce(meshOf(grants{ann: all}))
	w.die()

	n := 0
	w.closedToOutside(&n, "while it is dead")
	w.open()
	if v, err := w.pic.B.Sysctl("net/ipv4/conf/" + netlab.Uplink + "/forwarding"); err != nil || v != "0" {
		t.Errorf("Open left forwarding of the uplink at %q, %v", v, err)
	}
	if w.journalExists() {
		t.Error("the journal outlived the repair")
	}
	w.closedToOutside(&n, "after Open")
	w.enforce(meshOf(grants{ann: all}))
	w.die()

	// Close of a backend that was never opened cleans up, too.
	w.do(func() error {
		p, err := New(Options{StateDir: w.state})
		if err != nil {
			return err
		}
		_, err = p.Close(context.Background())
		return err
	})
	if diff := before.Diff(w.snapshot()); len(diff) > 0 {
		t.Errorf("the host isn't as it was: %v", diff)
	}
}

// closedToOutside sends packets that must not come out anywhere: to peers unencrypted,
// and for other hosts through this one.
func (w *world) closedToOutside(n *int, when string) {
	w.t.Helper()
	a := netlab.Addresses()
	first := *n + 1
	for i, far := range a.I.List() {
		for _, to := range []netip.Addr{[]netip.Addr{ann4, ann6}[i], []netip.Addr{unassigned4, unassigned6}[i]} {
			*n++
			c := w.socket(netip.AddrPortFrom(map[bool]netip.Addr{true: a.BUplink.V4, false: a.BUplink.V6}[to.Is4()], 0))
			_, _ = c.WriteToUDPAddrPort(word(*n), netip.AddrPortFrom(to, 5000))
		}
		*n++
		w.send(netlab.LAN, netlab.UDPPacket(netip.AddrPortFrom(a.L.List()[i], 4000), netip.AddrPortFrom(far, 5000), word(*n)))
		*n++
		w.send(netlab.Uplink, netlab.UDPPacket(netip.AddrPortFrom(far, 4000), netip.AddrPortFrom([]netip.Addr{own4, own6}[i], 5000), word(*n)))
	}
	w.settle(nil)
	for i := first; i <= *n; i++ {
		if got := w.captures(word(i)); len(got) > 0 {
			w.t.Errorf("%s: packet %d came out at %v: %v", when, i-first, got[0].where, got[0].packet)
		}
	}
}

// TestDeadTunnelIsReplaced deletes the interface, as another program may, and opens the
// backend again.
func TestDeadTunnelIsReplaced(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	before := w.snapshot()
	w.open()
	w.enforce(meshOf(grants{ann: all}))
	n := 0
	// The narrower ruleset holds although the interface is gone.
	if err := w.dev.Close(); err != nil {
		t.Fatal(err)
	}
	err := w.pic.B.Do(func() error {
		_, err := w.round(meshOf(grants{}))
		return err
	})
	var step *host.StepError
	if !errors.As(err, &step) || step.Step != StepAddresses {
		t.Errorf("Enforce without the interface: %v", err)
	}
	if may := w.elements("may_routing4"); len(may) > 0 {
		t.Errorf("without the interface, the table still lets %v route", may)
	}
	w.closedToOutside(&n, "without the interface")

	w.do(func() (err error) {
		w.dev, err = w.p.Open(context.Background(), w.p.cfg)
		return err
	})
	w.closedToOutside(&n, "after it was opened again")
	r := w.enforce(meshOf(grants{ann: all}))
	if drift := w.inspect(r).Drift; len(drift) > 0 {
		t.Errorf("after it was opened again: %v", drift)
	}
	w.close()
	if diff := before.Diff(w.snapshot()); len(diff) > 0 {
		t.Errorf("the host isn't as it was: %v", diff)
	}
}

// TestFailedOpenKeepsPeersIn deletes the interface and keeps its name in use, so that it
// can't be created again. The host sends to peers at every step of every try: nothing
// leaves.
func TestFailedOpenKeepsPeersIn(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	before := w.snapshot()
	w.open()
	r := w.enforce(meshOf(grants{ann: all}))
	outer := netlab.Addresses().BUplink
	var senders []*net.UDPConn
	for i, to := range []netip.Addr{ann4, unassigned4, ann6, unassigned6} {
		c := w.socket(netip.AddrPortFrom(outer.List()[i/2], 0))
		senders = append(senders, c)
		_, _ = c.WriteToUDPAddrPort(word(i+1), netip.AddrPortFrom(to, 5000)) // also opens the flows into the mesh
	}
	tries := 0
	send := func(string) {
		for i, to := range []netip.Addr{ann4, unassigned4, ann6, unassigned6} {
			tries++
			_, _ = senders[i].WriteToUDPAddrPort(word(i+11), netip.AddrPortFrom(to, 5000))
		}
	}
	if err := w.dev.Close(); err != nil {
		t.Fatal(err)
	}
	send("")
	taken := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: meshName}, PeerName: "other1"}
	if err := w.pic.B.Netlink().LinkAdd(taken); err != nil {
		t.Fatal(err)
	}
	w.p.o.Step = send
	w.p.forward.step = send
	open := func() error {
		return w.pic.B.Do(func() (err error) {
			w.dev, err = w.p.Open(context.Background(), w.p.cfg)
			return err
		})
	}
	for range 3 {
		var step *host.StepError
		if err := open(); !errors.As(err, &step) || step.Step != StepInterface {
			t.Fatalf("Open while the name is taken: %v", err)
		}
		send("")
		if report := w.p.forward.now(meshName); report.IPv4 || report.IPv6 {
			t.Errorf("after a failed Open the host forwards: %+v", report)
		}
		if w.p.last == nil {
			t.Error("after a failed Open no table is in force")
		} else if got := w.p.last.Host(); !slices.Equal(got.Routes, r.Host().Routes) || got.Interface != noInterface {
			t.Errorf("the closed table is for interface %q, and forgot the routes of other owners", got.Interface)
		}
		err := w.pic.B.Do(func() error {
			p, err := New(Options{StateDir: t.TempDir()})
			if err != nil {
				return err
			}
			defer p.release()
			_, err = p.Open(context.Background(), w.p.cfg)
			return err
		})
		if !errors.As(err, &step) || step.Step != StepLock {
			t.Errorf("after a failed Open another helper may start: %v", err)
		}
	}
	n := 20
	w.closedToOutside(&n, "after failed tries")
	if err := w.pic.B.Netlink().LinkDel(taken); err != nil {
		t.Fatal(err)
	}
	if err := open(); err != nil {
		t.Fatal(err)
	}
	send("")
	w.settle(nil)
	for i := range 4 {
		if got := w.captures(word(i + 11)); len(got) > 0 {
			t.Errorf("%d of the host's packets for a peer left, the first to %v by %s", len(got), got[0].packet.Dst, got[0].where)
		}
	}
	if drift := w.inspect(w.enforce(meshOf(grants{ann: all}))).Drift; len(drift) > 0 {
		t.Errorf("after the recovery: %v", drift)
	}
	w.close()
	if diff := before.Diff(w.snapshot()); len(diff) > 0 {
		t.Errorf("the host isn't as it was: %v", diff)
	}
	t.Logf("%d packets that had to stay", tries)
}

// takeTable replaces our table by one that another program owns (NFT_TABLE_F_OWNER) until
// it is closed.
func (w *world) takeTable() io.Closer {
	w.t.Helper()
	named := func(kind int, attrs ...mdnetlink.Attribute) mdnetlink.Message {
		b, err := mdnetlink.MarshalAttributes(append([]mdnetlink.Attribute{{Type: unix.NFTA_TABLE_NAME, Data: []byte(tableName + "\x00")}}, attrs...))
		if err != nil {
			w.t.Fatal(err)
		}
		m := tableMessage(kind, mdnetlink.Create)
		m.Data = append(m.Data[:nfgenmsg:nfgenmsg], b...)
		return m
	}
	take := named(unix.NFT_MSG_NEWTABLE, mdnetlink.Attribute{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, tableFlagOwner)})
	take.Header.Flags |= mdnetlink.Acknowledge
	var c *nlconn.Conn
	w.do(func() (err error) {
		if c, err = nlconn.Dial(unix.NETLINK_NETFILTER); err != nil {
			return err
		}
		return transact(c, named(unix.NFT_MSG_DELTABLE), take)
	})
	w.t.Cleanup(func() { c.Close() })
	return c
}

// TestLostTableKeepsPeersIn deletes the table and blocks its name, so that not even the
// closed table can be loaded. The host's packets to peers go into the mesh, to the guard,
// and don't leave the host.
func TestLostTableKeepsPeersIn(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	before := w.snapshot()
	w.open()
	w.enforce(meshOf(grants{ann: all}))
	var senders []*net.UDPConn
	for _, from := range []netip.Addr{own4, netlab.Addresses().BUplink.V4, own6, netlab.Addresses().BUplink.V6} {
		senders = append(senders, w.socket(netip.AddrPortFrom(from, 0)))
	}
	other := w.takeTable()
	err := w.pic.B.Do(func() error {
		_, err := w.round(meshOf(grants{ann: mesh.Incoming}))
		return err
	})
	var step *host.StepError
	if !errors.As(err, &step) || step.Step != StepTable {
		t.Fatalf("Enforce where no table can be loaded: %v", err)
	}
	if f := w.p.forward.now(meshName); f.IPv4 || f.IPv6 {
		t.Errorf("without a table the host forwards: %+v", f)
	}
	words := [][]byte{word(1), word(2), word(3), word(4)}
	for i, c := range senders {
		to := netip.AddrPortFrom([]netip.Addr{ann4, ann6}[i/2], 5000)
		if _, err := c.WriteToUDPAddrPort(words[i], to); err != nil {
			t.Errorf("send from %v to %v: %v", c.LocalAddr(), to, err)
		}
	}
	w.settle(words)
	for i, b := range words {
		for _, got := range w.captures(b) {
			if got.where != "mesh" {
				t.Errorf("packet %d of the host's for a peer left to %v by %s", i, got.packet.Dst, got.where)
			}
		}
	}
	if err := other.Close(); err != nil { // the kernel then deletes the table, asynchronously
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		there := false
		w.do(func() (err error) {
			there, err = w.p.filter.present()
			return err
		})
		if !there {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the other program's table stays")
		}
	}
	if drift := w.inspect(w.enforce(meshOf(grants{ann: all}))).Drift; len(drift) > 0 {
		t.Errorf("after the recovery: %v", drift)
	}
	w.close()
	if diff := before.Diff(w.snapshot()); len(diff) > 0 {
		t.Errorf("the host isn't as it was: %v", diff)
	}
}

// TestFailedStartKeepsPeersIn starts a helper after a killed one, and fails the start.
func TestFailedStartKeepsPeersIn(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	before := w.snapshot()
	w.open()
	w.enforce(meshOf(grants{ann: all}))
	cfg := w.p.cfg
	w.die()
	taken := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: meshName}, PeerName: "other1"}
	if err := w.pic.B.Netlink().LinkAdd(taken); err != nil {
		t.Fatal(err)
	}
	err := w.pic.B.Do(func() error {
		p, err := New(Options{StateDir: w.state})
		if err != nil {
			return err
		}
		defer func() { p.unlock(); p.release() }()
		_, err = p.Open(context.Background(), cfg)
		return err
	})
	if err == nil {
		t.Fatal("Open succeeded although the name is taken")
	}
	n := 0
	w.closedToOutside(&n, "after a failed start")
	if err := w.pic.B.Netlink().LinkDel(taken); err != nil {
		t.Fatal(err)
	}
	w.open()
	w.close()
	if diff := before.Diff(w.snapshot()); len(diff) > 0 {
		t.Errorf("the host isn't as it was: %v", diff)
	}
}

// elements reads a set of our table.
func (g *rig) elements(set string) (es []nftables.SetElement) {
	g.t.Helper()
	g.do(func() (err error) {
		es, err = g.p.filter.lists.GetSetElements(&nftables.Set{Table: ourTable(), Name: set})
		return err
	})
	return es
}

func TestOnlyOneHelper(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	g.enforce(meshOf(grants{ann: all}))
	before := g.snapshot()
	err := g.pic.B.Do(func() error {
		p, err := New(Options{StateDir: t.TempDir()})
		if err != nil {
			return err
		}
		defer p.release()
		_, err = p.Open(context.Background(), host.Interface{Name: "other0", MTU: testMTU, Addresses: []netip.Addr{own4, own6}})
		return err
	})
	var step *host.StepError
	if !errors.As(err, &step) || step.Step != StepLock || step.Hint == "" || !strings.Contains(err.Error(), "process") {
		t.Errorf("the second helper got %v", err)
	}
	if diff := before.Diff(g.snapshot()); len(diff) > 0 {
		t.Errorf("the second helper changed %v", diff)
	}
}

func TestOpenRefuses(t *testing.T) {
	g := newRig(t)
	if err := g.pic.B.Netlink().LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "taken0"}, PeerName: "taken1"}); err != nil {
		t.Fatal(err)
	}
	before := g.snapshot()
	good := host.Interface{Name: meshName, MTU: testMTU, Addresses: []netip.Addr{own4, own6}}
	for _, tt := range []struct {
		name, journal, want string
		change              func(*host.Interface)
	}{
		{"small MTU", "", "MTU 1279", func(i *host.Interface) { i.MTU = 1279 }},
		{"long name", "", "more-than-fifteen", func(i *host.Interface) { i.Name = "more-than-fifteen" }},
		{"name taken", "", "taken0", func(i *host.Interface) { i.Name = "taken0" }},
		{"damaged journal", "{", "read journal", nil},
		{"newer journal", `{"version":9,"boot":"` + bootID() + `"}`, "version 9", nil},
		{"forged journal", `{"version":1,"boot":"` + bootID() + `","changed":[{"name":"../kernel/panic","found":"1","set":"0"}]}`, "not ours", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if tt.journal != "" {
				if err := os.WriteFile(filepath.Join(dir, journalName), []byte(tt.journal), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cfg := good
			if tt.change != nil {
				tt.change(&cfg)
			}
			err := g.pic.B.Do(func() error {
				p, err := New(Options{StateDir: dir})
				if err != nil {
					return err
				}
				defer p.release()
				_, err = p.Open(context.Background(), cfg)
				return err
			})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
			if diff := before.Diff(g.snapshot()); len(diff) > 0 {
				t.Errorf("it changed %v", diff)
			}
		})
	}
}

// TestDriftIsFoundAndRepaired undoes what was enforced, one thing at a time.
func TestDriftIsFoundAndRepaired(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	m := meshOf(grants{ann: all})
	changes, stop := g.watch()
	defer stop()
	for _, tt := range []struct {
		name string
		do   func() error
		want string
	}{
		{"table deleted", g.change(func(c *nftables.Conn) { c.DelTable(ourTable()) }), "is gone"},
		{"table flushed", g.change(func(c *nftables.Conn) { c.FlushTable(ourTable()) }), "differs"},
		{"rule inserted", g.change(func(c *nftables.Conn) {
			c.InsertRule(&nftables.Rule{Table: ourTable(), Chain: &nftables.Chain{Name: "judge", Table: ourTable()},
				Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}})
		}), "chain judge differs"},
		{"element added", g.change(func(c *nftables.Conn) {
			c.SetAddElements(&nftables.Set{Table: ourTable(), Name: "may_routing4", KeyType: nftables.TypeIPAddr},
				[]nftables.SetElement{{Key: bob4.AsSlice()}})
		}), "set may_routing4 differs"},
		{"forwarding off", g.sysctl("net.ipv4.ip_forward", "0"), "forwarding"},
		{"IPv6 forwarding off", g.sysctl("net.ipv6.conf.all.forwarding", "0"), "ipv6/conf/all/forwarding is 0"},
		{"address deleted", func() error { return g.pic.B.DelAddr(meshName, single(own4)) }, "address 100.64.0.1 is missing"},
		{"route deleted", func() error { return g.pic.B.DelRoute(netlab.Route{To: single(ann4), Link: meshName}) }, "1 routes"},
		{"interface renamed", func() error {
			l, err := g.pic.B.Netlink().LinkByName(meshName)
			if err != nil {
				return err
			}
			return errors.Join(g.pic.B.SetUp(meshName, false), g.pic.B.Netlink().LinkSetName(l, "else0"))
		}, "is gone"},
		{"uplink renamed", func() error {
			l, err := g.pic.B.Netlink().LinkByName(netlab.Uplink)
			if err != nil {
				return err
			}
			// The routes disappear when it is down; another default route stays.
			return errors.Join(g.pic.B.SetUp(netlab.Uplink, false), g.pic.B.Netlink().LinkSetName(l, "else1"),
				g.pic.B.SetUp("else1", true))
		}, ""},
		{"interface down", func() error { return g.pic.B.SetUp(meshName, false) }, "missing"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := g.enforce(m)
			if drift := g.inspect(r).Drift; len(drift) > 0 {
				t.Fatalf("before: %v", drift)
			}
			if tt.name == "forwarding off" {
				// Writing 0 over 0 does nothing in the kernel.
				if err := g.pic.B.SetSysctl("net.ipv4.ip_forward", "1"); err != nil {
					t.Fatal(err)
				}
			}
			seen := changes.Load()
			if err := tt.do(); err != nil {
				t.Fatal(err)
			}
			deadline := time.Now().Add(10 * time.Second)
			for changes.Load() == seen && time.Now().Before(deadline) {
				time.Sleep(time.Millisecond)
			}
			if changes.Load() == seen {
				t.Error("Watch saw nothing")
			}
			drift := g.inspect(r).Drift
			if tt.want != "" && (len(drift) == 0 || !strings.Contains(drift[0].Message, tt.want)) {
				t.Errorf("drift is %v, want %q", drift, tt.want)
			}
			r = g.enforce(m)
			if drift := g.inspect(r).Drift; len(drift) > 0 {
				t.Errorf("after the repair: %v", drift)
			}
		})
	}
}

// watch counts the reports of Watch until stop is called. It switches router
// advertisements off, so that only the test's own changes are reported.
func (g *rig) watch() (seen *atomic.Int64, stop func()) {
	if err := g.pic.B.SetSysctl("net.ipv6.conf."+netlab.Uplink+".accept_ra", "0"); err != nil {
		g.t.Fatal(err)
	}
	var n atomic.Int64
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- g.p.Watch(ctx, func() { n.Add(1) }) }()
	return &n, func() {
		cancel()
		if err := <-ended; err != nil {
			g.t.Error("watch:", err)
		}
	}
}

// change commits a transaction as another program.
func (g *rig) change(f func(*nftables.Conn)) func() error {
	return func() error {
		return g.pic.B.Do(func() error {
			c, err := nftables.New()
			if err != nil {
				return err
			}
			f(c)
			return c.Flush()
		})
	}
}

func (g *rig) sysctl(name, value string) func() error {
	return func() error { return g.pic.B.SetSysctl(name, value) }
}

// TestWatchAgain watches twice in a row, and once more after a socket failed.
func TestWatchAgain(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	for _, value := range []string{"1", "0"} {
		seen, stop := g.watch()
		g.reports(seen, g.sysctl("net.ipv4.conf.all.forwarding", value))
		stop()
	}
	sockets, err := ask(t.Context(), g.p, openWatch)
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error, 1)
	go func() { failed <- sockets.watch(t.Context(), func() {}) }()
	if err := sockets.rules.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err == nil {
		t.Error("a socket failed, and the watch ended without an error")
	}
	seen, stop := g.watch()
	defer stop()
	g.reports(seen, g.sysctl("net.ipv4.conf.all.forwarding", "1"))
}

// TestWatchNexthops changes the way of a default route by its nexthop object alone, for
// which the kernel sends no route message.
func TestWatchNexthops(t *testing.T) {
	g := newRig(t)
	if err := g.pic.B.SetSysctl("net.ipv4.nexthop_compat_mode", "0"); err != nil {
		t.Skip("this kernel has no nexthops of their own:", err)
	}
	g.ip(g.pic.B, "nexthop add id 7 via "+netlab.Addresses().W.V4.String()+" dev wan0\nroute replace default nhid 7")
	g.open()
	defer g.close()
	seen, stop := g.watch()
	defer stop()
	g.reports(seen, func() error {
		g.ip(g.pic.B, "nexthop replace id 7 via 203.0.113.130 dev pub0")
		return nil
	})
}

// TestRenewedAddressIsNoChange has a router advertise every second: of the kernel's
// messages about the address only those count that change it.
func TestRenewedAddressIsNoChange(t *testing.T) {
	g := newRig(t)
	var c *nlconn.Conn
	if err := g.pic.B.Do(func() (err error) {
		c, err = subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV6_IFADDR)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	news := &addressTracker{}
	matters := func() bool {
		t.Helper()
		ms, err := c.Receive()
		if err != nil {
			t.Fatal(err)
		}
		return news.anyChange(ms)
	}
	for range 2 {
		if !matters() || matters() || matters() {
			t.Error("of three advertisements not just the first is news")
		}
		if !news.anyChange(nil) {
			t.Error("that messages were lost is no news")
		}
	}
	h := g.pic.B.Netlink()
	link, err := h.LinkByName(netlab.Uplink)
	if err != nil {
		t.Fatal(err)
	}
	all, err := h.AddrList(link, netlink.FAMILY_V6)
	if err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(all, func(a netlink.Addr) bool {
		return a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&unix.IFA_F_PERMANENT == 0
	})
	if at < 0 {
		t.Fatalf("no address by advertisement among %v", all)
	}
	matters() // the state that is known from now on
	deprecated := all[at]
	deprecated.PreferedLft, deprecated.ValidLft = 0, 3600
	for _, change := range []func() error{
		func() error { return h.AddrReplace(link, &deprecated) },
		func() error { return h.AddrDel(link, &all[at]) },
	} {
		if err := change(); err != nil {
			t.Fatal(err)
		}
		for !matters() { // advertisements may come first
		}
	}
	for !matters() { // the next advertisement restores it
	}
}

// reports checks that a change is reported.
func (g *rig) reports(seen *atomic.Int64, change func() error) {
	g.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); seen.Load() == 0 && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
	}
	time.Sleep(20 * time.Millisecond)
	before := seen.Load()
	if before == 0 {
		g.t.Fatal("it doesn't begin with a report")
	}
	if err := change(); err != nil {
		g.t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); seen.Load() == before; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			g.t.Fatal("a change isn't reported")
		}
	}
}

// TestForwardingThatOthersNeedStays starts Docker while the helper runs.
func TestForwardingThatOthersNeedStays(t *testing.T) {
	g := newRig(t)
	g.open()
	g.enforce(meshOf(grants{ann: all}))
	if err := g.pic.B.SetSysctl("net.ipv4.ip_forward", "1"); err != nil {
		t.Fatal(err)
	}
	if r := g.enforce(meshOf(grants{ann: all})); !r.Host().FoundForwarding.IPv4 {
		t.Error("forwarding that another program switched on isn't found")
	}
	left := g.close()
	if len(left) != 1 || !strings.Contains(left[0].Message, "ip_forward") {
		t.Errorf("left: %v", left)
	}
	if v, err := g.pic.B.Sysctl("net/ipv4/conf/" + netlab.LAN + "/forwarding"); err != nil || v != "1" {
		t.Errorf("forwarding of the LAN's interface is %q, %v", v, err)
	}
}

// TestRedirectsOfOthersDontOpen redirects a peer's packets by other software's rules.
func TestRedirectsOfOthersDontOpen(t *testing.T) {
	w := newWorld(t)
	a := netlab.Addresses()
	w.software(nftables.TableFamilyIPv4, "ports", func(f foreign) {
		c := f.conn.AddChain(&nftables.Chain{Name: "pre", Table: f.table, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest})
		f.rule(c, []expr.Any{&expr.Immediate{Register: 1, Data: a.L.V4.AsSlice()},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: 2, RegAddrMin: 1}})
	})
	w.open()
	defer w.close()
	for n, have := range []mesh.Permissions{0, mesh.Incoming, mesh.Routing, all} {
		w.enforce(meshOf(grants{ann: have}))
		for i, to := range []netip.Addr{own4, a.BUplink.V4, a.I.V4, bob4} {
			id := 10*n + i
			w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, uint16(6000+id)), netip.AddrPortFrom(to, 7000), word(id)))
			w.settle(nil)
			if got := w.captures(word(id)); len(got) > 0 {
				t.Errorf("with %v, a packet to %v was redirected to %v by %s", have, to, got[0].packet.Dst, got[0].where)
			}
		}
	}
}

// TestRewrittenWithoutFlow has other software exclude a packet from the internet from
// conntrack and forward it to a peer: it belongs to no flow, so it can't be an answer.
func TestRewrittenWithoutFlow(t *testing.T) {
	w := newWorld(t)
	a := netlab.Addresses()
	w.software(nftables.TableFamilyIPv4, "rewriter", func(f foreign) {
		c := f.conn.AddChain(&nftables.Chain{Name: "pre", Table: f.table, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw})
		f.rule(c, sourceIn(single(a.I.V4)), []expr.Any{
			&expr.Notrack{}, &expr.Immediate{Register: 1, Data: ann4.AsSlice()},
			&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1, Base: expr.PayloadBaseNetworkHeader,
				Offset: 16, Len: 4, CsumType: expr.CsumTypeInet, CsumOffset: 10, CsumFlags: unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR},
		})
	})
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: all}))
	quoted := netlab.UDPPacket(netip.AddrPortFrom(ann4, 5000), netip.AddrPortFrom(a.I.V4, 4000), word(2))
	for i, packet := range [][]byte{
		netlab.UDPPacket(netip.AddrPortFrom(a.I.V4, 4000), netip.AddrPortFrom(a.BUplink.V4, 5000), word(1)),
		netlab.ICMPPacket(a.I.V4, a.BUplink.V4, 3, 1, 0, quoted),
	} {
		if err := w.pic.I.Forge("eth0", packet); err != nil {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
		w.settle(nil)
		if got := slices.DeleteFunc(w.captures(word(i+1)), func(g capture) bool { return !strings.HasPrefix(g.where, "mesh") }); len(got) > 0 {
			t.Errorf("packet %d reached the peer: %v", i+1, got)
		}
	}
}

// TestNewAddressIsClosed gives the host an address that the backend hasn't observed yet:
// the kernel's own hooks know it.
func TestNewAddressIsClosed(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: all}))
	addr := netip.MustParseAddr("198.51.100.200")
	if err := w.pic.B.AddAddr(netlab.Public, single(addr)); err != nil {
		t.Fatal(err)
	}
	w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, 4000), netip.AddrPortFrom(addr, 5000), word(1)))
	w.settle(nil)
	if got := w.captures(word(1)); len(got) > 0 {
		t.Errorf("an address that isn't known yet was reached: %v", got)
	}
	w.enforce(meshOf(grants{ann: all}))
	w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, 4001), netip.AddrPortFrom(addr, 5000), word(2)))
	w.settle([][]byte{word(2)})
	if got := w.captures(word(2)); !once(got, "host") {
		t.Errorf("a known address isn't reached: %v", got)
	}
}

// TestSegmentsFitTheTunnel checks the MSS of SYNs in both directions.
func TestSegmentsFitTheTunnel(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: all}))
	// No host exists that could answer.
	for i, far := range []netip.Addr{netip.MustParseAddr("8.8.8.8"), netip.MustParseAddr("2001:4860::8888")} {
		src := netip.AddrPortFrom([]netip.Addr{ann4, ann6}[i], 4000)
		to := netip.AddrPortFrom(far, 5000)
		want := testMTU - []int{40, 60}[i]
		w.inject(withMSS(netlab.TCPPacket(src, to, netlab.SYN, 1, 0, word(2*i)), 1460))
		w.settle([][]byte{word(2 * i)})
		got := w.arrivals(word(2 * i))
		if len(got) != 1 || got[0].packet.MSS != want {
			t.Fatalf("the SYN left with %v, want an MSS of %d", got, want)
		}
		near := netip.AddrPortFrom(got[0].packet.Src, got[0].packet.SrcPort)
		w.send(netlab.Uplink, withMSS(netlab.TCPPacket(to, near, netlab.SYN|netlab.ACK, 1, 2+wordSize, word(2*i+1)), 1460))
		w.settle([][]byte{word(2*i + 1)})
		if got := w.arrivals(word(2*i + 1)); len(got) != 1 || got[0].packet.MSS != want {
			t.Errorf("the SYN+ACK came in with %v, want an MSS of %d", got, want)
		}
	}
}

// withMSS adds the MSS option to a segment without options.
func withMSS(packet []byte, mss uint16) []byte {
	p, _ := netlab.ParsePacket(packet)
	header := len(packet) - len(p.Payload) - 20
	t := append([]byte(nil), packet[header:header+20]...)
	t[12], t[16], t[17] = 6<<4, 0, 0
	t = append(t, 2, 4, byte(mss>>8), byte(mss))
	return netlab.IPPacket(p.Src, p.Dst, policy.ProtoTCP, append(t, p.Payload...))
}

// TestReplacedTableHolds reloads the table in a loop while the host sends to an
// unassigned mesh address, and a peer with only routing to a private address behind the
// uplink. The kernel activates a new table's rules before its interval sets; neither
// packet may get out because of that.
func TestReplacedTableHolds(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: mesh.Routing}))
	var done atomic.Bool
	var sent [2]atomic.Int64
	var sending errgroup.Group
	sending.Go(func() error {
		return w.pic.B.Do(func() error {
			conn, err := net.Dial("udp4", netip.AddrPortFrom(unassigned4, 4000).String())
			if err != nil {
				return err
			}
			defer conn.Close()
			for !done.Load() {
				_, _ = conn.Write(word(1)) // mostly refused, as it should be
				sent[0].Add(1)
			}
			return nil
		})
	})
	sending.Go(func() error {
		private := netip.AddrPortFrom(netip.MustParseAddr("10.99.9.9"), 4000)
		for !done.Load() {
			w.inject(netlab.UDPPacket(netip.AddrPortFrom(ann4, 4000), private, word(2)))
			sent[1].Add(1)
		}
		return nil
	})
	loads := 0
	w.do(func() error {
		for begin := time.Now(); loads < 100 && time.Since(begin) < 10*time.Second; loads++ {
			if err := w.p.filter.load(w.p.filter.loaded); err != nil {
				return err
			}
		}
		return nil
	})
	done.Store(true)
	if err := sending.Wait(); err != nil {
		t.Fatal(err)
	}
	w.settle(nil)
	for i, who := range []string{"the host to an unassigned address", "a peer to a private address"} {
		if got := w.captures(word(i + 1)); len(got) > 0 {
			t.Errorf("%s: %d packets of %d got out, the first to %v by %s", who, len(got), sent[i].Load(), got[0].packet.Dst, got[0].where)
		}
	}
	t.Logf("%d loads, %d packets of the host and %d of a peer", loads, sent[0].Load(), sent[1].Load())
}
