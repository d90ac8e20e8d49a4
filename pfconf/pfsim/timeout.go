package pfsim

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/meshhelper/meshhelper/pfconf"
)

// timeoutKind is one of pf's timeouts, PFTM_* of xnu bsd/net/pfvar.h, in its order.
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
	tsDiff
	timeoutMax
)

// timeoutKinds has the timeouts by pfctl's names, estblished being Apple's spelling. pfctl
// has no name for espInitiating.
var timeoutKinds = map[string]timeoutKind{
	"tcp.first": tcpFirst, "tcp.opening": tcpOpening, "tcp.established": tcpEstablished,
	"tcp.closing": tcpClosing, "tcp.finwait": tcpFinWait, "tcp.closed": tcpClosed,
	"udp.first": udpFirst, "udp.single": udpSingle, "udp.multiple": udpMultiple,
	"icmp.first": icmpFirst, "icmp.error": icmpError,
	"grev1.first": greFirst, "grev1.initiating": greInitiating, "grev1.estblished": greEstablished,
	"esp.first": espFirst, "esp.estblished": espEstablished,
	"other.first": otherFirst, "other.single": otherSingle, "other.multiple": otherMultiple,
	"frag": fragTimeout, "interval": intervalTimeout,
	"adaptive.start": adaptiveStart, "adaptive.end": adaptiveEnd, "src.track": srcTrack, "tcp.tsdiff": tsDiff,
}

// defaultTimeouts are the defaults: in seconds, PFTM_*_VAL of xnu bsd/net/pfvar.h, and for
// adaptiveStart and adaptiveEnd in states, which pfctl sets to 6/10 and 12/10 of the limit
// on states. A timeout that isn't here is 0.
var defaultTimeouts = [timeoutMax]uint32{
	tcpFirst: 120, tcpOpening: 30, tcpEstablished: 86400, tcpClosing: 900, tcpFinWait: 45, tcpClosed: 90,
	udpFirst: 60, udpSingle: 30, udpMultiple: 60,
	icmpFirst: 20, icmpError: 10,
	greFirst: 120, greInitiating: 30, greEstablished: 1800,
	espFirst: 120, espInitiating: 30, espEstablished: 900,
	otherFirst: 60, otherSingle: 30, otherMultiple: 60,
	fragTimeout: 30, intervalTimeout: 10,
	adaptiveStart: 6000, adaptiveEnd: 12000,
	tsDiff: 30,
}

// optimizationTimeouts are the timeouts in seconds that set optimization changes, the
// table pf_hints in pfctl.c. normal changes none.
var optimizationTimeouts = map[string]map[timeoutKind]uint32{
	"aggressive": {
		tcpFirst: 30, tcpOpening: 5, tcpEstablished: 18000, tcpClosing: 60, tcpFinWait: 30, tcpClosed: 30,
	},
	"high-latency": {
		tcpFirst: 180, tcpOpening: 35, tcpEstablished: 86400, tcpClosing: 905, tcpFinWait: 50, tcpClosed: 95,
	},
	"conservative": {
		tcpFirst: 3600, tcpOpening: 900, tcpEstablished: 432000, tcpClosing: 3600, tcpFinWait: 600, tcpClosed: 180,
	},
}

// mainOptions returns the timeouts and limits that the set lines of a main ruleset give.
// pfctl starts from the defaults with each load.
func (m *Machine) mainOptions(opts []*pfconf.Option) (t [timeoutMax]uint32, l capacity, err error) {
	t, l = defaultTimeouts, m.startLimits
	limited, adaptive := false, false
	for _, o := range opts {
		pairs, err := optionPairs(o)
		if err != nil {
			return t, l, err
		}
		switch o.Name {
		case "optimization":
			for k, seconds := range optimizationTimeouts[strings.Replace(strings.ToLower(o.Values[0]), "satellite", "high-latency", 1)] {
				t[k] = seconds
			}
		case "timeout":
			setTimeouts(&t, pairs)
			for _, p := range pairs {
				adaptive = adaptive || strings.HasPrefix(p.Name, "adaptive.")
			}
		case "limit":
			for _, p := range pairs {
				switch p.Name {
				case "states":
					l.states, limited = int(p.Seconds), true
				case "src-nodes":
					l.sources = int(p.Seconds)
				case "frags":
					l.fragments = int(p.Seconds)
				}
			}
		}
	}
	if limited && !adaptive {
		t[adaptiveStart], t[adaptiveEnd] = uint32(l.states/10*6), uint32(l.states/10*12)
	}
	return t, l, nil
}

// optionPairs returns the names and numbers of set timeout and set limit, none for other
// options.
func optionPairs(o *pfconf.Option) ([]pfconf.Timeout, error) {
	if o.Name != "timeout" && o.Name != "limit" {
		return nil, nil
	}
	var out []pfconf.Timeout
	for _, v := range o.Values {
		name, text, _ := strings.Cut(v, " ")
		n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 31)
		if err != nil {
			return nil, fmt.Errorf("set %s %s: %w", o.Name, v, err)
		}
		out = append(out, pfconf.Timeout{Name: name, Seconds: uint32(n)})
	}
	return out, nil
}

// setTimeouts sets the timeouts of these names.
func setTimeouts(t *[timeoutMax]uint32, ts []pfconf.Timeout) {
	for _, to := range ts {
		if k, ok := timeoutKinds[to.Name]; ok {
			t[k] = to.Seconds
		}
	}
}

// expires returns the second at which s ends (pf_state_expires): its timeout after its
// last packet. Above adaptiveStart states the timeout shrinks linearly, to 0 at
// adaptiveEnd.
func (m *Machine) expires(s *state) int64 {
	t := int64(s.rule.timeouts[s.timeout])
	if t == 0 {
		t = int64(m.timeouts[s.timeout])
	}
	start, end, n := int64(s.rule.timeouts[adaptiveStart]), int64(s.rule.timeouts[adaptiveEnd]), int64(s.rule.states)
	// A rule with adaptive timeouts of its own goes by the number of its own states.
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
