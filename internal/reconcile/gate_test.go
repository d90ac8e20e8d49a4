package reconcile

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/host/hostfake"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// TestGateIsTheIntersection: in many documents, with the loop setting rulesets of any age between
// them, the guard never passes what the latest document doesn't allow.
func TestGateIsTheIntersection(t *testing.T) {
	m := flowtest.Mesh(mesh.All)
	fake := hostfake.New()
	dev, err := fake.Open(t.Context(), host.Interface{MTU: 1420, Addresses: m.Addresses, Prefixes: m.Prefixes})
	if err != nil {
		t.Fatal(err)
	}
	judging := guard.New(dev, guard.Options{Own: m.Addresses})
	defer judging.Close()
	g := NewGate(func(err error) { t.Error(err) })
	g.setClock(time.Now)
	g.setGuard(judging)
	phone := m.Peers[0]
	passes := func() bool {
		before := fake.Delivered()
		packet := flowtest.Datagram(netip.AddrPortFrom(phone.Addresses[0], 49152), netip.MustParseAddrPort("198.51.100.9:7"), 0)
		if _, err := judging.Write([][]byte{packet}, 0); err != nil {
			t.Fatal(err)
		}
		return fake.Delivered() > before
	}
	find := func(d *wanted.Document) *mesh.Grant {
		i, err := d.Find(phone.Name)
		if err != nil {
			t.Fatal(err)
		}
		return d.Peers[i].Permissions.Of(mesh.Routing)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	var rules []*policy.Ruleset
	var docs []*wanted.Document
	last := &wanted.Document{Peers: m.Peers}
	passed := 0
	for range 500 {
		doc := last.Clone()
		doc.Generation++
		find(doc).Allowed = rng.IntN(2) == 0
		if rng.IntN(5) == 0 {
			slices.Reverse(doc.Peers)
		}
		g.Limit(doc)
		last = doc
		of := m
		of.Peers = doc.Peers
		compiled, err := policy.Compile(of, flowtest.Host(), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		rules, docs = append(rules, compiled), append(docs, doc)
		i := rng.IntN(len(rules))
		g.set(rules[i], docs[i])
		want := find(doc).Allowed && find(docs[i]).Allowed
		if got := passes(); got != want {
			t.Fatalf("the guard passes the packet: %v; wanted %v, enforced %v", got, find(doc).Allowed, find(docs[i]).Allowed)
		}
		if want {
			passed++
		}
	}
	if passed == 0 {
		t.Error("the guard never passed a packet")
	}
}
