package linux

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// Sizes of the netlink sockets' buffers, in bytes: the ruleset of 10,000 peers is one
// batch of a few megabytes, and the kernel answers each message of it.
const (
	sendBuffer    = 64 << 20
	receiveBuffer = 8 << 20
)

// chunk is how many set elements go into one message: the length of a nested attribute is
// 16 bits, so a list of elements ends at 64 KiB.
const chunk = 400

// filter is our table in the kernel. Its two sockets stay open: opening a socket per
// change takes 16 to 26 ms at the 99th percentile, the change itself 0.1 ms.
type filter struct {
	// lists reads lists through sock.
	lists *nlconn.Nftables
	sock  netlinkConn
	// change collects changes and sends them as one transaction.
	change transaction
	// loaded is the table that the kernel holds as far as is known, nil if that isn't
	// known.
	loaded *table
	// rules are the encoded rules of each chain, as the kernel dumped them after the
	// load.
	rules map[string][]string
	// checked is the generation of nftables at which the kernel was found to hold loaded;
	// 0: none. Every transaction of any program starts a new generation, so as long as it
	// is the same, nothing has changed.
	checked uint32
	// ours is the generation that our last transaction started.
	ours uint32
}

// netlinkConn sends requests to the kernel, one at a time. It is an *nlconn.Conn except
// in tests.
type netlinkConn interface {
	Execute(netlink.Message) ([]netlink.Message, error)
	SetDeadline(time.Time) error
	Close() error
}

// openNftables opens a socket for requests, and returns it with the reader of lists that
// uses it.
func openNftables() (lists *nlconn.Nftables, sock *nlconn.Conn, err error) {
	if sock, err = nlconn.Dial(unix.NETLINK_NETFILTER); err != nil {
		return nil, nil, fmt.Errorf("open nftables: %w", err)
	}
	if err = sock.SetReadBuffer(receiveBuffer); err == nil {
		lists, err = sock.Nftables()
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("open nftables: %w", err), sock.Close())
	}
	return lists, sock, nil
}

// openFilter opens the sockets for our table.
func openFilter() (*filter, error) {
	lists, sock, err := openNftables()
	if err != nil {
		return nil, err
	}
	change, err := newTransaction()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open nftables: %w", err), sock.Close())
	}
	return &filter{lists: lists, sock: sock, change: change}, nil
}

// close closes both sockets. The table stays in the kernel.
func (f *filter) close() error { return errors.Join(f.change.wire.Close(), f.sock.Close()) }

// ourTable identifies our table for the library.
func ourTable() *nftables.Table {
	return &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
}

// apply makes the kernel hold t with the smallest possible transaction: if only set
// elements differ, it sends only those.
func (f *filter) apply(t *table) error {
	if f.loaded != nil {
		if changes, ok := difference(f.loaded, t); ok && len(changes) > 0 && f.update(t, changes) == nil {
			return nil
		}
	}
	return f.load(t)
}

// isLoaded reports whether the kernel holds t; it reads the table back if anything
// changed.
func (f *filter) isLoaded(t *table) bool {
	if f.loaded == nil {
		return false
	}
	if changes, ok := difference(f.loaded, t); !ok || len(changes) > 0 {
		return false
	}
	differs, err := f.drift()
	return err == nil && len(differs) == 0
}

// maxLoads is how often a load is tried while other programs change nftables, too.
const maxLoads = 5

// readError is the error of a read, after which it isn't known what the kernel holds.
type readError struct{ error }

// Unwrap returns the cause.
func (e readError) Unwrap() error { return e.error }

// load replaces the whole table and reads its rules back. The result counts only if no
// program changed anything in between. If reading fails, or another program interferes,
// it tries again.
func (f *filter) load(t *table) error {
	f.loaded = nil
	var unread readError
	var err error
	for range maxLoads {
		if err = f.replace(t); err == nil {
			err = f.readBack(t)
		}
		if err == nil {
			f.loaded, f.checked = t, 0
			return nil
		}
		if !errors.As(err, &unread) {
			return err
		}
	}
	return fmt.Errorf("load table inet %s: %w", tableName, err)
}

