package daemon

import (
	"context"
	"net/netip"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/explain"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// Settings returns the settings: their values now, after the next start, and where each comes
// from.
func (d *Daemon) Settings() api.Settings { return d.wanted.Settings().Answer() }

// ChangeSettings saves changed settings, by name, and puts those into force that need no restart;
// the answer tells which need one. A nil value resets a setting to its default. If one value
// isn't valid or can't be saved, no setting changes. For other mesh prefixes, the answer has the
// peers that the next start renumbers, and what else uses the prefixes.
func (d *Daemon) ChangeSettings(ctx context.Context, changes map[string]*string) (api.Settings, error) {
	return d.wanted.ChangeSettings(ctx, changes, func(was, next *wanted.Settings, out *api.Settings) (err error) {
		_, v4 := changes[wanted.SettingMeshPrefix4]
		_, v6 := changes[wanted.SettingMeshPrefix6]
		if !v4 && !v6 {
			return nil
		}
		if out.Problems, err = d.checkPrefixes(was, next); err != nil {
			return err
		}
		out.Renumbered, err = d.planPrefixes(next)
		return err
	})
}

// checkPrefixes refuses a new mesh prefix in which an interface of this host has an address: peers
// wouldn't reach that network, and no operator can want that. It returns other overlaps, such as
// routes, as problems, which the operator may accept. The default prefixes are never refused,
// because the helper would start with them anyway.
func (d *Daemon) checkPrefixes(was, next *wanted.Settings) ([]api.Problem, error) {
	before, _ := was.PrefixesAfter()
	want, ok := next.PrefixesAfter()
	if !ok {
		return nil, nil
	}
	var changed []netip.Prefix
	if want.V4 != before.V4 {
		changed = append(changed, want.V4)
	}
	if want.V6 != before.V6 {
		changed = append(changed, want.V6)
	}
	now, _ := d.loop.State()
	if len(changed) == 0 || now.Ruleset == nil {
		return nil, nil // no facts about the host yet; status names overlaps after the start
	}
	r, err := policy.Compile(policy.Mesh{Prefixes: changed}, now.Ruleset.Host(), d.wanted.Now())
	if err != nil {
		return nil, err
	}
	defaults := mesh.DefaultPrefixes()
	var out []api.Problem
	for _, o := range r.Overlaps() {
		p := explain.Overlap(r, o)
		hasAddress := o.Kind == policy.OverlapUplink || o.Kind == policy.OverlapAddress
		if hasAddress && o.Mesh != defaults.V4 && o.Mesh != defaults.V6 {
			return nil, api.Errorf(api.CodeBadSetting, "%v is in use here: %s", o.Mesh, p.Message).WithHint("%s", explain.WayOut(r, o.Mesh))
		}
		out = append(out, apiProblem(p))
	}
	return out, nil
}

// planPrefixes returns the peers that get other addresses when the helper starts with the
// settings s; see PlanPrefixes.
func (d *Daemon) planPrefixes(s *wanted.Settings) ([]api.Renumbered, error) {
	want, ok := s.PrefixesAfter()
	if !ok || want == d.id.Prefixes {
		return nil, nil
	}
	return d.PlanPrefixes(want)
}
