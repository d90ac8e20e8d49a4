package linux

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// fullPercent is the fill of conntrack, in percent, that is reported as a problem. While
// the table is full the kernel drops the first packet of every new flow, including the
// host's own.
const fullPercent = 90

// Sysctls with the number of conntrack entries in this network namespace and their
// maximum (Documentation/networking/nf_conntrack-sysctl.rst).
const (
	flowCount = "netfilter/nf_conntrack_count"
	flowMax   = "netfilter/nf_conntrack_max"
)

// conntrackFill returns the number of conntrack's entries and its maximum. Both are 0 if
// there is no maximum, or no conntrack.
func conntrackFill(sys sysctls) (have, most uint64, err error) {
	var n [2]uint64
	for i, name := range []string{flowCount, flowMax} {
		v, err := sys.read(name)
		if errors.Is(err, fs.ErrNotExist) {
			return 0, 0, nil
		}
		if err == nil {
			n[i], err = strconv.ParseUint(v, 10, 32)
		}
		if err != nil {
			return 0, 0, fmt.Errorf("fill of conntrack: %w", err)
		}
	}
	if n[1] == 0 {
		return 0, 0, nil
	}
	return n[0], n[1], nil
}

// fillProblems reports that conntrack is nearly full.
func fillProblems(sys sysctls) ([]host.Problem, error) {
	have, most, err := conntrackFill(sys)
	if err != nil || most == 0 || have*100 < most*fullPercent {
		return nil, err
	}
	return []host.Problem{{
		Step: stepOthers, Kind: host.KindOtherFilters,
		Message: fmt.Sprintf("the kernel's table of flows holds %d of at most %d (net.netfilter.nf_conntrack_max): "+
			"when it is full, no new connection of the host or a peer gets through", have, most),
		Hint: "`conntrack -L` lists the flows and their sources; `sysctl -w net.netfilter.nf_conntrack_max=N` allows more",
	}}, nil
}

// holders caches which peers' flows fill conntrack.
type holders struct {
	looks int
	text  string
}

const (
	// countEvery is how many checks of a full table pass between two counts: reading
	// 262,144 entries takes half a second of CPU time.
	countEvery = 10
	// maxHolders is how many peers are named, and minHolderPercent the share of the
	// flows, in percent, that each of them has at least.
	maxHolders       = 3
	minHolderPercent = 1
)

// nameHolders adds the peers with the most flows to the problem of a full table. If
// counting fails the problem stays as it is.
func (o *others) nameHolders(ctx context.Context, full []host.Problem, r *policy.Ruleset) {
	if len(full) == 0 {
		o.holders = holders{}
		return
	}
	if o.holders.looks%countEvery == 0 {
		if text, err := o.countHolders(ctx, r); err == nil {
			o.holders.text = text
		}
	}
	o.holders.looks++
	full[0].Message += o.holders.text
}

// countHolders returns the text that names the peers with the most flows.
func (o *others) countHolders(ctx context.Context, r *policy.Ruleset) (string, error) {
	of, all, err := o.countFlows(ctx, r, func(*flowEntry) bool { return true })
	if err != nil {
		return "", err
	}
	peers := byCount(of)
	var parts []string
	for _, i := range peers[:min(len(peers), maxHolders)] {
		if percent := of[i] * 100 / all; percent >= minHolderPercent {
			parts = append(parts, fmt.Sprintf("%s %d %%", r.Peers()[i].Name, percent))
		}
	}
	if len(parts) == 0 {
		return "; almost none are of peers", nil
	}
	return "; of peers: " + strings.Join(parts, ", "), nil
}

// countFlows counts the conntrack entries that which selects, by the index in r of the
// peer that opened the flow. all counts every entry, whatever opened it.
func (o *others) countFlows(ctx context.Context, r *policy.Ruleset, which func(*flowEntry) bool) (of []uint64, all uint64, err error) {
	of = make([]uint64, len(r.Peers()))
	err = o.flows.each(ctx, unix.AF_UNSPEC, netip.Addr{}, func(e *flowEntry) error {
		all++
		if i, ok := r.PeerByAddr(e.orig.src); ok && which(e) {
			of[i]++
		}
		return nil
	})
	return of, all, err
}

// byCount returns the indexes of the peers that have any flows, in descending order of
// their counts.
func byCount(of []uint64) (peers []int) {
	for i, n := range of {
		if n > 0 {
			peers = append(peers, i)
		}
	}
	slices.SortFunc(peers, func(a, b int) int { return cmp.Or(cmp.Compare(of[b], of[a]), cmp.Compare(a, b)) })
	return peers
}
