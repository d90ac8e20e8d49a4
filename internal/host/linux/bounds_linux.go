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

// flowsPerPeer returns how many conntrack entries one peer may have in each family: an
// eighth of conntrack's maximum, at most maxFlowsPerPeer. It is 0 if the kernel can't
// count them.
func (p *Backend) flowsPerPeer() uint32 {
	return p.flowsOf(p.states())
}

// flowsOf is flowsPerPeer for a maximum of states entries; 0: not known.
func (p *Backend) flowsOf(states int) uint32 {
	if p.unbounded.Load() {
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

// applyBounded applies t, the table of r with these parameters. On a kernel that can't
// bound flows it applies everything else: counting and timeouts are modules of their own
// that not every system has (CONFIG_NFT_CONNLIMIT, CONFIG_NF_CONNTRACK_TIMEOUT). The
// guard's bounds hold on such a kernel, too.
func (p *Backend) applyBounded(t *table, r *policy.Ruleset, with params) error {
	err := p.filter.apply(t)
	if err == nil || p.unbounded.Load() || !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOENT) {
		return err
	}
	p.unbounded.Store(true)
	with.flowsPerPeer = p.flowsPerPeer()
	if again := p.filter.apply(compile(r, with)); again != nil {
		p.unbounded.Store(false)
		return errors.Join(err, again)
	}
	return nil
}

// boundProblems reports a kernel that can't bound flows.
func (p *Backend) boundProblems() []host.Problem {
	if !p.unbounded.Load() {
		return nil
	}
	return []host.Problem{{
		Step:    stepOthers,
		Kind:    host.KindOtherFilters,
		Message: "the kernel can't count a peer's flows or end them early: only the helper bounds them, and a peer's dead flows last as long as the host's own",
		Hint:    "use a kernel with nft_connlimit and CONFIG_NF_CONNTRACK_TIMEOUT",
	}}
}

// established returns how long the host lets a TCP connection be idle: five days by
// default (nf_conntrack_tcp_timeout_established in
// Documentation/networking/nf_conntrack-sysctl.rst). Peers' connections never get longer
// than that.
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
