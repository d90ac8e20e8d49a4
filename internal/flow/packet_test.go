package flow

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/internal/policy"
)

var (
	udp4 = flowtest.Datagram(at(flowtest.PeerC4, 1000), at(flowtest.Net4, 443), 24)
	tcp4 = flowtest.TCPSegment(at(flowtest.PeerC4, 1000), at(flowtest.Net4, 443), flowtest.ACK, 8)
	udp6 = flowtest.Datagram(at(flowtest.PeerC6, 1000), at(flowtest.Net6, 443), 24)
	tcp6 = flowtest.TCPSegment(at(flowtest.PeerC6, 1000), at(flowtest.Net6, 443), flowtest.ACK, 8)
)

// with returns a copy of p in which bytes are replaced. pairs holds offsets, each followed by
// the value of the byte.
func with(p []byte, pairs ...int) []byte {
	p = slices.Clone(p)
	for i := 0; i < len(pairs); i += 2 {
		p[pairs[i]] = byte(pairs[i+1])
	}
	return p
}

// options returns udp4 with IPv4 options, padded to a multiple of 4 bytes.
func options(opts ...byte) []byte {
	for len(opts)%4 != 0 {
		opts = append(opts, 0)
	}
	p := slices.Concat(udp4[:20], opts, udp4[20:])
	p[0] = byte(0x45 + len(opts)/4)
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	return p
}

// extended returns udp6 with extension headers in front of UDP. Each argument is a protocol
// number followed by the header, whose first byte, the next header, is filled in here.
func extended(headers ...[]byte) []byte {
	p := slices.Clone(udp6[:40])
	next := &p[6]
	var rest []byte
	for _, h := range headers {
		*next = h[0]
		h = slices.Clone(h[1:])
		at := len(rest)
		rest = append(rest, h...)
		next = &rest[at]
	}
	*next = 17
	p = append(append(p, rest...), udp6[40:]...)
	binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
	p[6] = 17
	if len(headers) > 0 {
		p[6] = headers[0][0]
	}
	return p
}

// ext returns an extension header of 8 bytes for extended, with bytes 2 and 3 set.
func ext(proto, b2, b3 byte) []byte { return []byte{proto, 0, 0, b2, b3, 0, 0, 0, 0} }

// TestMalformed parses packets with one fault each: all are malformed, and are dropped without
// an answer in both directions.
func TestMalformed(t *testing.T) {
	frag4 := func(id uint32, offset int, more bool, size int) []byte {
		return flowtest.Fragment(udp4, id, offset, more, make([]byte, size))
	}
	source := make([]byte, 11)
	many := make([][]byte, maxHeaders+1)
	for i := range many {
		many[i] = ext(protoDestOpts, 0, 0)
	}
	for name, p := range map[string][]byte{
		"empty":                   {},
		"version 0":               with(udp4, 0, 0x05),
		"version 5":               with(udp4, 0, 0x55),
		"short":                   udp4[:19],
		"header of 16":            with(udp4, 0, 0x44),
		"header beyond":           with(udp4[:24], 0, 0x4f, 3, 24),
		"length 0":                with(udp4, 2, 0, 3, 0),
		"truncated":               udp4[:len(udp4)-1],
		"padded":                  append(slices.Clone(udp4), 0),
		"reserved flag":           with(udp4, 6, 0x80),
		"loose source route":      options(append([]byte{131, 11, 4}, source[:8]...)...),
		"strict source route":     options(append([]byte{137, 11, 4}, source[:8]...)...),
		"route behind others":     options(1, 1, 148, 4, 0, 0, 131, 3, 4),
		"option of length 0":      options(7, 0),
		"option of length 1":      options(7, 1),
		"option beyond":           options(7, 40),
		"option without length":   options(1, 1, 1, 7),
		"TCP of 19":               flowtest.IP(flowtest.PeerC4, flowtest.Net4, 6, tcp4[20:39]),
		"TCP offset 4":            with(tcp4, 32, 0x40),
		"TCP offset beyond":       with(tcp4, 32, 0xf0),
		"UDP of 7":                flowtest.IP(flowtest.PeerC4, flowtest.Net4, 17, udp4[20:27]),
		"UDP length 7":            with(udp4, 24, 0, 25, 7),
		"UDP length beyond":       with(udp4, 24, 1),
		"ICMP of 7":               flowtest.IP(flowtest.PeerC4, flowtest.Net4, 1, make([]byte, 7)),
		"tiny first fragment":     flowtest.Fragment(tcp4, 1, 0, true, tcp4[20:36]),
		"first of 12":             flowtest.Fragment(udp4, 1, 0, true, udp4[20:32]),
		"first that is all":       flowtest.Fragment(udp4, 1, 0, true, udp4[20:]),
		"empty fragment":          frag4(1, 8, false, 0),
		"odd middle fragment":     frag4(1, 8, true, 9),
		"fragment beyond 65535":   frag4(1, 65528, false, 8),
		"error in pieces":         flowtest.Fragment(flowtest.IP(flowtest.PeerC4, flowtest.Net4, 1, nil), 1, 0, true, append([]byte{3, 1, 0, 0, 0, 0, 0, 0}, udp4[:48]...)),
		"IPv6 short":              udp6[:39],
		"IPv6 truncated":          udp6[:len(udp6)-1],
		"IPv6 padded":             append(slices.Clone(udp6), 0),
		"jumbogram":               with(extended([]byte{0, 0, 0, 0xc2, 4, 0, 1, 0, 0}), 4, 0, 5, 0),
		"hop-by-hop second":       extended(ext(protoDestOpts, 0, 0), ext(protoHopByHop, 0, 0)),
		"routing type 0":          extended(ext(protoRouting, 0, 0)),
		"routing, segments left":  extended(ext(protoRouting, 2, 1)),
		"too many headers":        extended(many...),
		"header beyond in IPv6":   with(extended(ext(protoDestOpts, 0, 0)), 41, 200),
		"two fragment headers":    extended(ext(protoFragment, 0, 1), ext(protoFragment, 0, 1)),
		"nothing behind a header": with(extended(ext(protoDestOpts, 0, 0))[:48], 4, 0, 5, 8),
		"IPv6 UDP of 7":           flowtest.IP(flowtest.PeerC6, flowtest.Net6, 17, udp6[40:47]),
		"IPv6 odd fragment":       flowtest.Fragment(udp6, 1, 8, true, make([]byte, 9)),
	} {
		var got packet
		if got.parse(p); !got.malformed {
			t.Errorf("%s: read as %+v", name, got)
		}
		for _, d := range []Direction{FromPeer, ToPeer} {
			l := newLab(t, 7, Options{})
			if v := l.judge(p, d); v.Action != Drop {
				t.Errorf("%s, direction %d: %+v, want drop", name, d, v)
			}
		}
	}
}

