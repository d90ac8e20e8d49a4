package main

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// tooMuch are proposals, by the command's name, for arguments that are one too many, or "".
var tooMuch = map[string]func(c *cobra.Command, args []string) string{
	"explain": func(_ *cobra.Command, args []string) string {
		if len(args) != 3 {
			return ""
		}
		port, err := strconv.ParseUint(args[2], 10, 16)
		_, given := netip.ParseAddrPort(args[1])
		if err != nil || port == 0 || given == nil {
			return ""
		}
		return "meshhelper explain " + args[0] + " " + net.JoinHostPort(strings.Trim(args[1], "[]"), args[2])
	},
	"add": func(c *cobra.Command, args []string) string {
		allow, err := c.Flags().GetStringSlice("allow")
		if err != nil || len(allow) == 0 || len(args) < 2 {
			return ""
		}
		if _, err := parsePermissions(args[1:]); err != nil {
			return ""
		}
		return "--allow " + strings.Join(append(allow, args[1:]...), ",")
	},
}

// propose has the commands below c propose what is near arguments that are too many.
func propose(c *cobra.Command) {
	if near, check := tooMuch[c.Name()], c.Args; near != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			err := check(c, args)
			if err == nil {
				return nil
			}
			if what := near(c, args); what != "" {
				return usagef("%v; did you mean: %s", err, what)
			}
			return err
		}
	}
	for _, sub := range c.Commands() {
		propose(sub)
	}
}

// nearFlag is flagError, with proposals for what stands behind a single dash: a flag by its
// first letter or with a dash too few, or a name.
func nearFlag(c *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) || unknown.GetSpecifiedShortnames() == "" {
		return flagError(c, err)
	}
	text := unknown.GetSpecifiedShortnames()
	var names []string
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden && (len(text) > 1 || strings.HasPrefix(f.Name, text)) {
			names = append(names, f.Name)
		}
	})
	near := ""
	switch {
	case len(text) > 1:
		near = mesh.Closest(text, names)
	case len(names) == 1:
		near = names[0]
	}
	switch {
	case near != "":
		return usagef("unknown flag: -%s; did you mean --%s?", text, near)
	case strings.Contains(c.Use, " NAME"):
		return usagef("unknown flag: -%s; a name starts with a letter or a digit", text)
	}
	return flagError(c, err)
}
