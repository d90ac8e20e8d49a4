// Package linux makes a Linux host enforce a ruleset with nftables and netlink. It runs
// no programs.
//
// [New] returns a backend; its methods are the parts of a [host.Host]. The backend
// changes little on the host: it adds a TUN device with the host's mesh addresses, a host
// route per peer and one nftables table named meshhelper, and it switches forwarding on
// for the interfaces that need it. Each sysctl's value is written to a journal before it
// is changed, so that the next helper can restore it after a crash.
//
// # The table
//
// [Text] prints the table in nft's language, which is the best introduction to it. Its
// base chains:
//
//	transit      before routing: packets neither from nor to a peer
//	ingress      before conntrack: which source may arrive on which interface
//	judge        before other software's redirects: each packet of a peer
//	input        packets that the kernel delivers to the host itself
//	forward      packets that it forwards from or to the mesh interface
//	output       packets that the host sends to peers
//	source_nat   translates the sources of peers' forwarded packets
//	egress       the last check: nothing for a peer leaves unencrypted
//
// No packet passes because its flow is "established". Conntrack tells for each packet
// which end opened its flow and to which address, and the chain permitted looks that up
// in the permission sets. Removing one set element therefore stops the running flows of a
// peer in both directions. [Backend.Cut] then deletes the conntrack entries of flows that
// were translated through the host, because such an entry would still take the answers.
// Entries of flows to the host itself stay: an entry remembers which end opened its flow,
// and without it the next packet of the other end would open the flow anew in the reverse
// direction.
//
// # Files
//
//   - backend, worker, steps, journal, forwarding: the order of the steps, deadlines, and
//     what is restored at the end
//   - nft, table, transit, lanlimit: nftables as data, and the compiler from a ruleset to
//     a table
//   - filter, exprs, transaction: the same table in the kernel, over netlink
//   - observe, uplink, nexthop, ipsec, resolvers, ports, sockets, watch: the facts about
//     the host, and their changes
//   - conntrack, cut, excess, fill, bounds: flows in the kernel's table
//   - others, foreign, foreign_read, obstacles, legacy, way: other software's rules and
//     routes, which are read and evaluated, never changed
package linux
