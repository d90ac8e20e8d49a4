// Package tunnel is the WireGuard device of the host. [Device] wraps
// golang.zx2c4.com/wireguard around a tun.Device and keeps its peers equal to a
// list, one peer at a time. Encrypted packets go over any conn.Bind; [Sockets] is the one
// for plain UDP, which keeps its port from one device to the next.
//
// Inside are the packets of the mesh, outside (the underlay) the encrypted datagrams. A
// datagram that left the tunnel is never taken for one of the underlay: loopFilter knows the
// addresses inside. Replies leave by the address and, on Linux, the interface that the peer
// sent to (reply_linux.go). A peer begins at the endpoint it was last heard at, if the
// caller knows one (learned.go).
//
// The package makes no policy. A peer's allowed IPs prove the source of each of its packets
// (cryptokey routing), and an address that a peer has as a prefix of its own belongs to no
// other peer; see [Peer]. Package guard and the packet filter enforce permissions.
package tunnel
