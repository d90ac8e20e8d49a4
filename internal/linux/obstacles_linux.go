package linux

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/platform"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// findObstacles names the chains of other software that drop what the policy lets a
// peer do: an accept in our table doesn't override a drop in another one. Such
// chains are evaluated for the packets that matter; what can't be evaluated is
// called unclear rather than guessed.
func (o *others) findObstacles(ctx context.Context, h policy.Host, all []sample) ([]platform.Problem, error) {
	chains, err := o.conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	e := o.newEvaluator(ctx)
	var out []platform.Problem
	for _, c := range chains {
		if c.Hooknum == nil || c.Type != nftables.ChainTypeFilter || c.Table.Name == tableName {
			continue
		}
		for _, s := range all {
			if s.hook != *c.Hooknum || !s.family(c.Table.Family) {
				continue
			}
			problem, ok := e.judge(c, s)
			if err := ctx.Err(); err != nil {
				return nil, fmt.Errorf("judge chain %s: %w", c.Name, err)
			}
			if ok {
				out = append(out, problem)
				break
			}
		}
	}
	bypasses, err := o.bypasses(h)
	return append(out, bypasses...), err
}

// bypasses names flow tables of other software on the uplinks: packets of a
// running flow that is in one pass around every other rule.
func (o *others) bypasses(h policy.Host) ([]platform.Problem, error) {
	tables, err := o.conn.ListTables()
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	var out []platform.Problem
	for _, t := range tables {
		fs, err := o.conn.ListFlowtables(t)
		if err != nil {
			return nil, fmt.Errorf("list flow tables of %s: %w", t.Name, err)
		}
		for _, f := range fs {
			out = append(out, bypass(h, t, f)...)
		}
	}
	return out, nil
}

func bypass(h policy.Host, t *nftables.Table, f *nftables.Flowtable) []platform.Problem {
	for _, up := range []string{h.Uplink4, h.Uplink6} {
		if slices.Contains(f.Devices, up) {
			return []platform.Problem{{
				Step: lookAround,
				Message: fmt.Sprintf("flow table %s of table %s %s takes running flows on %s past every packet filter",
					f.Name, familyName(t.Family), t.Name, up),
				Hint: "keep interface " + h.Interface + " out of the rules that add flows there",
			}}
		}
	}
	return nil
}

// lookAround is the step under which others' rules are reported.
const lookAround = "look at other packet filters"

// sample is a packet that has to pass for a permission to be of use.
type sample struct {
	what     string // in a person's words
	hook     nftables.ChainHook
	iif, oif string
	src, dst netip.Addr
	state    uint32
}

