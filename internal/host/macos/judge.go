package macos

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/pfconf"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// ByOthers implements [host.Judge]. It reads everything that pf holds now, and
// evaluates the packet against all of it and against our anchor alone. It may run
// beside any other method: it uses no state of the backend that they change, and
// pfctl through a [darwin.PF] of its own.
func (b *Backend) ByOthers(ctx context.Context, packet host.Packet, out string, reply bool) (host.ByOthers, error) {
	if reply {
		return host.ByOthers{}, nil // pf passes a reply by the state of its flow
	}
	info, err := b.questions.pf.Info(ctx)
	if err != nil || !info.Enabled {
		return host.ByOthers{}, err
	}
	n, err := darwin.Observe(b.o.Kernel)
	if err != nil {
		return host.ByOthers{}, err
	}
	all, err := b.questions.readForeignAnchors(ctx)
	if err != nil {
		return host.ByOthers{}, err
	}
	ours, err := b.questions.readAnchor(ctx, b.path)
	if err != nil {
		return host.ByOthers{}, err
	}
	skipped, err := b.questions.pf.Skipped(ctx)
	if err != nil {
		return host.ByOthers{}, err
	}
	var by host.ByOthers
	err = b.withRecover(func() (err error) {
		by, err = judgeOne(n, all, ours, skipped, probe{packet: asShown(packet.Packet), in: packet.In, out: out})
		return err
	})
	return by, cmp.Or(err, ctx.Err())
}

// judgeOne evaluates a packet against everything that pf holds and against our anchor
// alone. skipped lists the interfaces that pf skips.
func judgeOne(n *darwin.Network, all []shownAnchor, ours shownAnchor, skipped []string, one probe) (host.ByOthers, error) {
	u, known := unparsed{}, unparsed{}
	rulesets := u.rulesets(all)
	if len(skipped) > 0 { // all[0] is the main ruleset, the only one with set skip
		main := rulesets[0].rules
		main.Statements = append([]pfconf.Statement{&pfconf.Option{Name: "skip", Values: skipped}}, main.Statements...)
	}
	var own *pfconf.Ruleset // nil if our anchor is empty
	if strings.TrimSpace(ours.rules+ours.nat) != "" {
		rs := known.rulesets([]shownAnchor{ours})
		if len(known) > 0 {
			return host.ByOthers{}, fmt.Errorf("our own anchor %s isn't as it was loaded", ours.path)
		}
		rulesets, own = append(rulesets, rs...), rs[0].rules
	}
	m, err := machineWith(n, rulesets, u)
	if err != nil {
		return host.ByOthers{}, err
	}
	alone, err := oursAlone(m.Interfaces(), ours.path, own)
	if err != nil {
		return host.ByOthers{}, err
	}
	return byOthers(one.send(m), one.send(alone), ours.path, u), nil
}

// asShown returns the first packet of a flow in pfsim's form.
func asShown(p policy.Packet) pfsim.Packet {
	out := pfsim.Packet{Src: p.Src, Dst: p.Dst, Proto: pfconf.Proto(p.Proto)}
	switch p.Proto {
	case policy.ProtoTCP:
		out.SrcPort, out.DstPort, out.Flags, out.Window = p.SrcPort, p.DstPort, pfconf.FlagSYN, 65535
	case policy.ProtoUDP:
		out.SrcPort, out.DstPort = p.SrcPort, p.DstPort
	case policy.ProtoICMP, policy.ProtoICMPv6:
		out.ICMPType, out.ICMPID = p.ICMPType, p.SrcPort
	}
	return out
}

// byOthers compares the verdicts on a packet: got with everything that pf holds, alone
// with our anchor only. It reports nothing if our anchor blocks the packet itself.
func byOthers(got, alone pfsim.Judgement, ours string, u unparsed) host.ByOthers {
	if alone.Verdict != pfsim.VerdictPass {
		return host.ByOthers{} // blocked by ours, whatever foreign rules do
	}
	var by host.ByOthers
	for _, h := range []struct{ got, alone *pfsim.Hook }{{&got.In, &alone.In}, {&got.Out, &alone.Out}} {
		if !h.got.Seen {
			continue
		}
		f := u.resolve([]Foreign{deciderAt(h.got, ours, false)})[0]
		redirects := h.got.Translation != nil && h.got.TranslationAnchor != ours && h.got.Translation.Action == pfconf.Rdr
		switch {
		case !h.got.Pass():
			by.Does = host.OthersDrop
		case redirects:
			by.Does = host.OthersRedirect
		case h.got.State != h.alone.State:
			by.Unclear = true // another rule keeps the state, or none: answers may be blocked
		}
		by.Unclear = by.Unclear || f.Unparsed
		if by.Does != "" || by.Unclear {
			by.Where = f.where()
			return by
		}
	}
	if f, ok := u.translation(); ok {
		by.Unclear, by.Where = true, f.where()
	}
	return by
}
