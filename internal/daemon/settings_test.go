package daemon

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// set changes one setting; "" takes it away.
func (r *rig) set(key, value string) (api.Settings, error) {
	change := map[string]*string{key: &value}
	if value == "" {
		change[key] = nil
	}
	return r.d.ChangeSettings(context.Background(), change)
}

func (r *rig) mustSet(key, value string) api.Settings {
	r.t.Helper()
	s, err := r.set(key, value)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// startAs starts the helper with flags, and the settings that are kept.
func (r *rig) startAs(given map[string]string) {
	r.t.Helper()
	kept, err := wanted.ReadSettings(r.dir)
	if err != nil {
		r.t.Fatal(err)
	}
	o := r.options()
	o.Settings = wanted.StartSettings{Given: given, Kept: kept, Defaults: map[string]string{
		wanted.SettingName: "host", wanted.SettingListenPort: "51820", wanted.SettingMeshPrefix4: "100.64.0.0/10", wanted.SettingMeshPrefix6: "fd6d:6573:6800::/48",
	}}
	r.startWith(o)
}

func TestSettings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.startAs(map[string]string{wanted.SettingOperator: "root"})
		r.add("phone")

		// What counts at once.
		s := r.mustSet(wanted.SettingEndpoint, "home.example")
		if one, _ := s.Of(wanted.SettingEndpoint); one.Value != "home.example" || one.Source != api.SettingKept || len(s.Restart) > 0 || s.Already {
			t.Errorf("endpoint: %+v", s)
		}
		if c, err := r.d.Config("phone"); err != nil || !strings.Contains(c.Text, "Endpoint = home.example:51820") {
			t.Errorf("a configuration has another endpoint, %v:\n%s", err, c.Text)
		}
		if s := r.mustSet(wanted.SettingEndpoint, " home.example "); !s.Already {
			t.Error("the same again isn't told as such")
		}
		r.mustSet(wanted.SettingName, "home")
		if s := r.d.Status(); s.Name != "home" {
			t.Errorf("name %q", s.Name)
		}

		// What counts after a restart, and what a flag overrides.
		s = r.mustSet(wanted.SettingListenPort, "4000")
		if one, _ := s.Of(wanted.SettingListenPort); one.Value != "51820" || one.Kept != "4000" || !slices.Equal(s.Restart, []string{wanted.SettingListenPort}) || !slices.Equal(s.Outdated, []string{"phone"}) {
			t.Errorf("listen-port: %+v", s)
		}
		if s := r.mustSet(wanted.SettingListenPort, ""); s.Outdated != nil {
			t.Errorf("the port stays as it is, and configurations are outdated: %q", s.Outdated)
		}
		r.mustSet(wanted.SettingListenPort, "4000")
		s = r.mustSet(wanted.SettingOperator, "0")
		if one, _ := s.Of(wanted.SettingOperator); one.Value != "root" || one.Source != api.SettingFlag || !slices.Contains(s.Overridden, wanted.SettingOperator) {
			t.Errorf("operator: %+v", s)
		}
		r.end()
		r.startAs(nil)
		for key, want := range map[string]string{wanted.SettingName: "home", wanted.SettingEndpoint: "home.example", wanted.SettingListenPort: "4000", wanted.SettingOperator: "0"} {
			if one, _ := r.d.Settings().Of(key); one.Value != want || one.Source != api.SettingKept {
				t.Errorf("after the restart: %+v, want %s", one, want)
			}
		}
		if s := r.mustSet(wanted.SettingListenPort, ""); !slices.Equal(s.Restart, []string{wanted.SettingListenPort}) {
			t.Errorf("listen-port taken away: %+v", s)
		}
		if s := r.mustSet(wanted.SettingName, ""); s.Settings[0].Value != "host" || s.Settings[0].Source != api.SettingDefault {
			t.Errorf("name taken away: %+v", s)
		}
		s = r.mustSet(wanted.SettingMeshPrefix4, "10.99.0.0/16")
		if len(s.Renumbered) != 1 || s.Renumbered[0].Name != "phone" || !netip.MustParsePrefix("10.99.0.0/16").Contains(s.Renumbered[0].Is[0]) {
			t.Errorf("another mesh prefix changes %+v, want phone", s.Renumbered)
		}
		if s := r.mustSet(wanted.SettingMeshPrefix4, ""); len(s.Restart) > 1 {
			t.Errorf("mesh-prefix4 taken away: %+v", s)
		}
		if one, _ := r.d.Settings().Of(wanted.SettingMeshPrefix4); one.Kept != "100.64.0.0/10" {
			t.Errorf("mesh-prefix4 taken away: %+v; peers with addresses of it would have no place", one)
		}
		r.end()
	})
}

