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

// excess ends the entries that peers' flows have in conntrack beyond their shares. The
// rules that count flows don't prevent all of them:
//
//   - The kernel counts no connection that ended (already_closed in
//     net/netfilter/nf_conncount.c), and a server keeps its entry with answers that end
//     at this host by their hop limit or size, so that the guard, which counts what
//     passes it, forgets the flow.
//   - What was counted is lost when the table is loaded anew.
//   - They count each peer by itself, and not all together.
type excess struct {
	looked time.Time
	// had is how many entries conntrack had at a look that found nothing.
	countAtRest uint64
	found       []host.Problem
}

// Shares of conntrack, in entries of what it may hold.
const (
	peerShare = 4 // one in four at most for a peer
	restShare = 4 // one in four at least for all that isn't peers'
)

// betweenExcess is how often conntrack is read for it at most: one reading takes half a
// second of a core where there are 262,144 entries. In that time ten peers that each
// open what the guard lets them, 1,000 at once and 200 a second, open 30,000: where
// conntrack holds 65,536, that can fill it from three quarters until the next look.
const excessInterval = 10 * time.Second

// Where a look found nothing, as on a host whose own flows are more than a quarter, the
// next waits until conntrack has more by one part in excessSteps, at most quietExcess.
const (
	excessSteps       = 16
	excessMaxInterval = time.Minute
)

// excessStays is for how long it is said at least that flows were ended.
const excessShownFor = time.Minute

// endExcess ends entries of peers' flows through the host, of peers that have more than
// their shares, until they have no more. Those of connections that ended go first. Flows
// to the host aren't touched: no server keeps them, and as long as one runs its entry
// remembers which end opened it.
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
		Step: stepOthers,
		Message: fmt.Sprintf("%d of the peers had more flows in the kernel's table than their share of %d, and the helper ended those that were too many: %s",
			len(over), share, strings.Join(names, ", ")),
		Hint: "a server that answers so that its answers don't reach the peer can bring this about: take routing from a peer that you don't trust",
	}}
	left := make(map[int]uint64, len(over))
	for _, peer := range over {
		left[peer] = share
	}
	return o.keepFlows(ctx, r, left, forwarded)
}

// due reports whether to look again, since the last look, where conntrack has so many
// entries of most.
func (e *excess) due(since time.Duration, have, most uint64) bool {
	quiet := e.countAtRest > 0 && have < e.countAtRest+most/excessSteps
	return since >= excessMaxInterval || since >= excessInterval && !quiet
}

// keepFlows ends the entries of peers' flows that which picks, but so many of each peer in
// left. The order of entries is that of a hash table, so that no flow is preferred, except
// that connections which ended are kept last.
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

// level returns the largest bound, most at most, with which all of held together are no
// more than room when none is more than it.
func fairShare(held []uint64, room, most uint64) uint64 {
	held = slices.Clone(held)
	slices.Sort(held)
	for i, n := range held {
		// What is left is divided evenly among those that have at least n.
		if even := room / uint64(len(held)-i); n > even {
			return min(most, even)
		}
		room -= n
	}
	return most
}
