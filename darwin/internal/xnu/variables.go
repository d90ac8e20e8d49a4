package xnu

// The kernel variables used here. IPv6 forwarding is set to 1 by anything above
// 0 (xnu bsd/netinet6/in6_proto.c).
const (
	IPv4Forwarding = "net.inet.ip.forwarding"
	IPv6Forwarding = "net.inet6.ip6.forwarding"
	BootSession    = "kern.bootsessionuuid"
	// How the kernel takes packets to an address of another interface than the one
	// that they came in by: 0 takes them, 1 drops those to tunnels' addresses, 2 drops
	// all. With forwarding on, all are taken (ip_input_check_interface in xnu
	// bsd/netinet/ip_input.c, ip6_input_check_interface in bsd/netinet6/ip6_input.c).
	IPv4CheckInterface = "net.inet.ip.check_interface"
	IPv6CheckInterface = "net.inet6.ip6.check_interface"
)

// The kernel variables of the ports that the kernel gives to sockets by itself (xnu
// bsd/netinet/in_pcb.c, in_pcbbind_check_port and net.inet.ip.portrange): those of
// sockets that ask for any, and those of sockets that ask for a high one
// (IP_PORTRANGE_HIGH). Both families use them.
const (
	PortFirst   = "net.inet.ip.portrange.first"
	PortLast    = "net.inet.ip.portrange.last"
	PortHiFirst = "net.inet.ip.portrange.hifirst"
	PortHiLast  = "net.inet.ip.portrange.hilast"
)
