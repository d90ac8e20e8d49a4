// Package linux makes a Linux host enforce a ruleset with nftables and netlink;
// it runs no programs.
//
// [New] makes a backend; its methods are the parts of a [host.Host]. What it
// puts on the host is little: a TUN device with the host's mesh addresses, a host
// route per peer, one nftables table named meshhelper, and forwarding on the
// interfaces that need it. What forwarding was before is in a journal on disk
// before it is changed, so that a helper that was killed is cleaned up after by
// the next one.
//
// # The table
//
// [Text] prints the table in nft's language; it is the best introduction. Its
// shape:
//
//	transit      before routing: what strangers send through the host
//	ingress      before conntrack: which host may have which source, on which interface
//	judge        before other software's redirects: each packet of a peer
//	input        what the kernel takes for the host itself
//	forward      what it forwards, from the mesh and to it
//	output       what the host sends to peers
//	source_nat   the address of the interface that a peer's packet leaves by
//	egress       the last look: nothing for a peer leaves in clear
//
// Nothing passes because it is "established". Every packet carries, by its
// conntrack entry, which end opened its flow and to where; the chain permitted looks
// that up in the permission sets as they are now. So a permission that is taken
// away stops running flows in both directions with one set element. Afterwards the
// conntrack entries of what was translated through the host are deleted, so that no
// answer finds its way on ([Backend.Cut]). Entries of cut flows to the host itself
// stay on purpose: while an end keeps sending, the entry remembers the opener of the
// flow, so that it can't be opened anew the other way round.
package linux
