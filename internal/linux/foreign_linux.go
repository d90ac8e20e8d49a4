package linux

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// This file evaluates the chains of other software for one packet, as nft_do_chain of
// net/netfilter/nf_tables_core.c does. What it doesn't understand is never guessed: a
// rule that may match makes what follows unclear.

// sample is a packet that others' chains are evaluated for.
type sample struct {
	what     string // in a person's words
	iif, oif string // "" for what comes from, or goes to, this host
	src, dst netip.Addr
	proto    uint8 // UDP, TCP, or ICMP of its family: an echo
	// sport and dport are ports; dport 0 is one that no rule is expected to name.
	sport, dport uint16
	// reply says that it belongs to a flow that the other end opened; else it is the
	// first of its flow.
	reply bool
	// tunnel says that it is one of WireGuard's own.
	tunnel bool
}

// hooks returns the hooks that a packet passes, in order.
func (s sample) hooks() []nftables.ChainHook {
	switch {
	case s.iif == "":
		return []nftables.ChainHook{*nftables.ChainHookOutput, *nftables.ChainHookPostrouting}
	case s.oif == "":
		return []nftables.ChainHook{*nftables.ChainHookPrerouting, *nftables.ChainHookInput}
	}
	return []nftables.ChainHook{*nftables.ChainHookPrerouting, *nftables.ChainHookForward, *nftables.ChainHookPostrouting}
}

func (s sample) family(f nftables.TableFamily) bool {
	switch f {
	case nftables.TableFamilyINet:
		return true
	case nftables.TableFamilyIPv4:
		return s.src.Is4()
	case nftables.TableFamilyIPv6:
		return s.src.Is6()
	}
	return false
}

// outcome is what chains do with a packet.
type outcome int

const (
	goesOn outcome = iota
	passes
	dropped
	redirected // sent to another destination
	untracked  // taken out of connection tracking, so that it isn't translated
)

// finding is what others' chains do with a packet, and the place that decides.
type finding struct {
	outcome outcome
	// unclear says that a rule which wasn't understood may decide otherwise.
	unclear bool
	family  nftables.TableFamily
	table   string
	chain   string
	rule    string // "" for the chain's policy
}

// where names the place.
func (f finding) where() string {
	s := fmt.Sprintf("chain %s of table %s %s", f.chain, familyName(f.family), f.table)
	if f.rule != "" {
		s += " (" + f.rule + ")"
	}
	return s
}

// evaluator runs others' chains on packets. It reads each chain once.
type evaluator struct {
	chains []*nftables.Chain
	ask    func(mdlayher.Message) ([]mdlayher.Message, error)
	index  func(name string) int
	rules  map[string][]foreignRule
	sets   map[string]foreignSet
	port   uint16 // one that peers' flows are translated to; 0: not known
	steps  int    // rules evaluated
}

// Bounds of a look: how many rules are evaluated, in some tenths of a second, and how
// deep chains call one another, as in the kernel (NFT_JUMP_STACK_SIZE). What is beyond
// isn't known.
const (
	maxSteps = 200_000
	maxJumps = 16
)

func (o *others) newEvaluator(ctx context.Context) (*evaluator, error) {
	chains, err := o.conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Hooknum == nil || c.Table.Name == tableName })
	slices.SortStableFunc(chains, func(a, b *nftables.Chain) int { return int(priorityOf(a)) - int(priorityOf(b)) })
	return &evaluator{
		chains: chains, index: indexOf, port: uint16(o.port.Load()), rules: map[string][]foreignRule{}, sets: map[string]foreignSet{},
		ask: func(m mdlayher.Message) ([]mdlayher.Message, error) {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			return o.raw.Execute(m)
		},
	}, nil
}

func priorityOf(c *nftables.Chain) nftables.ChainPriority {
	if c.Priority == nil {
		return 0
	}
	return *c.Priority
}

// indexOf returns the number of an interface of this thread's network namespace, or 0.
func indexOf(name string) int {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return 0
	}
	return i.Index
}

// place is where on its way a packet is.
type place struct {
	hook     nftables.ChainHook
	priority nftables.ChainPriority
	device   bool // at a hook of a device, before or after all others
}

func placeOf(c *nftables.Chain) place {
	return place{*c.Hooknum, priorityOf(c), atDevice(c)}
}

// Hooks of devices (enum nf_dev_hooks of linux/netfilter.h, and NF_INET_INGRESS).
const (
	deviceIngress = 0
	deviceEgress  = 1
	inetIngress   = 5
)

// atDevice reports whether a chain has its packets from devices.
func atDevice(c *nftables.Chain) bool {
	return c.Table.Family == nftables.TableFamilyNetdev || c.Table.Family == nftables.TableFamilyINet && *c.Hooknum == inetIngress
}

