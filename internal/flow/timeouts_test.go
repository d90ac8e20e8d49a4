package flow

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/meshhelper/meshhelper/internal/flow/flowtest"
	"github.com/meshhelper/meshhelper/pfconf"
)

// TestTimeoutsForPF writes the timeouts into a pf rule. The rule must parse, which checks
// their names, and each must be a whole number of seconds.
func TestTimeoutsForPF(t *testing.T) {
	var options []string
	for _, timeout := range Timeouts() {
		if timeout.Idle%time.Second != 0 || timeout.Idle <= 0 {
			t.Errorf("%s is %v, not whole seconds", timeout.Name, timeout.Idle)
		}
		options = append(options, fmt.Sprintf("%s %d", timeout.Name, timeout.Idle/time.Second))
	}
	rule := "pass in quick on utun7 all flags any keep state (if-bound, " + strings.Join(options, ", ") + ")\n"
	if _, err := pfconf.Parse(rule); err != nil {
		t.Errorf("%s: %v", rule, err)
	}
}

// TestTimeouts checks the timeout of each phase: the flow still exists when the packet
// filter's timeout and purge have passed, and is gone a millisecond later. An answer shows
// which, as a refused one changes nothing.
func TestTimeouts(t *testing.T) {
	const syn, ack, fin, rst = flowtest.SYN, flowtest.ACK, flowtest.FIN | flowtest.ACK, flowtest.RST
	const o, a = 0x100, 0x200 // sent by the opener, by the other end
	for _, tt := range []struct {
		about   string
		flow    int // index of the conversation
		steps   []int
		timeout time.Duration
	}{
		{"tcp.first", 0, []int{o | syn}, TCPFirst},
		{"tcp.first again", 0, []int{o | syn, o | syn}, TCPFirst},
		{"tcp.opening", 0, []int{o | syn, a | syn | ack, o | syn}, TCPOpening},
		{"tcp.closed before established", 0, []int{o | syn, a | rst}, TCPClosed},
		{"tcp.established", 0, []int{o | syn, a | syn | ack, o | ack, a | ack}, TCPEstablished},
		{"tcp.established, an answer wasn't seen", 0, []int{o | syn, o | ack}, TCPEstablished},
		{"tcp, seen first in the middle", 0, []int{o | ack}, TCPEstablished},
		{"tcp, seen first at its end", 0, []int{o | fin}, TCPClosing},
		{"tcp, closed by a peer whose segments the filter may refuse", 0, []int{o | syn, a | syn | ack, o | ack, o | fin, o | rst, a | ack}, TCPEstablished},
		{"tcp.closing", 0, []int{o | syn, a | syn | ack, o | ack, a | fin, o | ack}, TCPClosing},
		{"tcp.finwait", 0, []int{o | syn, a | syn | ack, o | ack, o | fin, a | fin, o | ack}, TCPClosing},
		{"tcp.finwait, the other end first", 0, []int{o | syn, a | syn | ack, o | ack, a | fin, o | fin}, TCPClosing},
		{"tcp.closed", 0, []int{o | syn, a | syn | ack, o | ack, a | rst}, TCPClosing},
		{"tcp, opened again after its end", 0, []int{o | syn, a | syn | ack, o | ack, o | fin, a | fin, o | syn}, TCPClosing},
		{"tcp, opened again and established", 0, []int{o | syn, a | syn | ack, o | ack, o | fin, a | fin, o | syn, a | syn | ack, o | ack}, TCPEstablished},
		{"udp.first", 1, []int{o}, UDPFirst},
		{"udp.single", 1, []int{o, a, a}, UDPSingle},
		{"udp.multiple", 1, []int{o, a, o}, UDPMultiple},
		{"udp.multiple, an answer wasn't seen", 1, []int{o, o}, UDPMultiple},
		{"icmp.first", 2, []int{o, o}, ICMPFirst},
		{"icmp.error", 2, []int{o, a}, ICMPError},
	} {
		for _, late := range []bool{false, true} {
			l := newLab(t, routing, Options{})
			c := conversations(flowtest.PeerC4, flowtest.Net4)[tt.flow]
			for _, step := range tt.steps {
				if step&o != 0 {
					l.from(true, c.ask(uint8(step)))
				} else {
					l.to(true, c.answer(uint8(step)))
				}
				l.later(time.Second)
			}
			l.later(tt.timeout + purge - time.Second)
			if late {
				l.later(time.Millisecond)
			}
			if pass := l.judge(c.answer(ack), ToPeer).Action == Pass; pass == late {
				t.Errorf("%s: late %v, the answer passes %v", tt.about, late, pass)
			}
		}
	}
}

// TestHalfClosed sends in both directions for an hour after a FIN of one end: the flow stays.
func TestHalfClosed(t *testing.T) {
	const syn, ack, fin = flowtest.SYN, flowtest.ACK, flowtest.FIN | flowtest.ACK
	for _, byServer := range []bool{true, false} {
		l := newLab(t, routing, Options{})
		c := conversations(flowtest.PeerC4, flowtest.Net4)[0]
		l.from(true, c.ask(syn))
		l.to(true, c.answer(syn|ack))
		l.from(true, c.ask(ack))
		if byServer {
			l.to(true, c.answer(fin))
		} else {
			l.from(true, c.ask(fin))
		}
		for range 20 {
			l.later(3 * time.Minute)
			l.from(true, c.ask(ack))
			l.to(true, c.answer(ack))
		}
	}
}
