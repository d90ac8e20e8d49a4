package stock

import (
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// The decoder below reads a code as a camera would, from the drawing on the
// terminal, by ISO/IEC 18004 and independent of the encoder. It knows level L
// and versions 10 to 14, which configurations need.

// blocks of level L by version: how many blocks of how many data codewords, of
// two sizes, and the error correction codewords of each (ISO/IEC 18004 table 9).
var blocksL = map[int]struct{ n1, data1, n2, data2, check int }{
	10: {2, 68, 2, 69, 18},
	11: {4, 81, 0, 0, 20},
	12: {2, 92, 2, 93, 24},
	13: {4, 107, 0, 0, 26},
	14: {3, 115, 1, 116, 30},
}

// alignments holds the centres of the alignment patterns (annex E).
var alignments = map[int][]int{
	10: {6, 28, 50}, 11: {6, 30, 54}, 12: {6, 32, 58}, 13: {6, 34, 62}, 14: {6, 26, 46, 66},
}

// quietZone is the light border that the standard demands, in modules.
const quietZone = 4

// scan turns a drawing back into dark modules, without the quiet zone, which
// it demands to be light.
func scan(t *testing.T, drawing string, colour bool) [][]bool {
	t.Helper()
	var rows [][]bool
	for line := range strings.Lines(drawing) {
		line = strings.TrimSuffix(line, "\n")
		if colour {
			line = strings.TrimSuffix(strings.TrimPrefix(line, blackOnWhite), plain)
		}
		var top, bottom []bool
		for _, c := range line {
			top = append(top, (c == '█' || c == '▀') == colour)
			bottom = append(bottom, (c == '█' || c == '▄') == colour)
		}
		rows = append(rows, top, bottom)
	}
	size := len(rows[0]) - 2*quietZone
	for y, row := range rows {
		for x, dark := range row {
			inside := min(x, y) >= quietZone && max(x, y) < quietZone+size
			if dark && !inside {
				t.Fatalf("module %d,%d of the quiet zone is dark", x, y)
			}
		}
	}
	var modules [][]bool
	for _, row := range rows[quietZone : quietZone+size] {
		modules = append(modules, row[quietZone:quietZone+size])
	}
	return modules
}

// reserved reports whether a module belongs to a function pattern.
func reservedModule(x, y, size, version int) bool {
	if x == 6 || y == 6 || x < 9 && y < 9 || x < 9 && y >= size-8 || x >= size-8 && y < 9 {
		return true
	}
	if x < 6 && y >= size-11 || y < 6 && x >= size-11 { // version information
		return true
	}
	for _, cx := range alignments[version] {
		for _, cy := range alignments[version] {
			last := size - 7
			finder := cx == 6 && cy == 6 || cx == 6 && cy == last || cx == last && cy == 6
			if !finder && max(x-cx, cx-x, y-cy, cy-y) <= 2 {
				return true
			}
		}
	}
	return false
}

// masks are the eight conditions of table 10 that flip a module.
var masks = []func(y, x int) bool{
	func(y, x int) bool { return (y+x)%2 == 0 },
	func(y, x int) bool { return y%2 == 0 },
	func(y, x int) bool { return x%3 == 0 },
	func(y, x int) bool { return (y+x)%3 == 0 },
	func(y, x int) bool { return (y/2+x/3)%2 == 0 },
	func(y, x int) bool { return y*x%2+y*x%3 == 0 },
	func(y, x int) bool { return (y*x%2+y*x%3)%2 == 0 },
	func(y, x int) bool { return ((y+x)%2+y*x%3)%2 == 0 },
}

// formatOf reads level and mask from the format information around the upper
// left finder pattern.
func formatOf(m [][]bool) (level, mask int) {
	bits := 0
	for _, p := range [][2]int{{0, 8}, {1, 8}, {2, 8}, {3, 8}, {4, 8}} { // x, y
		bits <<= 1
		if m[p[1]][p[0]] {
			bits |= 1
		}
	}
	bits ^= 0x5412 >> 10
	return bits >> 3, bits & 7
}

// codewords reads the bits in the zigzag of section 7.7.3.
func codewords(m [][]bool, version, mask int) []byte {
	size := len(m)
	var out []byte
	n, current := 0, byte(0)
	for right, up := size-1, true; right > 0; right, up = right-2, !up {
		if right == 6 {
			right--
		}
		for i := range size {
			y := i
			if up {
				y = size - 1 - i
			}
			for _, x := range []int{right, right - 1} {
				if reservedModule(x, y, size, version) {
					continue
				}
				current <<= 1
				if m[y][x] != masks[mask](y, x) {
					current |= 1
				}
				if n++; n%8 == 0 {
					out, current = append(out, current), 0
				}
			}
		}
	}
	return out
}

// gfMul multiplies in GF(256) with the polynomial 0x11d.
func gfMul(a, b int) (product int) {
	for ; b > 0; b >>= 1 {
		if b&1 == 1 {
			product ^= a
		}
		if a <<= 1; a > 255 {
			a ^= 0x11d
		}
	}
	return product
}

// intact reports whether all syndromes of a Reed-Solomon block are zero.
func intact(block []byte, check int) bool {
	root := 1
	for range check {
		sum := 0
		for _, c := range block {
			sum = gfMul(sum, root) ^ int(c)
		}
		if sum != 0 {
			return false
		}
		root = gfMul(root, 2)
	}
	return true
}

// deinterleave takes the blocks apart, checks each and joins their data.
func deinterleave(t *testing.T, words []byte, version int) []byte {
	t.Helper()
	layout := blocksL[version]
	n := layout.n1 + layout.n2
	blocks := make([][]byte, n)
	next := 0
	deal := func(from, columns int) {
		for range columns {
			for b := from; b < n; b++ {
				blocks[b] = append(blocks[b], words[next])
				next++
			}
		}
	}
	deal(0, layout.data1)
	if layout.n2 > 0 {
		deal(layout.n1, layout.data2-layout.data1)
	}
	deal(0, layout.check)
	var data []byte
	for i, b := range blocks {
		if !intact(b, layout.check) {
			t.Fatalf("block %d of version %d fails its check", i, version)
		}
		data = append(data, b[:len(b)-layout.check]...)
	}
	return data
}

// bitReader reads numbers, most significant bit first.
type bitReader struct {
	data []byte
	at   int
}

func (r *bitReader) take(n int) (v int) {
	for range n {
		v = v<<1 | int(r.data[r.at/8]>>(7-r.at%8)&1)
		r.at++
	}
	return v
}

// segments reads the text of numeric, alphanumeric and byte segments, with the
// lengths of versions 10 to 26.
func segments(t *testing.T, data []byte) string {
	t.Helper()
	const alphanumeric = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ $%*+-./:"
	r := &bitReader{data: data}
	var text strings.Builder
	for r.at+4 <= len(data)*8 {
		switch mode := r.take(4); mode {
		case 0:
			return text.String()
		case 1:
			for n := r.take(12); n > 0; n -= 3 {
				digits := min(n, 3)
				v := r.take([]int{0, 4, 7, 10}[digits])
				for p := []int{0, 1, 10, 100}[digits]; p > 0; p /= 10 {
					text.WriteByte(byte('0' + v/p%10))
				}
			}
		case 2:
			for n := r.take(11); n > 0; n -= 2 {
				if n == 1 {
					text.WriteByte(alphanumeric[r.take(6)])
					break
				}
				v := r.take(11)
				text.WriteByte(alphanumeric[v/45])
				text.WriteByte(alphanumeric[v%45])
			}
		case 4:
			for n := r.take(16); n > 0; n-- {
				text.WriteByte(byte(r.take(8)))
			}
		default:
			t.Fatalf("segment mode %d", mode)
		}
	}
	return text.String()
}

func TestQRDecodes(t *testing.T) {
	full := phoneConfig(t)
	long := phoneConfig(t)
	long.Endpoint.Host = "a-rather-long-name-of-a-house.dynamic.example.net"
	short := phoneConfig(t)
	short.DNS, short.PrivateKey = nil, mesh.PrivateKey{}
	for _, c := range []Config{full, long, short} {
		for _, colour := range []bool{true, false} {
			code, err := EncodeQR(c.Text())
			if err != nil {
				t.Fatal(err)
			}
			if code.Size() > 80 {
				t.Errorf("%d columns, a terminal has 80", code.Size())
			}
			modules := scan(t, code.Terminal(colour), colour)
			version := (len(modules) - 17) / 4
			if _, known := blocksL[version]; !known || len(modules)%4 != 1 {
				t.Fatalf("%d modules: version %d isn't one that this test decodes", len(modules), version)
			}
			level, mask := formatOf(modules)
			if level != 1 { // table 12: 01 is L
				t.Fatalf("level bits %02b, want 01", level)
			}
			got := segments(t, deinterleave(t, codewords(modules, version, mask), version))
			if got != c.Text() {
				t.Errorf("version %d, colour %v: decoded %q, want %q", version, colour, got, c.Text())
			}
		}
	}
}

func TestQRTooLong(t *testing.T) {
	secret := strings.Repeat("secret", 1000)
	if _, err := EncodeQR(secret); err == nil || strings.Contains(err.Error(), "secretsecret") {
		t.Errorf("error %v", err)
	}
}
