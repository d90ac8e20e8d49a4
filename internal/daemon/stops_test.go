package daemon

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// crossing is a host whose kernel sends packets as a test says.
type crossing struct {
	way func(host.Packet) (host.Way, error)
	by  func(p host.Packet, out string, reply bool) host.ByOthers // nil: all passes
}

func (h *crossing) Way(_ context.Context, p host.Packet) (host.Way, error) { return h.way(p) }

func (*crossing) WayCommand(to netip.Addr) string { return "show the way to " + to.String() }

// Others finds nothing.
func (*crossing) Others(context.Context, *policy.Ruleset, []netip.AddrPort) ([]host.Problem, error) {
	return nil, nil
}

func (h *crossing) ByOthers(_ context.Context, p host.Packet, out string, reply bool) (host.ByOthers, error) {
	if h.by == nil {
		return host.ByOthers{}, nil
	}
	return h.by(p, out, reply), nil
}

// straight sends packets as the facts of [hostfake.New] say.
func straight(p host.Packet) (host.Way, error) {
	switch a := p.Dst.String(); {
	case a == "198.51.100.2":
		return host.Way{Local: true}, nil
	case strings.HasPrefix(a, "192.168.77."):
		return host.Way{Interface: "eth1"}, nil
	case mesh.DefaultPrefixes().V4.Contains(p.Dst):
		return host.Way{Interface: "wg-test"}, nil
	}
	return host.Way{Interface: "eth0"}, nil
}

// TestExplainIsBounded has the kernel not answer, and asks more often than questions are
// answered at once: the rest waits and is then told that the helper is busy. A revocation
// doesn't wait.
func TestExplainIsBounded(t *testing.T) {
	const atOnce, more = 4, 60
	var release chan struct{}
	running := new(atomic.Int32)
	inRig(t, func(o *Options) {
		release = make(chan struct{})
		h := &crossing{way: func(p host.Packet) (host.Way, error) {
			running.Add(1)
			defer running.Add(-1)
			<-release
			return straight(p)
		}}
		o.Host.Ways = h
	}, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "")
		r.after(DefaultTick)
		q := api.Question{Peer: "phone", To: netip.MustParseAddr("192.0.2.1"), Proto: "tcp", Port: 443}
		answers := make(chan error, atOnce+more)
		for range atOnce + more {
			go func() {
				_, err := r.d.Explain(t.Context(), q)
				answers <- err
			}()
		}
		synctest.Wait()
		if n := running.Load(); n != atOnce || len(answers) > 0 {
			defer close(release)
			t.Fatalf("%d questions are with the kernel and %d answered, want %d and none", n, len(answers), atOnce)
		}
		busy := func(err error) bool {
			var e *api.Error
			return errors.As(err, &e) && e.Code == api.CodeNotReady && strings.Contains(e.Message, "busy") && e.Hint != ""
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := r.d.Explain(ended, q); !busy(err) {
			t.Errorf("after its client has left: %v", err)
		}
		if _, err := r.d.Rules(ended, ""); !busy(err) {
			t.Errorf("rules, after the client has left: %v", err)
		}
		if _, err := r.deny("phone", "routing"); err != nil {
			t.Error(err)
		}
		r.wantLoaded("phone", 0)
		if n := running.Load(); n != atOnce {
			t.Errorf("a revocation ended with %d questions open, want %d", n, atOnce)
		}
		r.after(time.Minute) // longer than any question waits
		if n := len(answers); n != more {
			defer close(release)
			t.Fatalf("%d questions were answered in a minute, want %d", n, more)
		}
		for range more {
			if err := <-answers; !busy(err) {
				t.Errorf("a question too many: %v", err)
			}
		}
		close(release)
		for range atOnce {
			if err := <-answers; err != nil {
				t.Error(err)
			}
		}
		if _, err := r.d.Explain(t.Context(), q); err != nil {
			t.Errorf("after all have ended: %v", err)
		}
	})
}

