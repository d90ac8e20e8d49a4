package wanted

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

// Edit changes a copy of the wanted state and returns the public key of the
// peer that it was about.
type Edit func(doc *Document, now time.Time) (mesh.PublicKey, error)

// AddPeer adds a peer. One that already exists, with all that p says of it,
// is no error.
func (s *State) AddPeer(ctx context.Context, p api.NewPeer) (Outcome, error) {
	return s.Edit(ctx, func(doc *Document, now time.Time) (mesh.PublicKey, error) {
		wanted, err := s.newPeer(doc, p, now)
		if err != nil {
			return mesh.PublicKey{}, err
		}
		if i := doc.byName(wanted.Name); i >= 0 {
			return wanted.PublicKey, samePeer(&doc.Peers[i], wanted, p, now)
		}
		if err := s.admit(doc, wanted, p); err != nil {
			return mesh.PublicKey{}, err
		}
		doc.Peers = append(doc.Peers, *wanted)
		doc.forget(wanted.Name)
		return wanted.PublicKey, nil
	})
}

// ChangePeer changes what c names of a peer and leaves the rest.
func (s *State) ChangePeer(ctx context.Context, ref string, c api.PeerChange) (Outcome, error) {
	var key mesh.PublicKey
	return s.Edit(ctx, func(doc *Document, now time.Time) (mesh.PublicKey, error) {
		i := -1
		if c.Name == "" {
			i = doc.ByKey(key) // made again: the same peer, whatever it is called by now
		}
		if i < 0 {
			var err error
			if i, err = doc.Find(ref); err != nil {
				if c.Name == "" || doc.nowOf(ref) != c.Name {
					return mesh.PublicKey{}, err
				}
				i = doc.byName(c.Name) // renamed so before
			}
		}
		if err := s.apply(doc, i, c, now); err != nil {
			return mesh.PublicKey{}, err
		}
		key = doc.Peers[i].PublicKey
		return key, nil
	})
}

// RemovePeer removes a peer. That it was removed before is an error in the outcome's After,
// to be answered once it is certain that this is saved.
func (s *State) RemovePeer(ctx context.Context, ref string) (Outcome, error) {
	var gone *mesh.Peer
	var before *api.Error
	o, err := s.Edit(ctx, func(doc *Document, _ time.Time) (mesh.PublicKey, error) {
		i, err := doc.Find(ref)
		before = nil
		if errors.As(err, &before) && before.Code == api.CodeAlreadyRemoved {
			return mesh.PublicKey{}, nil
		}
		if err != nil {
			return mesh.PublicKey{}, err
		}
		was := doc.Peers[i] // its place is another's from here on
		gone = &was
		doc.remember(Former{Name: was.Name})
		doc.Peers = slices.Delete(doc.Peers, i, i+1)
		return mesh.PublicKey{}, nil
	})
	if before != nil {
		o.After = before
	}
	o.Gone = gone
	return o, err
}

// Outcome is what a change came to, as far as it goes without the host.
type Outcome struct {
	// Key is of the peer that the change was about, and Gone that peer where it was removed.
	Key  mesh.PublicKey
	Gone *mesh.Peer
	// Document is what the change is in force with; nil: nothing is in force.
	Document *Document
	// Already says that all was so before.
	Already bool
	// After is what is wrong although the change is in force, to be said once it is saved.
	After error

	// from, where it isn't nil, is the document before a change that takes away alone.
	from *Document
	// saving, where it isn't nil, saves what is in force.
	saving *Job
}

// AwaitSaved waits until what a change put in force is on disk.
func (s *State) AwaitSaved(ctx context.Context, o Outcome) error {
	if o.saving == nil {
		return nil
	}
	err := s.disk.wait(ctx, o.saving)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		s.disk.late(err)
	}
	return err
}

