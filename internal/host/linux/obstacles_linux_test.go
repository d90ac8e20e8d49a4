package linux

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
)

// foreign writes nftables as another program.
type foreign struct {
	conn  *nftables.Conn
	table *nftables.Table
}

// software adds other software's tables on the host.
func (g *rig) software(family nftables.TableFamily, table string, add func(f foreign)) {
	g.t.Helper()
	g.do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		f := foreign{conn, conn.AddTable(&nftables.Table{Name: table, Family: family})}
		add(f)
		return conn.Flush()
	})
}

func (f foreign) hook(name string, hook *nftables.ChainHook, policy nftables.ChainPolicy) *nftables.Chain {
	return f.conn.AddChain(&nftables.Chain{
		Name: name, Table: f.table, Type: nftables.ChainTypeFilter, Hooknum: hook,
		Priority: nftables.ChainPriorityFilter, Policy: &policy,
	})
}

func (f foreign) chain(name string) *nftables.Chain {
	return f.conn.AddChain(&nftables.Chain{Name: name, Table: f.table})
}

func (f foreign) rule(c *nftables.Chain, es ...[]expr.Any) {
	var all []expr.Any
	for _, e := range es {
		all = append(all, e...)
	}
	f.conn.AddRule(&nftables.Rule{Table: f.table, Chain: c, Exprs: all})
}

func does(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}
}

func ifaceIs(key expr.MetaKey, op expr.CmpOp, iface string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: append([]byte(iface), 0)}}
}

func sourceIn(p netip.Prefix) []expr.Any {
	mask := make([]byte, 4)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

// isEstablished returns iptables' match for established and related packets.
func isEstablished() []expr.Any {
	base := xt.ConntrackMtinfoBase{MatchFlags: uint16(xt.ConntrackState | xt.ConntrackStateAlias)}
	for _, a := range []*[]byte{(*[]byte)(&base.OrigSrcAddr), (*[]byte)(&base.OrigDstAddr), (*[]byte)(&base.ReplSrcAddr), (*[]byte)(&base.ReplDstAddr),
		(*[]byte)(&base.OrigSrcMask), (*[]byte)(&base.OrigDstMask), (*[]byte)(&base.ReplSrcMask), (*[]byte)(&base.ReplDstMask)} {
		*a = make([]byte, 4)
	}
	return []expr.Any{&expr.Match{Name: "conntrack", Rev: 3, Info: &xt.ConntrackMtinfo3{ConntrackMtinfo2: xt.ConntrackMtinfo2{
		ConntrackMtinfoBase: base, StateMask: uint16(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED),
	}}}}
}

// docker drops in its FORWARD chain everything that isn't for its containers.
func docker(f foreign) {
	top := f.hook("FORWARD", nftables.ChainHookForward, nftables.ChainPolicyDrop)
	user, own := f.chain("DOCKER-USER"), f.chain("DOCKER-FORWARD")
	f.rule(top, does(expr.VerdictJump, user.Name))
	f.rule(top, does(expr.VerdictJump, own.Name))
	f.rule(user, does(expr.VerdictReturn, ""))
	f.rule(own, ifaceIs(expr.MetaKeyOIFNAME, expr.CmpOpEq, "docker0"), isEstablished(), does(expr.VerdictAccept, ""))
	f.rule(own, ifaceIs(expr.MetaKeyIIFNAME, expr.CmpOpEq, "docker0"), does(expr.VerdictAccept, ""))
}

// ufw accepts established flows and asks more than can be evaluated here.
func ufw(f foreign) {
	top := f.hook("FORWARD", nftables.ChainHookForward, nftables.ChainPolicyDrop)
	before := f.chain("ufw-before-forward")
	f.rule(top, does(expr.VerdictJump, before.Name))
	f.rule(before, isEstablished(), does(expr.VerdictAccept, ""))
	f.rule(before, []expr.Any{&expr.Meta{Key: expr.MetaKeyPRANDOM, Register: 1},
		&expr.Cmp{Op: expr.CmpOpGt, Register: 1, Data: binaryutil.NativeEndian.PutUint32(1 << 31)}}, does(expr.VerdictAccept, ""))
}

// tailscale drops its whole prefix on all interfaces but its own.
func tailscale(f foreign) {
	top := f.hook("INPUT", nftables.ChainHookInput, nftables.ChainPolicyAccept)
	own := f.chain("ts-input")
	f.rule(top, does(expr.VerdictJump, own.Name))
	f.rule(own, ifaceIs(expr.MetaKeyIIFNAME, expr.CmpOpNeq, "tailscale0"),
		sourceIn(netip.MustParsePrefix("100.64.0.0/10")), does(expr.VerdictDrop, ""))
}

// harmless accepts the mesh's packets and drops by a set without them.
func harmless(f foreign) {
	top := f.hook("fwd", nftables.ChainHookForward, nftables.ChainPolicyDrop)
	bad := &nftables.Set{Table: f.table, Name: "bad", KeyType: nftables.TypeIPAddr, Interval: true}
	f.conn.AddSet(bad, []nftables.SetElement{
		{Key: []byte{100, 64, 0, 20}}, {Key: []byte{100, 64, 0, 30}, IntervalEnd: true},
	})
	f.rule(top, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
		&expr.Lookup{SourceRegister: 1, SetName: bad.Name, SetID: bad.ID},
	}, does(expr.VerdictDrop, ""))
	f.rule(top, ifaceIs(expr.MetaKeyIIFNAME, expr.CmpOpEq, meshName), does(expr.VerdictAccept, ""))
	f.rule(top, ifaceIs(expr.MetaKeyOIFNAME, expr.CmpOpEq, meshName), does(expr.VerdictAccept, ""))
}

