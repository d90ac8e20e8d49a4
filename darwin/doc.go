// Package darwin holds the primitives of macOS that a router needs: the packet filter
// through pfctl(8), kernel variables through sysctl(3) and sysctl(8), addresses through
// ifconfig(8), the DNS configuration through scutil(8), and the routing table and its
// changes through routing messages. It knows nothing of any product; any root daemon on a
// Mac can use it.
//
// Two interfaces make it testable on any system. Commands go through [Runner] (on a Mac
// an [Exec]); routing messages and the reading of kernel variables go through [Kernel]
// (on a Mac a [System], the only code here with a build tag). All else, that is the
// rendering, the parsing and the order of steps, is portable. In tests, package
// darwintest implements both and refuses what a Mac refuses.
//
// What macOS does here is mostly undocumented. Each fact in this package names
// where it comes from: a manual page, a file of Apple's xnu or network_cmds, or a
// published capture.
package darwin
