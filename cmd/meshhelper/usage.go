package main

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// applyConventions sets, for c and every command below it, what all commands have in
// common: the arguments are checked by the usage line, and flags with few values complete
// them. A command must not check its arguments itself.
func applyConventions(c *cobra.Command) {
	if !c.HasSubCommands() && !c.DisableFlagParsing {
		c.Args = argumentsOf(c.Use)
	}
	c.Flags().VisitAll(func(f *pflag.Flag) {
		complete := completionOf(c, f)
		if complete == nil {
			return
		}
		if _, has := c.GetFlagCompletionFunc(f.Name); !has {
			// The only error is a flag that doesn't exist, and f does.
			_ = c.RegisterFlagCompletionFunc(f.Name, complete)
		}
	})
	for _, sub := range c.Commands() {
		applyConventions(sub)
	}
}

// argumentsOf returns a check of a command's arguments by its usage line, such as "allow
// NAME PERMISSION...": a word in brackets is optional, and one with dots may be repeated.
// So the usage line and the check can't differ, and the error names a missing argument as
// the usage line does.
func argumentsOf(use string) cobra.PositionalArgs {
	names := strings.Fields(use)[1:]
	least, many := 0, false // required arguments, and whether one may be repeated
	for i, name := range names {
		if !strings.HasPrefix(name, "[") {
			least = i + 1
		}
		many = many || strings.Contains(name, "...")
	}
	return func(c *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			missing := names[len(args):least]
			verb := "is"
			if len(missing) > 1 {
				verb = "are"
			}
			return usagef("%s %s missing", strings.ReplaceAll(strings.Join(missing, " and "), "...", ""), verb)
		case len(args) > len(names) && !many && len(names) == 0:
			return usagef("unexpected argument %q: %q takes no argument", args[0], c.CommandPath())
		case len(args) > len(names) && !many:
			return usagef("unexpected argument %q: %q takes %s", args[len(names)], c.CommandPath(), strings.Join(names, " "))
		}
		return nil
	}
}

// unknownCommand returns the error for a subcommand that c doesn't have. It suggests a
// command with another common name (SuggestFor), one of `peer` that was given without
// "peer", or the closest name; failing these it lists all.
func unknownCommand(c *cobra.Command, name string) error {
	var names []string
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			names = append(append(names, sub.Name()), sub.Aliases...)
		}
		if slices.ContainsFunc(sub.SuggestFor, func(other string) bool { return strings.EqualFold(other, name) }) {
			return usagef("unknown command %q for %q; did you mean %q?", name, c.CommandPath(), sub.Name())
		}
		// A command of peers, without "peer" before it.
		if below, _, err := sub.Find([]string{name}); err == nil && below != sub && sub.Name() == "peer" {
			return usagef("unknown command %q for %q; did you mean %q?", name, c.CommandPath(), sub.Name()+" "+below.Name())
		}
	}
	if near := mesh.Closest(name, names); near != "" {
		return usagef("unknown command %q for %q; did you mean %q?", name, c.CommandPath(), near)
	}
	return usagef("unknown command %q for %q; it has: %s", name, c.CommandPath(), strings.Join(names, ", "))
}

// newHelpCommand returns `help`, which is wrong usage for a command that doesn't exist,
// where cobra's own prints the root's usage and exits with status 0.
func newHelpCommand() *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND...]", Short: "Help about any command",
		ValidArgsFunction: func(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			// Find returns the deepest command that it found, even with an error.
			about, _, _ := c.Root().Find(args)
			var names []string
			for _, sub := range about.Commands() {
				if sub.IsAvailableCommand() {
					names = append(names, sub.Name()+"\t"+sub.Short)
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(c *cobra.Command, args []string) error {
			about := c.Root()
			for _, name := range args {
				sub, _, err := about.Find([]string{name})
				if err != nil || sub == about {
					return unknownCommand(about, name)
				}
				about = sub
			}
			about.InitDefaultHelpFlag()
			about.InitDefaultVersionFlag()
			return about.Help()
		},
	}
}

// flagError turns pflag's error into a usageError that says what the flag takes, in the
// user's terms rather than those of strconv.
func flagError(c *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	var invalid *pflag.InvalidValueError
	var empty *pflag.ValueRequiredError
	switch {
	case errors.As(err, &unknown) && unknown.GetSpecifiedShortnames() == "":
		var names []string
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden {
				names = append(names, f.Name)
			}
		})
		if near := mesh.Closest(unknown.GetSpecifiedName(), names); near != "" {
			return usagef("unknown flag: --%s; did you mean --%s?", unknown.GetSpecifiedName(), near)
		}
	case errors.As(err, &empty):
		what, _ := pflag.UnquoteUsage(empty.GetFlag())
		return usagef("--%s needs a value: %s", empty.GetFlag().Name, what)
	case errors.As(err, &invalid):
		f, value := invalid.GetFlag(), invalid.GetValue()
		switch f.Value.Type() {
		case "uint16":
			return usagef("--%s: %q is not a port: it is a number from 0 to 65535", f.Name, value)
		case "bool":
			return usagef("--%s: %q is neither true nor false", f.Name, value)
		case "duration":
			_, cause := parseDuration(value)
			if cause == nil {
				// A flag of pflag's own type, for which time.ParseDuration decides.
				cause = fmt.Errorf("%q has days or weeks, which this flag doesn't take", value)
			}
			return usagef("--%s: %v", f.Name, cause)
		}
		if f.Name == "for" && errors.Is(invalid.Unwrap(), errTooLong) {
			return errLongTime
		}
		return usagef("--%s: %v", f.Name, invalid.Unwrap())
	}
	return &usageError{err}
}

