// Package darwin holds the primitives of macOS that a router of packets needs:
// the packet filter by pfctl(8), kernel variables by sysctl(3) and (8), addresses by
// ifconfig(8), the DNS configuration by scutil(8), the routing table and its changes
// by routing messages. It knows nothing of any product and works for every root daemon on
// a Mac.
//
// Two seams keep it testable where there is no Mac. Commands go through [Runner]
// (on a Mac an [Exec]); routing messages and the reading of kernel variables go
// through [Kernel] (on a Mac a [System], the only thing here with a build tag).
// Everything in between, that is the rendering, the parsing and the order of steps,
// is portable. In tests, package darwintest stands behind the seams and refuses
// what a Mac refuses.
//
// What macOS does here is mostly undocumented. Each fact in this package names
// where it comes from: a manual page, a file of Apple's xnu or network_cmds, or a
// published capture.
package darwin
