package pfconf

import (
	"fmt"
	"strings"
	"testing"
)

// manyLines returns a ruleset of n lines like a firewall app's.
func manyLines(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "pass in quick on utun4 inet proto tcp from 100.64.%d.%d to { 10.0.0.0/8, ! 192.168.1.1 } port { 22, 8000:8080 } "+
			"flags S/SA keep state (if-bound) label \"peer-%d\"\n", i>>8&255, i&255, i)
	}
	return b.String()
}

func BenchmarkParse10000Lines(b *testing.B) {
	text := manyLines(10000)
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		if _, err := Parse(text); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPrint10000Lines(b *testing.B) {
	rs, err := Parse(manyLines(10000))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		_ = rs.String()
	}
}

func BenchmarkExpand10000Lines(b *testing.B) {
	rs, err := Parse(manyLines(10000))
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := rs.Expand("com.apple/x", testHost()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseTableEntries(b *testing.B) {
	var text strings.Builder
	for i := range 10000 {
		fmt.Fprintf(&text, "   100.64.%d.%d\n", i>>8, i&255)
	}
	for b.Loop() {
		if _, err := ParseTableEntries(text.String()); err != nil {
			b.Fatal(err)
		}
	}
}