// rejects rejects packets, after a chain that leaves them alone.
func rejects(f foreign) {
	top, first := f.hook("fwd", nftables.ChainHookForward, nftables.ChainPolicyAccept), f.chain("first")
	f.rule(top, does(expr.VerdictJump, first.Name))
	f.rule(first, does(expr.VerdictReturn, ""))
	f.rule(first, does(expr.VerdictAccept, ""))
	f.rule(top, ifaceIs(expr.MetaKeyIIFNAME, expr.CmpOpEq, meshName), []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH}})
}

// leaves returns from a chain before a rule that would drop the packet.
func leaves(f foreign) {
	top, first := f.hook("fwd", nftables.ChainHookForward, nftables.ChainPolicyAccept), f.chain("first")
	f.rule(top, does(expr.VerdictJump, first.Name))
	f.rule(first, does(expr.VerdictReturn, ""))
	f.rule(first, does(expr.VerdictDrop, ""))
}

func TestObstaclesAreNamed(t *testing.T) {
	for _, tt := range []struct {
		name   string
		family nftables.TableFamily
		add    func(foreign)
		want   string // empty: no problem
	}{
		{"docker", nftables.TableFamilyIPv4, docker, "chain FORWARD of table ip docker drops packets from peers to the internet"},
		{"ufw", nftables.TableFamilyIPv4, ufw, "chain FORWARD of table ip ufw may drop packets from peers to the internet"},
		{"tailscale", nftables.TableFamilyIPv4, tailscale, "chain ts-input of table ip tailscale (rule with handle 4) drops packets from peers to this host"},
		{"harmless", nftables.TableFamilyINet, harmless, ""},
		{"rejects", nftables.TableFamilyIPv4, rejects, "chain fwd of table ip rejects (rule with handle 6) drops packets from peers to the internet"},
		{"leaves", nftables.TableFamilyIPv4, leaves, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newRig(t)
			g.software(tt.family, tt.name, tt.add)
			g.open()
			defer g.close()
			found := g.others(g.enforce(meshOf(grants{ann: all})))
			var texts []string
			for _, p := range found {
				texts = append(texts, p.Message)
			}
			if got := strings.Join(texts, "; "); got != tt.want {
				t.Errorf("problems are %q, want %q", got, tt.want)
			}
			// Without permissions there is nothing to stop.
			if rest := g.others(g.enforce(meshOf(grants{}))); len(rest) > 0 {
				t.Errorf("nothing is allowed, but %v", rest)
			}
		})
	}
}