// arriving and leaving say that a packet is at a hook of the device that it came in, or
// leaves, by.
func (p place) arriving() bool { return p.device && p.hook != deviceEgress }
func (p place) leaving() bool  { return p.device && p.hook == deviceEgress }

// tracked reports whether conntrack has seen the packet (NF_IP_PRI_CONNTRACK).
func (p place) tracked() bool {
	early := p.hook == *nftables.ChainHookPrerouting || p.hook == *nftables.ChainHookOutput
	return !p.arriving() && !(!p.device && early && p.priority < *nftables.ChainPriorityConntrack)
}

// routed reports whether it is known by which interface the packet leaves.
func (p place) routed() bool {
	return !p.arriving() && (p.device || p.hook != *nftables.ChainHookPrerouting && p.hook != *nftables.ChainHookInput)
}

// answered reports whether answers to what was translated have the address that they had
// on the wire (before NF_IP_PRI_NAT_DST).
func (p place) answered() bool {
	return p.arriving() || !p.device && p.hook == *nftables.ChainHookPrerouting && p.priority < *nftables.ChainPriorityNATDest
}

// translated reports whether a source may have been translated (our chain is before
// NF_IP_PRI_NAT_SRC).
func (p place) translated() bool {
	return p.leaving() || !p.device && p.hook == *nftables.ChainHookPostrouting && p.priority > sourceNAT
}

// flowState is what rules change of a packet on its way, nil where it isn't known.
type flowState struct {
	mark, ctMark []byte
}

// run returns what becomes of a packet on its way through others' chains.
func (e *evaluator) run(s sample) finding {
	w := &walk{e: e, s: s, state: flowState{mark: make([]byte, 4), ctMark: make([]byte, 4)}}
	var maybe *finding
	for _, chains := range e.passed(s) {
		for _, c := range chains {
			// Conntrack asks for a flow's first packet, until something has translated it.
			if c.Type == nftables.ChainTypeNAT && (s.reply || s.iif != "" && placeOf(c).translated()) {
				continue
			}
			f := w.base(c)
			switch {
			case f.outcome == goesOn, f.outcome == passes:
				if f.unclear && maybe == nil {
					maybe = &f
				}
				continue
			case f.unclear && maybe == nil:
				maybe = &f
			case !f.unclear && maybe == nil:
				return f
			}
			// Something before it may have decided otherwise.
			f.unclear = true
			return f
		}
	}
	if maybe != nil {
		return *maybe
	}
	return finding{outcome: passes}
}

// markOf returns the mark that a packet has when it is routed, 0 where that isn't known: of
// one that comes in, from the chains before; the host's own is routed anew where a chain of
// the type route marks it.
func (e *evaluator) markOf(s sample) uint32 {
	w := &walk{e: e, s: s, state: flowState{mark: make([]byte, 4), ctMark: make([]byte, 4)}}
	var mark []byte
	for _, chains := range e.passed(s)[:2] { // at the device, and at the first hook
		for _, c := range chains {
			if c.Type == nftables.ChainTypeNAT && s.reply {
				continue
			}
			if f := w.base(c); f.stops() && !f.unclear {
				return 0
			}
			if s.iif != "" || c.Type == nftables.ChainTypeRoute {
				mark = w.state.mark
			}
		}
	}
	if len(mark) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(mark)
}

// passed returns the chains at each hook that a packet passes, in order.
func (e *evaluator) passed(s sample) [][]*nftables.Chain {
	var in, out []*nftables.Chain
	for _, c := range e.chains {
		if !atDevice(c) {
			continue
		}
		name, list := s.iif, &in
		if placeOf(c).leaving() {
			name, list = s.oif, &out
		}
		if name != "" && (s.family(c.Table.Family) || c.Table.Family == nftables.TableFamilyNetdev) && e.isAt(c, name) {
			*list = append(*list, c)
		}
	}
	all := [][]*nftables.Chain{in}
	for _, hook := range s.hooks() {
		var at []*nftables.Chain
		for _, c := range e.chains {
			if !atDevice(c) && *c.Hooknum == hook && s.family(c.Table.Family) {
				at = append(at, c)
			}
		}
		all = append(all, at)
	}
	return append(all, out)
}

// walk is one packet on its way.
type walk struct {
	e     *evaluator
	s     sample
	state flowState
	place place
	// unclear says that a rule which may have ended the chain otherwise wasn't
	// understood; at is the first.
	unclear bool
	at      finding
}

