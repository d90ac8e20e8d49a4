package daemon

import (
	"context"
	"fmt"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// AddPeer adds a peer; see [wanted.State.AddPeer]. Like the other changes, it returns when the
// host enforces the change and it is on disk. Its errors are *[api.Error]: besides refusals,
// CodeNotInForce and CodeNotSaved for a change that is made, but not in force or not saved yet.
func (d *Daemon) AddPeer(ctx context.Context, p api.NewPeer) (api.Changed, error) {
	return d.change(ctx, func(ctx context.Context) (wanted.Outcome, error) { return d.wanted.AddPeer(ctx, p) })
}

// ChangePeer changes the fields of a peer that are set in c; see [wanted.State.ChangePeer].
func (d *Daemon) ChangePeer(ctx context.Context, ref string, c api.PeerChange) (api.Changed, error) {
	return d.change(ctx, func(ctx context.Context) (wanted.Outcome, error) { return d.wanted.ChangePeer(ctx, ref, c) })
}

// RemovePeer removes a peer and returns its last state, with its numbers.
func (d *Daemon) RemovePeer(ctx context.Context, ref string) (api.Changed, error) {
	// What was counted is read while the peer is taken away, as it may be late or hang. Where
	// that finds the peer forgotten, the last round's numbers count.
	now, _ := d.loop.State()
	read := make(chan held.Numbers, 1)
	go func() { read <- now.Numbers() }()
	var gone *mesh.Peer
	out, err := d.change(ctx, func(ctx context.Context) (wanted.Outcome, error) {
		o, err := d.wanted.RemovePeer(ctx, ref)
		gone = o.Gone
		return o, err
	})
	if err != nil || gone == nil {
		return out, err
	}
	was := now.Counted
	select {
	case n := <-read:
		if _, found := n.Tunnel[gone.PublicKey]; found {
			was = n
		}
	default:
	}
	out.Peer = d.apiPeer(gone, was, d.wanted.Now())
	return out, nil
}

// changeLimit returns how long a change waits to be in force. It is a tenth less than
// Options.Wait, within which the answer must have reached the client.
func (d *Daemon) changeLimit() time.Duration { return d.opts.Wait * 9 / 10 }

// saveLimit returns how long a change waits for the disk. It leaves the other half of
// Options.Wait to the host, for a grant is saved before it is enforced.
func (d *Daemon) saveLimit() time.Duration { return d.opts.Wait / 2 }

// change makes a change of the wanted state by calling edit, wakes the loop, and waits until
// the host enforces the change and it is on disk. edit's context ends after saveLimit.
//
// If several things fail, the error is the one that matters most: a refusal, then a change
// that isn't saved, which a restart would lose, then one that isn't in force yet.
func (d *Daemon) change(ctx context.Context, edit func(context.Context) (wanted.Outcome, error)) (api.Changed, error) {
	began := time.Now()
	saving, cancel := context.WithDeadline(ctx, began.Add(d.saveLimit()))
	defer cancel()
	o, editErr := edit(saving)
	if o.Document == nil {
		return api.Changed{}, editErr
	}
	var out api.Changed
	d.loop.Wake()
	// The disk works at the same time, so waiting for it second costs nothing.
	pending := d.awaitEnforced(ctx, o.Document.Generation, began.Add(d.changeLimit()))
	saveErr := d.wanted.AwaitSaved(saving, o)
	switch {
	case editErr != nil: // only the part that revokes was published; see wanted.State.Edit
		return api.Changed{}, editErr
	case saveErr != nil:
		return api.Changed{}, d.wanted.NotSaved(o, saveErr, pending.why)
	case pending.why != "":
		return api.Changed{}, api.Errorf(api.CodeNotInForce, "saved, not in force: %s", pending.why).WithHint("%s", pending.hint)
	case o.After != nil:
		return api.Changed{}, o.After
	}
	out.Already = o.Already
	// Another change may have removed the peer since, or given it another key. Then the answer
	// shows the peer as this change left it.
	for _, doc := range []*wanted.Document{d.wanted.Document(), o.Document} {
		if i := doc.ByKey(o.Key); i >= 0 {
			out.Peer = d.currentPeer(&doc.Peers[i], d.wanted.Now())
			break
		}
	}
	return out, nil
}

// unenforced is why the host doesn't enforce a change yet. The zero value says that it does.
type unenforced struct{ why, hint string }

// awaitEnforced waits until the host enforces the generation or a later one. At the deadline,
// or when ctx ends, it returns why the host doesn't.
func (d *Daemon) awaitEnforced(ctx context.Context, generation uint64, deadline time.Time) unenforced {
	began := time.Now()
	limit := time.NewTimer(time.Until(deadline))
	defer limit.Stop()
	for {
		s, changed := d.loop.State()
		if s.Enforced >= generation {
			return unenforced{}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return unenforced{why: "the helper is stopping"}
		case <-limit.C:
			return whyUnenforced(s, time.Since(began).Round(time.Second))
		}
	}
}

// whyUnenforced returns why the host doesn't enforce a change after the time waited: the first
// problem of the state, which is the cause.
func whyUnenforced(s held.State, waited time.Duration) unenforced {
	if len(s.Problems) == 0 {
		return unenforced{fmt.Sprintf("the host is slow, it took longer than %v", waited), "see `meshhelper status`"}
	}
	p := s.Problems[0]
	hint := p.Hint
	if hint == "" {
		hint = "it is tried again; see `meshhelper status`"
	}
	return unenforced{p.Step + ": " + p.Message, hint}
}