// samples returns packets for what the ruleset's peers may do, one of each kind: rules
// that tell one peer's address from another's are rare, and there may be thousands of
// peers.
func samples(r *policy.Ruleset) []sample {
	var out []sample
	add := func(s sample) {
		if !slices.ContainsFunc(out, func(have sample) bool { return have.what == s.what && have.src.Is4() == s.src.Is4() }) {
			out = append(out, s)
		}
	}
	h := r.Host()
	for _, a := range r.Mesh().Addresses {
		for _, p := range r.Peers() {
			i := slices.IndexFunc(p.Addresses, func(b netip.Addr) bool { return a.Is4() == b.Is4() })
			if i < 0 {
				continue
			}
			peer, far := p.Addresses[i], netip.MustParseAddr("198.51.100.1")
			if a.Is6() {
				far = netip.MustParseAddr("2001:db8::1")
			}
			if up := h.Uplink(a); p.Permissions.Has(policy.Routing) && up != "" && h.Forwarding.Of(a) {
				add(sample{"from peers to the internet", *nftables.ChainHookForward, h.Interface, up, peer, far, expr.CtStateBitNEW})
				add(sample{"from the internet to peers", *nftables.ChainHookForward, up, h.Interface, far, peer, expr.CtStateBitESTABLISHED})
			}
			if p.Permissions.Has(policy.Incoming) {
				add(sample{"from peers to this host", *nftables.ChainHookInput, h.Interface, "", peer, a, expr.CtStateBitNEW})
			}
		}
	}
	return out
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

// outcome is what a chain does with a sample.
type outcome int

const (
	goesOn outcome = iota
	passes
	dropped
)

// evaluator runs foreign chains on samples.
type evaluator struct {
	conn    *nftables.Conn
	element func(t *nftables.Table, set string, key []byte) (found bool, err error)
	rules   map[string][]*nftables.Rule
	// unclear is set when a rule that could have let the sample through wasn't
	// understood.
	unclear bool
	where   string // the chain that dropped
	steps   int    // rules evaluated
}

func (o *others) newEvaluator(ctx context.Context) *evaluator {
	return &evaluator{conn: o.conn, rules: map[string][]*nftables.Rule{}, element: func(t *nftables.Table, set string, key []byte) (bool, error) {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		return elementOf(o.raw, t, set, key)
	}}
}

// maxSteps bounds how many rules are evaluated in one look, in some tenths of a second. What has
// more is unclear.
const maxSteps = 200_000

// maxJumps bounds the depth of chains, as the kernel does (NFT_JUMP_STACK_SIZE).
const maxJumps = 16

func (e *evaluator) judge(c *nftables.Chain, s sample) (platform.Problem, bool) {
	e.unclear, e.where = false, c.Name
	result := e.chain(c.Table, c.Name, s, 0)
	if result == goesOn && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop {
		result, e.where = dropped, c.Name
	}
	if result != dropped {
		return platform.Problem{}, false
	}
	verb := "drops"
	if e.unclear {
		verb = "may drop"
	}
	return platform.Problem{
		Step:    lookAround,
		Message: fmt.Sprintf("chain %s of table %s %s %s packets %s", e.where, familyName(c.Table.Family), c.Table.Name, verb, s.what),
		Hint:    fmt.Sprintf("let interface %s through there, in the software that the table belongs to", meshSide(s)),
	}, true
}

func meshSide(s sample) string {
	if s.what == "from the internet to peers" {
		return s.oif
	}
	return s.iif
}

func familyName(f nftables.TableFamily) string {
	return map[nftables.TableFamily]string{
		nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyINet: "inet",
	}[f]
}

// chain returns what a chain does with the sample.
func (e *evaluator) chain(t *nftables.Table, name string, s sample, depth int) outcome {
	rules, err := e.rulesOf(t, name)
	if err != nil || depth > maxJumps {
		e.unclear = true
		return goesOn
	}
	for _, r := range rules {
		if e.steps++; e.steps > maxSteps {
			e.unclear = true
			return goesOn
		}
		verdict, sure := e.rule(r, s)
		if verdict == nil {
			continue
		}
		result := e.follow(t, name, verdict, s, depth)
		switch {
		case verdict.Kind == expr.VerdictReturn && sure:
			return goesOn
		case verdict.Kind == expr.VerdictGoto && sure:
			return result
		case result == passes && !sure:
			e.unclear = true
		case result != goesOn && sure:
			return result
		}
	}
	return goesOn
}

func (e *evaluator) follow(t *nftables.Table, name string, v *expr.Verdict, s sample, depth int) outcome {
	switch v.Kind {
	case expr.VerdictAccept:
		return passes
	case expr.VerdictDrop:
		e.where = name
		return dropped
	case expr.VerdictJump, expr.VerdictGoto:
		return e.chain(t, v.Chain, s, depth+1)
	}
	return goesOn
}

func (e *evaluator) rulesOf(t *nftables.Table, name string) ([]*nftables.Rule, error) {
	key := fmt.Sprintf("%d %s %s", t.Family, t.Name, name)
	if rs, ok := e.rules[key]; ok {
		return rs, nil
	}
	rs, err := e.conn.GetRules(t, &nftables.Chain{Name: name, Table: t})
	if err == nil {
		e.rules[key] = rs
	}
	return rs, err
}

// registers are nftables' registers as far as their content is known.
type registers map[uint32][]byte

// rule returns the verdict that a rule gives for the sample, or nil, and whether
// it was understood completely.
func (e *evaluator) rule(r *nftables.Rule, s sample) (verdict *expr.Verdict, sure bool) {
	regs := registers{}
	sure = true
	for _, x := range r.Exprs {
		switch x := x.(type) {
		case *expr.Verdict:
			return x, sure
		case *expr.Reject:
			return &expr.Verdict{Kind: expr.VerdictDrop}, sure
		case *expr.Target:
			if x.Name == "REJECT" {
				return &expr.Verdict{Kind: expr.VerdictDrop}, sure
			}
		default:
			holds, known := e.condition(regs, x, s, r)
			if known && !holds {
				return nil, true
			}
			sure = sure && known
		}
	}
	return nil, sure
}

// condition evaluates one expression: whether the rule goes on, and whether that
// is known.
func (e *evaluator) condition(regs registers, x expr.Any, s sample, r *nftables.Rule) (holds, known bool) {
	switch x := x.(type) {
	case *expr.Meta:
		if !x.SourceRegister {
			regs[x.Register] = e.meta(x.Key, s)
		}
		return true, true
	case *expr.Payload:
		if x.DestRegister != 0 {
			regs[x.DestRegister] = s.header(x)
		}
		return true, true
	case *expr.Ct:
		if !x.SourceRegister {
			regs[x.Register] = s.ct(x.Key)
		}
		return true, true
	case *expr.Immediate:
		regs[x.Register] = x.Data
		return true, true
	case *expr.Bitwise:
		regs[x.DestRegister] = bitwise(regs[x.SourceRegister], x)
		return true, true
	case *expr.Cmp:
		return compare(regs[x.Register], x)
	case *expr.Range:
		v := regs[x.Register]
		inside := bytes.Compare(v, x.FromData) >= 0 && bytes.Compare(v, x.ToData) <= 0
		return inside == (x.Op == expr.CmpOpEq), v != nil
	case *expr.Lookup:
		return e.lookup(regs[x.SourceRegister], x, r)
	case *expr.Match:
		return matchXT(x, s)
	case *expr.Counter, *expr.Log, *expr.Notrack, *expr.Objref:
		return true, true
	}
	return true, false
}

// meta returns what a packet of ours has: UDP, no mark, no particular destination.
func (e *evaluator) meta(key expr.MetaKey, s sample) []byte {
	native := func(v int) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(v)) }
	switch key {
	case expr.MetaKeyIIFNAME:
		return name(s.iif).bytes
	case expr.MetaKeyOIFNAME:
		return name(s.oif).bytes
	case expr.MetaKeyIIF:
		return native(indexOf(s.iif))
	case expr.MetaKeyOIF:
		return native(indexOf(s.oif))
	case expr.MetaKeyNFPROTO:
		if s.src.Is4() {
			return []byte{unix.NFPROTO_IPV4}
		}
		return []byte{unix.NFPROTO_IPV6}
	case expr.MetaKeyL4PROTO:
		return []byte{unix.IPPROTO_UDP}
	case expr.MetaKeyMARK:
		return native(0)
	}
	return nil
}

