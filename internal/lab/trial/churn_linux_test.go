package trial

// A host whose addresses keep changing.

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestAddressesChange adds and removes addresses of a host that has a thousand, while a
// peer's flow runs through it: the helper doesn't close forwarding, repairs nothing, and
// the flow doesn't pause.
func TestAddressesChange(t *testing.T) {
	m := newMesh(t)
	permit(t, m, "C", mesh.Routing)
	const addresses, changes = 1000, 400
	address := func(i int) *netlink.Addr {
		a, err := netlink.ParseAddr(fmt.Sprintf("10.77.%d.%d/32", i>>8, i&255))
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	onB := func(f func(h *netlink.Handle, lan netlink.Link) error) {
		t.Helper()
		if err := m.B.Do(func() error {
			h, err := netlink.NewHandle()
			if err != nil {
				return err
			}
			defer h.Close()
			lan, err := h.LinkByName(netlab.LAN)
			if err != nil {
				return err
			}
			return f(h, lan)
		}); err != nil {
			t.Fatal(err)
		}
	}
	onB(func(h *netlink.Handle, lan netlink.Link) error {
		for i := range addresses {
			if err := h.AddrAdd(lan, address(i)); err != nil {
				return err
			}
		}
		return nil
	})
	f, err := m.Lab.Flow(netlab.FlowOptions{From: m.C, To: m.I, Addr: netlab.Addresses().I.V4, Proto: netlab.UDP, Every: 2 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Stop()
	if err := f.Wait(netlab.Back, 50, netlab.PassWait); err != nil {
		t.Fatal(err)
	}
	onB(func(h *netlink.Handle, lan netlink.Link) error {
		for i := range changes {
			if err := h.AddrAdd(lan, address(5000+i)); err != nil {
				return err
			}
			time.Sleep(5 * time.Millisecond)
			if err := h.AddrDel(lan, address(5000+i)); err != nil {
				return err
			}
		}
		return nil
	})
	had := len(f.Arrivals(netlab.Back))
	if err := f.Wait(netlab.Back, had+100, netlab.PassWait); err != nil {
		t.Fatal(err)
	}
	after := status(t, m)
	if after.State != "enforcing" || len(after.Problems) > 0 {
		t.Errorf("the state is %s, with the problems %v", after.State, after.Problems)
	}
	for line := range strings.Lines(do(t, m, "events").Stdout) {
		if strings.Contains(line, "problem") || strings.Contains(line, "repair") {
			t.Error(strings.TrimSpace(line))
		}
	}
	longest, arrived := time.Duration(0), f.Arrivals(netlab.Back)
	for i := 1; i < len(arrived); i++ {
		longest = max(longest, arrived[i].Received.Sub(arrived[i-1].Received))
	}
	t.Logf("%d answers, at most %v apart", len(arrived), longest)
	if longest > 3*time.Second {
		t.Errorf("the flow paused for %v", longest)
	}
}
