package stock

import (
	"fmt"
	"strings"

	qr "github.com/piglig/go-qr"
)

// QRCode is a QR code (ISO/IEC 18004) of a configuration's text, for the
// camera of a phone.
type QRCode struct{ symbol *qr.QrCode }

// quietZone is the light border that the standard demands, in modules.
const quietZone = 4

// EncodeQR makes a QR code of text, up to 2953 bytes. It uses the lowest error
// correction: a screen doesn't wear, and a configuration's code then fits on a
// terminal of 80 columns. The mask is the one with the lowest penalty.
func EncodeQR(text string) (QRCode, error) {
	segments, err := qr.MakeSegments(text)
	var symbol *qr.QrCode
	if err == nil {
		symbol, err = qr.EncodeSegments(segments, qr.Low, qr.MinVersion, qr.MaxVersion, -1, false)
	}
	if err != nil {
		// The library's error could quote the text, which holds a private key.
		return QRCode{}, fmt.Errorf("encode QR code of %d bytes: too long", len(text))
	}
	return QRCode{symbol}, nil
}

// Size returns the number of columns, quiet zone included.
func (q QRCode) Size() int { return q.symbol.Size() + 2*quietZone }

// dark reports whether the module is dark; the quiet zone and everything outside is light.
func (q QRCode) dark(row, column int) bool {
	return q.symbol.Module(column-quietZone, row-quietZone)
}

// blackOnWhite makes a terminal print black on white whatever its colours are
// (ECMA-48 SGR, in the 256 colour palette, whose entries themes leave alone).
const (
	blackOnWhite = "\x1b[38;5;16;48;5;231m"
	plain        = "\x1b[0m"
)

// Terminal draws q with half blocks, two rows of modules per line. With colour
// it is black on white on every terminal; without, the light modules are drawn
// as blocks, which is right on a dark background, and which most cameras read
// on a light one, too.
func (q QRCode) Terminal(colour bool) string {
	var b strings.Builder
	for row := 0; row < q.Size(); row += 2 {
		if colour {
			b.WriteString(blackOnWhite)
		}
		for column := range q.Size() {
			// Set means drawn in the foreground colour.
			top, bottom := q.dark(row, column) == colour, q.dark(row+1, column) == colour
			b.WriteString(halfBlock(top, bottom))
		}
		if colour {
			b.WriteString(plain)
		}
		b.WriteString("\n")
	}
	return b.String()
}

func halfBlock(top, bottom bool) string {
	switch {
	case top && bottom:
		return "█"
	case top:
		return "▀"
	case bottom:
		return "▄"
	}
	return " "
}
