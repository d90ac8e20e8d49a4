package wanted

import (
	"net/netip"
	"slices"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

func (doc *Document) rename(i int, name string) error {
	if err := mesh.CheckName(name); err != nil {
		return api.Errorf(api.CodeBadName, "%v", err).WithHint("names have 1 to 63 letters, digits, -, _ and .")
	}
	if doc.byName(name) >= 0 {
		return api.Errorf(api.CodeNameTaken, "another peer has the name %q", name).WithHint("choose another name")
	}
	doc.remember(Former{Name: doc.Peers[i].Name, Now: name})
	doc.forget(name)
	doc.Peers[i].Name = name
	return nil
}

// remember notes a name that is no more; the oldest is forgotten.
func (doc *Document) remember(f Former) {
	doc.forget(f.Name)
	doc.Former = append(doc.Former, f)
	if len(doc.Former) > maxFormer {
		doc.Former = slices.Delete(doc.Former, 0, len(doc.Former)-maxFormer)
	}
}

func (doc *Document) forget(name string) {
	doc.Former = slices.DeleteFunc(doc.Former, func(f Former) bool { return f.Name == name })
}

// nowOf returns what a former name became, or "".
func (doc *Document) nowOf(name string) string {
	for _, f := range doc.Former {
		if f.Name == name && doc.byName(f.Now) >= 0 {
			return f.Now
		}
	}
	return ""
}

func (doc *Document) byName(name string) int {
	return slices.IndexFunc(doc.Peers, func(p mesh.Peer) bool { return p.Name == name })
}

func (doc *Document) ByKey(key mesh.PublicKey) int {
	return slices.IndexFunc(doc.Peers, func(p mesh.Peer) bool { return p.PublicKey == key })
}

func (doc *Document) byAddress(a netip.Addr) int {
	return slices.IndexFunc(doc.Peers, func(p mesh.Peer) bool { return p.Addresses[0] == a || p.Addresses[1] == a })
}

// find returns the peer that ref names: by name, mesh address or public key.
func (doc *Document) Find(ref string) (int, error) {
	if i := doc.byName(ref); i >= 0 {
		return i, nil
	}
	if a, err := netip.ParseAddr(ref); err == nil {
		if i := doc.byAddress(a); i >= 0 {
			return i, nil
		}
	}
	if key, err := mesh.ParsePublicKey(ref); err == nil {
		if i := doc.ByKey(key); i >= 0 {
			return i, nil
		}
	}
	return -1, doc.unknown(ref)
}

// unknown says that there is no such peer, and which was probably meant.
func (doc *Document) unknown(ref string) error {
	if slices.ContainsFunc(doc.Former, func(f Former) bool { return f.Name == ref && f.Now == "" }) {
		return api.Errorf(api.CodeAlreadyRemoved, "peer %q is no more", ref).WithHint("see `meshhelper peer list`")
	}
	e := api.Errorf(api.CodeUnknownPeer, "peer %.100q is unknown", ref)
	if now := doc.nowOf(ref); now != "" {
		return e.WithHint("it is called %q now", now)
	}
	names := make([]string, len(doc.Peers))
	for i := range doc.Peers {
		names[i] = doc.Peers[i].Name
	}
	if name := mesh.Closest(ref, names); name != "" {
		return e.WithHint("did you mean %q?", name)
	}
	if len(names) == 0 {
		return e.WithHint("there is no peer yet; run: meshhelper peer add NAME")
	}
	return e.WithHint("see `meshhelper peer list`")
}
