package trial

// Malicious packets from a peer with every permission.

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// IP protocol numbers of IPv6's extension headers (RFC 8200) and others.
const (
	hopByHop, routing, fragment, destination = 0, 43, 44, 60
	protoTCP, protoUDP                       = 6, 17
)

// mutator makes malicious packets with C's own addresses, which WireGuard accepts: the
// source address and mostly the length are right, everything else may be wrong.
type mutator struct {
	r    *rand.Rand
	from netlab.Pair
	to   []netlab.Pair
}

// next returns packets that belong together: a single one, or the fragments of one.
func (m *mutator) next() [][]byte {
	i := m.r.IntN(2)
	src := m.from.List()[i]
	dst := m.to[m.r.IntN(len(m.to))].List()[i]
	p := m.plain(src, dst)
	switch m.r.IntN(8) {
	case 0:
		return [][]byte{m.flip(p)}
	case 1:
		return m.fragments(p)
	case 2, 3:
		return [][]byte{m.flip(m.options(p))}
	case 4:
		return [][]byte{m.options(p)}
	case 5:
		return [][]byte{m.icmp(src, dst, p)}
	case 6:
		return [][]byte{m.truncate(p)}
	}
	return [][]byte{m.noise(p)}
}

// plain returns a well-formed packet.
func (m *mutator) plain(src, dst netip.Addr) []byte {
	from, to := netip.AddrPortFrom(src, uint16(1024+m.r.IntN(60000))), netip.AddrPortFrom(dst, uint16(m.r.IntN(1<<16)))
	if m.r.IntN(2) == 0 {
		to = netip.AddrPortFrom(dst, netlab.EchoPort)
	}
	payload := make([]byte, m.r.IntN(100))
	switch m.r.IntN(3) {
	case 0:
		return netlab.UDPPacket(from, to, payload)
	case 1:
		return netlab.TCPPacket(from, to, uint8(m.r.IntN(256)), m.r.Uint32(), m.r.Uint32(), payload)
	}
	return netlab.EchoPacket(src, dst, m.r.IntN(4) == 0, uint16(m.r.IntN(9)), 1, payload)
}

// flip changes bytes after the version, but not the source.
func (m *mutator) flip(p []byte) []byte {
	for range 1 + m.r.IntN(4) {
		at := 1 + m.r.IntN(len(p)-1)
		first, size := 12, 4
		if p[0]>>4 == 6 {
			first, size = 8, 16
		}
		if at < first || at >= first+size {
			p[at] = byte(m.r.IntN(256))
		}
	}
	if m.r.IntN(3) == 0 && p[0]>>4 == 4 {
		p[0] = 0x40 | byte(m.r.IntN(16)) // the header's length
	}
	return m.seal(p)
}

// seal sets the total length, so that WireGuard accepts the packet, and IPv4's checksum,
// so that the kernel examines the rest.
func (m *mutator) seal(p []byte) []byte {
	if p[0]>>4 == 6 {
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
		return p
	}
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	header := min(max(int(p[0]&15)*4, 20), len(p))
	p[10], p[11] = 0, 0
	sum := uint32(0)
	for i := 0; i+1 < header; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum))
	return p
}

// options4 are IPv4 options (RFC 791): loose and strict source routes to a peer, record
// route, time stamps, router alert, and some malformed ones.
func (m *mutator) options4(p []byte) []byte {
	a := m.to[0].V4.As4()
	lists := [][]byte{
		append([]byte{131, 7, 4}, a[:]...), append([]byte{137, 7, 4}, a[:]...), {7, 7, 4, 0, 0, 0, 0},
		{68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0}, {148, 4, 0, 0}, {131, 0}, {131, 255, 4}, {1, 1, 1, 131}, {130, 11, 0, 0, 0, 0, 0, 0, 0, 0, 0},
	}
	o := lists[m.r.IntN(len(lists))]
	for len(o)%4 != 0 {
		o = append(o[:len(o):len(o)], 0)
	}
	out := append(append(append([]byte{}, p[:20]...), o...), p[20:]...)
	out[0] = 0x45 + byte(len(o)/4)
	return m.seal(out)
}

