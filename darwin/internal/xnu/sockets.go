package xnu

// The kernel variables that list the sockets of a protocol.
const (
	TCPSockets = "net.inet.tcp.pcblist_n"
	UDPSockets = "net.inet.udp.pcblist_n"
)

// The list begins and ends with a struct xinpgen. In between are, for each socket,
// several structs that each begin with their length and kind and are padded to 8
// bytes; the one of kind XSO_INPCB has the ports (xnu bsd/netinet/in_pcblist.c,
// get_pcblist_n; bsd/netinet/in_pcb.h, struct xinpcb_n; bsd/sys/socketvar.h).
const (
	SizeXinpgen     = 24
	KindInpcb       = 0x10
	OffXinpLocal    = 18 // inp_lport, in network order
	MinXinpcb       = OffXinpLocal + 2
	SocketAlignment = 8
)