// TestObstaclesOfOneKind has rules that stop one protocol, one device's tunnel, or both a
// tunnel and peers' packets.
func TestObstaclesOfOneKind(t *testing.T) {
	installed(t, "nft")
	g := newRig(t)
	g.open()
	defer g.close()
	m := meshOf(grants{ann: mesh.Routing | mesh.Incoming})
	m.ListenPort = tunnelPort
	r := g.enforce(m)
	outer := []netip.AddrPort{netip.MustParseAddrPort("192.168.77.9:4000"), netip.MustParseAddrPort("198.51.100.77:4000"), netip.MustParseAddrPort("[2001:db8:7::7]:4000")}
	const through, in, out = "forward", "input", "output"
	for _, tt := range []struct {
		hook, rule string
		want       []string // each without the rule's name in front
	}{
		{through, "iifname MESH meta l4proto tcp drop", []string{"drops TCP packets from peers to the internet"}},
		{through, "oifname MESH tcp flags & (syn | ack) == syn | ack drop", []string{"drops TCP packets from the internet to peers"}},
		{through, "iifname MESH meta l4proto udp drop", []string{"drops UDP packets from peers to the internet"}},
		{through, "iifname MESH meta l4proto { tcp, udp } drop", []string{"drops packets from peers to the internet"}},
		{in, "tcp flags syn limit rate over 5/second drop", nil},
		{in, "iifname MESH tcp dport 1-65535 drop", []string{"drops TCP packets from peers to this host"}},
		{in, "ip saddr 198.51.100.77 drop", []string{"drops packets of WireGuard (UDP port 51820) from the device at 198.51.100.77 to this host"}},
		{in, "iifname WAN ip6 saddr 2001:db8:7::/48 udp sport 4000 drop", []string{"drops packets of WireGuard (UDP port 51820) from the device at 2001:db8:7::7 to this host"}},
		{out, "ip daddr 198.51.100.77 udp dport 4000 drop", []string{"drops packets of WireGuard (UDP port 51820) from this host to the device at 198.51.100.77"}},
		{in, "iifname LAN0 ip daddr 192.168.77.1 drop", []string{"drops packets of WireGuard (UDP port 51820) from the device at 192.168.77.9 to this host"}},
		{in, "iifname WAN ip saddr 192.168.0.0/16 drop", nil},
		{out, "oifname WAN meta skuid 1001 drop", nil},
		{out, "oifname WAN meta skuid 0 udp dport != 53 drop", []string{"drops packets of WireGuard (UDP port 51820) from this host to devices"}},
		{through, "iifname MESH udp dport 40000-40010 drop", nil},
		{out, "udp sport 51820 accept; oifname != lo drop", []string{"drops packets from this host to peers"}},
		{through, "iifname MESH numgen random mod 2 0 drop", []string{"does with packets from peers to the internet isn't known"}},
		{in, "meta l4proto udp drop", []string{"drops UDP packets from peers to this host", "drops packets of WireGuard (UDP port 51820) from devices to this host"}},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			g.t = t
			rule := strings.NewReplacer("MESH", meshName, "WAN", netlab.Uplink, "LAN0", netlab.LAN).Replace(tt.rule)
			g.program(fmt.Sprintf("table inet kind {\n chain c {\n type filter hook %s priority 0; policy accept;\n %s\n }\n}\n", tt.hook, rule), "nft", "-f", "-")
			defer g.program("", "nft", "delete", "table", "inet", "kind")
			found := g.others(r, outer...)
			if len(found) != len(tt.want) {
				t.Fatalf("problems %+v, want %q", found, tt.want)
			}
			for i, p := range found {
				_, says, _ := strings.Cut(p.Message, ") ")
				if says != tt.want[i] || (p.Kind == host.KindHostFirewall) != strings.Contains(says, "WireGuard") {
					t.Errorf("problem %+v, want %q", p, tt.want[i])
				}
			}
		})
	}
}

