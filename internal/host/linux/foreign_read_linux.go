package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// foreignRule is a rule of other software. Expressions that aren't understood are
// [opaque]; google/nftables leaves them out.
type foreignRule struct {
	handle  uint64
	comment string
	exprs   []any
}

// opaque is the name of an expression that isn't understood.
type opaque string

// name describes the rule for people.
func (r foreignRule) name() string {
	switch {
	case r.handle == 0:
		return ""
	case r.comment != "":
		return fmt.Sprintf("rule with handle %d, %q", r.handle, r.comment)
	}
	return fmt.Sprintf("rule with handle %d", r.handle)
}

// foreignSet is what has to be known of a set for a lookup; keySize is in bytes.
type foreignSet struct{ keySize int }

// foreignElement is an element of a set. An element of a map has data or a verdict.
type foreignElement struct {
	data    []byte
	verdict *expr.Verdict
	// conditional is set if the element has an expression that may not hold, such as a
	// limit.
	conditional bool
}

// nftMessage returns a request about a table.
func nftMessage(kind uint16, flags mdlayher.HeaderFlags, t *nftables.Table, attrs []mdlayher.Attribute) (mdlayher.Message, error) {
	data, err := mdlayher.MarshalAttributes(attrs)
	return mdlayher.Message{
		Header: mdlayher.Header{Type: mdlayher.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind), Flags: mdlayher.Request | flags},
		Data:   append([]byte{byte(t.Family), unix.NFNETLINK_V0, 0, 0}, data...),
	}, err
}

// nftName returns an attribute with a NUL-terminated name.
func nftName(of uint16, name string) mdlayher.Attribute {
	return mdlayher.Attribute{Type: of, Data: append([]byte(name), 0)}
}

// rulesOf returns the rules of a chain, and reads them once.
func (e *evaluator) rulesOf(t *nftables.Table, chain string) ([]foreignRule, error) {
	key := fmt.Sprintf("%d %s %s", t.Family, t.Name, chain)
	if rs, ok := e.rules[key]; ok {
		return rs, nil
	}
	request, err := nftMessage(unix.NFT_MSG_GETRULE, mdlayher.Dump, t, []mdlayher.Attribute{
		nftName(unix.NFTA_RULE_TABLE, t.Name), nftName(unix.NFTA_RULE_CHAIN, chain),
	})
	if err != nil {
		return nil, err
	}
	ms, err := e.ask(request)
	if err != nil {
		return nil, fmt.Errorf("list rules of chain %s: %w", chain, err)
	}
	var out []foreignRule
	for _, m := range ms {
		r, err := parseForeignRule(byte(t.Family), m.Data)
		if err != nil {
			return nil, fmt.Errorf("list rules of chain %s: %w", chain, err)
		}
		out = append(out, r)
	}
	e.rules[key] = out
	return out, nil
}

// maxRuleExprs bounds how many expressions of a rule are read; the kernel accepts 128
// (NFT_RULE_MAXEXPRS).
const maxRuleExprs = 128

// parseForeignRule parses a rule's message (NFTA_RULE_* in linux/netfilter/nf_tables.h).
func parseForeignRule(family byte, b []byte) (r foreignRule, err error) {
	ad, err := attributesOf(b)
	if err != nil {
		return r, err
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_RULE_HANDLE:
			r.handle = ad.Uint64()
		case unix.NFTA_RULE_USERDATA:
			r.comment = ruleComment(ad.Bytes())
		case unix.NFTA_RULE_EXPRESSIONS:
			ad.Nested(func(list *mdlayher.AttributeDecoder) error {
				for list.Next() {
					if len(r.exprs) == maxRuleExprs {
						return errors.New("a rule has too many expressions")
					}
					x, err := parseForeignExpr(family, list.Bytes())
					if err != nil {
						return err
					}
					r.exprs = append(r.exprs, x)
				}
				return list.Err()
			})
		}
	}
	return r, ad.Err()
}