// readBack reads the rules of the table that was sent last and compares their number.
// That number counts only if no other transaction came in between: a flush leaves no
// rules.
func (f *filter) readBack(t *table) error {
	rules, err := f.readRules()
	if err != nil {
		return readError{err}
	}
	now, err := f.generation()
	if err != nil {
		return readError{err}
	}
	if now != f.ours {
		return readError{errors.New("another program keeps changing nftables")}
	}
	for _, c := range t.chains {
		if got := len(rules[c.name]); got != len(c.rules) {
			return fmt.Errorf("read chain %s back: it has %d rules instead of %d", c.name, got, len(c.rules))
		}
	}
	f.rules = rules
	return nil
}

// replace sends the whole table in one transaction. Elements of the cut sets are carried
// over.
func (f *filter) replace(t *table) error {
	cut, err := f.readCut()
	if err != nil {
		return readError{err}
	}
	ours := ourTable()
	// Deleting a table that doesn't exist is an error, adding one that exists isn't. A load of
	// 10, 1,000 and 10,000 peers takes some 17, 20 and 52 ms.
	f.change.AddTable(ours)
	f.change.DelTable(ours)
	f.change.AddTable(ours)
	for _, o := range t.timeouts {
		if err := f.change.addTimeouts(o); err != nil {
			return err
		}
	}
	for i := range t.sets {
		if err := f.addSet(ours, &t.sets[i], cut[t.sets[i].name]); err != nil {
			return err
		}
	}
	for _, c := range t.chains {
		f.change.AddChain(nftChain(ours, c))
	}
	for _, c := range t.chains {
		if err := f.addRules(c.rules, c.name); err != nil {
			return err
		}
	}
	if err := f.commit(); err != nil {
		return fmt.Errorf("load table inet %s: %w", tableName, err)
	}
	return nil
}

// readRules returns the rules of each chain, as the kernel encodes their expressions.
func (f *filter) readRules() (map[string][]string, error) {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: append([]byte(tableName), 0)},
	})
	if err != nil {
		return nil, fmt.Errorf("read rules: %w", err)
	}
	ms, err := f.sock.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: netlink.Request | netlink.Dump},
		Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, attrs...),
	})
	if err != nil {
		return nil, fmt.Errorf("read rules: %w", err)
	}
	out := map[string][]string{}
	for _, m := range ms {
		chain, text, err := parseRule(m.Data)
		if err != nil {
			return nil, fmt.Errorf("read rules: %w", err)
		}
		out[chain] = append(out[chain], text)
	}
	return out, nil
}

// parseRule returns the chain and the encoded expressions of a rule's message.
func parseRule(b []byte) (chain, expressions string, err error) {
	if len(b) < nfgenmsg {
		return "", "", errors.New("the message is too short")
	}
	ad, err := netlink.NewAttributeDecoder(b[nfgenmsg:])
	if err != nil {
		return "", "", err
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_RULE_CHAIN:
			chain = ad.String()
		case unix.NFTA_RULE_EXPRESSIONS:
			expressions = string(ad.Bytes())
		}
	}
	return chain, expressions, ad.Err()
}

// addSet adds a set with its elements and those that are kept from before.
func (f *filter) addSet(ours *nftables.Table, s *set, kept []nftables.SetElement) error {
	ns, err := nftSet(ours, s)
	if err != nil {
		return err
	}
	if err := f.change.AddSet(ns, nil); err != nil {
		return fmt.Errorf("add set %s: %w", s.name, err)
	}
	return f.eachChunk(ns, append(nftElements(s.elements), kept...), f.change.SetAddElements)
}

// eachChunk calls do for the elements in parts that fit into a message.
func (f *filter) eachChunk(ns *nftables.Set, es []nftables.SetElement, do func(*nftables.Set, []nftables.SetElement) error) error {
	for part := range slices.Chunk(es, chunk) {
		if err := do(ns, part); err != nil {
			return fmt.Errorf("change set %s: %w", ns.Name, err)
		}
	}
	return nil
}

// addRules appends the rules to a chain.
func (f *filter) addRules(rules []rule, to string) error {
	for _, r := range rules {
		if err := f.change.addRule(r, to); err != nil {
			return err
		}
	}
	return nil
}

