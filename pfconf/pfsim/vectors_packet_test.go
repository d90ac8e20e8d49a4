package pfsim

import (
	"encoding/json"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/internal/vectors"
)

// stockMain is the main ruleset of a Mac, for which the vectors have null.
const stockMain = `scrub-anchor "com.apple/*"
nat-anchor "com.apple/*"
rdr-anchor "com.apple/*"
dummynet-anchor "com.apple/*"
anchor "com.apple/*"
`

// A vectorEvent is one event of a packet scenario; which fields it has depends
// on Event.
type vectorEvent struct {
	Event string `json:"event"`
	Name  string `json:"name"`

	In    string `json:"in"`
	Out   string `json:"out"`
	Proto string `json:"proto"`
	Src   string `json:"src"` // also of kill
	Dst   string `json:"dst"`
	SPort uint16 `json:"sport"`
	DPort uint16 `json:"dport"`

	Flags    *string         `json:"flags"`
	Seq      *uint32         `json:"seq"`
	Ack      *uint32         `json:"ack"`
	Win      *uint16         `json:"win"`
	Len      *uint32         `json:"len"`
	ICMPType json.RawMessage `json:"icmp_type"`
	ICMPCode uint8           `json:"icmp_code"`
	ICMPID   uint16          `json:"icmp_id"`
	About    string          `json:"about"`

	IPOptions     bool   `json:"ip_options"`
	FragOffset    uint16 `json:"frag_offset"`
	MoreFragments bool   `json:"more_fragments"`
	FragLen       uint16 `json:"frag_len"`
	FragID        uint32 `json:"frag_id"`
	DF            *bool  `json:"df"`

	To string `json:"to"`

	Anchor    string   `json:"anchor"`
	Rules     string   `json:"rules"`
	What      string   `json:"what"`
	Table     string   `json:"table"`
	Op        string   `json:"op"`
	Addresses []string `json:"addresses"`
	Interface string   `json:"interface"`
	Address   string   `json:"address"`
	Seconds   int      `json:"seconds"`

	Want json.RawMessage `json:"want"`
}

// wantHook is the expected result at one hook.
type wantHook struct {
	Pass   bool            `json:"pass"`
	State  string          `json:"state"`
	Rule   *string         `json:"rule"`
	Src    *string         `json:"src"`
	Dst    *string         `json:"dst"`
	SPort  json.RawMessage `json:"sport"`
	DPort  json.RawMessage `json:"dport"`
	ICMPID json.RawMessage `json:"icmp_id"`
	Bytes  int             `json:"bytes"`
}

type wantPacket struct {
	Verdict string    `json:"verdict"`
	In      *wantHook `json:"in"`
	Out     *wantHook `json:"out"`
}

// sentPacket is a packet that was sent, for later replies and ICMP errors.
type sentPacket struct {
	packet  Packet
	opener  bool
	in, out string
}

// A packetRun is one packet scenario on its machine.
type packetRun struct {
	j    *judge
	m    *PF
	sent map[string]sentPacket
	at   string // the event, for messages
}

// judgePackets runs a scenario with events.
func judgePackets(j *judge, s *vectors.Scenario) {
	r := &packetRun{j: j, m: NewPF(Options{}), sent: map[string]sentPacket{}}
	if err := r.m.Enable(); err != nil {
		j.t.Fatal(err)
	}
	for _, i := range hostInterfaces(s) {
		r.m.AddInterface(i)
	}
	text := stockMain
	if s.Main != nil {
		text = *s.Main
	}
	r.mustLoad("", text)
	for _, a := range s.Anchors {
		r.mustLoad(a.Name, a.Rules)
	}
	for i, raw := range s.Events {
		var e vectorEvent
		if err := json.Unmarshal(raw, &e); err != nil {
			j.t.Fatalf("%s: event %d: %v", s.Name, i, err)
		}
		r.at = "event " + strconv.Itoa(i) + " " + e.Event
		r.event(&e)
	}
}

func (r *packetRun) mustLoad(anchor, text string) {
	if err := r.load(anchor, text); err != nil {
		r.j.differences++
		r.j.t.Errorf("%s: load %q: %v", r.j.scenario, anchor, err)
	}
}

func (r *packetRun) load(anchor, text string) error {
	rs, err := pfconf.Parse(text)
	if err != nil {
		return err
	}
	if anchor == "" {
		return r.m.LoadMain(rs)
	}
	return r.m.LoadAnchor(anchor, rs)
}

