package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// statusOptions are the flags of status.
type statusOptions struct {
	app      *app
	watch    bool
	check    bool
	interval time.Duration
}

func newStatusCommand(a *app) *cobra.Command {
	o := &statusOptions{app: a, interval: 2 * time.Second}
	c := &cobra.Command{
		Use: "status", Short: "Show the host, its peers, who routes, and what is wrong",
		Long: `Show the host, its peers, who routes, and what is wrong. ` + directionsHelp,
		RunE: func(c *cobra.Command, _ []string) error { return showStatus(c.Context(), o) },
	}
	c.Flags().BoolVar(&o.watch, "watch", false, "show it again every two seconds")
	c.Flags().BoolVar(&o.check, "check", false, "end with status 1 where something is wrong")
	c.MarkFlagsMutuallyExclusive("watch", "check")
	return c
}

func showStatus(ctx context.Context, o *statusOptions) error {
	client := o.app.client()
	if !o.watch {
		s, err := client.Status(ctx)
		if err != nil {
			return err
		}
		if err := o.app.print(s, func() { o.app.writeStatus(s) }); err != nil || !o.check {
			return err
		}
		switch {
		case s.State != api.Enforcing:
			return fmt.Errorf("the state is %s", s.State)
		case len(s.Problems) > 0:
			return fmt.Errorf("something is wrong: %s: %s", s.Problems[0].Step, s.Problems[0].Message)
		case s.Enforced != s.Generation:
			return errors.New("the last change is not in force yet")
		}
		return nil
	}
	return o.app.outlast(ctx, func(answered func()) error {
		for {
			s, err := client.Status(ctx)
			if err != nil {
				return err
			}
			answered()
			if err := o.show(s); err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(o.interval):
			}
		}
	})
}

// show shows the status again. A terminal keeps the head, with what is wrong: what
// doesn't fit below is left out, and said to be.
func (o *statusOptions) show(s api.Status) error {
	a := o.app
	if !a.terminal || a.json {
		return a.print(s, func() { a.writeStatus(s) })
	}
	var page bytes.Buffer
	to := a.stdout
	a.stdout = &page
	a.columns, a.rows = a.size()
	a.writeStatus(s)
	a.stdout = to
	_, err := fmt.Fprint(to, "\x1b[H\x1b[2J"+fit(page.String(), a.rows, a.columns)) // home and clear (ECMA-48)
	return err
}

// fit returns the first lines of text that fill a terminal of so many rows and columns, and
// how many more there are. 0 is no bound.
func fit(text string, rows, columns int) string {
	lines := strings.SplitAfter(strings.TrimSuffix(text, "\n"), "\n")
	used := 0
	for i, line := range lines {
		height := 1
		if columns > 0 {
			height = max(1, (utf8.RuneCountInString(strings.TrimSuffix(line, "\n"))+columns-1)/columns)
		}
		used += height
		last := i == len(lines)-1
		if rows > 0 && (used > rows-1 || used > rows-2 && !last) {
			return strings.Join(lines[:i], "") + fmt.Sprintf("(%d more lines)\n", len(lines)-i)
		}
	}
	return text
}

