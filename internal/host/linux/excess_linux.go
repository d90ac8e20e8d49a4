package linux

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// excess ends conntrack entries of peers' flows beyond the peers' shares. The rules that
// count flows can't prevent all of them:
//
//   - The kernel doesn't count connections that ended (already_closed in
//     net/netfilter/nf_conncount.c). A server can keep such an entry alive with answers
//     that expire at this host, by their hop limit or size, so that the guard doesn't see
//     them and has forgotten the flow.
//   - Loading the table anew resets the counts.
//   - Each peer is counted separately, not all peers together.
type excess struct {
	// looked is when conntrack was last read.
	looked time.Time
	// countAtRest is the number of conntrack entries when a check found nothing; 0: none.
	countAtRest uint64
	// found is what the last check that ended flows reported.
	found []host.Problem
}

// Shares of conntrack's maximum, as divisors.
const (
	peerShare = 4 // a peer gets at most a quarter
	restShare = 4 // everything that isn't a peer's gets at least a quarter
)

// excessInterval is the shortest time between two checks: reading 262,144 entries takes
// half a second of CPU time. In that time ten peers that each open as many flows as the
// guard lets them, 1,000 at once and 200 a second, open 30,000; where conntrack holds
// 65,536, that can fill it from three quarters until the next check.
const excessInterval = 10 * time.Second

// After a check that found nothing, such as on a host whose own flows exceed a quarter,
// the next check waits until conntrack has grown by one part in excessSteps of its
// maximum, but no longer than excessMaxInterval.
const (
	excessSteps       = 16
	excessMaxInterval = time.Minute
)

// excessShownFor is how long status shows at least that flows were ended.
const excessShownFor = time.Minute

// endExcess ends entries of forwarded flows of peers that have more than their share,
// ended connections first. Flows to the host stay: no server can keep those alive, and as
// long as one runs its entry remembers which end opened it.
func (o *others) endExcess(ctx context.Context, r *policy.Ruleset) error {
	have, most, err := conntrackFill(o.sys)
	if err != nil {
		return err
	}
	since := time.Since(o.excess.looked)
	if !o.excess.due(since, have, most) {
		return nil
	}
	if have*peerShare <= most {
		if since > excessShownFor {
			o.excess.found = nil
		}
		return nil
	}
	o.excess = excess{looked: time.Now()}
	forwarded := func(e *flowEntry) bool { return r.Class(e.orig.dst) != policy.Self }
	held, _, err := o.countFlows(ctx, r, forwarded)
	if err != nil {
		return err
	}
	share := min(most/peerShare, uint64(len(families))*maxFlowsPerPeer)
	share = fairShare(held, most-most/restShare, max(1, share))
	over := slices.DeleteFunc(byCount(held), func(peer int) bool { return held[peer] <= share })
	if len(over) == 0 {
		o.excess.countAtRest = have
		return nil
	}
	var names []string
	for _, peer := range over[:min(len(over), maxHolders)] {
		names = append(names, fmt.Sprintf("%s (%d)", r.Peers()[peer].Name, held[peer]))
	}
	o.excess.found = []host.Problem{{
		Step: stepOthers, Kind: host.KindOtherFilters,
		Message: fmt.Sprintf("%d of the peers had more flows in the kernel's table than their share of %d, and the helper ended the excess: %s",
			len(over), share, strings.Join(names, ", ")),
		Hint: "a server whose answers don't reach the peer can cause this: deny routing to a peer that you don't trust",
	}}
	left := make(map[int]uint64, len(over))
	for _, peer := range over {
		left[peer] = share
	}
	return o.keepFlows(ctx, r, left, forwarded)
}

// due reports whether to check again, given the time since the last check and conntrack's
// number of entries and maximum.
func (e *excess) due(since time.Duration, have, most uint64) bool {
	quiet := e.countAtRest > 0 && have < e.countAtRest+most/excessSteps
	return since >= excessMaxInterval || since >= excessInterval && !quiet
}

// keepFlows ends the entries of peers' flows that which selects, except for as many of
// each peer as left says. Entries come in the order of a hash table, so no flow is
// preferred, except that ended connections are kept last.
func (o *others) keepFlows(ctx context.Context, r *policy.Ruleset, left map[int]uint64, which func(*flowEntry) bool) error {
	for _, ended := range []bool{false, true} {
		err := o.flows.each(ctx, unix.AF_UNSPEC, netip.Addr{}, func(e *flowEntry) error {
			peer, ok := r.PeerByAddr(e.orig.src)
			if !ok || !which(e) || e.ended() != ended {
				return nil
			}
			switch more, bounded := left[peer]; {
			case !bounded:
				return nil
			case more > 0:
				left[peer]--
				return nil
			}
			return o.flows.queueDelete(e)
		})
		if err != nil {
			return err
		}
	}
	return o.flows.flush()
}

// fairShare returns the largest bound, at most most, for which all of held, each capped
// at the bound, sum up to no more than room (max-min fairness).
func fairShare(held []uint64, room, most uint64) uint64 {
	held = slices.Clone(held)
	slices.Sort(held)
	for i, n := range held {
		// Divide what is left evenly among those that hold at least n.
		if even := room / uint64(len(held)-i); n > even {
			return min(most, even)
		}
		room -= n
	}
	return most
}
