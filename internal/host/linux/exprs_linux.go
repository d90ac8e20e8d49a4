package linux

import (
	"fmt"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// firstWord is the first of nftables' 32-bit registers (NFT_REG32_00). The parts of a
// concatenated key lie in consecutive registers.
const firstWord = unix.NFT_REG32_00

// ipv4Option is NFT_EXTHDR_OP_IPV4 of linux/netfilter/nf_tables.h, which the library
// lacks.
const ipv4Option expr.ExthdrOp = 2

// rtXFRM is NFT_RT_XFRM of linux/netfilter/nf_tables.h, which the library lacks.
const rtXFRM expr.RtKey = 4

// load describes how a field is loaded into a register: the expression, the field's size
// in bytes, and the protocols for which the bytes have that meaning.
type load struct {
	into    func(reg uint32) expr.Any
	size    uint32
	nfproto byte // 0: any
	l4proto byte // 0: any
}

// meta loads packet metadata (nft_meta.c).
func meta(key expr.MetaKey, size uint32) load {
	return load{into: func(reg uint32) expr.Any { return &expr.Meta{Key: key, Register: reg} }, size: size}
}

// payload loads size bytes of a header (nft_payload.c).
func payload(base expr.PayloadBase, offset, size uint32) load {
	return load{into: func(reg uint32) expr.Any {
		return &expr.Payload{DestRegister: reg, Base: base, Offset: offset, Len: size}
	}, size: size}
}

// ct loads a property of the packet's conntrack entry (nft_ct.c).
func ct(key expr.CtKey, size uint32) load {
	return load{into: func(reg uint32) expr.Any { return &expr.Ct{Key: key, Register: reg} }, size: size}
}

// option loads whether the packet has an IP option or extension header: 1 or 0.
func option(op expr.ExthdrOp, number byte) load {
	return load{into: func(reg uint32) expr.Any {
		return &expr.Exthdr{DestRegister: reg, Type: number, Len: 1, Flags: unix.NFT_EXTHDR_F_PRESENT, Op: op}
	}, size: 1}
}

// of restricts a field to a network and a transport protocol; 0 is any.
func (l load) of(nfproto, l4proto byte) load {
	l.nfproto, l.l4proto = nfproto, l4proto
	return l
}

// Numbers of the IP options for source routing (RFC 791 3.1) and of the IPv6 routing
// header (RFC 8200 4.4).
const (
	optionLSRR    = 131
	optionSSRR    = 137
	headerRouting = 43
)

// loads describes each field. Offsets are those of the IPv4, IPv6, TCP and ICMP headers.
var loads = map[field]load{
	iifname:       meta(expr.MetaKeyIIFNAME, ifnameSize),
	oifname:       meta(expr.MetaKeyOIFNAME, ifnameSize),
	nfproto:       meta(expr.MetaKeyNFPROTO, 1),
	l4proto:       meta(expr.MetaKeyL4PROTO, 1),
	saddr4:        payload(expr.PayloadBaseNetworkHeader, 12, 4).of(unix.NFPROTO_IPV4, 0),
	daddr4:        payload(expr.PayloadBaseNetworkHeader, 16, 4).of(unix.NFPROTO_IPV4, 0),
	saddr6:        payload(expr.PayloadBaseNetworkHeader, 8, 16).of(unix.NFPROTO_IPV6, 0),
	daddr6:        payload(expr.PayloadBaseNetworkHeader, 24, 16).of(unix.NFPROTO_IPV6, 0),
	sport:         payload(expr.PayloadBaseTransportHeader, 0, 2),
	dport:         payload(expr.PayloadBaseTransportHeader, 2, 2),
	icmpType:      payload(expr.PayloadBaseTransportHeader, 0, 1).of(unix.NFPROTO_IPV4, policy.ProtoICMP),
	icmp6Type:     payload(expr.PayloadBaseTransportHeader, 0, 1).of(unix.NFPROTO_IPV6, policy.ProtoICMPv6),
	tcpFlags:      payload(expr.PayloadBaseTransportHeader, 13, 1).of(0, policy.ProtoTCP),
	lsrr:          option(ipv4Option, optionLSRR).of(unix.NFPROTO_IPV4, 0),
	ssrr:          option(ipv4Option, optionSSRR).of(unix.NFPROTO_IPV4, 0),
	routingHeader: option(expr.ExthdrOpIpv6, headerRouting).of(unix.NFPROTO_IPV6, 0),
	ctState:       ct(expr.CtKeySTATE, 4),
	ctDirection:   ct(expr.CtKeyDIRECTION, 1),
	ctStatus:      ct(expr.CtKeySTATUS, 4),
	ctProtocol:    ct(expr.CtKeyPROTOCOL, 1),
	quotedDst4:    payload(expr.PayloadBaseTransportHeader, 8+16, 4).of(unix.NFPROTO_IPV4, 0),
	quotedDst6:    payload(expr.PayloadBaseTransportHeader, 8+24, 16).of(unix.NFPROTO_IPV6, 0),
	ctOrigDport:   ct(expr.CtKeyPROTODST, 2),
	skuid:         meta(expr.MetaKeySKUID, 4),
	returnPath: {into: func(reg uint32) expr.Any {
		return &expr.Fib{Register: reg, ResultOIF: true, FlagSADDR: true, FlagIIF: true}
	}, size: 4},
	rtIPsec: {into: func(reg uint32) expr.Any { return &expr.Rt{Register: reg, Key: rtXFRM} }, size: 1},
	mark:    meta(expr.MetaKeyMARK, 4),
	destinationType: {into: func(reg uint32) expr.Any {
		return &expr.Fib{Register: reg, ResultADDRTYPE: true, FlagDADDR: true}
	}, size: 4},
}

// ruleExprs collects the kernel's expressions for one rule. nfproto and l4proto are the
// protocols that the expressions so far require.
type ruleExprs struct {
	out              []expression
	nfproto, l4proto byte
}

// expression is either one that the library knows or a name with encoded attributes.
type expression struct {
	known expr.Any
	name  string
	attrs []netlink.Attribute
}

// marshal encodes an expression for a table of the family inet.
func (e expression) marshal() ([]byte, error) {
	if e.known != nil {
		return expr.Marshal(unix.NFPROTO_INET, e.known)
	}
	data, err := netlink.MarshalAttributes(e.attrs)
	if err != nil {
		return nil, err
	}
	return netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_EXPR_NAME, Data: append([]byte(e.name), 0)},
		{Type: unix.NLA_F_NESTED | unix.NFTA_EXPR_DATA, Data: data},
	})
}

