package macos

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

var wantPackets = flag.Int("packets", 120_000, "packets that pf and policy are compared on")

// tally counts the compared packets.
type tally struct{ packets, passed, worlds, differences int }

// againstPolicy is the result of the differential test, and amongNeighbours the result of
// our anchor beside other software's rules. TestMain prints both.
var againstPolicy, amongNeighbours tally

// add adds the count of one world. If expected is set, its differences aren't counted.
func (n *tally) add(world tally, expected bool) {
	n.worlds++
	n.packets += world.packets
	n.passed += world.passed
	if !expected {
		n.differences += world.differences
	}
}

func (n *tally) say(what string) {
	if n.packets > 0 {
		fmt.Printf("%s: %d packets in %d worlds, %d passed, %d differences\n", what, n.packets, n.worlds, n.passed, n.differences)
	}
}

func TestMain(m *testing.M) {
	code := m.Run()
	amongNeighbours.say("pf beside other software's rules against policy")
	againstPolicy.say("pf against policy")
	os.Exit(code)
}

// TestDifferential compares the anchor with the policy. The anchor is evaluated as the
// kernel does, called from Apple's main ruleset. Meshes, hosts, permissions and packets
// are random; packets are sent with and without states, before a change and after it.
func TestDifferential(t *testing.T) {
	for againstPolicy.packets < *wantPackets && !t.Failed() {
		rapid.Check(t, func(t *rapid.T) {
			w := drawWorld(t)
			next := drawChange(t, w)
			c := newComparison(t, w, rapid.Uint64().Draw(t, "packets"), appleMain, nil)
			defer func() { againstPolicy.add(*c.tally, false) }()
			c.round(next)
		})
	}
}

// drawChange returns a changed world: other permissions, a removed peer, perhaps other
// facts.
func drawChange(t *rapid.T, w world) world {
	next := w
	next.mesh.Peers = slices.Clone(w.mesh.Peers)
	for i := range next.mesh.Peers {
		next.mesh.Peers[i].Permissions = mesh.Granted(drawPermissions(t))
	}
	if n := len(next.mesh.Peers); n > 0 && rapid.IntRange(0, 3).Draw(t, "removed") == 0 {
		next.mesh.Peers = next.mesh.Peers[:n-1]
	}
	if rapid.IntRange(0, 3).Draw(t, "moved") == 0 {
		next.drawInterfaces(t)
	}
	return next
}

// comparison runs packets through a machine and asks the policy about each.
type comparison struct {
	t     failer
	rng   *rand.Rand
	w     world
	r     *policy.Ruleset
	m     *pfsim.PF
	tally *tally
	port  uint16
	// portless holds the addresses of this round's flows without ports.
	portless map[netip.Addr]bool
	subset   bool          // the machine may pass less than the policy
	edit     func(*Anchor) // changes the anchor before it is loaded, unless nil
}

