package netlab

// nftables on a host: what it holds, for snapshots, and the tables of other programs.

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	rtnl "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// nftables attribute types that a dump has to know (linux/netfilter/nf_tables.h).
const (
	tableUse     = 3  // NFTA_TABLE_USE
	chainUse     = 6  // NFTA_CHAIN_USE
	chainCounter = 8  // NFTA_CHAIN_COUNTERS
	ruleExprs    = 4  // NFTA_RULE_EXPRESSIONS
	elemExpr     = 7  // NFTA_SET_ELEM_EXPR
	elemExprs    = 11 // NFTA_SET_ELEM_EXPRESSIONS
	elemExpires  = 5  // NFTA_SET_ELEM_EXPIRATION
	elemList     = 3  // NFTA_SET_ELEM_LIST_ELEMENTS
	setName      = 2  // NFTA_SET_NAME
	objUse       = 5  // NFTA_OBJ_USE
	objData      = 4  // NFTA_OBJ_DATA
	nestedFlag   = unix.NLA_F_NESTED
)

// moving lists the expressions whose state changes with each packet.
var moving = []string{"counter", "quota", "limit", "last", "connlimit"}

// Ruleset is everything that nftables holds on the host, as the kernel dumps it,
// one line for each table, chain, set, element, object, flow table and rule: bytes
// in hexadecimal, counters masked. Two equal rulesets have equal lines.
func (h *Host) Ruleset() ([]string, error) {
	var conn *nlconn.Conn
	if err := h.Do(func() (err error) {
		conn, err = nlconn.Dial(unix.NETLINK_NETFILTER)
		return err
	}); err != nil {
		return nil, fmt.Errorf("open nftables of %s: %w", h.Name, err)
	}
	defer conn.Close()
	d := dump{conn: conn}
	d.list("table", unix.NFT_MSG_GETTABLE, map[uint16]bool{tableUse: true})
	d.list("chain", unix.NFT_MSG_GETCHAIN, map[uint16]bool{chainUse: true, chainCounter: true})
	sets := d.list("set", unix.NFT_MSG_GETSET, nil)
	for _, s := range sets {
		d.elements(s)
	}
	d.list("object", unix.NFT_MSG_GETOBJ, map[uint16]bool{objUse: true, objData: true})
	d.list("flowtable", unix.NFT_MSG_GETFLOWTABLE, nil)
	d.list("rule", unix.NFT_MSG_GETRULE, nil)
	if d.err != nil {
		return nil, fmt.Errorf("list nftables of %s: %w", h.Name, d.err)
	}
	return d.lines, nil
}

// dump is a ruleset that is being read. After the first error it does nothing.
type dump struct {
	conn  *nlconn.Conn
	lines []string
	err   error
}

// get dumps the objects of a kind, those that payload selects or all.
func (d *dump) get(kind int, family byte, payload []byte) []netlink.Message {
	if d.err != nil {
		return nil
	}
	request := netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind),
			Flags: netlink.Request | netlink.Dump,
		},
		Data: append([]byte{family, unix.NFNETLINK_V0, 0, 0}, payload...),
	}
	messages, err := d.conn.Execute(request)
	if err != nil {
		d.err = fmt.Errorf("get kind %d: %w", kind, err)
	}
	return messages
}

// list adds a line for each object of a kind and returns the messages.
func (d *dump) list(what string, kind int, masked map[uint16]bool) []netlink.Message {
	messages := d.get(kind, unix.NFPROTO_UNSPEC, nil)
	for _, m := range messages {
		d.line(what, m, func(a netlink.Attribute) (string, bool) {
			switch {
			case masked[a.Type]:
				return "*", true
			case what == "rule" && a.Type == ruleExprs:
				return d.expressions(a.Data), true
			}
			return "", false
		})
	}
	return messages
}

// line adds a line for an object: its family and its attributes. show may replace how an
// attribute is printed.
func (d *dump) line(what string, m netlink.Message, show func(netlink.Attribute) (string, bool)) {
	if d.err != nil || len(m.Data) < 4 {
		return
	}
	words := []string{what, fmt.Sprintf("family %d", m.Data[0])}
	for _, a := range d.attributes(m.Data[4:]) {
		value, ok := show(a)
		if !ok {
			value = printBytes(a.Data)
		}
		words = append(words, fmt.Sprintf("%d:%s", a.Type, value))
	}
	d.lines = append(d.lines, strings.Join(words, " "))
}

// attributes parses netlink attributes and clears NLA_F_NESTED, which some kernels set.
func (d *dump) attributes(b []byte) []netlink.Attribute {
	attrs, err := netlink.UnmarshalAttributes(b)
	if err != nil && d.err == nil {
		d.err = err
	}
	for i := range attrs {
		attrs[i].Type &^= nestedFlag
	}
	return attrs
}

// elements adds a set's elements sorted by their bytes, since the kernel's order is that
// of a hash.
func (d *dump) elements(set netlink.Message) {
	var payload []byte
	var name string
	for _, a := range d.attributes(set.Data[4:]) {
		if a.Type == 1 || a.Type == setName { // NFTA_SET_TABLE, and both again in the request
			b, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: a.Type, Data: a.Data}})
			if err != nil {
				d.err = err
				return
			}
			payload = append(payload, b...)
			name += " " + printBytes(a.Data)
		}
	}
	var lines []string
	for _, m := range d.get(unix.NFT_MSG_GETSETELEM, set.Data[0], payload) {
		for _, a := range d.attributes(m.Data[4:]) {
			if a.Type != elemList {
				continue
			}
			for _, e := range d.attributes(a.Data) {
				lines = append(lines, fmt.Sprintf("element family %d%s %s", set.Data[0], name, d.element(e.Data)))
			}
		}
	}
	slices.Sort(lines)
	d.lines = append(d.lines, lines...)
}

