// Package stock has the configurations of stock WireGuard apps: the text of a peer's device in
// the format of wg-quick(8), and the QR code that a phone's app scans.
//
// [ForPeer] makes a [Config], [Config.Text] writes it and [ParseConfig] reads it back. The
// helper makes configurations without the private key, with [KeyPlaceholder] in its place,
// because the key never leaves the device that made it. The command that made the key puts it
// in. So a text may be a secret: nothing here logs it, and no error quotes its values.
//
// The package only knows the format. Which prefixes a configuration sends through the host and
// which endpoint it has is decided by package daemon.
package stock
