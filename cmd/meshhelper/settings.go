package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// newSettingsCommand returns `settings`.
func newSettingsCommand(a *app) *cobra.Command {
	unset := ""
	c := &cobra.Command{
		Use: "settings [KEY [VALUE]]", Short: "Show or change the helper's settings",
		Long: `Show or change the helper's settings. They are kept in the state folder; a flag of
"run" overrides its setting, and the answer says so. The answer also says which
changes need a restart of the helper.

KEY is one of
` + wanted.SettingsHelp(),
		Example: `  meshhelper settings endpoint home.example
  meshhelper settings mesh-prefix4 10.99.0.0/16
  meshhelper settings --unset endpoint`,
		ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) == 0 {
				return wanted.SettingKeys(), cobra.ShellCompDirectiveNoFileComp
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(c *cobra.Command, args []string) error {
			switch {
			case unset != "" && len(args) > 0:
				return usagef("--unset takes no other argument: got %q", args[0])
			case c.Flags().Changed("unset"):
				return a.changeSetting(c.Context(), unset, nil)
			case len(args) == 2:
				return a.changeSetting(c.Context(), args[0], &args[1])
			}
			return a.showSettings(c.Context(), args)
		},
	}
	c.Flags().StringVar(&unset, "unset", "", "reset `KEY` to its default")
	if err := c.RegisterFlagCompletionFunc("unset", cobra.FixedCompletions(wanted.SettingKeys(), cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the only error is a flag that doesn't exist, and it was added above
	}
	return c
}

// showSettings prints all settings as a table, or the value of the one in args. A single
// value stands alone on stdout, for scripts, and is empty if the setting has none.
func (a *app) showSettings(ctx context.Context, args []string) error {
	if len(args) == 1 {
		if err := checkSettingKey(args[0]); err != nil {
			return err
		}
	}
	s, err := a.client().Settings(ctx)
	if err != nil {
		return err
	}
	if len(args) == 0 {
		return a.print(s, func() {
			var table strings.Builder
			w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
			for _, one := range s.Settings {
				fmt.Fprintf(w, "%s\t%s\t%s\n", one.Key, cmp.Or(one.Value, unset(one.Key)), sourceOf(one))
			}
			w.Flush() // a strings.Builder returns no error
			fmt.Fprint(a.stdout, wrapAt(a.columns, table.String(), func(line string) int { return len(listPrefix.FindString(line)) }))
		})
	}
	one, ok := s.Of(args[0])
	if !ok {
		return api.Errorf(api.CodeUnknownSetting, "the running helper, which is another version, has no setting %q", args[0])
	}
	return a.print(one, func() {
		if one.Value != "" {
			a.say("%s", one.Value)
		} else {
			a.talk("%s isn't set: %s", one.Key, unset(one.Key))
		}
		a.talkOfSetting(s, one)
	})
}

// unset says what the helper uses for a setting that has no value.
func unset(key string) string {
	switch key {
	case wanted.SettingEndpoint:
		return "an address of the uplink"
	case wanted.SettingDNS:
		return "public resolvers (Quad9)"
	}
	return "none"
}

// sourceOf says where a setting's value comes from: a flag of `run`, the state folder, or
// the default. If the state folder has another value than the one in use, it names that.
func sourceOf(s api.Setting) string {
	switch {
	case s.Source == api.SettingFlag && s.Kept != "" && s.Kept != s.Value:
		return fmt.Sprintf("by --%s, kept: %s", s.Key, s.Kept)
	case s.Source == api.SettingFlag:
		return "by --" + s.Key
	case s.Kept != "" && s.Kept != s.Value:
		return fmt.Sprintf("after a restart: %s", s.Kept)
	case s.Source == api.SettingKept:
		return "set"
	}
	return "default"
}

// checkSettingKey returns a usageError for a key that doesn't exist, with a suggestion.
func checkSettingKey(key string) error {
	for _, known := range wanted.SettingKeys() {
		if key == known {
			return nil
		}
	}
	_, err := wanted.CheckSetting(key, "")
	return &usageError{err}
}

// changeSetting sets a key, or resets it if value is nil, and prints what now holds: the
// value, what still keeps it from taking effect, and the configurations that no longer fit.
func (a *app) changeSetting(ctx context.Context, key string, value *string) error {
	if err := checkSettingKey(key); err != nil {
		return err
	}
	if value != nil {
		if _, err := wanted.CheckSetting(key, *value); err != nil {
			return &usageError{err}
		}
	}
	s, err := a.client().ChangeSettings(ctx, map[string]*string{key: value})
	if err != nil {
		return err
	}
	one, _ := s.Of(key)
	return a.print(s, func() {
		switch {
		case value == nil && s.Already:
			a.say("%s wasn't set", key)
		case value == nil:
			a.say("%s is now unset", key)
		case s.Already:
			a.say("%s is already set to %s", key, one.Kept)
		case one.Value == one.Kept:
			a.say("%s is now %s", key, one.Kept)
		default:
			a.say("%s is set to %s; for now it stays %s", key, one.Kept, cmp.Or(one.Value, unset(key)))
		}
		a.talkOfSetting(s, one)
		if value == nil && one.Source == api.SettingFlag {
			a.talk("the helper runs with --%s %s, which applies without the setting as well", key, shellWord(one.Value))
		}
		for _, p := range s.Problems {
			a.talk("%s: %s", p.Step, p.Message)
			a.talk("  %s", p.Hint)
		}
		a.sayRenumbered(s.Renumbered)
		if len(s.Outdated) > 0 {
			line := "Endpoint"
			switch port := cmp.Or(one.Kept, strconv.Itoa(wanted.DefaultListenPort)); {
			case key == wanted.SettingDNS:
				line = "DNS line"
			case key == wanted.SettingListenPort && port == "0":
				a.say("The system chooses the UDP port, which \"meshhelper status\" shows; a NAT router in front of this host has to forward it to this host.")
			case key == wanted.SettingListenPort:
				a.say("A NAT router in front of this host has to forward UDP port %s to it.", port)
			}
			a.say("A device whose configuration has another %s needs a new one: %s", line, strings.Join(s.Outdated, ", "))
			a.say("  meshhelper peer config NAME")
		}
	})
}

// talkOfSetting says why a setting's kept value isn't in use: a flag of the running helper
// overrides it, or it takes effect with the helper's next start.
func (a *app) talkOfSetting(s api.Settings, one api.Setting) {
	for _, key := range s.Overridden {
		if key == one.Key {
			a.talk("the helper runs with --%s %s, which overrides the setting", key, one.Value)
		}
	}
	for _, key := range s.Restart {
		if key == one.Key {
			a.talk("%s takes effect after a restart of the helper: %s", key, restartCommand(s))
		}
	}
}

// restartCommand returns the shell command that restarts the helper. Only an installed helper
// has a label; one in the foreground is restarted by hand.
func restartCommand(s api.Settings) string {
	label, _ := s.Of(wanted.SettingLabel)
	switch {
	case runtime.GOOS == "darwin" && label.Value != "":
		return "sudo launchctl kickstart -k system/" + label.Value
	case runtime.GOOS == "linux" && label.Value != "":
		return "sudo systemctl restart " + label.Value
	}
	return "end it and run it again"
}

// sayRenumbered lists the peers whose addresses change with the mesh prefixes, and the lines
// of their configurations that change, so that a user can edit them on the device.
func (a *app) sayRenumbered(peers []api.Renumbered) {
	if len(peers) == 0 {
		return
	}
	a.say("")
	a.say("With the restart these peers get new addresses, and each device needs the lines below:")
	for _, p := range peers {
		a.say("")
		a.sayWrapped(p.Name+": ", "  ", fmt.Sprintf("%s instead of %s", joinAddresses(p.Is), joinAddresses(p.Was)))
		for _, l := range p.Lines {
			a.sayWrapped("  "+l.Section+" ", "      ", l.Is)
		}
	}
	a.say("")
	a.say("or print a whole configuration after the restart: meshhelper peer config NAME")
}

// takeSettings reads the settings in dir and fills in those options that no flag gives. It
// returns what the helper reports about them: the settings as kept, the flags that override
// them, and the defaults of the others. o.kept lists the keys that count from the settings.
func (o *runOptions) takeSettings(dir string) (start wanted.StartSettings, err error) {
	if start.Kept, err = wanted.ReadSettings(dir); err != nil {
		return start, err
	}
	start.Given, start.Defaults = map[string]string{}, map[string]string{wanted.SettingName: hostName()}
	port, dns := strconv.Itoa(int(o.listenPort)), strings.Join(o.dns, ",")
	for key, value := range map[string]*string{
		wanted.SettingLabel: &o.label, wanted.SettingEndpoint: &o.endpoint, wanted.SettingOperator: &o.operator,
		wanted.SettingDNS: &dns, wanted.SettingListenPort: &port,
		wanted.SettingMeshPrefix4: &o.prefix4, wanted.SettingMeshPrefix6: &o.prefix6,
	} {
		kept, ok := start.Kept[key]
		switch {
		case o.given != nil && o.given(key):
			start.Given[key] = *value
		case ok:
			start.Defaults[key], *value = *value, kept
			o.kept = append(o.kept, key)
		default:
			start.Defaults[key] = *value
		}
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return start, err
	}
	o.listenPort = uint16(number)
	if o.dns = nil; dns != "" {
		o.dns = strings.Split(dns, ",")
	}
	return start, nil
}

// badValuef returns the error for a wrong value of key: a usageError if a flag gave it, and
// else one that names the setting and how to override it, so that a helper that can't start
// can be started.
func (o *runOptions) badValuef(key, format string, args ...any) error {
	what := fmt.Sprintf(format, args...)
	if slices.Contains(o.kept, key) {
		return api.Errorf(api.CodeBadSetting, "setting %s: %s", key, what).WithHint("run --%s overrides it", key)
	}
	return usagef("--%s: %s", key, what)
}

// hostName returns this host's name without its domain, or "" if there is none or it isn't a
// valid setting.
func hostName() string {
	name, err := os.Hostname()
	if err != nil {
		return ""
	}
	name, _, _ = strings.Cut(name, ".")
	if _, err := wanted.CheckSetting(wanted.SettingName, name); err != nil {
		return ""
	}
	return name
}
