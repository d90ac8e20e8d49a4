package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wireguard"
)

// edit changes a copy of the wanted state and returns the public key of the
// peer that it was about.
type edit func(doc *document, now time.Time) (wireguard.PublicKey, error)

// AddPeer adds a peer. One that is there already, with all that p says of it,
// is no error.
func (d *Daemon) AddPeer(ctx context.Context, p api.NewPeer) (api.Changed, error) {
	return d.change(ctx, func(doc *document, now time.Time) (wireguard.PublicKey, error) {
		wanted, err := d.newPeer(doc, p, now)
		if err != nil {
			return wireguard.PublicKey{}, err
		}
		if i := doc.byName(wanted.Name); i >= 0 {
			return wanted.PublicKey, samePeer(&doc.Peers[i], wanted, p, now)
		}
		if err := d.admit(doc, wanted, p); err != nil {
			return wireguard.PublicKey{}, err
		}
		doc.Peers = append(doc.Peers, *wanted)
		doc.forget(wanted.Name)
		return wanted.PublicKey, nil
	})
}

// ChangePeer changes what c names of a peer and leaves the rest.
func (d *Daemon) ChangePeer(ctx context.Context, ref string, c api.PeerChange) (api.Changed, error) {
	return d.change(ctx, func(doc *document, now time.Time) (wireguard.PublicKey, error) {
		i, err := doc.find(ref)
		if err != nil {
			if c.Name == "" || doc.nowOf(ref) != c.Name {
				return wireguard.PublicKey{}, err
			}
			i = doc.byName(c.Name) // renamed so before
		}
		if err := d.apply(doc, i, c, now); err != nil {
			return wireguard.PublicKey{}, err
		}
		return doc.Peers[i].PublicKey, nil
	})
}

// RemovePeer removes a peer, and answers with what it was.
func (d *Daemon) RemovePeer(ctx context.Context, ref string) (api.Changed, error) {
	var was api.Peer
	changed, err := d.change(ctx, func(doc *document, now time.Time) (wireguard.PublicKey, error) {
		i, err := doc.find(ref)
		if err != nil {
			return wireguard.PublicKey{}, err
		}
		was = d.view(&doc.Peers[i], now)
		doc.remember(former{Name: doc.Peers[i].Name})
		doc.Peers = slices.Delete(doc.Peers, i, i+1)
		return wireguard.PublicKey{}, nil
	})
	changed.Peer = was
	return changed, err
}

// change makes an edited copy the wanted state, wakes the loop, and waits until
// the host holds it.
func (d *Daemon) change(ctx context.Context, e edit) (api.Changed, error) {
	key, generation, already, err := d.save(e)
	if err != nil {
		return api.Changed{}, err
	}
	poke(d.wake)
	poke(d.renamed)
	if err := d.await(ctx, generation); err != nil {
		return api.Changed{}, err
	}
	out := api.Changed{Already: already}
	doc := d.wanted.Load()
	if i := doc.byKey(key); i >= 0 {
		out.Peer = d.view(&doc.Peers[i], d.clock.now())
	}
	return out, nil
}

// save edits and saves. An edit that changes nothing keeps the generation.
func (d *Daemon) save(e edit) (key wireguard.PublicKey, generation uint64, already bool, err error) {
	d.changing.Lock()
	defer d.changing.Unlock()
	doc, now := d.wanted.Load(), d.clock.now()
	next := doc.clone()
	if key, err = e(next, now); err != nil {
		return key, 0, false, err
	}
	if slices.Equal(doc.Peers, next.Peers) {
		return key, doc.Generation, true, nil
	}
	next.Generation++
	// What is published must be right by type; a hole in the checks above ends
	// here and not on disk.
	if err := errors.Join(next.validate(), next.fits(d.mesh)); err != nil {
		return key, 0, false, api.Errorf(api.CodeInternal, "the change makes no valid state: %v", err)
	}
	if err := d.commit(next, now); err != nil {
		return key, 0, false, api.Errorf(api.CodeNotSaved, "nothing was changed: %v", err).
			WithHint("the old state stays in force; make room or make %q writable", d.opts.StateDir)
	}
	d.recordChange(doc, next)
	return key, next.Generation, false, nil
}

