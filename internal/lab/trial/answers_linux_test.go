package trial

// The answers of explain and doctor, compared with real packets beside other software's
// rules.

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/lab/rulesets"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// oddRoutes are unusual routes and routing rules of a host, in the form of ip(8), with
// rules for nft(8). undo removes them.
var oddRoutes = []struct{ name, do, undo, nft string }{
	{"a blackhole", "route add blackhole I4/32\n-6 route add blackhole I6/128", "route del blackhole I4/32\n-6 route del blackhole I6/128", ""},
	{"an unreachable route", "route add unreachable I4/32\n-6 route add unreachable I6/128", "route del unreachable I4/32\n-6 route del unreachable I6/128", ""},
	{"a prohibiting rule", "rule add priority 90 to I4 prohibit\n-6 rule add priority 90 to I6 prohibit", "rule del priority 90\n-6 rule del priority 90", ""},
	{"a rule for what comes from the mesh", "rule add priority 90 iif MESH unreachable\n-6 rule add priority 90 iif MESH unreachable", "rule del priority 90\n-6 rule del priority 90", ""},
	{"a rule that fits nothing of a peer's", "rule add priority 90 fwmark 0x99 unreachable\n-6 rule add priority 90 fwmark 0x99 unreachable", "rule del priority 90\n-6 rule del priority 90", ""},
	{"a rule for a mark that another program sets", "rule add priority 90 fwmark 0x77 unreachable\n-6 rule add priority 90 fwmark 0x77 unreachable", "rule del priority 90\n-6 rule del priority 90",
		"table inet marks {\n chain pre {\n type filter hook prerouting priority mangle; policy accept;\n iifname MESH meta mark set 0x77\n }\n}"},
	{"a rule for another mark", "rule add priority 90 fwmark 0x78 unreachable\n-6 rule add priority 90 fwmark 0x78 unreachable", "rule del priority 90\n-6 rule del priority 90",
		"table inet marks {\n chain pre {\n type filter hook prerouting priority mangle; policy accept;\n iifname MESH meta mark set 0x77\n }\n}"},
	{"a rule for a port", "rule add priority 90 ipproto udp dport PORT unreachable\n-6 rule add priority 90 ipproto udp dport PORT unreachable", "rule del priority 90\n-6 rule del priority 90", ""},
}

// oneDevice drops packets from D's device to this host, and nothing else.
var oneDevice = rulesets.Ruleset{Name: "one device's outer address", NFT: `
table inet one {
	set blocked { type ipv4_addr; flags interval; elements = { 198.51.100.34 } }
	chain in {
		type filter hook input priority filter; policy accept;
		ip saddr @blocked drop
	}
}`}

// oracle compares explain's and doctor's answers with the fate of packets.
type oracle struct {
	*Mesh
	t     *testing.T
	iface string
	hosts int
	// passes, stopped and unclear count explain's answers.
	passes, stopped, unclear int
	// fine and wrong count doctor's verdicts.
	fine, wrong int

	out  *netlab.Watch
	in   []int // non-blocking sockets that receive packets delivered to B
	got  []string
	sent int
}

