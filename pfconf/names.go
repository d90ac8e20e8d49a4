package pfconf

import (
	"slices"
	"strconv"
)

// keywords are the words with a meaning in the grammar; all others are strings. They
// are those of lookup in pfctl's parse.y, and what Apple added: dummynet-anchor, extfilter
// and extmap. A quoted keyword is a string, which is how it can be used as a name.
var keywords = set("all", "allow-opts", "altq", "anchor", "antispoof", "any", "bandwidth", "binat",
	"binat-anchor", "bitmask", "block", "block-policy", "cbq", "code", "crop", "debug", "drop", "drop-ovl",
	"dummynet-anchor", "dup-to", "extfilter", "extmap", "fastroute", "file", "fingerprints", "flags", "floating", "flush", "for",
	"fragment", "from", "global", "group", "hfsc", "hostid", "icmp-type", "icmp6-type", "if-bound", "in",
	"include", "inet", "inet6", "keep", "label", "limit", "linkshare", "load", "log", "loginterface", "max",
	"max-mss", "max-src-conn", "max-src-conn-rate", "max-src-nodes", "max-src-states", "min-ttl", "modulate",
	"nat", "nat-anchor", "no", "no-df", "no-route", "no-sync", "on", "optimization", "os", "out", "overload",
	"pass", "port", "priority", "priq", "probability", "proto", "qlimit", "queue", "quick", "random",
	"random-id", "rdr", "rdr-anchor", "realtime", "reassemble", "reply-to", "require-order", "return",
	"return-icmp", "return-icmp6", "return-rst", "round-robin", "route", "route-to", "rtable", "rule",
	"ruleset-optimization", "scrub", "scrub-anchor", "set", "set-tos", "skip", "source-hash", "source-track",
	"state", "state-policy", "static-port", "sticky-address", "synproxy", "table", "tag", "tagged", "tbrsize",
	"timeout", "to", "tos", "ttl", "upperlimit", "urpf-failed", "user")

// set returns the words as a set.
func set(words ...string) map[string]bool {
	m := make(map[string]bool, len(words))
	for _, w := range words {
		m[w] = true
	}
	return m
}

// protoNames are the protocols that are printed by name: where pfctl asks
// getprotobynumber(3), this is a fixed list, so that output doesn't depend on the host.
var protoNames = map[Proto]string{
	0: "ip", ProtoICMP: "icmp", 2: "igmp", ProtoTCP: "tcp", ProtoUDP: "udp", 41: "ipv6",
	47: "gre", 50: "esp", 51: "ah", ProtoICMPv6: "ipv6-icmp", 89: "ospf",
}

// protoNumbers are the protocol names that can be read, in lower or in upper case. Those
// that aren't in protoNames are from /etc/protocols of macOS.
var protoNumbers = func() map[string]Proto {
	m := map[string]Proto{
		"icmp6": 58, "ggp": 3, "ipencap": 4, "egp": 8, "pup": 12, "hmp": 20, "xns-idp": 22, "rdp": 27,
		"ipv6-route": 43, "ipv6-frag": 44, "rsvp": 46, "ipv6-nonxt": 59, "ipv6-opts": 60,
		"eigrp": 88, "ospfigp": 89, "ipip": 94, "etherip": 97, "encap": 98, "pim": 103, "ipcomp": 108,
		"vrrp": 112, "carp": 112, "l2tp": 115, "sctp": 132, "udplite": 136, "pfsync": 240,
	}
	for n, name := range protoNames {
		m[name] = n
	}
	for name, n := range m {
		m[upper(name)] = n
	}
	return m
}()

// upper returns s with its ASCII letters in upper case. strings.ToUpper would also
// change letters beyond ASCII, which no protocol name has.
func upper(s string) string {
	b := []byte(s)
	for i, c := range b {
		if c >= 'a' && c <= 'z' {
			b[i] = c - 'a' + 'A'
		}
	}
	return string(b)
}

// String returns the protocol's name if every host knows it by that name, and its
// number otherwise.
func (p Proto) String() string {
	if name, ok := protoNames[p]; ok {
		return name
	}
	return strconv.Itoa(int(p))
}

