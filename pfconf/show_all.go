package pfconf

import (
	"errors"
	"strings"
)

// An All is the output of pfctl -s all: that of its other -s forms, each below a title.
// With -a the rules are those of an anchor; all else is of the whole packet filter.
type All struct {
	// NAT and Rules are the sections TRANSLATION RULES and FILTER RULES, as pfctl
	// -sn and -sr print them and [ParseShown] reads them, with counters if -v was
	// given. Each is empty if there are no rules of the kind.
	NAT, Rules string
	// Info is the section INFO.
	Info *Info
	// Sections has all sections by their titles without the colon, also those above.
	Sections map[string]string
}

// allTitles are the titles of sections, from pfctl.c and from what Macs print. No other
// line is taken for a title, since a table or an anchor may have any name.
var allTitles = set("TRANSLATION RULES:", "FILTER RULES:", "DUMMYNET RULES:", "ALTQ QUEUES:", "STATES:", "SOURCE TRACKING NODES:",
	"INFO:", "LABEL COUNTERS:", "TIMEOUTS:", "LIMITS:", "TABLES:", "OS FINGERPRINTS:", "INTERFACES:")

// ParseAll splits the output of pfctl -s all, with or without -v. It fails if the section
// INFO is missing, as in output that was cut off, or can't be read; then it still returns
// the sections that it found.
func ParseAll(text string) (*All, error) {
	all := &All{Sections: map[string]string{}}
	var title string
	var body strings.Builder
	end := func() {
		if title != "" {
			// Drop the empty line between sections.
			section := strings.TrimRight(body.String(), "\n")
			if section != "" {
				section += "\n"
			}
			all.Sections[title] = section
		}
		body.Reset()
	}
	for line := range strings.Lines(text) {
		trimmed := strings.TrimRight(line, " \r\n")
		name, _ := strings.CutSuffix(trimmed, ":")
		if _, seen := all.Sections[name]; allTitles[trimmed] && !seen && name != title {
			end()
			title = name
			continue
		}
		body.WriteString(line)
	}
	end()
	all.NAT, all.Rules = all.Sections["TRANSLATION RULES"], all.Sections["FILTER RULES"]
	info, ok := all.Sections["INFO"]
	if !ok {
		return all, errors.New("read all of pf: no section INFO")
	}
	var err error
	all.Info, err = ParseInfo(info)
	return all, err
}
