package daemon

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/owned"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// settingsFile has the settings, beside the wanted state: what a helper needs before it
// can read that. A state directory without it is one where nothing was set.
const settingsFile = "settings.json"

// settingsVersion is the version of the file that this helper writes.
const settingsVersion = 1

// maxSettings bounds the file in bytes, and maxSetting one value.
const (
	maxSettings = 64 << 10
	maxSetting  = 1024
)

// The keys of settings. Each is also a flag of `run`, which overrides it, name excepted.
const (
	SettingName        = "name"
	SettingLabel       = "label"
	SettingEndpoint    = "endpoint"
	SettingOperator    = "operator"
	SettingDNS         = "dns"
	SettingListenPort  = "listen-port"
	SettingMeshPrefix4 = "mesh-prefix4"
	SettingMeshPrefix6 = "mesh-prefix6"
)

// settingKey is a key, and what it says. A change of a live one is in force at once; the
// others hold from the next start on.
type settingKey struct {
	key  string
	live bool
	is   string
}

// settingKeys are all keys, in the order in which they are shown.
var settingKeys = []settingKey{
	{SettingName, true, "of this host, as its status shows it"},
	{SettingLabel, false, "of the service, and of the anchor in a Mac's packet filter"},
	{SettingEndpoint, true, "HOST[:PORT] where peers reach this host"},
	{SettingOperator, false, "the user who may change the mesh besides root"},
	{SettingDNS, true, "resolvers in the peers' configurations, by commas"},
	{SettingListenPort, false, "UDP port of WireGuard, 0 for any"},
	{SettingMeshPrefix4, false, "IPv4 prefix of the mesh"},
	{SettingMeshPrefix6, false, "IPv6 prefix of the mesh"},
}

// SettingsHelp has a line for each key, which says what it is.
func SettingsHelp() string {
	var lines []string
	for _, k := range settingKeys {
		lines = append(lines, fmt.Sprintf("  %-12s  %s", k.key, k.is))
	}
	return strings.Join(lines, "\n")
}

// SettingKeys returns the keys of settings, in the order in which they are shown.
func SettingKeys() (keys []string) {
	for _, k := range settingKeys {
		keys = append(keys, k.key)
	}
	return keys
}

func isLive(key string) bool {
	return slices.ContainsFunc(settingKeys, func(k settingKey) bool { return k.key == key && k.live })
}

// CheckSetting returns a value as it is kept, or says what is wrong with it or the key,
// as an *api.Error.
func CheckSetting(key, value string) (string, error) {
	kept, err := parseSetting(key, value)
	if err == nil {
		err = checkReachable(key, kept)
	}
	if err != nil {
		return "", err
	}
	return kept, nil
}

// checkReachable refuses an endpoint and resolvers that no device reaches. One that is
// kept already is no reason not to start.
func checkReachable(key, value string) error {
	addresses := strings.Split(value, ",")
	switch key {
	default:
		return nil
	case SettingDNS:
	case SettingEndpoint:
		e, err := mesh.ParseEndpoint(value, 1)
		if err != nil {
			return err
		}
		addresses = []string{e.Host}
	}
	for _, text := range addresses {
		if a, err := netip.ParseAddr(text); err == nil && (a.IsLoopback() || a.IsLinkLocalUnicast()) {
			return api.Errorf(api.CodeBadSetting, "%s %.70q: no other device reaches %v", key, value, a).
				WithHint("give an address, or a name, by which devices reach it")
		}
	}
	return nil
}