// base evaluates a base chain.
func (w *walk) base(c *nftables.Chain) finding {
	w.unclear, w.place = false, placeOf(c)
	here := finding{family: c.Table.Family, table: c.Table.Name, chain: c.Name}
	f := w.chain(c.Table, c.Name, 0)
	if f.outcome == goesOn && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
		f = here
		f.outcome = dropped
	}
	f.unclear = w.unclear
	if w.unclear && (f.outcome == goesOn || f.outcome == passes) {
		at := w.at
		at.outcome, at.unclear = f.outcome, true
		return at
	}
	return f
}

// doubt notes that a rule may decide otherwise.
func (w *walk) doubt(t *nftables.Table, chain string, r foreignRule) {
	if !w.unclear {
		w.unclear = true
		w.at = finding{family: t.Family, table: t.Name, chain: chain, rule: r.name()}
	}
}

// chain evaluates a chain.
func (w *walk) chain(t *nftables.Table, name string, depth int) finding {
	rules, err := w.e.rulesOf(t, name)
	if err != nil || depth > maxJumps {
		w.doubt(t, name, foreignRule{})
		return finding{}
	}
	for _, r := range rules {
		if w.e.steps++; w.e.steps > maxSteps {
			w.doubt(t, name, r)
			return finding{}
		}
		v, sure := w.rule(t, r)
		if v == nil {
			continue
		}
		f := finding{family: t.Family, table: t.Name, chain: name, rule: r.name()}
		switch v.Kind {
		case expr.VerdictAccept:
			f.outcome = passes
		case expr.VerdictDrop:
			f.outcome = dropped
		case verdictRedirected:
			f.outcome = redirected
		case verdictUntracked:
			f.outcome = untracked
		case expr.VerdictJump, expr.VerdictGoto:
			f = w.chain(t, v.Chain, depth+1)
		case expr.VerdictReturn:
		case expr.VerdictContinue, expr.VerdictBreak:
			continue
		default: // queue, stolen
			w.doubt(t, name, r)
			f.outcome = passes
		}
		ends := f.outcome != goesOn || v.Kind == expr.VerdictReturn || v.Kind == expr.VerdictGoto
		switch {
		case !ends:
		case sure:
			return f
		default:
			w.doubt(t, name, r)
		}
	}
	return finding{}
}

// Verdicts that nftables hasn't as such.
const (
	verdictRedirected expr.VerdictKind = 1000 + iota
	verdictUntracked
)

// registers are nftables' registers: 16 of 4 bytes each, of which four begin with one
// of 16 bytes (NFT_REG_1 to NFT_REG_4). What isn't known of them is nil.
type registers struct {
	data  [64]byte
	known [64]bool
}

func registerAt(reg uint32) int {
	if reg >= unix.NFT_REG32_00 {
		return int(reg-unix.NFT_REG32_00) * 4
	}
	return int(reg-1) * 16
}

// set stores v, or that size bytes aren't known. The kernel fills up words with zeros.
func (r *registers) set(reg uint32, v []byte, size int) {
	at := registerAt(reg)
	if v != nil {
		size = len(v)
	}
	for i := range (size + 3) / 4 * 4 {
		if at < 0 || at+i >= len(r.data) {
			return
		}
		r.data[at+i], r.known[at+i] = 0, v != nil
		if i < len(v) {
			r.data[at+i] = v[i]
		}
	}
}

// get returns the first n bytes, or nil where one of them isn't known.
func (r *registers) get(reg uint32, n int) []byte {
	at := registerAt(reg)
	if at < 0 || n < 0 || at+n > len(r.data) {
		return nil
	}
	for i := range n {
		if !r.known[at+i] {
			return nil
		}
	}
	return r.data[at : at+n : at+n]
}

// rule returns the verdict that a rule gives for the packet, or nil, and whether it was
// understood completely.
func (w *walk) rule(t *nftables.Table, r foreignRule) (verdict *expr.Verdict, sure bool) {
	regs := &registers{}
	sure = true
	for _, x := range r.exprs {
		if v, ok := verdictOf(x); ok {
			return v, sure && v != nil
		}
		if l, ok := x.(*expr.Lookup); ok && l.IsDestRegSet {
			v, holds, known := w.lookupMap(t, regs, l)
			if known && !holds {
				return nil, true
			}
			if sure = sure && known; v != nil {
				return v, sure
			}
			if !known && l.DestRegister == unix.NFT_REG_VERDICT {
				return &expr.Verdict{Kind: expr.VerdictStop}, false
			}
			continue
		}
		if c, ok := x.(*expr.Ct); ok && c.SourceRegister && c.Key == expr.CtKeyZONE {
			// Whether an answer finds its flow depends on what zone that gets.
			return &expr.Verdict{Kind: verdictUntracked}, false
		}
		holds, known := w.condition(t, regs, x, sure)
		if known && !holds {
			return nil, true
		}
		sure = sure && known
	}
	return nil, sure
}

