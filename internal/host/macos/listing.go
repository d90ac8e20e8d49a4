package macos

import (
	"fmt"
	"strings"

	"github.com/meshhelper/meshhelper/pfconf"
)

// Listing returns the anchor in Markdown, each line with the reason for it, for
// docs/pf.md. Consecutive lines with the same reason are grouped. The state timeouts,
// which are the same in each rule, are left out.
func (a *Anchor) Listing() string {
	var b strings.Builder
	for i, l := range a.Lines {
		statement := l.Statement
		if r, ok := statement.(*pfconf.Rule); ok {
			short := *r
			short.StateOptions.Timeouts = nil
			statement = &short
		}
		text := strings.TrimSpace((&pfconf.Ruleset{Statements: []pfconf.Statement{statement}}).String())
		fmt.Fprintf(&b, "    %s\n", text)
		if i+1 == len(a.Lines) || a.Lines[i+1].Why != l.Why {
			fmt.Fprintf(&b, "\n%s.\n\n", upperFirst(l.Why))
		}
	}
	return b.String()
}

func upperFirst(s string) string { return strings.ToUpper(s[:1]) + s[1:] }
