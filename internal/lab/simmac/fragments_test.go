package simmac

// Fragments through pf, in bytes.

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// cut makes fragments of a packet, of at most size bytes behind the header.
func cut(b []byte, size int) (pieces [][]byte) {
	six := b[0]>>4 == 6
	head, body := b[:20], b[20:]
	if six {
		head, body = b[:40], b[40:]
	}
	for at := 0; at < len(body); at += size {
		part := body[at:min(at+size, len(body))]
		more := at+len(part) < len(body)
		p := bytes.Clone(head)
		if six {
			e := []byte{p[6], 0, 0, 0, 0, 0, 0, 77}
			binary.BigEndian.PutUint16(e[2:], uint16(at))
			if more {
				e[3] |= 1
			}
			p[6] = 44
			binary.BigEndian.PutUint16(p[4:], uint16(8+len(part)))
			p = append(p, e...)
		} else {
			flags := uint16(at / 8)
			if more {
				flags |= 0x2000
			}
			binary.BigEndian.PutUint16(p[2:], uint16(20+len(part)))
			binary.BigEndian.PutUint16(p[4:], 77)
			binary.BigEndian.PutUint16(p[6:], flags)
			src, dst := netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
			putAddresses(p, src, dst)
		}
		pieces = append(pieces, append(p, part...))
	}
	return pieces
}

// A datagram in fragments is put together by scrub, translated, and goes on whole;
// so does its answer. Without scrub nothing is translated.
func TestFragments(t *testing.T) {
	payload := bytes.Repeat([]byte("fragment"), 200)
	for _, tt := range []struct{ peer, server, outside, nat string }{
		{"100.64.0.2", "198.51.100.9", "203.0.113.1", "nat on en0 inet from 100.64.0.2 to any -> 203.0.113.1 static-port\n"},
		{"fd6d:6573:6800::2", "2001:db8:99::9", "2001:db8:1::1", "nat on en0 inet6 from fd6d:6573:6800::2 to any -> 2001:db8:1::1 static-port\n"},
	} {
		t.Run(tt.peer, func(t *testing.T) {
			m := newMac(t)
			_, name := newTunnel(t, m)
			peer, server, outside := netip.MustParseAddr(tt.peer), netip.MustParseAddr(tt.server), netip.MustParseAddr(tt.outside)
			n, err := darwin.Observe(m)
			must(t, err)
			must(t, darwin.NewRouter(m).Set(n.Interface(name).Index, []netip.Prefix{netip.PrefixFrom(peer, peer.BitLen())}))
			m.Kernel.SetVariable("net.inet.ip.forwarding", "1")
			m.Kernel.SetVariable("net.inet6.ip6.forwarding", "1")
			pf := darwin.NewPF(m)
			_, err = pf.Enable(t.Context())
			must(t, err)
			must(t, pf.Load(t.Context(), anchor, "scrub all fragment reassemble\n"+tt.nat+"pass all\n"))
			var wire [][]byte
			m.Wire(func(_ string, b []byte) { wire = append(wire, b) })

			from, to := netip.AddrPortFrom(peer, 5000), netip.AddrPortFrom(server, 53)
			pieces := cut(netlab.UDPPacket(from, to, payload), 800)
			for i, p := range pieces {
				o := m.Inject(name, p)
				if last := i == len(pieces)-1; (o.Fate == Forwarded) != last {
					t.Errorf("fragment %d of %d: %s, %s", i+1, len(pieces), o.Fate, o.Why)
				}
			}
			want := netlab.UDPPacket(netip.AddrPortFrom(outside, 5000), to, payload)
			if len(wire) != 1 || !samePacket(wire[0], want) {
				t.Fatalf("on the wire %d packets, not the one that was sent", len(wire))
			}
			var last Outcome
			for _, p := range cut(netlab.UDPPacket(to, netip.AddrPortFrom(outside, 5000), payload), 800) {
				last = m.Inject("en0", p)
			}
			if last.Fate != Forwarded || last.Link != name || last.Packet.Dst != peer {
				t.Errorf("the answer: %s by %q to %v, %s", last.Fate, last.Link, last.Packet.Dst, last.Why)
			}

			must(t, pf.Load(t.Context(), anchor, tt.nat+"pass all no state\n"))
			wire = nil
			for _, p := range pieces {
				m.Inject(name, p)
			}
			if len(wire) != len(pieces) || !bytes.Equal(wire[0], pieces[0]) {
				t.Errorf("without scrub %d packets on the wire, want the %d fragments as they were", len(wire), len(pieces))
			}
		})
	}
}

// samePacket compares without the identification and the flags of IPv4, which the
// fragments had.
func samePacket(a, b []byte) bool {
	a, b = bytes.Clone(a), bytes.Clone(b)
	if a[0]>>4 == 4 {
		for _, p := range [][]byte{a, b} {
			copy(p[4:8], make([]byte, 4))
			copy(p[10:12], make([]byte, 2))
		}
	}
	return bytes.Equal(a, b)
}
