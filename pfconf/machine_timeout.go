package pfconf

import (
	"fmt"
	"strconv"
	"strings"
)

// timeoutKind is one of the timeouts of a state, PFTM_* of bsd/net/pfvar.h.
type timeoutKind uint8

const (
	tcpFirst timeoutKind = iota
	tcpOpening
	tcpEstablished
	tcpClosing
	tcpFinWait
	tcpClosed
	udpFirst
	udpSingle
	udpMultiple
	icmpFirst
	icmpError
	greFirst
	greInitiating
	greEstablished
	espFirst
	espInitiating
	espEstablished
	otherFirst
	otherSingle
	otherMultiple
	fragTimeout
	intervalTimeout
	adaptiveStart
	adaptiveEnd
	srcTrack
	timeoutMax
)

// timeoutNames are the words of set timeout, in the order of the kinds.
var timeoutNames = [timeoutMax]string{
	"tcp.first", "tcp.opening", "tcp.established", "tcp.closing", "tcp.finwait", "tcp.closed",
	"udp.first", "udp.single", "udp.multiple", "icmp.first", "icmp.error",
	"grev1.first", "grev1.initiating", "grev1.established",
	"esp.first", "esp.initiating", "esp.established",
	"other.first", "other.single", "other.multiple", "frag", "interval",
	"adaptive.start", "adaptive.end", "src.track",
}

// defaultTimeouts are in seconds, those of adaptive in states: from pfvar.h,
// and from pfctl, which sets the adaptive ones to 6 and 12 tenths of the limit
// on states.
var defaultTimeouts = [timeoutMax]uint32{
	tcpFirst: 120, tcpOpening: 30, tcpEstablished: 86400, tcpClosing: 900, tcpFinWait: 45, tcpClosed: 90,
	udpFirst: 60, udpSingle: 30, udpMultiple: 60,
	icmpFirst: 20, icmpError: 10,
	greFirst: 120, greInitiating: 30, greEstablished: 1800,
	espFirst: 120, espInitiating: 30, espEstablished: 900,
	otherFirst: 60, otherSingle: 30, otherMultiple: 60,
	fragTimeout: 30, intervalTimeout: 10,
	adaptiveStart: 6000, adaptiveEnd: 12000,
}

// timeoutByName finds a timeout by its word. tcp.tsdiff and the like, which
// don't concern states here, are unknown.
func timeoutByName(name string) (timeoutKind, bool) {
	for i, n := range timeoutNames {
		if n == name {
			return timeoutKind(i), true
		}
	}
	return 0, false
}

// optimizationTimeouts are what set optimization changes, from pfctl.c.
var optimizationTimeouts = map[string][]Timeout{
	"aggressive": {
		{"tcp.first", 30}, {"tcp.opening", 5}, {"tcp.established", 18000}, {"tcp.closing", 60},
		{"tcp.finwait", 30}, {"tcp.closed", 30},
	},
	"high-latency": {
		{"tcp.first", 180}, {"tcp.opening", 35}, {"tcp.established", 86400}, {"tcp.closing", 905},
		{"tcp.finwait", 50}, {"tcp.closed", 95},
	},
	"conservative": {
		{"tcp.first", 3600}, {"tcp.opening", 900}, {"tcp.established", 432000}, {"tcp.closing", 3600},
		{"tcp.finwait", 600}, {"tcp.closed", 180}, {"udp.first", 300}, {"udp.single", 150}, {"udp.multiple", 900},
	},
}

// timeoutOptions returns what the set lines of a main ruleset make of the
// timeouts: pfctl starts from the defaults at each load.
func timeoutOptions(opts []*Option) ([timeoutMax]uint32, error) {
	t := defaultTimeouts
	for _, o := range opts {
		switch o.Name {
		case "optimization":
			for _, v := range o.Values {
				if v == "satellite" {
					v = "high-latency"
				}
				setTimeouts(&t, optimizationTimeouts[v])
			}
		case "timeout":
			for _, v := range o.Values {
				name, text, _ := strings.Cut(v, " ")
				n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 31)
				if err != nil {
					return t, fmt.Errorf("set timeout %s: %w", v, err)
				}
				setTimeouts(&t, []Timeout{{name, uint32(n)}})
			}
		}
	}
	return t, nil
}

func setTimeouts(t *[timeoutMax]uint32, ts []Timeout) {
	for _, to := range ts {
		if k, ok := timeoutByName(to.Name); ok {
			t[k] = to.Seconds
		}
	}
}

// expires returns the second at which s ends: its last packet plus its timeout,
// which shrinks when there are many states (pf_state_expires).
func (m *Machine) expires(s *state) int64 {
	t := int64(s.rule.timeouts[s.timeout])
	if t == 0 {
		t = int64(m.timeouts[s.timeout])
	}
	start, end, n := int64(s.rule.timeouts[adaptiveStart]), int64(s.rule.timeouts[adaptiveEnd]), int64(s.rule.states)
	// A rule with adaptive timeouts of its own counts its own states.
	if start == 0 {
		start, end, n = int64(m.timeouts[adaptiveStart]), int64(m.timeouts[adaptiveEnd]), int64(m.states.n)
	}
	if end > 0 && n > start && start < end {
		if n >= end {
			return m.seconds()
		}
		t = t * (end - n) / (end - start)
	}
	return s.last + t
}
