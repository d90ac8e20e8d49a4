package netlab

// Snapshots of what a program may change on a host, compared to prove that it left the
// host as it found it.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
)

// Snapshot has the state of a host that a program could have changed: one line for each
// interface, address, route, policy rule, sysctl of its interfaces, and object of
// nftables. It leaves out what changes by itself: counters, lifetimes, neighbours, and
// the sysctls that appear when conntrack or nftables is loaded.
type Snapshot []string

// Snapshot reads the host. It includes the handles of nftables' objects, so that a table
// that was deleted and created again differs.
func (h *Host) Snapshot() (Snapshot, error) {
	var all Snapshot
	for _, part := range []func() ([]string, error){h.interfaces, h.routes, h.rules, h.sysctls, h.Ruleset} {
		lines, err := part()
		if err != nil {
			return nil, fmt.Errorf("take snapshot of %s: %w", h.Name, err)
		}
		all = append(all, lines...)
	}
	return all, nil
}

// Diff returns the lines that are in only one of two snapshots: "-" before, "+" after.
func (s Snapshot) Diff(after Snapshot) []string {
	var diff []string
	have := count(after)
	for _, line := range s {
		if have[line]--; have[line] < 0 {
			diff = append(diff, "- "+line)
		}
	}
	had := count(s)
	for _, line := range after {
		if had[line]--; had[line] < 0 {
			diff = append(diff, "+ "+line)
		}
	}
	return diff
}

func count(lines []string) map[string]int {
	n := map[string]int{}
	for _, line := range lines {
		n[line]++
	}
	return n
}

func (h *Host) interfaces() ([]string, error) {
	links, err := h.nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var lines []string
	for _, l := range links {
		a := l.Attrs()
		lines = append(lines, fmt.Sprintf("interface %s %s index %d mtu %d %s %s", a.Name, l.Type(), a.Index, a.MTU, a.Flags, a.HardwareAddr))
		addrs, err := h.nl.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", a.Name, err)
		}
		for _, addr := range addrs {
			lines = append(lines, fmt.Sprintf("address %s %s scope %d flags %#x", a.Name, addr.IPNet, addr.Scope, addr.Flags))
		}
	}
	return lines, nil
}

// routes returns the routes of every table, without the kernel's cached path MTUs.
func (h *Host) routes() ([]string, error) {
	var lines []string
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := h.nl.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range routes {
			lines = append(lines, fmt.Sprintf("route %d table %d type %d protocol %d metric %d: %s", family, r.Table, r.Type, r.Protocol, r.Priority, r))
		}
	}
	slices.Sort(lines)
	return lines, nil
}

func (h *Host) rules() ([]string, error) {
	var lines []string
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := h.nl.RuleList(family)
		if err != nil {
			return nil, fmt.Errorf("list policy rules: %w", err)
		}
		for _, r := range rules {
			lines = append(lines, fmt.Sprintf("rule %d %s table %d", family, r, r.Table))
		}
	}
	return lines, nil
}

// sysctls returns those sysctls of both IP families that exist in every namespace.
func (h *Host) sysctls() ([]string, error) {
	var lines []string
	err := h.Do(func() error {
		for _, family := range []string{"ipv4", "ipv6"} {
			root := "/proc/sys/net/" + family
			if err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				value, err := os.ReadFile(path)
				if err != nil {
					return nil // write-only, or never set (stable_secret)
				}
				lines = append(lines, fmt.Sprintf("sysctl %s = %s", strings.TrimPrefix(path, "/proc/sys/"), strings.TrimSpace(string(value))))
				return nil
			}); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("read sysctls: %w", err)
			}
		}
		return nil
	})
	return lines, err
}