// parseSetting is CheckSetting for a value that may have been kept for long.
func parseSetting(key, value string) (string, error) {
	value = strings.TrimSpace(value)
	if !slices.Contains(SettingKeys(), key) {
		unknown := api.Errorf(api.CodeUnknownSetting, "setting %q is unknown", key)
		near := mesh.Closest(key, SettingKeys())
		if i := slices.IndexFunc(SettingKeys(), func(k string) bool { return strings.HasSuffix(k, "-"+key) }); near == "" && i >= 0 {
			near = SettingKeys()[i]
		}
		if near != "" {
			return "", unknown.WithHint("did you mean %q?", near)
		}
		return "", unknown.WithHint("there are %s", strings.Join(SettingKeys(), ", "))
	}
	kept, err := value, error(nil)
	hint := ""
	switch key {
	case SettingName:
		err, hint = mesh.CheckName(value), "names have 1 to 63 letters, digits, -, _ and ."
	case SettingLabel:
		err, hint = host.CheckLabel(value), "a label has 1 to 63 letters, digits, -, _ and ., such as org.meshhelper"
	case SettingEndpoint:
		// The port is that of WireGuard, where there is none.
		if _, wrong := mesh.ParseEndpoint(value, 1); wrong != nil {
			err = errors.Unwrap(wrong)
		}
		hint = "it is HOST or HOST:PORT, an IPv6 address in brackets where a port follows"
	case SettingOperator:
		if len(value) > 256 || strings.ContainsAny(value, " \t\n:/") {
			err, hint = errors.New("not a user's name"), "give a user's name or number"
		}
	case SettingDNS:
		kept, err = checkDNS(value)
		hint = "give addresses of resolvers, separated by commas"
	case SettingListenPort:
		_, err = strconv.ParseUint(value, 10, 16)
		if err != nil {
			err = errors.New("not a port")
		}
		hint = "it is a number from 0 to 65535; 0 lets the system choose"
	case SettingMeshPrefix4, SettingMeshPrefix6:
		kept, err = checkPrefix(key, value)
		hint = "take a private prefix that isn't in use here"
	}
	if err == nil && (kept == "" || len(kept) > maxSetting) {
		err, hint = fmt.Errorf("a value has 1 to %d bytes", maxSetting), "to have it as if it was never set: meshhelper settings --unset "+key
	}
	if err != nil {
		message := fmt.Sprintf("%s %.70q: %v", key, value, err)
		if said := err.Error(); strings.Contains(said, strconv.Quote(value)) { // it quotes the value itself
			message = key + " " + strings.TrimPrefix(said, key+" ")
		}
		return "", api.Errorf(api.CodeBadSetting, "%s", message).WithHint("%s", hint)
	}
	return kept, nil
}

func checkDNS(value string) (string, error) {
	var out []string
	for text := range strings.SplitSeq(value, ",") {
		a, err := netip.ParseAddr(strings.TrimSpace(text))
		if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
			return "", fmt.Errorf("%q is not a resolver's address", text)
		}
		out = append(out, a.Unmap().String())
	}
	return strings.Join(out, ","), nil
}

func checkPrefix(key, value string) (string, error) {
	p, err := netip.ParsePrefix(value)
	if _, notAddr := netip.ParseAddr(value); notAddr == nil {
		return "", errors.New("an address without the prefix's length, such as /16 or /48")
	}
	if err != nil {
		return "", errors.New("not a prefix")
	}
	prefixes := mesh.DefaultPrefixes()
	if key == SettingMeshPrefix4 {
		prefixes.V4 = p
	} else {
		prefixes.V6 = p
	}
	return p.String(), prefixes.Validate()
}

// ReadSettings returns the settings that are kept in a state directory, by key. It needs
// no helper, and none where the directory doesn't exist.
func ReadSettings(dir string) (map[string]string, error) {
	path := filepath.Join(dir, settingsFile)
	text, err := owned.Read(path, maxSettings)
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]string{}, nil
	}
	if err != nil {
		if wrong := checkDir(dir); wrong != nil {
			return nil, wrong // the folder's owner first: with it that of the file is mended
		}
		return nil, fmt.Errorf("read settings: %w", err)
	}
	kept, err := decodeSettings(text)
	if err != nil {
		return nil, api.Errorf(api.CodeInternal, "read settings %q: %v", path, err).
			WithHint("nothing was touched; mend the file, or move it away to start without settings")
	}
	return kept, nil
}

type settingsDocument struct {
	Version  int               `json:"version"`
	Settings map[string]string `json:"settings"`
}

func decodeSettings(text []byte) (map[string]string, error) {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	var doc settingsDocument
	if err := dec.Decode(&doc); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something follows the settings")
	}
	if doc.Version != settingsVersion {
		return nil, fmt.Errorf("version %d is unknown", doc.Version)
	}
	out := map[string]string{}
	for key, value := range doc.Settings {
		kept, err := parseSetting(key, value)
		if err != nil {
			return nil, err
		}
		out[key] = kept
	}
	return out, nil
}

