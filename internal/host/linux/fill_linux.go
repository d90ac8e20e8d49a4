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

// fullFlows is the share of the kernel's table of flows, in percent, from which on
// its fill is a problem. The kernel drops the first packet of every new flow, also
// of the host's own, while the table is full.
const fullPercent = 90

// The sysctls of conntrack: how many entries this network namespace has, and how
// many it may have (Documentation/networking/nf_conntrack-sysctl.rst).
const (
	flowCount = "netfilter/nf_conntrack_count"
	flowMax   = "netfilter/nf_conntrack_max"
)

// conntrackFill returns how many entries conntrack has and how many it may have; 0 of 0
// where it has no bound, or there is none.
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

// fillProblems says that the kernel's table of flows is nearly full. A kernel
// without the sysctls, or with no bound (a maximum of 0), has no such problem.
func fillProblems(sys sysctls) ([]host.Problem, error) {
	have, most, err := conntrackFill(sys)
	if err != nil || most == 0 || have*100 < most*fullPercent {
		return nil, err
	}
	return []host.Problem{{
		Step: stepOthers,
		Message: fmt.Sprintf("the kernel's table of flows holds %d of at most %d (net.netfilter.nf_conntrack_max): "+
			"when it is full, no new connection of the host or a peer gets through", have, most),
		Hint: "`conntrack -L` lists the flows and their sources; `sysctl -w net.netfilter.nf_conntrack_max=N` allows more",
	}}, nil
}

// holders says which peers the flows in conntrack are of.
type holders struct {
	looks int
	text  string
}

const (
	// holdersEvery is in how many looks at a full table its flows are counted once:
	// that takes half a second of a core where there are 262,144.
	countEvery = 10
	// holdersNamed is how many peers are named, and holdersLeast how many percent of
	// the flows each of them has at least.
	maxHolders       = 3
	minHolderPercent = 1
)

// nameHolders adds to the problem of a full table which peers its flows are of. A
// count that fails leaves it as it is.
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

// countHolders says which peers opened the most flows.
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
		return "; next to none are of peers", nil
	}
	return "; of peers: " + strings.Join(parts, ", "), nil
}

// countFlows counts the flows in conntrack that which picks and that each peer opened, by
// the peer's index in r, and all flows of whichever opener.
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

// mostFirst returns the indexes of the peers that have any, the one that has most first.
func byCount(of []uint64) (peers []int) {
	for i, n := range of {
		if n > 0 {
			peers = append(peers, i)
		}
	}
	slices.SortFunc(peers, func(a, b int) int { return cmp.Or(cmp.Compare(of[b], of[a]), cmp.Compare(a, b)) })
	return peers
}