// verdictOf returns the verdict of an expression that ends a rule, and nil where it isn't
// known what it does.
func verdictOf(x any) (v *expr.Verdict, ends bool) {
	switch x := x.(type) {
	case *expr.Verdict:
		return x, true
	case *expr.Reject:
		return &expr.Verdict{Kind: expr.VerdictDrop}, true
	case *expr.Notrack:
		return &expr.Verdict{Kind: verdictUntracked}, true
	case *expr.Redir:
		return &expr.Verdict{Kind: verdictRedirected}, true
	case *expr.NAT:
		if x.Type == expr.NATTypeDestNAT {
			return &expr.Verdict{Kind: verdictRedirected}, true
		}
		return &expr.Verdict{Kind: expr.VerdictAccept}, true
	case *expr.Masq:
		return &expr.Verdict{Kind: expr.VerdictAccept}, true
	case *expr.Queue, *expr.SynProxy:
		return &expr.Verdict{Kind: expr.VerdictStop}, true
	case *expr.Target:
		return target(x)
	}
	return nil, false
}

// target returns the verdict of a target of iptables.
func target(x *expr.Target) (v *expr.Verdict, ends bool) {
	switch x.Name {
	case "REJECT", "DROP", "TARPIT":
		return &expr.Verdict{Kind: expr.VerdictDrop}, true
	case "ACCEPT", "MASQUERADE", "SNAT", "NETMAP":
		return &expr.Verdict{Kind: expr.VerdictAccept}, true
	case "DNAT", "REDIRECT":
		return &expr.Verdict{Kind: verdictRedirected}, true
	case "NOTRACK":
		return &expr.Verdict{Kind: verdictUntracked}, true
	case "RETURN":
		return &expr.Verdict{Kind: expr.VerdictReturn}, true
	case "CT": // struct xt_ct_target_info(_v1): its flags begin with notrack
		if b, ok := x.Info.(*xt.Unknown); ok && len(*b) >= 2 && binary.NativeEndian.Uint16(*b)&1 != 0 {
			return &expr.Verdict{Kind: verdictUntracked}, true
		}
		return nil, false
	case "LOG", "NFLOG", "TCPMSS", "MARK", "CONNMARK", "CLASSIFY", "CHECKSUM", "AUDIT", "TRACE", "SET", "HL", "TTL", "DSCP", "TOS", "CONNSECMARK", "SECMARK", "RATEEST", "LED", "IDLETIMER", "TEE":
		return nil, false
	}
	return &expr.Verdict{Kind: expr.VerdictStop}, true
}

// condition evaluates one expression: whether the rule goes on, and whether that is
// known. sure says that the rule gets as far as this.
func (w *walk) condition(t *nftables.Table, regs *registers, x any, sure bool) (holds, known bool) {
	switch x := x.(type) {
	case *expr.Meta:
		return w.metaExpr(regs, x, sure)
	case *expr.Payload:
		if x.OperationType != expr.PayloadWrite {
			return w.payload(regs, x)
		}
		return true, true
	case *expr.Ct:
		if x.SourceRegister {
			if x.Key == expr.CtKeyMARK {
				w.state.ctMark = assigned(regs.get(x.Register, 4), w.state.ctMark, sure)
			}
			return true, true
		}
		regs.set(x.Register, w.ct(x.Key), 16)
		return true, true
	case *expr.Immediate:
		regs.set(x.Register, x.Data, 0)
		return true, true
	case *expr.Bitwise:
		regs.set(x.DestRegister, bitwise(regs.get(x.SourceRegister, int(x.Len)), x), int(x.Len))
		return true, true
	case *expr.Byteorder:
		regs.set(x.DestRegister, swapped(regs.get(x.SourceRegister, int(x.Len)), int(x.Size)), int(x.Len))
		return true, true
	case *expr.Cmp:
		return compare(regs.get(x.Register, len(x.Data)), x)
	case *expr.Range:
		v := regs.get(x.Register, len(x.FromData))
		inside := bytes.Compare(v, x.FromData) >= 0 && bytes.Compare(v, x.ToData) <= 0
		return inside == (x.Op == expr.CmpOpEq), v != nil
	case *expr.Lookup:
		e, err := w.element(t, regs, x)
		if err != nil {
			return true, false
		}
		return (e != nil) != x.Invert, true
	case *expr.Fib:
		return w.fib(regs, x)
	case *expr.Exthdr:
		if x.SourceRegister == 0 {
			return w.exthdr(regs, x)
		}
		return true, true // it writes
	case *expr.Quota:
		over := x.Consumed >= x.Bytes
		return over == x.Over, true
	case *expr.Objref:
		return w.object(t, x)
	case *expr.Dynset:
		// Where it limits it is known no more than a limit.
		plain := !slices.ContainsFunc(x.Exprs, func(e expr.Any) bool { _, counts := e.(*expr.Counter); return !counts })
		return !x.Invert, plain
	case *expr.Hash:
		regs.set(x.DestRegister, nil, 4)
		return true, true
	case *expr.Numgen:
		regs.set(x.Register, nil, 4)
		return true, true
	case *expr.Match:
		return w.match(x)
	case *expr.Target:
		w.xtMark(x, sure)
		return true, true
	case *expr.Counter, *expr.Log, *expr.FlowOffload, *expr.SecMark, *expr.CtHelper, *expr.CtTimeout, *expr.CtExpect:
		return true, true
	}
	*regs = registers{} // it may have written to any
	return true, false
}

