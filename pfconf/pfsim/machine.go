package pfsim

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/pfconf"
)

// Limits of the kernel, from xnu bsd/net/pfvar.h and the defaults of pfctl.
const (
	// DefaultStateLimit is the default of set limit states (PFSTATE_HIWAT).
	DefaultStateLimit = 10000

	maxAnchorName  = 63     // bytes: PF_ANCHOR_NAME_SIZE less the final NUL
	maxAnchorPath  = 1023   // bytes: MAXPATHLEN less the final NUL
	maxAnchorDepth = 64     // frames of pf_anchor_stack, pf.c
	maxTableName   = 31     // bytes: PF_TABLE_NAME_SIZE less the final NUL
	maxTables      = 1000   // PFR_KTABLE_HIWAT
	maxEntries     = 200000 // PFR_KENTRY_HIWAT, in all tables

	// maxSteps limits the rules that are compared with one packet. The kernel has no
	// such limit: anchors that call each other can keep it busy for ever. A packet that
	// reaches it is dropped.
	maxSteps = 1 << 20
)

// Errors of a [Machine] that callers can distinguish.
var (
	ErrNoTable     = errors.New("table does not exist")
	ErrConstTable  = errors.New("table is const")
	ErrNoAnchor    = errors.New("anchor does not exist")
	ErrNoInterface = errors.New("interface does not exist")
	ErrEnabled     = errors.New("pf already enabled")
	ErrDisabled    = errors.New("pf not enabled")
	ErrLimit       = errors.New("limit reached")
)

// Options configure a [Machine].
type Options struct {
	// Rand chooses source ports, random pool addresses and sequence numbers.
	Rand *rand.Rand // optional; nil: a fixed sequence
	// StateLimit is the limit on states that holds without set limit.
	StateLimit int // optional; 0: DefaultStateLimit
}

// A Machine behaves as the pf of a macOS kernel: it has rulesets, tables and states, and
// judges packets. It follows xnu's bsd/net/pf.c as of macOS 15.5, including behaviour
// that looks like a bug.
//
// A new machine has no interfaces and no rules and is disabled. [Machine.Forward],
// [Machine.Receive] and [Machine.Send] judge a packet. Routing isn't modelled: the caller
// says which interfaces a packet uses. Time stands still except for [PF.Advance].
//
// # What happens to a packet
//
// pf sees a packet on an interface in one direction, a hook: a forwarded packet
// twice, inbound on one interface and outbound on another. At each hook:
//
//  1. The first matching scrub rule normalises it. A fragment is held back, which looks
//     like a drop, until the last missing one arrives: that continues as the whole
//     datagram.
//  2. If it belongs to a state, it passes without an evaluation of rules. A state is made
//     at one hook. It covers packets of its direction, and answers in the other, so the
//     inbound state of a forwarded packet doesn't cover its outbound hook. Unless it is
//     bound to its interface, it applies on every one. A TCP segment outside its
//     connection's window is dropped.
//  3. Otherwise it is translated: outbound by the first matching binat rule, else rdr
//     (backwards), else nat; inbound by rdr, else binat. A rule that begins with no ends
//     the search of its kind. If there is no address or port to translate to, the packet
//     continues untranslated.
//  4. The filter rules see the translated packet. The last that matches decides, or
//     the first with quick. If none matches, it passes.
//  5. If it passes by a rule that keeps state, or is translated, a state is made. Answers
//     and later packets of the flow then pass by step 2, even after the rule is removed.
//
// # Anchors
//
// The main ruleset is where each search begins. An anchor is a ruleset with a
// name that is evaluated where a rule calls it: anchor for filter rules,
// nat-anchor and the like for the others. anchor "x/*" runs the direct children
// of x, in byte order of their names, and not x itself. An anchor that nothing
// calls does nothing.
//
// # Not modelled
//
// synproxy (taken as keep state), sticky addresses, route-to and the like, rules
// by operating system (they match nothing), the owners of sockets (no packet has
// one), overlaps under scrub fragment crop, GRE of PPTP, dummynet, ALTQ.
//
// A Machine isn't safe for concurrent use. It keeps the rules of a [pfconf.Ruleset] that
// it loads, which must not be changed afterwards. It neither keeps nor changes other
// arguments.
type Machine struct {
	rand    *rand.Rand
	enabled bool
	now     time.Duration // since the machine was made

	kifs   map[string]*kif
	order  []*kif // the interfaces that exist, in the order in which they appeared
	ifGen  int    // incremented with each change of an address, see dynAddr
	main   *anchorNode
	tables map[tableName]*ktable
	tags   map[string]int // numbers by name
	tagOf  []string       // names by number

	timeouts [timeoutMax]uint32
	limits   capacity
	// startLimits are the limits that hold without set limit.
	startLimits capacity
	states      stateTable
	sources     map[sourceKey]*sourceNode
	fragments   map[fragmentKey]*datagram
	pieces      int // in fragments, see capacity
	totals      [counterMax]uint64

	// walk and eval belong to the packet being judged. They are here, not on its stack, so
	// that they aren't allocated for each packet.
	walk     walker
	eval     evaluation
	fallback crule // the kernel's default rule: pass, without state
}