// TestAnswersAreTrue runs B beside other software's rules and unusual routes, one at a
// time, and compares explain with real probes from C: no probe that explain passes is
// lost, and none that it stops arrives.
func TestAnswersAreTrue(t *testing.T) {
	for _, program := range []string{"nft", "iptables-nft-restore", "ip"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("other software's rules can't be loaded: %v", err)
		}
	}
	m := newMesh(t)
	permit(t, m, "C", mesh.Routing|mesh.Incoming)
	a := &oracle{Mesh: m, t: t, iface: status(t, m).Interface}
	a.open()
	if r := m.Lab.Probe(t.Context(), netlab.Probe{From: m.D, To: status(t, m).Address().V4, Proto: netlab.UDP}); !r[0].OK { // from now on the host knows D's endpoint
		t.Fatal(r[0])
	}
	a.ip("link add virbr0 type veth peer name virbr1") // some of the rulesets name it
	for _, r := range append(rulesets.All, oneDevice) {
		t.Run(r.Name, func(t *testing.T) {
			a.t = t
			defer a.unload()
			r := r.For(a.iface, netlab.Uplink, netlab.LAN)
			if r.NFT != "" {
				a.run(r.NFT, "nft", "-f", "-")
			}
			if r.IPTables != "" {
				a.run(r.IPTables, "iptables-nft-restore")
				a.run(r.IP6Tables(), "ip6tables-nft-restore")
			}
			a.compareDoctor(a.compare(), true)
		})
	}
	at := netlab.Addresses()
	names := strings.NewReplacer("I4", at.I.V4.String(), "I6", at.I.V6.String(), "MESH", a.iface, "LAN0", netlab.LAN, "PORT", fmt.Sprint(netlab.EchoPort))
	for _, o := range oddRoutes {
		t.Run(o.name, func(t *testing.T) {
			a.t = t
			a.ip(names.Replace(o.do))
			defer a.ip(names.Replace(o.undo))
			defer a.unload()
			if o.nft != "" {
				a.run(names.Replace(o.nft), "nft", "-f", "-")
			}
			a.compareDoctor(a.compare(), !strings.Contains(o.do, "I4") && !strings.Contains(o.do, "PORT"))
		})
	}
	a.t = t
	t.Logf("doctor found no problem %d times, and one %d times", a.fine, a.wrong)
	t.Logf("%d hosts: explain's answer was %d times that the packet passes, %d times that it doesn't, %d times that it may not", a.hosts, a.passes, a.stopped, a.unclear)
	if a.hosts < 40 || a.passes < 40 || a.stopped < 20 || a.fine < 20 || a.wrong < 20 {
		t.Error("too few answers to prove anything")
	}
}

// run runs a program on B.
func (a *oracle) run(stdin, program string, args ...string) string {
	a.t.Helper()
	var out []byte
	if err := a.B.Do(func() (err error) {
		c := exec.Command(program, args...)
		c.Stdin = strings.NewReader(stdin)
		if out, err = c.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %v: %w: %s", program, args, err, out)
		}
		return nil
	}); err != nil {
		a.t.Fatal(err)
	}
	return string(out)
}

func (a *oracle) ip(lines string) {
	a.t.Helper()
	for line := range strings.Lines(lines) {
		a.run("", "ip", strings.Fields(line)...)
	}
}

// unload deletes all tables except the helper's.
func (a *oracle) unload() {
	a.t.Helper()
	for line := range strings.Lines(a.run("", "nft", "list", "tables")) {
		if w := strings.Fields(line); len(w) == 3 && !strings.HasPrefix(w[2], "meshhelper") {
			a.run("", "nft", "delete", "table", w[1], w[2])
		}
	}
}

// compare asks explain about C's packets to the internet and to B, in each family and
// protocol, and sends them.
func (a *oracle) compare() (results []probed) {
	a.t.Helper()
	a.hosts++
	at := netlab.Addresses()
	b := status(a.t, a.Mesh).Address()
	var probes []netlab.Probe
	var said []api.Explanation
	for _, to := range append(at.I.List(), b.List()...) {
		for proto, name := range map[netlab.Proto]string{netlab.UDP: "udp", netlab.TCP: "tcp"} {
			e := a.explain(to, name)
			wait := netlab.RefuseWait
			if e.Pass && len(e.Stops) == 0 {
				wait = netlab.PassWait
			}
			said = append(said, e)
			probes = append(probes, netlab.Probe{From: a.C, To: to, Proto: proto, Wait: wait})
		}
	}
	for i, r := range a.Lab.Probe(a.t.Context(), probes...) {
		e := said[i]
		results = append(results, probed{probes[i], e.Pass && len(e.Stops) == 0, r.OK, i < 4})
		through := e.Pass && len(e.Stops) == 0 // and its answer returns
		clear := e.Pass || !e.Unclear
		for _, s := range e.Stops {
			clear = clear && !s.Unclear
		}
		switch {
		case !clear:
			a.unclear++
		case through:
			a.passes++
		default:
			a.stopped++
		}
		if clear && through != r.OK {
			a.t.Errorf("%v: explain says pass %v, stops %+v; the probe got through: %v", probes[i], e.Pass, e.Stops, r.OK)
		}
	}
	return results
}

func (a *oracle) explain(to netip.Addr, proto string) (e api.Explanation) {
	a.t.Helper()
	o, err := a.Do(a.t.Context(), "explain", "C", netip.AddrPortFrom(to, netlab.EchoPort).String(), "--proto", proto, "--json")
	if jerr := json.Unmarshal([]byte(o.Stdout), &e); jerr != nil {
		a.t.Fatalf("explain %v: %q, %v, %v", to, o.Stdout, err, jerr)
	}
	return e
}