// await waits until the host holds the generation, or says why it doesn't.
func (d *Daemon) await(ctx context.Context, generation uint64) error {
	limit := time.NewTimer(d.opts.Wait)
	defer limit.Stop()
	for {
		c, changed := d.condition()
		if c.enforced >= generation {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return api.Errorf(api.CodeNotInForce, "saved, not in force: the helper is stopping")
		case <-limit.C:
			return notInForce(c, d.opts.Wait)
		}
	}
}

func notInForce(c condition, waited time.Duration) error {
	if len(c.problems) == 0 {
		return api.Errorf(api.CodeNotInForce, "saved, not in force after %v: the host is slow", waited).
			WithHint("see `meshhelper status`")
	}
	p := c.problems[0]
	hint := p.Hint
	if hint == "" {
		hint = "it is tried again; see `meshhelper status`"
	}
	return api.Errorf(api.CodeNotInForce, "saved, not in force: %s: %s", p.Step, p.Message).WithHint("%s", hint)
}

// recordChange writes an event for what differs.
func (d *Daemon) recordChange(old, next *document) {
	before := map[wireguard.PublicKey]*peer{}
	for i := range old.Peers {
		before[old.Peers[i].PublicKey] = &old.Peers[i]
	}
	for i := range next.Peers {
		p := &next.Peers[i]
		was, known := before[p.PublicKey]
		delete(before, p.PublicKey)
		if known && *was == *p {
			continue
		}
		message := fmt.Sprintf("%s changed: %s", p.Name, p.summary())
		if !known {
			message = fmt.Sprintf("%s added: %s", p.Name, p.summary())
		}
		d.journal.Record(api.Event{Kind: api.EventChange, Peer: p.Name, Message: message})
	}
	for _, p := range before {
		d.journal.Record(api.Event{Kind: api.EventChange, Peer: p.Name, Message: p.Name + " removed"})
	}
}

// summary says what a peer may, for an event.
func (p *peer) summary() string {
	var have policy.Permissions
	for _, one := range policy.AllPermissions {
		if p.Permissions.of(one).Allowed {
			have |= one
		}
	}
	return fmt.Sprintf("%s, may %v", p.Kind, have)
}

// newPeer reads the body of a POST.
func (d *Daemon) newPeer(doc *document, p api.NewPeer, now time.Time) (*peer, error) {
	out := &peer{Name: p.Name, Kind: p.Kind}
	if err := checkName(p.Name); err != nil {
		return nil, api.Errorf(api.CodeBadName, "%v", err).WithHint("names have 1 to 63 letters, digits, -, _ and .")
	}
	if out.Kind == "" {
		out.Kind = api.External
	}
	if out.Kind != api.Own && out.Kind != api.External {
		return nil, api.Errorf(api.CodeBadRequest, "kind %q is unknown", p.Kind).WithHint("it is own or external")
	}
	var err error
	if out.PublicKey, err = d.readKey(p.PublicKey); err != nil {
		return nil, err
	}
	if err := out.setEndpoint(p.Endpoint); err != nil {
		return nil, err
	}
	if err := out.setKeepalive(p.Keepalive); err != nil {
		return nil, err
	}
	out.Permissions.Incoming.Allowed = out.Kind == api.Own
	if err := out.setPermissions(p.Permissions, now); err != nil {
		return nil, err
	}
	out.Addresses, err = d.giveAddresses(doc, out, p.Addresses)
	return out, err
}

func (d *Daemon) readKey(text string) (wireguard.PublicKey, error) {
	key, err := wireguard.ParsePublicKey(text)
	if err != nil {
		return key, api.Errorf(api.CodeBadKey, "the public key is not valid: %v", err).
			WithHint("it has 44 characters, as `wg pubkey` prints it")
	}
	if key == d.mesh.key {
		return key, api.Errorf(api.CodeKeyTaken, "public key %v is this host's own", key).
			WithHint("give the other device's key")
	}
	return key, nil
}

func (p *peer) setEndpoint(text string) error {
	p.Endpoint = ""
	if text == "" {
		return nil
	}
	e, err := wireguard.ParseEndpoint(text, 0)
	if err != nil {
		return api.Errorf(api.CodeBadAddress, "%v", err).WithHint("it is HOST:PORT, an IPv6 address in brackets")
	}
	p.Endpoint = e.String()
	return nil
}

