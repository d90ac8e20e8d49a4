package trial

// Other programs that change what the helper enforces, and how soon the helper repairs
// it.

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// drift is a change that another program makes to B. well reports whether the helper has
// handled it.
type drift struct {
	name string
	do   func(*hurt) error
	well func(*hurt) bool
	// undo reverts a change that the helper can't repair.
	undo func(*hurt) error // optional
	// filter means that the packet filter is missing meanwhile. It alone stops packets
	// that neither come from a peer nor go to one.
	filter bool
	// open means that B is configured to forward for all hosts, so that transit is
	// wanted.
	open bool
}

// hurt is B while another program changes it.
type hurt struct {
	*Mesh
	iface  string
	client *http.Client
	lines  int // of the complete packet filter
}

func (h *hurt) status() (s Status) {
	_ = ask(h.client, "GET", "/v1/status", nil, &s) // without an answer, the zero status
	return s
}

// ruleset lists nftables' contents without the elements of cut and counted flows, which
// change all the time.
func (h *hurt) ruleset() []string {
	lines, err := h.B.Ruleset()
	if err != nil {
		return nil // the ruleset changed while it was read
	}
	return slices.DeleteFunc(lines, func(l string) bool {
		return strings.HasPrefix(l, "element") && (strings.Contains(l, `"cut`) || strings.Contains(l, `"flows`))
	})
}

func (h *hurt) nft(change func(*nftables.Conn, *nftables.Table) error) error {
	return h.B.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		if err := change(c, &nftables.Table{Family: nftables.TableFamilyINet, Name: "meshhelper"}); err != nil {
			return err
		}
		return c.Flush()
	})
}

func (h *hurt) sysctl(name, want string) bool {
	got, err := h.B.Sysctl(name)
	return err == nil && got == want
}

func (h *hurt) addressed() bool {
	have, err := h.B.Addrs(h.iface)
	return err == nil && len(have) == 2
}

// routed reports whether every peer is routed by the mesh interface.
func (h *hurt) routed() bool {
	link, err := h.B.Netlink().LinkByName(h.iface)
	if err != nil {
		return false
	}
	for _, p := range h.Peers {
		for _, a := range p.Addresses.List() {
			routes, err := h.B.Netlink().RouteGet(a.AsSlice())
			if err != nil || len(routes) == 0 || routes[0].LinkIndex != link.Attrs().Index {
				return false
			}
		}
	}
	return true
}

// link changes the mesh interface.
func (h *hurt) link(change func(*nlconn.Handle, netlink.Link) error) error {
	l, err := h.B.Netlink().LinkByName(h.iface)
	if err != nil {
		return err
	}
	return change(h.B.Netlink(), l)
}

func (h *hurt) rename(from, to string) error {
	nl := h.B.Netlink()
	l, err := nl.LinkByName(from)
	if err != nil {
		return err
	}
	err = nl.LinkSetName(l, to)
	if errors.Is(err, syscall.EBUSY) { // kernels before 6.2 require the link to be down
		err = errors.Join(nl.LinkSetDown(l), nl.LinkSetName(l, to), nl.LinkSetUp(l))
	}
	return err
}

// whole reports whether the packet filter has as many lines as before the changes.
func (h *hurt) whole() bool { return len(h.ruleset()) == h.lines }

var defaultRoute = netip.MustParsePrefix("0.0.0.0/0")

