package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// edit changes a copy of the wanted state and returns the public key of the
// peer that it was about.
type edit func(doc *document, now time.Time) (mesh.PublicKey, error)

// AddPeer adds a peer. One that already exists, with all that p says of it,
// is no error.
func (d *Daemon) AddPeer(ctx context.Context, p api.NewPeer) (api.Changed, error) {
	return d.change(ctx, func(doc *document, now time.Time) (mesh.PublicKey, error) {
		wanted, err := d.newPeer(doc, p, now)
		if err != nil {
			return mesh.PublicKey{}, err
		}
		if i := doc.byName(wanted.Name); i >= 0 {
			return wanted.PublicKey, samePeer(&doc.Peers[i], wanted, p, now)
		}
		if err := d.admit(doc, wanted, p); err != nil {
			return mesh.PublicKey{}, err
		}
		doc.Peers = append(doc.Peers, *wanted)
		doc.forget(wanted.Name)
		return wanted.PublicKey, nil
	})
}

// ChangePeer changes what c names of a peer and leaves the rest.
func (d *Daemon) ChangePeer(ctx context.Context, ref string, c api.PeerChange) (api.Changed, error) {
	var key mesh.PublicKey
	return d.change(ctx, func(doc *document, now time.Time) (mesh.PublicKey, error) {
		i := -1
		if c.Name == "" {
			i = doc.byKey(key) // made again: the same peer, whatever it is called by now
		}
		if i < 0 {
			var err error
			if i, err = doc.find(ref); err != nil {
				if c.Name == "" || doc.nowOf(ref) != c.Name {
					return mesh.PublicKey{}, err
				}
				i = doc.byName(c.Name) // renamed so before
			}
		}
		if err := d.apply(doc, i, c, now); err != nil {
			return mesh.PublicKey{}, err
		}
		key = doc.Peers[i].PublicKey
		return key, nil
	})
}

// RemovePeer removes a peer, and answers with what it was. That it was removed before is
// an error of its own, after it is certain that this is saved.
func (d *Daemon) RemovePeer(ctx context.Context, ref string) (api.Changed, error) {
	var was api.Peer
	var before *api.Error
	changed, err := d.change(ctx, func(doc *document, now time.Time) (mesh.PublicKey, error) {
		i, err := doc.find(ref)
		before = nil
		if errors.As(err, &before) && before.Code == api.CodeAlreadyRemoved {
			return mesh.PublicKey{}, nil
		}
		if err != nil {
			return mesh.PublicKey{}, err
		}
		gone := doc.Peers[i] // its place is another's from here on
		was = d.view(&gone, now)
		doc.remember(former{Name: gone.Name})
		doc.Peers = slices.Delete(doc.Peers, i, i+1)
		return mesh.PublicKey{}, nil
	})
	if err == nil && before != nil {
		return api.Changed{}, before
	}
	changed.Peer = was
	return changed, err
}

// answerWithin returns how long a change may take to be answered: a little less than
// the limit that commands are promised.
func (d *Daemon) answerWithin() time.Duration { return d.opts.Wait * 9 / 10 }

// saveWithin returns how long a change waits for the disk.
func (d *Daemon) saveWithin() time.Duration { return d.opts.Wait / 2 }

// outcome is what a change came to, as far as it goes without the loop.
type outcome struct {
	key     mesh.PublicKey // of the peer that the change was about
	doc     *document      // which the change is in force with; nil: nothing is in force
	already bool
	// from, where it isn't nil, is the document before a change that takes away alone.
	from *document
	// saving, where it isn't nil, saves what is in force.
	saving *job
}

// change makes an edited copy the wanted state, wakes the loop, and waits until
// the host holds it and the disk, too.
func (d *Daemon) change(ctx context.Context, e edit) (api.Changed, error) {
	began := time.Now()
	saving, cancel := context.WithDeadline(ctx, began.Add(d.saveWithin()))
	defer cancel()
	o, refused := d.decide(saving, e)
	if o.doc == nil {
		return api.Changed{}, refused
	}
	poke(d.wake)
	poke(d.timed)
	// The loop works while the disk does.
	notHeld := d.await(ctx, o.doc.Generation, began.Add(d.answerWithin()))
	notKept := d.awaitSaved(saving, o)
	switch {
	case refused != nil: // the part that takes away holds
		return api.Changed{}, refused
	case notKept != nil:
		return api.Changed{}, d.notSaved(o, notKept, notHeld)
	case notHeld != nil:
		return api.Changed{}, notHeld
	}
	out := api.Changed{Already: o.already}
	// Another change may have taken the peer away since, or given it another key.
	for _, doc := range []*document{d.wanted.Load(), o.doc} {
		if i := doc.byKey(o.key); i >= 0 {
			out.Peer = d.view(&doc.Peers[i], d.clock.now())
			break
		}
	}
	return out, nil
}

