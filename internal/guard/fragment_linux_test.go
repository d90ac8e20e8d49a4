package guard

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// pieces returns how many datagrams the host's kernel is putting together, and how
// many bytes they take (FRAG in /proc/net/sockstat, FRAG6 in sockstat6).
func (b *kernelHost) pieces(t testing.TB) (datagrams, bytes int) {
	t.Helper()
	err := b.Do(func() error {
		for _, file := range []string{"/proc/thread-self/net/sockstat", "/proc/thread-self/net/sockstat6"} {
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(text)) {
				var name string
				var n, size int
				if got, _ := fmt.Sscanf(line, "%s inuse %d memory %d", &name, &n, &size); got == 3 && strings.HasPrefix(name, "FRAG") {
					datagrams, bytes = datagrams+n, bytes+size
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return datagrams, bytes
}

// received reports whether a socket gets a datagram of a size before long.
func received(t testing.TB, c *net.UDPConn, size int, wait time.Duration) bool {
	t.Helper()
	buf := make([]byte, 1<<16)
	_ = c.SetReadDeadline(time.Now().Add(wait))
	n, _, err := c.ReadFromUDPAddrPort(buf)
	return err == nil && n == size
}

// TestKernelPutsTogether has C send first fragments, and datagrams whose last part is
// missing, as fast as it can. The kernel goes on putting together what another peer
// sends, and what the host gets from its LAN; and it has no more of C's than C's share.
// Without the guard it puts together nothing of anyone's.
func TestKernelPutsTogether(t *testing.T) {
	const share = 1 << 20
	for _, guarded := range []bool{true, false} {
		for _, tt := range []struct {
			about             string
			bad, peer, own    netip.Addr
			neighbour, onHost string
		}{
			{"IPv4", flowtest.PeerC4, flowtest.PeerA4, flowtest.HostB4, "192.168.77.20:0", "192.168.77.1:7001"},
			{"IPv6", flowtest.PeerC6, flowtest.PeerA6, flowtest.HostB6, "[2001:db8:77::20]:0", "[2001:db8:77::1]:7001"},
		} {
			b := newKernelHost(t)
			b.guard.Set(flowtest.Picture(t, mesh.Incoming))
			write := func(p []byte) {
				if guarded {
					b.write(t, p)
				} else if _, err := b.inner.Write([][]byte{append(make([]byte, offset), p...)}, offset); err != nil {
					t.Fatal(err)
				}
			}
			ofPeer, ofLAN := b.listen(t, at(tt.own, 7000)), b.listen(t, netip.MustParseAddrPort(tt.onHost))
			var neighbour *net.UDPConn
			if err := b.beyond["en5"].Do(func() (err error) {
				neighbour, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(tt.neighbour)))
				return err
			}); err != nil {
				t.Fatal(err)
			}
			defer neighbour.Close()
			// More than the 4 MB that the kernel has for a family, twice.
			flood := flowtest.Datagram(at(tt.bad, 9), at(tt.own, 7000), 60000)
			for id := range uint32(100) {
				pieces := flowtest.Fragments(flood, 10_000+id, 1376)
				for _, p := range pieces[:len(pieces)-1] {
					write(p)
				}
			}
			for id := range uint32(4000) {
				write(flowtest.Fragments(flood, id, 1376)[0])
			}
			n, bytes := b.pieces(t)
			t.Logf("guarded %v, %s: %d datagrams, %d bytes", guarded, tt.about, n, bytes)
			if guarded && bytes > share {
				t.Errorf("%s: the kernel has %d bytes of C, more than %d", tt.about, bytes, share)
			}
			const size = 5000
			wait := patience
			if !guarded {
				wait = 200 * time.Millisecond
			}
			for _, p := range flowtest.Fragments(flowtest.Datagram(at(tt.peer, 9), at(tt.own, 7000), size), 1, 1376) {
				write(p)
			}
			if got := received(t, ofPeer, size, wait); got != guarded {
				t.Errorf("guarded %v, %s: another peer's datagram arrives: %v", guarded, tt.about, got)
			}
			if _, err := neighbour.WriteToUDPAddrPort(make([]byte, size), netip.MustParseAddrPort(tt.onHost)); err != nil {
				t.Fatal(err)
			}
			if got := received(t, ofLAN, size, wait); got != guarded {
				t.Errorf("guarded %v, %s: a neighbour's datagram arrives: %v", guarded, tt.about, got)
			}
		}
	}
}
