package darwin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// scutilPath shows the DNS configuration. /etc/resolv.conf, which would cost no
// process, has the default resolvers only: neither those of single domains nor
// those of other interfaces, as its header says.
const scutilPath = "/usr/sbin/scutil"

// A Resolver is one entry of the DNS configuration: servers, and what they are
// asked for.
type Resolver struct {
	// Servers in the order in which they are asked; link-local ones with a zone.
	Servers []netip.Addr
	// Port is that of the servers; 0 for the usual one.
	Port uint16
	// Domain is what they are asked for; "" for everything.
	Domain string
	// Interface is the one that they belong to; "" when that isn't told.
	Interface string
	// Scoped resolvers are asked only for sockets that are bound to Interface.
	Scoped bool
}

// Resolvers returns the addresses of all DNS servers that this Mac is configured to
// ask, sorted, without zones. It starts a process: ask when the network has
// changed, and now and then, since the configuration may change without it.
func Resolvers(ctx context.Context, r Runner) ([]netip.Addr, error) {
	args := []string{"--dns"}
	stdout, stderr, status, err := r.Run(ctx, nil, scutilPath, args...)
	if err == nil && status != 0 {
		err = failure(stderr, status, scutilPath, args)
	}
	var list []Resolver
	if err == nil {
		list, err = ParseResolvers(string(stdout))
	}
	if err != nil {
		return nil, fmt.Errorf("read DNS configuration: %w", err)
	}
	var all []netip.Addr
	for _, one := range list {
		for _, a := range one.Servers {
			// One on this Mac itself is on no network, and a mapped one is an IPv4
			// address in other clothes.
			if a = a.Unmap().WithZone(""); !a.IsLoopback() && !a.IsUnspecified() && !a.IsMulticast() {
				all = append(all, a)
			}
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all), nil
}

// ParseResolvers reads what `scutil --dns` prints (configd scutil.tproj/tests.c and
// dnsinfo/dnsinfo_logging.h). Resolvers without servers, as those of multicast DNS,
// are left out. Text that is no DNS configuration is an error: it mustn't pass for
// one without servers.
func ParseResolvers(text string) ([]Resolver, error) {
	var list []Resolver
	known, open := false, false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "DNS configuration"):
			known, open = true, false
		case line == "No DNS configuration available":
			known = true
		case strings.HasPrefix(line, "resolver #") && known:
			list, open = append(list, Resolver{}), true
		case open:
			if err := list[len(list)-1].read(line); err != nil {
				return nil, fmt.Errorf("read %q: %w", firstLine([]byte(line)), err)
			}
		}
	}
	if !known {
		return nil, errors.New("no DNS configuration in the text")
	}
	return slices.DeleteFunc(list, func(r Resolver) bool { return len(r.Servers) == 0 }), nil
}

// read reads a line `name : value`. Of names that it doesn't know, and there are
// some, it takes nothing.
func (r *Resolver) read(line string) error {
	name, value, ok := strings.Cut(line, " : ")
	if !ok {
		return nil
	}
	name, value = strings.TrimSpace(name), strings.TrimSpace(value)
	switch key, _, _ := strings.Cut(name, "["); key {
	case "nameserver":
		a, err := netip.ParseAddr(value)
		if err != nil {
			return err
		}
		r.Servers = append(r.Servers, a)
	case "port":
		n, err := strconv.ParseUint(value, 10, 16)
		if err != nil {
			return fmt.Errorf("port %q is not valid", value)
		}
		r.Port = uint16(n)
	case "domain":
		r.Domain = value
	case "if_index":
		if _, after, ok := strings.Cut(value, "("); ok {
			r.Interface = strings.TrimSuffix(after, ")")
		}
	case "flags":
		r.Scoped = strings.Contains(value, "Scoped")
	}
	return nil
}