// hooks are the hooks by nft's names.
var hooks = map[string]*nftables.ChainHook{
	"prerouting": nftables.ChainHookPrerouting, "input": nftables.ChainHookInput,
	"forward": nftables.ChainHookForward, "output": nftables.ChainHookOutput,
	"postrouting": nftables.ChainHookPostrouting,
}

// nftChain converts a chain for the library. The policy is accept; see chain for the
// reason.
func nftChain(ours *nftables.Table, c *chain) *nftables.Chain {
	nc := &nftables.Chain{Name: c.name, Table: ours}
	if c.hook != "" {
		policy := nftables.ChainPolicyAccept
		nc.Hooknum, nc.Priority = hooks[c.hook], nftables.ChainPriorityRef(nftables.ChainPriority(c.priority))
		nc.Type, nc.Policy = nftables.ChainType(c.kind), &policy
	}
	return nc
}

// setTypes are the library's data types by nft's names.
var setTypes = map[string]nftables.SetDatatype{
	"ipv4_addr": nftables.TypeIPAddr, "ipv6_addr": nftables.TypeIP6Addr,
	"inet_proto": nftables.TypeInetProto, "inet_service": nftables.TypeInetService,
	"icmp_type": nftables.TypeICMPType, "icmpv6_type": nftables.TypeICMP6Type, "ifname": nftables.TypeIFName, "mark": nftables.TypeMark,
}

// nftSet converts a set for the library, without its elements.
func nftSet(ours *nftables.Table, s *set) (*nftables.Set, error) {
	types := make([]nftables.SetDatatype, len(s.types))
	for i, t := range s.types {
		types[i] = setTypes[t]
	}
	key := types[0]
	if len(types) > 1 {
		var err error
		if key, err = nftables.ConcatSetType(types...); err != nil {
			return nil, fmt.Errorf("set %s: %w", s.name, err)
		}
	}
	return &nftables.Set{
		Table: ours, Name: s.name, KeyType: key, Concatenation: len(types) > 1,
		Interval: s.interval, HasTimeout: s.timeout, Dynamic: s.size > 0, Size: uint32(s.size),
	}, nil
}

// nftElements converts elements for the library. A range is two elements, its first key
// and the one behind its last.
func nftElements(es []element) []nftables.SetElement {
	out := make([]nftables.SetElement, 0, len(es))
	for i, e := range es {
		// Adjacent ranges are merged, as the kernel has no two elements with one key.
		if i == 0 || !bytes.Equal(es[i-1].after, e.key) {
			out = append(out, nftables.SetElement{Key: e.key})
		}
		last := i == len(es)-1 || !bytes.Equal(e.after, es[i+1].key)
		if e.after != nil && last {
			out = append(out, nftables.SetElement{Key: e.after, IntervalEnd: true})
		}
	}
	return out
}

// setChange holds the elements of one set to add and to remove.
type setChange struct {
	set         *set
	add, remove []element
}

// difference returns the changes of sets that turn a into b. ok is false if anything else
// differs, or if an interval set does: those are small and rarely change, so the whole
// table is loaded then.
func difference(a, b *table) ([]setChange, bool) {
	if len(a.sets) != len(b.sets) || !slices.EqualFunc(a.timeouts, b.timeouts, sameTimeouts) || !slices.EqualFunc(a.chains, b.chains, sameChain) {
		return nil, false
	}
	var out []setChange
	for i := range b.sets {
		old, next := &a.sets[i], &b.sets[i]
		if old.name != next.name {
			return nil, false
		}
		remove, add := changedElements(old.elements, next.elements)
		if len(remove)+len(add) == 0 {
			continue
		}
		if next.interval {
			return nil, false
		}
		out = append(out, setChange{set: next, add: add, remove: remove})
	}
	return out, true
}

// sameTimeouts reports whether two timeout objects are equal.
func sameTimeouts(a, b timeouts) bool {
	return a.name == b.name && slices.Equal(a.states, b.states)
}

// sameChain reports whether two chains are equal. Rules are compared as text, which
// includes all that they match and do.
func sameChain(a, b *chain) bool {
	return a.name == b.name && a.hook == b.hook && slices.EqualFunc(a.rules, b.rules, func(x, y rule) bool {
		return x.String() == y.String()
	})
}

