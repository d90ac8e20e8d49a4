package trial

// The host's original state, and other programs' tables on it.

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// setForwarding enables or disables B's forwarding before the helper starts.
func setForwarding(t *testing.T, m *Mesh, on bool) {
	t.Helper()
	value := "0"
	if on {
		value = "1"
		// As on a router that learns its own route (accept_ra=2): with forwarding on, B
		// would lose the route otherwise.
		if err := m.B.SetSysctl("net.ipv6.conf.wan0.accept_ra", "2"); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
		if err := m.B.SetSysctl(name, value); err != nil {
			t.Fatal(err)
		}
	}
}

// leftAlone fails if a snapshot differs from the earlier one.
func leftAlone(t *testing.T, before netlab.Snapshot, m *Mesh) {
	t.Helper()
	if diff := before.Diff(snapshot(t, m.B)); len(diff) > 0 {
		t.Errorf("B wasn't restored:\n%s", strings.Join(diff, "\n"))
	}
}

// TestHostIsLeftAsFound runs the helper beside another program's tables, with forwarding
// off and on, uses it, and stops it: the host is in its original state.
func TestHostIsLeftAsFound(t *testing.T) {
	for _, on := range []bool{false, true} {
		t.Run(fmt.Sprintf("forwarding=%t", on), func(t *testing.T) {
			m := newStage(t)
			setForwarding(t, m, on)
			if err := m.B.InstallForeignTable(); err != nil {
				t.Fatal(err)
			}
			before := snapshot(t, m.B)
			foreign, err := m.B.Ruleset()
			if err != nil {
				t.Fatal(err)
			}
			start(t, m)
			addPeers(t, m)
			permit(t, m, "C", everything)
			for _, f := range flows(t, m, m.C, m.I, netlab.Addresses().I) {
				f.Stop()
			}
			permit(t, m, "C", 0)
			stillThere(t, foreign, m)
			if transit := m.reaches(t, m.L, netlab.Addresses().I.V4, on); transit != on {
				t.Errorf("L reaches I through B: %t, but forwarding was originally %t", transit, on)
			}
			stop(t, m)
			leftAlone(t, before, m)
		})
	}
}

// stillThere fails if a line of the original ruleset is missing.
func stillThere(t *testing.T, foreign []string, m *Mesh) {
	t.Helper()
	now, err := m.B.Ruleset()
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range foreign {
		if !slices.Contains(now, line) {
			t.Errorf("another program's rule changed while the helper ran:\n%s", line)
		}
	}
	if len(now) == len(foreign) {
		t.Error("the helper runs, but has no rules")
	}
}

// reaches probes by UDP, and waits longer if the probe is expected to succeed.
func (m *Mesh) reaches(t *testing.T, from *netlab.Host, to netip.Addr, expected bool) bool {
	t.Helper()
	p := netlab.Probe{From: from, To: to, Proto: netlab.UDP, Wait: netlab.RefuseWait}
	if expected {
		p.Wait = netlab.PassWait
	}
	return m.Lab.Probe(t.Context(), p)[0].OK
}

// TestKilledHelper kills the helper and restarts it: nothing passes meanwhile, the mesh
// is the same, and at the end the host is in the state from before the first start.
func TestKilledHelper(t *testing.T) {
	m := newStage(t)
	before := snapshot(t, m.B)
	start(t, m)
	addPeers(t, m)
	permit(t, m, "C", mesh.Routing)
	at, first := netlab.Addresses(), status(t, m)
	running := flows(t, m, m.C, m.I, at.I)

	m.Helper.Kill()
	killed := time.Now()
	mustEnd(t, running, killed)
	// B itself must not send packets for a peer unencrypted.
	j := &judge{m: m}
	var probes []netlab.Probe
	for _, p := range m.Peers {
		for _, addr := range p.Addresses.List() {
			for _, from := range []*netlab.Host{m.B, m.L} {
				probes = append(probes, netlab.Probe{From: from, To: addr, Proto: netlab.UDP, Wait: netlab.RefuseWait})
			}
		}
	}
	for _, r := range m.Lab.Probe(t.Context(), probes...) {
		if r.OK || slices.Contains(r.SeenBy, "W") {
			t.Errorf("while the helper is dead: %s", r)
		}
	}
	for _, f := range running {
		f.Stop()
	}

	start(t, m)
	again := status(t, m)
	if again.PublicKey != first.PublicKey || !slices.Equal(again.Addresses, first.Addresses) {
		t.Errorf("the host was %s %v, and is %s %v after the restart", first.PublicKey, first.Addresses, again.PublicKey, again.Addresses)
	}
	may := map[string]mesh.Permissions{"A": mesh.Incoming, "C": mesh.Routing, "D": mesh.Incoming}
	rules := ruleset(t, m, may)
	var questions []question
	for _, to := range destinations(m, again.Address()) {
		for i, addr := range to.List() {
			for _, proto := range protos {
				questions = append(questions, question{in: again.Interface, src: m.Peers["C"].Addresses.List()[i],
					Probe: netlab.Probe{From: m.C, To: addr, Proto: proto}})
			}
		}
	}
	j.ask(t, rules, questions)
	j.finish(t)
	stop(t, m)
	leftAlone(t, before, m)
}

// TestDockerIsNamed runs the helper on a host whose FORWARD chain drops: status names the
// chain, and the chain isn't changed.
func TestDockerIsNamed(t *testing.T) {
	m := newStage(t)
	setForwarding(t, m, true)
	if err := m.B.InstallDockerChain(); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, m.B)
	start(t, m)
	addPeers(t, m)
	permit(t, m, "C", mesh.Routing)
	named := false
	for end := time.Now().Add(generous); !named && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		for _, p := range status(t, m).Problems {
			named = named || strings.Contains(p.Message, "FORWARD")
		}
	}
	if !named {
		t.Errorf("no problem names the chain FORWARD: %+v", status(t, m).Problems)
	}
	if m.reaches(t, m.C, netlab.Addresses().I.V4, false) {
		t.Error("C reaches I past a chain that drops: another program's rules were changed")
	}
	stop(t, m)
	leftAlone(t, before, m)
}

// TestAdvertisedUplinkIsKept removes the IPv6 default route while B forwards: B must
// still accept the router's advertisements of it.
func TestAdvertisedUplinkIsKept(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", mesh.Routing)
	to := netlab.Addresses().I.V6
	if !m.reaches(t, m.C, to, true) {
		t.Fatal("C doesn't reach I over IPv6")
	}
	if value, err := m.B.Sysctl("net.ipv6.conf.wan0.forwarding"); err != nil || value != "1" {
		t.Fatalf("wan0 forwards IPv6: %q, %v; the test proves nothing", value, err)
	}
	if err := m.B.DropLearnedRoute(netlab.Uplink); err != nil {
		t.Fatal(err)
	}
	if !m.reaches(t, m.C, to, true) {
		t.Error("the uplink's advertised route wasn't restored")
	}
}