// xtMark notes what iptables' targets do with marks. MARK has struct xt_mark_tginfo2: a
// value and the bits that it replaces (linux/netfilter/xt_mark.h).
func (w *walk) xtMark(x *expr.Target, sure bool) {
	b, raw := x.Info.(*xt.Unknown)
	switch {
	case x.Name == "MARK" && raw && x.Rev == 2 && len(*b) >= 8 && w.state.mark != nil:
		value, bits := binary.NativeEndian.Uint32(*b), binary.NativeEndian.Uint32((*b)[4:])
		set := native(int(binary.NativeEndian.Uint32(w.state.mark)&^bits ^ value))
		w.state.mark = assigned(set, w.state.mark, sure)
	case x.Name == "MARK" || x.Name == "CONNMARK":
		w.state.mark, w.state.ctMark = nil, nil
	}
}

// assigned returns what a mark is after a rule set it to v.
func assigned(v, before []byte, sure bool) []byte {
	if v == nil || !sure && !bytes.Equal(v, before) {
		return nil
	}
	return slices.Clone(v)
}

// swapped turns the bytes of each number of size, as hton and ntoh do on this machine.
func swapped(v []byte, size int) []byte {
	if v == nil || size <= 0 {
		return nil
	}
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		return v
	}
	out := slices.Clone(v)
	for at := 0; at+size <= len(out); at += size {
		slices.Reverse(out[at : at+size])
	}
	return out
}

func native(v int) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(v)) }

// metaExpr evaluates meta (net/netfilter/nft_meta.c).
func (w *walk) metaExpr(regs *registers, x *expr.Meta, sure bool) (holds, known bool) {
	if x.SourceRegister {
		if x.Key == expr.MetaKeyMARK {
			w.state.mark = assigned(regs.get(x.Register, 4), w.state.mark, sure)
		}
		return true, true
	}
	s := &w.s
	switch x.Key {
	case expr.MetaKeyIIFNAME:
		regs.set(x.Register, name(s.iif).bytes, 0)
	case expr.MetaKeyOIFNAME:
		regs.set(x.Register, name(w.oif()).bytes, 0)
	case expr.MetaKeyIIF:
		regs.set(x.Register, w.number(s.iif), 4)
	case expr.MetaKeyOIF:
		regs.set(x.Register, w.number(w.oif()), 4)
	case expr.MetaKeyNFPROTO:
		regs.set(x.Register, []byte{familyOf(s.src)}, 0)
	case expr.MetaKeyPROTOCOL:
		regs.set(x.Register, map[bool][]byte{true: {0x08, 0x00}, false: {0x86, 0xdd}}[s.src.Is4()], 0)
	case expr.MetaKeyL4PROTO:
		regs.set(x.Register, []byte{s.proto}, 0)
	case expr.MetaKeyMARK:
		regs.set(x.Register, w.state.mark, 4)
	case expr.MetaKeyPKTTYPE:
		regs.set(x.Register, []byte{unix.PACKET_HOST}, 0)
	case expr.MetaKeySKUID, expr.MetaKeySKGID:
		if s.iif != "" && s.oif != "" {
			return false, true // no socket of this host has it
		}
		if s.tunnel && s.iif == "" { // the helper's own socket has it
			id := os.Geteuid()
			if x.Key == expr.MetaKeySKGID {
				id = os.Getegid()
			}
			regs.set(x.Register, native(id), 4)
			break
		}
		regs.set(x.Register, nil, 4)
	default:
		regs.set(x.Register, nil, 16)
	}
	return true, true
}

// oif is the interface that the packet leaves by, once that is known.
func (w *walk) oif() string {
	if w.place.routed() {
		return w.s.oif
	}
	return ""
}

// number returns an interface's number, where it is asked for at this hook.
func (w *walk) number(name string) []byte {
	if name == "" {
		return native(0)
	}
	return native(w.e.index(name))
}

