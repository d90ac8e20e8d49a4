package linux

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/policy"
)

func TestParseResolvers(t *testing.T) {
	for text, want := range map[string]string{
		"":                                  "",
		"nameserver 100.100.2.136\n":        "100.100.2.136",
		"nameserver\t9.9.9.9 # mine\r\n":    "9.9.9.9",
		"# nameserver 9.9.9.9\n":            "",
		"search nameserver 9.9.9.9\n":       "",
		"nameserver 127.0.0.53\n":           "",
		"nameserver fe80::1%eth0\n":         "",
		"nameserver ::ffff:100.100.2.138\n": "100.100.2.138",
		"nameserver\nnameserver x\nnameserver fd6d:6573:6800::53": "fd6d:6573:6800::53",
		strings.Repeat("nameserver 9.9.9.9\n", maxResolvers+1):    strings.TrimSpace(strings.Repeat("9.9.9.9 ", maxResolvers)),
	} {
		var got []string
		for _, a := range parseResolvers([]byte(text)) {
			got = append(got, a.String())
		}
		if g := strings.Join(got, " "); g != want {
			t.Errorf("%.60q: %q, want %q", text, g, want)
		}
	}
}

func TestReadResolvers(t *testing.T) {
	dir := t.TempDir()
	one, two := filepath.Join(dir, "one"), filepath.Join(dir, "two")
	for path, text := range map[string]string{one: "nameserver 9.9.9.9\nnameserver 100.100.2.136\n", two: "nameserver 100.100.2.136\n"} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got := readResolvers([]string{one, filepath.Join(dir, "missing"), dir, two})
	want := []netip.Addr{netip.MustParseAddr("9.9.9.9"), netip.MustParseAddr("100.100.2.136")}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// FuzzParseResolvers checks that any file gives facts that the policy accepts.
func FuzzParseResolvers(f *testing.F) {
	f.Add([]byte("nameserver 100.100.2.136\nnameserver fe80::1%eth0\n"))
	f.Add([]byte("nameserver ::ffff:1.2.3.4\n\x00nameserver ::\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		h := policy.Host{Interface: "mesh0", Resolvers: parseResolvers(text)}
		if err := h.Validate(); err != nil || len(h.Resolvers) > maxResolvers {
			t.Errorf("%d resolvers: %v", len(h.Resolvers), err)
		}
	})
}