// kif is an interface as pf knows it, the kernel's pfi_kif. It has one for each name that
// a rule has, also before the interface exists.
type kif struct {
	name   string
	exists bool
	skip   bool // set skip
	addrs  []netip.Prefix
}

// capacity limits what packets can make the kernel store. The kernel compares with >, so
// it stores one more of each.
type capacity struct{ states, sources, fragments int }

// New returns an empty, disabled machine.
func New(o Options) *Machine {
	m := new(Machine)
	m.setUp(o)
	return m
}

// setUp makes m an empty, disabled machine.
func (m *Machine) setUp(o Options) {
	*m = Machine{
		rand:      o.Rand,
		kifs:      map[string]*kif{},
		tables:    map[tableName]*ktable{},
		tags:      map[string]int{},
		tagOf:     []string{""},
		timeouts:  defaultTimeouts,
		limits:    capacity{o.StateLimit, defaultSourceLimit, defaultFragmentLimit},
		sources:   map[sourceKey]*sourceNode{},
		fragments: map[fragmentKey]*datagram{},
	}
	if m.rand == nil {
		m.rand = rand.New(rand.NewPCG(1, 2))
	}
	if m.limits.states <= 0 {
		m.limits.states = DefaultStateLimit
	}
	m.startLimits = m.limits
	m.main = newAnchorNode(nil, "")
	m.states.init()
	m.fallback.loaded = true
}

// Enable enables pf, as pfctl -e does. The error is [ErrEnabled].
func (m *Machine) Enable() error {
	if m.enabled {
		return ErrEnabled
	}
	m.enabled = true
	return nil
}

// Disable disables pf, as pfctl -d does: packets pass unjudged and untranslated. Rules,
// tables and states stay. The error is [ErrDisabled].
func (m *PF) Disable() error {
	if !m.enabled {
		return ErrDisabled
	}
	m.enabled = false
	return nil
}

// Enabled reports whether pf is enabled.
func (m *PF) Enabled() bool { return m.enabled }

// kif returns the interface of that name, which needn't exist.
func (m *Machine) kif(name string) *kif {
	k := m.kifs[name]
	if k == nil {
		k = &kif{name: name}
		m.kifs[name] = k
	}
	return k
}

// AddInterface adds an interface, or replaces the addresses of one that exists.
func (m *Machine) AddInterface(i pfconf.Interface) {
	k := m.kif(i.Name)
	if !k.exists {
		k.exists = true
		m.order = append(m.order, k)
	}
	k.addrs = slices.Clone(i.Addresses)
	m.ifGen++
}

