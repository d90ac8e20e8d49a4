package guard

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// twoClocks are a clock that is set and one that stands still while the host sleeps.
type twoClocks struct{ wall, mono time.Time }

func newTwoClocks() *twoClocks {
	// The wall clock is where flowtest.Compile begins.
	return &twoClocks{time.Unix(1_700_000_000, 0), time.Unix(5000, 0)}
}

func (c *twoClocks) options() Options {
	return Options{Now: func() time.Time { return c.mono }, Clock: func() time.Time { return c.wall }}
}

func (c *twoClocks) pass(d time.Duration)  { c.wall, c.mono = c.wall.Add(d), c.mono.Add(d) }
func (c *twoClocks) sleep(d time.Duration) { c.wall = c.wall.Add(d) }
func (c *twoClocks) set(d time.Duration)   { c.wall = c.wall.Add(d) }

// timed is the picture with all permissions of C, each until an end after the start;
// 0 is never.
func timed(t testing.TB, ends [3]time.Duration) *policy.Ruleset {
	m := flowtest.Mesh(mesh.All)
	for i, one := range mesh.AllPermissions {
		if ends[i] > 0 {
			m.Peers[0].Permissions.Of(one.Set).Until = newTwoClocks().wall.Add(ends[i])
		}
	}
	return flowtest.Compile(t, m)
}

// talk is a packet of C to somewhere, and what comes back.
type talk struct {
	needs     mesh.Permissions
	out, back []byte
}

func talks() []talk {
	var out []talk
	for _, one := range []struct {
		needs mesh.Permissions
		dst   netip.Addr
	}{
		{mesh.Incoming, flowtest.HostB4}, {mesh.Incoming, flowtest.HostB6}, {mesh.Incoming, flowtest.HostL4},
		{mesh.Routing, flowtest.Net4}, {mesh.Routing, flowtest.Net6},
		{mesh.Routing | mesh.LAN, flowtest.LAN4}, {mesh.Routing | mesh.LAN, flowtest.LAN6},
	} {
		src := flowtest.PeerC4
		if one.dst.Is6() {
			src = flowtest.PeerC6
		}
		out = append(out,
			talk{one.needs, flowtest.Datagram(at(src, 9), at(one.dst, 7), 8), flowtest.Datagram(at(one.dst, 7), at(src, 9), 8)},
			talk{one.needs, flowtest.TCPSegment(at(src, 9), at(one.dst, 7), flowtest.SYN, 0), flowtest.TCPSegment(at(one.dst, 7), at(src, 9), flowtest.SYN|flowtest.ACK, 0)},
			talk{one.needs, flowtest.Echo(src, one.dst, 9, false, 8), flowtest.Echo(one.dst, src, 9, true, 8)})
	}
	return out
}

// passes reports whether packets pass the guard in a direction.
func passes(g *Device, packet []byte, toPeer bool) bool {
	buf := append(make([]byte, offset), packet...)
	if toPeer {
		sizes := []int{len(packet)}
		g.judgeRead([][]byte{buf}, sizes, offset, nil)
		return sizes[0] > 0
	}
	v := g.begin()
	defer g.batch.RUnlock()
	return len(g.judgeWrite(v, [][]byte{buf}, offset)) == 1
}

// TestEndsByItself lets one permission after the other end, by each clock, with
// nothing but packets: no Set follows, and no goroutine runs.
func TestEndsByItself(t *testing.T) {
	const end = time.Hour
	for how, move := range map[string]func(*twoClocks, *Device){
		"time passes":                     func(c *twoClocks, _ *Device) { c.pass(end) },
		"the host sleeps":                 func(c *twoClocks, _ *Device) { c.sleep(end) },
		"the clock is set back meanwhile": func(c *twoClocks, _ *Device) { c.pass(end / 2); c.set(-2 * end); c.pass(end / 2) },
		"the clock is set on":             func(c *twoClocks, _ *Device) { c.set(end) },
		"it sleeps, wakes, is set back": func(c *twoClocks, g *Device) {
			c.sleep(end / 2)
			passes(g, ask, false) // any packet, or the daemon's look at its clock
			c.set(-2 * end)
			c.pass(end / 2)
		},
	} {
		for i, one := range mesh.AllPermissions {
			c := newTwoClocks()
			g := New(newFakeTUN(t), c.options())
			var ends [3]time.Duration
			ends[i] = end
			g.Set(timed(t, ends))
			check := func(when string, have mesh.Permissions) {
				for _, first := range []bool{false, true} { // which direction comes first
					for _, talk := range talks() {
						for _, toPeer := range []bool{first, !first} {
							packet := map[bool][]byte{false: talk.out, true: talk.back}[toPeer]
							if got, want := passes(g, packet, toPeer), have.Has(talk.needs); got != want {
								t.Errorf("%s, end of %s, %s: towards the peer %v: passes %v, want %v: %x", how, one.Name, when, toPeer, got, want, packet)
							}
						}
					}
				}
				if !passes(g, hello, true) {
					t.Errorf("%s, end of %s, %s: the host's own packet doesn't pass", how, one.Name, when)
				}
			}
			const all = mesh.Incoming | mesh.Routing | mesh.LAN
			check("before", all)
			c.pass(-time.Millisecond)
			move(c, g)
			c.pass(0)
			check("a millisecond before the end", all)
			c.pass(time.Millisecond)
			check("at the end", all&^one.Set)
			c.set(-10 * end)
			check("set back afterwards", all&^one.Set)
		}
	}
}

