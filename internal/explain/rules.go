package explain

import (
	"maps"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/held"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// Language is one that rulesets are enforced in.
type Language struct {
	// Render writes a ruleset. The anchor is where it is loaded, or "" where there
	// is no such thing.
	Render func(*policy.Ruleset) (anchor, text string, err error)
	// Find returns the rule in a rendered text that holds a line of the policy for
	// a family, or "".
	Find func(text string, rule policy.Rule, p policy.Packet) string
}

// Rules returns the rules as loaded, which the loop reads back and compares at
// every tick; or, where a language is named, as they would be loaded in that: in the
// host's own by what is known of it, and in others by defaults.
func (x *Explainer) Rules(language string) (api.Rules, error) {
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
	var err error
	out.Anchor, out.Text, err = render(r)
	return out, err
}

// languages lists the names of the languages that rules can be shown in.
func (x *Explainer) languages() string {
	names := slices.Sorted(maps.Keys(x.o.Languages))
	slices.Reverse(names)
	last := len(names) - 1
	if last < 1 {
		return strings.Join(names, "")
	}
	return strings.Join(names[:last], ", ") + " or " + names[last]
}

// loadedLanguage is the host's own, of the rules that it was found to have loaded; zero
// where it isn't known to have any.
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
