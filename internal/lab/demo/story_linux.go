package main

// The story: the commands, and which hosts must be reachable after each.

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/lab/trial"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

const cast = `
  A   your own device            L   a printer on B's LAN
  B   the host, meshhelper runs  I   a server on the internet
  C   a friend's device          W   the router at B's uplink
  D   another device of yours

  A, C and D run stock wireguard-go with the configurations that B printed; all
  their traffic goes to B. Each "yes" is ping, TCP and UDP, over IPv4 and IPv6.
`

// story is the state of one run.
type story struct {
	out   io.Writer
	paint func(string) string
	mesh  *trial.Mesh

	judged, wrong int
}

func (s *story) say(format string, args ...any) { fmt.Fprintf(s.out, format+"\n", args...) }

// scene prints a headline.
func (s *story) scene(title string) { s.say("\n── %s", title) }

// command prints a command as a person types it.
func (s *story) command(args ...string) { s.say("  B$ meshhelper %s", strings.Join(args, " ")) }

// do runs a command on B and prints it with its output.
func (s *story) do(ctx context.Context, args ...string) error {
	s.command(args...)
	o, err := s.mesh.Do(ctx, args...)
	for line := range strings.Lines(o.Stdout) {
		s.say("  %s", strings.TrimRight(line, "\n"))
	}
	return err
}

func (s *story) nothingAllowed(ctx context.Context) error {
	s.scene("Nothing is allowed but what an own device may: reach B")
	return s.table(ctx, map[string]mesh.Permissions{"A": mesh.Incoming, "D": mesh.Incoming})
}

func (s *story) routing(ctx context.Context) error {
	s.scene("C may use B's internet connection, and nothing else")
	if err := s.do(ctx, "peer", "allow", "C", "routing"); err != nil {
		return err
	}
	return s.table(ctx, map[string]mesh.Permissions{"A": mesh.Incoming, "C": mesh.Routing, "D": mesh.Incoming})
}

func (s *story) lan(ctx context.Context) error {
	s.scene("C may use B's LAN, too")
	if err := s.do(ctx, "peer", "allow", "C", "lan"); err != nil {
		return err
	}
	return s.table(ctx, map[string]mesh.Permissions{"A": mesh.Incoming, "C": mesh.Routing | mesh.LAN, "D": mesh.Incoming})
}

func (s *story) peersApart(ctx context.Context) error {
	s.scene("A routes through B as well. Does C reach A now? Never")
	if err := s.do(ctx, "peer", "allow", "A", "routing", "lan"); err != nil {
		return err
	}
	return s.table(ctx, map[string]mesh.Permissions{
		"A": mesh.Incoming | mesh.Routing | mesh.LAN, "C": mesh.Routing | mesh.LAN, "D": mesh.Incoming})
}

// download denies routing while C downloads from I, and counts what arrives.
func (s *story) download(ctx context.Context) error {
	s.scene("C is downloading from I when its permission ends; A downloads, too")
	var flows []*netlab.Flow
	for _, from := range []*netlab.Host{s.mesh.C, s.mesh.A} {
		f, err := s.mesh.Lab.Flow(netlab.FlowOptions{From: from, To: s.mesh.I, Addr: netlab.Addresses().I.V4,
			Proto: netlab.TCP, Every: time.Millisecond, BackSize: downloadChunk})
		if err != nil {
			return err
		}
		if err := f.Wait(netlab.Back, 200, netlab.PassWait); err != nil {
			return err
		}
		flows = append(flows, f)
	}
	if err := s.do(ctx, "peer", "deny", "C", "routing"); err != nil {
		return err
	}
	denied := time.Now()
	if err := flows[1].Wait(netlab.Back, 500, netlab.PassWait); err != nil {
		return err
	}
	for i, name := range []string{"C", "A"} {
		f := flows[i]
		before := len(f.Arrivals(netlab.Back)) - len(f.SentAfter(netlab.Back, denied))
		after := len(f.SentAfter(netlab.Back, denied))
		f.Stop()
		s.say("  %s: %.1f MB downloaded before; sent by I after the command returned: %.1f MB arrived",
			name, megabytes(before), megabytes(after))
		s.judged++
		if (name == "C") != (after == 0) {
			s.wrong++
		}
	}
	return s.table(ctx, map[string]mesh.Permissions{
		"A": mesh.Incoming | mesh.Routing | mesh.LAN, "C": mesh.LAN, "D": mesh.Incoming})
}

const downloadChunk = 16 << 10 // bytes

func megabytes(chunks int) float64 { return float64(chunks) * downloadChunk / 1e6 }

