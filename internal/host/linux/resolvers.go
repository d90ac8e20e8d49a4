package linux

import (
	"bytes"
	"io"
	"net/netip"
	"os"
	"slices"
	"syscall"
)

// Bounds for such a file: its size in bytes, and the number of servers.
const (
	maxResolverFile = 1 << 16
	maxResolvers    = 64
)

// readResolvers returns the servers in the files, sorted. They matter only if they are in
// the mesh prefix, such as a cloud's resolver at 100.100.2.136: then the address has
// another owner. A file that is missing or unreadable counts as empty.
func readResolvers(paths []string) []netip.Addr {
	var out []netip.Addr
	for _, path := range paths {
		out = append(out, readResolverFile(path)...)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// readResolverFile reads one file, if it is a regular one.
func readResolverFile(path string) []netip.Addr {
	// Without O_NONBLOCK, opening a pipe would wait for its writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil
	}
	text, err := io.ReadAll(io.LimitReader(f, maxResolverFile))
	if err != nil {
		return nil
	}
	return parseResolvers(text)
}

// parseResolvers returns the servers in a resolv.conf(5), except addresses that aren't
// another host's unicast address: loopback, and link-local with its zone. A line that
// isn't understood is skipped, as the C library does.
func parseResolvers(text []byte) []netip.Addr {
	var out []netip.Addr
	for line := range bytes.Lines(text) {
		words := bytes.Fields(line)
		if len(words) < 2 || string(words[0]) != "nameserver" {
			continue
		}
		a, err := netip.ParseAddr(string(words[1]))
		if err != nil {
			continue
		}
		a = a.Unmap()
		if a.Zone() != "" || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsUnspecified() {
			continue
		}
		if out = append(out, a); len(out) == maxResolvers {
			break
		}
	}
	return out
}
