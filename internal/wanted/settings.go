package wanted

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
)

// settingsFile has the settings. It is separate from the document because the helper needs
// some of them (the mesh prefixes, say) before it can check the document. Without the file
// nothing was set.
const settingsFile = "settings.json"

// settingsVersion is the version of the file that this helper writes and reads.
const settingsVersion = 1

// Limits in bytes. Eight values of full length take an eighth of the file.
const (
	maxSettings = 64 << 10 // of the file
	maxSetting  = 1024     // of a value
)

// The keys of settings, as in settings.json and on the command line. Each except name is also a
// flag of `run`, which overrides it. parseSetting has the format of each value.
const (
	SettingName        = "name"         // of this host, for people
	SettingLabel       = "label"        // of the service (launchd) and of the pf anchor
	SettingEndpoint    = "endpoint"     // HOST[:PORT]; without a port, WireGuard's
	SettingOperator    = "operator"     // a user's name or uid
	SettingDNS         = "dns"          // addresses, separated by commas
	SettingListenPort  = "listen-port"  // a UDP port, 0 for any
	SettingMeshPrefix4 = "mesh-prefix4" // see mesh.Prefixes
	SettingMeshPrefix6 = "mesh-prefix6"
)

// settingKey describes a key.
type settingKey struct {
	key     string
	live    bool   // a change is in force at once, not only after a restart
	meaning string // for help texts
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

// SettingsHelp returns a line for each key with its meaning, for the command's help.
func SettingsHelp() string {
	var lines []string
	for _, k := range settingKeys {
		lines = append(lines, fmt.Sprintf("  %-12s  %s", k.key, k.meaning))
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

// isLive reports whether a change of a key is in force without a restart.
func isLive(key string) bool {
	return slices.ContainsFunc(settingKeys, func(k settingKey) bool { return k.key == key && k.live })
}

// CheckSetting validates a value and returns it in the form in which it is saved. Errors
// are *api.Error with code unknown_setting or bad_setting, and a hint.
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

// checkReachable refuses an endpoint or a resolver that no other device can reach: loopback
// and link-local addresses. It only applies to new values. A saved one doesn't keep the
// helper from starting.
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

// parseSetting is CheckSetting without checkReachable, for a value from disk.
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
		err = mesh.CheckName(value)
		var wrong *mesh.NameError
		if errors.As(err, &wrong) {
			hint = wrong.Hint
		}
	case SettingLabel:
		err, hint = host.CheckLabel(value), "a label has 1 to 63 letters, digits, -, _ and ., such as org.meshhelper"
	case SettingEndpoint:
		// The default port doesn't matter here; resolveLive puts in the listen port.
		if _, endpointErr := mesh.ParseEndpoint(value, 1); endpointErr != nil {
			err = errors.Unwrap(endpointErr) // the cause alone: the message below names the key and the value
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
		if said := err.Error(); strings.Contains(said, strconv.Quote(value)) { // err quotes the value itself
			message = key + " " + strings.TrimPrefix(said, key+" ")
		}
		return "", api.Errorf(api.CodeBadSetting, "%s", message).WithHint("%s", hint)
	}
	return kept, nil
}

// checkDNS returns a comma-separated list of resolvers' addresses in normal form.
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

// checkPrefix returns a mesh prefix in normal form. mesh.Prefixes.Validate says which
// prefixes are allowed.
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

// ReadSettings returns the settings saved in a state directory, by key. It doesn't need a
// running helper. The map is empty if nothing was set or the directory doesn't exist.
func ReadSettings(dir string) (map[string]string, error) {
	path := filepath.Join(dir, settingsFile)
	text, err := owned.Read(path, maxSettings)
	if errors.Is(err, fs.ErrNotExist) {
		return map[string]string{}, nil
	}
	if err != nil {
		if dirErr := checkDir(dir); dirErr != nil {
			return nil, dirErr // comes first: its hint, chown -R, also repairs the file
		}
		return nil, fmt.Errorf("read settings: %w", err)
	}
	kept, err := decodeSettings(text)
	if err != nil {
		return nil, api.Errorf(api.CodeInternal, "read settings %q: %v", path, err).
			WithHint("nothing was touched; repair the file, or move it away to start without settings")
	}
	return kept, nil
}

// settingsDocument is the content of settings.json.
type settingsDocument struct {
	Version  int               `json:"version"`
	Settings map[string]string `json:"settings"`
}

// decodeSettings decodes the settings and validates each. Unlike in the document, an
// unknown field or key is an error.
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

// encodeSettings encodes settings, indented for a person to read.
func encodeSettings(kept map[string]string) ([]byte, error) {
	text, err := json.MarshalIndent(settingsDocument{settingsVersion, kept}, "", "  ")
	return append(text, '\n'), err
}

// WriteSettings changes settings in a state directory while no helper runs there; a nil
// value unsets a key. It makes the directory if it doesn't exist, and fails while a helper
// has the lock.
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

// InUse returns an error while a helper has the lock of a state directory. It creates
// nothing there.
func InUse(dir string) error {
	if _, err := os.Lstat(filepath.Join(dir, lockFile)); err != nil {
		return nil // no helper ever ran there
	}
	release, err := lockDir(dir)
	if errors.Is(err, errHeld) {
		return fmt.Errorf("state directory %q: %w", dir, err)
	}
	if err != nil {
		return nil // not a helper's lock, but something that another user put there
	}
	return release()
}

// changedSettings returns a copy of kept with changes applied; a nil value unsets a key.
func changedSettings(kept map[string]string, changes map[string]*string) (map[string]string, error) {
	next := maps.Clone(kept)
	for key, value := range changes {
		if value == nil {
			if !slices.Contains(SettingKeys(), key) {
				_, err := CheckSetting(key, "")
				return nil, err
			}
			// Peers have addresses in the prefix that is unset. A prefix in the settings is what
			// tells the next start to renumber them, so the default is saved explicitly.
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

// StartSettings has the values of the keys at the start of the helper, by their source. A
// flag overrides a saved value, and that the default.
type StartSettings struct {
	// Given has the values of flags, Kept those that [ReadSettings] found.
	Given, Kept map[string]string
	// Defaults has the values of keys that are neither; a key may have none.
	Defaults map[string]string
}

// Value returns the effective value of a key, or "".
func (s StartSettings) Value(key string) string {
	for _, m := range []map[string]string{s.Given, s.Kept, s.Defaults} {
		if v, ok := m[key]; ok {
			return v
		}
	}
	return ""
}

// Settings are the settings of a running helper. A published Settings is immutable.
type Settings struct {
	start StartSettings
	// kept has the values on disk, with changes since the start.
	kept map[string]string
	// The live settings that are in force.
	Name     string
	Endpoint mesh.Endpoint // where peers reach this host; zero if it isn't set
	DNS      []netip.Addr  // for the peers' configurations
}

// now returns the value of a key that is in force.
func (s *Settings) now(key string) string {
	if isLive(key) {
		return StartSettings{s.start.Given, s.kept, s.start.Defaults}.Value(key)
	}
	return s.start.Value(key)
}

// After returns the value of a key that would be in force after a restart with the same
// flags.
func (s *Settings) After(key string) string {
	return StartSettings{s.start.Given, s.kept, s.start.Defaults}.Value(key)
}

// Answer returns the settings as the socket shows them: each key with its value and source,
// the keys that need a restart, and the saved ones that a flag overrides.
func (s *Settings) Answer() api.Settings {
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
		if s.now(key) != s.After(key) {
			out.Restart = append(out.Restart, key)
		}
		out.Settings = append(out.Settings, one)
	}
	return out
}

// Settings returns the settings in force.
func (s *State) Settings() *Settings { return s.settings.Load() }

// ChangeSettings saves changes to settings, where a nil value unsets a key, and puts the
// live ones in force; the answer lists the others under Restart. review is called before
// anything is saved: it may refuse by an error, and add to the answer. If a value isn't valid,
// review refuses or the save fails, nothing changes.
func (s *State) ChangeSettings(ctx context.Context, changes map[string]*string, review func(was, next *Settings, out *api.Settings) error) (api.Settings, error) {
	if name := changes[SettingOperator]; name != nil {
		if err := CheckOperator(*name); err != nil {
			return api.Settings{}, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.Wait)
	defer cancel()
	select {
	case s.setting <- struct{}{}:
		defer func() { <-s.setting }()
	case <-ctx.Done():
		return api.Settings{}, s.settingsNotSaved(errors.New("another change is still being saved"))
	}
	was := s.settings.Load()
	kept, err := changedSettings(was.kept, changes)
	if err != nil {
		return api.Settings{}, err
	}
	next := &Settings{start: was.start, kept: kept}
	if err := s.resolveLive(next); err != nil {
		return api.Settings{}, err
	}
	out := next.Answer()
	if err := review(was, next, &out); err != nil {
		return api.Settings{}, err
	}
	if err := s.keepSettings(ctx, was, next); err != nil {
		return api.Settings{}, err
	}
	out.Outdated = s.outdatedBy(was, next)
	out.Already = maps.Equal(was.kept, kept)
	return out, nil
}

// outdatedBy returns the names of the peers whose configurations a change of settings makes
// outdated: all for another endpoint or another port, and those that have a DNS line for other
// resolvers. A port that the tunnel has now, and so the configurations, is no other one.
func (s *State) outdatedBy(was, next *Settings) (names []string) {
	port := next.After(SettingListenPort)
	all := was.Endpoint != next.Endpoint || port != was.After(SettingListenPort) && port != next.now(SettingListenPort)
	resolvers := !slices.Equal(was.DNS, next.DNS)
	if !all && !resolvers {
		return nil
	}
	now := s.Now()
	for _, p := range s.doc.Load().Peers {
		if all || Sends(&p, now) == mesh.TunnelFull {
			names = append(names, p.Name)
		}
	}
	return names
}

// keepSettings saves next and publishes it. After an error with errUnsynced in the chain it
// is published, too, because the file has been replaced.
func (s *State) keepSettings(ctx context.Context, was, next *Settings) error {
	if maps.Equal(was.kept, next.kept) {
		return nil
	}
	err := s.saveSettings(ctx, next.kept)
	if err != nil && !errors.Is(err, errUnsynced) {
		return s.settingsNotSaved(err)
	}
	s.settings.Store(next)
	for _, key := range SettingKeys() {
		if was.kept[key] != next.kept[key] {
			s.opts.Record(changeBy(ctx, events.Event{Message: describeSetting(key, next.kept[key])}))
		}
	}
	s.opts.SettingsChanged()
	if err != nil {
		return s.settingsNotSaved(err)
	}
	return nil
}

// describeSetting returns the message of a change's event.
func describeSetting(key, value string) string {
	if value == "" {
		return "setting " + key + " was unset"
	}
	return fmt.Sprintf("setting %s became %q", key, value)
}

// PrefixesAfter returns the mesh prefixes that would be in force after a restart. ok is false
// if either has no value, as when a test starts a helper without defaults.
func (s *Settings) PrefixesAfter() (p mesh.Prefixes, ok bool) {
	var err4, err6 error
	p.V4, err4 = netip.ParsePrefix(s.After(SettingMeshPrefix4))
	p.V6, err6 = netip.ParsePrefix(s.After(SettingMeshPrefix6))
	return p, err4 == nil && err6 == nil
}

// resolveLive sets the live fields of next from the texts of its keys. A value that is still
// the one of the start isn't parsed again: Options has it, already resolved by the caller.
func (s *State) resolveLive(next *Settings) error {
	next.Endpoint, next.DNS = s.opts.Endpoint, s.opts.DNS
	next.Name = next.now(SettingName)
	if text := next.now(SettingEndpoint); text != next.start.Value(SettingEndpoint) {
		next.Endpoint = mesh.Endpoint{}
		if text != "" {
			var err error
			if next.Endpoint, err = mesh.ParseEndpoint(text, cmp.Or(s.opts.ListenPort, DefaultListenPort)); err != nil {
				return api.Errorf(api.CodeBadSetting, "%s: %v", SettingEndpoint, err)
			}
			if a, err := netip.ParseAddr(next.Endpoint.Host); err == nil && slices.Contains(s.id.Own.List(), a.Unmap()) {
				return api.Errorf(api.CodeBadSetting, "%s %v is this host's own mesh address, which devices reach through the tunnel alone", SettingEndpoint, a).
					WithHint("give a name or an address by which this host is reached from outside")
			}
		}
	}
	if text := next.now(SettingDNS); text != next.start.Value(SettingDNS) {
		next.DNS = nil
		for a := range strings.SplitSeq(text, ",") {
			if addr, err := netip.ParseAddr(a); err == nil { // an empty text has none
				next.DNS = append(next.DNS, addr)
			}
		}
	}
	return nil
}

// DefaultListenPort is the UDP port that WireGuard uses by convention; none is assigned.
const DefaultListenPort = 51820

// saveSettings replaces the settings on disk and waits for that until ctx ends. Then the
// error has errNotKnown in its chain.
func (s *State) saveSettings(ctx context.Context, kept map[string]string) error {
	text, err := encodeSettings(kept)
	if err != nil {
		return err
	}
	j := s.disk.submit("", func() error {
		if err := ctx.Err(); err != nil {
			return err
		}
		return s.disk.store.replace(ctx, text, settingsFile)
	})
	err = s.disk.wait(ctx, j)
	if err != nil && ctx.Err() != nil { // the job may be running
		s.disk.forget(j)
		return fmt.Errorf("%w: %w", errNotKnown, err)
	}
	return err
}

// errNotKnown is in the chain of an error after which the file on disk may or may not have
// the change.
var errNotKnown = errors.New("whether they are saved isn't known")

// settingsNotSaved returns the error for settings that couldn't be saved, which says what is
// in force.
func (s *State) settingsNotSaved(cause error) error {
	message := "nothing was changed: save settings: " + cause.Error()
	switch {
	case errors.Is(cause, errUnsynced):
		message = "the settings are changed and saved, but " + cause.Error()
	case errors.Is(cause, errNotKnown):
		message = "the settings count as before until the helper starts anew; " + cause.Error()
	}
	return api.Errorf(api.CodeNotSaved, "%s", message).
		WithHint("make room or make %q writable, and repeat the command", s.disk.store.dir)
}

// CheckOperator refuses a user that doesn't exist, with which a helper wouldn't start. A
// number is accepted without a user of that uid.
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
