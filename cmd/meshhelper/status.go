package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// statusOptions are the flags of status.
type statusOptions struct {
	app      *app
	watch    bool
	interval time.Duration
}

func newStatusCommand(a *app) *cobra.Command {
	o := &statusOptions{app: a, interval: 2 * time.Second}
	c := &cobra.Command{
		Use: "status", Short: "Show the host, its peers, who routes, and what is wrong",
		RunE: func(c *cobra.Command, _ []string) error { return showStatus(c.Context(), o) },
	}
	c.Flags().BoolVar(&o.watch, "watch", false, "show it again every two seconds")
	return c
}

func showStatus(ctx context.Context, o *statusOptions) error {
	client := o.app.client()
	for {
		s, err := client.Status(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if o.watch && o.app.terminal && !o.app.json {
			fmt.Fprint(o.app.stdout, "\x1b[H\x1b[2J") // home and clear (ECMA-48)
		}
		if err := o.app.print(s, func() { o.app.writeStatus(s) }); err != nil || !o.watch {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(o.interval):
		}
	}
}

func (a *app) writeStatus(s api.Status) {
	a.say("state       %s", describeState(s))
	a.say("interface   %s, UDP port %d", orNone(s.Interface), s.ListenPort)
	a.say("addresses   %s", joinAddresses(s.Addresses))
	a.say("public key  %s", s.PublicKey)
	a.say("uplink      %s, forwarding %s", orNone(s.Uplink), describeFamilies(s.Forwarding))
	if s.Repairs > 0 {
		a.say("repairs     %d, see: meshhelper events", s.Repairs)
	}
	if len(s.Peers) > 0 {
		a.say("")
		a.writePeers(s.Peers, time.Now())
	} else {
		a.say("peers       none yet; run: meshhelper peer add NAME")
	}
	for _, p := range s.Problems {
		a.say("")
		a.say("problem     %s: %s", p.Step, p.Message)
		if p.Hint != "" {
			a.say("            %s", p.Hint)
		}
	}
}

func describeState(s api.Status) string {
	if s.Enforced == s.Generation || s.State == api.Starting {
		return s.State
	}
	return fmt.Sprintf("%s; the last change is not in force yet", s.State)
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

func describeFamilies(f policy.Families) string {
	switch {
	case f.IPv4 && f.IPv6:
		return "IPv4 and IPv6"
	case f.IPv4:
		return "IPv4"
	case f.IPv6:
		return "IPv6"
	}
	return "off"
}

func joinAddresses(as []netip.Addr) string {
	texts := make([]string, len(as))
	for i, a := range as {
		texts[i] = a.String()
	}
	return strings.Join(texts, "  ")
}

// writePeers writes a table for a terminal, and else a line of tab-separated
// fields for each peer.
func (a *app) writePeers(peers []api.Peer, now time.Time) {
	var w io.Writer = a.stdout
	if a.terminal {
		table := tabwriter.NewWriter(a.stdout, 0, 4, 2, ' ', 0)
		defer table.Flush()
		fmt.Fprintln(table, "NAME\tKIND\tADDRESS\tMAY\tHANDSHAKE\tROUTES")
		w = table
	}
	for _, p := range peers {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", p.Name, p.Kind, p.Addresses[0], describePermissions(p.Permissions),
			describeHandshake(p.LastHandshake, now), describeRouting(p.Routing))
	}
}

// describePermissions lists what a peer may, and says of lan without routing
// that it has no effect.
func describePermissions(p api.Permissions) string {
	var out []string
	for _, one := range policy.AllPermissions {
		t := p.Of(one)
		if !t.Allowed {
			continue
		}
		text := one.String()
		if !t.Until.IsZero() {
			text += " until " + formatEnd(t.Until)
		}
		if t.Effective != nil && !*t.Effective {
			text += " (no effect without routing)"
		}
		out = append(out, text)
	}
	if out == nil {
		return "nothing"
	}
	return strings.Join(out, ", ")
}

// formatEnd shows a time in the reader's zone, to the second.
func formatEnd(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05 MST") }

func describeHandshake(at *time.Time, now time.Time) string {
	if at == nil {
		return "never"
	}
	return max(now.Sub(*at), 0).Round(time.Second).String() + " ago"
}

func describeRouting(r api.Routing) string {
	if !r.Now && r.RxBytes == 0 && r.TxBytes == 0 {
		return "no"
	}
	now := "no"
	if r.Now {
		now = "now"
	}
	return fmt.Sprintf("%s, %s in, %s out", now, formatBytes(r.RxBytes), formatBytes(r.TxBytes))
}

// formatBytes shows a number of bytes with three digits and a binary unit.
func formatBytes(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/1024, 0
	for value >= 1024 && unit < 4 {
		value, unit = value/1024, unit+1
	}
	return fmt.Sprintf("%.3g %ciB", value, "KMGTP"[unit])
}
