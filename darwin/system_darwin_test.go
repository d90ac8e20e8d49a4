package darwin

import (
	"net"
	"testing"

	"golang.org/x/net/route"
	"golang.org/x/sys/unix"
)

// TestObserveThisMac compares Observe with package net on this Mac.
func TestObserveThisMac(t *testing.T) {
	n, err := Observe(System{})
	if err != nil {
		t.Fatal(err)
	}
	list, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		got := n.Interface(i.Name)
		if got == nil || got.Index != i.Index || got.MTU != i.MTU {
			t.Errorf("interface %+v, want %+v", got, i)
		}
	}
	lo := n.Interface("lo0")
	if lo == nil || lo.Flags&InterfaceLoopback == 0 || len(lo.Addresses) == 0 {
		t.Errorf("loopback %+v", lo)
	}
}

func TestParseRoutesAgreesWithXNet(t *testing.T) {
	b, err := System{}.Routes()
	if err != nil {
		t.Fatal(err)
	}
	messages, err := route.ParseRIB(route.RIBType(unix.NET_RT_IFLIST2), b)
	if err != nil {
		t.Fatal(err)
	}
	want := 0
	for _, m := range messages {
		r, ok := m.(*route.RouteMessage)
		if !ok || len(r.Addrs) == 0 {
			continue
		}
		switch r.Addrs[0].(type) {
		case *route.Inet4Addr, *route.Inet6Addr:
			want++
		}
	}
	routes, err := ParseRoutes(b)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(routes); got == 0 || got > want || got < want-want/10 {
		t.Errorf("%d routes, x/net reads %d", got, want)
	}
}

func TestSysctlOfThisMac(t *testing.T) {
	s := NewSysctl(Exec{}, System{})
	if id, err := s.BootSession(); err != nil || len(id) != 36 {
		t.Errorf("boot session %q, %v", id, err)
	}
	for _, f := range []Family{IPv4, IPv6} {
		if _, err := s.Forwarding(f); err != nil {
			t.Error(err)
		}
	}
}

func TestRouteSocketCloses(t *testing.T) {
	conn, err := System{}.OpenRoute()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := conn.Read(make([]byte, 2048))
		done <- err
	}()
	conn.Close()
	<-done // an error, or a message that arrived before the close
}