// options inserts options into the header, or extension headers behind it.
func (m *mutator) options(p []byte) []byte {
	if p[0]>>4 == 4 {
		return m.options4(p)
	}
	a := m.to[0].V6.As16()
	out := append([]byte{}, p[:40]...)
	next := out[6]
	var headers []byte
	for range 1 + m.r.IntN(6) {
		kinds := []byte{hopByHop, routing, routing, fragment, destination, 51, 135, 139, 59}
		kind := kinds[m.r.IntN(len(kinds))]
		h := []byte{next, 0, 1, 4, 0, 0, 0, 0} // one option of padding
		switch kind {
		case routing: // types 0 and 2, one address to go
			h = append([]byte{next, 2, byte(m.r.IntN(2) * 2), 1, 0, 0, 0, 0}, a[:]...)
		case fragment:
			h = []byte{next, 0, 0, byte(m.r.IntN(2)), 0, 0, 0, byte(m.r.IntN(9))}
		case hopByHop: // sometimes a jumbo payload (RFC 2675)
			if m.r.IntN(2) == 0 {
				h = []byte{next, 0, 0xc2, 4, 0, 1, 0, 0}
			}
		}
		headers, next = append(h, headers...), kind
	}
	out[6] = next
	return m.seal(append(append(out, headers...), p[40:]...))
}

// fragments splits a packet: into tiny, overlapping, reordered or incomplete fragments.
func (m *mutator) fragments(p []byte) (list [][]byte) {
	header := 20
	if p[0]>>4 == 6 {
		header = 40
	}
	body, id := p[header:], m.r.Uint32()
	for at := 0; at < len(body); at += 8 * (1 + m.r.IntN(3)) {
		size := min(8*(1+m.r.IntN(4)), len(body)-at)
		list = append(list, m.fragment(p[:header], body[at:at+size], at, at+size < len(body), id))
	}
	m.r.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	if m.r.IntN(3) == 0 && len(list) > 1 {
		list = list[1:]
	}
	return list
}

func (m *mutator) fragment(header, body []byte, at int, more bool, id uint32) []byte {
	out := append([]byte{}, header...)
	flags := uint16(at)
	if header[0]>>4 == 6 {
		if more {
			flags |= 1
		}
		h := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16([]byte{out[6], 0}, flags), id)
		out[6] = fragment
		return m.seal(append(append(out, h...), body...))
	}
	flags /= 8
	if more {
		flags |= 1 << 13
	}
	binary.BigEndian.PutUint16(out[4:], uint16(id))
	binary.BigEndian.PutUint16(out[6:], flags)
	return m.seal(append(out, body...))
}

// icmp returns a message of any type, mostly redirects and errors, that quotes a packet.
func (m *mutator) icmp(src, dst netip.Addr, quoted []byte) []byte {
	kinds := []uint8{5, 3, 11, 12, 4, 9, 10, 13, 17}
	if src.Is6() {
		kinds = []uint8{137, 1, 2, 3, 4, 133, 134, 135, 136, 138}
	}
	kind := kinds[m.r.IntN(len(kinds))]
	if m.r.IntN(5) == 0 {
		kind = uint8(m.r.IntN(256))
	}
	return netlab.ICMPPacket(src, dst, kind, uint8(m.r.IntN(5)), m.r.Uint32(), quoted[:m.r.IntN(len(quoted)+1)])
}

func (m *mutator) truncate(p []byte) []byte {
	header := 20
	if p[0]>>4 == 6 {
		header = 40
	}
	return m.seal(p[:header+m.r.IntN(len(p)-header+1)])
}

// noise keeps only the addresses, with any size that the tunnel accepts.
func (m *mutator) noise(p []byte) []byte {
	header := 20
	if p[0]>>4 == 6 {
		header = 40
	} else {
		p[9] = byte(m.r.IntN(256))
	}
	if header == 40 {
		p[6] = byte(m.r.IntN(256))
	}
	body := make([]byte, m.r.IntN(1300))
	for i := range body {
		body[i] = byte(m.r.Uint32())
	}
	return m.seal(append(p[:header:header], body...))
}

// crime says what is wrong with a packet that a host received while only C sends, or
// returns "". Only B may receive C's packets to forbidden destinations.
func crime(m *Mesh, own netlab.Pair, at *netlab.Host, p netlab.Packet) string {
	mesh := netlab.MeshPrefixes()
	inMesh := func(a netip.Addr) bool { return mesh[0].Contains(a) || mesh[1].Contains(a) }
	peer := at == m.A || at == m.D
	switch {
	case p.Out || p.Link == "lo":
		return ""
	case peer && p.Link == "wg0" && p.Src != own.V4 && p.Src != own.V6:
		return "a peer got a packet that isn't the host's own"
	case p.Link != "wg0" && (inMesh(p.Src) || inMesh(p.Dst)):
		return "an address of the mesh left in clear"
	case p.Link != "wg0" && p.Proto == 1 && p.Type == 5:
		return "a redirect"
	case p.Link != "wg0" && p.Src.Is4() && p.Data[0] > 0x45 && sourceRouted(p.Data):
		return "a source-routed packet"
	}
	return ""
}

