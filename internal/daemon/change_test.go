package daemon

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/resolve"
)

func netipPrefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// TestRefusals sends every kind of invalid input. Nothing may change.
func TestRefusals(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		phone := r.add("phone")
		r.add("tablet")
		own := r.d.id
		text := func(s string) *string { return &s }
		add := func(change func(*api.NewPeer)) func() error {
			return func() error {
				p := api.NewPeer{Name: "new", PublicKey: keyOf("new")}
				change(&p)
				_, err := r.d.AddPeer(t.Context(), p)
				return err
			}
		}
		patch := func(ref string, c api.PeerChange) func() error {
			return func() error {
				_, err := r.d.ChangePeer(t.Context(), ref, c)
				return err
			}
		}
		permit := func(name string, c api.PermissionChange) func() error {
			return patch("phone", api.PeerChange{Permissions: map[string]api.PermissionChange{name: c}})
		}
		for _, c := range []struct {
			name string
			do   func() error
			code string
			says string
		}{
			{"no name", add(func(p *api.NewPeer) { p.Name = "" }), api.CodeBadName, "1 to 63"},
			{"long name", add(func(p *api.NewPeer) { p.Name = strings.Repeat("a", 64) }), api.CodeBadName, "64 characters"},
			{"odd name", add(func(p *api.NewPeer) { p.Name = "a b" }), api.CodeBadName, `"a b"`},
			{"option as name", add(func(p *api.NewPeer) { p.Name = "-x" }), api.CodeBadName, "starts with"},
			{"dot as name", add(func(p *api.NewPeer) { p.Name = ".." }), api.CodeBadName, "starts with"},
			{"address as name", add(func(p *api.NewPeer) { p.Name = "1.2.3.4" }), api.CodeBadName, "is an address"},
			{"name taken", add(func(p *api.NewPeer) { p.Name = "phone" }), api.CodeNameTaken, "another key"},
			{"no key", add(func(p *api.NewPeer) { p.PublicKey = "" }), api.CodeBadKey, "not valid"},
			{"short key", add(func(p *api.NewPeer) { p.PublicKey = "AAAA" }), api.CodeBadKey, "44 characters"},
			{"key taken", add(func(p *api.NewPeer) { p.PublicKey = keyOf("phone") }), api.CodeKeyTaken, `"phone"`},
			{"own key", add(func(p *api.NewPeer) { p.PublicKey = own.Key.String() }), api.CodeKeyTaken, "own"},
			{"kind", add(func(p *api.NewPeer) { p.Kind = "friend" }), api.CodeBadRequest, `"friend"`},
			{"not an address", add(func(p *api.NewPeer) { p.Addresses = []string{"x"} }), api.CodeBadRequest, `"x"`},
			{"address outside", add(func(p *api.NewPeer) { p.Addresses = []string{"10.0.0.1"} }), api.CodeBadAddress, "--address"},
			{"address reserved", add(func(p *api.NewPeer) { p.Addresses = []string{"100.100.100.100"} }), api.CodeBadAddress, "--address"},
			{"two of a family", add(func(p *api.NewPeer) { p.Addresses = []string{"100.64.1.1", "100.64.1.2"} }), api.CodeBadAddress, "second"},
			{"address taken", add(func(p *api.NewPeer) { p.Addresses = []string{phone.Addresses[0].String()} }), api.CodeAddressTaken, `"phone"`},
			{"host's address", add(func(p *api.NewPeer) { p.Addresses = []string{own.Own[1].String()} }), api.CodeAddressTaken, "this host"},
			{"endpoint", add(func(p *api.NewPeer) { p.Endpoint = "host" }), api.CodeBadEndpoint, "HOST:PORT"},
			{"keepalive", add(func(p *api.NewPeer) { p.Keepalive = "soon" }), api.CodeBadRequest, "25s"},
			{"half a second", add(func(p *api.NewPeer) { p.Keepalive = "1500ms" }), api.CodeBadRequest, "whole seconds"},
			{"permission", permit("outgoing", api.PermissionChange{Allowed: true}), api.CodeBadPermission, `"outgoing"`},
			{"no duration", permit("lan", api.PermissionChange{Allowed: true, For: new("x")}), api.CodeBadPermission, `"x"`},
			{"empty", permit("lan", api.PermissionChange{Allowed: true, For: new("")}), api.CodeBadPermission, `""`},
			{"negative", permit("lan", api.PermissionChange{Allowed: true, For: new("-1h")}), api.CodeBadPermission, "next ten years"},
			{"too long", permit("lan", api.PermissionChange{Allowed: true, For: new("999999h")}), api.CodeBadPermission, "next ten years"},
			{"in the past", permit("lan", api.PermissionChange{Allowed: true, Until: new(time.Unix(1, 0))}), api.CodeBadPermission, "next ten years"},
			{"the year 1", permit("lan", api.PermissionChange{Allowed: true, Until: new(time.Time)}), api.CodeBadPermission, "next ten years"},
			{"both ends", permit("lan", api.PermissionChange{Allowed: true, For: new("1h"), Until: new(time.Now())}), api.CodeBadPermission, "both"},
			{"deny for", permit("lan", api.PermissionChange{For: new("1h")}), api.CodeBadPermission, "no end"},
			{"typing error", patch("fone", api.PeerChange{}), api.CodeUnknownPeer, `did you mean "phone"?`},
			{"swapped", patch("tabelt", api.PeerChange{}), api.CodeUnknownPeer, `did you mean "tablet"?`},
			{"unknown", patch("zzzzzz", api.PeerChange{}), api.CodeUnknownPeer, "peer list"},
			{"rename to taken", patch("phone", api.PeerChange{Name: "tablet"}), api.CodeNameTaken, `"tablet"`},
			{"rename to odd", patch("phone", api.PeerChange{Name: "a/b"}), api.CodeBadName, `"a/b"`},
			{"rekey to taken", patch("phone", api.PeerChange{PublicKey: keyOf("tablet")}), api.CodeKeyTaken, `"tablet"`},
			{"rekey to host", patch("phone", api.PeerChange{PublicKey: own.Key.String()}), api.CodeKeyTaken, "own"},
			{"endpoint later", patch("phone", api.PeerChange{Endpoint: text("x")}), api.CodeBadEndpoint, "HOST:PORT"},
		} {
			before := r.d.wanted.Document()
			err := c.do()
			e := wantCode(t, err, c.code)
			if !strings.Contains(e.Error(), c.says) {
				t.Errorf("%s: %q doesn't say %q", c.name, e, c.says)
			}
			if r.d.wanted.Document() != before {
				t.Errorf("%s: the wanted state changed", c.name)
			}
		}
	})
}

func TestAddAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		whole := api.NewPeer{
			Name: "mac", PublicKey: keyOf("mac"), Kind: mesh.Own, Endpoint: "mac.example:51820", Keepalive: "25s",
			Permissions: map[string]api.PermissionChange{"routing": {Allowed: true}},
		}
		first, err := r.d.AddPeer(t.Context(), whole)
		if err != nil || first.Already {
			t.Fatalf("already %v, error %v", first.Already, err)
		}
		if p := first.Peer.Permissions; !p.Of(mesh.Incoming).Allowed || !p.Of(mesh.Routing).Allowed || p.Of(mesh.LAN).Allowed {
			t.Errorf("permissions %+v", p)
		}
		for _, again := range []api.NewPeer{whole, {Name: "mac", PublicKey: keyOf("mac")}} {
			got, err := r.d.AddPeer(t.Context(), again)
			if err != nil || !got.Already {
				t.Errorf("again: already %v, error %v", got.Already, err)
			}
			if diff := cmp.Diff(first.Peer, got.Peer, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("again: %s", diff)
			}
		}
		for name, change := range map[string]func(*api.NewPeer){
			"kind":       func(p *api.NewPeer) { p.Kind = mesh.External },
			"address":    func(p *api.NewPeer) { p.Addresses = []string{"100.64.9.9"} },
			"endpoint":   func(p *api.NewPeer) { p.Endpoint = "other.example:1" },
			"keepalive":  func(p *api.NewPeer) { p.Keepalive = "5s" },
			"permission": func(p *api.NewPeer) { p.Permissions = map[string]api.PermissionChange{"lan": {Allowed: true}} },
		} {
			other := whole
			change(&other)
			if _, err := r.d.AddPeer(t.Context(), other); err == nil {
				t.Errorf("another %s is taken for the same peer", name)
			}
		}
	})
}

// TestReferences refers to a peer by name, address and key.
func TestReferences(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		p := r.add("phone")
		for _, ref := range []string{"phone", p.Addresses[0].String(), p.Addresses[1].String(), p.PublicKey} {
			if got, err := r.d.Peer(ref); err != nil || got.Name != "phone" {
				t.Errorf("Peer(%s): %q, %v", ref, got.Name, err)
			}
		}
	})
}

