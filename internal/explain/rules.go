package explain

import (
	"context"
	"maps"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Language is a form in which a host enforces rulesets: the packet filter's, nft or pf, or the
// policy's own lines at the guard.
// The zero Language is none.
type Language struct {
	// Render writes a ruleset as text. anchor is the pf anchor that the text is loaded into,
	// or "" in a language without anchors.
	Render func(*policy.Ruleset) (anchor, text string, err error)
	// Find returns the rule in a rendered text that enforces a rule of the policy on a packet,
	// or "" if there is none.
	Find func(text string, rule policy.Rule, p policy.Packet) string
}

// Rules returns the rules as loaded, which the loop reads back and compares at every tick. With
// a language other than "", it returns the wanted ruleset as it would be loaded in that
// language: for the host's own with what the host knows (see [host.Renderer]), for others with
// defaults. The errors are *[api.Error]: CodeNotReady while no rules are known to be loaded
// or too many questions are waiting, CodeUnsupported for an unknown language.
func (x *Explainer) Rules(ctx context.Context, language string) (api.Rules, error) {
	leave, err := x.enter(ctx)
	if err != nil {
		return api.Rules{}, err
	}
	defer leave()
	c, _ := x.o.Held()
	r := c.Read
	out := api.Rules{Platform: language}
	if language == "" {
		out.Platform = x.o.Host.Language
	} else {
		r = c.Ruleset
	}
	if language == "" && r == nil && c.Loaded != nil {
		e := api.Errorf(api.CodeNotReady, "no rules are known to be loaded as they should be")
		if len(c.Problems) > 0 {
			e = api.Errorf(api.CodeNotReady, "%s: %s: %s", e.Message, c.Problems[0].Step, c.Problems[0].Message)
		}
		return out, e.WithHint("see `meshhelper doctor`; how they would be loaded is said with --platform %s", out.Platform)
	}
	rules, ok := x.o.Languages[out.Platform]
	switch {
	case !ok:
		return out, api.Errorf(api.CodeUnsupported, "rules can't be shown for platform %.20q", out.Platform).WithHint("it is %s", x.languages())
	case r == nil:
		return out, api.Errorf(api.CodeNotReady, "nothing is loaded yet").WithHint("see `meshhelper status`")
	}
	render := rules.Render
	if x.o.Host.Renderer != nil && out.Platform == x.o.Host.Language {
		switch {
		case c.Render != nil:
			render = c.Render
		case language == "":
			out.Text = "# No rules are loaded, for no peer may be routed and nothing is forwarded: the guard at the tunnel judges each packet.\n"
			return out, nil
		}
	}
	out.Anchor, out.Text, err = render(r)
	return out, err
}

// languages lists the names of the languages for a hint, such as "pf, nft or guard". The order,
// descending, has the packet filters first.
func (x *Explainer) languages() string {
	names := slices.Sorted(maps.Keys(x.o.Languages))
	slices.Reverse(names)
	last := len(names) - 1
	if last < 1 {
		return strings.Join(names, "")
	}
	return strings.Join(names[:last], ", ") + " or " + names[last]
}

// loadedLanguage returns the host's own language, with a Render that writes the rules which the
// last round read back from the host whatever ruleset it is given. It is zero if none are
// known to be loaded: then an explanation names no rule.
func (x *Explainer) loadedLanguage(c held.State) Language {
	l := x.o.Languages[x.o.Host.Language]
	if x.o.Host.Renderer != nil {
		l.Render = c.Render
	}
	if c.Read == nil || l.Render == nil || l.Find == nil {
		return Language{}
	}
	render := l.Render
	l.Render = func(*policy.Ruleset) (anchor, text string, err error) { return render(c.Read) }
	return l
}
