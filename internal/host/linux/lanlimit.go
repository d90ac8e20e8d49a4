package linux

import "time"

// searching bounds how many hosts of class lan peers begin to talk to. For each
// that doesn't answer, the kernel keeps an unfinished entry in its table of
// neighbours, for 3 s after the last packet (mcast_solicit times retrans_time_ms of
// arp(7)); that table holds 1,024 for all interfaces of all network namespaces
// (gc_thresh3, and neigh_alloc of net/core/neighbour.c), and when it is full the host
// itself finds no new neighbour. One peer begins with rate hosts a second and burst at once; what it
// began with is free for as long as a sent packet could keep an entry. Running flows
// are never counted.
var newHostRate = limit{rate: 20, burst: 100, lasts: 5 * time.Second}

// searched is how many hosts all peers together may have begun with at a time: half
// of the table.
const maxRecentHosts = 512

// searchSets are filled by the rules of toLAN.
func lanSets(f family) []set {
	return []set{
		{name: "lan_recent" + f.suffix, types: []string{f.addr, f.addr}, timeout: true, size: maxRecentHosts},
		{name: "lan_rate" + f.suffix, types: []string{f.addr}, timeout: true, size: maxRateEntries},
	}
}

// maxSearchers is more peers than there are.
const maxRateEntries = 1 << 16

// toLAN accepts what may go to class lan, unless it would be one new host too many.
func (c *compiler) toLAN(f family) {
	l := c.chain("to_lan" + f.suffix)
	l.accept("lan, a running flow", has(ctState, established))
	l.accept("lan, a host of the last seconds", in("lan_recent"+f.suffix, f.src, f.dst))
	l.drop("too many new hosts at once", fasterThan("lan_rate"+f.suffix, newHostRate, f.src))
	l.accept("lan, a new host", addTo("lan_recent"+f.suffix, newHostRate, f.src, f.dst))
	l.drop("too many new hosts of all peers")
}
