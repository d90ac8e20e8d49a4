package netlab

// Building and reading of packets.

import (
	"bytes"
	"net/netip"
	"testing"
)

func TestBuiltPacketsAreRead(t *testing.T) {
	for _, ends := range [][2]netip.AddrPort{
		{netip.MustParseAddrPort("192.0.2.1:1111"), netip.MustParseAddrPort("192.0.2.2:2222")},
		{netip.MustParseAddrPort("[2001:db8::1]:1111"), netip.MustParseAddrPort("[2001:db8::2]:2222")},
	} {
		src, dst := ends[0], ends[1]
		word := []byte("odd")
		for name, data := range map[string][]byte{
			"udp":  UDPPacket(src, dst, word),
			"tcp":  TCPPacket(src, dst, SYN|ACK, 1, 2, word),
			"echo": EchoPacket(src.Addr(), dst.Addr(), false, 1111, 1, word),
		} {
			p, ok := ParsePacket(data)
			if !ok || p.Src != src.Addr() || p.Dst != dst.Addr() || p.SrcPort != 1111 || p.TTL != 64 || !bytes.Equal(p.Payload, word) {
				t.Errorf("%s was read as %v", name, p)
			}
			if name != "echo" && p.DstPort != 2222 {
				t.Errorf("%s goes to port %d", name, p.DstPort)
			}
			if name == "tcp" && p.Flags != SYN|ACK {
				t.Errorf("%s has flags %#x", name, p.Flags)
			}
			transport := data[headerLen(data):]
			if got := checksum(transport, pseudoHeader(src.Addr(), dst.Addr(), p.Proto, len(transport))); got != 0 {
				t.Errorf("%s: checksum is off by %#x", name, got)
			}
		}
	}
}

func headerLen(data []byte) int {
	if data[0]>>4 == 4 {
		return 20
	}
	return 40
}

// TestChecksum is the worked example of RFC 1071, section 3.
func TestChecksum(t *testing.T) {
	if got, want := checksum([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}, 0), ^uint16(0xddf2); got != want {
		t.Errorf("checksum is %#x, want %#x", got, want)
	}
}

func FuzzParsePacket(f *testing.F) {
	a, b := netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("192.0.2.2:2")
	f.Add(UDPPacket(a, b, []byte("word")))
	f.Add(TCPPacket(a, b, SYN, 0, 0, nil))
	f.Add(IPPacket(netip.MustParseAddr("fe80::1"), netip.MustParseAddr("ff02::1"), 0, make([]byte, 16)))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, ok := ParsePacket(data)
		if ok && (!p.Src.IsValid() || !p.Dst.IsValid()) {
			t.Errorf("read without addresses: %v", p)
		}
		_ = p.String()
	})
}
