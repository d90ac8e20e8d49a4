package daemon

import (
	"context"
	"path/filepath"
	"time"

	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/retry"
)

// learnInterval is the shortest time between two periodic saves of what was learned of peers. Endpoints
// and totals change all the time while peers are connected, and a killed helper loses no more
// than this.
const learnInterval = 3 * time.Minute

// openLearned reads what earlier helpers learned. A file that can't be read isn't fatal: peers
// are found again by what they send. Outside addresses of a name that isn't this host's any more
// are dropped, because the policy counts them as class lan.
func (d *Daemon) openLearned() {
	book, err := learned.Open(filepath.Join(d.opts.StateDir, learnedFile))
	if err != nil {
		d.opts.Logger.Warn(err.Error())
	}
	if own := d.wanted.Settings().Endpoint.Name(); own == "" || own != book.Outside().Name {
		book.SetOutside(learned.Outside{})
	}
	d.learned = book
}

// saveLearned queues a save of what was learned. It doesn't wait for the disk.
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

// keepLearned saves what was learned after changes, at most once per learnInterval, until ctx
// ends.
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

// finish saves what isn't on disk yet, and waits for that up to flushLimit. It runs after the
// loop has ended, which notes the final totals.
func (d *Daemon) finish() {
	limit, cancel := context.WithTimeout(context.Background(), flushLimit)
	defer cancel()
	if d.learned.Changed() {
		d.saveLearned()
	}
	d.wanted.Flush(limit)
	d.journal.Flush(limit.Done())
}