// awaitSaved waits until what a change put in force is on disk.
func (d *Daemon) awaitSaved(ctx context.Context, o outcome) error {
	if o.saving == nil {
		return nil
	}
	err := d.disk.wait(ctx, o.saving)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		d.disk.late(err)
	}
	return err
}

// notSaved says that a change holds, but not over a restart; and where it doesn't hold
// everywhere, that too.
func (d *Daemon) notSaved(o outcome, cause, notHeld error) error {
	message := notSaved(cause)
	if o.from != nil && !errors.Is(cause, errUnsynced) {
		var did, name string
		back := "as before"
		switch was, is := o.from.edited(o.doc); {
		case is != nil:
			did, name = differences(was, is), was.Name
		case notHeld != nil:
			did, name, back = was.Name+" is no peer any more", was.Name, "back"
		default:
			did, name, back = was.Name+" is no peer any more and its connections have ended", was.Name, "back"
		}
		message = fmt.Sprintf("%s, but this isn't saved: after a restart %s is %s: %v", did, name, back, cause)
	}
	if notHeld != nil {
		message += fmt.Sprintf("; the guard holds it, the packet filter doesn't yet: %s", strings.TrimPrefix(notHeld.Error(), "saved, not in force: "))
	}
	return api.Errorf(api.CodeNotSaved, "%s", message).WithHint("%s", d.disk.hint())
}

// decide edits. What the edit takes away is in force at the guard before anything is
// saved, and saved afterwards; what it gives is saved first. With an error, an outcome
// that has a document says that a part of the change is in force.
func (d *Daemon) decide(ctx context.Context, e edit) (outcome, error) {
	d.changing.Lock()
	doc, now := d.wanted.Load(), d.clock.now()
	next, key, err := d.edited(doc, e, now)
	if err != nil {
		d.changing.Unlock()
		return outcome{}, err
	}
	if next == doc {
		d.changing.Unlock()
		return outcome{key: key, doc: doc, already: true, saving: d.saveUnlessKept()}, nil
	}
	left, takes, gives := doc.less(next)
	if takes {
		d.noteTaken(doc, left, next.Generation)
	}
	base := doc
	switch {
	case takes && !gives:
		left = next
		d.publishWanted(left)
	case takes:
		left.Generation, left.Saved = next.Generation, now
		next.Generation++
		base = left
		d.publishWanted(left)
	}
	d.changing.Unlock()
	switch {
	case takes && !gives:
		d.recordEdit(ctx, doc, left)
		return outcome{key: key, doc: left, from: doc, saving: d.disk.saveWanted()}, nil
	case !takes:
		w, err := d.saveFirst(ctx, e, widening{base: base, next: next, key: key})
		if err != nil {
			return outcome{}, d.nothingChanged(err)
		}
		d.recordEdit(ctx, w.base, w.next)
		return outcome{key: w.key, doc: w.next, already: w.base == w.next, saving: d.saveUnlessKept()}, nil
	}
	saving := d.disk.saveWanted()
	w, err := d.saveFirst(ctx, e, widening{base: base, next: next, key: key})
	if err != nil {
		d.recordEdit(ctx, doc, left)
		cause := d.awaitSaved(ctx, outcome{saving: saving})
		part := "what the change takes away is"
		if doc.byKey(key) < 0 && left.byKey(key) >= 0 {
			part = "the new key and what the change takes away are"
		}
		message := fmt.Sprintf("%s in force, what it gives besides isn't: %v", part, err)
		if cause != nil {
			message = fmt.Sprintf("%s in force now, but not saved: after a restart it is back; what the change gives besides was not added: %v", part, err)
		}
		return outcome{key: key, doc: left}, api.Errorf(api.CodeNotSaved, "%s", message).WithHint("%s", d.disk.hint())
	}
	// One change, one event, also where another one came in between.
	was, _ := doc.edited(next)
	if i := w.next.byKey(w.key); i >= 0 {
		d.recordChange(ctx, was, &w.next.Peers[i])
	}
	return outcome{key: w.key, doc: w.next, saving: d.saveUnlessKept()}, nil
}

