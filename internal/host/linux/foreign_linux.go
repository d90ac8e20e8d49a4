package linux

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
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

// where names the place, of which there is none where the rules kept changing.
func (f finding) where() string {
	if f.chain == "" {
		return "the ruleset of nftables, which changes while it is read,"
	}
	s := fmt.Sprintf("chain %s of table %s %s", f.chain, familyName(f.family), f.table)
	if f.rule != "" {
		s += " (" + f.rule + ")"
	}
	return s
}

// evaluator runs others' chains on packets. It reads each chain once, and all again when
// something changed meanwhile.
type evaluator struct {
	list       func() ([]*nftables.Chain, error)
	generation func() (uint32, error) // of nftables
	ask        func(mdlayher.Message) ([]mdlayher.Message, error)
	index      func(name string) int

	read   uint32 // the generation that what follows is of
	chains []*nftables.Chain
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
	e := &evaluator{
		list:  func() ([]*nftables.Chain, error) { return o.lists.ListChains(nftables.TableFamilyUnspecified) },
		index: indexOf, port: uint16(o.port.Load()),
		generation: func() (uint32, error) { return generationOf(o.sock) },
		ask: func(m mdlayher.Message) ([]mdlayher.Message, error) {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			return o.sock.Execute(m)
		},
	}
	return e, e.begin()
}

// begin reads the chains, and forgets the rest.
func (e *evaluator) begin() error {
	var err error
	if e.read, err = e.generation(); err != nil {
		return err
	}
	if e.chains, err = e.list(); err != nil {
		return fmt.Errorf("list chains: %w", err)
	}
	e.chains = slices.DeleteFunc(e.chains, func(c *nftables.Chain) bool { return c.Hooknum == nil || c.Table.Name == tableName })
	slices.SortStableFunc(e.chains, func(a, b *nftables.Chain) int { return int(priorityOf(a)) - int(priorityOf(b)) })
	e.rules, e.sets = map[string][]foreignRule{}, map[string]foreignSet{}
	return nil
}

func priorityOf(c *nftables.Chain) nftables.ChainPriority {
	if c.Priority == nil {
		return 0
	}
	return *c.Priority
}

// indexOf returns the number of an interface of this thread's network namespace, or 0.
func indexOf(name string) int {
	// Not by net.InterfaceByName, which reads a list of all and takes one that was
	// interrupted.
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	if unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr) != nil {
		return 0
	}
	return int(ifr.Uint32())
}

// place is where on its way a packet is.
type position struct {
	hook     nftables.ChainHook
	priority nftables.ChainPriority
	device   bool // at a hook of a device, before or after all others
}

