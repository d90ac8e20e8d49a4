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

// This file evaluates other software's chains for one packet, as nft_do_chain in
// net/netfilter/nf_tables_core.c does. It never guesses: after a rule that it doesn't
// understand and that may match, the result is unclear.

// sample is a packet for which chains are evaluated.
type sample struct {
	what     string // description for people
	iif, oif string // "" for this host itself
	src, dst netip.Addr
	proto    uint8 // UDP, TCP, or the family's ICMP (an echo)
	// sport and dport are the ports. Those of samples are ones that rules aren't expected
	// to name.
	sport, dport uint16
	// reply marks a packet of a flow that the other end opened; otherwise it is the first
	// one of its flow.
	reply bool
	// tunnel marks WireGuard's own packets.
	tunnel bool
}

// hooks returns the hooks that the packet passes, in order.
func (s sample) hooks() []nftables.ChainHook {
	switch {
	case s.iif == "":
		return []nftables.ChainHook{*nftables.ChainHookOutput, *nftables.ChainHookPostrouting}
	case s.oif == "":
		return []nftables.ChainHook{*nftables.ChainHookPrerouting, *nftables.ChainHookInput}
	}
	return []nftables.ChainHook{*nftables.ChainHookPrerouting, *nftables.ChainHookForward, *nftables.ChainHookPostrouting}
}

// family reports whether tables of this family see the packet.
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
	goesOn     outcome = iota // no verdict: the next chain decides
	passes                    // accepted
	dropped                   // dropped or rejected
	redirected                // the destination is changed (DNAT, redirect)
	untracked                 // excluded from connection tracking (notrack), so it isn't translated
)

// finding is what other chains do with a packet, and the place that decides.
type finding struct {
	outcome outcome
	// unclear is set if a rule that wasn't understood may decide otherwise. The place is
	// then that of the rule.
	unclear bool
	family  nftables.TableFamily
	table   string
	chain   string
	rule    string // "" for the chain's policy
}

// where describes the place. There is none if the rules kept changing.
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

// evaluator runs other software's chains on packets. It reads each chain once, and
// everything again when the ruleset changed in the meantime.
type evaluator struct {
	// list reads all chains.
	list func() ([]*nftables.Chain, error)
	// generation returns the number of nftables' last transaction.
	generation func() (uint32, error)
	// ask sends a request about rules, sets or objects to the kernel.
	ask func(mdlayher.Message) ([]mdlayher.Message, error)
	// index returns the index of an interface, which rules compare instead of its name.
	index func(name string) int

	read   uint32 // the generation of the fields below
	chains []*nftables.Chain
	rules  map[string][]foreignRule
	sets   map[string]foreignSet
	port   uint16 // a port that peers' flows are translated to; 0: not known
	steps  int    // number of rules evaluated so far
}

// Bounds for one evaluator: the number of rules evaluated, which take some tenths of a
// second, and the depth of jumps, as in the kernel (NFT_JUMP_STACK_SIZE). Beyond them the
// result is unclear.
const (
	maxSteps = 200_000
	maxJumps = 16
)

// newEvaluator returns an evaluator of the current ruleset. Its requests fail after ctx
// has ended.
func (i *informer) newEvaluator(ctx context.Context) (*evaluator, error) {
	e := &evaluator{
		list:  func() ([]*nftables.Chain, error) { return i.lists.ListChains(nftables.TableFamilyUnspecified) },
		index: indexOf, port: uint16(i.observed.port.Load()),
		generation: func() (uint32, error) { return generationOf(i.sock) },
		ask: func(m mdlayher.Message) ([]mdlayher.Message, error) {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			return i.sock.Execute(m)
		},
	}
	return e, e.begin()
}

// begin reads the base chains and drops everything else that was read.
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

// priorityOf returns a chain's priority at its hook.
func priorityOf(c *nftables.Chain) nftables.ChainPriority {
	if c.Priority == nil {
		return 0
	}
	return *c.Priority
}

// indexOf returns the index of an interface in this thread's network namespace, or 0.
func indexOf(name string) int {
	// Not net.InterfaceByName: it uses a dump, and accepts an interrupted one.
	ifr, err := unix.NewIfreq(name)
	if err != nil || askInterface(unix.SIOCGIFINDEX, ifr) != nil {
		return 0
	}
	return int(ifr.Uint32())
}