// TestWellFormed parses one UDP datagram in several valid forms, with options or extension
// headers: each has the same tuple.
func TestWellFormed(t *testing.T) {
	tuple4 := tuple{addressOf(flowtest.PeerC4), addressOf(flowtest.Net4), 1000, 443, 17, false}
	tuple6 := tuple{addressOf(flowtest.PeerC6), addressOf(flowtest.Net6), 1000, 443, 17, true}
	for name, p := range map[string][]byte{
		"plain":               udp4,
		"no-operations":       options(1, 1, 1),
		"record route":        options(7, 7, 4, 0, 0, 0, 0),
		"end, then junk":      options(0, 131, 3, 4),
		"don't fragment":      with(udp4, 6, 0x40),
		"IPv6":                udp6,
		"all headers":         extended(ext(protoHopByHop, 0, 0), ext(protoDestOpts, 0, 0), ext(protoRouting, 2, 0), ext(protoDestOpts, 0, 0)),
		"whole in a fragment": extended([]byte{protoFragment, 0, 0, 0, 0, 0, 0, 0, 9}),
	} {
		var got packet
		got.parse(p)
		want := tuple4
		if got.v6 {
			want = tuple6
		}
		if got.malformed || got.tuple != want || got.fragment != whole || !got.opens {
			t.Errorf("%s: read as %+v", name, got)
		}
	}
}

// TestFragments sends fragments in and out of order, after a timeout and after a change of
// permissions: a later fragment passes only after its first one.
func TestFragments(t *testing.T) {
	for _, tt := range []struct {
		peer, net netip.Addr
	}{{flowtest.PeerC4, flowtest.Net4}, {flowtest.PeerC6, flowtest.Net6}} {
		l := newLab(t, routing, Options{})
		cut := func(id uint32) [][]byte {
			return flowtest.Fragments(flowtest.Datagram(at(tt.peer, 5), at(tt.net, 9), 100), id, 40)
		}
		back := func(id uint32) [][]byte {
			return flowtest.Fragments(flowtest.Datagram(at(tt.net, 9), at(tt.peer, 5), 100), id, 40)
		}
		l.from(false, cut(1)[1], cut(1)[2]) // before the first fragment
		l.to(false, back(1)...)
		l.from(true, cut(1)...)
		l.from(false, cut(1)[2], cut(1)[1])
		l.from(false, cut(2)[1])
		l.to(true, back(1)...)
		l.to(false, back(3)[1])

		// The first fragment of another datagram with the same identification is judged by
		// itself.
		strange := flowtest.Fragments(flowtest.Datagram(at(tt.net, 9), at(tt.peer, 6), 100), 1, 40)
		l.to(false, strange[0])

		l.later(31e9)
		l.from(false, cut(1)[1])
		l.from(true, cut(1)...)
		l.allow(0)
		l.from(false, cut(1)[1])
		l.to(false, back(1)[1], back(1)[0])
	}
}