func (r *packetRun) event(e *vectorEvent) {
	switch e.Event {
	case "packet":
		r.packet(e)
	case "reply":
		r.reply(e)
	case "load":
		r.leaf(e, "rc", rc(r.load(e.Anchor, e.Rules)))
	case "flush":
		r.flush(e)
	case "table":
		r.table(e)
	case "kill":
		dst := netip.Prefix{}
		if e.Dst != "" {
			dst = r.prefix(e.Dst)
		}
		r.leaf(e, "killed", r.m.KillStates(r.prefix(e.Src), dst)&0xff)
		r.leaf(e, "rc", 0)
	case "advance":
		r.leaf(e, "states", r.m.Advance(time.Duration(e.Seconds)*time.Second))
	case "states":
		r.leaf(e, "states", r.m.StateCount())
	case "address":
		r.address(e)
	case "interface":
		r.appear(e)
	case "enable":
		r.leaf(e, "rc", rc(r.m.Enable()))
	case "disable":
		r.leaf(e, "rc", rc(r.m.Disable()))
	default:
		r.j.t.Fatalf("%s: %s: unknown event", r.j.scenario, r.at)
	}
}

func rc(err error) int {
	if err != nil {
		return 1
	}
	return 0
}

// leaf compares one value under want, if the vectors have it.
func (r *packetRun) leaf(e *vectorEvent, name string, got any) {
	r.j.t.Helper()
	var want map[string]any
	if len(e.Want) == 0 {
		return
	}
	if err := json.Unmarshal(e.Want, &want); err != nil {
		r.j.t.Fatal(err)
	}
	if w, ok := want[name]; ok {
		r.j.check(r.at+": "+name, got, w)
	}
}

