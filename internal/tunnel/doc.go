// Package tunnel holds what the product knows about WireGuard: keys, the
// mesh addresses derived from them, the WireGuard device of the host, and the
// configurations that a peer's owner puts into a stock WireGuard app.
//
// A newcomer starts at three places:
//
//   - PrivateKey and PublicKey, with ReadKey for the host's own key file.
//   - Prefixes, which derives a device's two addresses from its public key and
//     finds free ones where they collide.
//   - Device, which wraps golang.zx2c4.com/wireguard around a tun.Device and
//     keeps its peers equal to a list, one peer at a time.
//
// The package decides nothing about what may pass: a peer's allowed IPs are
// its own two addresses, always, so that WireGuard's cryptokey routing proves
// the source of every packet. Permissions are the guard's and the packet
// filter's.
package tunnel
