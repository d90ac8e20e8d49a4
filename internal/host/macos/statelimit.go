package macos

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/meshhelper/meshhelper/internal/host"
)

// statesLimit reads how many states pf holds at most from what `pfctl -s all` prints
// of its limits; the main ruleset may say another number than macOS's (set limit).
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

// fillProblems warns before pf's states are used up: then no program of this Mac gets
// a connection that a rule with a state is for. Peers get three quarters at most, so
// more than nine tenths are not theirs alone.
func (b *Backend) stateLimitProblems() []host.Problem {
	if b.most == 0 || b.states*10 < b.most*9 {
		return nil
	}
	return []host.Problem{{
		Step:    StepStates,
		Message: fmt.Sprintf("the packet filter holds %d states of %d at most: new connections fail when there are no more", b.states, b.most),
		Hint:    "see whose they are: sudo pfctl -s states",
	}}
}
