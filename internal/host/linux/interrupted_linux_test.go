package linux

import (
	"fmt"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// TestObserveWhileTheHostChanges observes a host with a thousand addresses while another
// program adds and removes some, which interrupts the kernel's dumps: no call fails, and
// nothing of ours counts as changed.
func TestObserveWhileTheHostChanges(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	w.enforce(meshOf(grants{ann: all, bob: all}))
	const addresses, changes = 1000, 400
	batch := func(h *netlink.Handle, from, n int, do func(netlink.Link, *netlink.Addr) error) error {
		link, err := h.LinkByName(netlab.LAN)
		if err != nil {
			return err
		}
		for i := range n {
			a, err := netlink.ParseAddr(fmt.Sprintf("10.77.%d.%d/32", (from+i)>>8, (from+i)&255))
			if err != nil {
				return err
			}
			if err := do(link, a); err != nil {
				return err
			}
		}
		return nil
	}
	onB := func(f func(h *netlink.Handle) error) error {
		return w.pic.B.Do(func() error {
			h, err := netlink.NewHandle()
			if err != nil {
				return err
			}
			defer h.Close()
			return f(h)
		})
	}
	if err := onB(func(h *netlink.Handle) error { return batch(h, 0, addresses, h.AddrAdd) }); err != nil {
		t.Fatal(err)
	}
	r := w.enforce(meshOf(grants{ann: all, bob: all}))
	done := make(chan struct{})
	var g errgroup.Group
	g.Go(func() error {
		defer close(done)
		return onB(func(h *netlink.Handle) error {
			for i := range changes {
				if err := batch(h, 5000+i, 1, h.AddrAdd); err != nil {
					return err
				}
				time.Sleep(time.Millisecond)
				if err := batch(h, 5000+i, 1, h.AddrDel); err != nil {
					return err
				}
			}
			return nil
		})
	})
	looks := 0
	for going := true; going; looks++ {
		select {
		case <-done:
			going = false
		default:
		}
		if _, err := w.p.Observe(t.Context()); err != nil {
			t.Errorf("look %d: observe: %v", looks, err)
		}
		report, err := w.p.Inspect(t.Context(), r)
		if err != nil {
			t.Errorf("look %d: inspect: %v", looks, err)
		}
		if len(report.Drift) > 0 {
			t.Errorf("look %d: drift %v", looks, report.Drift)
		}
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if looks < 10 {
		t.Errorf("only %d looks: nothing is proved", looks)
	}
	t.Logf("%d looks during %d changes", looks, 2*changes)
}