// header returns bytes of the sample's IP header, and nil for what follows it:
// a sample has no ports.
func (s sample) header(x *expr.Payload) []byte {
	if x.Base != expr.PayloadBaseNetworkHeader {
		return nil
	}
	var h []byte
	if s.src.Is4() {
		h = slices.Concat([]byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, s.src.AsSlice(), s.dst.AsSlice())
	} else {
		h = slices.Concat([]byte{0x60, 0, 0, 0, 0, 8, unix.IPPROTO_UDP, 64}, s.src.AsSlice(), s.dst.AsSlice())
	}
	if uint64(x.Offset)+uint64(x.Len) > uint64(len(h)) {
		return nil
	}
	return h[x.Offset : x.Offset+x.Len]
}

func (s sample) ct(key expr.CtKey) []byte {
	switch key {
	case expr.CtKeySTATE:
		return binary.NativeEndian.AppendUint32(nil, s.state)
	case expr.CtKeyMARK:
		return make([]byte, 4)
	}
	return nil
}

func bitwise(v []byte, x *expr.Bitwise) []byte {
	if len(v) < int(x.Len) || len(x.Mask) < int(x.Len) || len(x.Xor) < int(x.Len) {
		return nil
	}
	out := make([]byte, x.Len)
	for i := range out {
		out[i] = v[i]&x.Mask[i] ^ x.Xor[i]
	}
	return out
}

