package linux

import "time"

// newHostRate bounds how many new hosts of class lan a peer may send to, per second and
// at once. For each host that doesn't answer, the kernel keeps an incomplete neighbour
// entry until 3 s after the last packet (mcast_solicit times retrans_time_ms, arp(7)).
// The neighbour table holds 1,024 entries for all interfaces of all network namespaces
// (gc_thresh3; neigh_alloc in net/core/neighbour.c), and when it is full the host itself
// can't reach new neighbours. A host that a peer has sent to stays allowed for as long as
// a packet could keep its entry. Running flows aren't counted.
var newHostRate = limit{rate: 20, burst: 100, lasts: 5 * time.Second}

// maxRecentHosts bounds the new hosts of all peers together at a time: half of the
// neighbour table.
const maxRecentHosts = 512

// lanSets returns the sets that the rules of toLAN fill.
func lanSets(f family) []set {
	return []set{
		{name: "lan_recent" + f.suffix, types: []string{f.addr, f.addr}, timeout: true, size: maxRecentHosts},
		{name: "lan_rate" + f.suffix, types: []string{f.addr}, timeout: true, size: maxRateEntries},
	}
}

// maxRateEntries bounds the set of rates, of one element per peer; it is more than any
// mesh has peers.
const maxRateEntries = 1 << 16

// toLAN accepts packets to class lan, except to too many new hosts.
func (c *compiler) toLAN(f family) {
	l := c.chain("to_lan" + f.suffix)
	l.accept("lan, a running flow", has(ctState, established))
	l.accept("lan, a host of the last seconds", in("lan_recent"+f.suffix, f.src, f.dst))
	l.drop("too many new hosts at once", fasterThan("lan_rate"+f.suffix, newHostRate, f.src))
	l.accept("lan, a new host", addTo("lan_recent"+f.suffix, newHostRate, f.src, f.dst))
	l.drop("too many new hosts of all peers")
}
