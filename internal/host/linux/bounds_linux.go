package linux

import (
	"errors"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/flow"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// flowsPerPeer is how many flows of one peer conntrack may have in each family: an
// eighth of what it holds, but no more than maxFlowsPerPeer.
func (p *Backend) flowsPerPeer() uint32 {
	return p.flowsOf(p.states())
}

func (p *Backend) flowsOf(states int) uint32 {
	if p.unbounded {
		return 0
	}
	if p.maxFlows > 0 {
		return p.maxFlows
	}
	if states == 0 {
		return maxFlowsPerPeer
	}
	return max(1, min(maxFlowsPerPeer, uint32(states/8)))
}

// applyBounded applies t, the table of r with the parameters. A kernel that can't
// bound flows enforces all the rest: counting and timeouts are modules of their own,
// which not every system has (CONFIG_NFT_CONNLIMIT, CONFIG_NF_CONNTRACK_TIMEOUT). The
// guard's bounds hold there, too.
func (p *Backend) applyBounded(t *table, r *policy.Ruleset, with params) error {
	err := p.filter.apply(t)
	if err == nil || p.unbounded || !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	p.unbounded = true
	with.flowsPerPeer = p.flowsPerPeer()
	if again := p.filter.apply(compile(r, with)); again != nil {
		p.unbounded = false
		return errors.Join(err, again)
	}
	return nil
}

// boundProblems says that the kernel bounds no flows.
func (p *Backend) boundProblems() []host.Problem {
	if !p.unbounded {
		return nil
	}
	return []host.Problem{{
		Step:    stepOthers,
		Message: "the kernel can't count the flows of a peer or end them early, so that the helper alone bounds them, and what a peer left behind stays for as long as the host's own flows",
		Hint:    "a kernel with nft_connlimit and CONFIG_NF_CONNTRACK_TIMEOUT can",
	}}
}

// established is how long the host lets a TCP connection be silent: five days by
// default.
func (p *Backend) established() time.Duration {
	text, err := p.forward.sys.read("netfilter/nf_conntrack_tcp_timeout_established")
	if err != nil {
		return flow.TCPEstablished
	}
	seconds, err := strconv.Atoi(text)
	if err != nil || seconds <= 0 {
		return flow.TCPEstablished
	}
	return time.Duration(seconds) * time.Second
}