// attributesOf returns the attributes after netfilter's header, which are in network byte
// order.
func attributesOf(b []byte) (*mdlayher.AttributeDecoder, error) {
	if len(b) < nfgenmsg {
		return nil, errors.New("the message is too short")
	}
	ad, err := mdlayher.NewAttributeDecoder(b[nfgenmsg:])
	if err == nil {
		ad.ByteOrder = binary.BigEndian
	}
	return ad, err
}

// maxComment is the longest comment that nft stores, without its NUL
// (NFTNL_UDATA_COMMENT_MAXLEN).
const maxComment = 127

// ruleComment returns the comment that nft stores with a rule. A longer one isn't nft's
// and is left out.
func ruleComment(b []byte) string {
	c := trimZero([]byte(commentOf(b)))
	if len(c) > maxComment {
		return ""
	}
	return string(c)
}

// trimZero returns b up to its first NUL.
func trimZero(b []byte) []byte {
	for i, c := range b {
		if c == 0 {
			return b[:i]
		}
	}
	return b
}

// knownExprs makes the expressions that google/nftables decodes.
var knownExprs = map[string]func() expr.Any{
	"bitwise": func() expr.Any { return &expr.Bitwise{} },
	"cmp":     func() expr.Any { return &expr.Cmp{} }, "counter": func() expr.Any { return &expr.Counter{} },
	"cthelper":  func() expr.Any { return &expr.CtHelper{} },
	"cttimeout": func() expr.Any { return &expr.CtTimeout{} }, "ctexpect": func() expr.Any { return &expr.CtExpect{} },
	"dynset": func() expr.Any { return &expr.Dynset{} }, "exthdr": func() expr.Any { return &expr.Exthdr{} },
	"fib": func() expr.Any { return &expr.Fib{} }, "flow_offload": func() expr.Any { return &expr.FlowOffload{} },
	"hash": func() expr.Any { return &expr.Hash{} }, "immediate": func() expr.Any { return &expr.Immediate{} },
	"log": func() expr.Any { return &expr.Log{} }, "lookup": func() expr.Any { return &expr.Lookup{} },
	"masq": func() expr.Any { return &expr.Masq{} }, "match": func() expr.Any { return &expr.Match{} },
	"meta": func() expr.Any { return &expr.Meta{} }, "nat": func() expr.Any { return &expr.NAT{} },
	"notrack": func() expr.Any { return &expr.Notrack{} }, "numgen": func() expr.Any { return &expr.Numgen{} },
	"objref": func() expr.Any { return &expr.Objref{} }, "payload": func() expr.Any { return &expr.Payload{} },
	"queue": func() expr.Any { return &expr.Queue{} }, "quota": func() expr.Any { return &expr.Quota{} },
	"range": func() expr.Any { return &expr.Range{} }, "redir": func() expr.Any { return &expr.Redir{} },
	"reject": func() expr.Any { return &expr.Reject{} }, "secmark": func() expr.Any { return &expr.SecMark{} },
	"synproxy": func() expr.Any { return &expr.SynProxy{} }, "target": func() expr.Any { return &expr.Target{} },
}

// bitwiseOp is NFTA_BITWISE_OP; operation 0 is the one with mask and xor.
const bitwiseOp = 6

// parseForeignExpr parses one expression. One that isn't known, or has a part that isn't,
// is opaque.
func parseForeignExpr(family byte, b []byte) (any, error) {
	ad, err := mdlayher.NewAttributeDecoder(b)
	if err != nil {
		return nil, err
	}
	var name string
	var data []byte
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_EXPR_NAME:
			name = string(trimZero(ad.Bytes()))
		case unix.NFTA_EXPR_DATA:
			data = ad.Bytes()
		}
	}
	if err := ad.Err(); err != nil {
		return nil, err
	}
	if name == "bitwise" && hasOtherOp(data) {
		return opaque(name), nil
	}
	return decodeExpr(family, name, data), nil
}

