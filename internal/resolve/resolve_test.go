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
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/learned"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// dns is a name server and the endpoints that are looked up at it.
type dns struct {
	*Resolver
	book *learned.Book

	mu      sync.Mutex
	peers   []string
	own     string
	answers map[string][]netip.Addr // a name that isn't in it fails, one without addresses hangs
	took    time.Duration           // by a look-up that doesn't hang
	asked   map[string]int
	named   int // calls of Names
	changed int
	saved   int
}

// device is this host's address in the mesh.
var device = netip.MustParseAddr("100.64.0.1")

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
				d.named++
				return slices.Clone(d.peers), d.own
			},
			Mesh: mesh.DefaultPrefixes(), Device: func(a netip.Addr) bool { return a == device },
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
	found, took := slices.Clone(found), d.took
	d.mu.Unlock()
	time.Sleep(took)
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

// TestManyNames has a large mesh whose names all get other addresses in each pass: the names are
// asked for only when they change, and the addresses are published many at a time. All are kept,
// and are looked up each minute.
func TestManyNames(t *testing.T) {
	const names = 2000
	for _, took := range []time.Duration{0, 10 * time.Millisecond} {
		run(t, func(t *testing.T, d *dns) {
			pass := func(pass int) {
				for i := range names {
					d.answers[fmt.Sprint("host", i)] = []netip.Addr{netip.AddrFrom4([4]byte{192, byte(pass), byte(i >> 8), byte(i)})}
				}
			}
			d.set(func() {
				d.took = took
				for i := range names {
					d.peers = append(d.peers, fmt.Sprint("host", i))
				}
				pass(0)
			})
			before := d.named
			for i := range 4 {
				time.Sleep(Interval - time.Second)
				synctest.Wait()
				book := d.book.Names()
				for j := range names {
					if got := book[fmt.Sprint("host", j)]; got.As4() != [4]byte{192, byte(i), byte(j >> 8), byte(j)} {
						t.Fatalf("pass %d, look-ups of %v: host%d is at %v", i, took, j, got)
					}
				}
				d.mu.Lock()
				pass(i + 1)
				d.mu.Unlock()
				time.Sleep(time.Second)
			}
			synctest.Wait()
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.named != before {
				t.Errorf("look-ups of %v: the names were asked for %d times", took, d.named-before)
			}
			if d.changed > 4*3 { // the first, and one or two a pass, which takes 0.6 s at most
				t.Errorf("look-ups of %v: %d changes", took, d.changed)
			}
			for name, n := range d.asked {
				if n < 4 || n > 5 {
					t.Errorf("look-ups of %v: %s was looked up %d times in four minutes", took, name, n)
				}
			}
		})
	}
}

// TestSmallMeshIsFoundAtOnce has three names found one after another: none waits for long.
func TestSmallMeshIsFoundAtOnce(t *testing.T) {
	run(t, func(t *testing.T, d *dns) {
		d.set(func() {
			d.peers = []string{"nas", "mac", "phone"}
			for i, name := range d.peers {
				d.answers[name] = []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})}
			}
		})
		if got := d.book.Names(); len(got) == 0 {
			t.Error("the first isn't found at once")
		}
		time.Sleep(10 * time.Millisecond)
		synctest.Wait()
		if got := d.book.Names(); len(got) != 3 {
			t.Errorf("after 10 ms: %v", got)
		}
	})
}

// TestForgetsWhileItLooks takes a name away while it is looked up, and brings it back: the
// answer to the former look-up doesn't count.
func TestForgetsWhileItLooks(t *testing.T) {
	run(t, func(t *testing.T, d *dns) {
		d.set(func() { d.took, d.peers, d.answers["nas"] = time.Second, []string{"nas"}, addrs("192.0.2.1") })
		time.Sleep(time.Second / 2)
		d.set(func() { d.peers = nil })
		d.set(func() { d.peers, d.answers["nas"] = []string{"nas"}, addrs("192.0.2.2") })
		time.Sleep(time.Second * 3 / 4)
		synctest.Wait()
		if got := d.book.Names(); len(got) != 0 {
			t.Errorf("the former look-up found %v", got)
		}
		time.Sleep(3 * Interval)
		synctest.Wait()
		if got := d.book.Names()["nas"]; got.String() != "192.0.2.2" {
			t.Errorf("found %v", got)
		}
		if n := d.asked["nas"]; n != 1+3 {
			t.Errorf("looked up %d times", n)
		}
	})
}

