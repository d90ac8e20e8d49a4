// Package tunnel is the WireGuard device of the host. [Device] wraps
// golang.zx2c4.com/wireguard around a tun.Device and keeps its peers equal to a
// list, one peer at a time. Encrypted packets go over any conn.Bind: [Sockets] are the
// one of plain UDP, which keeps its port from one device to the next.
//
// The package decides nothing about what may pass. A peer's allowed IPs prove the source
// of each of its packets (cryptokey routing), and an address that a peer has as a whole
// prefix is its alone, whatever else others are given; see [Peer]. Permissions are the
// guard's and the packet filter's.
package tunnel
