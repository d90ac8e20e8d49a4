// Package netlab creates hosts for tests: network namespaces joined by virtual
// Ethernet, on which real programs send real packets.
//
// A [Lab] holds any number of [Host]s. A host has its own interfaces, routes,
// sysctls and packet filter, and its own /run, so that two hosts share nothing of the
// machine that they run on. [Lab.Link] joins two hosts, [Host.Do] runs a function
// inside one, [Host.Start] and [Host.Run] run a program there. [Host.WireGuard] starts
// the stock wireguard-go program from a configuration as a phone would scan it.
// [Lab.Close] removes everything, and the kernel does so when the process dies, since
// the namespaces have no names.
//
// [NewPicture] builds the network that the product is made for: the host B with
// its peers A, C and D, its LAN, the router to the internet, and other networks.
//
// Instruments: [Lab.Probe] reports which host reaches which, [Lab.Flow] keeps both
// ends of a flow sending and reports when each packet that arrived was sent,
// [Host.Watch] captures the packets that a host received, [Host.Forge] sends any
// packet, and [Host.Snapshot] shows whether a host is as it was found.
//
// A program that uses the package calls [Main] first. Hosts need root, or the right to
// create user namespaces; [Unavailable] returns why they can't be created.
package netlab