// TestExplainTakesAllTogether asks about packets that the policy passes and that something
// else stops.
func TestExplainTakesAllTogether(t *testing.T) {
	const inside, lan, outside = "198.51.100.2", "192.168.77.5", "192.0.2.1"
	but := func(when func(host.Packet) bool, w host.Way) func(host.Packet) (host.Way, error) {
		return func(p host.Packet) (host.Way, error) {
			if when(p) {
				return w, nil
			}
			return straight(p)
		}
	}
	to := func(a string) func(host.Packet) bool {
		return func(p host.Packet) bool { return p.Dst.String() == a }
	}
	back := func(p host.Packet) bool { return mesh.DefaultPrefixes().V4.Contains(p.Dst) }
	for name, c := range map[string]struct {
		to, from string
		way      func(host.Packet) (host.Way, error)
		by       func(p host.Packet, out string, reply bool) host.ByOthers
		spoil    func(r *rig)
		pass     bool
		unclear  bool
		want     string // the beginning of the only stop's message; "": none
	}{
		"internet":                {to: outside, pass: true},
		"lan":                     {to: lan, pass: true},
		"host":                    {to: inside, pass: true},
		"answer":                  {to: outside, from: outside, pass: true},
		"another uplink":          {to: outside, way: but(to(outside), host.Way{Interface: "tun9"}), want: "the kernel sends it by tun9"},
		"a blackhole":             {to: outside, way: but(to(outside), host.Way{Refused: host.WayBlackhole}), want: "the host's route to its destination is of the kind blackhole"},
		"no route":                {to: lan, way: but(to(lan), host.Way{Refused: host.WayNone}), want: "the host has no route"},
		"into the tunnel":         {to: lan, way: but(to(lan), host.Way{Interface: "wg-test"}), want: "the kernel sends it by wg-test"},
		"not the host's own":      {to: inside, way: but(to(inside), host.Way{Interface: "eth1"}), want: "the kernel doesn't take it for itself"},
		"answers elsewhere":       {to: outside, way: but(back, host.Way{Interface: "tun9"}), pass: true, want: "the kernel sends it by tun9, and not into the tunnel"},
		"an answer elsewhere":     {to: outside, from: outside, way: but(back, host.Way{Interface: "tun9"}), want: "the kernel sends it by tun9, and not into the tunnel"},
		"an answer to what isn't": {to: outside, from: outside, way: but(to(outside), host.Way{Refused: host.WayProhibited}), want: "the packet that it answers doesn't pass: "},
		"a kernel that doesn't tell": {to: outside, way: func(host.Packet) (host.Way, error) { return host.Way{}, errors.New("no") },
			unclear: true, want: "its route can't be looked up"},
		"others drop it": {to: outside, by: others(host.OthersDrop, false, false), want: "chain FORWARD of table ip filter drops it"},
		"others drop the answer": {to: outside, by: others(host.OthersDrop, true, false), pass: true,
			want: "chain FORWARD of table ip filter drops it"},
		"others drop an answer":       {to: outside, from: outside, by: others(host.OthersDrop, true, false), want: "chain FORWARD of table ip filter drops it"},
		"others drop what it answers": {to: outside, from: outside, by: others(host.OthersDrop, false, false), want: "the packet that it answers doesn't pass: chain FORWARD"},
		"others redirect it":          {to: outside, by: others(host.OthersRedirect, false, false), want: "chain FORWARD of table ip filter sends it to another destination"},
		"others untrack it":           {to: outside, by: others(host.OthersUntrack, false, false), want: "chain FORWARD of table ip filter takes it out of connection tracking"},
		"others may drop it":          {to: outside, by: others(host.OthersDrop, false, true), unclear: true, want: "chain FORWARD of table ip filter may drop it"},
		"others aren't understood":    {to: outside, by: others("", false, true), unclear: true, want: "what chain FORWARD of table ip filter does with it isn't known"},
		"the helper is closed": {to: outside, spoil: func(r *rig) {
			r.host.SetFault(func(step string) error {
				if step == "enforce" {
					return &host.StepError{Step: "load rules", Hint: "load them", Err: errors.New("no")}
				}
				return nil
			})
			r.host.Drift("gone")
		}, want: "the helper is closed, and nothing of a peer passes: load rules: no"},
		"the port isn't served": {to: outside, spoil: func(r *rig) { r.tunnel.setSilent(errors.New("taken")) }, want: "WireGuard's UDP port isn't served"},
	} {
		t.Run(name, func(t *testing.T) {
			if c.way == nil {
				c.way = straight
			}
			inRig(t, func(o *Options) {
				h := &crossing{c.way, c.by}
				o.Host.Others, o.Host.Judge, o.Host.Ways = h, h, h
			}, func(t *testing.T, r *rig) {
				r.add("phone")
				for _, p := range []string{"incoming", "routing", "lan"} {
					r.mustAllow("phone", p, "")
				}
				if c.spoil != nil {
					c.spoil(r)
				}
				r.after(DefaultTick)
				q := api.Question{Peer: "phone", To: netip.MustParseAddr(c.to), Proto: "tcp", Port: 443}
				if c.from != "" {
					q.From = netip.MustParseAddr(c.from)
				}
				e, err := r.d.Explain(t.Context(), q)
				if err != nil {
					t.Fatal(err)
				}
				if e.Pass != c.pass || e.Unclear != c.unclear {
					t.Errorf("pass %v, unclear %v: %+v", e.Pass, e.Unclear, e)
				}
				var got string
				for i, s := range e.Stops {
					if i == 0 {
						got = s.Message
					}
					if byRoute := strings.Contains(s.Message, "the kernel ") || strings.Contains(s.Message, "route"); byRoute && !s.Unclear && !strings.Contains(s.Hint, "show the way to ") {
						t.Errorf("the hint %q doesn't name the host's own command", s.Hint)
					}
					if s.Hint == "" || s.Answer != (c.pass && c.want != "") {
						t.Errorf("%+v", s)
					}
				}
				if !strings.HasPrefix(got, c.want) || (got == "") != (c.want == "") {
					t.Errorf("stopped by %q, want %q", got, c.want)
				}
			})
		})
	}
}