// add appends expressions that the library encodes.
func (x *ruleExprs) add(es ...expr.Any) {
	for _, e := range es {
		x.out = append(x.out, expression{known: e})
	}
}

// exprs returns the kernel's expressions for a rule.
func exprs(r rule) ([]expression, error) {
	var x ruleExprs
	for _, m := range r.matches {
		if err := x.match(m); err != nil {
			return nil, fmt.Errorf("rule %q: %w", r, err)
		}
	}
	x.action(r.action)
	return x.out, nil
}

// require adds the protocol checks without which a field's bytes would mean something
// else, each once per rule. nft does the same ("meta nfproto ipv4" before "ip saddr").
func (x *ruleExprs) require(l load) {
	if l.nfproto != 0 && x.nfproto != l.nfproto {
		x.nfproto = l.nfproto
		x.compare(loads[nfproto], expr.CmpOpEq, []byte{l.nfproto})
	}
	if l.l4proto != 0 && x.l4proto != l.l4proto {
		x.l4proto = l.l4proto
		x.compare(loads[l4proto], expr.CmpOpEq, []byte{l.l4proto})
	}
}

// compare loads a field and compares it with a value.
func (x *ruleExprs) compare(l load, op expr.CmpOp, value []byte) {
	// An expression that can't read its field, or doesn't hold, ends the rule.
	x.add(l.into(unix.NFT_REG_1), &expr.Cmp{Op: op, Register: unix.NFT_REG_1, Data: value})
}