func TestRenameAndRemove(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		was := r.add("phone")
		r.add("tablet") // moves up into the place of the removed peer
		rename := func(from, to string) (api.Changed, error) {
			return r.d.ChangePeer(t.Context(), from, api.PeerChange{Name: to})
		}
		if got, err := rename("phone", "mobile"); err != nil || got.Already || got.Peer.Name != "mobile" {
			t.Fatalf("rename: %+v, %v", got, err)
		}
		if got, err := rename("phone", "mobile"); err != nil || !got.Already {
			t.Errorf("rename again: %+v, %v", got, err)
		}
		_, err := r.d.Peer("phone")
		if e := wantCode(t, err, api.CodeUnknownPeer); !strings.Contains(e.Hint, `"mobile"`) {
			t.Errorf("hint %q", e.Hint)
		}
		if got, err := r.d.RemovePeer(t.Context(), "mobile"); err != nil || got.Peer.Name != "mobile" || !slices.Equal(got.Peer.Addresses, was.Addresses) {
			t.Errorf("remove: %+v, %v", got, err)
		}
		_, err = r.d.RemovePeer(t.Context(), "mobile")
		wantCode(t, err, api.CodeAlreadyRemoved)
		r.add("mobile") // the name is free again
		if _, err := r.d.RemovePeer(t.Context(), "mobile"); err != nil {
			t.Error(err)
		}
	})
}

func TestRekey(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		was := r.add("phone")
		chosen, err := r.d.AddPeer(t.Context(), api.NewPeer{Name: "fixed", PublicKey: keyOf("fixed"), Addresses: []string{"100.64.9.9"}})
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []api.Peer{was, chosen.Peer} {
			got, err := r.d.ChangePeer(t.Context(), p.Name, api.PeerChange{PublicKey: keyOf("next " + p.Name)})
			if err != nil {
				t.Fatal(err)
			}
			key, _ := mesh.ParsePublicKey(got.Peer.PublicKey)
			derived, _ := r.d.id.Prefixes.Derive(key)
			want := derived.List()
			if p.Name == "fixed" {
				want[0] = p.Addresses[0]
			}
			if got.Peer.Addresses[0] != want[0] || got.Peer.Addresses[1] != want[1] {
				t.Errorf("%s has %v, want %v", p.Name, got.Peer.Addresses, want)
			}
		}
	})
}

// TestFullMesh fills the smallest possible mesh.
func TestFullMesh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		o := r.options()
		o.Prefixes.V4, o.Prefixes.V6 = netipPrefix("10.9.8.0/29"), netipPrefix("fd00:1::/64")
		d, err := New(o)
		if err != nil {
			t.Fatal(err)
		}
		r.d = d
		defer d.Close()
		free := 5 // of 8: not .0, not .7, not the host's own
		for i := 0; free > 0 && i < 1000; i++ {
			_, err := d.wanted.AddPeer(t.Context(), api.NewPeer{Name: fmt.Sprint("p", i), PublicKey: keyOf(fmt.Sprint("p", i))})
			if err == nil {
				free--
			} else if !strings.Contains(err.Error(), "--address 10.9.8.") {
				t.Fatalf("a collision doesn't propose an address: %v", err)
			}
		}
		if free != 0 {
			t.Fatalf("%d addresses are left", free)
		}
		_, err = d.AddPeer(t.Context(), api.NewPeer{Name: "one", PublicKey: keyOf("one")})
		if e := wantCode(t, err, api.CodeMeshFull); !strings.Contains(e.Hint, "remove a peer") {
			t.Errorf("hint %q", e.Hint)
		}
	})
}

// TestEndpointByName changes the address that the name in a peer's endpoint resolves to.
func TestEndpointByName(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		_, err := r.d.AddPeer(t.Context(), api.NewPeer{Name: "mac", PublicKey: keyOf("mac"), Endpoint: "mac.example:7"})
		if err != nil {
			t.Fatal(err)
		}
		for _, address := range []string{"203.0.113.7", "203.0.113.8"} {
			r.resolveTo(address)
			r.after(resolve.Interval + time.Second)
			if got, want := r.tunnel.peers[0].Endpoint.String(), address+":7"; got != want {
				t.Errorf("endpoint %s, want %s", got, want)
			}
		}
		r.resolveTo("") // no resolver: the last address stays
		r.after(resolve.Interval + time.Second)
		if got := r.tunnel.peers[0].Endpoint.String(); got != "203.0.113.8:7" {
			t.Errorf("endpoint %s without a resolver", got)
		}
	})
}
