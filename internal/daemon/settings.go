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

// Settings returns what the helper was told to be.
func (d *Daemon) Settings() api.Settings { return d.wanted.Settings().Answer() }

// ChangeSettings keeps other settings, and puts those in force that need no restart; the
// answer says which do. Nil takes a setting away. Nothing changes where one is wrong, or
// can't be saved.
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

// checkPrefixes refuses another mesh prefix in which an interface of this host has an
// address: peers wouldn't reach that network, and it is never what was meant. It returns
// what else is in a new prefix, which the owner may live with. The default is never
// refused, for it is what the helper starts with anyway.
func (d *Daemon) checkPrefixes(was, next *wanted.Settings) ([]api.Problem, error) {
	before, _ := was.PrefixesAfter()
	want, ok := next.PrefixesAfter()
	if !ok {
		return nil, nil
	}
	var fresh []netip.Prefix
	if want.V4 != before.V4 {
		fresh = append(fresh, want.V4)
	}
	if want.V6 != before.V6 {
		fresh = append(fresh, want.V6)
	}
	now, _ := d.loop.State()
	if len(fresh) == 0 || now.Ruleset == nil {
		return nil, nil // not looked at yet; the start names what overlaps
	}
	r, err := policy.Compile(policy.Mesh{Prefixes: fresh}, now.Ruleset.Host(), d.wanted.Now())
	if err != nil {
		return nil, err
	}
	defaults := mesh.DefaultPrefixes()
	var out []api.Problem
	for _, o := range r.Overlaps() {
		p := explain.Overlap(r, o)
		byAddress := o.Kind == policy.OverlapUplink || o.Kind == policy.OverlapAddress
		if byAddress && o.Mesh != defaults.V4 && o.Mesh != defaults.V6 {
			return nil, api.Errorf(api.CodeBadSetting, "%v is in use here: %s", o.Mesh, p.Message).WithHint("%s", explain.WayOut(r, o.Mesh))
		}
		out = append(out, shown(p))
	}
	return out, nil
}

// planPrefixes says which peers get other addresses when the helper starts with these
// settings.
func (d *Daemon) planPrefixes(s *wanted.Settings) ([]api.Renumbered, error) {
	want, ok := s.PrefixesAfter()
	if !ok || want == d.id.Prefixes {
		return nil, nil
	}
	return d.PlanPrefixes(want)
}