// duration is a pflag.Value for a duration that may have days and weeks (parseDuration).
type duration struct {
	d    *time.Duration
	text string // as it was given
}

// durationFlag returns the value of a flag that sets d.
func durationFlag(d *time.Duration) pflag.Value { return &duration{d: d} }

// String returns the duration as it was given, and "" before, so that the help shows no
// default.
func (v *duration) String() string { return v.text }

// Type returns the placeholder that the help shows after the flag.
func (v *duration) Type() string { return "DURATION" }

func (v *duration) Set(text string) (err error) {
	v.text = text
	*v.d, err = parseDuration(text)
	return err
}

// units are the units of a duration. A day has 24 hours, also when daylight saving time
// begins or ends.
var units = map[string]time.Duration{
	"w": 7 * 24 * time.Hour, "d": 24 * time.Hour, "h": time.Hour, "m": time.Minute, "s": time.Second, "ms": time.Millisecond,
}

// errTooLong is in the chain of the error for a duration of 146 years or more.
var errTooLong = errors.New("too long")

// bareNumber matches a number without a unit.
var bareNumber = regexp.MustCompile(`^[-+]?[0-9]+(\.[0-9]+)?$`)

// parseDuration reads what time.ParseDuration reads, and days and weeks besides: 90m,
// 1h30m, 2d, 1w. The units may come in any order, and fractions are allowed. It refuses
// 2^62 ns (146 years) and more, half of what a time.Duration holds.
func parseDuration(text string) (time.Duration, error) {
	if d, err := time.ParseDuration(text); err == nil {
		return d, nil
	}
	if bareNumber.MatchString(text) {
		return 0, fmt.Errorf("%q has no unit: %ss are seconds, %sm minutes, %sh hours, %sd days", text, text, text, text, text)
	}
	wrong := fmt.Errorf("%q is not a duration, such as 30m, 2h, 2d or 1w", text)
	rest, negative := strings.CutPrefix(text, "-")
	var sum float64
	for rest != "" {
		n := strings.IndexFunc(rest, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
		if n <= 0 {
			return 0, wrong
		}
		value, err := strconv.ParseFloat(rest[:n], 64)
		rest = rest[n:]
		end := strings.IndexFunc(rest, func(r rune) bool { return r < 'a' || r > 'z' })
		if end < 0 {
			end = len(rest)
		}
		unit, known := units[rest[:end]]
		rest = rest[end:]
		sum += value * float64(unit)
		if err != nil || !known {
			return 0, wrong
		}
		if sum >= 1<<62 {
			return 0, fmt.Errorf("%q is %w", text, errTooLong)
		}
	}
	if text == "" {
		return 0, wrong
	}
	if negative {
		sum = -sum
	}
	return time.Duration(sum), nil
}

// shortDuration returns a duration as a person writes it: 2h, not 2h0m0s. It is
// how the helper's API and the hints in messages take one.
func shortDuration(d time.Duration) string {
	text := d.String()
	for _, unit := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(text, unit) {
			text = text[:len(text)-2]
		}
	}
	return text
}

// completionOf returns the shell completion for a flag's value, by the flag's name, which
// means the same in every command. A flag that takes a file has none, so that the shell
// proposes files; one with a free value proposes nothing.
func completionOf(c *cobra.Command, f *pflag.Flag) cobra.CompletionFunc {
	switch f.Name {
	case "proto":
		return fixedValues("tcp", "udp", "icmp")
	case "platform":
		if c.Name() == "run" {
			return fixedValues("auto", "darwin", "linux")
		}
		return fixedValues("pf", "nft", "guard")
	case "tunnel":
		return fixedValues("full", "split")
	case "allow":
		return func(_ *cobra.Command, _ []string, text string) ([]string, cobra.ShellCompDirective) {
			return completePermissions(nil, text)
		}
	case "for":
		return fixedValues("30m", "2h", "1d", "1w")
	case "address", "dns", "endpoint", "public-key", "listen-port", "mesh-prefix4", "mesh-prefix6", "keepalive",
		"from", "interface", "label", "operator", "tick", "wait":
		return cobra.NoFileCompletions
	}
	return nil
}

// fixedValues completes with the given values, and never with files.
func fixedValues(values ...string) cobra.CompletionFunc {
	return cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)
}

// completePermissions completes the last word of text, a list of permissions separated by
// commas, with the permissions that neither the list nor the arguments in before have. It
// adds no space, since a comma may follow.
func completePermissions(before []string, text string) ([]string, cobra.ShellCompDirective) {
	head := ""
	if i := strings.LastIndexByte(text, ','); i >= 0 {
		head = text[:i+1]
	}
	has := strings.Split(strings.Join(append(slices.Clone(before), head), ","), ",")
	var out []string
	for _, one := range mesh.AllPermissions {
		if !slices.Contains(has, one.Name) {
			out = append(out, head+one.Name)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}
