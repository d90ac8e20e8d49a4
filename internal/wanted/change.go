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

// Edit changes doc, a copy of the wanted state that the edit may modify, at the time now.
// It returns the public key of the peer that it changed, or the zero key after a removal.
// It may be called again with a newer document; see saveFirst.
type Edit func(doc *Document, now time.Time) (mesh.PublicKey, error)

// AddPeer adds a peer. It isn't an error if the peer already exists with everything that p
// asks for; fields that p leaves empty may differ. Refusals are *api.Error.
func (s *State) AddPeer(ctx context.Context, p api.NewPeer) (Outcome, error) {
	return s.Edit(ctx, func(doc *Document, now time.Time) (mesh.PublicKey, error) {
		wanted, err := s.newPeer(doc, p, now)
		if err != nil {
			return mesh.PublicKey{}, err
		}
		if i := doc.byName(wanted.Name); i >= 0 {
			return wanted.PublicKey, checkSamePeer(&doc.Peers[i], wanted, p, now)
		}
		if err := s.admit(doc, wanted, p); err != nil {
			return mesh.PublicKey{}, err
		}
		doc.Peers = append(doc.Peers, *wanted)
		doc.forget(wanted.Name)
		return wanted.PublicKey, nil
	})
}

// ChangePeer changes the fields of a peer that are set in c. ref is a name, a mesh address
// or a public key.
func (s *State) ChangePeer(ctx context.Context, ref string, c api.PeerChange) (Outcome, error) {
	var key mesh.PublicKey
	return s.Edit(ctx, func(doc *Document, now time.Time) (mesh.PublicKey, error) {
		i := -1
		if c.Name == "" {
			i = doc.ByKey(key) // repeated edit: the same peer, even if it was renamed meanwhile
		}
		if i < 0 {
			var err error
			if i, err = doc.Find(ref); err != nil {
				if c.Name == "" || doc.renamedTo(ref) != c.Name {
					return mesh.PublicKey{}, err
				}
				i = doc.byName(c.Name) // the same rename was made before
			}
		}
		if err := s.applyChange(doc, i, c, now); err != nil {
			return mesh.PublicKey{}, err
		}
		key = doc.Peers[i].PublicKey
		return key, nil
	})
}

// RemovePeer removes a peer. If the peer was removed before, Outcome.After holds that
// error, which the caller returns once the earlier removal is certainly saved.
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
		was := doc.Peers[i] // a copy: slices.Delete moves another peer into its slot
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

// Outcome is the result of a change at the guard and on disk. Whether the host enforces it
// is for the caller to find out.
type Outcome struct {
	// Key identifies the peer that was changed. Gone is the peer that was removed, or nil.
	Key  mesh.PublicKey
	Gone *mesh.Peer
	// Document is the published document that has the change, or nil if nothing changed.
	Document *Document
	// Already says that the wanted state already had everything that was asked for.
	Already bool
	// After is an error to return although the change is in force, once it is saved.
	After error

	// from is the document before a change that only revokes, else nil.
	from *Document
	// saving is the job that saves Document, or nil if it is on disk.
	saving *Job
}

// AwaitSaved waits until the published change is on disk, or ctx ends. A timeout counts as
// a problem of the disk; see State.Problem.
func (s *State) AwaitSaved(ctx context.Context, o Outcome) error {
	if o.saving == nil {
		return nil
	}
	err := s.disk.wait(ctx, o.saving)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		s.disk.noteTimeout(err)
	}
	return err
}

// NotSaved returns the error, with code [api.CodeNotSaved], of a change that is in force
// but would be lost by a restart. cause is why it couldn't be saved. notHeld is why the packet
// filter doesn't enforce the change yet, or empty if it does.
func (s *State) NotSaved(o Outcome, cause error, notHeld string) error {
	message := notSaved(cause)
	if o.from != nil && !errors.Is(cause, errUnsynced) {
		var did, name string
		back := "as before"
		switch was, is := o.from.changedPeer(o.Document); {
		case is != nil:
			did, name = differences(was, is), was.Name
		case notHeld != "":
			did, name, back = was.Name+" is no longer a peer", was.Name, "back"
		default:
			did, name, back = was.Name+" is no longer a peer and its connections have ended", was.Name, "back"
		}
		message = fmt.Sprintf("%s, but this isn't saved: after a restart %s is %s: %v", did, name, back, cause)
	}
	if notHeld != "" {
		message += "; the guard enforces it, the packet filter doesn't yet: " + notHeld
	}
	return api.Errorf(api.CodeNotSaved, "%s", message).WithHint("%s", s.disk.hint())
}

