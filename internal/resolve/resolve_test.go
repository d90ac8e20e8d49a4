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

// dns is a resolver under test with a fake name server, and the names of peers and of this
// host that the resolver looks up there.
type dns struct {
	*Resolver
	book *learned.Book

	mu      sync.Mutex
	peers   []string
	own     string
	answers map[string][]netip.Addr // the lookup of a missing name fails, of one without addresses hangs
	took    time.Duration           // duration of a lookup that doesn't hang
	asked   map[string]int
	named   int // calls of Names
	changed int
	saved   int
}

// device is the mesh address of this host.
var device = netip.MustParseAddr("100.64.0.1")

// run runs a resolver and test in a synctest bubble, where time is simulated.
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

// set changes the names or the answers of the name server by f, has the resolver ask for the
// names, and waits until it is idle or sleeps.
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

// TestFollowsAName has a name that gets a second address before its first one, loses the
// first, and isn't found any more. The address in use stays as long as the name has it, and
// while the name isn't found.
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
		want("with another address before it", "192.0.2.1")
		step(addrs("192.0.2.2"))
		want("without the former address", "192.0.2.2")
		d.set(func() { delete(d.answers, "nas") })
		time.Sleep(10 * Interval)
		synctest.Wait()
		want("not found", "192.0.2.2")
		if err := d.Failure("nas"); err == nil || !strings.Contains(err.Error(), "no such host") {
			t.Errorf("Failure of a name that isn't found: %v", err)
		}
		if n := d.asked["nas"]; n < 6 || n > 20 {
			t.Errorf("%d lookups in about 13 minutes, want 6 to 20", n)
		}
		d.set(func() { d.peers = nil })
		if got := d.book.Names(); len(got) != 0 || d.Failure("nas") != nil {
			t.Errorf("for a name that no peer has, addresses %v and failure %v are left", got, d.Failure("nas"))
		}
		if d.changed != 3 { // found, got another address, removed
			t.Errorf("%d changes, want 3", d.changed)
		}
	})
}

// TestStuckNamesHoldUpNone has more names whose lookups hang than are looked up at a time. A
// name that was found before is still followed, and once each of the others has failed, a
// new name is found at once.
func TestStuckNamesHoldUpNone(t *testing.T) {
	run(t, func(t *testing.T, d *dns) {
		d.set(func() { d.peers, d.answers["nas"] = []string{"nas"}, addrs("192.0.2.1") })
		d.set(func() {
			for i := range 20 * lane { // too many to retry all before the first is due again
				name := fmt.Sprint("stuck", i)
				d.peers, d.answers[name] = append(d.peers, name), nil
			}
			d.answers["nas"] = addrs("192.0.2.9")
		})
		time.Sleep(20*timeout + Interval + time.Second) // by now each lookup has failed once
		synctest.Wait()
		if got := d.book.Names()["nas"]; got.String() != "192.0.2.9" {
			t.Errorf("while other lookups hang, nas has the address %v", got)
		}
		d.set(func() { d.peers, d.answers["new"] = append(d.peers, "new"), addrs("192.0.2.3") })
		if got := d.book.Names()["new"]; got.String() != "192.0.2.3" {
			t.Errorf("while other lookups hang, the new name has the address %v", got)
		}
	})
}

// TestOwnName has an own name of this host with several addresses: all are kept as outside
// addresses, and are saved at once. A name that was a peer's before is looked up again.
func TestOwnName(t *testing.T) {
	run(t, func(t *testing.T, d *dns) {
		d.set(func() { d.peers, d.answers["home"] = []string{"home"}, addrs("192.0.2.2", "192.0.2.1") })
		if o := d.book.Outside(); o.Name != "" {
			t.Errorf("a peer's name gives outside addresses: %+v", o)
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

// TestManyNames has a large mesh whose names all get other addresses in each pass. Each name is
// looked up once a minute, all addresses are kept and published many at a time, and Names is
// called only when the names change.
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
						t.Fatalf("pass %d, lookups of %v: host%d has the address %v", i, took, j, got)
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
				t.Errorf("lookups of %v: Names was called %d times, want none", took, d.named-before)
			}
			if d.changed > 4*3 { // one or two changes a pass, which takes 0.6 s at most
				t.Errorf("lookups of %v: %d changes, want at most 12", took, d.changed)
			}
			for name, n := range d.asked {
				if n < 4 || n > 5 {
					t.Errorf("lookups of %v: %s was looked up %d times in four minutes, want 4 or 5", took, name, n)
				}
			}
		})
	}
}

// TestSmallMeshIsFoundAtOnce has three names: one is found and published at once, and all
// within 10 ms.
func TestSmallMeshIsFoundAtOnce(t *testing.T) {
	run(t, func(t *testing.T, d *dns) {
		d.set(func() {
			d.peers = []string{"nas", "mac", "phone"}
			for i, name := range d.peers {
				d.answers[name] = []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})}
			}
		})
		if got := d.book.Names(); len(got) == 0 {
			t.Error("no name is found at once")
		}
		time.Sleep(10 * time.Millisecond)
		synctest.Wait()
		if got := d.book.Names(); len(got) != 3 {
			t.Errorf("after 10 ms: %v, want three names", got)
		}
	})
}

// TestForgetsWhileItLooks removes a name during its lookup, and adds it again: the answer to
// the former lookup is dropped.
func TestForgetsWhileItLooks(t *testing.T) {
	run(t, func(t *testing.T, d *dns) {
		d.set(func() { d.took, d.peers, d.answers["nas"] = time.Second, []string{"nas"}, addrs("192.0.2.1") })
		time.Sleep(time.Second / 2)
		d.set(func() { d.peers = nil })
		d.set(func() { d.peers, d.answers["nas"] = []string{"nas"}, addrs("192.0.2.2") })
		time.Sleep(time.Second * 3 / 4)
		synctest.Wait()
		if got := d.book.Names(); len(got) != 0 {
			t.Errorf("the former lookup gave %v", got)
		}
		time.Sleep(3 * Interval)
		synctest.Wait()
		if got := d.book.Names()["nas"]; got.String() != "192.0.2.2" {
			t.Errorf("found %v, want 192.0.2.2", got)
		}
		if n := d.asked["nas"]; n != 1+3 {
			t.Errorf("looked up %d times, want 4", n)
		}
	})
}

// TestRefusesAddresses has names resolve to addresses that no host on the network can have.
// They are used neither for a peer nor for this host, and a name with such addresses only
// counts as not found.
func TestRefusesAddresses(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer []netip.Addr
		want   string // the address, or the error if there is none
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

// TestRefusesSavedAddress has a saved address that would be refused in an answer: it isn't
// used.
func TestRefusesSavedAddress(t *testing.T) {
	run(t, func(t *testing.T, d *dns) {
		synctest.Wait() // until the resolver has dropped names that no peer has
		d.book.SetNames(map[string]netip.Addr{"nas": netip.MustParseAddr("224.0.0.251"), "mac": netip.MustParseAddr("192.0.2.1")})
		d.set(func() { d.peers = []string{"nas", "mac"} })
		d.set(func() { d.peers = append(d.peers, "new"); d.answers["new"] = addrs("192.0.2.2") })
		if got := d.book.Names(); len(got) != 2 || got["mac"].String() != "192.0.2.1" {
			t.Errorf("the names have the addresses %v, want those of mac and new only", got)
		}
	})
}

// BenchmarkManyNames looks up all names of a large mesh once per iteration, each time with
// other addresses, and parses the endpoints as the daemon does.
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