// decodeExpr decodes an expression with google/nftables, which panics at some truncated
// ones.
func decodeExpr(family byte, name string, data []byte) (x any) {
	defer func() {
		if recover() != nil {
			x = opaque(name)
		}
	}()
	switch name {
	case "ct", "byteorder":
		return decodeNumbers(name, data)
	}
	make, ok := knownExprs[name]
	if !ok {
		return opaque(name)
	}
	e := make()
	if len(data) == 0 {
		return e
	}
	if err := expr.Unmarshal(family, data, e); err != nil {
		return opaque(name)
	}
	if i, ok := e.(*expr.Immediate); ok && i.Register == unix.NFT_REG_VERDICT && len(i.Data) == 0 {
		v := &expr.Verdict{}
		if err := expr.Unmarshal(family, data, v); err != nil {
			return opaque(name)
		}
		return v
	}
	return e
}

// Attributes of the byteorder expression (linux/netfilter/nf_tables.h).
const (
	byteorderSource = 1
	byteorderDest   = 2
	byteorderLen    = 4
	byteorderSize   = 5
)

// decodeNumbers decodes ct and byteorder, which google/nftables doesn't decode, or not
// completely: the direction in a ct expression is one byte, and a ct expression that sets
// has a source register.
func decodeNumbers(name string, data []byte) any {
	ad, err := mdlayher.NewAttributeDecoder(data)
	if err != nil {
		return opaque(name)
	}
	ct, order := &expr.Ct{}, &expr.Byteorder{}
	for ad.Next() {
		b := ad.Bytes()
		if name == "ct" && ad.Type() == unix.NFTA_CT_DIRECTION && len(b) == 1 {
			ct.Direction = uint32(b[0])
			continue
		}
		if len(b) != 4 {
			return opaque(name)
		}
		v := binary.BigEndian.Uint32(b)
		switch {
		case name == "byteorder":
			switch ad.Type() {
			case byteorderSource:
				order.SourceRegister = v
			case byteorderDest:
				order.DestRegister = v
			case byteorderLen:
				order.Len = v
			case byteorderSize:
				order.Size = v
			}
		case ad.Type() == unix.NFTA_CT_KEY:
			ct.Key = expr.CtKey(v)
		case ad.Type() == unix.NFTA_CT_DREG:
			ct.Register = v
		case ad.Type() == unix.NFTA_CT_SREG:
			ct.Register, ct.SourceRegister = v, true
		}
	}
	switch {
	case ad.Err() != nil:
		return opaque(name)
	case name == "ct":
		return ct
	}
	return order
}

// Attributes of a base chain's devices (linux/netfilter/nf_tables.h).
const (
	hookDevice   = 3
	hookDevices  = 4
	deviceName   = 1
	devicePrefix = 2
)

// isAt reports whether a base chain receives packets from a device. It returns true if
// the chain's devices can't be read.
func (e *evaluator) isAt(c *nftables.Chain, device string) bool {
	request, err := nftMessage(unix.NFT_MSG_GETCHAIN, 0, c.Table, []mdlayher.Attribute{
		nftName(unix.NFTA_CHAIN_TABLE, c.Table.Name), nftName(unix.NFTA_CHAIN_NAME, c.Name),
	})
	if err != nil {
		return true
	}
	ms, err := e.ask(request)
	if err != nil {
		return true
	}
	found := false
	for _, m := range ms {
		ad, err := attributesOf(m.Data)
		if err != nil {
			return true
		}
		eachNested(ad, unix.NFTA_CHAIN_HOOK, func(hook *mdlayher.AttributeDecoder) {
			for hook.Next() {
				switch hook.Type() {
				case hookDevice:
					found = found || string(trimZero(hook.Bytes())) == device
				case hookDevices:
					hook.Nested(func(list *mdlayher.AttributeDecoder) error {
						for list.Next() {
							name := string(trimZero(list.Bytes()))
							found = found || list.Type() == deviceName && name == device ||
								list.Type() == devicePrefix && strings.HasPrefix(device, name)
						}
						return list.Err()
					})
				}
			}
		})
	}
	return found
}