// TestOverlappingFragments sends fragments that overlap the first one, which could replace
// the ports in it: they are refused, and those behind the first one pass.
func TestOverlappingFragments(t *testing.T) {
	for _, p := range [][]byte{tcp4, tcp6} {
		l := newLab(t, routing, Options{})
		header := len(p) - 28
		data := append(slices.Clone(p[header:]), make([]byte, 72)...)
		l.from(true, flowtest.Fragment(p, 4, 0, true, data[:40]))
		for _, offset := range []int{8, 16, 32} {
			l.from(false, flowtest.Fragment(p, 4, offset, true, data[offset:offset+32]))
		}
		l.from(true, flowtest.Fragment(p, 4, 40, true, data[40:64]))
		l.from(true, flowtest.Fragment(p, 4, 64, false, data[64:]))
	}
}

// TestFragmentOrder sends the three fragments of a datagram in every order that a network or
// a peer may cause. A fragment that arrives before the first one is lost, and the datagram
// with it unless the fragment is sent again.
func TestFragmentOrder(t *testing.T) {
	for _, tt := range []struct {
		about string
		order string // fragments 0, 1 and 2; f is another first fragment, of a flow that is refused
		pass  string
	}{
		{"in order", "012", "yyy"},
		{"the last before the middle", "021", "yyy"},
		{"the first last", "120", "nny"},
		{"the middle before the first", "102", "nyy"},
		{"the middle before the first and again", "1012", "nyyy"},
		{"the first twice", "0012", "ynyy"},
		{"the first again in between", "0102", "yyny"},
		{"each fragment twice", "001122", "ynynyn"},
		{"the last before the middle, each twice", "002211", "ynynyn"},
		{"the whole datagram again", "012012", "yyyyyy"},
		{"a refused first fragment", "f12", "nnn"},
		{"both first fragments", "0f12", "ynyy"},
		{"both first fragments, the refused one first", "f012", "nyyy"},
	} {
		for _, ends := range [][2]netip.Addr{{flowtest.PeerC4, flowtest.HostB4}, {flowtest.PeerC6, flowtest.HostB6}} {
			// C may use the host's DNS server, and nothing else on the host.
			mesh := flowtest.Mesh(routing)
			mesh.Serves = policy.DNS
			l := newLab(t, 0, Options{})
			l.set(flowtest.Compile(t, mesh))
			cut := func(port uint16) [][]byte {
				return flowtest.Fragments(flowtest.Datagram(at(ends[0], 5), at(ends[1], port), 100), 1, 40)
			}
			for i, which := range tt.order {
				piece := cut(80)[0]
				if which != 'f' {
					piece = cut(53)[which-'0']
				}
				if got := l.judge(piece, FromPeer).Action == Pass; got != (tt.pass[i] == 'y') {
					t.Errorf("%s, %v: fragment %d of %s passes %v", tt.about, ends[0], i, tt.order, got)
				}
			}
			if s := l.view.Stats(0); s.Flows > 1 {
				t.Errorf("%s: %d flows", tt.about, s.Flows)
			}
		}
	}
}

// TestShorterFirstFragment sends a shorter first fragment after the first one, and then a
// fragment that fits it but overlaps the longer one. Neither passes: a kernel that had
// dropped the longer one would accept them.
func TestShorterFirstFragment(t *testing.T) {
	l := newLab(t, routing, Options{})
	segment := flowtest.TCPSegment(at(flowtest.PeerC4, 5), at(flowtest.Net4, 9), flowtest.SYN, 100)
	payload := segment[20:]
	l.from(true, flowtest.Fragment(segment, 1, 0, true, payload[:64]))
	l.from(false, flowtest.Fragment(segment, 1, 0, true, payload[:24]), flowtest.Fragment(segment, 1, 24, true, payload[24:64]))
	l.from(false, flowtest.Fragment(segment, 1, 0, true, payload[:16]), flowtest.Fragment(segment, 1, 16, true, payload[16:40]))
	l.from(true, flowtest.Fragment(segment, 1, 64, false, payload[64:]))
}