// RemoveInterface removes an interface. Rules for its name and states bound to it stay.
// The error is [ErrNoInterface].
func (m *PF) RemoveInterface(name string) error {
	k := m.kifs[name]
	if k == nil || !k.exists {
		return fmt.Errorf("remove interface %s: %w", name, ErrNoInterface)
	}
	k.exists, k.skip, k.addrs = false, false, nil
	m.order = slices.DeleteFunc(m.order, func(o *kif) bool { return o == k })
	m.ifGen++
	return nil
}

// AddAddress adds an address, with the length of its network, to an interface. The error
// is [ErrNoInterface].
func (m *PF) AddAddress(name string, a netip.Prefix) error {
	k := m.kifs[name]
	if k == nil || !k.exists {
		return fmt.Errorf("add address %s to %s: %w", a, name, ErrNoInterface)
	}
	k.addrs = append(slices.Clone(k.addrs), a)
	m.ifGen++
	return nil
}

// DeleteAddress removes an address from an interface. It is no error if the interface
// doesn't have it; the error is [ErrNoInterface].
func (m *PF) DeleteAddress(name string, a netip.Addr) error {
	k := m.kifs[name]
	if k == nil || !k.exists {
		return fmt.Errorf("delete address %s of %s: %w", a, name, ErrNoInterface)
	}
	k.addrs = slices.DeleteFunc(slices.Clone(k.addrs), func(p netip.Prefix) bool { return p.Addr() == a })
	m.ifGen++
	return nil
}

// Interfaces returns the interfaces that exist, in the order in which they were added.
func (m *Machine) Interfaces() []pfconf.Interface {
	out := make([]pfconf.Interface, len(m.order))
	for i, k := range m.order {
		out[i] = pfconf.Interface{Name: k.name, Addresses: slices.Clone(k.addrs)}
	}
	return out
}

// Skipped returns the names of the interfaces with set skip, sorted.
func (m *PF) Skipped() []string {
	var out []string
	for _, k := range m.kifs {
		if k.skip {
			out = append(out, k.name)
		}
	}
	slices.Sort(out)
	return out
}

// Advance lets time pass, removes expired states, source nodes and fragments, and returns
// the number of states left. pf counts in whole seconds, so nothing expires within one
// and the call is cheap.
func (m *PF) Advance(d time.Duration) int {
	before := m.seconds()
	if d > 0 {
		m.now += d
	}
	if m.seconds() != before {
		m.purge()
	}
	return m.states.n
}

// seconds returns the whole seconds since the machine was made, the kernel's
// pf_time_second.
func (m *Machine) seconds() int64 { return int64(m.now / time.Second) }

// tag returns the number of a tag's name; 0 is no tag.
func (m *Machine) tag(name string) int {
	if name == "" {
		return 0
	}
	id, ok := m.tags[name]
	if !ok {
		id = len(m.tagOf)
		m.tags[name] = id
		m.tagOf = append(m.tagOf, name)
	}
	return id
}

// checkAnchorPath checks that pfctl accepts the path of an anchor. Names that begin with
// an underscore are reserved for nameless inline anchors.
func checkAnchorPath(path string) error {
	if strings.HasPrefix(path, "_") || strings.Contains(path, "/_") {
		return fmt.Errorf("anchor %q: names that begin with _ are reserved", path)
	}
	return checkAnchorLength(path)
}

// checkAnchorLength checks a path against the kernel's limits.
func checkAnchorLength(path string) error {
	if path == "" || len(path) > maxAnchorPath {
		return fmt.Errorf("anchor name of %d bytes: must have 1 to %d", len(path), maxAnchorPath)
	}
	for name := range strings.SplitSeq(path, "/") {
		if name == "" || len(name) > maxAnchorName {
			return fmt.Errorf("anchor %q: each part must have 1 to %d bytes", path, maxAnchorName)
		}
	}
	return nil
}
