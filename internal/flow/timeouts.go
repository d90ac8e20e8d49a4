package flow

import "time"

// How long a flow may be silent before the host's packet filter forgets it, by
// the names that pf.conf(5) gives such timeouts. The filter's own are no use
// here: pf keeps an established connection for a day, conntrack for five, and a
// peer whose devices go away without a word would fill its share with dead ones.
//
// A filter that is given these numbers holds no flow that the guard has
// forgotten, so that the bounds of the guard hold for the filter too.
const (
	// TCPFirst and TCPOpening are for connections of which an end has sent only
	// SYNs. RFC 5382 REQ-5 asks for 4 minutes, and for less where it keeps a
	// flood off: a SYN is sent again after 1, 3, 7 and 15 s, so a slow one still
	// finds its flow.
	TCPFirst   = 30 * time.Second
	TCPOpening = 30 * time.Second
	// TCPEstablished is the least that RFC 5382 REQ-5 allows: two hours, after
	// which TCP's keep-alives come (RFC 9293 section 3.8.4), and 4 minutes.
	TCPEstablished = 2*time.Hour + 4*time.Minute
	// TCPClosing is for connections that one end has closed: the 4 minutes of
	// RFC 5382 REQ-5.
	TCPClosing = 4 * time.Minute
	// TCPFinWait is for those that both ends have closed, as pf has it by
	// default, and TCPClosed for those whose end was acknowledged or that were
	// reset: only segments that come late are still to be expected.
	TCPFinWait = 45 * time.Second
	TCPClosed  = 30 * time.Second
	// UDPFirst and UDPSingle are for flows of one question and its answer, such
	// as DNS. RFC 4787 REQ-5 asks for 2 minutes except to well-known ports; they
	// are fewer because a lookup takes a new port each time.
	UDPFirst  = 60 * time.Second
	UDPSingle = 60 * time.Second
	// UDPMultiple is what RFC 4787 REQ-5 recommends.
	UDPMultiple = 5 * time.Minute
	// ICMPFirst and ICMPError are for queries, before and after their answer: the
	// least that RFC 5508 REQ-1 allows.
	ICMPFirst = 60 * time.Second
	ICMPError = 60 * time.Second
)

// Timeout is one of pf's timeouts.
type Timeout struct {
	Name string        // as pf.conf(5) writes it: tcp.first
	Idle time.Duration // in whole seconds
}

// Timeouts returns what each rule of pf that keeps state has to say, in the order
// of pf.conf(5).
func Timeouts() []Timeout {
	return []Timeout{
		{"tcp.first", TCPFirst},
		{"tcp.opening", TCPOpening},
		{"tcp.established", TCPEstablished},
		{"tcp.closing", TCPClosing},
		{"tcp.finwait", TCPFinWait},
		{"tcp.closed", TCPClosed},
		{"udp.first", UDPFirst},
		{"udp.single", UDPSingle},
		{"udp.multiple", UDPMultiple},
		{"icmp.first", ICMPFirst},
		{"icmp.error", ICMPError},
	}
}
