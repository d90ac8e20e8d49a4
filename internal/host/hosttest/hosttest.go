// Package hosttest has the conformance tests that every host of package host must pass,
// whatever it enforces with. A host's own tests call [Run] with a [Harness]: how to make
// a computer with the host on it, and how to send packets there. Errors that only one
// kind of host can make are tested beside that host.
package hosttest

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Harness makes computers to test a host on.
type Harness struct {
	// New returns a computer that doesn't forward and had no host yet.
	New func(t *testing.T) *Computer
	// Steps are all enforcing steps of the host. The tests kill it at each one.
	Steps []string
}

// Computer is a computer with an uplink and a LAN.
type Computer struct {
	// Start makes a host as a new process of the helper does. step is called before each
	// enforcing step, and may panic.
	Start func(step func(name string)) (host.Host, error) // required
	// Kill does what a kernel does when the process of the last host ends.
	Kill func() // required

	// Interface is how the mesh interface is created; two peers have the addresses in
	// Peers.
	Interface host.Interface    // required
	Peers     [2]mesh.Addresses // required

	// Neighbours are the addresses of other hosts, by the interface that they send to.
	// Packets are sent from them and from peers to each other, to Interface's addresses
	// and to Destinations.
	Neighbours   map[string][]netip.Addr // required
	Destinations []netip.Addr            // required

	// Send sends packets, each the first of a TCP connection or a datagram, and returns
	// which of them arrived, on the computer itself or behind it. It must wait for the
	// packets that want selects.
	Send func(packets []host.Packet, want []bool) []bool // required
	// State describes everything that a host changes on the computer.
	State func() string // required
	// Blind makes the next reading of what is enforced hang until its context ends, or
	// until see is called.
	Blind func() (see func()) // required
	// Changes are ways in which other programs undo what is enforced, by name.
	Changes map[string]func() error // required
	// StopPeers loads a rule of other software that drops the packets of peers to the
	// internet, and returns a function that unloads it.
	StopPeers func() (undo func() error, err error) // required

	// Sockets runs a function that opens sockets on the computer; nil if its kernel has
	// none, such as a simulated one.
	Sockets func(func() error) error // optional
}

const everything = mesh.Incoming | mesh.Routing | mesh.LAN

// Run runs the tests as subtests of t.
func Run(t *testing.T, h Harness) {
	t.Run("truth table", func(t *testing.T) { truthTable(start(t, h)) })
	t.Run("killed at each step", func(t *testing.T) { killed(t, h) })
	t.Run("drift", func(t *testing.T) { drift(t, h) })
	t.Run("foreign rule", func(t *testing.T) { foreignRule(start(t, h)) })
	t.Run("looks that fail", func(t *testing.T) { failingReads(start(t, h)) })
	t.Run("steps that take too long", func(t *testing.T) { slowSteps(t, h) })
	t.Run("network", func(t *testing.T) { network(start(t, h)) })
}

// trial is a host under test.
type trial struct {
	*testing.T
	*Computer
	host  host.Host
	step  func(string) // nil: none
	found string       // State before the first host
	ports uint16       // the last one used
}

// start makes a computer with a host on it.
func start(t *testing.T, h Harness) *trial {
	t.Helper()
	c := &trial{T: t, Computer: h.New(t)}
	c.found = c.State()
	c.begin()
	return c
}

func (c *trial) must(err error) {
	c.Helper()
	if err != nil {
		c.Fatal(err)
	}
}

// begin starts the next host, as a new process does.
func (c *trial) begin() {
	c.Helper()
	var err error
	c.host, err = c.Start(func(name string) {
		if c.step != nil {
			c.step(name)
		}
	})
	c.must(err)
}

func (c *trial) open() {
	c.Helper()
	_, err := c.host.Link.Open(context.Background(), c.Interface)
	c.must(err)
}

// closeHost closes the host and checks that the computer is as it was found.
func (c *trial) closeHost(when string) {
	c.Helper()
	left, err := c.host.Link.Close(context.Background())
	if err != nil || len(left) > 0 {
		c.Errorf("%s: close: left %v, %v", when, left, err)
	}
	if now := c.State(); now != c.found {
		c.Fatalf("%s: the computer isn't as it was found:\n%s\nwas:\n%s", when, now, c.found)
	}
}

