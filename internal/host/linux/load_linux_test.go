package linux

import (
	"strconv"
	"testing"

	"github.com/google/nftables"
	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/policy"
)

// flushed is a socket for nftables; another program deletes our table after the first
// transactions, as often as times says.
type flushed struct {
	lacking
	times *int
	flush func() error
}

func (f flushed) SendMessages(ms []mdlayher.Message) error {
	if err := f.lacking.SendMessages(ms); err != nil || *f.times == 0 {
		return err
	}
	*f.times--
	return f.flush()
}

// loadAll enforces m as if the loaded table were unknown.
func (w *world) loadAll(m policy.Mesh) (r *policy.Ruleset, err error) {
	w.do(func() error {
		w.p.filter.loaded = nil
		r, err = w.round(m)
		return nil
	})
	return r, err
}

// TestLoadIsTriedAgain flushes nftables after a table is loaded and before it is read
// back: it is loaded again, and nothing closes unless that never ends.
func TestLoadIsTriedAgain(t *testing.T) {
	for flushes, closes := range map[int]bool{1: false, maxLoads - 1: false, maxLoads: true} {
		t.Run(strconv.Itoa(flushes), func(t *testing.T) {
			w := newWorld(t)
			w.open()
			defer w.close()
			w.enforce(meshOf(grants{ann: all}))
			times, refused := flushes, 0
			f := flushed{lacking{Conn: w.p.filter.change.wire, refused: &refused}, &times, func() error { return w.pic.B.DeleteTable(tableName) }}
			w.p.filter.change.wire = mdlayher.NewConn(f, 0)
			r, err := w.loadAll(meshOf(grants{ann: all, bob: all}))
			if (err != nil) != closes {
				t.Fatalf("enforced: %v", err)
			}
			if may := len(w.elements("may_routing4")); (may == 2) == closes {
				t.Errorf("the kernel lets %d peers route", may)
			}
			if drift := w.inspect(r).Drift; (len(drift) > 0) != closes {
				t.Errorf("drift %v", drift)
			}
		})
	}
}

// deaf fails its first requests, as often as times says.
type deaf struct {
	netlinkConn
	times *int
}

func (d deaf) Execute(m mdlayher.Message) ([]mdlayher.Message, error) {
	if *d.times > 0 {
		*d.times--
		return nil, unix.ENOBUFS
	}
	return d.netlinkConn.Execute(m)
}

// TestLoadThatCantBeRead has reading the rules back fail after a load: it is repeated,
// and unread rules don't count as loaded.
func TestLoadThatCantBeRead(t *testing.T) {
	for failures, closes := range map[int]bool{1: false, maxLoads - 1: false, 3 * maxLoads: true} {
		t.Run(strconv.Itoa(failures), func(t *testing.T) {
			w := newWorld(t)
			w.open()
			defer w.close()
			w.enforce(meshOf(grants{ann: all}))
			times := failures
			w.p.filter.sock = deaf{w.p.filter.sock, &times}
			r, err := w.loadAll(meshOf(grants{ann: all, bob: all}))
			if (err != nil) != closes {
				t.Fatalf("enforced: %v", err)
			}
			if closes {
				if w.p.filter.loaded != nil {
					t.Error("a table that couldn't be read counts as loaded")
				}
				times = 0
				w.do(func() error { _, err := w.round(meshOf(grants{})); return err })
			} else if drift := w.inspect(r).Drift; len(drift) > 0 {
				t.Errorf("drift %v", drift)
			}
		})
	}
}

// TestTableOfAnotherVersion finds a table with our name but without our sets, as another
// version may have left it: it is replaced.
func TestTableOfAnotherVersion(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: all}))
	if err := w.change(func(c *nftables.Conn) {
		c.DelTable(ourTable())
		c.AddTable(ourTable())
	})(); err != nil {
		t.Fatal(err)
	}
	r := w.enforce(meshOf(grants{ann: all, bob: all}))
	if drift := w.inspect(r).Drift; len(drift) > 0 {
		t.Errorf("drift %v", drift)
	}
}