func (r *packetRun) prefix(s string) netip.Prefix {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		a, err := netip.ParseAddr(s)
		if err != nil {
			r.j.t.Fatalf("%s: %s: %v", r.j.scenario, r.at, err)
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	return p
}

func (r *packetRun) address(e *vectorEvent) {
	var err error
	if e.Op == "add" {
		err = r.m.AddAddress(e.Interface, r.prefix(e.Address))
	} else {
		err = r.m.DeleteAddress(e.Interface, r.prefix(e.Address).Addr())
	}
	if err != nil {
		r.j.t.Fatal(err)
	}
}

func (r *packetRun) appear(e *vectorEvent) {
	i := pfconf.Interface{Name: e.Interface}
	for _, a := range e.Addresses {
		i.Addresses = append(i.Addresses, r.prefix(a))
	}
	r.m.AddInterface(i)
}

func (r *packetRun) flush(e *vectorEvent) {
	switch e.What {
	case "all":
		r.m.FlushAll(e.Anchor)
	case "rules":
		r.m.FlushRules(e.Anchor)
	case "nat":
		r.m.FlushNat(e.Anchor)
	case "tables":
		r.m.FlushTables(e.Anchor)
	case "states":
		r.m.FlushStates()
	default:
		r.j.t.Fatalf("%s: flush %q", r.j.scenario, e.What)
	}
	r.leaf(e, "rc", 0)
}

func (r *packetRun) table(e *vectorEvent) {
	var addrs []pfconf.Address
	for _, s := range e.Addresses {
		text, not := strings.CutPrefix(s, "!")
		addrs = append(addrs, pfconf.Address{Kind: pfconf.AddrPrefix, Prefix: r.prefix(strings.TrimSpace(text)), Not: not})
	}
	var err error
	switch e.Op {
	case "add":
		_, err = r.m.AddToTable(e.Anchor, e.Table, addrs)
	case "delete":
		_, err = r.m.DeleteFromTable(e.Anchor, e.Table, addrs)
	case "replace":
		err = r.m.ReplaceTable(e.Anchor, e.Table, addrs)
	case "flush":
		_, err = r.m.FlushTable(e.Anchor, e.Table)
	}
	r.leaf(e, "rc", rc(err))
	t, err := r.m.Table(e.Anchor, e.Table)
	if err != nil {
		r.leaf(e, "addresses", nil)
		return
	}
	r.leaf(e, "addresses", t.Entries())
}

// packet sends a packet of the opener.
func (r *packetRun) packet(e *vectorEvent) {
	r.send(e, r.fromVector(e), true, e.In, e.Out)
}

// fromVector returns a packet of the opener.
func (r *packetRun) fromVector(e *vectorEvent) Packet {
	p := Packet{
		SrcPort: e.SPort, DstPort: e.DPort, ICMPCode: e.ICMPCode, ICMPID: e.ICMPID,
	}
	p.Src, p.Dst = netip.MustParseAddr(e.Src), netip.MustParseAddr(e.Dst)
	p.Proto = map[string]pfconf.Proto{"tcp": pfconf.ProtoTCP, "udp": pfconf.ProtoUDP, "icmp": pfconf.ProtoICMP, "igmp": 2, "gre": protoGRE, "esp": protoESP}[e.Proto]
	if p.Proto == pfconf.ProtoICMP && p.Src.Is6() {
		p.Proto = pfconf.ProtoICMPv6
	}
	if p.Proto == protoESP {
		p.SPI = 0x1001
	}
	if about, ok := r.sent[e.About]; ok {
		q := about.packet
		p.Quoted = &Quoted{Src: q.Src, Dst: q.Dst, Proto: q.Proto, SrcPort: q.SrcPort, DstPort: q.DstPort, Seq: q.Seq, ICMPID: q.ICMPID, Later: q.Fragment}
	}
	r.complete(e, &p, true)
	return p
}

// reply answers an earlier packet.
func (r *packetRun) reply(e *vectorEvent) {
	to, ok := r.sent[e.To]
	if !ok {
		r.j.differences++
		r.j.t.Errorf("%s: %s: %s didn't pass", r.j.scenario, r.at, e.To)
		return
	}
	p := to.packet
	p.Src, p.Dst, p.SrcPort, p.DstPort = p.Dst, p.Src, p.DstPort, p.SrcPort
	p.Tag, p.Quoted, p.Flags = "", nil, 0
	in, out := to.out, to.in
	if e.In != "" {
		in = e.In
	}
	if e.Out != "" {
		out = e.Out
	}
	r.complete(e, &p, !to.opener)
	r.send(e, p, !to.opener, in, out)
}

// complete sets the fields for which the packet's side has defaults.
func (r *packetRun) complete(e *vectorEvent, p *Packet, opener bool) {
	p.Options = e.IPOptions && p.Src.Is4()
	p.Fragment = e.FragOffset > 0 || e.MoreFragments || e.FragLen > 0 && p.Src.Is6()
	p.FragmentOffset, p.FragmentLen, p.MoreFragments, p.FragmentID = e.FragOffset, e.FragLen, e.MoreFragments, 77
	if e.FragID != 0 {
		p.FragmentID = e.FragID
	}
	p.DontFragment = p.Src.Is4() && !p.Fragment
	if e.DF != nil {
		p.DontFragment = *e.DF
	}
	p.Len = 0
	if p.Proto == pfconf.ProtoUDP || p.Proto == pfconf.ProtoICMP || p.Proto == pfconf.ProtoICMPv6 {
		p.Len = 8
	}
	if e.Len != nil {
		p.Len = *e.Len
	}
	switch p.Proto {
	case pfconf.ProtoTCP:
		r.segment(e, p, opener)
	case pfconf.ProtoICMP, pfconf.ProtoICMPv6:
		p.ICMPType = r.icmpType(e.ICMPType, p.Proto == pfconf.ProtoICMPv6)
	}
}

// pass sends a packet through the hooks of its interfaces.
func pass(m *PF, p Packet, in, out string) Judgement {
	switch {
	case in != "" && out != "":
		return m.Forward(p, in, out)
	case in != "":
		return m.Receive(p, in)
	}
	return m.Send(p, out)
}

// send sends the packet and compares the result.
func (r *packetRun) send(e *vectorEvent, p Packet, opener bool, in, out string) {
	got := pass(r.m, p, in, out)
	if e.Name != "" && got.Verdict == VerdictPass {
		r.sent[e.Name] = sentPacket{packet: got.Packet(), opener: opener, in: in, out: out}
	}
	r.judge(e, p, &got)
}

func (r *packetRun) segment(e *vectorEvent, p *Packet, opener bool) {
	if e.Flags != nil {
		for _, c := range *e.Flags {
			p.Flags |= 1 << strings.IndexRune("FSRPAU", c)
		}
	}
	own, other := uint32(1001), uint32(5001)
	if !opener {
		own, other = other, own
	}
	p.Seq, p.Ack, p.Window = own, 0, 65535
	if p.Flags&pfconf.FlagSYN != 0 {
		p.Seq--
	}
	if p.Flags&pfconf.FlagACK != 0 {
		p.Ack = other
	}
	if e.Seq != nil {
		p.Seq = *e.Seq
	}
	if e.Ack != nil {
		p.Ack = *e.Ack
	}
	if e.Win != nil {
		p.Window = *e.Win
	}
}

func (r *packetRun) icmpType(raw json.RawMessage, v6 bool) uint8 {
	var n uint8
	if json.Unmarshal(raw, &n) == nil {
		return n
	}
	var name string
	if err := json.Unmarshal(raw, &name); err != nil {
		r.j.t.Fatalf("%s: %s: icmp_type %s", r.j.scenario, r.at, raw)
	}
	names := map[string][2]uint8{"echo": {8, 128}, "echoreply": {0, 129}, "unreach": {3, 1}, "timex": {11, 3}, "toobig": {3, 2}, "ns": {135, 135}}
	t, ok := names[name]
	if !ok {
		r.j.t.Fatalf("%s: %s: icmp_type %q", r.j.scenario, r.at, name)
	}
	if v6 {
		return t[1]
	}
	return t[0]
}

func (r *packetRun) judge(e *vectorEvent, sent Packet, got *Judgement) {
	var want wantPacket
	if err := json.Unmarshal(e.Want, &want); err != nil {
		r.j.t.Fatal(err)
	}
	r.j.check(r.at+": verdict", got.Verdict.String(), want.Verdict)
	before := sent
	r.judgeHook("in", want.In, &got.In, &before)
	r.judgeHook("out", want.Out, &got.Out, &before)
}

// judgeHook compares the result at one hook. before is the packet as it arrived there;
// judgeHook sets it to the packet as it left.
func (r *packetRun) judgeHook(name string, want *wantHook, got *Hook, before *Packet) {
	at := r.at + ": " + name
	if want == nil {
		if got.Seen {
			r.j.differences++
			r.j.t.Errorf("%s: %s: the packet came here", r.j.scenario, at)
		}
		return
	}
	r.j.check(at+".pass", got.Seen && got.Pass(), want.Pass)
	r.j.check(at+".state", got.State.String(), want.State)
	if want.Rule != nil {
		r.j.check(at+".rule", ruleName(got), *want.Rule)
	}
	if !got.Seen || !got.Pass() {
		return
	}
	if want.Bytes != 0 || got.Reassembled != 0 {
		r.j.check(at+".bytes", got.Reassembled, want.Bytes)
	}
	after := got.Packet
	r.field(at+".src", text(want.Src), before.Src.String(), after.Src.String())
	r.field(at+".dst", text(want.Dst), before.Dst.String(), after.Dst.String())
	r.field(at+".sport", want.SPort, before.SrcPort, after.SrcPort)
	r.field(at+".dport", want.DPort, before.DstPort, after.DstPort)
	if after.Quoted == nil {
		r.field(at+".icmp_id", want.ICMPID, before.ICMPID, after.ICMPID)
	}
	*before = after
}

func text(s *string) json.RawMessage {
	if s == nil {
		return nil
	}
	b, _ := json.Marshal(*s)
	return b
}

// field compares an address, a port or an identifier behind a hook with the one in the
// vectors, or if they have none with the one before the hook.
func (r *packetRun) field(at string, want json.RawMessage, before, after any) {
	switch {
	case want == nil:
		if before != after {
			r.j.differences++
			r.j.t.Errorf("%s: %s: changed from %v to %v", r.j.scenario, at, before, after)
		}
	case string(want) == `"*"`:
		r.j.judgements++
	default:
		r.j.check(at, after, want)
	}
}

// ruleName returns the vectors' name for the rule that decided.
func ruleName(h *Hook) string {
	switch h.Decider {
	case DecidedByRule:
		if h.Rule == nil {
			return "" // the packet didn't reach this hook
		}
		return h.Rule.Label
	case DecidedByDefault, DecidedByForm:
		return "default" // the kernel counts malformed packets there
	case DecidedByRemoved:
		return "removed"
	case DecidedBySkip:
		return "skipped"
	}
	return ""
}