// compile compiles the ruleset of a mesh whose two peers have these permissions.
func (c *trial) compile(first, second mesh.Permissions) *policy.Ruleset {
	c.Helper()
	facts, err := c.host.Observer.Observe(context.Background())
	c.must(err)
	m := policy.Mesh{Prefixes: c.Interface.Prefixes, Addresses: c.Interface.Addresses}
	for i, have := range []mesh.Permissions{first, second} {
		m.Peers = append(m.Peers, mesh.Peer{
			PublicKey: mesh.PublicKey{byte(i + 1)}, Name: fmt.Sprint("peer", i), Addresses: c.Peers[i], Permissions: mesh.Granted(have),
		})
	}
	r, err := policy.Compile(m, facts, time.Unix(0, 0))
	c.must(err)
	return r
}

// enforce enforces that ruleset and checks that the host holds it.
func (c *trial) enforce(first, second mesh.Permissions) *policy.Ruleset {
	c.Helper()
	r := c.compile(first, second)
	c.must(c.host.Enforcer.Enforce(context.Background(), r))
	c.checkEnforced(r)
	return r
}

// checkEnforced checks that the host holds r.
func (c *trial) checkEnforced(r *policy.Ruleset) {
	c.Helper()
	report, err := c.host.Enforcer.Inspect(context.Background(), r)
	if err != nil || len(report.Drift) > 0 {
		c.Errorf("what is enforced isn't: %v, %v", report.Drift, err)
	}
}

// port returns a port that no packet used yet. A used one may have a known flow.
func (c *trial) port() uint16 {
	c.ports = (c.ports + 1) % 40000
	return 20000 + c.ports
}

// everySource returns a packet from each source to each destination.
func (c *trial) everySource(iface string) (out []host.Packet) {
	to := slices.Concat(c.Destinations, c.Interface.Addresses, c.Peers[0].List(), c.Peers[1].List())
	add := func(in string, from []netip.Addr) {
		for _, src := range from {
			for _, dst := range to {
				if src.Is4() == dst.Is4() && src != dst {
					p := policy.Packet{Src: src, Dst: dst, Proto: policy.ProtoTCP, SrcPort: c.port(), DstPort: 4443}
					out = append(out, host.Packet{In: in, Packet: p})
				}
			}
		}
	}
	if iface != "" {
		add(iface, slices.Concat(c.Peers[0].List(), c.Peers[1].List()))
	}
	for in, from := range c.Neighbours {
		add(in, slices.Concat(from, c.Peers[0].List())) // a peer's address, spoofed
	}
	return out
}

// judge sends packets from every source and compares what arrives with the rulesets: a
// packet may arrive if all of them let it pass. With exactly, a peer's packet that may
// arrive must arrive. Without it, packets to the computer's addresses in other networks
// are left out, and so are peers' packets to the computer itself: a host that forwards
// nothing may leave those to the guard.
func (c *trial) judge(when string, exactly bool, iface string, rulesets ...*policy.Ruleset) {
	c.Helper()
	packets := c.everySource(iface)
	if !exactly {
		packets = slices.DeleteFunc(packets, func(p host.Packet) bool {
			toMesh := slices.Contains(c.Interface.Addresses, p.Dst)
			return rulesets[0].Class(p.Dst) == policy.Self && (p.In == iface || !toMesh)
		})
	}
	may, want := make([]bool, len(packets)), make([]bool, len(packets))
	for i, p := range packets {
		may[i] = !slices.ContainsFunc(rulesets, func(r *policy.Ruleset) bool { return !p.Judge(r).Pass })
		want[i] = exactly && may[i] && p.In == iface
	}
	passed := 0
	for i, arrived := range c.Send(packets, want) {
		p := packets[i]
		switch {
		case arrived && !may[i]:
			c.Errorf("%s: %v by %q arrived, which is refused (%s)", when, p.Packet, p.In, p.Judge(rulesets[0]).Rule)
		case !arrived && want[i]:
			c.Errorf("%s: %v by %q didn't arrive, which passes (%s)", when, p.Packet, p.In, p.Judge(rulesets[0]).Rule)
		case arrived:
			passed++
		}
	}
	c.Logf("%s: %d packets, %d arrived", when, len(packets), passed)
}

