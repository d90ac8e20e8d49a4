package resolve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/learned"
)

// dns is a name server and the endpoints that are looked up at it.
type dns struct {
	*Resolver
	book *learned.Book

	mu      sync.Mutex
	peers   []string
	own     string
	answers map[string][]netip.Addr // a name that isn't in it fails, one without addresses hangs
	asked   map[string]int
	changed int
	saved   int
}

// run runs test beside a resolver, in a bubble with its own time.
func run(t *testing.T, test func(t *testing.T, d *dns)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		book, err := learned.Open(filepath.Join(t.TempDir(), "learned.json"))
		if err != nil {
			t.Fatal(err)
		}
		d := &dns{book: book, answers: map[string][]netip.Addr{}, asked: map[string]int{}}
		d.Resolver = New(Options{
			Names: func() ([]string, string) {
				d.mu.Lock()
				defer d.mu.Unlock()
				return slices.Clone(d.peers), d.own
			},
			Learned: book, Lookup: d.lookup, Logger: slog.New(slog.DiscardHandler),
			Changed: func() { d.count(&d.changed) }, Save: func() { d.count(&d.saved) },
		})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- d.Run(ctx) }()
		test(t, d)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func (d *dns) count(n *int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	*n++
}

func (d *dns) lookup(ctx context.Context, name string) ([]netip.Addr, error) {
	d.mu.Lock()
	d.asked[name]++
	found, known := d.answers[name]
	found = slices.Clone(found)
	d.mu.Unlock()
	switch {
	case !known:
		return nil, errors.New("no such host")
	case len(found) == 0:
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return found, nil
}

// set changes what is wanted and what the name server says, and has the resolver look.
func (d *dns) set(f func()) {
	d.mu.Lock()
	f()
	d.mu.Unlock()
	d.Renamed()
	synctest.Wait()
}

func addrs(texts ...string) (out []netip.Addr) {
	for _, text := range texts {
		out = append(out, netip.MustParseAddr(text))
	}
	return out
}

// TestFollowsAName has a name get another address, have two in changing order, and not be
// found: the address in use stays as long as the name has it, or isn't found.
func TestFollowsAName(t *testing.T) {
	run(t, func(t *testing.T, d *dns) {
		want := func(when, address string) {
			t.Helper()
			if got := d.book.Names()["nas"]; got.String() != address {
				t.Errorf("%s: %v, want %s", when, got, address)
			}
		}
		d.set(func() { d.peers, d.answers["nas"] = []string{"nas"}, addrs("::ffff:192.0.2.1") })
		want("at first", "192.0.2.1")
		step := func(answer []netip.Addr) {
			d.set(func() { d.answers["nas"] = answer })
			time.Sleep(Interval + time.Second)
			synctest.Wait()
		}
		step(addrs("192.0.2.2", "192.0.2.1"))
		want("with another before it", "192.0.2.1")
		step(addrs("192.0.2.2"))
		want("without it", "192.0.2.2")
		d.set(func() { delete(d.answers, "nas") })
		time.Sleep(10 * Interval)
		synctest.Wait()
		want("not found", "192.0.2.2")
		if err := d.Failure("nas"); err == nil || !strings.Contains(err.Error(), "no such host") {
			t.Errorf("why it isn't found: %v", err)
		}
		if n := d.asked["nas"]; n < 6 || n > 20 {
			t.Errorf("asked %d times in some 13 minutes", n)
		}
		d.set(func() { d.peers = nil })
		if got := d.book.Names(); len(got) != 0 || d.Failure("nas") != nil {
			t.Errorf("of a name that no peer has, %v and %v stay", got, d.Failure("nas"))
		}
		if d.changed != 3 { // found, another address, forgotten
			t.Errorf("%d changes", d.changed)
		}
	})
}

// TestStuckNamesHoldUpNone has more names hang than are looked up at once: one that
// was found before is followed meanwhile, and a new one is found at once when each of them
// failed.
func TestStuckNamesHoldUpNone(t *testing.T) {
	run(t, func(t *testing.T, d *dns) {
		d.set(func() { d.peers, d.answers["nas"] = []string{"nas"}, addrs("192.0.2.1") })
		d.set(func() {
			for i := range 20 * lane { // more than can be tried again before the first is due
				name := fmt.Sprint("stuck", i)
				d.peers, d.answers[name] = append(d.peers, name), nil
			}
			d.answers["nas"] = addrs("192.0.2.9")
		})
		time.Sleep(20*timeout + Interval + time.Second) // each has failed once
		synctest.Wait()
		if got := d.book.Names()["nas"]; got.String() != "192.0.2.9" {
			t.Errorf("beside names that hang: %v", got)
		}
		d.set(func() { d.peers, d.answers["new"] = append(d.peers, "new"), addrs("192.0.2.3") })
		if got := d.book.Names()["new"]; got.String() != "192.0.2.3" {
			t.Errorf("a new name beside names that hang: %v", got)
		}
	})
}

// TestOwnName has this host's own name have many addresses: all of them count, and are
// saved at once. One that was a peer's name until then is asked for again.
func TestOwnName(t *testing.T) {
	run(t, func(t *testing.T, d *dns) {
		d.set(func() { d.peers, d.answers["home"] = []string{"home"}, addrs("192.0.2.2", "192.0.2.1") })
		if o := d.book.Outside(); o.Name != "" {
			t.Errorf("a peer's name is outside: %+v", o)
		}
		d.set(func() { d.own = "home" })
		if o := d.book.Outside(); o.Name != "home" || !slices.Equal(o.Addresses, addrs("192.0.2.1", "192.0.2.2")) || d.saved == 0 {
			t.Errorf("%+v, saved %d times", o, d.saved)
		}
		d.set(func() { d.own = "" })
		if o := d.book.Outside(); o.Name != "" || len(o.Addresses) != 0 {
			t.Errorf("without a name: %+v", o)
		}
	})
}