func (d *dump) element(b []byte) string {
	var words []string
	for _, a := range d.attributes(b) {
		value := printBytes(a.Data)
		switch a.Type {
		case elemExpires:
			value = "*"
		case elemExpr:
			value = d.expression(a.Data)
		case elemExprs:
			value = d.expressions(a.Data)
		}
		words = append(words, fmt.Sprintf("%d:%s", a.Type, value))
	}
	return strings.Join(words, " ")
}

func (d *dump) expressions(b []byte) string {
	var words []string
	for _, a := range d.attributes(b) {
		words = append(words, d.expression(a.Data))
	}
	return "{" + strings.Join(words, " ") + "}"
}

// expression prints NFTA_EXPR_NAME and NFTA_EXPR_DATA.
func (d *dump) expression(b []byte) string {
	var name, data string
	for _, a := range d.attributes(b) {
		if a.Type == 1 {
			name = printBytes(a.Data)
		} else {
			data = printBytes(a.Data)
		}
	}
	if slices.Contains(moving, strings.Trim(name, `"`)) {
		data = "*"
	}
	return name + "=" + data
}

// printBytes shows a name as a name and everything else in hexadecimal.
func printBytes(b []byte) string {
	if text, ok := bytes.CutSuffix(b, []byte{0}); ok && len(text) > 0 {
		printable := !slices.ContainsFunc(text, func(c byte) bool { return c < ' ' || c > '~' })
		if printable {
			return fmt.Sprintf("%q", text)
		}
	}
	return fmt.Sprintf("%x", b)
}

// nftChanging is held while a change is made: the library numbers sets by a variable of its
// package.
var nftChanging sync.Mutex

// nft changes the host's ruleset in one transaction.
func (h *Host) nft(change func(*nftables.Conn)) error {
	return h.Do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		nftChanging.Lock()
		change(c)
		nftChanging.Unlock()
		return c.Flush()
	})
}

// InstallForeignTable loads a table of another program that the product might disturb:
// with a set with elements, a counter, and chains on several hooks. It passes every
// packet.
func (h *Host) InstallForeignTable() error {
	err := h.nft(func(c *nftables.Conn) {
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "other"})
		set := &nftables.Set{Table: table, Name: "ports", KeyType: nftables.TypeInetService}
		_ = c.AddSet(set, []nftables.SetElement{{Key: []byte{0, 22}}, {Key: []byte{1, 187}}})
		for name, hook := range map[string]*nftables.ChainHook{
			"in": nftables.ChainHookInput, "through": nftables.ChainHookForward, "out": nftables.ChainHookOutput,
		} {
			chain := c.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter,
				Hooknum: hook, Priority: nftables.ChainPriorityFilter})
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
				&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}}, UserData: []byte("ours")})
		}
	})
	if err != nil {
		return fmt.Errorf("install foreign table on %s: %w", h.Name, err)
	}
	return nil
}

// TrackFlows loads a table of another program that makes the kernel track flows in both
// families, and passes every packet.
func (h *Host) TrackFlows() error {
	err := h.nft(func(c *nftables.Conn) {
		table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "tracker"})
		chain := c.AddChain(&nftables.Chain{Name: "through", Table: table, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: make([]byte, 4)}, &expr.Counter{}}})
	})
	if err != nil {
		return fmt.Errorf("track flows on %s: %w", h.Name, err)
	}
	return nil
}

// DeleteTable deletes a table of the family inet.
func (h *Host) DeleteTable(name string) error {
	err := h.nft(func(c *nftables.Conn) {
		c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: name})
	})
	if err != nil {
		return fmt.Errorf("delete table %s of %s: %w", name, h.Name, err)
	}
	return nil
}

// InstallDockerChain loads Docker's forward chain: FORWARD in the tables "ip filter" and
// "ip6 filter" with policy drop, and rules for Docker's bridges only.
func (h *Host) InstallDockerChain() error {
	drop := nftables.ChainPolicyDrop
	err := h.nft(func(c *nftables.Conn) {
		for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
			table := c.AddTable(&nftables.Table{Family: family, Name: "filter"})
			chain := c.AddChain(&nftables.Chain{Name: "FORWARD", Table: table, Type: nftables.ChainTypeFilter,
				Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop})
			c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: interfaceName("docker0")},
				&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept}}})
		}
	})
	if err != nil {
		return fmt.Errorf("install Docker's chain on %s: %w", h.Name, err)
	}
	return nil
}

// interfaceName returns a name as nftables compares it: padded to 16 bytes (IFNAMSIZ).
func interfaceName(name string) []byte { return append([]byte(name), make([]byte, 16-len(name))...) }

// ForgetFlows empties the host's conntrack table, as conntrack -F does.
func (h *Host) ForgetFlows() error {
	err := h.Do(func() error {
		nl, err := nlconn.NewHandle(unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer nl.Close()
		return nl.ConntrackTableFlush(rtnl.ConntrackTable)
	})
	if err != nil {
		return fmt.Errorf("forget flows of %s: %w", h.Name, err)
	}
	return nil
}