func encodeSettings(kept map[string]string) ([]byte, error) {
	text, err := json.MarshalIndent(settingsDocument{settingsVersion, kept}, "", "  ")
	return append(text, '\n'), err
}

// WriteSettings changes the settings in the directory of a helper that doesn't run; nil
// takes a setting away. The directory is made when missing. It is an error while a
// helper holds the directory.
func WriteSettings(dir string, changes map[string]*string) (err error) {
	if err := openDir(dir); err != nil {
		return err
	}
	release, err := lockDir(dir)
	if err != nil {
		return fmt.Errorf("write settings: state directory %q: %w", dir, err)
	}
	defer func() { err = errors.Join(err, release()) }()
	kept, err := ReadSettings(dir)
	if err != nil {
		return err
	}
	next, err := changedSettings(kept, changes)
	if err != nil || maps.Equal(kept, next) {
		return err
	}
	text, err := encodeSettings(next)
	if err != nil {
		return err
	}
	if err := owned.Replace(filepath.Join(dir, settingsFile), text); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	return nil
}

// Held returns an error while a helper holds a state directory. It makes nothing there.
func Held(dir string) error {
	if _, err := os.Lstat(filepath.Join(dir, lockFile)); err != nil {
		return nil // no helper was ever there, or none can be
	}
	release, err := lockDir(dir)
	if errors.Is(err, errHeld) {
		return fmt.Errorf("state directory %q: %w", dir, err)
	}
	if err != nil {
		return nil // what another user has put there is no helper's
	}
	return release()
}

// changedSettings returns kept with the changes.
func changedSettings(kept map[string]string, changes map[string]*string) (map[string]string, error) {
	next := maps.Clone(kept)
	for key, value := range changes {
		if value == nil {
			if !slices.Contains(SettingKeys(), key) {
				_, err := CheckSetting(key, "")
				return nil, err
			}
			// Peers have addresses of a mesh prefix that was set; only one that is kept says
			// that they are to get others, so the default is kept.
			_, kept := next[key]
			delete(next, key)
			switch d := mesh.DefaultPrefixes(); {
			case kept && key == SettingMeshPrefix4:
				next[key] = d.V4.String()
			case kept && key == SettingMeshPrefix6:
				next[key] = d.V6.String()
			}
			continue
		}
		checked, err := CheckSetting(key, *value)
		if err != nil {
			return nil, err
		}
		next[key] = checked
	}
	return next, nil
}

// StartSettings say where the values of the keys come from at the start: a flag's counts
// before one that is kept, and that before the default.
type StartSettings struct {
	// Given are those of flags, Kept those that [ReadSettings] found.
	Given, Kept map[string]string
	// Defaults are of the keys that have one.
	Defaults map[string]string
}

// Value returns what counts for a key.
func (s StartSettings) Value(key string) string {
	for _, m := range []map[string]string{s.Given, s.Kept, s.Defaults} {
		if v, ok := m[key]; ok {
			return v
		}
	}
	return ""
}

// settings are the helper's, with what changed since the start.
type settings struct {
	start StartSettings
	// kept is what is on disk by now.
	kept map[string]string
	// name, endpoint and dns are what counts by now.
	name     string
	endpoint mesh.Endpoint
	dns      []netip.Addr
}

// now returns what counts for a key now.
func (s *settings) now(key string) string {
	if isLive(key) {
		return StartSettings{s.start.Given, s.kept, s.start.Defaults}.Value(key)
	}
	return s.start.Value(key)
}

// after returns what counts after a restart with the same flags.
func (s *settings) after(key string) string {
	return StartSettings{s.start.Given, s.kept, s.start.Defaults}.Value(key)
}

// answer shows the settings.
func (s *settings) answer() api.Settings {
	out := api.Settings{Settings: []api.Setting{}, Restart: []string{}, Overridden: []string{}}
	for _, k := range settingKeys {
		key := k.key
		one := api.Setting{Key: key, Value: s.now(key), Kept: s.kept[key], Source: api.SettingDefault}
		_, given := s.start.Given[key]
		_, kept := s.kept[key]
		_, was := s.start.Kept[key]
		switch {
		case given:
			one.Source = api.SettingFlag
		case k.live && kept || !k.live && was:
			one.Source = api.SettingKept
		}
		if given && kept && s.kept[key] != s.start.Given[key] {
			out.Overridden = append(out.Overridden, key)
		}
		if s.now(key) != s.after(key) {
			out.Restart = append(out.Restart, key)
		}
		out.Settings = append(out.Settings, one)
	}
	return out
}