// sourceRouted reports whether an IPv4 header has a source route.
func sourceRouted(b []byte) bool {
	for o := b[20 : int(b[0]&15)*4]; len(o) > 1; {
		switch {
		case o[0] == 131 || o[0] == 137:
			return true
		case o[0] == 0 || o[0] != 1 && (o[1] < 2 || int(o[1]) > len(o)):
			return false
		case o[0] == 1:
			o = o[1:]
		default:
			o = o[o[1]:]
		}
	}
	return false
}

// TestHostilePackets has C, which has every permission, send malicious packets out of its
// tunnel, through WireGuard, the guard and the kernel. No packet arrives that the policy
// refuses, the helper keeps running, and its memory doesn't grow.
func TestHostilePackets(t *testing.T) {
	packets := 30_000
	if *soak {
		packets = 1_000_000
	}
	m := newMesh(t)
	for name := range m.Peers {
		permit(t, m, name, everything)
	}
	at, own := netlab.Addresses(), status(t, m).Address()
	if !m.reaches(t, m.C, at.L.V4, true) {
		t.Fatal("C doesn't reach L, so the test proves nothing")
	}
	var watches []*netlab.Watch
	for _, h := range []*netlab.Host{m.A, m.D, m.L, m.P, m.V, m.W, m.I} {
		w, err := h.Watch(func(p netlab.Packet) bool { return crime(m, own, h, p) != "" })
		if err != nil {
			t.Fatal(err)
		}
		watches = append(watches, w)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	mutate := &mutator{r: rand.New(rand.NewPCG(seed, 0)), from: m.Peers["C"].Addresses, to: []netlab.Pair{
		m.Peers["A"].Addresses, m.Peers["D"].Addresses, own, at.L, at.I, at.BLAN, at.P, at.Behind, at.W, at.Metadata,
		{V4: netip.MustParseAddr("224.0.0.1"), V6: netip.MustParseAddr("ff02::1")},
		{V4: netip.MustParseAddr("192.168.77.255"), V6: netip.MustParseAddr("fe80::1")},
	}}
	before := loadOf(t, m.Helper.PID())
	arrived := received(t, m)
	for sent := 0; sent < packets; {
		for _, p := range mutate.next() {
			// Packets that C's own kernel refuses aren't sent.
			if err := m.C.Forge("wg0", p); err == nil {
				sent++
			}
		}
		if sent%64 == 0 {
			time.Sleep(time.Millisecond) // the tunnel's queue must not overflow
		}
	}
	if !m.reaches(t, m.C, at.L.V4, true) {
		t.Error("C doesn't reach L afterwards")
	}
	arrived = received(t, m) - arrived
	for _, w := range watches {
		if err := w.Sync(); err != nil {
			t.Error(err)
		}
		caught, err := w.Packets()
		if err != nil {
			t.Error(err)
		}
		for _, p := range caught[:min(len(caught), 5)] {
			t.Errorf("%s: % x", p, p.Data)
		}
		if len(caught) > 0 {
			t.Errorf("%d packets that the policy refuses arrived", len(caught))
		}
	}
	if arrived < packets/2 {
		t.Errorf("of %d packets only %d came out of B's tunnel: too few to prove anything", packets, arrived)
	}
	after := loadOf(t, m.Helper.PID())
	if grown := after.kilobytes - before.kilobytes; grown > 256<<10 {
		t.Errorf("the helper's memory grew by %d KiB", grown)
	}
	if strings.Contains(m.Helper.Output(), "panic") {
		t.Error("the helper panicked")
	}
	t.Logf("%d hostile packets, %d of them judged by the guard; refused: %s; helper's memory before and after: %d and %d KiB",
		packets, arrived, refusals(t, m), before.kilobytes, after.kilobytes)
}

// received counts C's packets that the guard judged: those that it refused, and those
// that B's mesh interface received.
func received(t *testing.T, m *Mesh) int {
	t.Helper()
	s, n := status(t, m), 0
	for _, p := range s.Peers {
		if p.Name == "C" {
			for _, refused := range p.Refused {
				n += refused
			}
		}
	}
	err := m.B.Do(func() error {
		text, err := os.ReadFile(fmt.Sprintf("/sys/class/net/%s/statistics/rx_packets", s.Interface))
		if err != nil {
			return err
		}
		passed, err := strconv.Atoi(strings.TrimSpace(string(text)))
		n += passed
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func refusals(t *testing.T, m *Mesh) string {
	t.Helper()
	for _, p := range status(t, m).Peers {
		if p.Name == "C" {
			return fmt.Sprint(p.Refused)
		}
	}
	return "none"
}