// changedElements returns the elements that only a has and those that only b has. It
// skips the common beginning and end first, which is usually nearly everything.
func changedElements(a, b []element) (remove, add []element) {
	same := func(x, y element) bool { return bytes.Equal(x.key, y.key) && bytes.Equal(x.after, y.after) }
	for len(a) > 0 && len(b) > 0 && same(a[0], b[0]) {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && same(a[len(a)-1], b[len(b)-1]) {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	minus := func(x, y []element) (out []element) {
		have := map[string]bool{}
		for _, e := range y {
			have[string(e.key)+"|"+string(e.after)] = true
		}
		for _, e := range x {
			if !have[string(e.key)+"|"+string(e.after)] {
				out = append(out, e)
			}
		}
		return out
	}
	return minus(a, b), minus(b, a)
}

// update changes elements of sets in one transaction.
func (f *filter) update(t *table, changes []setChange) error {
	ours := ourTable()
	for _, c := range changes {
		ns, err := nftSet(ours, c.set)
		if err != nil {
			return err
		}
		if err := f.eachChunk(ns, nftElements(c.remove), f.change.SetDeleteElements); err != nil {
			return err
		}
		if err := f.eachChunk(ns, nftElements(c.add), f.change.SetAddElements); err != nil {
			return err
		}
	}
	f.loaded = nil
	if err := f.commit(); err != nil {
		return fmt.Errorf("change elements of table inet %s: %w", tableName, err)
	}
	f.loaded = t
	return nil
}

// replaceSet makes the kernel hold s instead of the loaded set with its name. s must not
// be an interval set. Everything else stays, including the rules' counts.
func (f *filter) replaceSet(s set) error {
	if f.loaded == nil {
		return nil // the next load includes it
	}
	t := *f.loaded
	t.sets = slices.Clone(t.sets)
	for i := range t.sets {
		if t.sets[i].name == s.name {
			t.sets[i] = s
		}
	}
	changes, ok := difference(f.loaded, &t)
	if !ok || len(changes) == 0 {
		return nil
	}
	return f.update(&t, changes)
}

// remove deletes our table. It isn't an error if there is none.
func (f *filter) remove() error {
	f.loaded = nil
	f.change.AddTable(ourTable())
	f.change.DelTable(ourTable())
	if err := f.commit(); err != nil {
		return fmt.Errorf("delete table inet %s: %w", tableName, err)
	}
	return nil
}

// present reports whether the kernel has our table.
func (f *filter) present() (bool, error) {
	ts, err := f.lists.ListTables(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list tables: %w", err)
	}
	return slices.ContainsFunc(ts, func(t *nftables.Table) bool { return t.Name == tableName }), nil
}

// readCut reads the flows that were cut, with their remaining time, by the name of the
// set.
func (f *filter) readCut() (map[string][]nftables.SetElement, error) {
	out := map[string][]nftables.SetElement{}
	there, err := f.present()
	if err != nil || !there {
		return out, err
	}
	for _, fam := range families {
		name := "cut" + fam.suffix
		es, err := f.lists.GetSetElements(&nftables.Set{Table: ourTable(), Name: name})
		if errors.Is(err, os.ErrNotExist) {
			continue // the table of another version
		}
		if err != nil {
			return nil, fmt.Errorf("read set %s: %w", name, err)
		}
		for _, e := range es {
			if e.Expires > 0 {
				out[name] = append(out[name], nftables.SetElement{Key: e.Key, Timeout: max(e.Expires, time.Second)})
			}
		}
	}
	return out, nil
}

// commit sends a transaction. If the kernel was known to hold the loaded table, and no
// other transaction came in between, it is known to hold the result.
func (f *filter) commit() error {
	before, err := f.generation()
	if err != nil {
		return errors.Join(readError{err}, f.change.discard())
	}
	if err := f.change.send(); err != nil {
		return err
	}
	after, err := f.generation()
	if err == nil && before == f.checked && after == before+1 {
		f.checked = after
	} else {
		f.checked = 0
	}
	f.ours = before + 1
	return nil
}

// generation returns the number of nftables' last transaction in this network namespace.
// The kernel never uses 0 (NFT_MSG_GETGEN; __nf_tables_commit in
// net/netfilter/nf_tables_api.c).
func (f *filter) generation() (uint32, error) {
	return generationOf(f.sock)
}

// generationOf asks for the number of nftables' last transaction.
func generationOf(c netlinkConn) (uint32, error) {
	ms, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil {
		return 0, fmt.Errorf("read generation of nftables: %w", err)
	}
	for _, m := range ms {
		if id, ok := generationAttr(m.Data, unix.NFTA_GEN_ID); ok {
			return id, nil
		}
	}
	return 0, errors.New("read generation of nftables: the answer has none")
}

// maxCompares is how often the comparison is repeated while other programs change their
// tables.
const maxCompares = 20

// drift compares the kernel's table with the loaded one and names the sets and chains
// that differ. It skips sets whose elements expire or are added by rules.
func (f *filter) drift() ([]string, error) {
	if f.loaded == nil {
		return []string{"table inet " + tableName + " isn't known to be loaded"}, nil
	}
	now, err := f.generation()
	if err != nil || now == f.checked {
		return nil, err
	}
	differs, err := f.compare()
	for range maxCompares {
		if err == nil && len(differs) == 0 {
			f.checked = now
			break
		}
		// A list that another program's transaction changed while it was read may miss an
		// entry, or have one twice.
		after, gerr := f.generation()
		if gerr != nil || after == now {
			break
		}
		now = after
		differs, err = f.compare()
	}
	return differs, err
}

// compare reads everything back and names what differs.
func (f *filter) compare() ([]string, error) {
	there, err := f.present()
	if err != nil {
		return nil, err
	}
	if !there {
		return []string{"table inet " + tableName + " is gone"}, nil
	}
	var out []string
	for i := range f.loaded.sets {
		s := &f.loaded.sets[i]
		same, err := f.sameSet(s)
		if err != nil {
			return nil, err
		}
		if !same {
			out = append(out, "set "+s.name+" differs")
		}
	}
	more, err := f.driftChains()
	return append(out, more...), err
}

// sameSet reports whether the kernel's set has the elements of s.
func (f *filter) sameSet(s *set) (bool, error) {
	if s.timeout || s.size > 0 {
		return true, nil
	}
	got, err := f.lists.GetSetElements(&nftables.Set{Table: ourTable(), Name: s.name})
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read set %s: %w", s.name, err)
	}
	return slices.Equal(elementKeys(got), elementKeys(nftElements(s.elements))), nil
}

// elementKeys makes lists of elements comparable. It leaves out an interval end at the
// lowest key, which the kernel may add and which ends nothing.
func elementKeys(es []nftables.SetElement) []string {
	out := make([]string, 0, len(es))
	for _, e := range es {
		if e.IntervalEnd && len(bytes.Trim(e.Key, "\x00")) == 0 {
			continue
		}
		out = append(out, fmt.Sprintf("%x %v", e.Key, e.IntervalEnd))
	}
	slices.Sort(out)
	return out
}

// driftChains names the chains that differ, are missing or aren't ours.
func (f *filter) driftChains() ([]string, error) {
	all, err := f.lists.ListChains(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	got := map[string]*nftables.Chain{}
	for _, c := range all {
		if c.Table.Name == tableName {
			got[c.Name] = c
		}
	}
	rules, err := f.readRules()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, c := range f.loaded.chains {
		if !sameHook(c, got[c.name]) || !slices.Equal(rules[c.name], f.rules[c.name]) {
			out = append(out, "chain "+c.name+" differs")
		}
		delete(got, c.name)
	}
	for name := range got {
		out = append(out, "chain "+name+" isn't ours")
	}
	return out, nil
}

// sameHook reports whether the kernel's chain is at the hook of c with the same priority
// and policy.
func sameHook(c *chain, got *nftables.Chain) bool {
	if got == nil || (got.Hooknum != nil) != (c.hook != "") {
		return false
	}
	return c.hook == "" || *got.Hooknum == *hooks[c.hook] && int(*got.Priority) == c.priority &&
		got.Policy != nil && *got.Policy == nftables.ChainPolicyAccept
}
