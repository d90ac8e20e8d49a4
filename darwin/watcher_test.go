package darwin_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/darwin/darwintest"
	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
)

// watch runs a watcher over k in a synctest bubble and returns the count of its reports.
func watch(t *testing.T, k darwin.Kernel) *atomic.Int32 {
	t.Helper()
	var n atomic.Int32
	w := darwin.NewWatcher(darwin.WatcherOptions{Kernel: k, Log: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- w.Run(ctx, func() { n.Add(1) }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	time.Sleep(10 * time.Second)
	if got := n.Swap(0); got != 1 {
		t.Errorf("%d reports once the watcher listens, want 1 for earlier events", got)
	}
	return &n
}

// TestWatcherReportsFirstAtOnceAndThenTheBurst checks that the first event is reported at
// once, and the events right after it in one report.
func TestWatcherReportsFirstAtOnceAndThenTheBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newLaptop(t)
		n := watch(t, k)
		if err := k.AddAddress("en0", netip.MustParsePrefix("192.0.2.9/24")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if got := n.Load(); got != 1 {
			t.Errorf("%d reports at once, want 1", got)
		}
		for n := range byte(5) {
			time.Sleep(50 * time.Millisecond)
			if err := k.AddAddress("en0", netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, 10 + n}), 24)); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if got := n.Load(); got != 1 {
			t.Errorf("%d reports in the burst, want 1", got)
		}
		time.Sleep(300 * time.Millisecond)
		if got := n.Load(); got != 2 {
			t.Errorf("%d reports after the burst, want 2", got)
		}
		time.Sleep(time.Hour)
		if got := n.Load(); got != 2 {
			t.Errorf("%d reports during the quiet hour, want 2", got)
		}
	})
}

// TestWatcherDoesNotWaitForEver has events arrive without a pause: they are still
// reported about once a second.
func TestWatcherDoesNotWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newLaptop(t)
		n := watch(t, k)
		for range 100 {
			k.Announce(xnu.InterfaceMessage(xnu.RTMIfInfo, xnu.SizeIf, xnu.Interface{Name: "en0", Index: 2}))
			time.Sleep(100 * time.Millisecond)
		}
		if got := n.Load(); got < 9 || got > 25 {
			t.Errorf("%d reports in 10 s without quiet, want one or two a second", got)
		}
	})
}

// TestWatcherIgnoresTraffic announces routing messages of ordinary traffic and malformed
// ones: none is reported.
func TestWatcherIgnoresTraffic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newLaptop(t)
		n := watch(t, k)
		route := darwin.Route{Dst: netip.MustParsePrefix("192.0.2.7/32"), Index: 2, Flags: darwin.RouteUp | darwin.RouteHost}
		for _, f := range []darwin.RouteFlags{darwin.RouteLLInfo, darwin.RouteCloned} {
			noise := route
			noise.Flags |= f
			k.Announce(darwin.AppendRoute(nil, xnu.RTMAdd, 0, noise))
		}
		for _, odd := range [][]byte{
			darwin.AppendRoute(nil, xnu.RTMMiss, 0, route), nil, {1}, {4, 0, 5}, {4, 0, xnu.RTMVersion, 99}, {4, 0, 4, xnu.RTMIfInfo}, make([]byte, 3000),
		} {
			k.Announce(odd)
		}
		time.Sleep(time.Minute)
		if got := n.Load(); got != 0 {
			t.Errorf("%d reports, want none", got)
		}
		k.Announce([]byte{8, 0, xnu.RTMVersion, xnu.RTMDelete}) // truncated: one unnecessary report
		synctest.Wait()
		if got := n.Load(); got != 1 {
			t.Errorf("%d reports of a truncated message, want 1", got)
		}
	})
}

// TestWatcherIgnoresTheSystem announces what goes on on an idle Mac: peer-to-peer Wi-Fi,
// the system's tunnels with their link-local addresses, and storms of failed route
// lookups. None of it is reported.
func TestWatcherIgnoresTheSystem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newLaptop(t)
		awdl := k.AddInterface("awdl1", darwin.InterfaceUp|darwin.InterfaceBroadcast, 1500)
		n := watch(t, k)
		for round := range byte(30) {
			a := netip.MustParsePrefix("fe80::77/64")
			if err := k.AddAddress("awdl1", a); err != nil {
				t.Fatal(err)
			}
			k.Announce(xnu.InterfaceMessage(xnu.RTMIfInfo, xnu.SizeIf, xnu.Interface{Name: "awdl1", Index: awdl}))
			name, err := k.CreateTunnel("utun", 1380)
			if err != nil {
				t.Fatal(err)
			}
			if err := k.AddAddress(name, a); err != nil {
				t.Fatal(err)
			}
			if err := k.AddRoute(darwin.Route{Dst: netip.MustParsePrefix("::/0"), Gateway: netip.MustParseAddr("fe80::"),
				Index: observe(t, k).Interface(name).Index, Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteScoped}); err != nil {
				t.Fatal(err)
			}
			for range 20 {
				k.Miss(netip.AddrFrom4([4]byte{198, 51, 100, round}))
			}
			time.Sleep(time.Minute)
			if err := k.RemoveAddress("awdl1", a.Addr()); err != nil {
				t.Fatal(err)
			}
			k.RemoveInterface(name)
			time.Sleep(time.Minute)
		}
		if got := n.Load(); got != 0 {
			t.Errorf("%d reports, want none", got)
		}
		// An interface in use goes down, and a tunnel gets an address: both are reported.
		en0 := *observe(t, k).Interface("en0")
		en0.Flags &^= darwin.InterfaceUp
		k.Announce(xnu.InterfaceMessage(xnu.RTMIfInfo, xnu.SizeIf, wire(en0)))
		time.Sleep(time.Minute)
		if got := n.Load(); got != 1 {
			t.Errorf("%d reports after en0 went down, want 1", got)
		}
		newTunnel(t, k)
		time.Sleep(time.Minute)
		if got := n.Load(); got < 2 {
			t.Error("a tunnel with an address isn't reported")
		}
		k.RemoveInterface("utun31")
		time.Sleep(time.Minute)
		if got := n.Load(); got < 3 {
			t.Error("a removed tunnel isn't reported")
		}
	})
}

func TestWatcherSurvivesClosedSockets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newLaptop(t)
		n := watch(t, k)
		k.BreakSockets(syscall.ENOTCONN)
		time.Sleep(2 * time.Second)
		if got := n.Load(); got != 1 {
			t.Errorf("%d reports after a lost socket, want 1 for missed events", got)
		}
		k.RemoveInterface("en5")
		time.Sleep(2 * time.Second)
		if got := n.Load(); got < 2 {
			t.Error("no report from the second socket")
		}
	})
}

func TestWatcherSurvivesOverrun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := newLaptop(t)
		n := watch(t, k)
		for range 1000 {
			k.Announce([]byte{4, 0, xnu.RTMVersion, 99})
		}
		time.Sleep(time.Minute)
		if got := n.Load(); got == 0 {
			t.Error("an overrun isn't reported")
		}
	})
}

// noSockets is a kernel that can't open routing sockets for a while.
type noSockets struct {
	*darwintest.Kernel
	refuse int
}

func (k *noSockets) OpenRoute() (io.ReadWriteCloser, error) {
	if k.refuse--; k.refuse >= 0 {
		return nil, syscall.EMFILE
	}
	return k.Kernel.OpenRoute()
}

func TestWatcherWaitsForASocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k := &noSockets{newLaptop(t), 5}
		watch(t, k) // watch waits for the first report
	})
}