// TestEndpointSettingIsOutside sets an address as the endpoint: from then on it counts as
// this host's address as seen from outside.
func TestEndpointSettingIsOutside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.startAs(nil)
		defer r.end()
		r.mustSet(wanted.SettingEndpoint, "198.51.100.7:4500")
		synctest.Wait()
		c, _ := r.d.loop.State()
		for range 100 {
			if len(c.Host.Outside) > 0 {
				break
			}
			_, newer := r.d.loop.State()
			<-newer
			c, _ = r.d.loop.State()
		}
		if len(c.Host.Outside) != 1 || c.Host.Outside[0].String() != "198.51.100.7" || c.Host.OutsidePort != 4500 {
			t.Errorf("outside %v, port %d", c.Host.Outside, c.Host.OutsidePort)
		}
	})
}

func TestSettingsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.startAs(nil)
		for key, value := range map[string]string{
			"colour": "red", wanted.SettingListenPort: "65536", wanted.SettingMeshPrefix4: "8.0.0.0/8", wanted.SettingMeshPrefix6: "100.64.0.0/10",
			wanted.SettingEndpoint: "https://x/", wanted.SettingOperator: "no-such-user-here", wanted.SettingDNS: "9.9.9.9,x", wanted.SettingName: "a b", wanted.SettingLabel: "../x",
		} {
			_, err := r.set(key, value)
			var e *api.Error
			if !errors.As(err, &e) || e.Hint == "" {
				t.Errorf("%s %q: %v, want an error with a hint", key, value, err)
			}
		}
		own := r.d.Status().Addresses
		for _, value := range []string{"255.255.255.255", "127.0.0.1:1", "[fe80::1]:51820", "0.0.0.0", own[0].String(), "[" + own[1].String() + "]:51820"} {
			if _, err := r.set(wanted.SettingEndpoint, value); err == nil {
				t.Errorf("the endpoint %s is taken", value)
			}
		}
		before := t.TempDir()
		if err := os.WriteFile(filepath.Join(before, "settings.json"), []byte(`{"version":1,"settings":{"endpoint":"127.0.0.1","dns":"127.0.0.53"}}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if kept, err := wanted.ReadSettings(before); err != nil || len(kept) != 2 {
			t.Errorf("what was kept before isn't read: %v, %v", kept, err)
		}
		for _, value := range []string{"127.0.0.53", "::1", "fe80::1"} {
			if _, err := r.set(wanted.SettingDNS, value); err == nil {
				t.Errorf("the resolver %s is taken", value)
			}
		}
		r.setDisk(&brokenDisk{FileSystem: wanted.DiskFiles{}})
		_, err := r.set(wanted.SettingName, "home")
		var e *api.Error
		if !errors.As(err, &e) || e.Code != api.CodeNotSaved || r.d.Status().Name != "host" {
			t.Errorf("on a full disk: %v, name %q", err, r.d.Status().Name)
		}
		// After the rename the new value is there, and counts.
		r.setDisk(&brokenDisk{FileSystem: wanted.DiskFiles{}, after: 2})
		if _, err = r.set(wanted.SettingName, "home"); !errors.As(err, &e) || !strings.Contains(e.Message, "changed and saved, but") {
			t.Errorf("without a sync: %v", err)
		}
		if kept, err := wanted.ReadSettings(r.dir); err != nil || kept[wanted.SettingName] != "home" || r.d.Status().Name != "home" {
			t.Errorf("on disk %v, %v, and it is %q", kept, err, r.d.Status().Name)
		}
		r.setDisk(wanted.DiskFiles{})
		if s := r.mustSet(wanted.SettingName, "home"); !s.Already {
			t.Errorf("again: %+v", s)
		}
		// A caller that leaves in the middle isn't told that nothing was changed.
		ctx, cancel := context.WithCancel(context.Background())
		slow := newFrozenDisk()
		r.setDisk(slow)
		go func() { synctest.Wait(); cancel() }()
		name := "other"
		if _, err = r.d.ChangeSettings(ctx, map[string]*string{wanted.SettingName: &name}); !errors.As(err, &e) || !strings.Contains(e.Message, "isn't known") {
			t.Errorf("while it is saved: %v", err)
		}
		close(slow.thawed)
		synctest.Wait()
		r.end()
	})
}

// TestPrefixInUse asks for mesh prefixes that overlap with something on the host: one in
// which an interface has an address is refused with a free prefix as the hint, one with a
// route gives a problem, and changes of other settings mention neither.
func TestPrefixInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.host.Change(func(h *policy.Host) {
			h.Interfaces = append(h.Interfaces, policy.Interface{Name: "eth7", Addresses: []netip.Prefix{netip.MustParsePrefix("10.50.1.2/24"), netip.MustParsePrefix("100.99.1.1/32")}})
			h.Routes = append(h.Routes, policy.Route{Prefix: netip.MustParsePrefix("10.60.0.0/16"), Interface: "eth7"})
		})
		r.startAs(nil)
		defer r.end()
		r.add("phone")
		_, err := r.set(wanted.SettingMeshPrefix4, "10.50.0.0/16")
		var e *api.Error
		if !errors.As(err, &e) || e.Code != api.CodeBadSetting || !strings.Contains(e.Message, "eth7 has 10.50.1.2/24") || !strings.Contains(e.Hint, "settings mesh-prefix4 10.") {
			t.Errorf("a network that is attached: %v", err)
		}
		if one, _ := r.d.Settings().Of(wanted.SettingMeshPrefix4); one.Kept != "" {
			t.Errorf("it is kept all the same: %+v", one)
		}
		s := r.mustSet(wanted.SettingMeshPrefix4, "10.60.7.0/24")
		if len(s.Problems) != 1 || !strings.Contains(s.Problems[0].Message, "10.60.0.0/16") || len(s.Renumbered) != 1 {
			t.Errorf("a network that is routed: %+v", s)
		}
		r.after(DefaultTick)
		if p := r.d.Status().Problems; len(p) != 1 || p[0].Hint != "restart the helper: the mesh prefix is 10.60.7.0/24 then, as it was set" {
			t.Errorf("until the restart: %+v", p)
		}
		if s := r.mustSet(wanted.SettingName, "home"); len(s.Problems)+len(s.Renumbered) > 0 {
			t.Errorf("the name has to do with %+v", s)
		}
		// The default is never refused, although eth7 has an address in it.
		if s := r.mustSet(wanted.SettingMeshPrefix4, ""); len(s.Problems) != 1 || len(s.Renumbered) > 0 {
			t.Errorf("back to the default: %+v", s)
		}
	})
}

// TestWriteSettings writes settings while no helper runs; it fails while one does.
func TestWriteSettings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		port, name := "4000", "home"
		if err := wanted.WriteSettings(r.dir, map[string]*string{wanted.SettingListenPort: &port}); err != nil {
			t.Fatal(err)
		}
		if err := wanted.WriteSettings(r.dir, map[string]*string{wanted.SettingName: &name}); err != nil {
			t.Fatal(err)
		}
		got, err := wanted.ReadSettings(r.dir)
		if want := map[string]string{wanted.SettingListenPort: "4000", wanted.SettingName: "home"}; err != nil || !maps.Equal(got, want) {
			t.Errorf("read %v, %v, want %v", got, err, want)
		}
		r.startAs(nil) // a new mesh, in a folder that has settings only
		if err := wanted.WriteSettings(r.dir, map[string]*string{wanted.SettingName: nil}); err == nil {
			t.Error("they were written beside a helper")
		}
		r.end()
		if err := os.WriteFile(filepath.Join(r.dir, "settings.json"), []byte(`{"version":1,"settings":{"colour":"red"}}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := wanted.ReadSettings(r.dir); err == nil || !strings.Contains(err.Error(), "colour") {
			t.Errorf("an unknown key: %v", err)
		}
	})
}