// drifts are the changes that another program makes. Forwarding for all comes last: B's
// owner wants transit from then on.
var drifts = []drift{
	{name: "the whole ruleset is flushed", filter: true, well: (*hurt).whole, do: func(h *hurt) error {
		return h.nft(func(c *nftables.Conn, _ *nftables.Table) error { c.FlushRuleset(); return nil })
	}},
	{name: "our table is deleted", filter: true, well: (*hurt).whole, do: func(h *hurt) error {
		return h.nft(func(c *nftables.Conn, table *nftables.Table) error { c.DelTable(table); return nil })
	}},
	{name: "a chain's rules are deleted", filter: true, well: (*hurt).whole, do: func(h *hurt) error {
		return h.nft(func(c *nftables.Conn, table *nftables.Table) error {
			c.FlushChain(&nftables.Chain{Name: "from_mesh", Table: table})
			return nil
		})
	}},
	{name: "an element of a set is deleted", filter: true, well: (*hurt).whole, do: func(h *hurt) error {
		return h.nft(func(c *nftables.Conn, table *nftables.Table) error {
			set, err := c.GetSetByName(table, "peers4")
			if err != nil {
				return err
			}
			elements, err := c.GetSetElements(set)
			if err != nil || len(elements) == 0 {
				return fmt.Errorf("the set has %d elements: %w", len(elements), err)
			}
			return c.SetDeleteElements(set, elements[:1])
		})
	}},
	{name: "IPv4 forwarding is switched off",
		do:   func(h *hurt) error { return h.B.SetSysctl("net.ipv4.conf."+h.iface+".forwarding", "0") },
		well: func(h *hurt) bool { return h.sysctl("net.ipv4.conf."+h.iface+".forwarding", "1") }},
	{name: "IPv6 forwarding is switched off",
		do:   func(h *hurt) error { return h.B.SetSysctl("net.ipv6.conf.all.forwarding", "0") },
		well: func(h *hurt) bool { return h.sysctl("net.ipv6.conf.all.forwarding", "1") }},
	{name: "the tunnel's addresses are deleted", well: (*hurt).addressed, do: func(h *hurt) error {
		have, err := h.B.Addrs(h.iface)
		for _, a := range have {
			err = errors.Join(err, h.B.DelAddr(h.iface, a))
		}
		return err
	}},
	{name: "the routes to peers are deleted", well: (*hurt).routed, do: func(h *hurt) error {
		return h.link(func(nl *nlconn.Handle, l netlink.Link) error {
			routes, err := nl.RouteList(l, netlink.FAMILY_V4)
			for _, r := range routes {
				err = errors.Join(err, nl.RouteDel(&r))
			}
			return err
		})
	}},
	{name: "a peer gets another route", well: (*hurt).routed, do: func(h *hurt) error {
		a := h.Peers["A"].Addresses.V4
		return h.B.AddRoute(netlab.Route{To: netip.PrefixFrom(a, 32), Via: netlab.Addresses().L.V4})
	}},
	{name: "the mesh interface is renamed", well: (*hurt).addressed,
		do: func(h *hurt) error { return h.rename(h.iface, "stolen0") }},
	{name: "the mesh interface is set down", well: (*hurt).routed,
		do: func(h *hurt) error { return h.B.SetUp(h.iface, false) }},
	{name: "the uplink changes",
		do: func(h *hurt) error {
			return h.B.AddRoute(netlab.Route{To: defaultRoute, Via: netlab.Addresses().P.V4})
		},
		well: func(h *hurt) bool { return h.status().Uplink == netlab.Public },
		undo: func(h *hurt) error {
			return h.B.AddRoute(netlab.Route{To: defaultRoute, Via: netlab.Addresses().W.V4})
		}},
	{name: "the uplink is renamed",
		do:   func(h *hurt) error { return h.rename(netlab.Uplink, "wan9") },
		well: func(h *hurt) bool { return h.status().Uplink == "wan9" },
		undo: func(h *hurt) error { return h.rename("wan9", netlab.Uplink) }},
	{name: "the LAN's prefix is taken away",
		do: func(h *hurt) error {
			return h.B.DelAddr(netlab.LAN, netip.MustParsePrefix("192.168.77.1/24"))
		},
		well: func(h *hurt) bool {
			lines := h.ruleset()
			return lines != nil && !slices.ContainsFunc(lines, func(l string) bool {
				return strings.Contains(l, `"self4"`) && strings.Contains(l, "c0a84d01")
			})
		},
		undo: func(h *hurt) error {
			return h.B.AddAddr(netlab.LAN, netip.MustParsePrefix("192.168.77.1/24"))
		}},
	{name: "the mesh interface is deleted",
		do:   func(h *hurt) error { return h.link((*nlconn.Handle).LinkDel) },
		well: func(h *hurt) bool { return h.addressed() && h.routed() && h.status().State == "enforcing" }},
	{name: "forwarding is switched on for all", open: true,
		do: func(h *hurt) error { return h.B.SetSysctl("net.ipv4.ip_forward", "1") },
		// The filter no longer blocks forwarding that another program enabled.
		well: func(h *hurt) bool { return len(h.ruleset()) < h.lines }},
}