// Edit applies an edit to the wanted state. An edit that only revokes is published first,
// which narrows the guard, and saved by a job that the caller may wait for. An edit that
// only grants is saved first; Edit waits for that, and publishes afterwards. One that does
// both is split: its narrowed part is published, then the whole is saved and published.
//
// An error together with an outcome that has a document means that only the revoking part
// is in force.
func (s *State) Edit(ctx context.Context, e Edit) (Outcome, error) {
	b, err := s.begin(e)
	if err != nil {
		return Outcome{}, err
	}
	doc, left, next, key := b.doc, b.left, b.next, b.key
	switch {
	case next == doc:
		return Outcome{Key: key, Document: doc, Already: true, saving: s.saveIfNeeded()}, nil
	case b.takes && !b.gives:
		s.recordEdit(ctx, doc, left)
		return Outcome{Key: key, Document: left, from: doc, saving: s.disk.saveWanted()}, nil
	case !b.takes:
		w, err := s.saveFirst(ctx, e, widening{base: doc, next: next, key: key})
		if err != nil {
			return Outcome{}, s.nothingChanged(err)
		}
		s.recordEdit(ctx, w.base, w.next)
		return Outcome{Key: w.key, Document: w.next, Already: w.base == w.next, saving: s.saveIfNeeded()}, nil
	}
	saving := s.disk.saveWanted()
	w, err := s.saveFirst(ctx, e, widening{base: left, next: next, key: key})
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
	// One change is one event, even if it was published in two parts with another change
	// between them.
	was, _ := doc.changedPeer(next)
	if i := w.next.ByKey(w.key); i >= 0 {
		s.recordChange(ctx, was, &w.next.Peers[i])
	}
	return Outcome{Key: w.key, Document: w.next, saving: s.saveIfNeeded()}, nil
}

// begun is an edit of which the revoking part is in force.
type begun struct {
	doc *Document // before the edit
	// left is doc after the revoking part, if there is one, and next after the whole edit.
	// They are the same document if the edit grants nothing.
	left, next *Document
	key        mesh.PublicKey // of the changed peer
	// takes says that the edit revokes something, gives that it grants something.
	takes, gives bool
}

// begin applies an edit to the wanted state and publishes its revoking part.
func (s *State) begin(e Edit) (begun, error) {
	s.changing.Lock()
	defer s.changing.Unlock() // also if the edit panics: a lock that is held stops every revocation
	doc, now := s.doc.Load(), s.clock.Now()
	next, key, err := s.applyEdit(doc, e, now)
	b := begun{doc: doc, next: next, key: key}
	if err != nil || next == doc {
		return b, err
	}
	b.left, b.takes, b.gives = doc.narrowTo(next)
	if !b.takes {
		return b, nil
	}
	s.recordRevoked(doc, b.left, next.Generation)
	if b.gives {
		b.left.Generation, b.left.Saved = next.Generation, now
		next.Generation++
	} else {
		b.left = next
	}
	s.publish(b.left)
	return b, nil
}

// applyEdit returns a copy of doc with an edit applied, as the next generation, or doc
// itself if the edit changes nothing.
func (s *State) applyEdit(doc *Document, e Edit, now time.Time) (*Document, mesh.PublicKey, error) {
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
	next.extra = doc.extra.carryOver(doc, next)
	return next, key, s.check(doc, next)
}

// check validates a document before it is published, in case an edit let through what it
// should have refused. The document before is valid, so only peers that differ from it are
// checked one by one.
func (s *State) check(before, doc *Document) error {
	if err := errors.Join(doc.validateAfter(before), doc.checkFits(s.id)); err != nil {
		return api.Errorf(api.CodeInternal, "the change makes no valid state: %v", err)
	}
	return nil
}

// widening is an edit that grants something and isn't saved yet: next is base after the
// edit, and key the public key of the changed peer.
type widening struct {
	base, next *Document
	key        mesh.PublicKey
}

// errOvertaken is returned by saveAhead when another change was published before it wrote.
var errOvertaken = errors.New("another change came first")

// saveFirst saves w.next, which grants something that w.base doesn't, and then publishes
// it. The lock isn't held while the disk is written, so that a revocation never waits for
// it. If another document was published meanwhile, saveFirst applies the edit to that one
// and saves again, as redo describes. It returns the document that was published and the
// one that it was made from.
func (s *State) saveFirst(ctx context.Context, e Edit, w widening) (widening, error) {
	select {
	case s.widening <- struct{}{}:
		defer func() { <-s.widening }()
	case <-ctx.Done():
		return w, errors.New("another change is still being saved")
	}
	for first, began := true, w.base; ; first = false {
		published, err := s.publishSaved(e, began, &w, first)
		if published || err != nil || w.next == w.base {
			return w, err
		}
		err = s.disk.saveAhead(ctx, w.base, w.next)
		if err != nil && !errors.Is(err, errUnsynced) && !errors.Is(err, errOvertaken) {
			return w, err
		}
	}
}