// services are the port names that can be read on any host. A Mac's /etc/services has
// thousands more: see [Names]. Ports are printed as numbers, so no name is needed for
// that.
var services = map[string]uint16{
	"ftp-data": 20, "ftp": 21, "ssh": 22, "telnet": 23, "smtp": 25, "time": 37, "whois": 43, "domain": 53,
	"bootps": 67, "bootpc": 68, "tftp": 69, "finger": 79, "http": 80, "kerberos": 88, "pop3": 110,
	"sunrpc": 111, "auth": 113, "nntp": 119, "ntp": 123, "netbios-ns": 137, "netbios-dgm": 138,
	"netbios-ssn": 139, "imap": 143, "snmp": 161, "snmptrap": 162, "bgp": 179, "ldap": 389, "svrloc": 427,
	"https": 443, "microsoft-ds": 445, "isakmp": 500, "syslog": 514, "printer": 515, "afpovertcp": 548,
	"rtsp": 554, "submission": 587, "ipp": 631, "ldaps": 636, "rsync": 873, "imaps": 993, "pop3s": 995,
	"socks": 1080, "openvpn": 1194, "l2f": 1701, "pptp": 1723, "radius": 1812, "nfsd": 2049, "nfs": 2049,
	"daap": 3689, "ipsec-msft": 4500, "sip": 5060, "mdns": 5353, "rfb": 5900, "vnc-server": 5900,
}

// An icmpName is pfctl's word for an ICMP type, or for a code of a type. The four tables
// below are those of pfctl_parser.c.
type icmpName struct {
	name       string
	kind, code uint8
}

// icmpTypes are the types of ICMP (RFC 792 and IANA's list).
var icmpTypes = []icmpName{
	{name: "echoreq", kind: 8}, {name: "echorep", kind: 0}, {name: "unreach", kind: 3},
	{name: "squench", kind: 4}, {name: "redir", kind: 5}, {name: "althost", kind: 6},
	{name: "routeradv", kind: 9}, {name: "routersol", kind: 10}, {name: "timex", kind: 11},
	{name: "paramprob", kind: 12}, {name: "timereq", kind: 13}, {name: "timerep", kind: 14},
	{name: "inforeq", kind: 15}, {name: "inforep", kind: 16}, {name: "maskreq", kind: 17},
	{name: "maskrep", kind: 18}, {name: "trace", kind: 30}, {name: "dataconv", kind: 31},
	{name: "mobredir", kind: 32}, {name: "ipv6-where", kind: 33}, {name: "ipv6-here", kind: 34},
	{name: "mobregreq", kind: 35}, {name: "mobregrep", kind: 36}, {name: "skip", kind: 39},
	{name: "photuris", kind: 40},
}

// icmp6Types are the types of ICMPv6 (RFC 4443 and IANA's list). Where several names
// share a number, the first is the one that is printed.
var icmp6Types = []icmpName{
	{name: "unreach", kind: 1}, {name: "toobig", kind: 2}, {name: "timex", kind: 3},
	{name: "paramprob", kind: 4}, {name: "echoreq", kind: 128}, {name: "echorep", kind: 129},
	{name: "groupqry", kind: 130}, {name: "listqry", kind: 130}, {name: "grouprep", kind: 131},
	{name: "listenrep", kind: 131}, {name: "groupterm", kind: 132}, {name: "listendone", kind: 132},
	{name: "routersol", kind: 133}, {name: "routeradv", kind: 134}, {name: "neighbrsol", kind: 135},
	{name: "neighbradv", kind: 136}, {name: "redir", kind: 137}, {name: "routrrenum", kind: 138},
	{name: "wrureq", kind: 139}, {name: "wrurep", kind: 140}, {name: "fqdnreq", kind: 139},
	{name: "fqdnrep", kind: 140}, {name: "niqry", kind: 139}, {name: "nirep", kind: 140},
	{name: "mtraceresp", kind: 200}, {name: "mtrace", kind: 201},
}

var icmpCodes = []icmpName{
	{"net-unr", 3, 0}, {"host-unr", 3, 1}, {"proto-unr", 3, 2}, {"port-unr", 3, 3}, {"needfrag", 3, 4},
	{"srcfail", 3, 5}, {"net-unk", 3, 6}, {"host-unk", 3, 7}, {"isolate", 3, 8}, {"net-prohib", 3, 9},
	{"host-prohib", 3, 10}, {"net-tos", 3, 11}, {"host-tos", 3, 12}, {"filter-prohib", 3, 13},
	{"host-preced", 3, 14}, {"cutoff-preced", 3, 15}, {"redir-net", 5, 0}, {"redir-host", 5, 1},
	{"redir-tos-net", 5, 2}, {"redir-tos-host", 5, 3}, {"normal-adv", 9, 0}, {"common-adv", 9, 16},
	{"transit", 11, 0}, {"reassemb", 11, 1}, {"badhead", 12, 0}, {"optmiss", 12, 1}, {"badlen", 12, 2},
	{"unknown-ind", 40, 1}, {"auth-fail", 40, 2}, {"decrypt-fail", 40, 3},
}