// TestEndsLikeCompile moves both clocks at random and compares the guard with one
// that is given, before each packet, a ruleset compiled at the time.
func TestEndsLikeCompile(t *testing.T) {
	var packets [2][][]byte
	for _, talk := range talks() {
		packets[0], packets[1] = append(packets[0], talk.out), append(packets[1], talk.back)
	}
	packets[1] = append(packets[1], hello)
	rapid.Check(t, func(rt *rapid.T) {
		c := newTwoClocks()
		var ends [3]time.Duration
		for i := range ends {
			ends[i] = time.Duration(rapid.IntRange(0, 20).Draw(rt, "end")) * time.Second
		}
		r := timed(t, ends)
		alone, told := New(newFakeTUN(t), c.options()), New(newFakeTUN(t), c.options())
		alone.Set(r)
		now := c.wall
		for range 60 {
			d := time.Duration(rapid.IntRange(1, 2000).Draw(rt, "ms")) * time.Millisecond
			switch rapid.IntRange(0, 3).Draw(rt, "what") {
			case 0:
				c.pass(d)
				now = now.Add(d)
			case 1:
				c.sleep(d)
			case 2:
				c.set(-d)
			}
			if c.wall.After(now) {
				now = c.wall
			}
			direction := rapid.IntRange(0, 1).Draw(rt, "direction")
			packet := rapid.SampledFrom(packets[direction]).Draw(rt, "packet")
			compiled, err := policy.Compile(r.Mesh(), r.Host(), now)
			if err != nil {
				rt.Fatal(err)
			}
			told.Set(compiled)
			if got, want := passes(alone, packet, direction == 1), passes(told, packet, direction == 1); got != want {
				rt.Fatalf("after %v: passes %v, want %v: %x", now.Sub(newTwoClocks().wall), got, want, packet)
			}
		}
	})
}

// TestEndsBeforeSet puts in force a ruleset that was compiled before a grant of it
// ended, and one that is in force already.
func TestEndsBeforeSet(t *testing.T) {
	c := newTwoClocks()
	g := New(newFakeTUN(t), c.options())
	r := timed(t, [3]time.Duration{0, time.Second, 0})
	c.pass(2 * time.Second)
	for i := range 3 {
		g.Set(r)
		if passes(g, ask, false) {
			t.Fatalf("Set %d gives back what has ended", i+1)
		}
		c.set(-time.Minute)
	}
	g.Set(nil)
	if g.Set(r); passes(g, ask, false) {
		t.Fatal("and so does the first after it was closed")
	}
	// Where nothing is to end, the clock may be set back and count anew.
	g.Set(flowtest.Picture(t, 0))
	c.wall = newTwoClocks().wall
	g.Set(flowtest.Picture(t, mesh.Incoming))
	if g.Set(r); !passes(g, ask, false) {
		t.Fatal("a clock that was put right isn't believed")
	}
}

// TestEndsBeside lets a grant end while packets of several goroutines are judged and
// other rulesets are put in force: nothing passes after it ended.
func TestEndsBeside(t *testing.T) {
	start := time.Now()
	end := start.Add(200 * time.Millisecond)
	m := flowtest.Mesh(mesh.Incoming | mesh.Routing)
	m.Peers[0].Permissions.Of(mesh.Routing).Until = end
	r, err := policy.Compile(m, flowtest.Host(), start)
	if err != nil {
		t.Fatal(err)
	}
	g := New(newFakeTUN(t), Options{})
	g.Set(r)
	done := make(chan error, 4)
	for i := range 4 {
		go func() {
			for time.Since(end) < 50*time.Millisecond {
				began := time.Now()
				packet, toPeer := ask, false
				if i%2 == 1 {
					packet, toPeer = answer, true
				}
				if passes(g, packet, toPeer) && !began.Before(end) {
					done <- fmt.Errorf("passes %v after the end", began.Sub(end))
					return
				}
			}
			done <- nil
		}()
	}
	for time.Since(end) < 0 {
		again, err := policy.Compile(m, flowtest.Host(), start)
		if err != nil {
			t.Fatal(err)
		}
		g.Set(again)
		time.Sleep(time.Millisecond)
	}
	for range 4 {
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatal("a packet isn't judged")
		}
	}
}