// Settings returns what the helper was told to be.
func (d *Daemon) Settings() api.Settings { return d.settings.Load().answer() }

// ChangeSettings keeps other settings, and puts those in force that need no restart; the
// answer says which do. Nil takes a setting away. Nothing changes where one is wrong, or
// can't be saved.
func (d *Daemon) ChangeSettings(ctx context.Context, changes map[string]*string) (api.Settings, error) {
	if name := changes[SettingOperator]; name != nil {
		if err := CheckOperator(*name); err != nil {
			return api.Settings{}, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, d.saveWithin())
	defer cancel()
	select {
	case d.setting <- struct{}{}:
		defer func() { <-d.setting }()
	case <-ctx.Done():
		return api.Settings{}, d.settingsNotSaved(errors.New("another change is still being saved"))
	}
	was := d.settings.Load()
	kept, err := changedSettings(was.kept, changes)
	if err != nil {
		return api.Settings{}, err
	}
	next := &settings{start: was.start, kept: kept}
	if err := d.settle(next); err != nil {
		return api.Settings{}, err
	}
	var renumbered []api.Renumbered
	var problems []api.Problem
	if touchesPrefixes(changes) {
		if problems, err = d.checkPrefixes(was, next); err != nil {
			return api.Settings{}, err
		}
		if renumbered, err = d.planPrefixes(next); err != nil {
			return api.Settings{}, err
		}
	}
	if err := d.keepSettings(ctx, was, next); err != nil {
		return api.Settings{}, err
	}
	out := next.answer()
	out.Renumbered, out.Problems = renumbered, problems
	if was.endpoint != next.endpoint || was.after(SettingListenPort) != next.after(SettingListenPort) {
		for _, p := range d.wanted.Load().Peers {
			out.Outdated = append(out.Outdated, p.Name)
		}
	}
	out.Already = maps.Equal(was.kept, kept)
	return out, nil
}

// keepSettings saves next and has it count. With an error of which errUnsynced is in the
// chain it counts, too: the file is replaced.
func (d *Daemon) keepSettings(ctx context.Context, was, next *settings) error {
	if maps.Equal(was.kept, next.kept) {
		return nil
	}
	err := d.saveSettings(ctx, next.kept)
	if err != nil && !errors.Is(err, errUnsynced) {
		return d.settingsNotSaved(err)
	}
	d.settings.Store(next)
	for _, key := range SettingKeys() {
		if was.kept[key] != next.kept[key] {
			d.journal.Record(changeBy(ctx, events.Event{Message: describeSetting(key, next.kept[key])}))
		}
	}
	poke(d.renamed)
	poke(d.wake)
	if err != nil {
		return d.settingsNotSaved(err)
	}
	return nil
}

func describeSetting(key, value string) string {
	if value == "" {
		return "setting " + key + " was taken away"
	}
	return fmt.Sprintf("setting %s became %q", key, value)
}

func touchesPrefixes(changes map[string]*string) bool {
	_, v4 := changes[SettingMeshPrefix4]
	_, v6 := changes[SettingMeshPrefix6]
	return v4 || v6
}

// prefixesAfter returns the mesh prefixes that count after a restart, and whether there
// are: a helper in a test may have been told of none.
func (s *settings) prefixesAfter() (p mesh.Prefixes, ok bool) {
	var err4, err6 error
	p.V4, err4 = netip.ParsePrefix(s.after(SettingMeshPrefix4))
	p.V6, err6 = netip.ParsePrefix(s.after(SettingMeshPrefix6))
	return p, err4 == nil && err6 == nil
}

// checkPrefixes refuses another mesh prefix in which an interface of this host has an
// address: peers wouldn't reach that network, and it is never what was meant. It returns
// what else is in a new prefix, which the owner may live with. The default is never
// refused, for it is what the helper starts with anyway.
func (d *Daemon) checkPrefixes(was, next *settings) ([]api.Problem, error) {
	before, _ := was.prefixesAfter()
	want, ok := next.prefixesAfter()
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
	c, _ := d.condition()
	if len(fresh) == 0 || c.ruleset == nil {
		return nil, nil // not looked at yet; the start names what overlaps
	}
	r, err := policy.Compile(policy.Mesh{Prefixes: fresh}, c.ruleset.Host(), d.clock.now())
	if err != nil {
		return nil, err
	}
	defaults := mesh.DefaultPrefixes()
	var out []api.Problem
	for _, o := range r.Overlaps() {
		p := overlapProblem(r, o)
		byAddress := o.Kind == policy.OverlapUplink || o.Kind == policy.OverlapAddress
		if byAddress && o.Mesh != defaults.V4 && o.Mesh != defaults.V6 {
			return nil, api.Errorf(api.CodeBadSetting, "%v is in use here: %s", o.Mesh, p.Message).WithHint("%s", wayOut(r, o.Mesh))
		}
		out = append(out, shown(p))
	}
	return out, nil
}

// planPrefixes says which peers get other addresses when the helper starts with these
// settings.
func (d *Daemon) planPrefixes(s *settings) ([]api.Renumbered, error) {
	want, ok := s.prefixesAfter()
	if !ok || want == d.mesh.prefixes {
		return nil, nil
	}
	return d.PlanPrefixes(want)
}

// settle finds what the live settings come to. What counted at the start is what
// [Options] say.
func (d *Daemon) settle(s *settings) error {
	s.endpoint, s.dns = d.opts.Endpoint, d.opts.DNS
	s.name = s.now(SettingName)
	if text := s.now(SettingEndpoint); text != s.start.Value(SettingEndpoint) {
		s.endpoint = mesh.Endpoint{}
		if text != "" {
			var err error
			if s.endpoint, err = mesh.ParseEndpoint(text, cmp.Or(d.opts.ListenPort, DefaultListenPort)); err != nil {
				return api.Errorf(api.CodeBadSetting, "%s: %v", SettingEndpoint, err)
			}
			if a, err := netip.ParseAddr(s.endpoint.Host); err == nil && slices.Contains(d.mesh.own.List(), a.Unmap()) {
				return api.Errorf(api.CodeBadSetting, "%s %v is this host's own mesh address, which devices reach through the tunnel alone", SettingEndpoint, a).
					WithHint("give a name or an address by which this host is reached from outside")
			}
		}
	}
	if text := s.now(SettingDNS); text != s.start.Value(SettingDNS) {
		s.dns = nil
		for a := range strings.SplitSeq(text, ",") {
			if addr, err := netip.ParseAddr(a); err == nil { // none of an empty text
				s.dns = append(s.dns, addr)
			}
		}
	}
	return nil
}

// DefaultListenPort is the UDP port of WireGuard by custom.
const DefaultListenPort = 51820

func (d *Daemon) saveSettings(ctx context.Context, kept map[string]string) error {
	text, err := encodeSettings(kept)
	if err != nil {
		return err
	}
	j := d.disk.submit("", func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return d.disk.store.replace(ctx, text, settingsFile)
	})
	err = d.disk.wait(ctx, j)
	if err != nil && ctx.Err() != nil { // it may be in the middle of it
		d.disk.forget(j)
		return fmt.Errorf("%w: %w", errNotKnown, err)
	}
	return err
}

// errNotKnown is in the chain of an error after which what is on disk isn't known.
var errNotKnown = errors.New("whether they are saved isn't known")

// settingsNotSaved says what holds after settings couldn't be saved.
func (d *Daemon) settingsNotSaved(cause error) error {
	what := "nothing was changed: save settings: " + cause.Error()
	switch {
	case errors.Is(cause, errUnsynced):
		what = "the settings are changed and saved, but " + cause.Error()
	case errors.Is(cause, errNotKnown):
		what = "the settings count as before until the helper starts anew; " + cause.Error()
	}
	return api.Errorf(api.CodeNotSaved, "%s", what).
		WithHint("make room or make %q writable, and repeat the command", d.opts.StateDir)
}

// CheckOperator refuses a user that doesn't exist: a helper that is told of one doesn't
// start.
func CheckOperator(name string) error {
	_, err := user.Lookup(name)
	if err == nil {
		return nil
	}
	if _, err := strconv.ParseUint(name, 10, 32); err == nil {
		return nil // a number may stand for a user that has no name here
	}
	return api.Errorf(api.CodeBadSetting, "%s: there is no user %.70q", SettingOperator, name).WithHint("give a user of this host")
}