// edited returns the document after an edit, as the next generation, or doc itself
// where the edit changes nothing.
func (d *Daemon) edited(doc *document, e edit, now time.Time) (*document, mesh.PublicKey, error) {
	next := doc.clone()
	key, err := e(next, now)
	if err != nil {
		return nil, key, err
	}
	if slices.Equal(doc.Peers, next.Peers) {
		return doc, key, nil
	}
	next.Generation++
	next.Saved = now
	next.retire(doc, now)
	next.extra = doc.extra.follow(doc, next)
	return next, key, d.check(doc, next)
}

// check ends a hole in the checks of edits: what is published must be right by type. The
// document before is.
func (d *Daemon) check(before, doc *document) error {
	if err := errors.Join(doc.validateAfter(before), doc.fits(d.mesh)); err != nil {
		return api.Errorf(api.CodeInternal, "the change makes no valid state: %v", err)
	}
	return nil
}

// widening is an edit that gives something, on its way to the disk: next is base after
// the edit, and key the public key of the peer that it is about.
type widening struct {
	base, next *document
	key        mesh.PublicKey
}

// errOvertaken is saveAhead's when another change came into force before it wrote.
var errOvertaken = errors.New("another change came first")

// saveFirst saves w.next, which gives something that w.base doesn't, and then makes it the
// wanted state. What is taken away meanwhile isn't waited for, nor lost: the edit is made
// again, of the document that has it; see again. It returns what came to be wanted, of
// which document.
func (d *Daemon) saveFirst(ctx context.Context, e edit, w widening) (widening, error) {
	select {
	case d.widening <- struct{}{}:
		defer func() { <-d.widening }()
	case <-ctx.Done():
		return w, errors.New("another change is still being saved")
	}
	for first, began := true, w.base; ; first = false {
		d.changing.Lock()
		now := d.wanted.Load()
		if now == w.base && !first {
			d.publishWanted(w.next)
			d.changing.Unlock()
			return w, nil
		}
		var err error
		if now != w.base {
			w, err = d.again(e, began, now)
		}
		d.changing.Unlock()
		if err != nil || w.next == w.base {
			return w, err
		}
		err = d.disk.saveAhead(ctx, w.base, w.next)
		if err != nil && !errors.Is(err, errUnsynced) && !errors.Is(err, errOvertaken) {
			return w, err
		}
	}
}

// again makes an edit again, which was first made of the document began, of the one that
// is wanted now. So the peer may have another name, key or address meanwhile, and an edit
// that is no longer right is refused, as if it came later. Only what was taken away since
// stays away, also where the edit gives it: a person who denies what another change is
// about to allow must not find it allowed. A permission that ended by itself since was not
// taken away. The caller holds changing.
func (d *Daemon) again(e edit, began, now *document) (widening, error) {
	at := d.clock.now()
	next, key, err := d.edited(now, e, at)
	if err != nil || next == now {
		return widening{now, next, key}, err
	}
	is := now.byKeys()
	for i := range next.Peers {
		p := &next.Peers[i]
		current := is[p.PublicKey]
		if current == nil {
			continue
		}
		for one := range p.Permissions {
			if d.taken[p.PublicKey][one] > began.Generation {
				p.Permissions[one] = p.Permissions[one].And(current.Permissions[one])
			}
		}
	}
	return widening{now, next, key}, d.check(now, next)
}

// noteTaken notes which permissions an edit takes away that leaves left of doc, as a
// generation. What was taken from a peer that has another key now stays noted. The
// caller holds changing.
func (d *Daemon) noteTaken(doc, left *document, generation uint64) {
	is, rekeyed := left.byKeys(), doc.rekeyed(left)
	for i := range doc.Peers {
		was := &doc.Peers[i]
		p, of := is[was.PublicKey], d.taken[was.PublicKey]
		if n := rekeyed[i]; n != nil {
			p = n
		}
		if p == nil {
			continue
		}
		for one := range p.Permissions {
			if p.Permissions[one] != was.Permissions[one] {
				of[one] = generation
			}
		}
		if of != [len(mesh.AllPermissions)]uint64{} {
			d.taken[p.PublicKey] = of
		}
	}
	maps.DeleteFunc(d.taken, func(key mesh.PublicKey, _ [len(mesh.AllPermissions)]uint64) bool { return is[key] == nil })
}

