package linux

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"github.com/meshhelper/meshhelper/internal/platform"
)

// fullFlows is the share of the kernel's table of flows, in percent, from which on
// its fill is a problem. The kernel drops the first packet of every new flow, also
// of the host's own, while the table is full.
const fullFlows = 90

// The sysctls of conntrack: how many entries this network namespace has, and how
// many it may have (Documentation/networking/nf_conntrack-sysctl.rst).
const (
	flowCount = "netfilter/nf_conntrack_count"
	flowMax   = "netfilter/nf_conntrack_max"
)

// fillProblems says that the kernel's table of flows is nearly full. A kernel
// without the sysctls, or with no bound (a maximum of 0), has no such problem.
func fillProblems(sys sysctls) ([]platform.Problem, error) {
	var n [2]uint64
	for i, name := range []string{flowCount, flowMax} {
		v, err := sys.read(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		if err == nil {
			n[i], err = strconv.ParseUint(v, 10, 32)
		}
		if err != nil {
			return nil, fmt.Errorf("fill of conntrack: %w", err)
		}
	}
	if n[1] == 0 || n[0]*100 < n[1]*fullFlows {
		return nil, nil
	}
	return []platform.Problem{{
		Step: lookAround,
		Message: fmt.Sprintf("the kernel's table of flows holds %d of at most %d (net.netfilter.nf_conntrack_max): "+
			"when it is full, no new connection of the host or a peer gets through", n[0], n[1]),
		Hint: "`conntrack -L` lists the flows and their sources; `sysctl -w net.netfilter.nf_conntrack_max=N` allows more",
	}}, nil
}