// compare compares as many bytes as the rule has: fewer than a name's 16 are a
// beginning that any name may have.
func compare(v []byte, x *expr.Cmp) (holds, known bool) {
	if len(v) < len(x.Data) {
		return true, false
	}
	c := bytes.Compare(v[:len(x.Data)], x.Data)
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

// lookup asks the kernel whether a foreign set has an element. What a verdict map says
// isn't known.
func (e *evaluator) lookup(v []byte, x *expr.Lookup, r *nftables.Rule) (holds, known bool) {
	if v == nil {
		return true, false
	}
	there, err := e.element(r.Table, x.SetName, v)
	if err != nil || x.IsDestRegSet && there {
		return true, false
	}
	return there != x.Invert, true
}

// elementOf reports whether a set has an element that a key falls in. The kernel looks
// it up (nft_get_set_elem in net/netfilter/nf_tables_api.c): a set may have a hundred
// thousand elements.
func elementOf(c *mdlayher.Conn, t *nftables.Table, set string, key []byte) (bool, error) {
	value, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{{Type: unix.NFTA_DATA_VALUE, Data: key}})
	if err != nil {
		return false, err
	}
	nested := func(of uint16, data []byte) ([]byte, error) {
		return mdlayher.MarshalAttributes([]mdlayher.Attribute{{Type: unix.NLA_F_NESTED | of, Data: data}})
	}
	for _, of := range []uint16{unix.NFTA_SET_ELEM_KEY, unix.NFTA_LIST_ELEM} {
		if value, err = nested(of, value); err != nil {
			return false, err
		}
	}
	data, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{
		{Type: unix.NFTA_SET_ELEM_LIST_TABLE, Data: append([]byte(t.Name), 0)},
		{Type: unix.NFTA_SET_ELEM_LIST_SET, Data: append([]byte(set), 0)},
		{Type: unix.NLA_F_NESTED | unix.NFTA_SET_ELEM_LIST_ELEMENTS, Data: value},
	})
	if err != nil {
		return false, err
	}
	_, err = c.Execute(mdlayher.Message{
		Header: mdlayher.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETSETELEM, Flags: mdlayher.Request | mdlayher.Acknowledge},
		Data:   append([]byte{byte(t.Family), unix.NFNETLINK_V0, 0, 0}, data...),
	})
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}

// indexOf returns the number of an interface of this thread's network namespace, or 0.
func indexOf(name string) int {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return 0
	}
	return i.Index
}

// matchXT evaluates the iptables matches that other software's forward chains
// are full of.
func matchXT(x *expr.Match, s sample) (holds, known bool) {
	switch info := x.Info.(type) {
	case *xt.Comment:
		return true, true
	case *xt.ConntrackMtinfo3:
		if info.MatchFlags != uint16(xt.ConntrackState) && info.MatchFlags != uint16(xt.ConntrackState|xt.ConntrackStateAlias) {
			return true, false
		}
		// The bits are those of nftables' ct state.
		inverted := info.InvertFlags&uint16(xt.ConntrackState) != 0
		return (uint32(info.StateMask)&s.state != 0) != inverted, true
	}
	return true, false
}
