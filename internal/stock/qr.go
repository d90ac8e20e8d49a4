package stock

import (
	"fmt"
	"strings"

	qr "github.com/piglig/go-qr"
)

// QRCode is a QR code (ISO/IEC 18004) of a configuration's text, for a phone's camera.
type QRCode struct{ symbol *qr.QrCode }

// quietZone is the width of the light border that the standard requires, in modules.
const quietZone = 4

// EncodeQR makes a QR code of text, which has at most 2953 bytes: the capacity of the largest
// code, version 40, at level L. It uses the lowest level of
// error correction: a screen has no scratches, and the code of a configuration then fits on a
// terminal of 80 columns. Errors don't quote the text, which has a private key.
func EncodeQR(text string) (QRCode, error) {
	segments, err := qr.MakeSegments(text)
	var symbol *qr.QrCode
	if err == nil {
		symbol, err = qr.EncodeSegments(segments, qr.Low, qr.MinVersion, qr.MaxVersion, -1, false)
	}
	if err != nil {
		// Drop the library's error, which could quote the text.
		return QRCode{}, fmt.Errorf("encode QR code of %d bytes: too long", len(text))
	}
	return QRCode{symbol}, nil
}

// Size returns the number of columns, including the quiet zone; each is one character wide.
func (q QRCode) Size() int { return q.symbol.Size() + 2*quietZone }

// dark reports whether a module is dark. The quiet zone and everything outside is light.
func (q QRCode) dark(row, column int) bool {
	return q.symbol.Module(column-quietZone, row-quietZone)
}

// blackOnWhite makes a terminal print black on white, whatever its theme: ECMA-48 SGR with
// entries 16 and 231 of the 256 colour palette, which themes don't change. plain resets it.
const (
	blackOnWhite = "\x1b[38;5;16;48;5;231m"
	plain        = "\x1b[0m"
)

// Terminal draws q with half blocks, two rows of modules per line. With colour it is black on
// white on every terminal. Without, it draws the light modules in the foreground colour. That
// is right on a dark background; on a light one the code is inverted, which most cameras read,
// too.
func (q QRCode) Terminal(colour bool) string {
	var b strings.Builder
	for row := 0; row < q.Size(); row += 2 {
		if colour {
			b.WriteString(blackOnWhite)
		}
		for column := range q.Size() {
			// top and bottom say which halves are drawn in the foreground colour.
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

// halfBlock returns the block character with the given halves drawn.
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
