package xnu

// Kernel variables, see sysctl(8).
const (
	// IPv4Forwarding and IPv6Forwarding are 1 if the host forwards packets, else 0. The
	// kernel stores any value above 0 for IPv6 as 1 (xnu bsd/netinet6/in6_proto.c).
	IPv4Forwarding = "net.inet.ip.forwarding"
	IPv6Forwarding = "net.inet6.ip6.forwarding"
	// BootSession is a UUID that changes with each boot.
	BootSession = "kern.bootsessionuuid"
	// IPv4CheckInterface and IPv6CheckInterface say what happens to a packet whose
	// destination is an address of another interface than the one it arrived on: 0 accepts
	// it, 1 drops it if that interface is a tunnel, 2 drops it. With forwarding on it is
	// always accepted (ip_input_check_interface in xnu bsd/netinet/ip_input.c,
	// ip6_input_check_interface in bsd/netinet6/ip6_input.c).
	IPv4CheckInterface = "net.inet.ip.check_interface"
	IPv6CheckInterface = "net.inet6.ip6.check_interface"
)

// The kernel variables with the ephemeral ports, which the kernel chooses for sockets of
// both families (in_pcbbind_check_port in xnu bsd/netinet/in_pcb.c): First and Last for
// sockets that take any port, HiFirst and HiLast for those with IP_PORTRANGE_HIGH.
const (
	PortFirst   = "net.inet.ip.portrange.first"
	PortLast    = "net.inet.ip.portrange.last"
	PortHiFirst = "net.inet.ip.portrange.hifirst"
	PortHiLast  = "net.inet.ip.portrange.hilast"
)