var icmp6Codes = []icmpName{
	{"admin-unr", 1, 1}, {"noroute-unr", 1, 0}, {"notnbr-unr", 1, 2}, {"beyond-unr", 1, 2},
	{"addr-unr", 1, 3}, {"port-unr", 1, 4}, {"transit", 3, 0}, {"reassemb", 3, 1}, {"badhead", 4, 0},
	{"nxthdr", 4, 1}, {"redironlink", 137, 0}, {"redirrouter", 137, 1},
}

// icmpTables returns the names of ICMP, or of ICMPv6 if v6 is set.
func icmpTables(v6 bool) (types, codes []icmpName) {
	if v6 {
		return icmp6Types, icmp6Codes
	}
	return icmpTypes, icmpCodes
}

// icmpTypeByName returns the type of that name and whether there is one.
func icmpTypeByName(name string, v6 bool) (uint8, bool) {
	types, _ := icmpTables(v6)
	for _, t := range types {
		if t.name == name {
			return t.kind, true
		}
	}
	return 0, false
}

// icmpTypeName returns a type's name, or its number if it has none.
func icmpTypeName(kind uint8, v6 bool) string {
	types, _ := icmpTables(v6)
	for _, t := range types {
		if t.kind == kind {
			return t.name
		}
	}
	return strconv.Itoa(int(kind))
}

// icmpCodeByName returns the code of that name. Different types have different names
// for the same code, so the name is looked up among those of the type.
func icmpCodeByName(kind uint8, name string, v6 bool) (uint8, bool) {
	_, codes := icmpTables(v6)
	for _, c := range codes {
		if c.kind == kind && c.name == name {
			return c.code, true
		}
	}
	return 0, false
}

// icmpCodeName returns the name of a type's code, or its number if it has none.
func icmpCodeName(kind, code uint8, v6 bool) string {
	_, codes := icmpTables(v6)
	for _, c := range codes {
		if c.kind == kind && c.code == code {
			return c.name
		}
	}
	return strconv.Itoa(int(code))
}

// unreachType returns the type of destination unreachable, the error that return-icmp
// and return-icmp6 send.
func unreachType(v6 bool) uint8 {
	if v6 {
		return 1
	}
	return 3
}

// timeouts are pf's timeouts in the order of the kernel's PFTM_* (xnu bsd/net/pfvar.h),
// in which pfctl -sr prints those of a rule. All are in seconds but adaptive.start and
// adaptive.end, which count states. The misspelling estblished is that of Apple's pfctl,
// which also has no name for PFTM_ESP_INITIATING.
var timeouts = []string{
	"tcp.first", "tcp.opening", "tcp.established", "tcp.closing", "tcp.finwait", "tcp.closed",
	"udp.first", "udp.single", "udp.multiple", "icmp.first", "icmp.error",
	"grev1.first", "grev1.initiating", "grev1.estblished", "esp.first", "esp.estblished",
	"other.first", "other.single", "other.multiple", "frag", "interval",
	"adaptive.start", "adaptive.end", "src.track", "tcp.tsdiff",
}

// TimeoutNames returns the names of pf's timeouts, such as tcp.established, in the
// order of the kernel.
func TimeoutNames() []string { return slices.Clone(timeouts) }

// timeoutIndex returns the index of a timeout in timeouts, -1 if there is none. pfctl
// compares the names of a rule's timeouts exactly, but those of set timeout without
// regard to case.
func timeoutIndex(name string) int {
	return slices.Index(timeouts, name)
}

// tcpFlagLetters are the letters of the TCP flags, from the lowest bit on (tcpflags in
// pfctl_parser.c).
const tcpFlagLetters = "FSRPAUEW"

// String returns the flags as letters in the order of the bits, such as SA.
func (f TCPFlags) String() string {
	var b []byte
	for i := range len(tcpFlagLetters) {
		if f&(1<<i) != 0 {
			b = append(b, tcpFlagLetters[i])
		}
	}
	return string(b)
}