func (p *peer) setKeepalive(text string) error {
	p.Keepalive = 0
	if text == "" {
		return nil
	}
	k, err := time.ParseDuration(text)
	if err != nil || k < 0 || k > wireguard.MaxKeepalive || k%time.Second != 0 {
		return api.Errorf(api.CodeBadRequest, "keepalive %q is not valid", text).
			WithHint("it is a number of whole seconds up to 65535, such as 25s, or 0s")
	}
	p.Keepalive = uint16(k / time.Second)
	return nil
}

// maxTimed bounds how long a permission may be given for: what is meant for
// longer is meant for good.
const maxTimed = 10 * 365 * 24 * time.Hour

func (p *peer) setPermissions(changes map[string]api.PermissionChange, now time.Time) error {
	for name, c := range changes {
		one, err := policy.ParsePermission(name)
		if err != nil {
			return api.Errorf(api.CodeBadPermission, "permission %q is unknown", name).WithHint("it is one of incoming, routing, lan")
		}
		until, err := endOf(c, now)
		if err != nil {
			return api.Errorf(api.CodeBadPermission, "permission %s: %v", name, err).WithHint("say for how long, such as 30m or 2h")
		}
		*p.Permissions.of(one) = grant{Allowed: c.Allowed, Until: until}
	}
	return nil
}

// endOf returns when a permission is to end, in whole milliseconds, or zero.
func endOf(c api.PermissionChange, now time.Time) (time.Time, error) {
	until := c.Until.UTC().Round(0)
	switch {
	case c.For == "" && c.Until.IsZero():
		return time.Time{}, nil
	case !c.Allowed:
		return time.Time{}, errors.New("what isn't allowed has no end")
	case c.For != "" && !c.Until.IsZero():
		return time.Time{}, errors.New("both for and until are given")
	case c.For != "":
		length, err := time.ParseDuration(c.For)
		if err != nil {
			return time.Time{}, fmt.Errorf("%q is not a duration", c.For)
		}
		until = now.Add(length).Truncate(time.Millisecond)
	}
	if length := until.Sub(now); length <= 0 || length > maxTimed {
		return time.Time{}, fmt.Errorf("the end %v isn't in the next ten years", until.Format(time.RFC3339))
	}
	return until, nil
}

// giveAddresses returns the addresses for a peer: those given, else those
// derived from its key. A peer of that name keeps the ones it has.
func (d *Daemon) giveAddresses(doc *document, p *peer, given []string) (out [2]netip.Addr, err error) {
	var have [2]bool
	for _, text := range given {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return out, api.Errorf(api.CodeBadAddress, "address %q is not valid", text).WithHint("give a bare IPv4 or IPv6 address")
		}
		if err := d.mesh.prefixes.Check(a); err != nil {
			return out, api.Errorf(api.CodeBadAddress, "%v", err).WithHint("%s", d.freeHint(doc, p.PublicKey))
		}
		family := familyOf(a)
		if have[family] {
			return out, api.Errorf(api.CodeBadAddress, "address %v is a second of its family", a).WithHint("a peer has one IPv4 and one IPv6 address")
		}
		out[family], have[family] = a, true
	}
	if have[0] && have[1] {
		return out, nil
	}
	if i := doc.byKey(p.PublicKey); i >= 0 && len(given) == 0 {
		return doc.Peers[i].Addresses, nil
	}
	derived, err := d.mesh.prefixes.Derive(p.PublicKey)
	if err != nil {
		return out, d.fullOr(doc, p.PublicKey, api.Errorf(api.CodeAddressTaken, "%v", err))
	}
	for family, a := range derived.List() {
		if !have[family] {
			out[family] = a
		}
	}
	return out, nil
}

// freeHint proposes addresses that nobody has.
func (d *Daemon) freeHint(doc *document, key wireguard.PublicKey) string {
	free, err := d.mesh.prefixes.Propose(key, func(a netip.Addr) bool { return d.owner(doc, a) != "" })
	if err != nil {
		return "remove a peer, or start the helper with larger mesh prefixes"
	}
	return fmt.Sprintf("add --address %v --address %v", free.V4, free.V6)
}

