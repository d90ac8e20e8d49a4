package hosttest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// answerTime bounds the wait for packets and errors that must come.
const answerTime = 10 * time.Second

// sockets sends packets of a peer, a neighbour and the computer itself to sockets on the
// computer's mesh addresses: only the peer's may arrive. The sockets must be closed with
// the mesh interface, which the returned function checks.
func sockets(c *trial, r *policy.Ruleset) (wait func()) {
	ctx := context.Background()
	ended := make(chan error, 2*len(c.Interface.Addresses))
	n, iface := c.host.Network, r.Host().Interface
	for i, own := range c.Interface.Addresses {
		var packets net.PacketConn
		var listener net.Listener
		c.must(c.Sockets(func() (err error) {
			if packets, err = n.ListenPacket(ctx, netip.AddrPortFrom(own, 0)); err != nil {
				return err
			}
			listener, err = n.Listen(ctx, netip.AddrPortFrom(own, 0))
			return err
		}))
		at := netip.MustParseAddrPort(packets.LocalAddr().String())
		peer := c.Peers[0][i]
		datagram := func(in string, src netip.Addr, port uint16) host.Packet {
			return host.Packet{In: in, Packet: policy.Packet{Src: src, Dst: own, Proto: policy.ProtoUDP, SrcPort: port, DstPort: at.Port()}}
		}
		// A kernel may complete the handshake of a connection that isn't accepted then.
		go func() {
			conn, err := listener.Accept()
			if err == nil {
				err = fmt.Errorf("%v was connected to %v", conn.RemoteAddr(), listener.Addr())
			}
			ended <- err
		}()
		var first []host.Packet
		for in, from := range c.Neighbours {
			for _, a := range append(from[:len(from):len(from)], peer) {
				if a.Is4() == own.Is4() {
					first = append(first, datagram(in, a, 5001))
				}
			}
		}
		c.Send(first, make([]bool, len(first)))
		c.must(c.Sockets(func() error {
			for _, protocol := range []string{"udp", "tcp"} {
				to := at.String()
				if protocol == "tcp" {
					to = listener.Addr().String()
				}
				// The computer's own packets are answered with an error or not at all.
				conn, err := net.DialTimeout(protocol, to, time.Second)
				if err != nil {
					continue
				}
				_, _ = conn.Write([]byte("not by the mesh"))
				if protocol == "tcp" {
					_ = conn.SetReadDeadline(time.Now().Add(answerTime))
					if n, err := conn.Read(make([]byte, 1)); n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
						c.Errorf("the computer itself is connected to %s: %d, %v", to, n, err)
					}
				}
				conn.Close()
			}
			return nil
		}))
		c.Send([]host.Packet{datagram(iface, peer, 5002)}, []bool{true})
		c.must(packets.SetReadDeadline(time.Now().Add(answerTime)))
		_, from, err := packets.ReadFrom(make([]byte, 2000))
		if err != nil || from.String() != netip.AddrPortFrom(peer, 5002).String() {
			c.Errorf("at %v the first datagram is from %v, %v; want the peer's %v", at, from, err, peer)
		}
		c.must(packets.SetReadDeadline(time.Time{}))
		go func() {
			_, _, err := packets.ReadFrom(make([]byte, 2000))
			ended <- err
		}()
	}
	return func() {
		for range cap(ended) {
			select {
			case err := <-ended:
				if !errors.Is(err, net.ErrClosed) {
					c.Errorf("a socket ended with %v", err)
				}
			case <-time.After(answerTime):
				c.Error("a socket outlived the mesh interface")
			}
		}
	}
}