// seeds returns one packet of each kind.
func seeds() [][]byte {
	out := [][]byte{udp4, tcp4, udp6, tcp6, options(7, 7, 4, 0, 0, 0, 0), extended(ext(protoHopByHop, 0, 0), ext(protoRouting, 2, 0))}
	for _, c := range conversations(flowtest.PeerC4, flowtest.Net4) {
		out = append(out, c.ask(0), c.answer(0), flowtest.ICMPMessage(flowtest.PeerC4, flowtest.Net4, 3, 1, c.answer(0)))
	}
	for _, c := range conversations(flowtest.Net6, flowtest.PeerC6) {
		out = append(out, c.ask(0), c.answer(0), flowtest.ICMPMessage(flowtest.Net6, flowtest.PeerC6, 1, 1, c.answer(0)))
	}
	out = append(out, flowtest.Fragments(udp4, 3, 16)...)
	return append(out, flowtest.Fragments(udp6, 3, 16)...)
}

// checkParse checks what must hold for any bytes: parsing doesn't panic, the fast path
// (plainKey) agrees with parse, and only protocols with ports get ports or open flows.
func checkParse(t *testing.T, b []byte) {
	t.Helper()
	var p packet
	p.parse(b)
	for _, d := range []Direction{FromPeer, ToPeer} {
		var k key
		if !plainKey(b, d, &k) {
			continue
		}
		if p.malformed || p.fragment != whole || !p.opens || keyOf(p.tuple, d) != k || k.tuple(d) != p.tuple {
			t.Errorf("%x: plainKey %+v, parse %+v", b, k, p)
		}
		if p.flags&(tcpSYN|tcpFIN|tcpRST) != 0 {
			t.Errorf("%x: plainKey accepts flags %#x", b, p.flags)
		}
	}
	known := p.proto == flowtest.TCP || p.proto == flowtest.UDP || p.isICMP()
	if !p.malformed && !known && (p.opens || p.fromPort != 0 || p.toPort != 0) {
		t.Errorf("%x: opens %v, ports %d and %d of protocol %d", b, p.opens, p.fromPort, p.toPort, p.proto)
	}
	if p.quoted && (!p.isError || p.malformed) {
		t.Errorf("%x: quotes %+v", b, p)
	}
}

func TestParseMutated(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	all := seeds()
	for range 300_000 {
		checkParse(t, flowtest.Mutate(random, all[random.IntN(len(all))]))
	}
}

func FuzzParse(f *testing.F) {
	for _, p := range seeds() {
		f.Add(p)
	}
	f.Fuzz(checkParse)
}

// FuzzJudge judges pairs of packets: whatever flow the first opens, the second passes only
// with addresses that are possible in its direction.
func FuzzJudge(f *testing.F) {
	all := seeds()
	for i, p := range all {
		f.Add(p, all[(i+1)%len(all)], i%2 == 0)
	}
	m := flowtest.Mesh(7)
	m.ThroughPeer = true
	direct, through, none := flowtest.Picture(f, 7), flowtest.Compile(f, m), flowtest.Picture(f, 0)
	f.Fuzz(func(t *testing.T, a, b []byte, from bool) {
		d := ToPeer
		if from {
			d = FromPeer
		}
		for _, r := range []*policy.Ruleset{direct, through} {
			l := &lab{t: t, table: New(Options{PerPeer: 2})}
			l.set(r)
			l.judge(a, d)
			checkEntitled(t, l, a, b, d.opposite())
			checkEntitled(t, l, a, b, d)
			l.set(none)
			l.judge(b, d)
		}
	})
}

// checkEntitled checks that b, if it passes, has a source and a destination that its direction
// requires whatever a was.
func checkEntitled(t *testing.T, l *lab, a, b []byte, d Direction) {
	t.Helper()
	if l.judge(b, d).Action != Pass {
		return
	}
	var p packet
	p.parse(b)
	_, fromPeer := l.view.rules.PeerByAddr(p.from.netip(p.v6))
	_, toPeer := l.view.rules.PeerByAddr(p.to.netip(p.v6))
	mesh := l.view.rules.Mesh()
	through := func(a address) bool { return mesh.ThroughPeer && slices.Contains(mesh.Addresses, a.netip(p.v6)) }
	if p.malformed || fromPeer && toPeer || d == FromPeer && !fromPeer && !through(p.to) || d == ToPeer && !toPeer && !through(p.from) {
		t.Errorf("after %x, %x passes in direction %d", a, b, d)
	}
}
