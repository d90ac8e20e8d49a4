// Package netlab makes hosts to try things on: network namespaces joined by
// virtual Ethernet, on which real programs send real packets.
//
// A [Lab] holds any number of [Host]s. A host has its own interfaces, routes,
// sysctls and packet filter, and its own /run, so that two hosts never meet by
// way of the machine they both live on. [Lab.Link] joins two hosts,
// [Host.Do] runs a function inside one, [Host.Start] and [Host.Run] run a
// program there. [Host.WireGuard] starts the stock wireguard-go program from a
// configuration as a phone would scan it. [Lab.Close] takes all of it away, and
// the kernel does so when the process dies: nothing has a name that could stay
// behind.
//
// [NewPicture] builds the network that the product is made for: the host B with
// its peers A, C and D, its LAN, the router to the internet, and what else a
// host is attached to.
//
// On top of it stand the instruments. [Lab.Probe] tells which host reaches which,
// [Host.Flow] keeps both ends of a flow sending by themselves and says when
// what arrived had been sent, [Host.Watch] shows the packets that a host really
// received, [Host.Forge] sends any packet, and [Host.Snapshot] tells whether a
// host is as it was found.
//
// A program that uses the package calls [Main] first. Hosts need root, or the
// right to make a user namespace; [Unavailable] says why there are none.
package netlab
