package mactrial

// Kills of the helper at each of its steps, and a reboot while it routes.

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// life starts a helper, grants and revokes permissions, and stops it. Packets that must
// never pass are sent between its steps. It ends early if the helper is killed.
func (g *rig) life(l *leakage, when string) {
	g.t.Helper()
	var more []host.Packet
	g.watchSteps(func() {
		l.probe(g, when, more...)
		if g.device() != nil {
			l.forwards(g, when)
		}
	})
	g.start()
	for _, change := range []struct {
		peer string
		may  mesh.Permissions
	}{{"C", mesh.Routing}, {"A", everything}, {"C", 0}, {"A", mesh.Incoming | mesh.Routing}, {"A", mesh.Incoming}} {
		if g.try(change.peer, change.may) != nil {
			break
		}
		g.probing.Lock()
		if more = nil; change.peer == "C" && change.may == 0 || len(more) > 0 {
			more = []host.Packet{g.opening(g.device().name, g.peers["C"][0], server[0], protos[0]), g.opening(g.device().name, g.peers["C"][1], server[1], protos[1])}
		}
		g.probing.Unlock()
	}
	g.stop()
}

// TestKilledAtEveryStep kills the helper before and after each of its steps of start,
// change and stop, and after each of their commands. Nothing leaks before the kill, while
// the helper is dead, or while the next one starts. The next one enforces the truth table
// and restores the Mac.
func TestKilledAtEveryStep(t *testing.T) {
	g := newRig(t)
	found := g.mac.Dump()
	g.tick = time.Hour
	g.start()
	g.add("A", "own")
	g.add("C", "external")
	g.permit("A", mesh.Incoming)
	g.stop()
	g.asFound(found)

	l, j := &leakage{}, &judge{g: g}
	g.life(l, "a life without a kill")
	calls := g.killIn(0)
	g.asFound(found)
	kills, missed := 0, 0
	for n := 1; n <= calls; n++ {
		g.must(g.begin())
		p := g.proc
		g.killIn(n)
		when := fmt.Sprintf("killed in call %d of %d of Step", n, calls)
		g.life(l, when)
		if !p.Killed() {
			missed++
			continue
		}
		kills++
		g.watchSteps(nil)
		l.mustNotPass(g, when+", dead")
		g.watchSteps(func() { l.probe(g, when+", starting again") })
		g.start()
		g.watchSteps(nil)
		for peer, may := range map[string]mesh.Permissions{"A": everything, "C": mesh.Routing} {
			g.permit(peer, may)
		}
		j.few(g.rules(g.may, policy.Families{}))
		g.permit("C", 0)
		g.permit("A", mesh.Incoming)
		g.watchSteps(func() { l.probe(g, when+", stopping") })
		g.stop()
		g.watchSteps(nil)
		g.asFound(found)
		if t.Failed() {
			t.Fatal(when)
		}
	}
	if kills < 40 {
		t.Errorf("only %d kills", kills)
	}
	t.Logf("killed %d times in %d calls of Step (%d not reached), %d packets that must not pass: %d leaks; %d verdicts after it, %d differences",
		kills, calls, missed, l.sent, l.leaks, j.verdicts, j.differences)
}

// few asks about a part of the packets that all asks about.
func (j *judge) few(r *policy.Ruleset) {
	j.g.t.Helper()
	g := j.g
	for family := range 2 {
		for _, proto := range protos {
			c, a := g.peers["C"][family], g.peers["A"][family]
			j.ask(r, g.opening(g.device().name, c, server[family], proto))
			j.ask(r, g.opening(g.device().name, c, a, proto))
			j.ask(r, g.opening(g.device().name, c, printer[family], proto))
			j.ask(r, g.opening(g.device().name, c, g.own[family], proto))
			j.ask(r, g.opening(g.device().name, a, printer[family], proto))
			j.ask(r, g.opening(uplink, server[family], c, proto))
			j.ask(r, g.opening(lan, printer[family], g.own[family], proto))
			j.ask(r, g.opening("", g.own[family], c, proto))
		}
	}
}

// TestBoot cuts the power while the helper routes: after the boot the next helper
// enforces, unaffected by the old boot's journal, and restores the Mac.
func TestBoot(t *testing.T) {
	g := newRig(t)
	g.start()
	g.add("A", "own")
	g.add("C", "external")
	g.add("D", "own")
	g.permit("A", everything)
	g.permit("C", mesh.Routing)
	g.proc.Kill()
	g.stop()
	for _, err := range g.mac.Boot() {
		t.Error(err)
	}
	g.must(g.mac.LoadAnchor(foreignAnchor, foreignRules))
	g.addVPN()
	found := g.mac.Dump()
	l := &leakage{}
	g.watchSteps(func() { l.probe(g, "starting after a boot") })
	g.start()
	g.watchSteps(nil)
	j := &judge{g: g}
	j.all(g.rules(g.may, policy.Families{}))
	g.stop()
	g.asFound(found)
	t.Logf("%d packets that must not pass, %d leaks; %d verdicts, %d differences", l.sent, l.leaks, j.verdicts, j.differences)
}

// TestInternetSharing runs the helper on a Mac that already forwards for Internet
// Sharing: its guests and its pf rules are left alone.
func TestInternetSharing(t *testing.T) {
	g := newRig(t)
	g.must(g.mac.InternetSharing(uplink))
	found := g.mac.Dump()
	l := &leakage{}
	g.start()
	g.add("A", "own")
	g.add("C", "external")
	g.add("D", "own")
	g.stop()
	g.asFound(found)
	g.watchSteps(func() {
		// Until the filter is loaded the Mac forwards as before. None of it may reach a
		// peer.
		if strings.Contains(g.mac.Dump(), "["+anchor+"]") {
			l.probe(g, "starting while Internet Sharing is on")
		}
	})
	g.start()
	g.watchSteps(nil)
	j := &judge{g: g}
	for may := mesh.Permissions(0); may <= everything; may++ {
		g.permit("A", everything&^may)
		g.permit("C", may)
		j.all(g.rules(g.may, policy.Families{IPv4: true}))
	}
	g.permit("A", 0)
	g.stop()
	g.asFound(found)
	t.Logf("%d packets that must not pass, %d leaks; %d verdicts, %d differences", l.sent, l.leaks, j.verdicts, j.differences)
}
