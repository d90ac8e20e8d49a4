package macos

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/meshhelper/meshhelper/internal/host"
)

// statesLimit returns how many states pf holds at most, from the LIMITS section of
// `pfctl -s all`: lines such as "states        hard limit    10000". The main ruleset
// may set another limit than [MaxStates] (set limit states, pf.conf(5)).
func statesLimit(limits string) uint64 {
	for line := range strings.Lines(limits) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "states" {
			if n, err := strconv.ParseUint(f[len(f)-1], 10, 64); err == nil && n > 0 {
				return n
			}
		}
	}
	return MaxStates
}

// stateLimitProblems warns when nine tenths of pf's states are in use. Without a free
// state no program of this Mac can open a connection that matches a rule with keep
// state. The guard gives all peers together three quarters at most, so the cause isn't
// peers alone.
func (b *Backend) stateLimitProblems() []host.Problem {
	if b.most == 0 || b.states*10 < b.most*9 {
		return nil
	}
	return []host.Problem{{
		Step:    StepStates,
		Message: fmt.Sprintf("the packet filter holds %d states of %d at most: new connections fail when none is left", b.states, b.most),
		Hint:    "sudo pfctl -s states shows the connections that they belong to",
	}}
}
