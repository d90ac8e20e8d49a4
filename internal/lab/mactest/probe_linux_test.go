package mactest

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// fakePF stands for pf between a device and its network. Of a probe's rules it applies
// those of the kinds that it evaluates.
type fakePF struct {
	tun.Device
	evaluates map[string]bool

	mu    sync.Mutex
	rules string
}

func (f *fakePF) load(_ context.Context, rules string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = rules
	return nil
}

// matches parses the loaded rule, if it is of this kind and evaluated.
func (f *fakePF) matches(kind, form string, into ...any) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.evaluates[kind] || !strings.HasPrefix(f.rules, kind+" ") {
		return false
	}
	_, err := fmt.Sscanf(f.rules, form, into...)
	return err == nil
}

// Write takes a packet from the network.
func (f *fakePF) Write(bufs [][]byte, offset int) (int, error) {
	for i, b := range bufs {
		d, ok := parseDatagram(b[offset:])
		if !ok {
			continue
		}
		var from, to, target string
		var port, other uint16
		if f.matches("block", "block drop in quick on probe0 inet proto udp from %s to %s port %d", &from, &to, &port) && d.dst.Port() == port {
			return len(bufs), nil
		}
		if f.matches("rdr", "rdr on probe0 inet proto udp from %s to %s port %d -> %s port %d", &from, &to, &port, &target, &other) && d.dst.Port() == port {
			packet := flowtest.Datagram(d.src, netip.AddrPortFrom(d.dst.Addr(), other), 8)
			bufs[i] = append(make([]byte, offset), packet...)
		}
	}
	return f.Device.Write(bufs, offset)
}

// Read returns a packet to the network.
func (f *fakePF) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	n, err := f.Device.Read(bufs, sizes, offset)
	for i := range n {
		var from, to, target string
		if _, ok := parseDatagram(bufs[i][offset : offset+sizes[i]]); ok && f.matches("nat", "nat on probe0 inet proto udp from %s to %s -> %s", &from, &to, &target) {
			copy(bufs[i][offset+12:], netip.MustParseAddr(target).AsSlice())
			binary.BigEndian.PutUint16(bufs[i][offset+10:], 0)
		}
	}
	return n, err
}

// TestProbe checks that a probe finds out which kinds of rules are evaluated, none, one or
// all, with the sockets and the routing of a real kernel.
func TestProbe(t *testing.T) {
	if err := netlab.Unavailable(); err != nil {
		t.Skip("no host to try the probe on:", err)
	}
	lab, err := netlab.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Close(); err != nil {
			t.Error("close lab:", err)
		}
	})
	host, err := lab.Host("H")
	if err != nil {
		t.Fatal(err)
	}
	var dev tun.Device
	if err := host.Do(func() (err error) {
		dev, err = tun.CreateTUN("probe0", 1420)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	fake := &fakePF{Device: dev}
	p, err := NewProbe(fake)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	p.Load, p.Do, p.Own, p.Far = fake.load, host.Do, scratchOwn, scratchFar
	for _, err := range []error{
		host.SetUp("probe0", true), host.AddAddr("probe0", netip.PrefixFrom(p.Own, 32)),
		host.AddRoute(netlab.Route{To: netip.PrefixFrom(p.Far, 32), Link: "probe0"}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, evaluates := range []map[string]bool{
		{}, {"block": true}, {"nat": true}, {"rdr": true}, {"block": true, "nat": true, "rdr": true},
	} {
		fake.evaluates = evaluates
		for _, c := range []struct {
			kind string
			try  func(context.Context) (bool, error)
		}{{"block", p.Filter}, {"nat", p.NAT}, {"rdr", p.RDR}} {
			got, err := c.try(t.Context())
			if err != nil || got != evaluates[c.kind] {
				t.Errorf("with %v: %s is evaluated: %t, %v", evaluates, c.kind, got, err)
			}
		}
	}
}