// nameOf returns the name of an interface in this thread's network namespace.
func nameOf(index int) (string, bool) {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return "", false
	}
	ifr.SetUint32(uint32(index))
	if askInterface(unix.SIOCGIFNAME, ifr) != nil {
		return "", false
	}
	return ifr.Name(), true
}

// askInterface carries out a request of netdevice(7) about ifr.
func askInterface(request uint, ifr *unix.Ifreq) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.IoctlIfreq(fd, request, ifr)
}

// position is where on its way a packet is.
type position struct {
	hook     nftables.ChainHook
	priority nftables.ChainPriority
	device   bool // at a device's hook, before or after all others
}

// positionOf returns the position of a base chain's packets.
func positionOf(c *nftables.Chain) position {
	return position{*c.Hooknum, priorityOf(c), atDevice(c)}
}

// Hooks of devices (enum nf_dev_hooks and NF_INET_INGRESS in linux/netfilter.h).
const (
	deviceIngress = 0
	deviceEgress  = 1
	inetIngress   = 5
)

// atDevice reports whether a base chain is at a device's hook.
func atDevice(c *nftables.Chain) bool {
	return c.Table.Family == nftables.TableFamilyNetdev || c.Table.Family == nftables.TableFamilyINet && *c.Hooknum == inetIngress
}

// arriving reports whether the packet is at the ingress hook of its input device, and
// leaving whether it is at the egress hook of its output device.
func (p position) arriving() bool { return p.device && p.hook != deviceEgress }
func (p position) leaving() bool  { return p.device && p.hook == deviceEgress }

// tracked reports whether conntrack has seen the packet (NF_IP_PRI_CONNTRACK).
func (p position) tracked() bool {
	early := p.hook == *nftables.ChainHookPrerouting || p.hook == *nftables.ChainHookOutput
	return !p.arriving() && !(!p.device && early && p.priority < *nftables.ChainPriorityConntrack)
}

// routed reports whether the packet's output interface is known.
func (p position) routed() bool {
	return !p.arriving() && (p.device || p.hook != *nftables.ChainHookPrerouting && p.hook != *nftables.ChainHookInput)
}

// answered reports whether an answer to a translated flow still has its destination on
// the wire (before NF_IP_PRI_NAT_DST).
func (p position) answered() bool {
	return p.arriving() || !p.device && p.hook == *nftables.ChainHookPrerouting && p.priority < *nftables.ChainPriorityNATDest
}

// translated reports whether the source may already be translated (our chain runs before
// NF_IP_PRI_NAT_SRC).
func (p position) translated() bool {
	return p.leaving() || !p.device && p.hook == *nftables.ChainHookPostrouting && p.priority > sourceNAT
}

// flowState is what rules change about a packet on its way.
type flowState struct {
	mark, ctMark []byte // nil if not known
	// untracked is the rule that excludes the packet from connection tracking. kept is
	// set if that isn't certain.
	untracked *finding
	kept      bool
	// rewritten are parts of the packet that a rule has written to, whose content isn't
	// tracked.
	rewritten []span
	// sets are the sets that the packet itself may have changed.
	sets map[string]bool
}

// span is a part of a header, in bytes.
type span struct {
	base        expr.PayloadBase
	offset, len uint32
}

// maxReads bounds how often the ruleset is read for one packet.
const maxReads = 4

// consistent evaluates until the ruleset didn't change in the meantime, and reports
// whether that succeeded. Parts of two generations may say what neither says, and an
// interrupted dump mixes two generations.
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

// run returns what happens to a packet on its way through other software's chains.
func (e *evaluator) run(s sample) (f finding) {
	if !e.consistent(func() { f = e.evaluate(s) }) {
		return finding{outcome: passes, unclear: true}
	}
	return f
}

// evaluate evaluates the chains once.
func (e *evaluator) evaluate(s sample) finding {
	w := newWalk(e, s)
	var maybe *finding
	for _, chains := range e.passed(s) {
		for _, c := range chains {
			// NAT chains only see a flow's first packet, until a rule has translated it.
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
			// An earlier, unclear rule may have decided otherwise.
			f.unclear = true
			return f
		}
	}
	switch u := w.state.untracked; {
	case u != nil && !s.tunnel:
		// An untracked packet of a peer isn't translated; one for a peer is dropped by
		// our table.
		u.outcome, u.unclear = untracked, maybe != nil || w.state.kept
		return *u
	case maybe != nil:
		return *maybe
	}
	return finding{outcome: passes}
}