// publishSaved publishes w.next, which is saved unless this is the first call, if w.base is
// still wanted; it reports whether it did. Otherwise it applies the edit to what is wanted
// now, and the result is to be saved.
func (s *State) publishSaved(e Edit, began *Document, w *widening, first bool) (published bool, err error) {
	s.changing.Lock()
	defer s.changing.Unlock()
	switch now := s.doc.Load(); {
	case now != w.base:
		*w, err = s.redo(e, began, now)
		return false, err
	case first:
		return false, nil
	}
	s.publish(w.next)
	return true, nil
}

// redo applies an edit, first applied to the document began, to the document that is wanted
// now. The peer may have another name, key or address by now, and an edit that no longer
// fits is refused, as if it had come later.
//
// Permissions that were revoked since began stay revoked, even if the edit grants them: a
// person who denies a permission while another change that allows it is being saved must
// not find it allowed. A permission that expired since doesn't count as revoked.
//
// The caller holds changing.
func (s *State) redo(e Edit, began, now *Document) (widening, error) {
	at := s.clock.Now()
	next, key, err := s.applyEdit(now, e, at)
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
			if s.revoked[p.PublicKey][one] > began.Generation {
				p.Permissions[one] = p.Permissions[one].And(current.Permissions[one])
			}
		}
	}
	return widening{now, next, key}, s.check(now, next)
}

// recordRevoked records, for redo, that the permissions which doc has and left hasn't were
// revoked in a generation. The record of a peer that gets another key moves to the new key;
// records of peers that left doesn't have are deleted. The caller holds changing.
func (s *State) recordRevoked(doc, left *Document, generation uint64) {
	is, rekeyed := left.byKeys(), doc.rekeyed(left)
	for i := range doc.Peers {
		was := &doc.Peers[i]
		p, of := is[was.PublicKey], s.revoked[was.PublicKey]
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
			s.revoked[p.PublicKey] = of
		}
	}
	maps.DeleteFunc(s.revoked, func(key mesh.PublicKey, _ [len(mesh.AllPermissions)]uint64) bool { return is[key] == nil })
}

// nothingChanged returns the error of a change that wasn't published because it couldn't
// be saved. A refusal of the edit itself is returned as it is.
func (s *State) nothingChanged(cause error) error {
	var refusal *api.Error
	if errors.As(cause, &refusal) {
		return refusal
	}
	return api.Errorf(api.CodeNotSaved, "nothing was changed: save wanted state: %v", cause).
		WithHint("the old state stays in force; make room or make %q writable", s.disk.store.dir)
}

// saveIfNeeded queues a job that saves the wanted state, or returns nil if it is on disk.
func (s *State) saveIfNeeded() *Job {
	if s.disk.isSaved(s.doc.Load()) {
		return nil
	}
	return s.disk.saveWanted()
}

// changedPeer returns the one peer in which doc and next differ, before and after the edit.
// was is nil for an added peer, is for a removed one, and both if no peer changed.
func (doc *Document) changedPeer(next *Document) (was, is *mesh.Peer) {
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

// recordEdit records the event of the edit that turned doc into next.
func (s *State) recordEdit(ctx context.Context, doc, next *Document) {
	was, is := doc.changedPeer(next)
	s.recordChange(ctx, was, is)
}

// changeBy returns e as a change, with the uid of the client that requested it. ctx has
// none if the change didn't come through the socket.
func changeBy(ctx context.Context, e events.Event) events.Event {
	e.Kind = events.Change
	if uid, ok := api.Caller(ctx); ok {
		e.UID = &uid
	}
	return e
}

// recordChange records the event of an edit: was and is are as changedPeer returns them.
func (s *State) recordChange(ctx context.Context, was, is *mesh.Peer) {
	e := changeBy(ctx, events.Event{})
	switch {
	case was == nil && is == nil:
		return
	case is == nil:
		e.Peer, e.Message = was.Name, was.Name+" removed"
	case was == nil:
		e.Peer, e.Message = is.Name, fmt.Sprintf("%s added: %s, may: %s", is.Name, is.Kind, permissionsText(is.Permissions.Allowed()))
	default:
		e.Peer, e.Message = is.Name, differences(was, is)
	}
	s.opts.Record(e)
}

// permissionsText lists permissions for an event, as the command does in its answers.
func permissionsText(p mesh.Permissions) string {
	if p == 0 {
		return "nothing"
	}
	return p.String()
}

// differences describes what changed between was and p, for an event: one clause for each
// field, joined by semicolons.
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