// nothingChanged is the answer to a change that couldn't be saved, so that the state
// before stays.
func (d *Daemon) nothingChanged(cause error) error {
	var refusal *api.Error
	if errors.As(cause, &refusal) {
		return refusal
	}
	return api.Errorf(api.CodeNotSaved, "nothing was changed: save wanted state: %v", cause).
		WithHint("the old state stays in force; make room or make %q writable", d.opts.StateDir)
}

// saveUnlessKept has what is wanted saved where it isn't on disk.
func (d *Daemon) saveUnlessKept() *job {
	if d.disk.holds(d.wanted.Load()) {
		return nil
	}
	return d.disk.saveWanted()
}

// await waits until the host holds the generation, or says why it doesn't.
func (d *Daemon) await(ctx context.Context, generation uint64, deadline time.Time) error {
	began := time.Now()
	limit := time.NewTimer(time.Until(deadline))
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
			return notInForce(c, time.Since(began).Round(time.Second))
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

// edited returns the peer that an edit turned doc into next by, before and after, which
// is nil where the peer was added or removed. Both are nil where the edit changed none.
func (doc *document) edited(next *document) (was, is *mesh.Peer) {
	before := doc.byKeys()
	for i := range next.Peers {
		p := &next.Peers[i]
		old := before[p.PublicKey]
		delete(before, p.PublicKey)
		if old == nil || *old != *p {
			was, is = old, p
		}
	}
	for _, p := range before {
		was = p // removed, or with another key
	}
	return was, is
}

// recordEdit writes the one event of the edit that turned doc into next.
func (d *Daemon) recordEdit(ctx context.Context, doc, next *document) {
	was, is := doc.edited(next)
	d.recordChange(ctx, was, is)
}

// changeBy returns the event of a change, with the user who asked for it.
func changeBy(ctx context.Context, e events.Event) events.Event {
	e.Kind = events.Change
	if uid, ok := api.Caller(ctx); ok {
		e.UID = &uid
	}
	return e
}

// recordChange writes the one event of an edit, by the peer before and after, and the
// user who asked for it.
func (d *Daemon) recordChange(ctx context.Context, was, is *mesh.Peer) {
	e := changeBy(ctx, events.Event{})
	switch {
	case was == nil && is == nil:
		return
	case is == nil:
		e.Peer, e.Message = was.Name, was.Name+" removed"
	case was == nil:
		e.Peer, e.Message = is.Name, fmt.Sprintf("%s added: %s, may %v", is.Name, is.Kind, is.Permissions.Allowed())
	default:
		e.Peer, e.Message = is.Name, differences(was, is)
	}
	d.journal.Record(e)
}

// differences says what a change of a peer changed, for an event.
func differences(was, p *mesh.Peer) string {
	var out []string
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	if was.Name != p.Name {
		say("%s is now called %s", was.Name, p.Name)
	}
	if was.PublicKey != p.PublicKey {
		say("%s has another key now", p.Name)
	}
	if was.Addresses != p.Addresses {
		say("%s has the addresses %v and %v now", p.Name, p.Addresses[0], p.Addresses[1])
	}
	if was.Endpoint != p.Endpoint {
		say("%s is expected at %q now", p.Name, p.Endpoint)
	}
	if was.Keepalive != p.Keepalive {
		say("%s is sent something every %d s now", p.Name, p.Keepalive)
	}
	for i, one := range mesh.AllPermissions {
		has, had := p.Permissions[i], was.Permissions[i]
		switch {
		case has == had:
		case !has.Allowed:
			say("%s may no longer %s", p.Name, one.Verb)
		case !has.Until.IsZero():
			say("%s may %s until %s", p.Name, one.Verb, has.Until.Local().Format("2006-01-02 15:04:05 MST"))
		default:
			say("%s may %s", p.Name, one.Verb)
		}
	}
	if out == nil {
		return p.Name + " changed"
	}
	return strings.Join(out, "; ")
}
