package macos

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

var wantWorlds = flag.Int("worlds", 1000, "random meshes and hosts that are enforced and read back")

// TestWhatIsHeldIsWhatWasWritten enforces random meshes in sequence on random hosts, and
// reads back what pf holds. That can differ from what was loaded: pf drops entries that a
// table can't hold, and pfctl prints rules in a form of its own.
func TestWhatIsHeldIsWhatWasWritten(t *testing.T) {
	worlds, loads, inPlace := 0, 0, 0
	for seed := uint64(0); worlds < *wantWorlds; seed++ {
		rng := rand.New(rand.NewPCG(seed, 11))
		g := randomMac(t, rng)
		last := ""
		g.step = func(name string) {
			switch {
			case name == last:
			case name == StepAnchor:
				loads++
			case name == StepTables:
				inPlace++
			}
			last = name
		}
		g.open()
		for range 5 {
			if rng.IntN(2) == 0 {
				g.change(rng)
			}
			m := testMesh(1+rng.IntN(5), randomPermissions(rng)...)
			m.Former = randomFormer(rng)
			r := g.enforce(m)
			if report := g.inspect(r); len(report.Drift) > 0 {
				t.Fatalf("seed %d: drift after Enforce: %v\nhost %+v\nmesh %+v", seed, report.Drift, r.Host(), r.Mesh())
			}
			g.p.enforcedSince = true // inspect again, without a change
			if report := g.inspect(r); len(report.Drift) > 0 {
				t.Fatalf("seed %d: drift in the second Inspect: %v", seed, report.Drift)
			}
			worlds++
		}
		g.close()
	}
	t.Logf("%d meshes and hosts, %d loads, %d changes in place", worlds, loads, inPlace)
}

func randomPermissions(rng *rand.Rand) []mesh.Permissions {
	out := []mesh.Permissions{mesh.Routing}
	for range rng.IntN(4) {
		out = append(out, mesh.Permissions(rng.IntN(int(everything)+1)))
	}
	return out
}

