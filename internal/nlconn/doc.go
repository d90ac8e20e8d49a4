// Package nlconn asks the Linux kernel over netlink, and gets lists that are whole.
//
// The kernel fills a list (a dump) in parts, and between two parts another program may add
// or delete an entry: then one may be missing from the list, or be in it twice, and some
// message of the answer has the flag NLM_F_DUMP_INTR (linux/netlink.h, and
// nl_dump_check_consistent in include/net/netlink.h). A route that is missing for one look
// is a peer that loses its connection, so such a list is asked for again, here and nowhere
// else:
//
//   - [Handle] is vishvananda/netlink's, for links, addresses, routes, policy rules and IPsec.
//     The library reports the flag, and leaves asking again to its caller.
//   - [Conn] is mdlayher/netlink's, for everything else. That library drops the message that
//     ends a list, which may be the only one with the flag, so that Conn reads lists by itself.
//   - [Nftables] is google/nftables, which doesn't look at the flag, over a Conn.
//
// [Conn.Route] asks for the route of one packet. No library knows all that such a question
// can say.
//
// All of it works in the network namespace of the thread that opens it.
package nlconn