// within is the time limit for the helper's reaction. tries allows for a machine that is
// busy with something else.
const within, tries = time.Second, 8

// TestDrift has another program remove what the helper needs, one thing at a time.
// Packets that must not pass are sent meanwhile. The helper's own interval is 50 s here,
// so it must react to the kernel's notification.
func TestDrift(t *testing.T) {
	m := newQuietStage(t)
	if err := m.Start(t.Context(), "--tick", "50s"); err != nil {
		t.Fatal(err)
	}
	addPeers(t, m)
	do(t, m, "peer", "allow", "C", "routing")
	do(t, m, "peer", "allow", "D", "routing", "lan")
	s := status(t, m)
	h := &hurt{Mesh: m, iface: s.Interface, client: m.client(t)}
	h.lines = len(h.ruleset())
	p := startProber(t, m)
	p.guarded(true)
	for _, d := range drifts {
		took := within
		for n := 0; n < tries && took >= within; n++ {
			took = h.suffer(t, p, d, s.Address())
		}
		if took >= within {
			t.Errorf("%s: handled after %s, in the best of %d tries", d.name, took, tries)
		}
	}
	if !m.reaches(t, m.C, netlab.Addresses().I.V4, true) {
		t.Error("C doesn't reach I after the repairs")
	}
	t.Logf("%d drifts, %d repairs, %d packets sent that must not pass", len(drifts), status(t, m).Repairs, p.sent.Load())
}

// suffer makes the change, and returns how long B took to recover.
func (h *hurt) suffer(t *testing.T, p *prober, d drift, own netlab.Pair) time.Duration {
	t.Helper()
	p.fresh(p.never(own, !d.open))
	p.rounds(t, 1)
	start := time.Now()
	if err := d.do(h); err != nil {
		t.Fatalf("%s: %v", d.name, err)
	}
	h.await(t, d.name, func() bool { return d.well(h) })
	took := time.Since(start)
	p.rounds(t, 2)
	ofPeers, ofOthers := p.leaks()
	if len(ofPeers) > 0 || len(ofOthers) > 0 && !d.filter {
		t.Errorf("%s: leaks of peers' packets %q, of others' %q", d.name, ofPeers, ofOthers)
	}
	t.Logf("%-36s handled after %5d ms; %d leaks from or to peers, %d kinds of others' packets passed", d.name, took.Milliseconds(), len(ofPeers), len(ofOthers))
	if d.undo != nil {
		if err := d.undo(h); err != nil {
			t.Fatalf("undo: %s: %v", d.name, err)
		}
	}
	if !d.open {
		h.await(t, "well again after: "+d.name, func() bool {
			s := h.status()
			return s.State == "enforcing" && s.Enforced == s.Generation && s.Uplink == netlab.Uplink && h.whole() && h.routed()
		})
	}
	if err := h.Peers["C"].End.Renew(); err != nil {
		t.Fatal(err)
	}
	return took
}

// await polls the kernel until done reports true.
func (h *hurt) await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for until := time.Now().Add(generous); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("%s: not handled in %s; status %+v", what, generous, h.status())
		}
	}
}
