package guard

import (
	"testing"
)

// TestClearDF checks that a fragment loses Don't Fragment, with a right checksum,
// and that nothing else changes.
func TestClearDF(t *testing.T) {
	header := func(flags, low byte) []byte {
		b := make([]byte, 28)
		b[0], b[3], b[4], b[5], b[6], b[7], b[8], b[9] = 0x45, 28, 0x12, 0x34, flags, low, 64, 17
		copy(b[12:], []byte{100, 64, 0, 2, 9, 9, 9, 9})
		sum := checksum(0, b[:header4])
		b[10], b[11] = byte(sum>>8), byte(sum)
		return b
	}
	for _, tt := range []struct {
		about      string
		flags, low byte
		want       byte
	}{
		{"whole", 0x40, 0, 0x40},
		{"first", 0x60, 0, 0x20},
		{"middle", 0x60, 5, 0x20},
		{"last, in the low byte", 0x40, 5, 0x00},
		{"last, in the high bits", 0x41, 0, 0x01},
		{"first without", 0x20, 0, 0x20},
	} {
		b := header(tt.flags, tt.low)
		clearDF(b)
		if b[6] != tt.want || b[7] != tt.low {
			t.Errorf("%s: flags %#x%02x, want %#x", tt.about, b[6], b[7], tt.want)
		}
		if checksum(0, b[:header4]) != 0 {
			t.Errorf("%s: the checksum is wrong", tt.about)
		}
	}
	v6 := append([]byte{0x60}, make([]byte, 39)...)
	v6[6] = 0x60 // its next header
	clearDF(v6)
	if v6[6] != 0x60 {
		t.Error("IPv6 was changed")
	}
	clearDF(nil)
}
