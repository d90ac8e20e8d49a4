package stock

import (
	"image"
	"image/color"
	"strings"
	"testing"

	"github.com/makiuchi-d/gozxing"
	"github.com/makiuchi-d/gozxing/qrcode"
	"github.com/makiuchi-d/gozxing/qrcode/decoder"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/mesh/meshtest"
)

// scan turns a drawing on a terminal back into modules, true for dark ones, with the quiet
// zone. It checks that the quiet zone is light.
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
	return rows
}

// photo returns a picture of modules as a camera takes it.
func photo(modules [][]bool) image.Image {
	const pixels = 4 // per side of a module
	img := image.NewGray(image.Rect(0, 0, len(modules[0])*pixels, len(modules)*pixels))
	for y := range img.Rect.Dy() {
		for x := range img.Rect.Dx() {
			if !modules[y/pixels][x/pixels] {
				img.SetGray(x, y, color.Gray{Y: 255})
			}
		}
	}
	return img
}

// read decodes a drawing with a port of ZXing, which shares no code with the encoder. Like the
// app of a phone, it finds the code in a picture. level is the level of error correction.
func read(t *testing.T, drawing string, colour bool) (text, level string) {
	t.Helper()
	bitmap, err := gozxing.NewBinaryBitmapFromImage(photo(scan(t, drawing, colour)))
	if err != nil {
		t.Fatal(err)
	}
	got, err := qrcode.NewQRCodeReader().Decode(bitmap, nil)
	if err != nil {
		t.Fatal(err)
	}
	level, _ = got.GetResultMetadata()[gozxing.ResultMetadataType_ERROR_CORRECTION_LEVEL].(string)
	return got.GetText(), level
}

// TestQRDecodes draws QR codes with and without colour and decodes them: each has the text of
// the configuration, has error correction of level L, and fits into 80 columns.
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
				t.Errorf("%d columns, but a terminal has 80", code.Size())
			}
			text, level := read(t, code.Terminal(colour), colour)
			if text != c.Text() || level != "L" {
				t.Errorf("%d columns, colour %v, level %q: decoded %q, want %q", code.Size(), colour, level, text, c.Text())
			}
		}
	}
}

// TestQRMask checks that the mask is chosen for each code. With a constant mask some codes
// would have patterns that look like a finder pattern, or large areas of one colour.
func TestQRMask(t *testing.T) {
	masks := map[byte]int{}
	for seed := range byte(40) {
		c := phoneConfig(t)
		c.PrivateKey, c.Endpoint.Host = meshtest.Key(t, seed+1), strings.Repeat("a", int(seed)+1)+".example"
		code, err := EncodeQR(c.Compact())
		if err != nil {
			t.Fatal(err)
		}
		size := code.Size() - 2*quietZone
		bits, err := gozxing.NewSquareBitMatrix(size)
		if err != nil {
			t.Fatal(err)
		}
		for y := range size {
			for x := range size {
				if code.dark(y+quietZone, x+quietZone) {
					bits.Set(x, y)
				}
			}
		}
		parser, err := decoder.NewBitMatrixParser(bits)
		if err != nil {
			t.Fatal(err)
		}
		format, err := parser.ReadFormatInformation()
		if err != nil {
			t.Fatal(err)
		}
		masks[format.GetDataMask()]++
	}
	if len(masks) < 4 {
		t.Errorf("codes by mask: %v", masks)
	}
	t.Log("codes by mask:", masks)
}

// TestQRTooLong encodes the longest text for which a code exists, and a longer one: it gives
// an error, which doesn't quote the text.
func TestQRTooLong(t *testing.T) {
	longest := strings.Repeat("x", 2953)
	code, err := EncodeQR(longest)
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := read(t, code.Terminal(true), true); text != longest {
		t.Errorf("decoded %q", text)
	}
	if _, err := EncodeQR(longest + "x"); err == nil {
		t.Error("a text of 2954 bytes gets a code")
	}
	secret := strings.Repeat("secret", 1000)
	if _, err := EncodeQR(secret); err == nil || strings.Contains(err.Error(), "secretsecret") {
		t.Errorf("error %v, want one that doesn't quote the text", err)
	}
}