func familyOf(a netip.Addr) byte {
	if a.Is4() {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

// payload reads bytes of the packet. What isn't in it ends the rule.
func (w *walk) payload(regs *registers, x *expr.Payload) (holds, known bool) {
	var h []byte
	switch x.Base {
	case expr.PayloadBaseNetworkHeader:
		h = w.s.network()
	case expr.PayloadBaseTransportHeader:
		h = w.transport()
	default:
		regs.set(x.DestRegister, nil, int(x.Len))
		return true, true
	}
	if uint64(x.Offset)+uint64(x.Len) > uint64(len(h)) {
		regs.set(x.DestRegister, nil, int(x.Len))
		return true, false
	}
	regs.set(x.DestRegister, h[x.Offset:x.Offset+x.Len], 0)
	if w.hidden(x) {
		regs.set(x.DestRegister, nil, int(x.Len))
	}
	return true, true
}

// hidden reports whether a part of the packet is an address that translation has changed,
// or hasn't yet: a sample has those that the policy is about.
func (w *walk) hidden(x *expr.Payload) bool {
	src, dst, size := uint32(12), uint32(16), uint32(4)
	if w.s.src.Is6() {
		src, dst, size = 8, 24, 16
	}
	if x.Base == expr.PayloadBaseTransportHeader {
		src, dst, size = 0, 2, 2
		switch {
		case w.s.proto != unix.IPPROTO_TCP && w.s.proto != unix.IPPROTO_UDP:
			src, dst = 4, 4 // an identifier
		case w.e.port != 0:
			return false
		}
	}
	touches := func(at uint32) bool { return x.Offset < at+size && x.Offset+x.Len > at }
	return w.onWire(true) && touches(dst) || w.onWire(false) && touches(src)
}

// onWire reports whether a forwarded packet has the address and port that it has on the
// wire: as an answer, its destination's, else its source's.
func (w *walk) onWire(reply bool) bool {
	if w.s.iif == "" || w.s.oif == "" || w.s.reply != reply {
		return false
	}
	return reply && w.place.answered() || !reply && w.place.translated()
}

// transport returns the header behind IP's, with a port of those that peers' flows are
// translated to where it is.
func (w *walk) transport() []byte {
	s := w.s
	switch {
	case w.e.port == 0:
	case w.onWire(true):
		s.dport = w.e.port
	case w.onWire(false):
		s.sport = w.e.port
	}
	return s.transport()
}

// network returns the IP header.
func (s *sample) network() []byte {
	if s.src.Is4() {
		return slices.Concat([]byte{0x45, 0, 0, 48, 0, 0, 0, 0, 63, s.proto, 0, 0}, s.src.AsSlice(), s.dst.AsSlice())
	}
	return slices.Concat([]byte{0x60, 0, 0, 0, 0, 28, s.proto, 63}, s.src.AsSlice(), s.dst.AsSlice())
}

// transport returns the beginning of the header behind it.
func (s *sample) transport() []byte {
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, s.sport), s.dport)
	switch s.proto {
	case unix.IPPROTO_TCP:
		flags := byte(0x02) // SYN
		if s.reply {
			flags = 0x12
		}
		return append(ports, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0)
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		kind := byte(8)
		switch {
		case s.proto == unix.IPPROTO_ICMP && s.reply:
			kind = 0
		case s.proto == unix.IPPROTO_ICMPV6 && s.reply:
			kind = 129
		case s.proto == unix.IPPROTO_ICMPV6:
			kind = 128
		}
		return []byte{kind, 0, 0, 0, 0, 1, 0, 1}
	}
	return append(ports, 0, 8, 0, 0)
}

// ct returns what conntrack says of the packet's flow (net/netfilter/nft_ct.c).
func (w *walk) ct(key expr.CtKey) []byte {
	if !w.place.tracked() {
		if key == expr.CtKeySTATE {
			return native(int(expr.CtStateBitINVALID)) // nft_ct_get_eval
		}
		return nil
	}
	switch key {
	case expr.CtKeySTATE:
		return native(int(w.stateBit()))
	case expr.CtKeyDIRECTION:
		if w.s.reply {
			return []byte{1}
		}
		return []byte{0}
	case expr.CtKeyMARK:
		return w.state.ctMark
	case expr.CtKeySTATUS:
		if !w.s.reply {
			return native(0)
		}
	case expr.CtKeyL3PROTOCOL:
		return []byte{familyOf(w.s.src)}
	case expr.CtKeyPROTOCOL:
		return []byte{w.s.proto}
	}
	return nil
}

func (w *walk) stateBit() uint32 {
	if w.s.reply {
		return expr.CtStateBitESTABLISHED
	}
	return expr.CtStateBitNEW
}

