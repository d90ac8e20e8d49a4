package daemon

import (
	"context"
	"path/filepath"
	"time"

	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/retry"
)

// learnInterval is how often what was learned of peers is saved at most.
const learnInterval = 3 * time.Minute

// openLearned reads what earlier helpers learned.
func (d *Daemon) openLearned() {
	book, err := learned.Open(filepath.Join(d.opts.StateDir, learnedFile))
	if err != nil {
		d.opts.Logger.Warn(err.Error()) // peers are found by what they send
	}
	if own := d.wanted.Settings().Endpoint.Name(); own == "" || own != book.Outside().Name {
		book.SetOutside(learned.Outside{})
	}
	d.learned = book
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
	for retry.Sleep(ctx, d.opts.Tick) {
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
