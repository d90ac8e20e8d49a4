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
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/platform"
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
	found  []platform.Problem
}

// Shares of conntrack, in entries of what it may hold.
const (
	peerShare = 4 // one in four at most for a peer
	restShare = 4 // one in four at least for all that isn't peers'
)

// betweenExcess is how often conntrack is read for it at most: one reading takes half a
// second of a core where there are 262,144 entries. In that time ten peers that each
// open 200 flows a second, the guard's bound, open 20,000.
const betweenExcess = 10 * time.Second

// excessStays is for how long it is said at least that flows were ended.
const excessStays = time.Minute

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

// endExcess ends entries of peers' flows through the host, of peers that have more than
// their shares, until they have no more. Those of connections that ended go first. Flows
// to the host aren't touched: no server keeps them, and as long as one runs its entry
// remembers which end opened it.
func (p *Platform) endExcess(ctx context.Context, r *policy.Ruleset) error {
	have, most, err := conntrackFill(p.forward.sys)
	if err != nil {
		return err
	}
	if !p.excess.looked.IsZero() && time.Since(p.excess.looked) < betweenExcess {
		return nil
	}
	if have*peerShare <= most {
		if time.Since(p.excess.looked) > excessStays {
			p.excess.found = nil
		}
		return nil
	}
	p.excess.looked, p.excess.found = time.Now(), nil
	held := make([]uint64, len(r.Peers()))
	forwarded := func(e *flowEntry) (peer int, ok bool) {
		peer, ok = r.PeerByAddr(e.orig.src)
		return peer, ok && r.Class(e.orig.dst) != policy.Self
	}
	err = p.flows.each(ctx, unix.AF_UNSPEC, netip.Addr{}, func(e *flowEntry) error {
		if peer, ok := forwarded(e); ok {
			held[peer]++
		}
		return nil
	})
	if err != nil {
		return err
	}
	share := min(most/peerShare, uint64(len(families))*maxFlowsPerPeer)
	share = level(held, most-most/restShare, max(1, share))
	left, over := make([]uint64, len(held)), []int(nil)
	for peer, n := range held {
		left[peer] = share
		if n > share {
			over = append(over, peer)
		}
	}
	if len(over) == 0 {
		return nil
	}
	slices.SortFunc(over, func(a, b int) int { return cmp.Or(cmp.Compare(held[b], held[a]), cmp.Compare(a, b)) })
	var names []string
	for _, peer := range over[:min(len(over), holdersNamed)] {
		names = append(names, fmt.Sprintf("%s (%d)", r.Peers()[peer].Name, held[peer]))
	}
	p.excess.found = []platform.Problem{{
		Step: lookAround,
		Message: fmt.Sprintf("%d of the peers had more flows in the kernel's table than their share of %d, and the helper ended those that were too many: %s",
			len(over), share, strings.Join(names, ", ")),
		Hint: "a server that answers so that its answers don't reach the peer can bring this about: take routing from a peer that you don't trust",
	}}
	// The order of entries is that of a hash table, so that no flow is preferred.
	for _, ended := range []bool{false, true} {
		err := p.flows.each(ctx, unix.AF_UNSPEC, netip.Addr{}, func(e *flowEntry) error {
			peer, ok := forwarded(e)
			switch {
			case !ok || held[peer] <= share || e.ended() != ended:
				return nil
			case left[peer] > 0:
				left[peer]--
				return nil
			}
			return p.flows.forget(e)
		})
		if err != nil {
			return err
		}
	}
	return p.flows.flush()
}

// level returns the largest bound, most at most, with which all of held together are no
// more than room when none is more than it.
func level(held []uint64, room, most uint64) uint64 {
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