// end stops the helper and compares the host with its state before.
func (s *story) end(context.Context) error {
	s.scene("The helper ends")
	if err := s.mesh.Stop(); err != nil {
		return err
	}
	forwarding, err := s.mesh.B.Sysctl("net.ipv4.ip_forward")
	if err != nil {
		return err
	}
	s.say("  forwarding on B is %s, as it was found.\n", map[string]string{"0": "off", "1": "on"}[forwarding])
	s.judged++
	if forwarding != "0" {
		s.wrong++
	}
	return nil
}

// place is a row of the table: a host, and B's interface on which its packets arrive.
type place struct {
	name string
	host *netlab.Host
	at   netlab.Pair
	in   string
}

// table probes every host from every host, shows which reaches which and compares it
// with the policy for the permissions that now hold.
func (s *story) table(ctx context.Context, may map[string]mesh.Permissions) error {
	rules, err := s.mesh.Ruleset(ctx, may)
	if err != nil {
		return err
	}
	status, err := s.mesh.Status(ctx)
	if err != nil {
		return err
	}
	tun, at := status.Interface, netlab.Addresses()
	a, c, d := s.mesh.Peers["A"], s.mesh.Peers["C"], s.mesh.Peers["D"]
	from := []place{
		{"A (own)", a.Host, a.Addresses, tun}, {"D (own)", d.Host, d.Addresses, tun},
		{"C (external)", c.Host, c.Addresses, tun},
		{"L (LAN)", s.mesh.L, at.L, netlab.LAN}, {"I (internet)", s.mesh.I, at.I, netlab.Uplink},
	}
	to := []place{
		{name: "B", at: status.Address()}, {name: "internet", at: at.I}, {name: "LAN", at: at.L},
		{name: "A", at: a.Addresses}, {name: "C", at: c.Addresses}, {name: "D", at: d.Addresses},
	}
	var table netlab.Table
	probes, cells := ask(rules, from, to)
	passed := map[cell]int{}
	for i, r := range s.mesh.Lab.Probe(ctx, probes...) {
		s.judged++
		if r.OK {
			passed[cells[i]]++
		}
		if expected := r.Wait == netlab.PassWait; r.OK != expected {
			s.wrong++
			s.say("  not as the policy says: %s", r)
		}
	}
	for _, f := range from {
		for _, t := range to {
			table.Set(f.name, t.name, word(passed[cell{f.name, t.name}], count(cells, cell{f.name, t.name})))
		}
	}
	return table.Write(s.out, "  ", s.paint)
}

type cell struct{ from, to string }

func count(cells []cell, c cell) (n int) {
	for _, have := range cells {
		if have == c {
			n++
		}
	}
	return n
}

// word returns a cell's text: how many of its probes were answered.
func word(passed, of int) string {
	switch {
	case of == 0:
		return " "
	case passed == of:
		return "yes"
	case passed == 0:
		return "no"
	}
	return fmt.Sprintf("%d of %d", passed, of)
}

// ask returns the probes of a table, with every protocol in both families. Each waits for
// PassWait or RefuseWait, by the verdict of the policy. Hosts whose packets to each other
// don't cross B are left out.
func ask(rules *policy.Ruleset, from, to []place) (probes []netlab.Probe, cells []cell) {
	m := [2]netip.Prefix{mesh.DefaultPrefixes().V4, mesh.DefaultPrefixes().V6}
	for _, f := range from {
		for _, t := range to {
			for i, addr := range t.at.List() {
				src := f.at.List()[i]
				if addr == src || !m[i].Contains(addr) && !m[i].Contains(src) {
					continue
				}
				for _, proto := range []netlab.Proto{netlab.ICMP, netlab.TCP, netlab.UDP} {
					p := netlab.Probe{From: f.host, To: addr, Proto: proto, Wait: netlab.RefuseWait}
					if trial.Opening(f.in, src, addr, proto).Judge(rules).Pass {
						p.Wait = netlab.PassWait
					}
					probes = append(probes, p)
					cells = append(cells, cell{f.name, t.name})
				}
			}
		}
	}
	return probes, cells
}

// painter colours a table's words on a terminal, unless NO_COLOR is set.
func painter(f *os.File) func(string) string {
	if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err != nil || os.Getenv("NO_COLOR") != "" {
		return nil
	}
	colours := map[string]string{"yes": "\x1b[32m", "no": "\x1b[2m"}
	return func(s string) string {
		if c, ok := colours[s]; ok {
			return c + s + "\x1b[0m"
		}
		return s
	}
}
