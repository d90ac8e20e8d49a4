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

// ByOthers implements [host.Judge]. It reads what the packet filter holds now,
// ours included, and sends the packet through a machine with all of it and through one
// with ours alone; it needs nothing of what the loop uses, which doesn't wait for it.
func (b *Backend) ByOthers(ctx context.Context, packet host.Packet, out string, reply bool) (host.ByOthers, error) {
	if reply {
		return host.ByOthers{}, nil // pf lets what answers a packet pass by its state
	}
	info, err := b.pf.Info(ctx)
	if err != nil || !info.Enabled {
		return host.ByOthers{}, err
	}
	n, err := darwin.Observe(b.o.Kernel)
	if err != nil {
		return host.ByOthers{}, err
	}
	all, err := b.readForeignAnchors(ctx)
	if err != nil {
		return host.ByOthers{}, err
	}
	ours, err := b.readAnchor(ctx, b.path)
	if err != nil {
		return host.ByOthers{}, err
	}
	skipped, err := b.pf.Skipped(ctx)
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

// judgeOne sends a packet through all that the packet filter holds, and through our
// anchor alone. skipped are the interfaces that the packet filter skips.
func judgeOne(n *darwin.Network, all []shownAnchor, ours shownAnchor, skipped []string, one probe) (host.ByOthers, error) {
	u, known := unparsed{}, unparsed{}
	rulesets := u.rulesets(all)
	if len(skipped) > 0 { // the main ruleset is the first that is read
		main := rulesets[0].rules
		main.Statements = append([]pfconf.Statement{&pfconf.Option{Name: "skip", Values: skipped}}, main.Statements...)
	}
	var own *pfconf.Ruleset // nil where our anchor is empty
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

// asShown returns the first packet of a flow as pf looks at it.
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

// byOthers says what others did with a packet that passes where our anchor is alone.
func byOthers(got, alone pfsim.Judgement, ours string, u unparsed) host.ByOthers {
	if alone.Verdict != pfsim.VerdictPass {
		return host.ByOthers{} // ours doesn't let it pass, whatever they do
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
			by.Unclear = true // its answers meet other rules
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