// markOf returns the mark that a packet has when it is routed, or 0 if that isn't known.
// For a packet that arrives, chains before routing set it. The host's own packets are
// routed again if a chain of type route marks them.
func (e *evaluator) markOf(s sample) (mark uint32) {
	if !e.consistent(func() { mark = e.evaluateMark(s) }) {
		return 0
	}
	return mark
}

// evaluateMark evaluates the mark once.
func (e *evaluator) evaluateMark(s sample) uint32 {
	w := newWalk(e, s)
	var mark []byte
	for _, chains := range e.passed(s)[:2] { // the device's hook and the first one
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

// walk is one packet on its way through the chains: the sample, what rules have changed
// about it so far, and where it is.
type walk struct {
	e     *evaluator
	s     sample
	state flowState
	pos   position
	// sure is set if the packet certainly reaches the chain that is evaluated. here is
	// the current rule.
	sure bool
	here finding
	// unclear is set after a rule that wasn't understood and may have ended the chain
	// otherwise; at is the first such rule.
	unclear bool
	at      finding
}

// newWalk starts a walk. The mark of a running flow is unknown: rules set it when the
// flow began.
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

// doubt records that a rule may decide otherwise.
func (w *walk) doubt(here finding) {
	if !w.unclear {
		w.unclear, w.at = true, here
	}
}

// chain evaluates a chain and the ones that it jumps to.
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
		default: // queue, stolen: userspace or another module decides
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

// verdictRedirected is a verdict of this evaluator, not of nftables: the destination was
// changed.
const verdictRedirected expr.VerdictKind = 1000

// registers are nftables' registers: 16 words of 4 bytes, which are also addressed as
// four registers of 16 bytes (NFT_REG_1 to NFT_REG_4). known tells which bytes are known.
type registers struct {
	data  [64]byte
	known [64]bool
}

// registerAt returns the offset of a register in bytes (nft_parse_register in
// net/netfilter/nf_tables_api.c).
func registerAt(reg uint32) int {
	if reg >= unix.NFT_REG32_00 {
		return int(reg-unix.NFT_REG32_00) * 4
	}
	return int(reg-1) * 16
}

// set stores v, or marks size bytes as unknown if v is nil. Like the kernel it fills up
// words with zeros.
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

// get returns the first n bytes of a register, or nil if one of them isn't known.
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

// rule returns the verdict of a rule for the packet, or nil, and whether the rule was
// understood completely.
func (w *walk) rule(t *nftables.Table, r foreignRule) (verdict *expr.Verdict, sure bool) {
	regs := &registers{}
	sure = true
	// The kernel runs the expressions in order and stops at the first one that doesn't hold
	// (NFT_BREAK). An unknown result counts as true, and makes the rest uncertain.
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

// target returns the verdict of an iptables target.
func (w *walk) target(x *expr.Target) (v *expr.Verdict, ends bool) {
	switch x.Name {
	case "REJECT", "DROP", "TARPIT":
		return &expr.Verdict{Kind: expr.VerdictDrop}, true
	case "ACCEPT", "MASQUERADE", "SNAT":
		return &expr.Verdict{Kind: expr.VerdictAccept}, true
	case "DNAT", "REDIRECT":
		return &expr.Verdict{Kind: verdictRedirected}, true
	case "NETMAP": // translates the destination or the source, depending on the hook
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

// change records what an iptables target that doesn't end the rule does to the packet.
// sure reports that the rule certainly gets there.
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
	case "CT": // struct xt_ct_target_info(_v1) in linux/netfilter/xt_CT.h: flags, of which 1 is notrack, and a zone
		const notrack, zoneOfMark = 1, 16
		switch {
		case len(b) < 4:
			w.doubt(w.here)
		case binary.NativeEndian.Uint16(b)&notrack != 0:
			w.untrack(sure)
		case binary.NativeEndian.Uint16(b)&zoneOfMark != 0 || binary.NativeEndian.Uint16(b[2:]) != 0:
			w.setCt(expr.CtKeyZONE, nil, sure)
		}
	case "TTL", "HL": // struct ipt_TTL_info, ip6t_HL_info: a mode and a hop limit
		const set, add = 0, 1
		w.state.rewritten = append(w.state.rewritten, w.hopLimit())
		if len(b) < 2 || b[0] != add && (b[0] != set || w.expires(b[1])) {
			w.doubt(w.here)
		}
	case "DSCP", "TOS":
		w.state.rewritten = append(w.state.rewritten, w.trafficClass())
	}
}

// untrack excludes the packet from connection tracking, if conntrack hasn't seen it yet.
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

// condition evaluates one expression: whether the rule continues, and whether that is
// known. sure reports that the rule certainly gets to this expression.
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
		return true, true // sets an option and never ends the rule
	case *expr.Quota:
		return quotaHolds(*x)
	case *expr.Objref:
		return w.object(t, x)
	case *expr.Dynset:
		// With a limit the result isn't known.
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
	*regs = registers{} // it may have written to any register
	if name, ok := x.(opaque); !ok || !plainExprs[string(name)] {
		w.doubt(w.here)
	}
	return true, false
}

// plainExprs are expressions that aren't evaluated, but can only end the rule or write to
// registers. Other unknown expressions may take the packet away or change it.
var plainExprs = map[string]bool{
	"bitwise": true, "byteorder": true, "cmp": true, "connlimit": true, "dup": true, "inner": true, "last": true, "limit": true,
	"osf": true, "range": true, "rt": true, "socket": true, "xfrm": true,
}

// quotaHolds evaluates a quota. The packet counts, too, and its length isn't known.
func quotaHolds(q expr.Quota) (holds, known bool) {
	const longest = 1 << 16
	over := q.Consumed >= q.Bytes
	return over == q.Over, over || q.Bytes-q.Consumed > longest
}

// xtMark records what iptables targets do with marks. MARK has a struct xt_mark_tginfo2:
// a value and the bits that it replaces (linux/netfilter/xt_mark.h).
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

// assigned returns the mark after a rule set it to v; nil if that isn't known.
func assigned(v, before []byte, sure bool) []byte {
	if v == nil || !sure && !bytes.Equal(v, before) {
		return nil
	}
	return slices.Clone(v)
}

// swapped converts each number of size bytes between host and network byte order.
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

// native returns a 32-bit number in host byte order.
func native(v int) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(v)) }