func (a *app) writeStatus(s api.Status) {
	line := func(name, text string) { a.sayWrapped(fmt.Sprintf("%-12s", name), strings.Repeat(" ", 12), text) }
	line("state", describeState(s))
	for _, p := range s.Problems {
		line("problem", p.Step+": "+p.Message)
		if p.Hint != "" {
			a.sayWrapped(strings.Repeat(" ", 12), strings.Repeat(" ", 12), p.Hint)
		}
	}
	if s.Name != "" {
		line("name", s.Name)
	}
	line("endpoint", orNone(s.Endpoint))
	line("interface", fmt.Sprintf("%s, UDP port %d", orNone(s.Interface), s.ListenPort))
	line("addresses", listAddresses(s.Addresses))
	line("public key", s.PublicKey)
	line("uplink", fmt.Sprintf("%s, forwarding %s", orNone(s.Uplink), describeFamilies(s.Forwarding)))
	if s.Repairs > 0 {
		line("repairs", fmt.Sprintf("%d, see: meshhelper events", s.Repairs))
	}
	if len(s.Peers) > 0 {
		a.say("")
		a.writePeers(s.Peers, time.Now())
	} else {
		line("peers", "none yet; run: meshhelper peer add NAME")
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

func describeFamilies(f api.Families) string {
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

// joinAddresses names addresses in a sentence, listAddresses in a column.
func joinAddresses(as []netip.Addr) string { return joinTexts(as, " and ") }
func listAddresses(as []netip.Addr) string { return joinTexts(as, "  ") }

func joinTexts[T fmt.Stringer](values []T, between string) string {
	texts := make([]string, len(values))
	for i, v := range values {
		texts[i] = v.String()
	}
	return strings.Join(texts, between)
}

// writePeers writes a table for a terminal, and else a line of tab-separated
// fields for each peer. Where the table is wider than the terminal, each peer has a few
// lines instead.
func (a *app) writePeers(peers []api.Peer, now time.Time) {
	if !a.terminal {
		for _, p := range peers {
			a.say("%s", strings.Join(peerFields(p, now), "\t"))
		}
		return
	}
	var b strings.Builder
	table := tabwriter.NewWriter(&b, 0, 4, 2, ' ', 0)
	fmt.Fprintln(table, "NAME\tKIND\tADDRESS\tMAY\tHANDSHAKE\tROUTES")
	for _, p := range peers {
		fmt.Fprintln(table, strings.Join(peerFields(p, now), "\t"))
	}
	table.Flush() // into memory
	fits := true
	for line := range strings.Lines(b.String()) {
		fits = fits && (a.columns == 0 || utf8.RuneCountInString(strings.TrimSuffix(line, "\n")) <= a.columns)
	}
	if fits {
		fmt.Fprint(a.stdout, b.String())
		return
	}
	for _, p := range peers {
		f := peerFields(p, now)
		a.sayWrapped(f[0]+"  ", "  ", f[1]+", "+f[2])
		a.sayWrapped("  may: ", "    ", f[3])
		a.sayWrapped("  handshake: ", "    ", f[4]+"; routes: "+f[5])
	}
}

// peerFields are what a table of peers shows of one.
func peerFields(p api.Peer, now time.Time) []string {
	return []string{p.Name, string(p.Kind), p.Addresses[0].String(), describePermissions(p.Permissions),
		describeHandshake(p.LastHandshake, now), describeRouting(p)}
}

// describePermissions lists what a peer may, and which of it has no effect.
func describePermissions(p api.Permissions) string {
	var out []string
	for i, one := range mesh.AllPermissions {
		t := p[i]
		if !t.Allowed {
			continue
		}
		text := one.Name
		if !t.Until.IsZero() {
			text += " until " + formatEnd(t.Until)
		}
		if t.Effective != nil && !*t.Effective {
			text += fmt.Sprintf(" (no effect without %v)", one.Needs)
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

// directionsHelp says whose direction up and down are.
const directionsHelp = `Up is what the peer
sent, down is what was sent to the peer; behind "routes" only what went through this
host to the internet or its networks counts.`

func describeRouting(p api.Peer) string {
	r, now := p.Routing, "no"
	switch {
	case r.Now:
		now = "now"
	case p.Permissions.Of(mesh.Routing).Allowed:
		now = "not now"
	}
	if !r.Now && r.RxBytes == 0 && r.TxBytes == 0 {
		return now
	}
	return now + ", " + describeTraffic(r.RxBytes, r.TxBytes)
}

// describeTraffic names the directions as the peer sees them: up is what it sent.
func describeTraffic(received, sent uint64) string {
	return fmt.Sprintf("%s up, %s down", formatBytes(received), formatBytes(sent))
}

// formatBytes shows a number of bytes with three digits, or four up to 1023, and a binary
// unit.
func formatBytes(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/1024, 0
	for value >= 1023.5 && unit < 5 {
		value, unit = value/1024, unit+1
	}
	if value >= 999.5 { // %g would write it as a power of ten
		return fmt.Sprintf("%.0f %ciB", value, "KMGTPE"[unit])
	}
	return fmt.Sprintf("%.3g %ciB", value, "KMGTPE"[unit])
}
