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

func newSettingsCommand(a *app) *cobra.Command {
	unset := ""
	c := &cobra.Command{
		Use: "settings [KEY [VALUE]]", Short: "Show or change what the helper was told to be",
		Long: `Show or change what the helper was told to be. It is kept in the state folder; a
flag of "run" overrides it, and the answer says so. The answer also says which
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
				return usagef("--unset takes its key by itself: got %q besides", args[0])
			case c.Flags().Changed("unset"):
				return a.changeSetting(c.Context(), unset, nil)
			case len(args) == 2:
				return a.changeSetting(c.Context(), args[0], &args[1])
			}
			return a.showSettings(c.Context(), args)
		},
	}
	c.Flags().StringVar(&unset, "unset", "", "have `KEY` as if it was never set")
	if err := c.RegisterFlagCompletionFunc("unset", cobra.FixedCompletions(wanted.SettingKeys(), cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the flag is there
	}
	return c
}

// showSettings prints all settings, or the value of the one in args.
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
			w.Flush() // into memory
			fmt.Fprint(a.stdout, wrapAt(a.columns, table.String(), func(line string) int { return len(listPrefix.FindString(line)) }))
		})
	}
	one, ok := s.Of(args[0])
	if !ok {
		return api.Errorf(api.CodeUnknownSetting, "the helper, which is another version, has no setting %q", args[0])
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

// unset says what counts where a setting has no value.
func unset(key string) string {
	switch key {
	case wanted.SettingEndpoint:
		return "an address of the uplink"
	case wanted.SettingDNS:
		return "public resolvers (Quad9)"
	}
	return "none"
}

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

// checkSettingKey refuses a key that doesn't exist.
func checkSettingKey(key string) error {
	for _, known := range wanted.SettingKeys() {
		if key == known {
			return nil
		}
	}
	_, err := wanted.CheckSetting(key, "")
	return &usageError{err}
}

// changeSetting sets a key, or takes it away where value is nil.
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
			a.say("%s isn't set already", key)
		case value == nil:
			a.say("%s isn't set any more", key)
		case s.Already:
			a.say("%s is kept as %s already", key, one.Kept)
		case one.Value == one.Kept:
			a.say("%s is now %s", key, one.Kept)
		default:
			a.say("%s is kept as %s; now it is %s", key, one.Kept, cmp.Or(one.Value, unset(key)))
		}
		a.talkOfSetting(s, one)
		for _, p := range s.Problems {
			a.talk("%s: %s", p.Step, p.Message)
			a.talk("  %s", p.Hint)
		}
		a.sayRenumbered(s.Renumbered)
		if len(s.Outdated) > 0 {
			if key == wanted.SettingListenPort {
				a.say("A router in front has to forward that UDP port to this host.")
			}
			a.say("A device whose configuration has another Endpoint needs a new one: %s", strings.Join(s.Outdated, ", "))
			a.say("  meshhelper peer config NAME")
		}
	})
}

// talkOfSetting says what keeps a setting from counting now.
func (a *app) talkOfSetting(s api.Settings, one api.Setting) {
	for _, key := range s.Overridden {
		if key == one.Key {
			a.talk("the helper runs with --%s %s, which overrides what is kept", key, one.Value)
		}
	}
	for _, key := range s.Restart {
		if key == one.Key {
			a.talk("%s counts after a restart of the helper: %s", key, restartCommand(s))
		}
	}
}

// restartCommand restarts an installed helper.
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

// sayRenumbered lists the peers that get other addresses, and which lines of their
// configurations change.
func (a *app) sayRenumbered(peers []api.Renumbered) {
	if len(peers) == 0 {
		return
	}
	a.say("")
	a.say("With the restart these peers get other addresses, and each device needs the lines below:")
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

// takeSettings has what is kept in the state directory count where no flag was given, and
// notes which were.
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

// badValuef is an error about a flag, or about the setting of that key.
func (o *runOptions) badValuef(key, format string, args ...any) error {
	what := fmt.Sprintf(format, args...)
	if slices.Contains(o.kept, key) {
		return api.Errorf(api.CodeBadSetting, "setting %s: %s", key, what).WithHint("run --%s overrides it", key)
	}
	return usagef("--%s: %s", key, what)
}

// hostName is this host's name, without its domain, or "".
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
