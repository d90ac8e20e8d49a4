package linux

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// Cut implements the daemon's contract. The table already judges each packet by
// the opener of its flow, so that flows through the host are dead since Enforce.
// What is left are flows to the host itself: once conntrack forgets one, the
// host's next packet would look like a flow that the host opens. So the host's
// end stays closed for as long as the flow would have lived. The entries stay
// too: as long as an end sends, they remember the opener of the flow.
func (p *Platform) Cut(ctx context.Context, r *policy.Ruleset, narrowed []policy.Narrowed) error {
	if len(narrowed) == 0 {
		return nil
	}
	return p.run(ctx, func() error {
		return p.step(ctx, StepCut, func() error {
			dead, err := deadFlows(p.nl, r, narrowed)
			if err != nil {
				return err
			}
			return p.filter.addCut(dead)
		})
	})
}

// deadFlow is the host's side of a flow that was cut.
type deadFlow struct {
	family family
	key    []byte // host's address, peer's address, protocol, host's port, peer's port
	left   time.Duration
}

// deadFlows lists the flows to the host that narrowed peers opened and may not
// open any more.
func deadFlows(nl *netlink.Handle, r *policy.Ruleset, narrowed []policy.Narrowed) ([]deadFlow, error) {
	theirs := map[netip.Addr]bool{}
	for _, n := range narrowed {
		for _, a := range n.Addresses {
			theirs[a] = true
		}
	}
	var out []deadFlow
	for i, inet := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		flows, err := nl.ConntrackTableList(netlink.ConntrackTable, inet)
		if err != nil {
			return nil, fmt.Errorf("list flows: %w", err)
		}
		for _, f := range flows {
			if !theirs[addrOf(f.Forward.SrcIP)] || !hasPorts(f.Forward.Protocol) || r.Decide(opener(r, f)).Pass {
				continue
			}
			if r.Class(addrOf(f.Forward.DstIP)) == policy.Self {
				out = append(out, deadFlow{families[i], deadKey(f), lifetime(f)})
			}
		}
	}
	return out, nil
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// hasPorts reports whether a protocol that passes has ports. ICMP needs none of
// this: conntrack lets no end open a flow with an answer.
func hasPorts(proto uint8) bool { return proto == unix.IPPROTO_TCP || proto == unix.IPPROTO_UDP }

// opener is the packet that opened a flow.
func opener(r *policy.Ruleset, f *netlink.ConntrackFlow) policy.Packet {
	return policy.Packet{
		In: r.Host().Interface, Src: addrOf(f.Forward.SrcIP), Dst: addrOf(f.Forward.DstIP),
		Proto: f.Forward.Protocol, SrcPort: f.Forward.SrcPort, DstPort: f.Forward.DstPort,
	}
}

// deadKey is what the host's packets of the flow look like, in the layout of a
// concatenated key: each part fills whole words of 32 bits.
func deadKey(f *netlink.ConntrackFlow) []byte {
	t := f.Reverse
	port := func(p uint16) []byte { return []byte{byte(p >> 8), byte(p), 0, 0} }
	return slices.Concat(addrOf(t.SrcIP).AsSlice(), addrOf(t.DstIP).AsSlice(),
		[]byte{t.Protocol, 0, 0, 0}, port(t.SrcPort), port(t.DstPort))
}

// minLifetime covers flows that are about to end, and whose ends don't know it.
const minLifetime = time.Minute

func lifetime(f *netlink.ConntrackFlow) time.Duration {
	return max(time.Duration(f.TimeOut)*time.Second, minLifetime)
}

// addCut closes the host's side of flows for their lifetime.
func (f *filter) addCut(dead []deadFlow) error {
	if len(dead) == 0 {
		return nil
	}
	for _, fam := range families {
		var es []nftables.SetElement
		for _, d := range dead {
			if d.family.suffix == fam.suffix {
				es = append(es, nftables.SetElement{Key: d.key, Timeout: d.left})
			}
		}
		s := cutSet(fam)
		ns, err := nftSet(ourTable(), &s)
		if err != nil {
			return err
		}
		if err := f.eachChunk(ns, es, f.conn.SetAddElements); err != nil {
			return err
		}
	}
	if err := f.commit(); err != nil {
		return fmt.Errorf("close %d flows: %w", len(dead), err)
	}
	return nil
}
