package linux

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestNetworkSendsIntoTheMesh sends from sockets on the host's mesh addresses to a peer,
// and receives its answer.
func TestNetworkSendsIntoTheMesh(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	g.enforce(meshOf(grants{ann: mesh.Incoming}))
	n := g.p.Host().Network
	for own, peer := range map[netip.Addr]netip.Addr{own4: ann4, own6: ann6} {
		to := netip.AddrPortFrom(peer, 5000)
		var dialled net.Conn
		var packets net.PacketConn
		g.do(func() (err error) {
			if dialled, err = n.Dial(t.Context(), "udp", to); err != nil {
				return err
			}
			packets, err = n.ListenPacket(t.Context(), netip.AddrPortFrom(own, 4000))
			return err
		})
		for how, write := range map[string]func([]byte) error{
			"dialled": func(b []byte) error { _, err := dialled.Write(b); return err },
			"packets": func(b []byte) error { _, err := packets.WriteTo(b, net.UDPAddrFromAddrPort(to)); return err },
		} {
			text := how + " to " + peer.String()
			if err := write([]byte(text)); err != nil {
				t.Errorf("%s: %v", text, err)
				continue
			}
			if p, ok := g.toMesh([]byte(text), 10*time.Second); !ok || p.Src != own || p.Dst != peer {
				t.Errorf("%s: %+v, %v", text, p, ok)
			}
		}
		// The peer's answer to the dialled connection.
		from := netip.MustParseAddrPort(dialled.LocalAddr().String())
		g.inject(netlab.UDPPacket(to, from, []byte("answer")))
		if err := dialled.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		if k, err := dialled.Read(b); err != nil || string(b[:k]) != "answer" {
			t.Errorf("read %q, %v", b[:k], err)
		}
		dialled.Close()
		packets.Close()
	}
}
