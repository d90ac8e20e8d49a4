package pfconf

import (
	"errors"
	"fmt"
	"strings"
)

// EqualShown compares rules with the loaded ones that pfctl -sr or -sn shows, with or
// without -v or -vv, and returns the first difference as an error. want is
// [Loaded.ShowRules] or [Loaded.ShowNat] of the expanded ruleset, or rules as written,
// one a line.
//
// It parses and prints both sides, so that only the meaning of a rule counts, and its
// position in the list. These are equal:
//
//   - the options of a rule in any order, and pf's defaults, written or not: keep state,
//     flags S/SA, fragment reassemble, round-robin;
//   - all and from any to any, 0.0.0.0/0 and any, addresses in any spelling, ports
//     and protocols by number and by name;
//   - rules with and without numbers and counters;
//   - a pool without extfilter in want and one with extfilter ei in shown, which macOS may
//     add to a nat rule; likewise source-hash without a key, for which pfctl chooses one.
//
// A rule that can't be read is equal only to one with the same text.
func EqualShown(want []string, shown string) error { return Names{}.EqualShown(want, shown) }

// EqualShown is [EqualShown] with names of the host.
func (n Names) EqualShown(want []string, shown string) error {
	wanted, err := n.canonicalRules(strings.Join(want, "\n"))
	if err != nil {
		return fmt.Errorf("compare rules: the wanted %w", err)
	}
	got, err := n.canonicalRules(shown)
	if err != nil {
		return fmt.Errorf("compare rules: the shown %w", err)
	}
	for i, w := range wanted {
		switch {
		case i >= len(got):
			return fmt.Errorf("compare rules: %d rules instead of %d: `%s` is missing", len(got), len(wanted), w.text)
		case !w.equal(got[i]):
			return fmt.Errorf("compare rules: rule %d is `%s` instead of `%s`", i, got[i].text, w.text)
		}
	}
	if len(got) > len(wanted) {
		return fmt.Errorf("compare rules: %d rules instead of %d: `%s` is too many", len(got), len(wanted), got[len(wanted)].text)
	}
	return nil
}

// A canonicalRule is an expanded rule, as the kernel holds it.
type canonicalRule struct {
	rule *Rule  // nil: the line couldn't be read, or opens or closes an inline anchor
	text string // as pfctl shows it; "}" closes an inline anchor
}

// equal reports whether g, which is shown, is the wanted rule w. Where w leaves something
// to pfctl, it takes it from g.
func (w canonicalRule) equal(g canonicalRule) bool {
	if w.rule == nil || g.rule == nil {
		return w.rule == nil && g.rule == nil && w.text == g.text
	}
	loaded := w.text
	if wp, gp := w.rule.Pool, g.rule.Pool; wp != nil && gp != nil && (wp.ExtFilter == "" || wp.Key == "") {
		rule, pool := *w.rule, *wp
		if pool.ExtFilter == "" && gp.ExtFilter == "ei" {
			pool.ExtFilter = "ei"
		}
		if pool.Kind == SourceHash && pool.Key == "" {
			pool.Key = gp.Key
		}
		rule.Pool = &pool
		loaded = shown(&rule, rule.Anchor)
	}
	return loaded == g.text
}

// canonicalRules reads rules and expands each by itself. Rules that have been expanded
// before stay as they are.
func (n Names) canonicalRules(text string) ([]canonicalRule, error) {
	s := n.ParseShown(text)
	if u, ok := s.unreadElsewhere(); ok {
		return nil, fmt.Errorf("line %d can't be read: %w", u.Line, u.Err)
	}
	var out []canonicalRule
	for _, r := range s.Rules {
		if r.Err != nil {
			if r.Body != nil {
				return nil, fmt.Errorf("anchor `%s` can't be read: %w", r.Text, r.Err)
			}
			out = append(out, canonicalRule{text: r.Text})
			continue
		}
		var err error
		if out, err = appendCanonical(out, r.Rule); err != nil {
			return nil, fmt.Errorf("rule `%s`: %w", r.Text, err)
		}
	}
	return out, nil
}

// unreadElsewhere returns the first unknown line that isn't among the rules: one that is
// no rule at all, or one in the body of an anchor.
func (s *Shown) unreadElsewhere() (UnknownLine, bool) {
	var unread []string
	for _, r := range s.Rules {
		if r.Err != nil {
			unread = append(unread, r.Text)
		}
	}
	for _, u := range s.Unknown {
		_, text, _ := shownNumber(u.Text)
		if len(unread) == 0 || unread[0] != text {
			return u, true
		}
		unread = unread[1:]
	}
	return UnknownLine{}, false
}

// appendCanonical appends the rules that r expands to, then those in its braces.
func appendCanonical(out []canonicalRule, r *Rule) ([]canonicalRule, error) {
	head := *r
	if head.Body = nil; r.Body != nil && head.Anchor == "" {
		head.Anchor = "inline"
	}
	l := &loader{path: deepAnchor, out: &Loaded{}, inline: map[string]bool{}, shared: &loaderShared{}}
	if err := l.load(&Ruleset{Statements: []Statement{&head}}); err != nil {
		return nil, errors.New(err.problem)
	}
	for _, rules := range [][]*Rule{l.out.Scrub, l.out.Nat, l.out.Binat, l.out.Rdr, l.out.Dummynet, l.out.Filter} {
		for _, one := range rules {
			out = append(out, canonicalRule{one, shown(one, one.Anchor)})
		}
	}
	if r.Body == nil {
		return out, nil
	}
	last := &out[len(out)-1]
	last.rule, last.text = nil, last.text+" {"
	for _, s := range r.Body.Statements {
		var err error
		if out, err = appendCanonical(out, s.(*Rule)); err != nil {
			return nil, err
		}
	}
	return append(out, canonicalRule{text: "}"}), nil
}

// deepAnchor is the path of an anchor so deep that no ../ of a call leads above the main
// ruleset: where the rules are loaded isn't known here.
var deepAnchor = strings.Repeat("x/", maxPath/2)