// hasOtherOp reports whether a bitwise expression has another operation than mask and
// xor.
func hasOtherOp(data []byte) bool {
	ad, err := mdlayher.NewAttributeDecoder(data)
	if err != nil {
		return true
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		if ad.Type() == bitwiseOp && len(ad.Bytes()) == 4 && ad.Uint32() != 0 {
			return true
		}
	}
	return ad.Err() != nil
}

// setKey is a set's key in maps.
func setKey(t *nftables.Table, name string) string {
	return fmt.Sprintf("%d %s %s", t.Family, t.Name, name)
}

// setOf reads the key size of a set, once.
func (e *evaluator) setOf(t *nftables.Table, name string) (foreignSet, error) {
	key := setKey(t, name)
	if s, ok := e.sets[key]; ok {
		return s, nil
	}
	request, err := nftMessage(unix.NFT_MSG_GETSET, 0, t, []mdlayher.Attribute{
		nftName(unix.NFTA_SET_TABLE, t.Name), nftName(unix.NFTA_SET_NAME, name),
	})
	if err != nil {
		return foreignSet{}, err
	}
	ms, err := e.ask(request)
	if err != nil {
		return foreignSet{}, fmt.Errorf("read set %s: %w", name, err)
	}
	var s foreignSet
	for _, m := range ms {
		ad, err := attributesOf(m.Data)
		if err != nil {
			return s, fmt.Errorf("read set %s: %w", name, err)
		}
		for ad.Next() {
			if ad.Type() == unix.NFTA_SET_KEY_LEN && len(ad.Bytes()) == 4 {
				s.keySize = int(ad.Uint32())
			}
		}
	}
	if s.keySize <= 0 || s.keySize > 64 {
		return s, fmt.Errorf("read set %s: keys of %d bytes", name, s.keySize)
	}
	e.sets[key] = s
	return s, nil
}

// catchAll is NFT_SET_ELEM_CATCHALL, the flag of the element that matches every key.
const catchAll = 2

// elementOf returns the element of a set that matches a key, nil if there is none. The
// kernel looks it up (nft_get_set_elem in net/netfilter/nf_tables_api.c): a set may have
// a hundred thousand elements, and reading 58,000 takes about 0.1 s.
func (e *evaluator) elementOf(t *nftables.Table, set string, key []byte) (*foreignElement, error) {
	value, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{{Type: unix.NFTA_DATA_VALUE, Data: key}})
	if err != nil {
		return nil, err
	}
	found, err := e.askElement(t, set, mdlayher.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_SET_ELEM_KEY, Data: value})
	if found != nil || err != nil {
		return found, err
	}
	found, err = e.askElement(t, set, mdlayher.Attribute{Type: unix.NFTA_SET_ELEM_FLAGS, Data: binary.BigEndian.AppendUint32(nil, catchAll)})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // kernels before 5.13 have no catch-all elements
	}
	return found, err
}

// askElement asks the kernel for one element of a set, which the attribute selects.
func (e *evaluator) askElement(t *nftables.Table, set string, which mdlayher.Attribute) (*foreignElement, error) {
	element, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{which})
	if err != nil {
		return nil, err
	}
	list, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: element}})
	if err != nil {
		return nil, err
	}
	request, err := nftMessage(unix.NFT_MSG_GETSETELEM, 0, t, []mdlayher.Attribute{
		nftName(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name), nftName(unix.NFTA_SET_ELEM_LIST_SET, set),
		{Type: unix.NLA_F_NESTED | unix.NFTA_SET_ELEM_LIST_ELEMENTS, Data: list},
	})
	if err != nil {
		return nil, err
	}
	ms, err := e.ask(request)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read an element of set %s: %w", set, err)
	}
	out := &foreignElement{}
	for _, m := range ms {
		if ad, err := attributesOf(m.Data); err == nil {
			eachNested(ad, unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(list *mdlayher.AttributeDecoder) {
				eachNested(list, unix.NFTA_LIST_ELEM, func(elem *mdlayher.AttributeDecoder) {
					out.readElement(byte(t.Family), elem)
				})
			})
		}
	}
	if out.conditional {
		return nil, errUnknown
	}
	return out, nil
}