func bitwise(v []byte, x *expr.Bitwise) []byte {
	if v == nil || len(x.Mask) < len(v) || len(x.Xor) < len(v) {
		return nil
	}
	out := make([]byte, len(v))
	for i := range out {
		out[i] = v[i]&x.Mask[i] ^ x.Xor[i]
	}
	return out
}

// compare compares as many bytes as the rule has: fewer than a name's 16 are a
// beginning that any name may have.
func compare(v []byte, x *expr.Cmp) (holds, known bool) {
	if v == nil {
		return true, false
	}
	c := bytes.Compare(v, x.Data)
	switch x.Op {
	case expr.CmpOpEq:
		return c == 0, true
	case expr.CmpOpNeq:
		return c != 0, true
	case expr.CmpOpLt:
		return c < 0, true
	case expr.CmpOpLte:
		return c <= 0, true
	case expr.CmpOpGt:
		return c > 0, true
	case expr.CmpOpGte:
		return c >= 0, true
	}
	return true, false
}

// Types of routes in fib expressions (linux/rtnetlink.h).
const (
	routeUnicast = 1
	routeLocal   = 2
)

// fib evaluates what the routing tables say of an address. Of a packet that goes on, its
// source is where it came from.
func (w *walk) fib(regs *registers, x *expr.Fib) (holds, known bool) {
	var v []byte
	switch {
	case x.ResultADDRTYPE && x.FlagDADDR && (w.s.oif == "" || w.s.reply && w.place.answered()), x.ResultADDRTYPE && x.FlagSADDR && w.s.iif == "":
		v = native(routeLocal)
	case x.ResultADDRTYPE:
		v = native(routeUnicast)
	case x.FlagPRESENT:
		v = native(1)
	case x.ResultOIF && x.FlagSADDR:
		v = w.number(w.s.iif)
	case x.ResultOIFNAME && x.FlagSADDR:
		v = name(w.s.iif).bytes
	}
	if x.FlagPRESENT && v != nil {
		v = []byte{1}
	}
	regs.set(x.Register, v, 16)
	return true, true
}

// exthdr evaluates options and extension headers, of which a sample has none.
func (w *walk) exthdr(regs *registers, x *expr.Exthdr) (holds, known bool) {
	if x.Op == expr.ExthdrOpTcpopt {
		regs.set(x.DestRegister, nil, int(x.Len))
		return true, w.s.proto != unix.IPPROTO_TCP // without the header the rule ends
	}
	if x.Flags&unix.NFT_EXTHDR_F_PRESENT == 0 {
		return false, true
	}
	regs.set(x.DestRegister, []byte{0}, 0)
	return true, true
}

// Types of objects (linux/netfilter/nf_tables.h).
const (
	objectCounter = 1
	objectQuota   = 2
	objectHelper  = 3
	objectTimeout = 7
	objectSecmark = 8
	objectExpect  = 9
)

// object evaluates a named object.
func (w *walk) object(t *nftables.Table, x *expr.Objref) (holds, known bool) {
	switch x.Type {
	case objectCounter, objectHelper, objectTimeout, objectSecmark, objectExpect:
		return true, true
	case objectQuota:
		q, ok := w.e.quota(t, x.Name)
		return (q.Consumed >= q.Bytes) == q.Over, ok
	}
	return true, false
}

// Flags of xt_addrtype (linux/netfilter/xt_addrtype.h).
const (
	invertSource xt.AddrTypeFlags = 1
	invertDest   xt.AddrTypeFlags = 2
)

