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

// excessSuggestions guess what a user meant who gave a command too many arguments, by the
// command's name. Each returns what to type instead, or "" if it has no guess.
var excessSuggestions = map[string]func(c *cobra.Command, args []string) string{
	// A port as an argument of its own: explain phone 192.0.2.1 443.
	"explain": func(_ *cobra.Command, args []string) string {
		if len(args) != 3 {
			return ""
		}
		port, err := strconv.ParseUint(args[2], 10, 16)
		_, noPort := netip.ParseAddrPort(args[1])
		if err != nil || port == 0 || noPort == nil {
			return "" // the destination has a port already, or the third argument is none
		}
		return "meshhelper explain " + args[0] + " " + net.JoinHostPort(strings.Trim(args[1], "[]"), args[2])
	},
	// Permissions separated by a space: peer add phone --allow incoming routing.
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

// addSuggestions adds excessSuggestions to the argument checks of c and the commands below
// it. It runs after applyConventions, which sets the checks.
func addSuggestions(c *cobra.Command) {
	if suggest, check := excessSuggestions[c.Name()], c.Args; suggest != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			err := check(c, args)
			if err == nil {
				return nil
			}
			if meant := suggest(c, args); meant != "" {
				return usagef("%v; did you mean: %s", err, meant)
			}
			return err
		}
	}
	for _, sub := range c.Commands() {
		addSuggestions(sub)
	}
}

// suggestFlag is flagError, with a suggestion for an unknown flag behind a single dash. The
// commands have no one-letter flags but cobra's -h and -v, so -q may mean a flag that begins
// with q, and -qr one that lacks a dash. No peer's name begins with a dash.
func suggestFlag(c *cobra.Command, err error) error {
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
	return usagef("unknown flag: -%s", text)
}