// truthTable gives two peers permissions of all kinds and checks that their packets reach
// exactly what the policy allows, and that no other packet arrives that it refuses.
func truthTable(c *trial) {
	c.open()
	for have := mesh.Permissions(0); have <= everything; have++ {
		r := c.enforce(have, everything&^have)
		c.judge(fmt.Sprintf("%v and %v", have, everything&^have), true, r.Host().Interface, r)
	}
	c.closeHost("at the end")
}

// killSignal is the value that a step panics with, in place of a SIGKILL.
type killSignal struct{}

// lifecycle runs through everything that a host does, from start to end, and reports whether
// it got to the end.
func (c *trial) lifecycle() (finished bool) {
	defer func() {
		if r := recover(); r != nil {
			if _, killed := r.(killSignal); !killed {
				panic(r)
			}
			c.Kill()
		}
	}()
	ctx := context.Background()
	c.open()
	var old *policy.Ruleset
	for _, have := range [][2]mesh.Permissions{{}, {everything}, {everything, mesh.Routing}, {mesh.Incoming, mesh.Routing}, {}} {
		r := c.enforce(have[0], have[1])
		c.must(c.host.Enforcer.Cut(ctx, r, policy.Diff(old, r)))
		old = r
	}
	c.enforce(everything, 0)
	_, err := c.host.Link.Close(ctx)
	c.must(err)
	return true
}

// killed kills the helper before each of its steps. While it is dead, no packet may
// arrive that no ruleset lets pass. The next host takes over and leaves the computer as
// the first one found it.
func killed(t *testing.T, h Harness) {
	c := start(t, h)
	c.open()
	closed := c.compile(0, 0)
	c.closeHost("before the first kill")
	met := map[string]bool{}
	at := 1
	for ; ; at++ {
		n, last := 0, ""
		c.step = func(name string) {
			if n++; n == at {
				last = name
				panic(killSignal{})
			}
		}
		c.begin()
		finished := c.lifecycle()
		c.step = nil
		if finished {
			break
		}
		met[last] = true
		when := fmt.Sprintf("killed before step %d, %q", at, last)
		c.judge(when, false, "", closed)
		c.begin()
		if at%2 == 0 {
			c.open()
			c.enforce(everything, 0)
		}
		c.closeHost(when)
	}
	for _, s := range h.Steps {
		if !met[s] {
			t.Errorf("nothing was killed at %q", s)
		}
	}
	t.Logf("%d kills", at-1)
}

// drift undoes what is enforced, as other programs may: Inspect must find it and Enforce
// must repair it.
func drift(t *testing.T, h Harness) {
	c := start(t, h)
	c.open()
	for what := range c.Changes {
		r := c.enforce(everything, mesh.Routing)
		c.must(c.Changes[what]())
		report, err := c.host.Enforcer.Inspect(context.Background(), r)
		if err != nil || len(report.Drift) == 0 {
			t.Errorf("%s: found %v, %v", what, report.Drift, err)
		}
		r = c.enforce(everything, mesh.Routing)
		c.judge(what, true, r.Host().Interface, r)
	}
	c.closeHost("at the end")
}

// foreignRule has other software stop peers' packets: a problem of that kind must be
// reported, and the kind must count as examined.
func foreignRule(c *trial) {
	c.open()
	r := c.enforce(everything, mesh.Routing)
	undo, err := c.StopPeers()
	c.must(err)
	report, err := c.host.Enforcer.Inspect(context.Background(), r)
	c.must(err)
	problems := report.Problems
	if c.host.Others != nil {
		more, err := c.host.Others.Others(context.Background(), r, nil)
		c.must(err)
		problems = append(problems, more...)
	}
	if !slices.ContainsFunc(problems, func(p host.Problem) bool { return p.Kind == host.KindOtherFilters }) {
		c.Errorf("a foreign rule that stops peers isn't among the problems: %+v", problems)
	}
	for _, reasons := range []map[host.ProblemKind]string{c.host.Unexamined, report.Unexamined} {
		if reason, unexamined := reasons[host.KindOtherFilters]; unexamined {
			c.Errorf("foreign rules aren't examined: %s", reason)
		}
	}
	c.must(undo())
	c.closeHost("at the end")
}

