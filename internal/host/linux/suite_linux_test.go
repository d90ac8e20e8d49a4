package linux

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/host/hosttest"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// TestSuite runs the tests that every host must pass.
func TestSuite(t *testing.T) {
	hosttest.Run(t, hosttest.Harness{New: newComputer, Steps: []string{
		// StepAcceptRA is taken only with an uplink by router advertisements.
		StepLock, StepRepair, StepClosed, StepInterface, StepAddresses, StepAddRoutes, StepTable,
		StepJournal, StepForwarding, StepRestore, StepRemoveInterface, StepRemoveTable,
	}})
}

// newComputer adapts a world to the suite.
func newComputer(t *testing.T) *hosttest.Computer {
	w := newWorld(t)
	w.findForwarding("0")
	a := netlab.Addresses()
	n := 0
	return &hosttest.Computer{
		Start: func(step func(string)) (host.Host, error) {
			err := w.pic.B.Do(func() (err error) {
				w.p, err = New(Options{StateDir: w.state, Step: step, ResolverFiles: []string{w.resolvers()}})
				return err
			})
			if err != nil {
				return host.Host{}, err
			}
			return w.p.Host(), nil
		},
		Kill:      w.die,
		Interface: host.Interface{Name: meshName, MTU: testMTU, Addresses: []netip.Addr{own4, own6}, Prefixes: meshPrefixes()},
		Peers:     [2]mesh.Addresses{{ann4, ann6}, {bob4, bob6}},
		Neighbours: map[string][]netip.Addr{
			netlab.LAN: a.L.List(), netlab.Uplink: a.I.List(),
		},
		Destinations: []netip.Addr{
			a.I.V4, a.I.V6, a.L.V4, a.L.V6, a.BLAN.V4, a.BLAN.V6, a.BUplink.V4, a.BUplink.V6, unassigned4, unassigned6,
		},
		Send: func(packets []host.Packet, want []bool) []bool {
			if w.p != nil {
				w.dev = w.p.dev
			}
			words, waited := make([][]byte, len(packets)), [][]byte{}
			for i, p := range packets {
				n++
				words[i] = word(n)
				from, to := netip.AddrPortFrom(p.Src, p.SrcPort), netip.AddrPortFrom(p.Dst, p.DstPort)
				raw := netlab.TCPPacket(from, to, netlab.SYN, uint32(n), 0, words[i])
				if p.Proto == policy.ProtoUDP {
					raw = netlab.UDPPacket(from, to, words[i])
				}
				w.send(p.In, raw)
				if want[i] {
					waited = append(waited, words[i])
				}
			}
			w.settle(waited)
			out := make([]bool, len(packets))
			for i := range words {
				out[i] = len(w.arrivals(words[i])) > 0
			}
			return out
		},
		State: func() string {
			state := strings.Join(w.snapshot(), "\n")
			if w.journalExists() {
				state += "\na journal"
			}
			return state
		},
		Blind: func() func() {
			w.p.filter.sock.Close()
			w.p.filter.sock = newSilent()
			return func() {} // the host replaces it by itself
		},
		StopPeers: func() (func() error, error) {
			table := &nftables.Table{Family: nftables.TableFamilyINet, Name: "other"}
			drop := nftables.ChainPolicyDrop
			err := w.change(func(c *nftables.Conn) {
				c.AddTable(table)
				c.AddChain(&nftables.Chain{
					Table: table, Name: "forward", Type: nftables.ChainTypeFilter,
					Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop,
				})
			})()
			return w.change(func(c *nftables.Conn) { c.DelTable(table) }), err
		},
		Changes: map[string]func() error{
			"the table is deleted": w.change(func(c *nftables.Conn) { c.DelTable(ourTable()) }),
			"the table is flushed": w.change(func(c *nftables.Conn) { c.FlushTable(ourTable()) }),
			"an element is added":  w.addElement,
			"IPv4 forwarding is off": func() error {
				return errors.Join(w.sysctl("net.ipv4.ip_forward", "1")(), w.sysctl("net.ipv4.ip_forward", "0")())
			},
			"IPv6 forwarding is off":       w.sysctl("net.ipv6.conf.all.forwarding", "0"),
			"an address is deleted":        func() error { return w.pic.B.DelAddr(meshName, single(own4)) },
			"a route is deleted":           func() error { return w.pic.B.DelRoute(netlab.Route{To: single(ann4), Link: meshName}) },
			"the mesh interface goes down": func() error { return w.pic.B.SetUp(meshName, false) },
		},
		Sockets: w.pic.B.Do,
	}
}

// addElement grants routing to a peer as another program.
func (w *world) addElement() error {
	return w.change(func(c *nftables.Conn) {
		c.SetAddElements(&nftables.Set{Table: ourTable(), Name: "may_lan4", KeyType: nftables.TypeIPAddr},
			[]nftables.SetElement{{Key: bob4.AsSlice()}})
	})()
}