// match adds the expressions of one match. The kernel stops a rule at the first
// expression that doesn't hold.
func (x *ruleExprs) match(m match) error {
	for _, f := range m.fields {
		l, ok := loads[f]
		if !ok {
			return fmt.Errorf("field %d has no expression", f)
		}
		x.require(l)
	}
	l := loads[m.fields[0]]
	switch m.op {
	case equal:
		x.compare(l, expr.CmpOpEq, m.value)
	case unequal:
		x.compare(l, expr.CmpOpNeq, m.value)
	case hasBits:
		x.masked(l, m.value, expr.CmpOpNeq, make([]byte, l.size))
	case noBits:
		x.masked(l, m.value, expr.CmpOpEq, make([]byte, l.size))
	case inPrefix:
		x.masked(l, m.mask, expr.CmpOpEq, m.value)
	case notInRange:
		x.add(l.into(unix.NFT_REG_1),
			&expr.Range{Op: expr.CmpOpNeq, Register: unix.NFT_REG_1, FromData: m.value, ToData: m.mask})
	case present:
		x.compare(l, expr.CmpOpEq, []byte{1})
	case found:
		x.compare(l, expr.CmpOpNeq, make([]byte, l.size))
	case inSet, notInSet:
		x.lookup(m)
	case addToSet:
		x.add(&expr.Dynset{
			SrcRegKey: x.key(m.fields), SetName: m.text, Operation: unix.NFT_DYNSET_OP_ADD, Timeout: m.limit.lasts,
		})
	case overRate:
		x.add(&expr.Dynset{
			SrcRegKey: x.key(m.fields), SetName: m.text, Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: m.limit.lasts,
			Exprs: []expr.Any{&expr.Limit{
				Type: expr.LimitTypePkts, Rate: uint64(m.limit.rate), Unit: expr.LimitTimeSecond, Burst: m.limit.burst, Over: true,
			}},
		})
	case overCount:
		// The key is the source and the part, which is a hash of destination and ports;
		// these are loaded from word 8 on.
		const drawn, portsSize = unix.NFT_REG32_08, 4
		behind, dst := firstWord+l.size/4, loads[m.fields[1]]
		x.add(l.into(firstWord), dst.into(drawn),
			&expr.Payload{DestRegister: drawn + dst.size/4, Base: expr.PayloadBaseTransportHeader, Len: portsSize},
			&expr.Hash{SourceRegister: drawn, DestRegister: behind, Length: dst.size + portsSize, Modulus: flowParts, Type: expr.HashTypeJenkins},
			&expr.Dynset{
				SrcRegKey: firstWord, SetName: m.text, Operation: unix.NFT_DYNSET_OP_ADD,
				Exprs: []expr.Any{&expr.Connlimit{Count: m.count, Flags: expr.NFT_CONNLIMIT_F_INV}},
			})
	}
	return nil
}

// masked compares the bits of a field that mask selects.
func (x *ruleExprs) masked(l load, mask []byte, op expr.CmpOp, value []byte) {
	x.add(l.into(unix.NFT_REG_1),
		&expr.Bitwise{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: l.size, Mask: mask, Xor: make([]byte, l.size)},
		&expr.Cmp{Op: op, Register: unix.NFT_REG_1, Data: value})
}

// key loads the parts of a set's key and returns the register of the first one. Each part
// starts at a multiple of 32 bits.
func (x *ruleExprs) key(fields []field) uint32 {
	first := uint32(unix.NFT_REG_1)
	if len(fields) > 1 {
		first = firstWord
	}
	reg := first
	for _, f := range fields {
		l := loads[f]
		x.add(l.into(reg))
		reg += (l.size + 3) / 4
	}
	return first
}

// lookup looks the fields up in a set.
func (x *ruleExprs) lookup(m match) {
	x.add(&expr.Lookup{SourceRegister: x.key(m.fields), SetName: m.text, Invert: m.op == notInSet})
}

// tcpMSS is the kind of the TCP option for the maximum segment size (RFC 9293 3.2).
const tcpMSS = 2

// verdicts are the kernel's codes (NF_ACCEPT, NFT_RETURN and so on) for the verbs that
// end a chain or leave it.
var verdicts = map[verb]expr.VerdictKind{
	accept: expr.VerdictAccept, drop: expr.VerdictDrop, ret: expr.VerdictReturn,
	jump: expr.VerdictJump, branch: expr.VerdictGoto,
}

