package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wireguard"
)

// edit changes a copy of the wanted state and returns the public key of the
// peer that it was about.
type edit func(doc *document, now time.Time) (wireguard.PublicKey, error)

// AddPeer adds a peer. One that already exists, with all that p says of it,
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
		gone := doc.Peers[i] // its place is another's from here on
		was = d.view(&gone, now)
		doc.remember(former{Name: gone.Name})
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
	next.retire(doc, now)
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