// TestObstacleThatExpires drops by a set until its element expires.
func TestObstacleThatExpires(t *testing.T) {
	installed(t, "nft")
	g := newRig(t)
	g.open()
	defer g.close()
	r := g.enforce(meshOf(grants{ann: mesh.Routing}))
	g.program(`table ip kind {
		set going { type ipv4_addr; flags timeout; elements = { `+ann4.String()+` timeout 2s } }
		chain c {
			type filter hook forward priority 0; policy accept
			ip saddr @going drop
		}
	}`, "nft", "-f", "-")
	if found := g.others(r); len(found) != 1 {
		t.Fatalf("before it expires: %+v", found)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		g.p.others.recheckAt = time.Now() // due
		found := g.others(r)
		if len(found) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("after it expired: %+v", found)
		}
	}
}

// TestREJECTIsADrop has a rule with iptables' REJECT, whose module not every kernel has.
func TestREJECTIsADrop(t *testing.T) {
	table := &nftables.Table{Name: "filter", Family: nftables.TableFamilyIPv4}
	w := &walk{s: sample{src: ann4, dst: ann4}}
	verdict, sure := w.rule(table, foreignRule{exprs: []any{&expr.Counter{}, &expr.Target{Name: "REJECT"}}})
	if verdict == nil || verdict.Kind != expr.VerdictDrop || !sure {
		t.Errorf("verdict %v, sure %t", verdict, sure)
	}
	if verdict, _ := w.rule(table, foreignRule{exprs: []any{&expr.Target{Name: "LOG"}}}); verdict != nil {
		t.Errorf("another target has the verdict %v", verdict)
	}
}

// TestOwnTableIsNoObstacle has our own table drop what a ruleset allows that isn't in
// force yet: that is drift, and not another program's doing.
func TestOwnTableIsNoObstacle(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	wide := g.enforce(meshOf(grants{ann: all}))
	g.do(func() error { return g.p.loadClosed(meshName) })
	report := g.inspect(wide)
	if len(report.Drift) == 0 || len(report.Problems) > 0 {
		t.Errorf("drift %v, problems %v", report.Drift, report.Problems)
	}
}

// TestFlowTablesAreNamed needs no support in the kernel, which often has none.
func TestFlowTablesAreNamed(t *testing.T) {
	table := &nftables.Table{Name: "router", Family: nftables.TableFamilyINet}
	h := someHost()
	h.Uplink4, h.Uplink6 = "eth0", "eth6"
	for _, tt := range []struct {
		devices []string
		want    int
	}{{[]string{"eth1", "eth0"}, 1}, {[]string{"eth6"}, 1}, {[]string{"eth1"}, 0}, {nil, 0}} {
		got := bypass(h, table, &nftables.Flowtable{Name: "fast", Table: table, Devices: tt.devices})
		if len(got) != tt.want {
			t.Errorf("devices %v: %v", tt.devices, got)
		}
	}
}

// TestFlowTablesAreFound adds a flow table, if the kernel supports it.
func TestFlowTablesAreFound(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	err := g.pic.B.Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		table := conn.AddTable(&nftables.Table{Name: "router", Family: nftables.TableFamilyINet})
		conn.AddFlowtable(&nftables.Flowtable{
			Table: table, Name: "fast", Hooknum: nftables.FlowtableHookIngress, Priority: nftables.FlowtablePriorityFilter, Devices: []string{netlab.Uplink},
		})
		return conn.Flush()
	})
	if err != nil {
		t.Skipf("this kernel has no flow tables: %v", err)
	}
	problems := g.others(g.enforce(meshOf(grants{ann: all})))
	if len(problems) != 1 || !strings.Contains(problems[0].Message, "flow table fast of table inet router") {
		t.Errorf("problems: %v", problems)
	}
}