// Attributes of an element with expressions of its own (linux/netfilter/nf_tables.h).
const (
	elementExpr  = 7
	elementExprs = 11
)

// readElement parses an element's data, and whether it has expressions that may not hold.
func (x *foreignElement) readElement(family byte, elem *mdlayher.AttributeDecoder) {
	expression := func(b []byte) {
		e, err := parseForeignExpr(family, b)
		if _, counts := e.(*expr.Counter); err != nil || !counts {
			x.conditional = true
		}
	}
	for elem.Next() {
		switch elem.Type() {
		case unix.NFTA_SET_ELEM_DATA:
			elem.Nested(func(in *mdlayher.AttributeDecoder) error {
				in.ByteOrder = binary.BigEndian
				x.read(in)
				return in.Err()
			})
		case elementExpr:
			expression(elem.Bytes())
		case elementExprs:
			elem.Nested(func(in *mdlayher.AttributeDecoder) error {
				for in.Next() {
					expression(in.Bytes())
				}
				return in.Err()
			})
		}
	}
}

// eachNested calls visit for the nested attributes of a kind.
func eachNested(ad *mdlayher.AttributeDecoder, kind uint16, visit func(*mdlayher.AttributeDecoder)) {
	for ad.Next() {
		if ad.Type() == kind {
			ad.Nested(func(in *mdlayher.AttributeDecoder) error {
				in.ByteOrder = binary.BigEndian
				visit(in)
				return in.Err()
			})
		}
	}
}

// read parses an element's value or verdict.
func (x *foreignElement) read(ad *mdlayher.AttributeDecoder) {
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_DATA_VALUE:
			x.data = ad.Bytes()
		case unix.NFTA_DATA_VERDICT:
			ad.Nested(func(in *mdlayher.AttributeDecoder) error {
				in.ByteOrder = binary.BigEndian
				v := &expr.Verdict{}
				for in.Next() {
					switch in.Type() {
					case unix.NFTA_VERDICT_CODE:
						if len(in.Bytes()) == 4 {
							v.Kind = expr.VerdictKind(int32(in.Uint32()))
						}
					case unix.NFTA_VERDICT_CHAIN:
						v.Chain = string(trimZero(in.Bytes()))
					}
				}
				x.verdict = v
				return in.Err()
			})
		}
	}
}

// Attributes of a named object and of a quota (linux/netfilter/nf_tables.h).
const (
	objTable       = 1
	objName        = 2
	objType        = 3
	objData        = 4
	quotaBytes     = 1
	quotaFlags     = 2
	quotaConsumed  = 4
	quotaInvert    = 1 // NFT_QUOTA_F_INV: the quota holds when it is used up
	msgGetObject   = 19
	quotaValueSize = 8
)

// quota reads a named quota.
func (e *evaluator) quota(t *nftables.Table, name string) (q expr.Quota, ok bool) {
	request, err := nftMessage(msgGetObject, 0, t, []mdlayher.Attribute{
		nftName(objTable, t.Name), nftName(objName, name), {Type: objType, Data: binary.BigEndian.AppendUint32(nil, objectQuota)},
	})
	if err != nil {
		return q, false
	}
	ms, err := e.ask(request)
	if err != nil {
		return q, false
	}
	for _, m := range ms {
		ad, err := attributesOf(m.Data)
		if err != nil {
			continue
		}
		eachNested(ad, objData, func(in *mdlayher.AttributeDecoder) {
			for in.Next() {
				switch b := in.Bytes(); {
				case in.Type() == quotaBytes && len(b) == quotaValueSize:
					q.Bytes, ok = in.Uint64(), true
				case in.Type() == quotaConsumed && len(b) == quotaValueSize:
					q.Consumed = in.Uint64()
				case in.Type() == quotaFlags && len(b) == 4:
					q.Over = in.Uint32()&quotaInvert != 0
				}
			}
		})
	}
	return q, ok
}