// fullOr says that the mesh is full if it is, and else refuses with a free
// address as the hint.
func (d *Daemon) fullOr(doc *document, key wireguard.PublicKey, refusal *api.Error) error {
	_, err := d.mesh.prefixes.Propose(key, func(a netip.Addr) bool { return d.owner(doc, a) != "" })
	if errors.Is(err, wireguard.ErrMeshFull) {
		refusal = api.Errorf(api.CodeMeshFull, "the mesh is full: %v", err)
	}
	return refusal.WithHint("%s", d.freeHint(doc, key))
}

// owner returns whose address a is, or "".
func (d *Daemon) owner(doc *document, a netip.Addr) string {
	if a == d.mesh.own.V4 || a == d.mesh.own.V6 {
		return "this host"
	}
	if i := doc.byAddress(a); i >= 0 {
		return fmt.Sprintf("peer %q", doc.Peers[i].Name)
	}
	return ""
}

// admit refuses a new peer that takes something from another, or for which
// there is no place.
func (d *Daemon) admit(doc *document, p *peer, asked api.NewPeer) error {
	if len(doc.Peers) >= maxPeers {
		return api.Errorf(api.CodeMeshFull, "the mesh has %d peers, and there is no place for more", maxPeers).WithHint("remove a peer")
	}
	if i := doc.byKey(p.PublicKey); i >= 0 {
		return api.Errorf(api.CodeKeyTaken, "peer %q has the key %v already", doc.Peers[i].Name, p.PublicKey).
			WithHint("run: meshhelper peer rename %s %s", doc.Peers[i].Name, p.Name)
	}
	for _, a := range p.Addresses {
		if owner := d.owner(doc, a); owner != "" {
			return d.fullOr(doc, p.PublicKey, api.Errorf(api.CodeAddressTaken, "address %v belongs to %s", a, owner))
		}
	}
	return nil
}

// samePeer reports what differs between a peer that is there and one that was
// asked for by its name; what the request leaves open doesn't.
func samePeer(is, wanted *peer, asked api.NewPeer, now time.Time) error {
	var differs string
	switch {
	case is.PublicKey != wanted.PublicKey:
		return api.Errorf(api.CodeNameTaken, "peer %q is there already, with another key", is.Name).
			WithHint("choose another name, or run: meshhelper peer remove %s", is.Name)
	case asked.Kind != "" && is.Kind != wanted.Kind:
		differs = "as " + is.Kind
	case len(asked.Addresses) > 0 && is.Addresses != wanted.Addresses:
		differs = fmt.Sprintf("with the addresses %v and %v", is.Addresses[0], is.Addresses[1])
	case asked.Endpoint != "" && is.Endpoint != wanted.Endpoint:
		differs = fmt.Sprintf("with endpoint %q", is.Endpoint)
	case asked.Keepalive != "" && is.Keepalive != wanted.Keepalive:
		differs = fmt.Sprintf("with keepalive %ds", is.Keepalive)
	default:
		return samePermissions(is, asked, now)
	}
	return api.Errorf(api.CodeNameTaken, "peer %q is there already, %s", is.Name, differs).
		WithHint("run: meshhelper peer remove %s, and add it again", is.Name)
}

func samePermissions(is *peer, asked api.NewPeer, now time.Time) error {
	for name, c := range asked.Permissions {
		one, err := policy.ParsePermission(name)
		if err == nil && policy.Grant(*is.Permissions.of(one)).In(now) != c.Allowed {
			return api.Errorf(api.CodeNameTaken, "peer %q is there already, without %s", is.Name, name).
				WithHint("run: meshhelper peer allow %s %s", is.Name, name)
		}
	}
	return nil
}

// apply changes doc's peer i.
func (d *Daemon) apply(doc *document, i int, c api.PeerChange, now time.Time) error {
	p := &doc.Peers[i]
	if c.PublicKey != "" {
		if err := d.rekey(doc, i, c.PublicKey); err != nil {
			return err
		}
	}
	if c.Endpoint != nil {
		if err := p.setEndpoint(*c.Endpoint); err != nil {
			return err
		}
	}
	if c.Keepalive != nil {
		if err := p.setKeepalive(*c.Keepalive); err != nil {
			return err
		}
	}
	if err := p.setPermissions(c.Permissions, now); err != nil {
		return err
	}
	if c.Name == "" || c.Name == p.Name {
		return nil
	}
	return doc.rename(i, c.Name)
}

