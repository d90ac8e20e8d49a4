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

// InUse returns an error while a helper holds a state directory. It makes nothing there.
func InUse(dir string) error {
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

// Settings are the helper's, with what changed since the start.
type Settings struct {
	start StartSettings
	// kept is what is on disk by now.
	kept map[string]string
	// What counts by now.
	Name     string
	Endpoint mesh.Endpoint
	DNS      []netip.Addr
}

// now returns what counts for a key now.
func (s *Settings) now(key string) string {
	if isLive(key) {
		return StartSettings{s.start.Given, s.kept, s.start.Defaults}.Value(key)
	}
	return s.start.Value(key)
}

// After returns what counts after a restart with the same flags.
func (s *Settings) After(key string) string {
	return StartSettings{s.start.Given, s.kept, s.start.Defaults}.Value(key)
}

// Answer shows the settings.
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

// Settings returns what the helper was told to be.
func (s *State) Settings() *Settings { return s.settings.Load() }

// ChangeSettings keeps other settings, and puts those in force that need no restart; the
// answer says which do. Nil takes a setting away. Nothing changes where one is wrong,
// can't be saved, or agree refuses: it is asked about what was and what is to be, and may
// add to the answer.
func (s *State) ChangeSettings(ctx context.Context, changes map[string]*string, agree func(was, next *Settings, out *api.Settings) error) (api.Settings, error) {
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
	if err := s.settle(next); err != nil {
		return api.Settings{}, err
	}
	out := next.Answer()
	if err := agree(was, next, &out); err != nil {
		return api.Settings{}, err
	}
	if err := s.keepSettings(ctx, was, next); err != nil {
		return api.Settings{}, err
	}
	if was.Endpoint != next.Endpoint || was.After(SettingListenPort) != next.After(SettingListenPort) {
		for _, p := range s.doc.Load().Peers {
			out.Outdated = append(out.Outdated, p.Name)
		}
	}
	out.Already = maps.Equal(was.kept, kept)
	return out, nil
}

// keepSettings saves next and has it count. With an error of which errUnsynced is in the
// chain it counts, too: the file is replaced.
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

func describeSetting(key, value string) string {
	if value == "" {
		return "setting " + key + " was taken away"
	}
	return fmt.Sprintf("setting %s became %q", key, value)
}

// PrefixesAfter returns the mesh prefixes that count after a restart, and whether there
// are: a helper in a test may have been told of none.
func (s *Settings) PrefixesAfter() (p mesh.Prefixes, ok bool) {
	var err4, err6 error
	p.V4, err4 = netip.ParsePrefix(s.After(SettingMeshPrefix4))
	p.V6, err6 = netip.ParsePrefix(s.After(SettingMeshPrefix6))
	return p, err4 == nil && err6 == nil
}

// settle finds what the live settings come to. What counted at the start is what
// [Options] say.
func (s *State) settle(next *Settings) error {
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
			if addr, err := netip.ParseAddr(a); err == nil { // none of an empty text
				next.DNS = append(next.DNS, addr)
			}
		}
	}
	return nil
}

// DefaultListenPort is the UDP port of WireGuard by custom.
const DefaultListenPort = 51820

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
	if err != nil && ctx.Err() != nil { // it may be in the middle of it
		s.disk.forget(j)
		return fmt.Errorf("%w: %w", errNotKnown, err)
	}
	return err
}

// errNotKnown is in the chain of an error after which what is on disk isn't known.
var errNotKnown = errors.New("whether they are saved isn't known")

// settingsNotSaved says what holds after settings couldn't be saved.
func (s *State) settingsNotSaved(cause error) error {
	what := "nothing was changed: save settings: " + cause.Error()
	switch {
	case errors.Is(cause, errUnsynced):
		what = "the settings are changed and saved, but " + cause.Error()
	case errors.Is(cause, errNotKnown):
		what = "the settings count as before until the helper starts anew; " + cause.Error()
	}
	return api.Errorf(api.CodeNotSaved, "%s", what).
		WithHint("make room or make %q writable, and repeat the command", s.disk.store.dir)
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