// metaExpr evaluates meta (net/netfilter/nft_meta.c).
func (w *walk) metaExpr(regs *registers, x *expr.Meta, sure bool) (holds, known bool) {
	if x.SourceRegister {
		switch x.Key {
		case expr.MetaKeyMARK:
			w.state.mark = assigned(regs.get(x.Register, 4), w.state.mark, sure)
		case expr.MetaKeyPKTTYPE: // only packets with PACKET_HOST are forwarded
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
	case expr.MetaKeyPROTOCOL: // ethertype
		regs.set(x.Register, map[bool][]byte{true: {0x08, 0x00}, false: {0x86, 0xdd}}[s.src.Is4()], 0)
	case expr.MetaKeyL4PROTO:
		regs.set(x.Register, []byte{s.proto}, 0)
	case expr.MetaKeyMARK:
		regs.set(x.Register, w.state.mark, 4)
	case expr.MetaKeyPKTTYPE:
		regs.set(x.Register, []byte{unix.PACKET_HOST}, 0)
	case expr.MetaKeySKUID, expr.MetaKeySKGID:
		if s.iif != "" && s.oif != "" {
			return false, true // a forwarded packet has no socket
		}
		if s.tunnel && s.iif == "" { // from the helper's own socket
			id := os.Geteuid()
			if x.Key == expr.MetaKeySKGID {
				id = os.Getegid()
			}
			regs.set(x.Register, native(id), 4)
			break
		}
		regs.set(x.Register, nil, 4)
	default: // length, interface type, time of day: not known of a sample
		regs.set(x.Register, nil, 16)
	}
	return true, true
}

// oif is the packet's output interface, once that is known.
func (w *walk) oif() string {
	if w.pos.routed() {
		return w.s.oif
	}
	return ""
}

// number returns the index of an interface, or 0 for none.
func (w *walk) number(name string) []byte {
	if name == "" {
		return native(0)
	}
	return native(w.e.index(name))
}

// familyOf returns the address's family as nftables has it.
func familyOf(a netip.Addr) byte {
	if a.Is4() {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

// payload loads bytes of the packet. The rule ends if the packet doesn't have them.
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

// touches reports whether two spans overlap.
func (a span) touches(b span) bool {
	return a.base == b.base && a.offset < b.offset+b.len && a.offset+a.len > b.offset
}

// holds reports whether b is inside of a.
func (a span) holds(b span) bool {
	return a.base == b.base && a.offset <= b.offset && a.offset+a.len >= b.offset+b.len
}

// unstated returns the parts of a packet that a sample doesn't determine: lengths, IDs,
// sequence numbers and checksums.
func (w *walk) unstated() []span {
	const network, transport = expr.PayloadBaseNetworkHeader, expr.PayloadBaseTransportHeader
	out := []span{{network, 4, 2}} // IPv6's length, or IPv4's identification
	if w.s.src.Is4() {
		out = append(out, span{network, 2, 2}, span{network, 10, 2}) // length, checksum
	}
	switch w.s.proto {
	case unix.IPPROTO_TCP: // sequence numbers; window, checksum and urgent pointer
		return append(out, span{transport, 4, 8}, span{transport, 14, 6})
	case unix.IPPROTO_UDP: // length and checksum
		return append(out, span{transport, 4, 4})
	}
	return append(out, span{transport, 6, 2}) // an echo's sequence number
}

// write evaluates an expression that writes to the packet, and reports whether that
// changes the destination address or port. Other changes that may stop the packet or its
// answers raise a doubt.
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
		case w.isTranslated(at): // may already have this value
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

// trafficClass is the span of the packet's type of service or, in IPv6, of traffic class
// and flow label. Changing these stops no packet.
func (w *walk) trafficClass() span {
	if w.s.src.Is4() {
		return span{expr.PayloadBaseNetworkHeader, 1, 1}
	}
	return span{expr.PayloadBaseNetworkHeader, 0, 4}
}

// hopLimit is the span of the TTL or hop limit.
func (w *walk) hopLimit() span {
	if w.s.src.Is4() {
		return span{expr.PayloadBaseNetworkHeader, 8, 1}
	}
	return span{expr.PayloadBaseNetworkHeader, 7, 1}
}

// expires reports whether a packet with this hop limit may not reach its destination.
func (w *walk) expires(hops byte) bool { return hops <= 1 && w.s.oif != "" }

// endpoints returns the spans of the two addresses, or ports. An echo has one identifier
// in place of ports.
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

// isTranslated reports whether a part of the packet is an address or port that differs
// here from the sample's because of translation. A sample has the addresses that the
// policy judges.
func (w *walk) isTranslated(x span) bool {
	ports := x.base == expr.PayloadBaseTransportHeader && (w.s.proto == unix.IPPROTO_TCP || w.s.proto == unix.IPPROTO_UDP)
	if ports && w.e.port != 0 {
		return false
	}
	src, dst := w.endpoints(x.base)
	return w.onWire(true) && x.touches(dst) || w.onWire(false) && x.touches(src)
}

// onWire reports whether a forwarded packet has the translated address and port here: an
// answer at its destination, others at their source.
func (w *walk) onWire(reply bool) bool {
	if w.s.iif == "" || w.s.oif == "" || w.s.reply != reply {
		return false
	}
	return reply && w.pos.answered() || !reply && w.pos.translated()
}

// transport returns the transport header, with a port that peers' flows are translated to
// where the packet has one.
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

// network returns the IP header: version, length 48, TTL 63, protocol and addresses.
func (s *sample) network() []byte {
	if s.src.Is4() {
		return slices.Concat([]byte{0x45, 0, 0, 48, 0, 0, 0, 0, 63, s.proto, 0, 0}, s.src.AsSlice(), s.dst.AsSlice())
	}
	return slices.Concat([]byte{0x60, 0, 0, 0, 0, 28, s.proto, 63}, s.src.AsSlice(), s.dst.AsSlice())
}

// transport returns the beginning of the transport header: SYN or SYN+ACK, UDP, or an
// echo request or reply.
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

// hasFlow reports whether conntrack has a flow for the packet at this position.
func (w *walk) hasFlow() bool { return w.pos.tracked() && w.state.untracked == nil }

// stateBit returns the bit of conntrack's state (nft_ct_get_eval, and conntrack_mt in
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

// maybeTranslated reports whether the packet's flow may be translated at this position.
func (w *walk) maybeTranslated() bool { return w.hasFlow() && (w.s.reply || w.pos.translated()) }

// setCt evaluates a rule that sets a property of the packet's flow.
func (w *walk) setCt(key expr.CtKey, v []byte, sure bool) {
	switch {
	case key == expr.CtKeyZONE && !w.pos.tracked() && !w.s.tunnel:
		w.doubt(w.here) // an answer finds its flow only if it gets the same zone
	case key == expr.CtKeyMARK && w.pos.tracked():
		w.state.ctMark = assigned(v, w.state.ctMark, sure && w.state.untracked == nil)
	}
}

// ct returns a property of the packet's flow (net/netfilter/nft_ct.c), or nil if it isn't
// known.
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
	case expr.CtKeySTATUS: // without IPS_SRC_NAT and so on, which only translation sets
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

// bitwise applies mask and xor (net/netfilter/nft_bitwise.c).
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

// compare compares as many bytes as the rule has: fewer than a name's 16 are a prefix of
// a name.
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

// routeType returns the route type of the packet's destination or source.
func (w *walk) routeType(dst bool) int {
	if dst && (w.s.oif == "" || w.s.reply && w.pos.answered()) || !dst && w.s.iif == "" {
		return unix.RTN_LOCAL
	}
	return unix.RTN_UNICAST
}

// fib evaluates a lookup in the routing tables. It assumes that the source of a forwarded
// packet is reached by the interface that the packet came from.
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

// exthdr evaluates IP options, extension headers and TCP options. A sample has none of
// the first two.
func (w *walk) exthdr(regs *registers, x *expr.Exthdr) (holds, known bool) {
	if x.Op == expr.ExthdrOpTcpopt {
		regs.set(x.DestRegister, nil, int(x.Len))
		return true, w.s.proto != unix.IPPROTO_TCP // without a TCP header the rule ends
	}
	if x.Flags&unix.NFT_EXTHDR_F_PRESENT == 0 {
		return false, true
	}
	regs.set(x.DestRegister, []byte{0}, 0)
	return true, true
}

// Types of named objects (linux/netfilter/nf_tables.h).
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

// object evaluates a reference to a named object.
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
	w.doubt(w.here) // synproxy, tunnel, or an object from a map
	return true, false
}

// Invert flags of the addrtype match (linux/netfilter/xt_addrtype.h).
const (
	invertSource xt.AddrTypeFlags = 1
	invertDest   xt.AddrTypeFlags = 2
)

// match evaluates the iptables matches that are common in other software's chains.
func (w *walk) match(x *expr.Match) (holds, known bool) {
	s := &w.s
	switch info := x.Info.(type) {
	case *xt.Comment:
		return true, true
	case *xt.ConntrackMtinfo3:
		if info.MatchFlags != uint16(xt.ConntrackState) && info.MatchFlags != uint16(xt.ConntrackState|xt.ConntrackStateAlias) {
			return true, false
		}
		// The bits are those of nftables' ct state, except for these.
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
		case "pkttype": // struct xt_pkttype_info: a type and an invert flag
			if len(b) >= 8 {
				return (binary.NativeEndian.Uint32(b) == unix.PACKET_HOST) != (binary.NativeEndian.Uint32(b[4:]) != 0), true
			}
		}
		// struct xt_mark_mtinfo1 in linux/netfilter/xt_mark.h: mark, mask, invert flag.
		if x.Name == "mark" && len(b) >= 9 && w.state.mark != nil {
			mark := binary.NativeEndian.Uint32(w.state.mark)
			return (mark&binary.NativeEndian.Uint32(b[4:]) == binary.NativeEndian.Uint32(b)) != (b[8] != 0), true
		}
	}
	return true, false
}

// icmpMatch evaluates struct ipt_icmp or ip6t_icmp, which are alike: a type (255 for
// any), a range of codes and an invert flag.
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

// multiport evaluates struct xt_multiport_v1 (linux/netfilter/xt_multiport.h): which
// ports (source, destination or either), their number, 15 ports, 15 flags that mark the
// first port of a range, and an invert flag.
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

// ports returns the TCP or UDP ports that the packet has at this position.
func (w *walk) ports() (from, to uint16, known bool) {
	h := w.transport()
	return binary.BigEndian.Uint16(h), binary.BigEndian.Uint16(h[2:]), !w.isTranslated(span{expr.PayloadBaseTransportHeader, 0, 4})
}

// within16 reports whether p is in the range r, inclusive.
func within16(p uint16, r [2]uint16) bool { return p >= r[0] && p <= r[1] }

// lookupMap evaluates a lookup in a map. It returns the verdict, or stores the value in a
// register.
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

// element asks the kernel for the set element that matches the key in a register; nil if
// there is none.
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

// errUnknown is the error of a lookup whose key, or whose set, isn't known.
var errUnknown = errors.New("the value isn't known")