func positionOf(c *nftables.Chain) position {
	return position{*c.Hooknum, priorityOf(c), atDevice(c)}
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
func (p position) arriving() bool { return p.device && p.hook != deviceEgress }
func (p position) leaving() bool  { return p.device && p.hook == deviceEgress }

// tracked reports whether conntrack has seen the packet (NF_IP_PRI_CONNTRACK).
func (p position) tracked() bool {
	early := p.hook == *nftables.ChainHookPrerouting || p.hook == *nftables.ChainHookOutput
	return !p.arriving() && !(!p.device && early && p.priority < *nftables.ChainPriorityConntrack)
}

// routed reports whether it is known by which interface the packet leaves.
func (p position) routed() bool {
	return !p.arriving() && (p.device || p.hook != *nftables.ChainHookPrerouting && p.hook != *nftables.ChainHookInput)
}

// answered reports whether answers to what was translated have the address that they had
// on the wire (before NF_IP_PRI_NAT_DST).
func (p position) answered() bool {
	return p.arriving() || !p.device && p.hook == *nftables.ChainHookPrerouting && p.priority < *nftables.ChainPriorityNATDest
}

// translated reports whether a source may have been translated (our chain is before
// NF_IP_PRI_NAT_SRC).
func (p position) translated() bool {
	return p.leaving() || !p.device && p.hook == *nftables.ChainHookPostrouting && p.priority > sourceNAT
}

// flowState is what rules change of a packet on its way.
type flowState struct {
	mark, ctMark []byte // nil where it isn't known
	// untracked says that the packet may be out of connection tracking, and by which rule;
	// kept that it may be in it nevertheless.
	untracked *finding
	kept      bool
	rewritten []span
	// sets are those that the packet itself may have changed.
	sets map[string]bool
}

// span is a part of a header.
type span struct {
	base        expr.PayloadBase
	offset, len uint32
}

// maxReads bounds how often all is read for a packet.
const maxReads = 4

// steady evaluates until nothing changed meanwhile, and reports whether it came to that:
// parts of two generations may say what neither does, and a list that is interrupted is of
// two.
func (e *evaluator) consistent(evaluate func()) bool {
	for range maxReads {
		evaluate()
		if now, err := e.generation(); err == nil && now == e.read {
			return true
		}
		if e.begin() != nil {
			return false
		}
	}
	return false
}

// run returns what becomes of a packet on its way through others' chains.
func (e *evaluator) run(s sample) (f finding) {
	if !e.consistent(func() { f = e.evaluate(s) }) {
		return finding{outcome: passes, unclear: true}
	}
	return f
}

// evaluate does it once.
func (e *evaluator) evaluate(s sample) finding {
	w := newWalk(e, s)
	var maybe *finding
	for _, chains := range e.passed(s) {
		for _, c := range chains {
			// Conntrack asks for a flow's first packet, until something has translated it.
			if c.Type == nftables.ChainTypeNAT && (s.reply || s.iif != "" && positionOf(c).translated() || w.state.untracked != nil && !w.state.kept) {
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
	switch u := w.state.untracked; {
	case u != nil && !s.tunnel:
		// What is for peers isn't translated, or is dropped by our table.
		u.outcome, u.unclear = untracked, maybe != nil || w.state.kept
		return *u
	case maybe != nil:
		return *maybe
	}
	return finding{outcome: passes}
}

// markOf returns the mark that a packet has when it is routed, 0 where that isn't known: of
// one that comes in, from the chains before; the host's own is routed anew where a chain of
// the type route marks it.
func (e *evaluator) markOf(s sample) (mark uint32) {
	if !e.consistent(func() { mark = e.evaluateMark(s) }) {
		return 0
	}
	return mark
}

func (e *evaluator) evaluateMark(s sample) uint32 {
	w := newWalk(e, s)
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
		if positionOf(c).leaving() {
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
	pos   position
	// sure says that the packet gets to the chain that is evaluated, and here is the rule.
	sure bool
	here finding
	// unclear says that a rule which may have ended the chain otherwise wasn't
	// understood; at is the first.
	unclear bool
	at      finding
}

// newWalk begins one. The mark of a flow that runs is what rules made it when it began.
func newWalk(e *evaluator, s sample) *walk {
	w := &walk{e: e, s: s, sure: true, state: flowState{mark: make([]byte, 4), sets: map[string]bool{}}}
	if !s.reply {
		w.state.ctMark = make([]byte, 4)
	}
	return w
}

// base evaluates a base chain.
func (w *walk) base(c *nftables.Chain) finding {
	w.unclear, w.pos = false, positionOf(c)
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
func (w *walk) doubt(here finding) {
	if !w.unclear {
		w.unclear, w.at = true, here
	}
}

// chain evaluates a chain.
func (w *walk) chain(t *nftables.Table, name string, depth int) finding {
	rules, err := w.e.rulesOf(t, name)
	here := finding{family: t.Family, table: t.Name, chain: name}
	if err != nil || depth > maxJumps {
		w.doubt(here)
		return finding{}
	}
	for _, r := range rules {
		here.rule = r.name()
		if w.e.steps++; w.e.steps > maxSteps {
			w.doubt(here)
			return finding{}
		}
		w.here = here
		v, sure := w.rule(t, r)
		if v == nil {
			continue
		}
		f := here
		switch v.Kind {
		case expr.VerdictAccept:
			f.outcome = passes
		case expr.VerdictDrop:
			f.outcome = dropped
		case verdictRedirected:
			f.outcome = redirected
		case expr.VerdictJump, expr.VerdictGoto:
			before := w.sure
			w.sure = before && sure
			f = w.chain(t, v.Chain, depth+1)
			w.sure = before
		case expr.VerdictReturn:
		case expr.VerdictContinue, expr.VerdictBreak:
			continue
		default: // queue, stolen
			w.doubt(here)
			f.outcome = passes
		}
		ends := f.outcome != goesOn || v.Kind == expr.VerdictReturn || v.Kind == expr.VerdictGoto
		switch {
		case !ends:
		case sure:
			return f
		default:
			w.doubt(here)
		}
	}
	return finding{}
}

// verdictRedirected is one that nftables hasn't as such.
const verdictRedirected expr.VerdictKind = 1000

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
		if v, ok := w.verdictOf(x); ok {
			return v, sure
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
		if p, ok := x.(*expr.Payload); ok && p.OperationType == expr.PayloadWrite {
			if w.write(regs, p) {
				return &expr.Verdict{Kind: verdictRedirected}, sure
			}
			continue
		}
		holds, known := w.condition(t, regs, x, w.sure && sure)
		if known && !holds {
			return nil, true
		}
		sure = sure && known
	}
	return nil, sure
}

// verdictOf returns the verdict of an expression that ends a rule.
func (w *walk) verdictOf(x any) (v *expr.Verdict, ends bool) {
	switch x := x.(type) {
	case *expr.Verdict:
		return x, true
	case *expr.Reject:
		return &expr.Verdict{Kind: expr.VerdictDrop}, true
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
		return w.target(x)
	}
	return nil, false
}

// target returns the verdict of a target of iptables.
func (w *walk) target(x *expr.Target) (v *expr.Verdict, ends bool) {
	switch x.Name {
	case "REJECT", "DROP", "TARPIT":
		return &expr.Verdict{Kind: expr.VerdictDrop}, true
	case "ACCEPT", "MASQUERADE", "SNAT":
		return &expr.Verdict{Kind: expr.VerdictAccept}, true
	case "DNAT", "REDIRECT":
		return &expr.Verdict{Kind: verdictRedirected}, true
	case "NETMAP": // of the destination, or of the source
		if h := w.pos.hook; h == *nftables.ChainHookPrerouting || h == *nftables.ChainHookOutput {
			return &expr.Verdict{Kind: verdictRedirected}, true
		}
		return &expr.Verdict{Kind: expr.VerdictAccept}, true
	case "RETURN":
		return &expr.Verdict{Kind: expr.VerdictReturn}, true
	case "NOTRACK", "CT", "TTL", "HL", "LOG", "NFLOG", "TCPMSS", "MARK", "CONNMARK", "CLASSIFY", "CHECKSUM", "AUDIT", "TRACE", "SET", "DSCP", "TOS", "CONNSECMARK", "SECMARK", "RATEEST", "LED", "IDLETIMER", "TEE":
		return nil, false
	}
	return &expr.Verdict{Kind: expr.VerdictStop}, true
}

// change notes what a target of iptables that ends no rule does with the packet. sure says
// that it is done.
func (w *walk) change(x *expr.Target, sure bool) {
	var b []byte
	if info, ok := x.Info.(*xt.Unknown); ok {
		b = *info
	}
	switch x.Name {
	case "MARK", "CONNMARK":
		w.xtMark(x, sure)
	case "NOTRACK":
		w.untrack(sure)
	case "CT": // struct xt_ct_target_info(_v1): flags, of which 1 is notrack, and a zone
		const notrack, zoneOfMark = 1, 16
		switch {
		case len(b) < 4:
			w.doubt(w.here)
		case binary.NativeEndian.Uint16(b)&notrack != 0:
			w.untrack(sure)
		case binary.NativeEndian.Uint16(b)&zoneOfMark != 0 || binary.NativeEndian.Uint16(b[2:]) != 0:
			w.setCt(expr.CtKeyZONE, nil, sure)
		}
	case "TTL", "HL": // struct ipt_TTL_info, ip6t_HL_info: a mode, and hops
		const set, add = 0, 1
		w.state.rewritten = append(w.state.rewritten, w.hopLimit())
		if len(b) < 2 || b[0] != add && (b[0] != set || w.expires(b[1])) {
			w.doubt(w.here)
		}
	case "DSCP", "TOS":
		w.state.rewritten = append(w.state.rewritten, w.trafficClass())
	}
}

// untrack takes the packet out of connection tracking, where that hasn't seen it yet.
func (w *walk) untrack(sure bool) {
	if w.pos.tracked() {
		return
	}
	if here := w.here; w.state.untracked == nil {
		w.state.untracked, w.state.kept = &here, !sure
	} else if sure && w.state.kept {
		w.state.untracked, w.state.kept = &here, false
	}
}

// condition evaluates one expression: whether the rule goes on, and whether that is
// known. sure says that the rule gets as far as this.
func (w *walk) condition(t *nftables.Table, regs *registers, x any, sure bool) (holds, known bool) {
	switch x := x.(type) {
	case *expr.Meta:
		return w.metaExpr(regs, x, sure)
	case *expr.Payload:
		return w.payload(regs, x)
	case *expr.Ct:
		if x.SourceRegister {
			w.setCt(x.Key, regs.get(x.Register, 4), sure)
			return true, true
		}
		regs.set(x.Register, w.ct(x.Key), 16)
		return true, true
	case *expr.Notrack:
		w.untrack(sure)
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
		return quotaHolds(*x)
	case *expr.Objref:
		return w.object(t, x)
	case *expr.Dynset:
		// Where it limits it is known no more than a limit.
		w.state.sets[setKey(t, x.SetName)] = true
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
		w.change(x, sure)
		return true, true
	case *expr.Counter, *expr.Log, *expr.FlowOffload, *expr.SecMark, *expr.CtHelper, *expr.CtTimeout, *expr.CtExpect:
		return true, true
	}
	*regs = registers{} // it may have written to any
	if name, ok := x.(opaque); !ok || !plainExprs[string(name)] {
		w.doubt(w.here)
	}
	return true, false
}

// plainExprs are expressions that aren't evaluated, of which it is known that they only
// end a rule where they don't hold, or fill registers: others may take the packet away, or
// change it.
var plainExprs = map[string]bool{
	"bitwise": true, "byteorder": true, "cmp": true, "connlimit": true, "dup": true, "inner": true, "last": true, "limit": true,
	"osf": true, "range": true, "rt": true, "socket": true, "xfrm": true,
}

// used evaluates a quota: the packet counts, too, and how long it is isn't known.
func quotaHolds(q expr.Quota) (holds, known bool) {
	const longest = 1 << 16
	over := q.Consumed >= q.Bytes
	return over == q.Over, over || q.Bytes-q.Consumed > longest
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
		switch x.Key {
		case expr.MetaKeyMARK:
			w.state.mark = assigned(regs.get(x.Register, 4), w.state.mark, sure)
		case expr.MetaKeyPKTTYPE: // only what is for this host is forwarded
			w.doubt(w.here)
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
	if w.pos.routed() {
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
	if part := (span{x.Base, x.Offset, x.Len}); w.isTranslated(part) || slices.ContainsFunc(append(w.unstated(), w.state.rewritten...), part.touches) {
		regs.set(x.DestRegister, nil, int(x.Len))
	}
	return true, true
}

func (a span) touches(b span) bool {
	return a.base == b.base && a.offset < b.offset+b.len && a.offset+a.len > b.offset
}

func (a span) holds(b span) bool {
	return a.base == b.base && a.offset <= b.offset && a.offset+a.len >= b.offset+b.len
}

// unstated returns the parts of a packet that a sample doesn't stand for: lengths, numbers
// and sums that differ from packet to packet.
func (w *walk) unstated() []span {
	const network, transport = expr.PayloadBaseNetworkHeader, expr.PayloadBaseTransportHeader
	out := []span{{network, 4, 2}} // IPv6's length, or IPv4's identification
	if w.s.src.Is4() {
		out = append(out, span{network, 2, 2}, span{network, 10, 2})
	}
	switch w.s.proto {
	case unix.IPPROTO_TCP:
		return append(out, span{transport, 4, 8}, span{transport, 14, 6})
	case unix.IPPROTO_UDP:
		return append(out, span{transport, 4, 4})
	}
	return append(out, span{transport, 6, 2})
}

// write evaluates a rule that writes into the packet, and reports whether it sends it to
// another address or port. Other changes that may stop it, or its answers, are doubts.
func (w *walk) write(regs *registers, x *expr.Payload) (redirects bool) {
	part := span{x.Base, x.Offset, x.Len}
	v, h := regs.get(x.SourceRegister, int(x.Len)), w.s.network()
	w.state.rewritten = append(w.state.rewritten, part)
	if x.Base == expr.PayloadBaseTransportHeader {
		h = w.s.transport()
	}
	if v == nil || x.Base != expr.PayloadBaseNetworkHeader && x.Base != expr.PayloadBaseTransportHeader || uint64(x.Offset)+uint64(x.Len) > uint64(len(h)) {
		if !w.trafficClass().holds(part) {
			w.doubt(w.here)
		}
		return false
	}
	_, to := w.endpoints(x.Base)
	for i, b := range v {
		at := span{x.Base, x.Offset + uint32(i), 1}
		switch {
		case w.isTranslated(at): // it may have that already
			w.doubt(w.here)
		case b == h[at.offset], w.trafficClass().holds(at), w.hopLimit().holds(at) && !w.expires(b):
		case at.touches(to):
			return true
		default:
			w.doubt(w.here)
		}
	}
	return false
}

// service is where the packet has its type of service, and in IPv6 a label: what these are
// stops none.
func (w *walk) trafficClass() span {
	if w.s.src.Is4() {
		return span{expr.PayloadBaseNetworkHeader, 1, 1}
	}
	return span{expr.PayloadBaseNetworkHeader, 0, 4}
}

// hops is where the packet has how many hosts may forward it yet.
func (w *walk) hopLimit() span {
	if w.s.src.Is4() {
		return span{expr.PayloadBaseNetworkHeader, 8, 1}
	}
	return span{expr.PayloadBaseNetworkHeader, 7, 1}
}

// expires reports whether a packet that gets so many hops may end on its way.
func (w *walk) expires(hops byte) bool { return hops <= 1 && w.s.oif != "" }

// ends returns where the packet has its two addresses, or ports; an echo has one number
// in place of these.
func (w *walk) endpoints(base expr.PayloadBase) (src, dst span) {
	switch {
	case base == expr.PayloadBaseTransportHeader && (w.s.proto == unix.IPPROTO_TCP || w.s.proto == unix.IPPROTO_UDP):
		return span{base, 0, 2}, span{base, 2, 2}
	case base == expr.PayloadBaseTransportHeader:
		return span{base, 4, 2}, span{base, 4, 2}
	case w.s.src.Is6():
		return span{base, 8, 16}, span{base, 24, 16}
	}
	return span{base, 12, 4}, span{base, 16, 4}
}

// hidden reports whether a part of the packet is an address that translation has changed,
// or hasn't yet: a sample has those that the policy is about.
func (w *walk) isTranslated(x span) bool {
	ports := x.base == expr.PayloadBaseTransportHeader && (w.s.proto == unix.IPPROTO_TCP || w.s.proto == unix.IPPROTO_UDP)
	if ports && w.e.port != 0 {
		return false
	}
	src, dst := w.endpoints(x.base)
	return w.onWire(true) && x.touches(dst) || w.onWire(false) && x.touches(src)
}

// onWire reports whether a forwarded packet has the address and port that it has on the
// wire: as an answer, its destination's, else its source's.
func (w *walk) onWire(reply bool) bool {
	if w.s.iif == "" || w.s.oif == "" || w.s.reply != reply {
		return false
	}
	return reply && w.pos.answered() || !reply && w.pos.translated()
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

// hasFlow reports whether conntrack has a flow for the packet by now.
func (w *walk) hasFlow() bool { return w.pos.tracked() && w.state.untracked == nil }

// stateBit returns the bit of conntrack's state (nft_ct_get_eval, and conntrack_mt of
// net/netfilter/xt_conntrack.c).
func (w *walk) stateBit() (bit uint32, known bool) {
	switch {
	case w.state.untracked != nil:
		return expr.CtStateBitUNTRACKED, !w.state.kept
	case !w.pos.tracked():
		return expr.CtStateBitINVALID, true
	case w.s.reply:
		return expr.CtStateBitESTABLISHED, true
	}
	return expr.CtStateBitNEW, true
}

// natted reports whether the packet's flow may have been translated by now.
func (w *walk) maybeTranslated() bool { return w.hasFlow() && (w.s.reply || w.pos.translated()) }

// setCt sets something of the packet's flow, where it has one.
func (w *walk) setCt(key expr.CtKey, v []byte, sure bool) {
	switch {
	case key == expr.CtKeyZONE && !w.pos.tracked() && !w.s.tunnel:
		w.doubt(w.here) // whether an answer finds its flow depends on what zone that gets
	case key == expr.CtKeyMARK && w.pos.tracked():
		w.state.ctMark = assigned(v, w.state.ctMark, sure && w.state.untracked == nil)
	}
}

// ct returns what conntrack says of the packet's flow (net/netfilter/nft_ct.c).
func (w *walk) ct(key expr.CtKey) []byte {
	if key == expr.CtKeySTATE {
		if bit, known := w.stateBit(); known {
			return native(int(bit))
		}
		return nil
	}
	if !w.hasFlow() {
		return nil
	}
	switch key {
	case expr.CtKeyDIRECTION:
		if w.s.reply {
			return []byte{1}
		}
		return []byte{0}
	case expr.CtKeyMARK:
		return w.state.ctMark
	case expr.CtKeySTATUS:
		if !w.maybeTranslated() {
			return native(0)
		}
	case expr.CtKeyL3PROTOCOL:
		return []byte{familyOf(w.s.src)}
	case expr.CtKeyPROTOCOL:
		return []byte{w.s.proto}
	}
	return nil
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

// routeType returns how the packet's destination, or its source, is routed.
func (w *walk) routeType(dst bool) int {
	if dst && (w.s.oif == "" || w.s.reply && w.pos.answered()) || !dst && w.s.iif == "" {
		return unix.RTN_LOCAL
	}
	return unix.RTN_UNICAST
}

// fib evaluates what the routing tables say of an address. Of a packet that goes on, its
// source is where it came from.
func (w *walk) fib(regs *registers, x *expr.Fib) (holds, known bool) {
	var v []byte
	switch {
	case x.ResultADDRTYPE:
		v = native(w.routeType(x.FlagDADDR))
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
	objectCounter     = 1
	objectQuota       = 2
	objectHelper      = 3
	objectLimit       = 4
	objectConnections = 5
	objectTimeout     = 7
	objectSecmark     = 8
	objectExpect      = 9
)

// object evaluates a named object.
func (w *walk) object(t *nftables.Table, x *expr.Objref) (holds, known bool) {
	switch x.Type {
	case objectCounter, objectHelper, objectTimeout, objectSecmark, objectExpect:
		return true, true
	case objectQuota:
		q, ok := w.e.quota(t, x.Name)
		holds, known = quotaHolds(q)
		return holds, known && ok
	case objectLimit, objectConnections:
		return true, false
	}
	w.doubt(w.here) // synproxy, tunnel, or one of a map
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
		// The bits are those of nftables' ct state, but for these.
		const translated, untracked = 1<<6 | 1<<7, 1 << 8
		bit, known := w.stateBit()
		if bit == expr.CtStateBitUNTRACKED {
			bit = untracked
		}
		inverted := info.InvertFlags&uint16(xt.ConntrackState) != 0
		found := uint32(info.StateMask)&bit != 0
		return found != inverted, known && (found || info.StateMask&translated == 0 || !w.maybeTranslated())
	case *xt.Udp:
		if s.proto != unix.IPPROTO_UDP {
			return false, true
		}
		from, to, known := w.ports()
		return within16(from, info.SrcPorts) != (info.InvFlags&xt.UdpInvSrcPorts != 0) &&
			within16(to, info.DstPorts) != (info.InvFlags&xt.UdpInvDestPorts != 0), known
	case *xt.Tcp:
		if s.proto != unix.IPPROTO_TCP {
			return false, true
		}
		flags := s.transport()[13]
		from, to, known := w.ports()
		return within16(from, info.SrcPorts) != (info.InvFlags&xt.TcpInvSrcPorts != 0) &&
			within16(to, info.DstPorts) != (info.InvFlags&xt.TcpInvDestPorts != 0) &&
			(flags&info.FlagsMask == info.FlagsCmp) != (info.InvFlags&xt.TcpInvFlags != 0), known && info.Option == 0
	case *xt.AddrTypeV1:
		if info.Flags&^(invertSource|invertDest) != 0 {
			return true, false
		}
		is := func(mask uint16, kind int, invert bool) bool { return mask == 0 || (mask&(1<<kind) != 0) != invert }
		return is(info.Source, w.routeType(false), info.Flags&invertSource != 0) && is(info.Dest, w.routeType(true), info.Flags&invertDest != 0), true
	case *xt.Unknown:
		b := []byte(*info)
		switch x.Name {
		case "icmp", "icmp6":
			return w.s.icmpMatch(b)
		case "multiport":
			return w.multiport(x.Rev, b)
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
func (w *walk) multiport(rev uint32, b []byte) (holds, known bool) {
	const most, size = 15, 2 + 2*15 + 15 + 1
	if rev != 1 || len(b) < size || b[1] > most {
		return true, false
	}
	if w.s.proto != unix.IPPROTO_TCP && w.s.proto != unix.IPPROTO_UDP {
		return false, true
	}
	from, to, known := w.ports()
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
	found := b[0] != 1 && in(from) || b[0] != 0 && in(to)
	return found != (b[size-1] != 0), known
}

// ports returns the ports that the packet has by now, of TCP or UDP.
func (w *walk) ports() (from, to uint16, known bool) {
	h := w.transport()
	return binary.BigEndian.Uint16(h), binary.BigEndian.Uint16(h[2:]), !w.isTranslated(span{expr.PayloadBaseTransportHeader, 0, 4})
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
	if w.state.sets[setKey(t, x.SetName)] {
		return nil, errUnknown
	}
	key := regs.get(x.SourceRegister, set.keySize)
	if key == nil {
		return nil, errUnknown
	}
	return w.e.elementOf(t, x.SetName, key)
}

var errUnknown = errors.New("the packet's part isn't known")
