package wanted

import (
	"errors"
	"net/netip"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// checkName is mesh.CheckName for a request. The error is an *api.Error, with what to do about
// the fault.
func checkName(name string) error {
	var wrong *mesh.NameError
	if err := mesh.CheckName(name); errors.As(err, &wrong) {
		return api.Errorf(api.CodeBadName, "%v", wrong).WithHint("%s", wrong.Hint)
	}
	return nil
}

// likeName returns the name of a peer that differs from name only by case, or "". The peer
// called own doesn't count. Such names would be mistaken for each other in a command, and a
// wrong one may get a permission.
func (doc *Document) likeName(name, own string) string {
	for i := range doc.Peers {
		if other := doc.Peers[i].Name; other != own && other != name && strings.EqualFold(other, name) {
			return other
		}
	}
	return ""
}

// refuseLike returns the error for a name that differs from that of another peer only by case.
func refuseLike(name, other string) error {
	return api.Errorf(api.CodeNameTaken, "name %q differs only by case from that of peer %q", name, other).WithHint("choose another name")
}

// rename renames peer i and remembers the name it had. Errors are *api.Error.
func (doc *Document) rename(i int, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	if doc.byName(name) >= 0 {
		return api.Errorf(api.CodeNameTaken, "another peer has the name %q", name).WithHint("choose another name")
	}
	if other := doc.likeName(name, doc.Peers[i].Name); other != "" {
		return refuseLike(name, other)
	}
	doc.remember(Former{Name: doc.Peers[i].Name, Now: name})
	doc.forget(name)
	doc.Peers[i].Name = name
	return nil
}

// remember adds a former name. Above maxFormer it drops the oldest.
func (doc *Document) remember(f Former) {
	doc.forget(f.Name)
	doc.Former = append(doc.Former, f)
	if len(doc.Former) > maxFormer {
		doc.Former = slices.Delete(doc.Former, 0, len(doc.Former)-maxFormer)
	}
}

// forget drops a former name, if it is remembered: a peer has it again.
func (doc *Document) forget(name string) {
	doc.Former = slices.DeleteFunc(doc.Former, func(f Former) bool { return f.Name == name })
}

// renamedTo returns the present name of the peer that once had a name, or "".
func (doc *Document) renamedTo(name string) string {
	for _, f := range doc.Former {
		if f.Name == name && doc.byName(f.Now) >= 0 {
			return f.Now
		}
	}
	return ""
}

// byName returns the index of the peer with a name, or -1.
func (doc *Document) byName(name string) int {
	return slices.IndexFunc(doc.Peers, func(p mesh.Peer) bool { return p.Name == name })
}

// ByKey returns the index of the peer with a public key, or -1.
func (doc *Document) ByKey(key mesh.PublicKey) int {
	return slices.IndexFunc(doc.Peers, func(p mesh.Peer) bool { return p.PublicKey == key })
}

// byAddress returns the index of the peer with a mesh address, or -1.
func (doc *Document) byAddress(a netip.Addr) int {
	return slices.IndexFunc(doc.Peers, func(p mesh.Peer) bool { return p.Addresses[0] == a || p.Addresses[1] == a })
}

// Find returns the index of the peer that ref refers to. ref is a name, a mesh address or a
// public key, tried in this order. Without such a peer the index is -1 and the error an
// *api.Error with code unknown_peer or already_removed, and a hint.
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

// unknown returns the error for a ref that no peer has, with the likely intended name as
// its hint.
func (doc *Document) unknown(ref string) error {
	if slices.ContainsFunc(doc.Former, func(f Former) bool { return f.Name == ref && f.Now == "" }) {
		return api.Errorf(api.CodeAlreadyRemoved, "peer %q is no more", ref).WithHint("see `meshhelper peer list`")
	}
	e := api.Errorf(api.CodeUnknownPeer, "peer %.100q is unknown", ref)
	if now := doc.renamedTo(ref); now != "" {
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
