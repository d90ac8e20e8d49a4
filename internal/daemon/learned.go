package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/owned"
)

// learned is what a helper found out about peers by itself: where each was last heard.
// After a restart the host sends there first, so that a peer that moved, or that no endpoint
// is configured of, isn't dark until it sends by itself. And what was counted of each peer,
// and by which addresses others know this host.
type learned struct {
	Endpoints map[mesh.PublicKey]netip.AddrPort `json:"endpoints"`
	Counts    map[mesh.PublicKey]totals         `json:"counts,omitempty"`
	Outside   outside                           `json:"outside,omitzero"`
}

// totals are what was counted of a peer over all helpers' lives. What one counted since it
// was last saved, some minutes, is lost where it is killed.
type totals struct {
	Rx       uint64      `json:"rx"` // bytes, encrypted
	Tx       uint64      `json:"tx"`
	RoutedRx uint64      `json:"routedRx"`
	RoutedTx uint64      `json:"routedTx"`
	Refused  api.Refused `json:"refused"`
}

// totalsOf adds what tunnel and guard counted of a peer to what was counted before.
func totalsOf(key mesh.PublicKey, n numbers) totals {
	t, s, g := n.before[key], n.tunnel[key], n.guard[key]
	r := refusedOf(s, g)
	return totals{
		Rx: t.Rx + s.RxBytes, Tx: t.Tx + s.TxBytes,
		RoutedRx: t.RoutedRx + g.Routed.RxBytes, RoutedTx: t.RoutedTx + g.Routed.TxBytes,
		Refused: api.Refused{
			Martian: t.Refused.Martian + r.Martian, Self: t.Refused.Self + r.Self, Mesh: t.Refused.Mesh + r.Mesh,
			LAN: t.Refused.LAN + r.LAN, Internet: t.Refused.Internet + r.Internet, Spoofed: t.Refused.Spoofed + r.Spoofed,
		},
	}
}

// learnInterval is how often what was learned is saved at most, and learnAsk how often
// the tunnel is asked for news, which costs a look at each peer; maxLearned
// bounds what is read of it, in bytes: an entry has 500 at most.
const (
	learnInterval = 3 * time.Minute
	learnAsk      = 30 * time.Second
	maxLearned    = 8 << 20
)

func decodeLearned(text []byte) (learned, error) {
	var l learned
	if err := json.Unmarshal(text, &l); err != nil {
		return learned{}, fmt.Errorf("read learned endpoints: %w", err)
	}
	maps.DeleteFunc(l.Endpoints, func(_ mesh.PublicKey, at netip.AddrPort) bool {
		return !at.IsValid() || at.Port() == 0
	})
	l.Outside.Addresses = slices.DeleteFunc(l.Outside.Addresses, func(a netip.Addr) bool { return !a.IsValid() || a.Zone() != "" })
	l.Outside.Addresses = l.Outside.Addresses[:min(len(l.Outside.Addresses), maxOutside)]
	return l, nil
}

// readLearned returns what was learned, or nothing where there is no file.
func (s *store) readLearned() (learned, error) {
	text, err := owned.Read(filepath.Join(s.dir, learnedFile), maxLearned)
	if errors.Is(err, fs.ErrNotExist) {
		return learned{}, nil
	}
	if err != nil {
		return learned{}, fmt.Errorf("read learned endpoints: %w", err)
	}
	return decodeLearned(text)
}

func (s *store) writeLearned(l learned) error {
	text, err := json.Marshal(l)
	if err == nil && len(text) > maxLearned {
		err = fmt.Errorf("%d bytes, at most %d", len(text), maxLearned)
	}
	if err == nil {
		err = s.replace(context.Background(), append(text, '\n'), learnedFile)
	}
	if err != nil {
		return fmt.Errorf("save learned endpoints: %w", err)
	}
	return nil
}

// learn looks where peers were heard, has it saved where that is news, and reports
// whether it is.
func (d *Daemon) learn() bool {
	c, _ := d.condition()
	if c.tunnel == nil {
		return false
	}
	n, err := readNumbers(c)
	if err != nil {
		return false // the loop says so
	}
	return d.learnFrom(n)
}

// learnFrom keeps where the peers that made a handshake were heard. Of a peer that wasn't heard since the start, what was known before stays;
// of one that is gone, nothing does.
func (d *Daemon) learnFrom(n numbers) (news bool) {
	n.before = d.before
	doc := d.wanted.Load()
	d.learning.Lock()
	defer d.learning.Unlock()
	d.mu.Lock()
	before, counted, unsaved := d.learned, d.counts, d.learnedUnsaved // replaced, never changed
	d.mu.Unlock()
	next := make(map[mesh.PublicKey]netip.AddrPort, len(before))
	counts := make(map[mesh.PublicKey]totals, len(doc.Peers))
	for i := range doc.Peers {
		p := &doc.Peers[i]
		if t := totalsOf(p.PublicKey, n); t != (totals{}) {
			counts[p.PublicKey] = t
		}
		at := before[p.PublicKey]
		if s := n.tunnel[p.PublicKey]; s.Endpoint.IsValid() && !s.LastHandshake.IsZero() {
			at = s.Endpoint
		}
		if at.IsValid() {
			next[p.PublicKey] = at
		}
	}
	if maps.Equal(next, before) && maps.Equal(counts, counted) && !unsaved {
		return false
	}
	d.mu.Lock()
	d.learned, d.counts = next, counts
	d.mu.Unlock()
	d.saveLearned()
	return true
}

// saveLearned has what was learned saved.
func (d *Daemon) saveLearned() {
	d.disk.submit("learned", func() error {
		d.mu.Lock()
		now := learned{Endpoints: d.learned, Counts: d.counts, Outside: d.outside}
		d.mu.Unlock()
		err := d.disk.store.writeLearned(now)
		d.mu.Lock()
		d.learnedUnsaved = err != nil
		d.mu.Unlock()
		if err != nil {
			d.opts.Logger.Info(err.Error())
		}
		return err
	})
}