// failer is the part of testing.TB that a comparison needs.
type failer interface {
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

func newComparison(t failer, w world, seed uint64, main string, edit func(*Anchor)) *comparison {
	m, err := w.newMachine(seed, main)
	if err != nil {
		t.Fatal(err)
	}
	c := &comparison{t: t, rng: rand.New(rand.NewPCG(seed, 3)), m: m, edit: edit, tally: new(tally)}
	c.load(w)
	return c
}

// load loads the anchor for a world.
func (c *comparison) load(w world) {
	r, err := policy.Compile(w.mesh, w.host, start)
	if err != nil {
		c.t.Fatal(err)
	}
	a, err := Compile(r, AnchorOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	if c.edit != nil {
		c.edit(a)
	}
	if err := c.m.LoadAnchor(a.Path, a.Ruleset()); err != nil {
		c.t.Fatal(err)
	}
	c.w, c.r = w, r
}

// joinGroups sends membership reports, which carry an IP option, by each interface, and
// receives those of neighbours: on the mesh interface none passes.
func (c *comparison) joinGroups() {
	if c.subset {
		return // other software may translate the host's own report
	}
	report := pfsim.Packet{Src: netip.MustParseAddr("192.0.2.1"), Dst: netip.MustParseAddr("224.0.0.22"), Proto: protoIGMP, Options: true}
	for _, name := range c.allIn() {
		for _, j := range []pfsim.Judgement{c.m.Send(report, name), c.m.Receive(report, name)} {
			c.judge(j.Verdict == pfsim.VerdictPass, name != meshInterface, func() string {
				return "membership report by " + name + "\n" + explain(j)
			})
		}
	}
}

// testFlow is a flow that the policy and the machine let open.
type testFlow struct {
	opened  host.Packet
	sent    pfsim.Packet // as its sender made it
	left    pfsim.Packet // as it left the host, or reached it
	out     string       // "": for the host
	routed  bool         // out matches the host's routing table
	verdict policy.Verdict
}

// round opens flows, uses them, changes the policy, checks the flows again, and changes
// the policy back.
func (c *comparison) round(next world) {
	c.m.FlushStates()
	c.portless = map[netip.Addr]bool{}
	c.joinGroups()
	var flows []testFlow
	for range 60 {
		if f, ok := c.open(); ok {
			flows = append(flows, f)
		}
	}
	for _, f := range flows {
		c.use(f)
	}
	was, old := c.w, c.r
	next.addInterfaces(c.m)
	c.load(next)
	narrowed := policy.Diff(old, c.r)
	for _, k := range Kills(old, c.r, narrowed) {
		c.m.KillStates(k.From, k.To)
	}
	for _, f := range flows {
		c.after(f, narrowed)
	}
	was.addInterfaces(c.m)
	c.load(was)
}

// judge compares one verdict. It calls what only for a difference.
func (c *comparison) judge(got, want bool, what func() string) {
	c.tally.packets++
	if got {
		c.tally.passed++
	}
	if got == want || c.subset && !got {
		return
	}
	c.tally.differences++
	c.t.Fatalf("pf passes: %v, policy: %v: %s\nmesh %+v\nhost %+v", got, want, what(), c.w.mesh, c.w.host)
}

// open sends the first packet of a new flow.
func (c *comparison) open() (testFlow, bool) {
	p := c.randomPacket()
	v := p.Judge(c.r)
	// The host's own packets that come back by the tunnel are the one exception to the
	// table.
	turned := p.In == meshInterface && betweenOwn(p)
	f := testFlow{opened: p, sent: c.toPF(p), verdict: v}
	var j pfsim.Judgement
	want := v.Pass
	switch {
	case p.In == "":
		f.out = c.randomOut(p)
		want = want && c.mayLeave(p, v, f.out)
		j = c.m.Send(f.sent, f.out)
	case c.isForHost(p):
		want = want || turned && !p.Malformed
		j = c.m.Receive(f.sent, p.In)
	default:
		f.out = c.randomOut(p)
		f.routed = f.out == c.routed(p.Dst)
		want = want && c.mayLeave(p, v, f.out)
		j = c.m.Forward(f.sent, p.In, f.out)
	}
	pass := j.Verdict == pfsim.VerdictPass
	if to := j.Packet().Dst; c.subset && p.In != meshInterface && to != p.Dst {
		// Another product redirected a packet that isn't a peer's: the verdict on the new
		// destination counts.
		redirected := p
		redirected.Dst = to
		want = redirected.Judge(c.r).Pass
	}
	c.judge(pass, want, func() string {
		return fmt.Sprintf("%+v out %q: %+v %s\n%s", p, f.out, v, v.Rule, explain(j))
	})
	if !pass {
		return testFlow{}, false
	}
	f.left = j.Packet()
	c.checkTranslation(f, v)
	return f, p.Src.IsValid() && isFlow(f)
}

// isFlow reports whether a flow's packet can be answered. Errors and resets aren't
// answered, and no state is made where the mesh isn't concerned.
func isFlow(f testFlow) bool {
	switch f.verdict.Rule {
	case policy.RuleIncoming, policy.RuleDNS, policy.RuleLAN, policy.RuleInternet, policy.RuleHostToPeer:
		return !f.opened.IsICMPError() && f.sent.Flags&pfconf.FlagRST == 0
	}
	return false
}

// isForHost reports whether the kernel delivers a packet locally: every packet but
// unicast to another host.
func (c *comparison) isForHost(p host.Packet) bool {
	return !c.r.IsForwarded(p.Dst)
}

// mayLeave reports whether the policy lets a packet leave by an interface. If the packet
// is to be translated, the interface needs an address.
func (c *comparison) mayLeave(p host.Packet, v policy.Verdict, out string) bool {
	switch v.Exit {
	case policy.ExitMesh:
		return out == meshInterface
	case policy.ExitUplink:
		return out == c.w.host.Uplink(p.Dst) && c.canTranslate(p, v, out)
	case policy.ExitOther:
		return out != meshInterface && out != loopback && c.canTranslate(p, v, out)
	case policy.ExitAny:
		return out != meshInterface || betweenOwn(p)
	}
	return true
}

// betweenOwn reports whether a packet is from the host's mesh address to itself.
func betweenOwn(p host.Packet) bool {
	return slices.Contains(hostAddresses, p.Src) && slices.Contains(hostAddresses, p.Dst)
}

// canTranslate reports whether an interface has an address to translate to, and whether
// the facts list a route of this family there.
func (c *comparison) canTranslate(p host.Packet, v policy.Verdict, out string) bool {
	if c.subset {
		return true // perhaps by another program's rule
	}
	family := pfconf.Inet6
	if p.Dst.Is4() {
		family = pfconf.Inet
	}
	known := out == c.w.host.Uplink(p.Dst) || slices.ContainsFunc(c.w.host.Routes, func(r policy.Route) bool {
		return r.Interface == out && isFamily(r.Prefix.Addr(), family)
	})
	for _, i := range c.m.Interfaces() {
		if i.Name != out {
			continue
		}
		for _, a := range i.Addresses {
			if isFamily(a.Addr(), family) && !(a.Addr().Is6() && a.Addr().IsLinkLocalUnicast()) {
				return known || slices.ContainsFunc(c.w.host.Interfaces, func(h policy.Interface) bool { return h.Name == out })
			}
		}
	}
	return false
}

// checkTranslation checks that a packet left with an address of its outgoing interface if
// the policy wants translation, and unchanged otherwise.
func (c *comparison) checkTranslation(f testFlow, v policy.Verdict) {
	if c.subset && f.opened.In != meshInterface {
		return // other software may translate packets that aren't a peer's
	}
	if f.left.Dst != f.sent.Dst || f.left.DstPort != f.sent.DstPort {
		c.t.Fatalf("%+v: destination became %v", f.opened, f.left)
	}
	if !v.NAT() {
		if f.left.Src != f.sent.Src && !c.subset {
			c.t.Fatalf("%+v: source became %v", f.opened, f.left)
		}
		return
	}
	for _, i := range c.m.Interfaces() {
		if i.Name == f.out && slices.ContainsFunc(i.Addresses, func(p netip.Prefix) bool { return p.Addr() == f.left.Src }) {
			return
		}
	}
	if !c.subset {
		c.t.Fatalf("%+v: left by %s with source %v", f.opened, f.out, f.left.Src)
	}
}

// use answers a flow's packet, forges answers to it, and sends ICMP errors about it.
func (c *comparison) use(f testFlow) {
	answer := reverse(f.left)
	peer := f.sent.Src
	switch {
	case f.verdict.Exit == policy.ExitHost:
		for _, out := range c.allOut() {
			v := c.r.Reply(policy.ByPeer, f.opened.Packet, "")
			got := c.m.Send(answer, out)
			c.judge(got.Verdict == pfsim.VerdictPass, v.Pass && out == meshInterface, func() string {
				return fmt.Sprintf("answer by %s to %+v: %+v\n%s", out, f.opened, v, explain(got))
			})
		}
	case f.opened.In == "":
		peer = f.opened.Dst
		for _, in := range c.allIn() {
			c.judgeAnswerToHost(f, answer, in)
		}
	default:
		for _, in := range c.allIn() {
			c.judgeAnswerToPeer(f, answer, in)
		}
	}
	c.errors(f, peer)
}

// judgeAnswerToHost judges an answer to a flow that the host opened to a peer.
func (c *comparison) judgeAnswerToHost(f testFlow, answer pfsim.Packet, in string) {
	v := c.r.Reply(policy.ByHost, f.opened.Packet, in)
	got := c.m.Receive(answer, in)
	c.judge(got.Verdict == pfsim.VerdictPass, v.Pass, func() string {
		return fmt.Sprintf("answer by %s to %+v: %+v\n%s", in, f.opened, v, explain(got))
	})
}

// judgeAnswerToPeer judges whether the answer to a flow that a peer opened through the
// host reaches the peer. An answer that isn't translated back is addressed to the host.
// In class lan the policy lets any other interface answer; a state accepts only the
// interface that the flow left by.
func (c *comparison) judgeAnswerToPeer(f testFlow, answer pfsim.Packet, in string) {
	v := c.r.Reply(policy.ByPeer, f.opened.Packet, in)
	got := c.m.Forward(answer, in, meshInterface)
	reached := got.Verdict == pfsim.VerdictPass
	if reached && got.Packet().Dst != f.sent.Src {
		c.t.Fatalf("answer by %s to %+v went to %v", in, f.opened, got.Packet())
	}
	c.judge(reached, v.Pass && in == f.out, func() string {
		return fmt.Sprintf("answer by %s to %+v, which left by %s as %v: %+v\n%s", in, f.opened, f.out, f.left, v, explain(got))
	})
}

// errors sends ICMP errors about a flow's packet, along the flow's path, and about
// packets of no flow.
func (c *comparison) errors(f testFlow, peer netip.Addr) {
	opener := policy.ByPeer
	if f.opened.In == "" {
		opener = policy.ByHost
	}
	allowed := c.r.MayOpen(opener, f.opened.Packet).Pass
	// pf files the states of ICMPv6 echoes under ICMP and looks for quoted ones
	// under ICMPv6 (pf_test_state_icmp in xnu bsd/net/pf.c), so no error about one
	// is known to it: here it passes less than the policy.
	want := allowed && f.sent.Proto != pfconf.ProtoICMPv6
	types := icmpErrors(f.sent.Src)
	kind := types[c.rng.IntN(len(types))]
	what := func(j *pfsim.Judgement) func() string {
		return func() string { return fmt.Sprintf("ICMP error %d about %+v\n%s", kind, f.opened, explain(*j)) }
	}
	router := c.w.randomDst(c.rng, peer.Is4())
	var j pfsim.Judgement
	switch {
	case f.verdict.Exit == policy.ExitHost:
		// The host's own error about the peer's packet; the peer's about the
		// host's answer.
		j = c.m.Send(icmpError(f.opened.Dst, peer, kind, f.left), meshInterface)
		c.judge(j.Verdict == pfsim.VerdictPass, want || allowed && slices.Contains(hostAddresses, f.opened.Dst), what(&j))
		j = c.m.Receive(icmpError(peer, f.opened.Dst, kind, reverse(f.left)), meshInterface)
		c.judge(j.Verdict == pfsim.VerdictPass, want, what(&j))
	case f.opened.In == "":
		j = c.m.Receive(icmpError(peer, f.opened.Src, kind, f.left), meshInterface)
		c.judge(j.Verdict == pfsim.VerdictPass, want, what(&j))
	default:
		j = c.m.Forward(icmpError(router, f.left.Src, kind, f.left), f.out, meshInterface)
		c.judge(j.Verdict == pfsim.VerdictPass && j.Packet().Dst == peer, want, what(&j))
		j = c.m.Forward(icmpError(peer, f.opened.Dst, kind, reverse(f.sent)), meshInterface, f.out)
		c.judge(j.Verdict == pfsim.VerdictPass, want, what(&j))
		forged := f.left
		forged.SrcPort, forged.ICMPID = forged.SrcPort^0x5555, forged.ICMPID^0x5555
		if hasPorts(forged.Proto) {
			j = c.m.Forward(icmpError(router, forged.Src, kind, forged), f.out, meshInterface)
			c.judge(j.Verdict == pfsim.VerdictPass && j.Packet().Dst == peer, false, what(&j))
		}
	}
}

// after checks a flow again once the policy has changed and the narrowed flows were cut.
// First nothing of a flow that is no longer allowed may pass, neither answer nor packet;
// then an allowed flow must pass.
func (c *comparison) after(f testFlow, narrowed []policy.Narrowed) {
	v := f.opened.Judge(c.r)
	byHost := f.opened.In == ""
	want := v.Pass && (f.out == "" && v.Exit == policy.ExitHost || f.out != "" && c.mayLeave(f.opened, v, f.out))
	untouched := !slices.ContainsFunc(narrowed, func(n policy.Narrowed) bool {
		return slices.Contains(n.Addresses[:], f.opened.Src) || slices.Contains(n.Addresses[:], f.opened.Dst)
	})
	if v.Pass && !want && f.out != "" && !byHost && !f.routed {
		return // the peer may open it, but it left by an interface without a route
	}
	if !byHost && f.out != "" && (untouched && want || !want) {
		// A flow that wasn't cut goes on. A cut flow isn't revived by an answer.
		got := c.m.Forward(reverse(f.left), f.out, meshInterface)
		reached := got.Verdict == pfsim.VerdictPass && got.Packet().Dst == f.sent.Src
		c.judge(reached, want, func() string {
			return fmt.Sprintf("after the change, answer by %s to %+v: %+v\n%s", f.out, f.opened, v, explain(got))
		})
	}
	var j pfsim.Judgement
	switch {
	case byHost:
		j = c.m.Send(f.sent, f.out)
	case c.isForHost(f.opened):
		want = v.Pass // it may pass only since the change
		j = c.m.Receive(f.sent, meshInterface)
	case f.out == "":
		return // no longer the host's address, and no interface leads there
	default:
		j = c.m.Forward(f.sent, meshInterface, f.out)
	}
	c.judge(j.Verdict == pfsim.VerdictPass, want, func() string {
		return fmt.Sprintf("after the change, %+v out %q: %+v %s\n%s", f.opened, f.out, v, v.Rule, explain(j))
	})
}

func explain(j pfsim.Judgement) string {
	hook := func(h pfsim.Hook) string {
		if !h.Seen {
			return "not seen"
		}
		label := ""
		if h.Rule != nil {
			label = h.Rule.Label
		}
		return fmt.Sprintf("%v by rule %q (%d) of %q, state %v, %v", h.Verdict, label, h.Decider, h.Anchor, h.State, h.Packet)
	}
	return "in: " + hook(j.In) + "\nout: " + hook(j.Out)
}
