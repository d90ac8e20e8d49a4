package daemon

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// PlanPrefixes returns what would change with other mesh prefixes: the peers that get other
// addresses, sorted by name, and the lines of their configurations that change. It changes
// nothing; a helper that starts with these prefixes and [Options.Renumber] gives out the same
// addresses. It fails if the prefixes aren't valid, if one of [Options.Addresses] isn't in them,
// or if they have too few addresses for all peers.
func (d *Daemon) PlanPrefixes(prefixes mesh.Prefixes) ([]api.Renumbered, error) {
	if err := prefixes.Validate(); err != nil {
		return nil, api.Errorf(api.CodeBadAddress, "%v", err).WithHint("take a private prefix that isn't in use here")
	}
	m, err := d.wanted.IdentityIn(prefixes)
	if err != nil {
		return nil, err
	}
	doc := d.wanted.Document()
	next, err := doc.Renumbered(m, d.wanted.Now())
	if err != nil {
		return nil, err
	}
	out := []api.Renumbered{}
	for i := range doc.Peers {
		was, is := &doc.Peers[i], &next.Peers[i]
		moved := map[netip.Addr]netip.Addr{
			d.id.Own[0]: m.Own[0], d.id.Own[1]: m.Own[1],
			was.Addresses[0]: is.Addresses[0], was.Addresses[1]: is.Addresses[1],
		}
		config, err := d.Config(was.Name)
		if err != nil {
			return nil, err
		}
		lines := changedLines(config.Text, moved, map[netip.Prefix]netip.Prefix{d.id.Prefixes.V4: m.Prefixes.V4, d.id.Prefixes.V6: m.Prefixes.V6})
		if was.Addresses == is.Addresses && len(lines) == 0 {
			continue
		}
		out = append(out, api.Renumbered{Name: was.Name, Was: was.Addresses[:], Is: is.Addresses[:], Lines: lines})
	}
	slices.SortFunc(out, func(a, b api.Renumbered) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// changedLines returns the lines of a wg-quick(8) configuration that change with the addresses in
// moved and the mesh prefixes in prefixes, both from old to new. Only lists of addresses are
// examined: an endpoint isn't inside the mesh.
func changedLines(text string, moved map[netip.Addr]netip.Addr, prefixes map[netip.Prefix]netip.Prefix) []api.ChangedLine {
	out := []api.ChangedLine{}
	section := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			if strings.HasPrefix(line, "[") {
				section = line
			}
			continue
		}
		// Keys in base64 end with "=", but aren't among these values.
		switch strings.ToLower(strings.TrimSpace(key)) {
		case "address", "allowedips", "dns":
		default:
			continue
		}
		items := strings.Split(value, ",")
		for i, item := range items {
			item = strings.TrimSpace(item)
			items[i] = item
			if a, err := netip.ParseAddr(item); err == nil {
				if to, ok := moved[a]; ok {
					items[i] = to.String()
				}
				continue
			}
			p, err := netip.ParsePrefix(item)
			if err != nil {
				continue
			}
			if to, ok := prefixes[p]; ok {
				items[i] = to.String()
			} else if to, ok := moved[p.Addr()]; ok && p.IsSingleIP() {
				items[i] = netip.PrefixFrom(to, p.Bits()).String()
			}
		}
		if is := strings.TrimSpace(key) + " = " + strings.Join(items, ", "); is != line {
			out = append(out, api.ChangedLine{Section: section, Was: line, Is: is})
		}
	}
	return out
}
