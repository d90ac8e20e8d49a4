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
	"time"

	"github.com/meshhelper/meshhelper/internal/owned"
	"github.com/meshhelper/meshhelper/internal/wireguard"
)

// learned is what a helper found out about peers by itself: where a peer without a
// configured endpoint was last heard. After a restart the host sends there first, so
// that such a peer isn't dark until it sends by itself. Nothing depends on it.
type learned struct {
	Endpoints map[wireguard.PublicKey]netip.AddrPort `json:"endpoints"`
}

// learnInterval is how often what was learned is saved at most, and learnAsk how often
// the tunnel is asked for news, which costs a look at each peer; maxLearned
// bounds what is read of it, in bytes: an entry has some 100.
const (
	learnInterval = 3 * time.Minute
	learnAsk      = 30 * time.Second
	maxLearned    = 4 << 20
)

func decodeLearned(text []byte) (learned, error) {
	var l learned
	if err := json.Unmarshal(text, &l); err != nil {
		return learned{}, fmt.Errorf("read learned endpoints: %w", err)
	}
	maps.DeleteFunc(l.Endpoints, func(_ wireguard.PublicKey, at netip.AddrPort) bool {
		return !at.IsValid() || at.Port() == 0
	})
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
	stats, err := c.tunnel.Stats()
	if err != nil {
		return false // the loop says so
	}
	return d.learnFrom(stats)
}

// learnFrom keeps the endpoints of peers that have no configured one and made a
// handshake. Of a peer that wasn't heard since the start, what was known before stays;
// of one that is gone, nothing does.
func (d *Daemon) learnFrom(stats map[wireguard.PublicKey]wireguard.PeerStats) (news bool) {
	doc := d.wanted.Load()
	d.learning.Lock()
	defer d.learning.Unlock()
	d.mu.Lock()
	before, unsaved := d.learned, d.learnedUnsaved // replaced, never changed
	d.mu.Unlock()
	next := make(map[wireguard.PublicKey]netip.AddrPort, len(before))
	for i := range doc.Peers {
		p := &doc.Peers[i]
		if p.Endpoint != "" {
			continue
		}
		at := before[p.PublicKey]
		if s := stats[p.PublicKey]; s.Endpoint.IsValid() && !s.LastHandshake.IsZero() {
			at = s.Endpoint
		}
		if at.IsValid() {
			next[p.PublicKey] = at
		}
	}
	if maps.Equal(next, before) && !unsaved {
		return false
	}
	d.mu.Lock()
	d.learned = next
	d.mu.Unlock()
	d.disk.submit("learned", func() error {
		d.mu.Lock()
		now := d.learned
		d.mu.Unlock()
		err := d.disk.store.writeLearned(learned{Endpoints: now})
		d.mu.Lock()
		d.learnedUnsaved = err != nil
		d.mu.Unlock()
		if err != nil {
			d.opts.Logger.Info(err.Error())
		}
		return err
	})
	return true
}