// NotSaved returns the error of a change that holds, but not over a restart, for the cause
// of which it couldn't be saved; notHeld, if not nil, says that it doesn't hold everywhere.
func (s *State) NotSaved(o Outcome, cause, notHeld error) error {
	message := notSaved(cause)
	if o.from != nil && !errors.Is(cause, errUnsynced) {
		var did, name string
		back := "as before"
		switch was, is := o.from.edited(o.Document); {
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
	return api.Errorf(api.CodeNotSaved, "%s", message).WithHint("%s", s.disk.hint())
}

// Edit changes what is wanted. What the edit takes away is in force at the guard before anything is
// saved, and saved afterwards; what it gives is saved first. With an error, an outcome
// that has a document says that a part of the change is in force.
func (s *State) Edit(ctx context.Context, e Edit) (Outcome, error) {
	s.changing.Lock()
	doc, now := s.doc.Load(), s.clock.Now()
	next, key, err := s.edited(doc, e, now)
	if err != nil {
		s.changing.Unlock()
		return Outcome{}, err
	}
	if next == doc {
		s.changing.Unlock()
		return Outcome{Key: key, Document: doc, Already: true, saving: s.saveUnlessKept()}, nil
	}
	left, takes, gives := doc.less(next)
	if takes {
		s.noteTaken(doc, left, next.Generation)
	}
	base := doc
	switch {
	case takes && !gives:
		left = next
		s.publishWanted(left)
	case takes:
		left.Generation, left.Saved = next.Generation, now
		next.Generation++
		base = left
		s.publishWanted(left)
	}
	s.changing.Unlock()
	switch {
	case takes && !gives:
		s.recordEdit(ctx, doc, left)
		return Outcome{Key: key, Document: left, from: doc, saving: s.disk.saveWanted()}, nil
	case !takes:
		w, err := s.saveFirst(ctx, e, widening{base: base, next: next, key: key})
		if err != nil {
			return Outcome{}, s.nothingChanged(err)
		}
		s.recordEdit(ctx, w.base, w.next)
		return Outcome{Key: w.key, Document: w.next, Already: w.base == w.next, saving: s.saveUnlessKept()}, nil
	}
	saving := s.disk.saveWanted()
	w, err := s.saveFirst(ctx, e, widening{base: base, next: next, key: key})
	if err != nil {
		s.recordEdit(ctx, doc, left)
		cause := s.AwaitSaved(ctx, Outcome{saving: saving})
		part := "what the change takes away is"
		if doc.ByKey(key) < 0 && left.ByKey(key) >= 0 {
			part = "the new key and what the change takes away are"
		}
		message := fmt.Sprintf("%s in force, what it gives besides isn't: %v", part, err)
		if cause != nil {
			message = fmt.Sprintf("%s in force now, but not saved: after a restart it is back; what the change gives besides was not added: %v", part, err)
		}
		return Outcome{Key: key, Document: left}, api.Errorf(api.CodeNotSaved, "%s", message).WithHint("%s", s.disk.hint())
	}
	// One change, one event, also where another one came in between.
	was, _ := doc.edited(next)
	if i := w.next.ByKey(w.key); i >= 0 {
		s.recordChange(ctx, was, &w.next.Peers[i])
	}
	return Outcome{Key: w.key, Document: w.next, saving: s.saveUnlessKept()}, nil
}

// edited returns the document after an edit, as the next generation, or doc itself
// where the edit changes nothing.
func (s *State) edited(doc *Document, e Edit, now time.Time) (*Document, mesh.PublicKey, error) {
	next := doc.Clone()
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
	return next, key, s.check(doc, next)
}

// check ends a hole in the checks of edits: what is published must be right by type. The
// document before is.
func (s *State) check(before, doc *Document) error {
	if err := errors.Join(doc.validateAfter(before), doc.fits(s.id)); err != nil {
		return api.Errorf(api.CodeInternal, "the change makes no valid state: %v", err)
	}
	return nil
}

// widening is an edit that gives something, on its way to the disk: next is base after
// the Edit, and key the public key of the peer that it is about.
type widening struct {
	base, next *Document
	key        mesh.PublicKey
}

// errOvertaken is saveAhead's when another change came into force before it wrote.
var errOvertaken = errors.New("another change came first")

// saveFirst saves w.next, which gives something that w.base doesn't, and then makes it the
// wanted state. What is taken away meanwhile isn't waited for, nor lost: the edit is made
// again, of the document that has it; see again. It returns what came to be wanted, of
// which document.
func (s *State) saveFirst(ctx context.Context, e Edit, w widening) (widening, error) {
	select {
	case s.widening <- struct{}{}:
		defer func() { <-s.widening }()
	case <-ctx.Done():
		return w, errors.New("another change is still being saved")
	}
	for first, began := true, w.base; ; first = false {
		s.changing.Lock()
		now := s.doc.Load()
		if now == w.base && !first {
			s.publishWanted(w.next)
			s.changing.Unlock()
			return w, nil
		}
		var err error
		if now != w.base {
			w, err = s.again(e, began, now)
		}
		s.changing.Unlock()
		if err != nil || w.next == w.base {
			return w, err
		}
		err = s.disk.saveAhead(ctx, w.base, w.next)
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
func (s *State) again(e Edit, began, now *Document) (widening, error) {
	at := s.clock.Now()
	next, key, err := s.edited(now, e, at)
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
			if s.taken[p.PublicKey][one] > began.Generation {
				p.Permissions[one] = p.Permissions[one].And(current.Permissions[one])
			}
		}
	}
	return widening{now, next, key}, s.check(now, next)
}

// noteTaken notes which permissions an edit takes away that leaves left of doc, as a
// generation. What was taken from a peer that has another key now stays noted. The
// caller holds changing.
func (s *State) noteTaken(doc, left *Document, generation uint64) {
	is, rekeyed := left.byKeys(), doc.rekeyed(left)
	for i := range doc.Peers {
		was := &doc.Peers[i]
		p, of := is[was.PublicKey], s.taken[was.PublicKey]
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
			s.taken[p.PublicKey] = of
		}
	}
	maps.DeleteFunc(s.taken, func(key mesh.PublicKey, _ [len(mesh.AllPermissions)]uint64) bool { return is[key] == nil })
}

// nothingChanged is the answer to a change that couldn't be saved, so that the state
// before stays.
func (s *State) nothingChanged(cause error) error {
	var refusal *api.Error
	if errors.As(cause, &refusal) {
		return refusal
	}
	return api.Errorf(api.CodeNotSaved, "nothing was changed: save wanted state: %v", cause).
		WithHint("the old state stays in force; make room or make %q writable", s.disk.store.dir)
}

// saveUnlessKept has what is wanted saved where it isn't on disk.
func (s *State) saveUnlessKept() *Job {
	if s.disk.holds(s.doc.Load()) {
		return nil
	}
	return s.disk.saveWanted()
}

// edited returns the peer that an edit turned doc into next by, before and after, which
// is nil where the peer was added or removed. Both are nil where the edit changed none.
func (doc *Document) edited(next *Document) (was, is *mesh.Peer) {
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
func (s *State) recordEdit(ctx context.Context, doc, next *Document) {
	was, is := doc.edited(next)
	s.recordChange(ctx, was, is)
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
func (s *State) recordChange(ctx context.Context, was, is *mesh.Peer) {
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
	s.opts.Record(e)
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