// TestRefusesAddresses has names resolve to what can't be the address of a host on the network:
// it is neither a peer's nor this host's, and if there is nothing else, the name counts as not
// found.
func TestRefusesAddresses(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer []netip.Addr
		want   string // the address, or why there is none
	}{
		{"multicast first", addrs("224.0.0.251", "198.51.100.9"), "198.51.100.9"},
		{"multicast", addrs("224.0.0.251", "ff02::fb"), "224.0.0.251 is not the address of a host"},
		{"unspecified", addrs("0.0.0.0", "::"), "0.0.0.0 is not the address of a host"},
		{"broadcast, mapped", addrs("::ffff:255.255.255.255"), "255.255.255.255 is not the address of a host"},
		{"loopback", addrs("127.0.1.1"), "127.0.1.1 is a loopback address"},
		{"loopback, IPv6", addrs("::1"), "::1 is a loopback address"},
		{"loopback, mapped", addrs("::ffff:127.0.0.1"), "127.0.0.1 is a loopback address"},
		{"link-local", addrs("fe80::1%eth0"), "fe80::1 is a link-local address"},
		{"link-local, IPv4, which has no zones", addrs("169.254.1.2"), "169.254.1.2"},
		{"a mesh address", []netip.Addr{device}, "100.64.0.1 is an address in the mesh"},
		{"a carrier's", addrs("100.90.5.2"), "100.90.5.2"},
		{"a carrier's first", addrs("100.90.5.2", "100.64.0.1", "198.51.100.9"), "198.51.100.9"},
	} {
		for _, own := range []bool{false, true} {
			run(t, func(t *testing.T, d *dns) {
				d.set(func() {
					if d.answers["nas"] = c.answer; own {
						d.own = "nas"
					} else {
						d.peers = []string{"nas"}
					}
				})
				got, failure := d.book.Names()["nas"], d.Failure("nas")
				if got.IsValid() {
					if got.String() != c.want || failure != nil {
						t.Errorf("%s, own %v: %v, %v; want %s", c.name, own, got, failure, c.want)
					}
				} else if failure == nil || !strings.Contains(failure.Error(), c.want) {
					t.Errorf("%s, own %v: %v, want %s", c.name, own, failure, c.want)
				}
				outside := d.book.Outside().Addresses
				if slices.Contains(outside, got) != (own && got.IsValid()) {
					t.Errorf("%s, own %v: outside %v", c.name, own, outside)
				}
				for _, a := range outside {
					if a.IsMulticast() || a == device {
						t.Errorf("%s: outside %v", c.name, outside)
					}
				}
			})
		}
	}
}

// TestRefusesSavedAddress has an address saved that no answer would bring: it isn't used.
func TestRefusesSavedAddress(t *testing.T) {
	run(t, func(t *testing.T, d *dns) {
		synctest.Wait() // until names that no peer has are forgotten
		d.book.SetNames(map[string]netip.Addr{"nas": netip.MustParseAddr("224.0.0.251"), "mac": netip.MustParseAddr("192.0.2.1")})
		d.set(func() { d.peers = []string{"nas", "mac"} })
		d.set(func() { d.peers = append(d.peers, "new"); d.answers["new"] = addrs("192.0.2.2") })
		if got := d.book.Names(); len(got) != 2 || got["mac"].String() != "192.0.2.1" {
			t.Errorf("%v", got)
		}
	})
}

// BenchmarkManyNames looks all names of a large mesh up once, with other addresses each time,
// the endpoints parsed as the daemon does.
func BenchmarkManyNames(b *testing.B) {
	for _, names := range []int{500, 2000, 5000} {
		b.Run(fmt.Sprint(names), func(b *testing.B) {
			endpoints := make([]string, names)
			for i := range endpoints {
				endpoints[i] = fmt.Sprintf("host%d.example:51820", i)
			}
			for b.Loop() {
				book, err := learned.Open(filepath.Join(b.TempDir(), "learned.json"))
				if err != nil {
					b.Fatal(err)
				}
				var asked atomic.Uint32
				all := make(chan struct{})
				r := New(Options{
					Names: func() (peers []string, own string) {
						for _, text := range endpoints {
							if e, err := mesh.ParseEndpoint(text, 0); err == nil {
								peers = append(peers, e.Name())
							}
						}
						return peers, ""
					},
					Learned: book, Logger: slog.New(slog.DiscardHandler),
					Mesh: mesh.DefaultPrefixes(), Device: func(netip.Addr) bool { return false },
					Changed: func() {}, Save: func() {},
					Lookup: func(context.Context, string) ([]netip.Addr, error) {
						n := asked.Add(1)
						if int(n) == names {
							close(all)
						}
						return []netip.Addr{netip.AddrFrom4([4]byte{192, byte(n >> 16), byte(n >> 8), byte(n)})}, nil
					},
				})
				ctx, cancel := context.WithCancel(b.Context())
				ended := make(chan error, 1)
				go func() { ended <- r.Run(ctx) }()
				<-all
				cancel()
				if err := <-ended; err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
