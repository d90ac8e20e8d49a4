package main

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// TestSixtyColumns writes a status, a peer and a list at a terminal of 60 columns: no line
// is longer, and on a wide one peers are a table.
func TestSixtyColumns(t *testing.T) {
	until := time.Now().Add(time.Hour)
	p := api.Peer{
		Name: "annas-laptop", Kind: mesh.External, PublicKey: "4+kGYe2dVTRjEBG9/eVGCXT1Y2OY5tjp2j3GIYuBrkg=",
		Addresses:   []netip.Addr{netip.MustParseAddr("100.126.117.53"), netip.MustParseAddr("fd6d:6573:6800:b7dd:d1ac:5901:fbca:9691")},
		Permissions: api.Permissions{0: {Allowed: true}, 1: {Allowed: true, Until: until}},
		Refused:     api.Refused{Martian: 1, Self: 2, Mesh: 3, LAN: 4, Internet: 5, Spoofed: 6},
	}
	s := api.Status{
		State: api.Enforcing, Addresses: p.Addresses, PublicKey: p.PublicKey, Peers: []api.Peer{p},
		Problems: []api.Problem{{Step: "load table", Message: strings.Repeat("word ", 30), Hint: strings.Repeat("do this ", 20)}},
	}
	for _, columns := range []int{60, 160} {
		var out bytes.Buffer
		a := &app{stdout: &out, terminal: true, columns: columns}
		a.writeStatus(s)
		a.writePeer(p)
		for line := range strings.Lines(out.String()) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > columns {
				t.Errorf("%d of %d columns: %q", n, columns, line)
			}
		}
		if table := strings.Contains(out.String(), "NAME"); table != (columns == 160) {
			t.Errorf("at %d columns a table: %v", columns, table)
		}
	}
}

// TestConfigurationLinesStayWhole says a line that is to be copied into a configuration, at
// a terminal that is narrower.
func TestConfigurationLinesStayWhole(t *testing.T) {
	line := "AllowedIPs = 100.64.0.1/32, fd6d:6573:6800::1/128, 192.168.77.0/24, 192.168.78.0/24"
	var out, talk bytes.Buffer
	a := &app{stdout: &out, stderr: &talk, columns: 60, talkColumns: 60}
	a.talk("  %s", line)
	a.sayWrapped("  [Peer] ", "      ", line)
	if got := talk.String(); got != "  "+line+"\n" {
		t.Errorf("beside the answer: %q", got)
	}
	if got := out.String(); got != "  [Peer]\n  "+line+"\n" {
		t.Errorf("in the answer: %q", got)
	}
}

// TestFit keeps the first lines on a terminal that has fewer rows than there are.
func TestFit(t *testing.T) {
	text := "head\n" + strings.Repeat("x", 25) + "\nc\nd\n"
	for _, c := range []struct {
		rows, columns int
		want          string
	}{
		{0, 0, text}, {8, 10, text},
		{5, 80, text},
		{4, 80, "head\n" + strings.Repeat("x", 25) + "\n(2 more lines)\n"},
		{4, 10, "head\n(3 more lines)\n"}, // the second has 3 rows
	} {
		if got := fit(text, c.rows, c.columns); got != c.want {
			t.Errorf("in %d rows of %d columns: %q, want %q", c.rows, c.columns, got, c.want)
		}
	}
}

// TestFormatBytes has the amounts at the borders of the units.
func TestFormatBytes(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 999: "999 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB",
		99<<10 + 512: "99.5 KiB", 999 << 10: "999 KiB", 999<<10 + 512: "1000 KiB", 1000 << 10: "1000 KiB", 1023 << 10: "1023 KiB",
		1<<20 - 512: "1 MiB", 1<<20 - 513: "1023 KiB", 1<<20 - 1: "1 MiB", 1 << 20: "1 MiB", 1<<30 - 1: "1 GiB", 1<<40 - 1: "1 TiB", 1<<50 - 1: "1 PiB",
		1<<60 - 1: "1 EiB", 1<<64 - 1: "16 EiB",
	} {
		if got := formatBytes(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}

// TestWrapHelp joins a paragraph's lines and breaks them anew, and leaves lists and, in a
// pipe, everything as it is.
func TestWrapHelp(t *testing.T) {
	text := "one two three\nfour five.\n\nOne is:\n  a    first second\n      --flag VALUE   does this and that\n"
	if got := wrapHelp(0, text); got != text {
		t.Errorf("in a pipe: %q", got)
	}
	want := "one two three four\nfive.\n\nOne is:\n  a    first second\n      --flag VALUE   does this\n                     and that\n"
	if got := wrapHelp(30, text); got != strings.ReplaceAll(want, "four\nfive.", "four five.") {
		t.Errorf("30 columns: %q", got)
	}
}
