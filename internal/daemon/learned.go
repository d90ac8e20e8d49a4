package daemon

import (
	"context"
	"path/filepath"
	"time"

	"github.com/meshhelper/meshhelper/internal/guard"
	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/tunnel"
)

// learnInterval is how often what was learned of peers is saved at most.
const learnInterval = 3 * time.Minute

// openLearned reads what earlier helpers learned.
func (d *Daemon) openLearned() {
	book, err := learned.Open(filepath.Join(d.opts.StateDir, learnedFile))
	if err != nil {
		d.opts.Logger.Warn(err.Error()) // peers are found by what they send
	}
	if own := d.ownName(); len(own) == 0 || own[0] != book.Outside().Name {
		book.SetOutside(learned.Outside{})
	}
	d.learned = book
}

// note notes where peers were heard, and what was counted of them.
func (d *Daemon) note(n numbers) {
	doc := d.wanted.Document()
	keys := make([]mesh.PublicKey, len(doc.Peers))
	for i := range doc.Peers {
		keys[i] = doc.Peers[i].PublicKey
	}
	d.learned.Note(keys, func(key mesh.PublicKey) learned.Peer {
		s := n.tunnel[key]
		return learned.Peer{Endpoint: s.Endpoint, Seen: s.LastHandshake, Totals: countedOf(s, n.guard[key])}
	})
}

// countedOf returns what tunnel and guard counted of a peer.
func countedOf(s tunnel.PeerStats, g guard.PeerStats) learned.Totals {
	return learned.Totals{
		Rx: s.RxBytes, Tx: s.TxBytes, RoutedRx: g.Routed.RxBytes, RoutedTx: g.Routed.TxBytes,
		Refused: learned.Refused(refusedOf(s, g)),
	}
}

// saveLearned has what was learned saved.
func (d *Daemon) saveLearned() {
	d.wanted.Queue("learned", func() error {
		err := d.learned.Save(func(content []byte) error {
			return d.wanted.Write(content, learnedFile)
		})
		if err != nil {
			d.opts.Logger.Info(err.Error())
		}
		return err
	})
}

// keepLearned has what was learned saved where it changed, every learnInterval at most.
func (d *Daemon) keepLearned(ctx context.Context) error {
	var saved time.Time
	for sleep(ctx, d.opts.Tick) {
		if time.Since(saved) >= learnInterval && d.learned.Changed() {
			saved = time.Now()
			d.saveLearned()
		}
	}
	return nil
}

// finish waits, for a moment, until what isn't on disk is.
func (d *Daemon) finish() {
	limit, cancel := context.WithTimeout(context.Background(), flushLimit)
	defer cancel()
	if d.learned.Changed() {
		d.saveLearned()
	}
	d.wanted.Flush(limit)
	d.journal.Flush(limit.Done())
}
