package trial

// The throughput of one TCP stream through the helper. Benchmarks only.

import (
	"io"
	"net"
	"net/netip"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// BenchmarkForwarding sends one TCP stream from C through B to I, through WireGuard, the
// helper's checks and NAT. Sender, both tunnels and receiver share the machine, so only
// the ratio of two runs is meaningful.
func BenchmarkForwarding(b *testing.B) {
	m := newMesh(b)
	permit(b, m, "C", mesh.Routing)
	for _, addr := range netlab.Addresses().I.List() {
		family := "IPv4"
		if addr.Is6() {
			family = "IPv6"
		}
		b.Run(family, func(b *testing.B) { stream(b, m.C, m.I, netip.AddrPortFrom(addr, 5001)) })
	}
}

// stream sends 1 MiB per iteration.
func stream(b *testing.B, from, to *netlab.Host, at netip.AddrPort) {
	var listener *net.TCPListener
	if err := to.Do(func() (err error) {
		listener, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		return err
	}); err != nil {
		b.Fatal(err)
	}
	defer listener.Close()
	var conn *net.TCPConn
	if err := from.Do(func() (err error) {
		conn, err = net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(at))
		return err
	}); err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	received, err := listener.AcceptTCP()
	if err != nil {
		b.Fatal(err)
	}
	defer received.Close()

	const chunk = 1 << 20
	b.SetBytes(chunk)
	var group errgroup.Group
	group.Go(func() error {
		_, err := io.CopyN(io.Discard, received, int64(b.N)*chunk)
		return err
	})
	block := make([]byte, chunk)
	b.ResetTimer()
	for range b.N {
		if _, err := conn.Write(block); err != nil {
			b.Fatal(err)
		}
	}
	if err := group.Wait(); err != nil {
		b.Fatal(err)
	}
}