// rekey gives a peer another key. Addresses that were derived from the old one
// follow, since others derive them, too; chosen ones stay.
func (d *Daemon) rekey(doc *document, i int, text string) error {
	p := &doc.Peers[i]
	key, err := d.readKey(text)
	if err != nil || key == p.PublicKey {
		return err
	}
	if other := doc.byKey(key); other >= 0 {
		return api.Errorf(api.CodeKeyTaken, "peer %q has the key %v already", doc.Peers[other].Name, key).WithHint("make a new key")
	}
	old, oldErr := d.mesh.prefixes.Derive(p.PublicKey)
	next, err := d.mesh.prefixes.Derive(key)
	for family, a := range old.List() {
		if oldErr != nil || a != p.Addresses[family] {
			continue
		}
		if err != nil {
			return api.Errorf(api.CodeAddressTaken, "%v", err).WithHint("make another key")
		}
		moved := next.List()[family]
		if owner := d.owner(doc, moved); owner != "" && moved != a {
			return api.Errorf(api.CodeAddressTaken, "address %v belongs to %s", moved, owner).WithHint("make another key")
		}
		p.Addresses[family] = moved
	}
	p.PublicKey = key
	return nil
}

func (doc *document) rename(i int, name string) error {
	if err := checkName(name); err != nil {
		return api.Errorf(api.CodeBadName, "%v", err).WithHint("names have 1 to 63 letters, digits, -, _ and .")
	}
	if doc.byName(name) >= 0 {
		return api.Errorf(api.CodeNameTaken, "another peer has the name %q", name).WithHint("choose another name")
	}
	doc.remember(former{Name: doc.Peers[i].Name, Now: name})
	doc.forget(name)
	doc.Peers[i].Name = name
	return nil
}

// remember notes a name that is no more; the oldest is forgotten.
func (doc *document) remember(f former) {
	doc.forget(f.Name)
	doc.Former = append(doc.Former, f)
	if len(doc.Former) > maxFormer {
		doc.Former = slices.Delete(doc.Former, 0, len(doc.Former)-maxFormer)
	}
}

func (doc *document) forget(name string) {
	doc.Former = slices.DeleteFunc(doc.Former, func(f former) bool { return f.Name == name })
}

// nowOf returns what a former name became, or "".
func (doc *document) nowOf(name string) string {
	for _, f := range doc.Former {
		if f.Name == name && doc.byName(f.Now) >= 0 {
			return f.Now
		}
	}
	return ""
}

func (doc *document) byName(name string) int {
	return slices.IndexFunc(doc.Peers, func(p peer) bool { return p.Name == name })
}

func (doc *document) byKey(key wireguard.PublicKey) int {
	return slices.IndexFunc(doc.Peers, func(p peer) bool { return p.PublicKey == key })
}

func (doc *document) byAddress(a netip.Addr) int {
	return slices.IndexFunc(doc.Peers, func(p peer) bool { return p.Addresses[0] == a || p.Addresses[1] == a })
}

// find returns the peer that ref names: by name, mesh address or public key.
func (doc *document) find(ref string) (int, error) {
	if i := doc.byName(ref); i >= 0 {
		return i, nil
	}
	if a, err := netip.ParseAddr(ref); err == nil {
		if i := doc.byAddress(a); i >= 0 {
			return i, nil
		}
	}
	if key, err := wireguard.ParsePublicKey(ref); err == nil {
		if i := doc.byKey(key); i >= 0 {
			return i, nil
		}
	}
	return -1, doc.unknown(ref)
}

// unknown says that there is no such peer, and which was probably meant.
func (doc *document) unknown(ref string) error {
	if slices.ContainsFunc(doc.Former, func(f former) bool { return f.Name == ref && f.Now == "" }) {
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
	if name := closest(ref, names); name != "" {
		return e.WithHint("did you mean %q?", name)
	}
	if len(names) == 0 {
		return e.WithHint("there is no peer yet; run: meshhelper peer add NAME")
	}
	return e.WithHint("see `meshhelper peer list`")
}
