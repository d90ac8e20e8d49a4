package flow

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/pfconf"
)

// TestTimeoutsForPF writes the timeouts into a rule and has the parser of pf's
// language read it, which knows the names.
func TestTimeoutsForPF(t *testing.T) {
	var options []string
	for _, timeout := range Timeouts() {
		if timeout.Idle%time.Second != 0 || timeout.Idle <= 0 {
			t.Errorf("%s is %v, not whole seconds", timeout.Name, timeout.Idle)
		}
		options = append(options, fmt.Sprintf("%s %d", timeout.Name, timeout.Idle/time.Second))
	}
	rule := "pass in quick on utun7 all flags any keep state (if-bound, " + strings.Join(options, ", ") + ")\n"
	if _, err := pfconf.Parse(rule); err != nil {
		t.Errorf("%s: %v", rule, err)
	}
}
