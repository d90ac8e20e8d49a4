package netlab

// Probes on hosts without a filter, and with one.

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// protos are all of them.
var protos = []Proto{ICMP, TCP, UDP}

// serveAll starts the echo servers of every host of the picture.
func serveAll(t *testing.T, p *Picture) {
	t.Helper()
	for _, h := range p.Hosts() {
		if err := h.Serve(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestEverythingReachesEverything proves that the probes can succeed: through a
// host that filters nothing, every end reaches every address there is.
func TestEverythingReachesEverything(t *testing.T) {
	m := newPlainMesh(t)
	serveAll(t, m.Picture)
	at := Addresses()
	var probes []Probe
	for _, from := range []*Host{m.A, m.C, m.D} {
		for name, to := range map[string]Pair{
			"A": m.mesh["A"], "B": m.mesh["B"], "C": m.mesh["C"], "D": m.mesh["D"],
			"B's uplink": at.BUplink, "B's LAN": at.BLAN, "B's public": at.BPublic, "B's VPN": at.BVPN,
			"L": at.L, "I": at.I, "P": at.P, "behind the VPN": at.Behind, "metadata": at.Metadata,
		} {
			if name == from.Name {
				continue
			}
			for _, addr := range to.List() {
				for _, proto := range protos {
					probes = append(probes, Probe{From: from, To: addr, Proto: proto})
				}
			}
		}
	}
	for _, from := range []*Host{m.L, m.I, m.P, m.V, m.W} {
		for _, addr := range m.mesh["C"].List() {
			for _, proto := range protos {
				probes = append(probes, Probe{From: from, To: addr, Proto: proto})
			}
		}
	}
	start := time.Now()
	for _, r := range m.Lab.Probe(t.Context(), probes...) {
		if !r.OK {
			t.Error(r)
		}
	}
	t.Logf("%d probes in %s", len(probes), time.Since(start).Round(time.Millisecond))
}

// TestProbeSaysWhoSawIt probes an address that the far host drops: no answer, and
// the witness tells that the probe came through nonetheless.
func TestProbeSaysWhoSawIt(t *testing.T) {
	m := newPlainMesh(t)
	serveAll(t, m.Picture)
	elsewhere := netip.MustParseAddr("198.18.0.99") // V has a route back to B only
	if err := m.V.AddRoute(Route{To: netip.PrefixFrom(elsewhere, 32), Link: "lo"}); err != nil {
		t.Fatal(err)
	}
	for _, proto := range protos {
		r := m.Lab.Probe(t.Context(), Probe{From: m.C, To: elsewhere, Proto: proto, Wait: time.Second})
		if r[0].OK || !slices.Contains(r[0].SeenBy, "V") || slices.Contains(r[0].SeenBy, "A") {
			t.Errorf("%s; want no answer, seen by V and not by A", r[0])
		}
	}
	refused := m.Lab.Probe(t.Context(), Probe{From: m.C, To: Addresses().L.V4, Proto: TCP, Port: 1, Wait: time.Second})[0]
	if refused.OK || refused.Err == nil {
		t.Errorf("%s; want a refusal with a reason", refused)
	}
}

// TestServersSeeTheSource proves that an answer names the address that the server saw.
func TestServersSeeTheSource(t *testing.T) {
	m := newPlainMesh(t)
	serveAll(t, m.Picture)
	for _, proto := range []Proto{TCP, UDP} {
		for i, to := range Addresses().I.List() {
			r := m.Lab.Probe(t.Context(), Probe{From: m.C, To: to, Proto: proto})[0]
			if want := m.mesh["C"].List()[i]; r.Source.Addr() != want {
				t.Errorf("%s was seen from %s, want %s", r, r.Source, want)
			}
		}
	}
}

// TestTraceroute proves that every hop shows, in order.
func TestTraceroute(t *testing.T) {
	m := newPlainMesh(t)
	at := Addresses()
	for i, want := range [][]netip.Addr{
		{m.mesh["B"].V4, at.W.V4, at.RNear.V4, at.I.V4},
		{m.mesh["B"].V6, at.W.V6, at.RNear.V6, at.I.V6},
	} {
		got, err := m.C.Traceroute(at.I.List()[i], 8)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("hops are %v, %v; want %v", got, err, want)
		}
	}
}

func portOf(addr netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(addr, port) }
