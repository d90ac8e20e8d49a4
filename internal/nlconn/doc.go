// Package nlconn talks to the Linux kernel over netlink and retries a dump that was
// interrupted.
//
// The kernel answers a dump, a request for a list, in parts. If another program adds or
// deletes an entry between two parts, an entry may be missing from the dump, or be in it
// twice; some message of the answer then has the flag NLM_F_DUMP_INTR (linux/netlink.h,
// and nl_dump_check_consistent in include/net/netlink.h). On a host with 3,000 addresses,
// some of which came and went, that happened to 82 of 112 readings. A route that is missing
// from one dump would cost a peer its connection, so such a dump is repeated, here and
// nowhere else:
//
//   - [Handle] wraps vishvananda/netlink, for links, addresses, routes, policy rules and
//     IPsec. That library reports the flag and leaves the retry to its caller.
//   - [Conn] wraps mdlayher/netlink, for everything else. That library drops the message
//     that ends a dump, which may be the only one with the flag, so Conn reads dumps
//     itself.
//   - [Nftables] runs google/nftables, which ignores the flag, over a Conn.
//
// [Conn.Route] asks for the route of one packet; none of the libraries can put all of a
// [Packet] into such a request.
//
// A socket belongs to the network namespace of the thread that opens it.
package nlconn
