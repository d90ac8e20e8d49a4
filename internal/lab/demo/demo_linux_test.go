package main

// The whole demo, and the part of its output that README shows.

import (
	"bytes"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

func TestMain(m *testing.M) { os.Exit(netlab.Main(m.Run)) }

// TestDemo plays the story, which judges itself, and finds what README shows of it.
func TestDemo(t *testing.T) {
	if err := netlab.Unavailable(); err != nil {
		t.Skip("no hosts to show the product on:", err)
	}
	var out bytes.Buffer
	if err := play(t.Context(), &out, nil); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	readme, err := os.ReadFile("../../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, shown, found := strings.Cut(string(readme), "    make demo\n\n")
	if !found {
		t.Fatal("README doesn't show the demo")
	}
	shown, _, _ = strings.Cut(shown, "\n\n**")
	for part := range strings.SplitSeq(shown, "\n\n") {
		text := regexp.MustCompile(`(?m)^    `).ReplaceAllString(part, "")
		if !strings.Contains(plain(out.String()), plain(text)) {
			t.Errorf("README shows\n%s\nthe demo prints\n%s", text, &out)
		}
	}
}

// plain takes out what differs from one run to the next.
func plain(s string) string {
	s = regexp.MustCompile(`\d+\.\d MB`).ReplaceAllString(s, "N MB")
	return regexp.MustCompile(`(?m) +$`).ReplaceAllString(s, "")
}
