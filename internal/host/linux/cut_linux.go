package linux

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// Cut implements [host.Enforcer]. The table judges each packet by the opener of its flow,
// so flows through the host stopped with Enforce. Two things remain:
//
// Entries of flows to the host itself stay. As long as an end sends, the entry remembers
// which end opened the flow. After conntrack forgot it, the host's next packet would look
// like a flow that the host opens. So the host's end stays closed (the sets cut4 and
// cut6) for as long as the entry could have lived.
//
// Entries of flows through the host are deleted: while the other end keeps sending, a
// translated entry would take packets that are meant for a port of the host. So are
// entries that would never work again: untranslated ones, opened while another program
// had removed the table, and ones with a port that may be the host's by now.
func (p *Backend) Cut(ctx context.Context, r *policy.Ruleset, narrowed []policy.Narrowed) error {
	if len(narrowed) == 0 {
		return nil
	}
	return p.run(ctx, func() error {
		return p.step(ctx, StepCut, func() error { return p.cut(ctx, r, narrowed) })
	})
}

// cut ends the flows of the narrowed peers and, the first time, of former peers.
func (p *Backend) cut(ctx context.Context, r *policy.Ruleset, narrowed []policy.Narrowed) error {
	theirs := map[netip.Addr]bool{}
	for _, n := range narrowed {
		for _, a := range n.Addresses {
			theirs[a] = true
		}
	}
	if !p.cutOnce {
		// A killed helper may not have cut the flows of peers that it removed.
		for _, f := range r.Sets().Former {
			theirs[f.Addr()] = true
		}
	}
	c := cutter{filter: p.filter, flows: p.flows, rules: r, ports: p.ports.host, few: p.hasFewFlows()}
	if err := c.cutAll(ctx, theirs); err != nil {
		return err
	}
	p.cutOnce = true
	return nil
}

// cutter ends the flows that a ruleset refuses. Its memory is bounded, however many flows
// there are.
type cutter struct {
	filter *filter
	flows  *conntrack
	rules  *policy.Ruleset
	ports  hostPorts
	few    bool // conntrack has at most fewFlows entries, so one dump of everything is cheapest
	dead   []deadFlow
}

// deadFlow is the host's side of a flow that was cut: an element of the set cut4 or cut6.
type deadFlow struct {
	family family
	key    []byte // host's address, peer's address, protocol, host's port, peer's port
	left   time.Duration
}

const (
	// deadBatch is how many flows to the host are closed in one transaction.
	deadBatch = 4096
	// maxFilteredDumps is for how many addresses the kernel filters the dump by IPv4
	// address. For more addresses the whole table is read once.
	maxFilteredDumps = 16
	// fewFlows is the number of entries up to which the whole table is read at once, even
	// for few addresses. A filtered dump walks the whole hash table, which has 262,144
	// buckets on hosts with much memory; that takes as long as reading some 2,500
	// entries.
	fewFlows = 2048
)

// hasFewFlows reports whether conntrack has at most fewFlows entries.
func (p *Backend) hasFewFlows() bool {
	text, err := p.forward.sys.read(flowCount)
	if err != nil {
		return false
	}
	n, err := strconv.Atoi(text)
	return err == nil && n <= fewFlows
}

// cutAll cuts the flows that these addresses opened. Each dump walks the kernel's whole
// hash table, so it uses as few dumps as possible.
func (c *cutter) cutAll(ctx context.Context, theirs map[netip.Addr]bool) error {
	whole := byte(unix.AF_UNSPEC)
	if !c.few && len(theirs) <= maxFilteredDumps {
		whole = unix.AF_INET6
		for a := range theirs {
			if !a.Is4() {
				continue
			}
			if err := c.flows.each(ctx, unix.AF_INET, a, c.judge); err != nil {
				return err
			}
		}
	}
	err := c.flows.each(ctx, whole, netip.Addr{}, func(e *flowEntry) error {
		if !theirs[e.orig.src] {
			return nil
		}
		return c.judge(e)
	})
	if err != nil {
		return err
	}
	return c.flush()
}

// judge decides about one flow that a peer opened.
func (c *cutter) judge(e *flowEntry) error {
	pass := c.rules.FromPeer(opened(e)).Pass
	if c.rules.Class(e.orig.dst) != policy.Self {
		if pass && e.translated() && (!hasPorts(e.orig.proto) || !c.ports.has(e.reply.dport)) {
			return nil
		}
		return c.flows.queueDelete(e)
	}
	if pass || !hasPorts(e.orig.proto) {
		return nil
	}
	f := families[0]
	if e.family == unix.AF_INET6 {
		f = families[1]
	}
	c.dead = append(c.dead, deadFlow{f, deadKey(e), lifetime(e)})
	if len(c.dead) < deadBatch {
		return nil
	}
	return c.flush()
}

// flush sends the deletions and closes the flows to the host that were collected.
func (c *cutter) flush() error {
	if err := c.flows.flush(); err != nil {
		return err
	}
	err := c.filter.addCut(c.dead)
	c.dead = c.dead[:0]
	return err
}

// hasPorts reports whether a protocol has ports. ICMP needs no closing: conntrack never
// opens a flow by an echo reply.
func hasPorts(proto uint8) bool { return proto == unix.IPPROTO_TCP || proto == unix.IPPROTO_UDP }

// opened returns the packet that opened a flow.
func opened(e *flowEntry) policy.Packet {
	return policy.Packet{
		Src: e.orig.src, Dst: e.orig.dst,
		Proto: e.orig.proto, SrcPort: e.orig.sport, DstPort: e.orig.dport, ICMPType: e.orig.kind,
	}
}

// deadKey returns the set key that matches the host's packets of the flow: source,
// destination, protocol, ports. In a concatenated key each part is padded to 32 bits.
func deadKey(e *flowEntry) []byte {
	t := e.reply
	word := func(p uint16) []byte { return append(port(p), 0, 0) }
	return slices.Concat(t.src.AsSlice(), t.dst.AsSlice(), []byte{t.proto, 0, 0, 0}, word(t.sport), word(t.dport))
}

// minLifetime is how long a cut flow stays closed at least: its entry may be about to end
// without either end knowing.
const minLifetime = time.Minute

// lifetime returns how long the entry of a flow could still live.
func lifetime(e *flowEntry) time.Duration {
	return max(time.Duration(e.timeout)*time.Second, minLifetime)
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
		if err := f.eachChunk(ns, es, f.change.SetAddElements); err != nil {
			return err
		}
	}
	if err := f.commit(); err != nil {
		return fmt.Errorf("close %d flows: %w", len(dead), err)
	}
	return nil
}
