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
	interval time.Duration // between two requests of --watch; tests shorten it
}

// newStatusCommand returns `status`.
func newStatusCommand(a *app) *cobra.Command {
	o := &statusOptions{app: a, interval: 2 * time.Second}
	c := &cobra.Command{
		Use: "status", Short: "Show the host, its peers, which of them route, and what is wrong",
		Long: `Show the host, its peers, which of them route, and what is wrong. ` + directionsHelp,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.watch && o.check {
				return usagef("--watch and --check exclude each other: --watch goes on until it is ended, and --check answers once")
			}
			return showStatus(c.Context(), o)
		},
	}
	c.Flags().BoolVar(&o.watch, "watch", false, "show it again every two seconds")
	c.Flags().BoolVar(&o.check, "check", false, "exit with status 1 if something is wrong")
	return c
}

// showStatus prints the status once, or with --watch until ctx ends. With --check it also
// returns an error unless everything that is wanted is in force; the status is printed
// before.
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
	return o.app.retryUnreachable(ctx, func(answered func()) error {
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

// show prints the status once more. On a terminal it replaces the previous one, and is cut
// to the window's height: the state and the problems come first and stay visible.
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
	// Cursor to the top left (CUP), then clear the page (ED 2): ECMA-48. One write, so that
	// the terminal shows no half-drawn page.
	_, err := fmt.Fprint(to, "\x1b[H\x1b[2J"+fit(page.String(), a.rows, a.columns))
	return err
}

// fit returns the first lines of text that fit on a terminal of so many rows and columns,
// and a last line with the number of those left out. 0 means no limit. A line wider than
// the terminal takes several rows. The last row stays free for the cursor, since a line
// feed there would scroll the first line away.
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

// writeStatus writes the status for a reader, in a column of names and one of values.
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

// describeState returns the state, with a remark if the host's rules are those of an
// earlier generation. While the helper starts, nothing is enforced yet, and that is no
// news.
func describeState(s api.Status) string {
	if s.Enforced == s.Generation || s.State == api.Starting {
		return s.State
	}
	return fmt.Sprintf("%s; the last change is not in force yet", s.State)
}

// orNone returns s, or "none" for a value that is empty.
func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// describeFamilies names the address families for which something is on.
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

// joinTexts formats values and joins them.
func joinTexts[T fmt.Stringer](values []T, between string) string {
	texts := make([]string, len(values))
	for i, v := range values {
		texts[i] = v.String()
	}
	return strings.Join(texts, between)
}

// writePeers writes a table of peers on a terminal, or a few lines for each peer if the
// table is wider than the terminal. For a pipe or a file it writes one line of
// tab-separated fields for each peer, without a header, as cut(1) and awk(1) take them.
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
	table.Flush() // a strings.Builder returns no error
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

// peerFields returns a peer's columns in the table of writePeers.
func peerFields(p api.Peer, now time.Time) []string {
	return []string{p.Name, string(p.Kind), p.Addresses[0].String(), describePermissions(p.Permissions),
		describeHandshake(p.LastHandshake, now), describeRouting(p)}
}

// describePermissions lists a peer's permissions, with their ends, and says of which
// another permission is needed and missing.
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

// formatEnd formats the end of a permission in the user's time zone, to the second.
func formatEnd(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05 MST") }

// describeHandshake says how long ago a peer's last handshake was. A clock that was set
// back gives 0s, not a negative time. WireGuard renews a session in use every two minutes
// and ends one after three (Rekey-After-Time and Reject-After-Time, WireGuard paper, section
// 6.1), so a handshake before that means that the peer is silent.
func describeHandshake(at *time.Time, now time.Time) string {
	if at == nil {
		return "never"
	}
	return max(now.Sub(*at), 0).Round(time.Second).String() + " ago"
}

// directionsHelp says from which side up and down are meant. Tools for one device, such as
// wg(8), count from the device's own side, so a reader can't know.
const directionsHelp = `Up is what the peer
sent, down is what was sent to the peer; behind "routes" only what went through this
host to the internet or its networks counts.`

// describeRouting says whether a peer routes through this host now (packets in the last
// 10 s), may but doesn't, or may not, and how many bytes it has routed.
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

// describeTraffic formats byte counts from the peer's side: received by this host is up.
func describeTraffic(received, sent uint64) string {
	return fmt.Sprintf("%s up, %s down", formatBytes(received), formatBytes(sent))
}

// formatBytes formats a number of bytes with three significant digits, or four from 1000 to
// 1023, and a binary unit up to EiB (2^60), which covers all of uint64.
func formatBytes(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/1024, 0
	for value >= 1023.5 && unit < 5 {
		value, unit = value/1024, unit+1
	}
	if value >= 999.5 { // %.3g would write 1.02e+03
		return fmt.Sprintf("%.0f %ciB", value, "KMGTPE"[unit])
	}
	return fmt.Sprintf("%.3g %ciB", value, "KMGTPE"[unit])
}