// action adds the expressions of a rule's action.
func (x *ruleExprs) action(a action) {
	switch a.verb {
	case masquerade:
		x.add(
			&expr.Immediate{Register: unix.NFT_REG_1, Data: port(a.ports.first)},
			&expr.Immediate{Register: unix.NFT_REG_2, Data: port(a.ports.last)})
		x.out = append(x.out, masqueradeTo(unix.NFT_REG_1, unix.NFT_REG_2))
	case snat:
		x.add(
			&expr.Immediate{Register: unix.NFT_REG_1, Data: a.source.AsSlice()},
			&expr.Immediate{Register: unix.NFT_REG_2, Data: port(a.ports.first)},
			&expr.Immediate{Register: unix.NFT_REG_3, Data: port(a.ports.last)})
		x.out = append(x.out, snatTo(a.source.Is4()))
	case expire:
		x.add(&expr.Objref{Type: objectCtTimeout, Name: a.timeout})
	case clamp:
		x.add(
			&expr.Immediate{Register: unix.NFT_REG_1, Data: binaryutil.BigEndian.PutUint16(a.mss)},
			&expr.Exthdr{SourceRegister: unix.NFT_REG_1, Type: tcpMSS, Offset: 2, Len: 2, Op: expr.ExthdrOpTcpopt})
	default:
		x.add(&expr.Verdict{Kind: verdicts[a.verb], Chain: a.chain})
	}
}

// objectCtTimeout is NFT_OBJECT_CT_TIMEOUT of linux/netfilter/nf_tables.h.
const objectCtTimeout = 7

// masqueradeTo translates the source to the address of the interface that the packet
// leaves by, and to a random port between those in two registers, inclusive. The
// library's expression drops the flags if there are ports, and without
// NF_NAT_RANGE_PROTO_SPECIFIED the kernel ignores the ports.
func masqueradeTo(first, last uint32) expression {
	const flags = unix.NF_NAT_RANGE_PROTO_SPECIFIED | unix.NF_NAT_RANGE_PROTO_RANDOM_FULLY
	return expression{name: "masq", attrs: []netlink.Attribute{
		{Type: unix.NFTA_MASQ_FLAGS, Data: binaryutil.BigEndian.PutUint32(flags)},
		{Type: unix.NFTA_MASQ_REG_PROTO_MIN, Data: binaryutil.BigEndian.PutUint32(first)},
		{Type: unix.NFTA_MASQ_REG_PROTO_MAX, Data: binaryutil.BigEndian.PutUint32(last)},
	}}
}

// snatTo translates the source to the address in the first register, and to a random port
// between those in the second and third, inclusive. The library's expression drops flags,
// as for masquerade.
func snatTo(v4 bool) expression {
	const flags = unix.NF_NAT_RANGE_MAP_IPS | unix.NF_NAT_RANGE_PROTO_SPECIFIED | unix.NF_NAT_RANGE_PROTO_RANDOM_FULLY
	family := uint32(unix.NFPROTO_IPV6)
	if v4 {
		family = unix.NFPROTO_IPV4
	}
	out := expression{name: "nat"}
	for _, a := range []struct {
		typ   uint16
		value uint32
	}{
		{unix.NFTA_NAT_TYPE, unix.NFT_NAT_SNAT}, {unix.NFTA_NAT_FAMILY, family},
		{unix.NFTA_NAT_REG_ADDR_MIN, unix.NFT_REG_1}, {unix.NFTA_NAT_REG_ADDR_MAX, unix.NFT_REG_1},
		{unix.NFTA_NAT_REG_PROTO_MIN, unix.NFT_REG_2}, {unix.NFTA_NAT_REG_PROTO_MAX, unix.NFT_REG_3},
		{unix.NFTA_NAT_FLAGS, flags},
	} {
		out.attrs = append(out.attrs, netlink.Attribute{Type: a.typ, Data: binaryutil.BigEndian.PutUint32(a.value)})
	}
	return out
}
