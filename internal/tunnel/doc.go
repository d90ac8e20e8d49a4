// Package tunnel is the WireGuard device of the host. [Device] wraps
// golang.zx2c4.com/wireguard around a tun.Device and keeps its peers equal to a
// list, one peer at a time; [Sockets] are the UDP sockets under it, which keep
// their port from one device to the next.
//
// The package decides nothing about what may pass: a peer's allowed IPs are
// its own two addresses, always, so that WireGuard's cryptokey routing proves
// the source of every packet. Permissions are the guard's and the packet
// filter's.
package tunnel