// match evaluates the iptables matches that other software's chains are full of.
func (w *walk) match(x *expr.Match) (holds, known bool) {
	s := &w.s
	switch info := x.Info.(type) {
	case *xt.Comment:
		return true, true
	case *xt.ConntrackMtinfo3:
		if info.MatchFlags != uint16(xt.ConntrackState) && info.MatchFlags != uint16(xt.ConntrackState|xt.ConntrackStateAlias) {
			return true, false
		}
		// The bits are those of nftables' ct state.
		inverted := info.InvertFlags&uint16(xt.ConntrackState) != 0
		return (uint32(info.StateMask)&w.stateBit() != 0) != inverted, true
	case *xt.Udp:
		if s.proto != unix.IPPROTO_UDP {
			return false, true
		}
		return within16(s.sport, info.SrcPorts) != (info.InvFlags&xt.UdpInvSrcPorts != 0) &&
			within16(s.dport, info.DstPorts) != (info.InvFlags&xt.UdpInvDestPorts != 0), true
	case *xt.Tcp:
		if s.proto != unix.IPPROTO_TCP {
			return false, true
		}
		flags := s.transport()[13]
		return within16(s.sport, info.SrcPorts) != (info.InvFlags&xt.TcpInvSrcPorts != 0) &&
			within16(s.dport, info.DstPorts) != (info.InvFlags&xt.TcpInvDestPorts != 0) &&
			(flags&info.FlagsMask == info.FlagsCmp) != (info.InvFlags&xt.TcpInvFlags != 0), info.Option == 0
	case *xt.AddrTypeV1:
		if info.Flags&^(invertSource|invertDest) != 0 {
			return true, false
		}
		is := func(mask uint16, kind int, invert bool) bool { return mask == 0 || (mask&(1<<kind) != 0) != invert }
		from, to := routeUnicast, routeUnicast
		if s.iif == "" {
			from = routeLocal
		}
		if s.oif == "" {
			to = routeLocal
		}
		return is(info.Source, from, info.Flags&invertSource != 0) && is(info.Dest, to, info.Flags&invertDest != 0), true
	case *xt.Unknown:
		b := []byte(*info)
		switch x.Name {
		case "icmp", "icmp6":
			return w.s.icmpMatch(b)
		case "multiport":
			return w.s.multiport(x.Rev, b)
		case "pkttype": // struct xt_pkttype_info: a type, and whether it is inverted
			if len(b) >= 8 {
				return (binary.NativeEndian.Uint32(b) == unix.PACKET_HOST) != (binary.NativeEndian.Uint32(b[4:]) != 0), true
			}
		}
		// struct xt_mark_mtinfo1 of linux/netfilter/xt_mark.h.
		if x.Name == "mark" && len(b) >= 9 && w.state.mark != nil {
			mark := binary.NativeEndian.Uint32(w.state.mark)
			return (mark&binary.NativeEndian.Uint32(b[4:]) == binary.NativeEndian.Uint32(b)) != (b[8] != 0), true
		}
	}
	return true, false
}

// icmpMatch evaluates struct ipt_icmp, which is struct ip6t_icmp too: a type, of which
// 255 is any, two codes, and whether it is inverted.
func (s *sample) icmpMatch(b []byte) (holds, known bool) {
	if len(b) < 4 {
		return true, false
	}
	if s.proto != unix.IPPROTO_ICMP && s.proto != unix.IPPROTO_ICMPV6 {
		return false, true
	}
	kind := s.transport()[0]
	return (b[0] == 255 || b[0] == kind && b[1] == 0) != (b[3]&1 != 0), true
}

// multiport evaluates struct xt_multiport_v1: which ports (source, destination or either),
// how many, 15 of them, 15 flags for the beginnings of ranges, and whether it is inverted.
func (s *sample) multiport(rev uint32, b []byte) (holds, known bool) {
	const most, size = 15, 2 + 2*15 + 15 + 1
	if rev != 1 || len(b) < size || b[1] > most {
		return true, false
	}
	if s.proto != unix.IPPROTO_TCP && s.proto != unix.IPPROTO_UDP {
		return false, true
	}
	of := func(i int) uint16 { return binary.NativeEndian.Uint16(b[2+2*i:]) }
	in := func(p uint16) bool {
		for i := 0; i < int(b[1]); i++ {
			from, to := of(i), of(i)
			if b[2+2*most+i] != 0 && i+1 < int(b[1]) {
				i++
				to = of(i)
			}
			if p >= from && p <= to {
				return true
			}
		}
		return false
	}
	found := b[0] != 1 && in(s.sport) || b[0] != 0 && in(s.dport)
	return found != (b[size-1] != 0), true
}

func within16(p uint16, r [2]uint16) bool { return p >= r[0] && p <= r[1] }

// lookupMap evaluates a lookup in a map: the verdict that it gives, or what is found is
// in a register.
func (w *walk) lookupMap(t *nftables.Table, regs *registers, x *expr.Lookup) (v *expr.Verdict, holds, known bool) {
	e, err := w.element(t, regs, x)
	if err != nil {
		regs.set(x.DestRegister, nil, 16)
		return nil, true, false
	}
	if e == nil {
		return nil, false, true
	}
	if x.DestRegister == unix.NFT_REG_VERDICT {
		return e.verdict, true, e.verdict != nil
	}
	regs.set(x.DestRegister, e.data, 16)
	return nil, true, true
}

// element asks the kernel for the element of a set that a key falls in, nil where there
// is none.
func (w *walk) element(t *nftables.Table, regs *registers, x *expr.Lookup) (*foreignElement, error) {
	set, err := w.e.setOf(t, x.SetName)
	if err != nil {
		return nil, err
	}
	key := regs.get(x.SourceRegister, set.keySize)
	if key == nil {
		return nil, errUnknown
	}
	return w.e.elementOf(t, x.SetName, key)
}

var errUnknown = errors.New("the packet's part isn't known")
