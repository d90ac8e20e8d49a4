package daemon

import (
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/host"
)

// TestNamesForgeNothing lets another program's table have a name that would forge lines on
// a terminal.
func TestNamesForgeNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		const forged = "table x\x1b]0;y\a\nok       all is fine drops it"
		r.host.Foreign(host.Problem{Step: "look", Message: forged, Hint: "see\x1b[2J"})
		r.d.journal.Record(events.Event{Kind: events.Problem, Message: forged})
		r.after(DefaultTick)
		checks, err := r.d.Doctor(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		told, _ := r.d.journal.Since(0)
		said := map[string]string{}
		for _, p := range r.d.Status().Problems {
			said["status"] += p.Message + p.Hint
		}
		for _, c := range checks {
			said["doctor"] += c.Message + c.Hint
		}
		for _, e := range told {
			said["events"] += e.Message
		}
		for who, text := range said {
			if !strings.Contains(text, `table x\x1b]0;y\a\nok`) || strings.ContainsAny(text, "\x1b\a\n") {
				t.Errorf("%s: %q", who, text)
			}
		}
	})
}
