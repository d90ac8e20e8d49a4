package simmac

// Packets in bytes, decoded and encoded.

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

var (
	a4, b4 = netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.2")
	a6, b6 = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8:2::2")
)

func TestDecode(t *testing.T) {
	for _, tt := range []struct {
		name string
		b    []byte
		want pfsim.Packet
	}{
		{"udp", netlab.UDPPacket(addrPort("192.0.2.1:1000"), addrPort("198.51.100.2:53"), []byte("hello")),
			pfsim.Packet{Src: a4, Dst: b4, Proto: 17, SrcPort: 1000, DstPort: 53, Len: 5}},
		{"tcp", netlab.TCPPacket(addrPort("[2001:db8::1]:1000"), addrPort("[2001:db8:2::2]:443"), netlab.SYN|netlab.ACK, 7, 9, nil),
			pfsim.Packet{Src: a6, Dst: b6, Proto: 6, SrcPort: 1000, DstPort: 443, Flags: 0x12, Seq: 7, Ack: 9, Window: 65535}},
		{"echo", netlab.EchoPacket(a4, b4, false, 77, 1, nil),
			pfsim.Packet{Src: a4, Dst: b4, Proto: 1, ICMPType: 8, ICMPID: 77}},
		{"error", netlab.ICMPPacket(b6, a6, 1, 4, 0, netlab.UDPPacket(addrPort("[2001:db8::1]:5"), addrPort("[2001:db8:2::2]:6"), nil)),
			pfsim.Packet{Src: b6, Dst: a6, Proto: 58, ICMPType: 1, ICMPCode: 4,
				Quoted: &pfsim.Quoted{Src: a6, Dst: b6, Proto: 17, SrcPort: 5, DstPort: 6}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, _, ok := decode(tt.b)
			// What a quoted UDP packet has where TCP has a sequence number is nothing.
			if diff := cmp.Diff(tt.want, got, cmpopts.EquateComparable(netip.Addr{}), cmpopts.IgnoreFields(pfsim.Quoted{}, "Seq")); !ok || diff != "" {
				t.Errorf("%v (-want +got):\n%s", ok, diff)
			}
		})
	}
}

// What encode makes of a packet that becomes another is what that other is from
// the start: same bytes, so right checksums.
func TestEncodeIsTheOtherPacket(t *testing.T) {
	for name, pair := range map[string][2][]byte{
		"udp4": {netlab.UDPPacket(addrPort("192.0.2.1:1000"), addrPort("198.51.100.2:53"), []byte("hello")),
			netlab.UDPPacket(addrPort("203.0.113.9:50001"), addrPort("198.51.100.2:53"), []byte("hello"))},
		"tcp6": {netlab.TCPPacket(addrPort("[2001:db8::1]:1000"), addrPort("[2001:db8:2::2]:443"), netlab.SYN, 7, 0, []byte("x")),
			netlab.TCPPacket(addrPort("[2001:db8:9::9]:50002"), addrPort("[2001:db8:2::2]:443"), netlab.SYN, 7, 0, []byte("x"))},
		"echo4": {netlab.EchoPacket(a4, b4, false, 77, 1, []byte("ping")), netlab.EchoPacket(netip.MustParseAddr("203.0.113.9"), b4, false, 50003, 1, []byte("ping"))},
		"echo6": {netlab.EchoPacket(a6, b6, true, 77, 1, nil), netlab.EchoPacket(a6, netip.MustParseAddr("2001:db8:9::9"), true, 1, 1, nil)},
	} {
		t.Run(name, func(t *testing.T) {
			was, h, ok := decode(pair[0])
			is, _, ok2 := decode(pair[1])
			if !ok || !ok2 {
				t.Fatal("not decoded")
			}
			if got := encode(pair[0], h, was, is); !bytes.Equal(got, pair[1]) {
				t.Errorf("got\n%x\nwant\n%x", got, pair[1])
			}
		})
	}
}

func TestDecodeRefusesDamage(t *testing.T) {
	good := netlab.TCPPacket(addrPort("192.0.2.1:1000"), addrPort("198.51.100.2:53"), netlab.SYN, 1, 0, nil)
	for n := range good {
		if _, _, ok := decode(good[:n]); ok {
			t.Errorf("decoded %d of %d bytes", n, len(good))
		}
	}
	long := bytes.Clone(good)
	long[3]++
	if _, _, ok := decode(long); ok {
		t.Error("decoded a packet that says it is longer than it is")
	}
	short := bytes.Clone(good)
	short[0] = 0x44
	if _, _, ok := decode(short); ok {
		t.Error("decoded a header of 16 bytes")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(netlab.TCPPacket(addrPort("192.0.2.1:1000"), addrPort("198.51.100.2:53"), netlab.SYN, 1, 0, nil))
	f.Add(netlab.UDPPacket(addrPort("[2001:db8::1]:1"), addrPort("[2001:db8:2::2]:2"), []byte("x")))
	f.Add(netlab.ICMPPacket(b4, a4, 3, 1, 0, netlab.UDPPacket(addrPort("192.0.2.1:5"), addrPort("198.51.100.2:6"), nil)))
	f.Add(append([]byte{0x60, 0, 0, 0, 0, 16, 44, 64}, make([]byte, 48)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, h, ok := decode(b)
		if !ok {
			return
		}
		// Nothing translated: the addresses and ports stay.
		again, _, ok := decode(encode(b, h, p, p))
		if diff := cmp.Diff(p, again, cmpopts.EquateComparable(netip.Addr{}), cmpopts.IgnoreFields(pfsim.Quoted{}, "Seq")); !ok || diff != "" {
			t.Errorf("%v (-before +after):\n%s", ok, diff)
		}
	})
}
