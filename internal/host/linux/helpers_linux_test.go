package linux

import (
	"net/netip"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// TestNoFlowWithAHelper assigns conntrack's IRC helper to flows through the host. A
// helper makes the kernel expect a connection to a port that a peer names, possibly one
// of the host's, and translate it to the peer. So a peer's flow with a helper isn't
// forwarded, and nothing is expected.
func TestNoFlowWithAHelper(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: all}))
	const irc = 6667
	if err := w.pic.B.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "follow"})
		c.AddObj(&nftables.NamedObj{Table: table, Name: "irc", Type: nftables.ObjTypeCtHelper, Obj: &expr.CtHelper{Name: "irc", L3Proto: unix.NFPROTO_IPV4, L4Proto: unix.IPPROTO_TCP}})
		for name, hook := range map[string]*nftables.ChainHook{"pre": nftables.ChainHookPrerouting, "post": nftables.ChainHookPostrouting} {
			at := irc
			if name == "post" {
				at++
			}
			chain := c.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter})
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: port(uint16(at))},
				&expr.Objref{Type: int(nftables.ObjTypeCtHelper), Name: "irc"}}})
		}
		return c.Flush()
	}); err != nil {
		t.Skip("the kernel has no helper for IRC:", err)
	}
	far := netlab.Addresses().I.V4
	for n, to := range map[int]uint16{1: irc, 2: irc + 1, 3: irc + 2} {
		w.inject(netlab.TCPPacket(netip.AddrPortFrom(ann4, 4000), netip.AddrPortFrom(far, to), netlab.SYN, 100, 0, word(n)))
	}
	w.inject(netlab.TCPPacket(netip.AddrPortFrom(ann4, 4001), netip.AddrPortFrom(own4, irc), netlab.SYN, 100, 0, word(4)))
	w.settle([][]byte{word(3), word(4)})
	if len(w.arrivals(word(4))) != 1 {
		t.Error("the host's own server isn't reached when a helper follows it")
	}
	if len(w.arrivals(word(3))) != 1 {
		t.Fatal("a flow without a helper wasn't forwarded, so nothing is proved")
	}
	for n := 1; n <= 2; n++ {
		if got := w.arrivals(word(n)); len(got) > 0 {
			t.Errorf("a flow with a helper came out at %v", got)
		}
	}
	for _, e := range w.conntrackOf(ann4) {
		if e.orig.dst != own4 && e.orig.dport != irc+2 {
			t.Errorf("a flow with a helper is in conntrack: %+v", e)
		}
	}
}
