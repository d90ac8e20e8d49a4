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

// Cut implements [host.Enforcer]. The table already judges each packet by
// the opener of its flow, so that flows through the host are dead since Enforce.
// What is left:
//
// Entries of flows to the host itself stay: as long as an end sends, they remember
// the opener of the flow. Once conntrack forgets one, the host's next packet would
// look like a flow that the host opens, so the host's end stays closed for as long
// as the flow would have lived.
//
// Entries of flows through the host go: a translated one takes what is sent to a
// port of the host, for as long as the other end goes on sending. So do those that
// would never work: flows that were opened while another program had removed the
// table, and so aren't translated, and those with a port that may be the host's by
// now.
func (p *Backend) Cut(ctx context.Context, r *policy.Ruleset, narrowed []policy.Narrowed) error {
	if len(narrowed) == 0 {
		return nil
	}
	return p.run(ctx, func() error {
		return p.step(ctx, StepCut, func() error { return p.cut(ctx, r, narrowed) })
	})
}

func (p *Backend) cut(ctx context.Context, r *policy.Ruleset, narrowed []policy.Narrowed) error {
	theirs := map[netip.Addr]bool{}
	for _, n := range narrowed {
		for _, a := range n.Addresses {
			theirs[a] = true
		}
	}
	if !p.cutOnce {
		// A helper that was killed may not have come to cut what it removed.
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

// cutter ends the flows that a ruleset refuses. What it holds is bounded, however
// many flows there are.
type cutter struct {
	filter *filter
	flows  *conntrack
	rules  *policy.Ruleset
	ports  hostPorts
	few    bool // few flows are in conntrack, of whichever opener
	dead   []deadFlow
}

// deadFlow is the host's side of a flow that was cut.
type deadFlow struct {
	family family
	key    []byte // host's address, peer's address, protocol, host's port, peer's port
	left   time.Duration
}

const (
	// deadAtOnce is how many flows to the host are closed in one transaction.
	deadBatch = 4096
	// searchesApart is for how many addresses the kernel is asked for IPv4 flows one
	// by one; for more, the whole table is read once.
	maxFilteredDumps = 16
	// fewFlows is up to how many flows the whole table is read at once also for fewer
	// addresses: going once more through the kernel's hash table, of 262,144 buckets where
	// there is much memory, takes as long as reading some 2,500 entries.
	fewFlows = 2048
)

// hasFewFlows reports whether conntrack has no more than fewFlows entries.
func (p *Backend) hasFewFlows() bool {
	text, err := p.forward.sys.read(flowCount)
	if err != nil {
		return false
	}
	n, err := strconv.Atoi(text)
	return err == nil && n <= fewFlows
}

// all cuts the flows of all these addresses. Each reading goes through the whole of the
// kernel's hash table, so there are as few as possible.
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

// look judges one flow that a peer opened.
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

// finish takes the rest into force.
func (c *cutter) flush() error {
	if err := c.flows.flush(); err != nil {
		return err
	}
	err := c.filter.addCut(c.dead)
	c.dead = c.dead[:0]
	return err
}

// hasPorts reports whether a protocol that passes has ports. ICMP needs none of
// this: conntrack lets no end open a flow with an answer.
func hasPorts(proto uint8) bool { return proto == unix.IPPROTO_TCP || proto == unix.IPPROTO_UDP }

// opened is the packet that opened a flow.
func opened(e *flowEntry) policy.Packet {
	return policy.Packet{
		Src: e.orig.src, Dst: e.orig.dst,
		Proto: e.orig.proto, SrcPort: e.orig.sport, DstPort: e.orig.dport, ICMPType: e.orig.kind,
	}
}

// deadKey is what the host's packets of the flow look like, in the layout of a
// concatenated key: each part fills whole words of 32 bits.
func deadKey(e *flowEntry) []byte {
	t := e.reply
	word := func(p uint16) []byte { return append(port(p), 0, 0) }
	return slices.Concat(t.src.AsSlice(), t.dst.AsSlice(), []byte{t.proto, 0, 0, 0}, word(t.sport), word(t.dport))
}

// minLifetime covers flows that are about to end, and whose ends don't know it.
const minLifetime = time.Minute

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