// failingReads makes readings of what is enforced hang until their deadline: they must fail, and
// the host must not close.
func failingReads(c *trial) {
	c.open()
	r := c.enforce(everything, mesh.Incoming)
	see := c.Blind()
	limit, cancel := context.WithTimeout(context.Background(), stepTime)
	defer cancel()
	if report, err := c.host.Enforcer.Inspect(limit, r); err == nil {
		c.Errorf("a look that hangs doesn't fail, and finds %+v", report)
	}
	c.judge("after a look that failed", true, r.Host().Interface, r)
	see()
	r = c.enforce(everything, mesh.Incoming) // the host may not know any more what is loaded
	c.judge("after a look again", true, r.Host().Interface, r)
	c.closeHost("at the end")
}

// stepTime is the deadline of a call in [slowSteps]. returnLimit bounds how long the call may
// take to return: it is long, for slow machines.
const (
	stepTime    = 200 * time.Millisecond
	returnLimit = time.Minute
)

// slowSteps makes each step of a change take until the deadline. The call must return; then
// the new ruleset holds or, after an error, only packets pass that both the old and the
// new one pass. The next call must repair it.
func slowSteps(t *testing.T, h Harness) {
	c := start(t, h)
	c.open()
	for at, more := 1, true; more; at++ {
		old := c.enforce(everything, 0)
		next := c.compile(mesh.Routing, mesh.Routing|mesh.LAN)
		ctx, cancel := context.WithTimeout(context.Background(), stepTime)
		n, last := 0, ""
		c.step = func(name string) {
			if n++; n == at {
				last = name
				<-ctx.Done()
			}
		}
		began := time.Now()
		err := c.host.Enforcer.Enforce(ctx, next)
		// Wait for what the call has left running.
		if _, waiting := c.host.Observer.Observe(context.Background()); waiting != nil {
			t.Errorf("%q: %v", last, waiting)
		}
		if took := time.Since(began); took > returnLimit {
			t.Errorf("%q: the call took %v", last, took)
		}
		cancel()
		c.step = nil
		when := fmt.Sprintf("after step %d, %q, took too long", at, last)
		var named *host.StepError
		switch more = last != ""; {
		case !more && err != nil && !errors.Is(err, context.DeadlineExceeded):
			t.Error(err)
		case err == nil:
			c.judge(when, true, next.Host().Interface, next)
		case !errors.As(err, &named):
			t.Errorf("%s: the error names no step: %v", when, err)
			fallthrough
		default:
			c.judge(when, false, next.Host().Interface, old, next)
		}
	}
	c.closeHost("at the end")
}

// network opens sockets on mesh addresses and checks the errors of other addresses.
func network(c *trial) {
	ctx := context.Background()
	n := c.host.Network
	if n == nil {
		c.Fatal("the host has no network")
	}
	own, peer, elsewhere := c.Interface.Addresses[0], c.Peers[0][0], c.Destinations[0]
	refuses := func(when string, want error, addrs ...netip.Addr) {
		c.Helper()
		for _, a := range addrs {
			at := netip.AddrPortFrom(a, 4443)
			_, err1 := n.Listen(ctx, at)
			_, err2 := n.ListenPacket(ctx, at)
			if !errors.Is(err1, want) || !errors.Is(err2, want) {
				c.Errorf("%s, at %v: %v, %v; want %v", when, a, err1, err2, want)
			}
		}
	}
	dial := func(when string, want error, addrs ...netip.Addr) {
		c.Helper()
		for _, a := range addrs {
			for _, protocol := range []string{"tcp", "udp"} {
				if _, err := n.Dial(ctx, protocol, netip.AddrPortFrom(a, 4443)); !errors.Is(err, want) {
					c.Errorf("%s, to %v: %v; want %v", when, a, err, want)
				}
			}
		}
	}
	refuses("before Open", host.ErrNotOpen, own)
	dial("before Open", host.ErrNotOpen, peer)
	c.open()
	r := c.enforce(mesh.Incoming, 0)
	refuses("elsewhere", host.ErrNotMesh, peer, elsewhere, netip.IPv4Unspecified(), netip.IPv6Unspecified())
	dial("elsewhere", host.ErrNotMesh, own, elsewhere)
	ended := func() {}
	if c.Sockets != nil {
		ended = sockets(c, r)
	}
	c.closeHost("at the end")
	ended()
	refuses("after Close", host.ErrNotOpen, own)
	dial("after Close", host.ErrNotOpen, peer)
}
