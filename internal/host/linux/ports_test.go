package linux

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestFreePorts(t *testing.T) {
	local := portRange{32768, 60999}
	for _, tt := range []struct {
		name  string
		taken []portRange
		had   portRange
		want  portRange
	}{
		{"as by default", []portRange{local}, portRange{}, portRange{1024, 32767}},
		{"nothing is taken", nil, portRange{}, portRange{1024, 65534}},
		{"programs listen", []portRange{local, {8080, 8080}, {5432, 5432}, {22000, 22000}}, portRange{}, portRange{8081, 21999}},
		{"reserved", []portRange{local, {1024, 40000}}, portRange{}, portRange{61000, 65534}},
		{"overlapping", []portRange{local, {30000, 40000}, {1, 2000}}, portRange{}, portRange{2001, 29999}},
		{"all local", []portRange{{1024, 65535}}, portRange{}, portRange{}},
		{"few are left", []portRange{{1024, 65000}}, portRange{}, portRange{65001, 65534}},
		{"fewer are left", []portRange{{1024, 65100}}, portRange{}, portRange{}},
		{"what was in use is kept", []portRange{local, {8080, 8080}}, portRange{1024, 8079}, portRange{1024, 8079}},
		{"what was in use is no range that is wide enough", []portRange{local}, portRange{2000, 2100}, portRange{1024, 32767}},
		{"a setting took one", []portRange{local, {8080, 8080}}, portRange{1024, 32767}, portRange{8081, 32767}},
	} {
		if got := (hostPorts{privileged: lastPrivileged, taken: tt.taken}).keep(tt.had); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestSocketsChooseARangeOnce has sockets of several users: a new range avoids them if it
// is large enough, and a range in use doesn't change because of them.
func TestSocketsChooseARangeOnce(t *testing.T) {
	h := hostPorts{privileged: lastPrivileged, taken: []portRange{{32768, 60999}}, bound: map[uint16]uint32{8080: 0, 22000: 1000, 61500: 7}}
	if got, want := h.keep(portRange{}), (portRange{8081, 21999}); got != want {
		t.Errorf("with sockets the range is %v, want %v", got, want)
	}
	all := portRange{1024, 32767}
	if got := h.keep(all); got != all {
		t.Errorf("sockets have the range be %v instead of %v", got, all)
	}
	if got := h.boundIn(all); !slices.Equal(got, []uint16{8080, 22000}) {
		t.Errorf("sockets of the range: %v", got)
	}
	for port := 1024 + minPorts - 1; port < 65536; port += minPorts {
		h.bound[uint16(port)] = 65534
	}
	if got := h.keep(portRange{}); got != all {
		t.Errorf("with a socket in each %d ports the range is %v, want %v", minPorts, got, all)
	}
	if uid, n := h.most(all); uid != 65534 || n != 62 {
		t.Errorf("user %d has %d ports, want user 65534 with 62", uid, n)
	}
}

// TestFreePortsAreNoneOfTheHosts draws reserved ports: the range has none of them, and no
// larger range is free.
func TestFreePortsAreNoneOfTheHosts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := hostPorts{privileged: uint16(rapid.IntRange(lastPrivileged, 5000).Draw(t, "privileged"))}
		for range rapid.IntRange(0, 8).Draw(t, "number") {
			a, b := rapid.Uint16().Draw(t, "port"), rapid.Uint16().Draw(t, "port")
			h.taken = append(h.taken, portRange{min(a, b), max(a, b)})
		}
		got := h.free()
		run, longest := 0, 0
		for p := range 65535 {
			if run++; h.has(uint16(p)) {
				run = 0
			}
			longest = max(longest, run)
		}
		if longest < minPorts {
			longest = 0
		}
		if got.size() != longest {
			t.Fatalf("%v has %d ports, the longest run %d", got, got.size(), longest)
		}
		if got.size() == 0 {
			return
		}
		around := h.around(got)
		for p := range 65536 {
			if port := uint16(p); got.has(port) && (h.has(port) || !around.has(port)) || around.has(port) && h.has(port) {
				t.Fatalf("port %d: in %v %t, around %v %t, the host's %t", p, got, got.has(port), around, around.has(port), h.has(port))
			}
		}
	})
}

func TestReadHostPorts(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "ipv4", name), []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "ipv4"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := readHostPorts(sysctls{dir}); err == nil {
		t.Error("without sysctls there is no error")
	}
	write("ip_local_port_range", "32768\t60999")
	write("ip_local_reserved_ports", "8080,9000-9010")
	write("ip_unprivileged_port_start", "2000")
	h, err := readHostPorts(sysctls{dir})
	if err != nil {
		t.Fatal(err)
	}
	for port, want := range map[uint16]bool{1999: true, 2000: false, 8080: true, 9005: true, 9011: false, 32768: true, 60999: true, 61000: false} {
		if h.has(port) != want {
			t.Errorf("port %d is the host's: %t, want %t", port, h.has(port), want)
		}
	}
	for _, start := range []string{"0", "1", "80"} {
		write("ip_unprivileged_port_start", start)
		if h, err = readHostPorts(sysctls{dir}); err != nil || !h.has(80) || !h.has(1023) {
			t.Errorf("privileged ports aren't the host's where any user may bind those from %s on: %v, %v", start, h, err)
		}
	}
	write("ip_local_reserved_ports", "9-8")
	if _, err := readHostPorts(sysctls{dir}); err == nil {
		t.Error("a range that ends before it begins is no error")
	}
}

func FuzzParsePorts(f *testing.F) {
	f.Add("32768 60999")
	f.Add("8080,9000-9010")
	f.Fuzz(func(t *testing.T, text string) {
		if r, err := parseLocalPorts(text); err == nil && r.last < r.first {
			t.Errorf("%q gave %v", text, r)
		}
		rs, err := parsePorts(text)
		for _, r := range rs {
			if err == nil && r.last < r.first {
				t.Errorf("%q gave %v", text, r)
			}
		}
	})
}