func randomFormer(rng *rand.Rand) (out []netip.Addr) {
	for range rng.IntN(3) {
		// The second address is outside the prefix, from a time when the mesh had another
		// one.
		out = append(out, netip.AddrFrom4([][4]byte{{100, 64, 7, byte(1 + rng.IntN(200))}, {10, 213, 7, byte(1 + rng.IntN(200))}}[rng.IntN(2)]))
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// randomMac returns a rig on a Mac with random interfaces.
func randomMac(t *testing.T, rng *rand.Rand) *rig {
	t.Helper()
	g := &rig{t: t, mac: simmac.New(simmac.Options{Seed: rng.Uint64()}), dir: t.TempDir()}
	for i := range 1 + rng.IntN(4) {
		var addresses, routers []string
		for _, v4 := range []bool{true, false} {
			if rng.IntN(6) == 0 {
				continue
			}
			a := usableNetwork(rng, v4)
			addresses = append(addresses, a.String())
			if rng.IntN(2) == 0 {
				routers = append(routers, neighborAddr(a).String())
			}
		}
		g.must(g.mac.AddEthernet(fmt.Sprint("en", i), addresses, routers...))
	}
	g.renew()
	return g
}

// usableNetwork is randomNetwork without the addresses that an interface can't have.
func usableNetwork(rng *rand.Rand, v4 bool) netip.Prefix {
	for {
		p := randomNetwork(rng, v4)
		if !slices.Contains(broadcastsOf(p), p.Addr()) && !p.Addr().IsLinkLocalUnicast() {
			return p
		}
	}
}

func broadcastsOf(p netip.Prefix) []netip.Addr {
	first, last := p.Masked().Addr(), p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(last)*8; bit++ {
		last[bit/8] |= 0x80 >> (bit % 8)
	}
	end, _ := netip.AddrFromSlice(last)
	return []netip.Addr{first, end}
}

// change adds an address to an interface or removes one.
func (g *rig) change(rng *rand.Rand) {
	g.t.Helper()
	name := "en0"
	n, err := darwin.Observe(g.mac)
	g.must(err)
	i := n.Interface(name)
	if len(i.Addresses) > 0 && rng.IntN(2) == 0 {
		g.must(g.mac.Kernel.RemoveAddress(name, i.Addresses[rng.IntN(len(i.Addresses))].Prefix.Addr()))
		return
	}
	// The kernel refuses an address that another interface has.
	_ = g.mac.Kernel.AddAddress(name, usableNetwork(rng, rng.IntN(2) == 0))
}

// TestTableHoldsNoZeroHost checks which entries pf drops from a table.
func TestTableHoldsNoZeroHost(t *testing.T) {
	for _, tt := range []struct{ in, want []netip.Prefix }{
		{prefixes("::/128", "::1/128", "10.0.0.0/8"), prefixes("10.0.0.0/8", "::/127", "::1/128")},
		{prefixes("::/128", "2001:db8::/32"), prefixes("2001:db8::/32")},
		{prefixes("0.0.0.0/32", "0.0.0.0/8"), prefixes("0.0.0.0/8")},
		{prefixes("0.0.0.0/0", "::/0"), prefixes("0.0.0.0/0", "::/0")},
		{prefixes("192.168.1.9/24", "192.168.1.0/24"), prefixes("192.168.1.0/24")},
		{prefixes("10.0.0.0/8", "10.1.0.0/16"), prefixes("10.0.0.0/8", "10.1.0.0/16")},
		{prefixes("::ffff:0:0/96"), prefixes("::ffff:0:0/96")},
	} {
		if got := storable(tt.in); !slices.Equal(got, tt.want) {
			t.Errorf("a table of %v holds %v, want %v", tt.in, got, tt.want)
		}
	}
}

// keeps reports whether the host delivers packets to an address locally.
func keeps(r *policy.Ruleset, a netip.Addr) bool {
	return r.Class(a) == policy.Self || r.Class(a) == policy.Martian
}

// TestTablesChangeByAndBy replaces an anchor's tables one at a time, from one host's to
// another's. Between two steps no peer's packet passes unless it passes before the first
// step or after the last, and no transit is forwarded.
func TestTablesChangeByAndBy(t *testing.T) {
	changes, packets := 0, 0
	for range 10 { // a wrong order may show in only one of a thousand worlds
		rapid.Check(t, func(t *rapid.T) { changeByAndBy(t, &changes, &packets) })
	}
	t.Logf("%d changes, %d packets", changes, packets)
}

func changeByAndBy(t *rapid.T, changes, packets *int) {
	w := drawWorld(t)
	next := w
	next.mesh.Peers = slices.Clone(w.mesh.Peers)
	for i := range next.mesh.Peers {
		if rapid.IntRange(0, 3).Draw(t, "changed") == 0 {
			next.mesh.Peers[i].Permissions = mesh.Granted(drawPermissions(t))
		}
	}
	next.drawInterfaces(t)
	next.host.Uplink4, next.host.Uplink6 = w.host.Uplink4, w.host.Uplink6
	nameSources(&next.host)
	seed := rapid.Uint64().Draw(t, "packets")
	c := newComparison(t, w, seed, appleMain, nil)
	after := newComparison(t, next, seed, appleMain, nil)
	old, err := Compile(c.r, AnchorOptions{PastEgress: egressOf(next.host)})
	if err == nil {
		err = c.m.LoadAnchor(old.Path, old.Ruleset())
	}
	if err != nil {
		t.Fatal(err)
	}
	a, err := Compile(after.r, AnchorOptions{PastEgress: egressOf(w.host)})
	if err != nil {
		t.Fatal(err)
	}
	if old.rulesText() != a.rulesText() || len(old.tables()) != len(a.tables()) {
		return
	}
	if all := 2 * len(w.mesh.Peers); len(peersWith(c.r, 0, anyFamily)) != all || len(peersWith(after.r, 0, anyFamily)) != all {
		return // an interface has a peer's address
	}
	c.portless = map[netip.Addr]bool{}
	var probes []probe
	for range 300 {
		p := c.randomPacket()
		if p.In == "" {
			continue
		}
		probes = append(probes, probe{packet: c.toPF(p), in: p.In})
		if !keeps(c.r, p.Dst) && !keeps(after.r, p.Dst) {
			probes = append(probes, probe{packet: c.toPF(p), in: p.In, out: c.randomOut(p)})
		}
	}
	passes := func(m *pfsim.PF) (out []bool) {
		for _, p := range probes {
			m.FlushStates()
			out = append(out, p.send(&m.Machine).Verdict == pfsim.VerdictPass)
		}
		return out
	}
	// Only the tables are under test: both machines get all addresses to translate to.
	next.addInterfaces(c.m)
	before := passes(c.m)
	if err := after.m.LoadAnchor(a.Path, a.Ruleset()); err != nil {
		t.Fatal(err)
	}
	w.addInterfaces(after.m)
	next.addInterfaces(after.m)
	last := passes(after.m)
	for _, step := range changedTables(old.tables(), a.tables()) {
		if err := c.m.ReplaceTable(a.Path, step.Name, step.Addrs); err != nil {
			t.Fatal(err)
		}
		*changes++
		for i, pass := range passes(c.m) {
			*packets++
			if pass && !before[i] && !last[i] {
				c.m.FlushStates()
				after.m.FlushStates()
				t.Fatalf("after <%s> became %v: %v passes\n%s\nafter the last step\n%s\n%s", step.Name, step.Entries(), probes[i], explain(probes[i].send(&c.m.Machine)), explain(probes[i].send(&after.m.Machine)), a.Ruleset())
			}
		}
	}
	for name, want := range a.tables() {
		got, err := c.m.Table(a.Path, name)
		if err != nil || !slices.Equal(got.Entries(), want.Entries()) {
			t.Fatalf("<%s> holds %v after the last step, want %v (%v)", name, got, want.Entries(), err)
		}
	}
}
