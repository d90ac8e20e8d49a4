package linux

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// mutate damages a packet as a hostile peer would: bits, lengths, options, extension
// headers, fragments. Some packets stay valid.
func mutate(rnd *rand.Rand, b []byte) [][]byte {
	b = slices.Clone(b)
	six := b[0]>>4 == 6
	switch rnd.IntN(7) {
	case 0: // some bits
		for range 1 + rnd.IntN(4) {
			b[rnd.IntN(len(b))] ^= 1 << rnd.IntN(8)
		}
	case 1: // cut short
		b = b[:1+rnd.IntN(len(b))]
	case 2: // another upper protocol
		if six {
			b[6] = byte(rnd.IntN(256))
		} else {
			b[9] = byte(rnd.IntN(256))
		}
	case 3:
		if six {
			return [][]byte{extended(rnd, b)}
		}
		return [][]byte{optioned(rnd, b)}
	case 4, 5:
		if !six {
			return fragments(rnd, b)
		}
	default: // wrong lengths
		at := 2
		if six {
			at = 4
		}
		binary.BigEndian.PutUint16(b[at:], uint16(rnd.IntN(1<<16)))
	}
	sumHeader(b)
	return [][]byte{b}
}

// sumHeader corrects the IPv4 header's checksum, so that the kernel looks at the damage.
func sumHeader(b []byte) {
	if len(b) < 20 || b[0]>>4 != 4 {
		return
	}
	n := min(int(b[0]&15)*4, len(b))
	if n < 20 {
		return
	}
	b[10], b[11] = 0, 0
	var sum uint32
	for i := 0; i+1 < n; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
}

// optioned adds an IPv4 option: source route, record route, timestamp, nonsense.
func optioned(rnd *rand.Rand, b []byte) []byte {
	kind := []byte{131, 137, 7, 68, 148, byte(rnd.IntN(256))}[rnd.IntN(6)]
	option := slices.Concat([]byte{kind, 7, 4}, bob4.AsSlice(), []byte{0})
	out := slices.Concat(b[:20], option, b[20:])
	out[0] += 2
	binary.BigEndian.PutUint16(out[2:], uint16(len(out)))
	sumHeader(out)
	return out
}

// extended adds an IPv6 extension header: hop-by-hop, routing, destination options,
// fragment.
func extended(rnd *rand.Rand, b []byte) []byte {
	kind := []byte{0, 43, 60, 44}[rnd.IntN(4)]
	header := make([]byte, 24)
	header[0], header[1] = b[6], 2
	switch kind {
	case 43: // type 0, one address left
		header[3] = 1
		copy(header[8:], bob6.AsSlice())
	case 44:
		header = []byte{b[6], 0, 0, byte(rnd.IntN(2)), 1, 2, 3, byte(rnd.IntN(256))}
	default: // padding
		header[2], header[3] = 1, 20
	}
	out := slices.Concat(b[:40], header, b[40:])
	out[6] = kind
	binary.BigEndian.PutUint16(out[4:], uint16(len(out)-40))
	return out
}

// fragments fragments an IPv4 packet: tiny first fragments, overlaps, any order, holes.
func fragments(rnd *rand.Rand, b []byte) [][]byte {
	id := rnd.Uint32()
	var out [][]byte
	data := b[20:]
	for at := 0; at < len(data); at += 8 {
		end := min(len(data), at+8*(1+rnd.IntN(3)))
		f := slices.Concat(b[:20], data[at:end])
		binary.BigEndian.PutUint16(f[2:], uint16(len(f)))
		binary.BigEndian.PutUint16(f[4:], uint16(id))
		offset := uint16(at / 8)
		if end < len(data) {
			offset |= 0x2000
		}
		binary.BigEndian.PutUint16(f[6:], offset)
		sumHeader(f)
		out = append(out, f)
	}
	rnd.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

// TestMutatedPackets has ann, who has only routing, send damaged packets to all hosts.
// Whatever leaves by the uplink has the uplink's source and a destination in the
// internet; nothing comes out anywhere else.
func TestMutatedPackets(t *testing.T) {
	packets := 100000
	if testing.Short() {
		packets = 5000
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	w := newWorld(t)
	w.open()
	defer w.close()
	r := w.enforce(meshOf(grants{ann: mesh.Routing}))
	dst4, dst6 := destinations()
	sent := 0
	for n := range packets {
		src, dst := ann4, dst4[rnd.IntN(len(dst4))]
		if rnd.IntN(2) == 0 {
			src, dst = ann6, dst6[rnd.IntN(len(dst6))]
		}
		_, raw := draw(rnd, n, src, dst)
		for _, b := range mutate(rnd, raw) {
			w.write(b)
			sent++
		}
		if n%1000 == 0 {
			w.settle(nil)
		}
	}
	w.settle(nil)
	w.mu.Lock()
	defer w.mu.Unlock()
	out := 0
	for _, seen := range w.seen {
		for _, s := range seen {
			out++
			w.allowedOut(r, s)
		}
	}
	if out == 0 {
		t.Error("nothing came out at all: the test shows nothing")
	}
	t.Logf("%d packets sent, %d came out", sent, out)
}

// allowedOut judges a packet that came out although ann has only routing. Errors about
// her packets may come back to her.
func (w *world) allowedOut(r *policy.Ruleset, s capture) {
	p := s.packet
	toAnn := p.Dst == ann4 || p.Dst == ann6
	switch {
	case (s.where == "mesh" || s.where == "mesh error") && toAnn:
	case s.where == netlab.Uplink && r.Class(p.Dst) == policy.Internet && slices.Contains(uplinkSources(), p.Src):
	default:
		w.t.Errorf("came out at %s: %v", s.where, p)
	}
}

func uplinkSources() []netip.Addr { return netlab.Addresses().BUplink.List() }

// write writes any bytes to the TUN device; the kernel may refuse them.
func (w *world) write(b []byte) {
	const headroom = 16
	_, _ = w.dev.Write([][]byte{append(make([]byte, headroom, headroom+len(b)), b...)}, headroom)
}
