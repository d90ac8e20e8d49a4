package daemon

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// PlanPrefixes returns what changes with other mesh prefixes: the peers that get other
// addresses, and which lines of their configurations change, by name. Nothing is changed:
// a helper that starts with these prefixes and [Options.Renumber] does that, the same way.
// The error says what is wrong with the prefixes, that one of [Options.Addresses] isn't
// in them, or that they have no room for all peers.
func (d *Daemon) PlanPrefixes(prefixes mesh.Prefixes) ([]api.Renumbered, error) {
	if err := prefixes.Validate(); err != nil {
		return nil, api.Errorf(api.CodeBadAddress, "%v", err).WithHint("take a private prefix that isn't in use here")
	}
	m, err := d.placed(prefixes)
	if err != nil {
		return nil, err
	}
	doc := d.wanted.Load()
	next, err := doc.renumbered(m, d.clock.now())
	if err != nil {
		return nil, err
	}
	out := []api.Renumbered{}
	for i := range doc.Peers {
		was, is := &doc.Peers[i], &next.Peers[i]
		moved := map[netip.Addr]netip.Addr{
			d.mesh.own[0]: m.own[0], d.mesh.own[1]: m.own[1],
			was.Addresses[0]: is.Addresses[0], was.Addresses[1]: is.Addresses[1],
		}
		config, err := d.Config(was.Name)
		if err != nil {
			return nil, err
		}
		lines := changedLines(config.Text, moved, map[netip.Prefix]netip.Prefix{d.mesh.prefixes.V4: m.prefixes.V4, d.mesh.prefixes.V6: m.prefixes.V6})
		if was.Addresses == is.Addresses && len(lines) == 0 {
			continue
		}
		out = append(out, api.Renumbered{Name: was.Name, Was: was.Addresses[:], Is: is.Addresses[:], Lines: lines})
	}
	slices.SortFunc(out, func(a, b api.Renumbered) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// changedLines returns the lines of a configuration in which an address moves to another
// one, or a prefix.
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
		// A key may end with "=", and an address is in none.
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

// renumbered returns the document with peers' addresses that this mesh has a place for, as
// the next generation: an address that fits stays, and another is derived anew from the
// peer's key. Where that one is taken, the next attempt of the derivation counts, in the
// order of the peers, so that the outcome is the same each time. The addresses of before
// are kept in for a day, as a removed peer's are.
func (doc *document) renumbered(m identity, now time.Time) (*document, error) {
	next := doc.clone()
	taken := map[netip.Addr]bool{m.own[0]: true, m.own[1]: true}
	stays := make([][2]bool, len(next.Peers))
	for i := range next.Peers {
		for n, a := range next.Peers[i].Addresses {
			// Check of the family's own prefix: an address in the other one doesn't exist.
			if m.prefixes.Check(a) == nil && !taken[a] {
				stays[i][n], taken[a] = true, true
			}
		}
	}
	for i := range next.Peers {
		p := &next.Peers[i]
		if stays[i] == [2]bool{true, true} {
			continue
		}
		a, err := m.prefixes.Propose(p.PublicKey, func(a netip.Addr) bool { return taken[a] })
		if err != nil {
			return nil, api.Errorf(api.CodeBadAddress, "%v and %v have no room for all %d peers: %v", m.prefixes.V4, m.prefixes.V6, len(next.Peers), err).
				WithHint("take a shorter prefix, such as a /16")
		}
		for n, addr := range a.List() {
			if !stays[i][n] {
				p.Addresses[n], taken[addr] = addr, true
			}
		}
	}
	next.Generation++
	next.Saved = now
	next.retire(doc, now)
	return next, nil
}

// renumber gives the peers of a document that was read addresses that fit this mesh, and
// says which.
func (d *Daemon) renumber(doc *document) (*document, error) {
	next, err := doc.renumbered(d.mesh, d.clock.now())
	if err != nil {
		return nil, err
	}
	for i := range next.Peers {
		if was, is := &doc.Peers[i], &next.Peers[i]; was.Addresses != is.Addresses {
			d.journal.Record(events.Event{Kind: events.Change, Peer: is.Name, Message: fmt.Sprintf(
				"%s changed with the mesh prefixes: it has %v and %v, and had %v and %v; its configuration has to change, too: meshhelper peer config %s",
				is.Name, is.Addresses[0], is.Addresses[1], was.Addresses[0], was.Addresses[1], is.Name)})
		}
	}
	return next, nil
}