// others does something with answers, or with what they answer.
func others(does string, answers, unclear bool) func(host.Packet, string, bool) host.ByOthers {
	return func(p host.Packet, out string, reply bool) host.ByOthers {
		from, to := p.In, out
		if reply {
			from, to = to, from
		}
		if reply != answers || from != "wg-test" || to != "eth0" {
			return host.ByOthers{}
		}
		return host.ByOthers{Does: does, Unclear: unclear, Where: "chain FORWARD of table ip filter"}
	}
}

// TestExplainSaysWhenItEnds gives two permissions that a packet needs different ends: the
// earlier one counts.
func TestExplainSaysWhenItEnds(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		r.add("phone")
		r.mustAllow("phone", "routing", "2h")
		r.mustAllow("phone", "lan", "1h")
		e, err := r.d.Explain(t.Context(), api.Question{Peer: "phone", To: netip.MustParseAddr("192.168.77.5"), Proto: "icmp"})
		p, perr := r.d.Peer("phone")
		if err != nil || perr != nil || !e.Pass || e.Until.IsZero() || !e.Until.Equal(p.Permissions.Of(mesh.LAN).Until) {
			t.Errorf("%+v, %v; %+v, %v", e, err, p.Permissions, perr)
		}
	})
}

// TestQuestionsThatMakeNoSense asks questions that are refused, with a hint.
func TestQuestionsThatMakeNoSense(t *testing.T) {
	inBubble(t, func(t *testing.T, r *rig) {
		p := r.add("phone")
		a, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
		for _, q := range []api.Question{
			{To: a, Proto: "icmp", Port: 80}, {Proto: "tcp"}, {To: a, Proto: "gre"},
			{To: a, From: p.Addresses[0], Proto: "tcp"}, {To: a, From: v6, Proto: "tcp"},
		} {
			q.Peer = "phone"
			var e *api.Error
			if _, err := r.d.Explain(t.Context(), q); !errors.As(err, &e) || e.Hint == "" {
				t.Errorf("%+v: %v", q, err)
			}
		}
	})
}

// inRig runs test with a running daemon whose options a test has changed.
func inRig(t *testing.T, change func(*Options), test func(*testing.T, *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		o := r.options()
		change(&o)
		r.startWith(o)
		defer r.end()
		test(t, r)
	})
}
