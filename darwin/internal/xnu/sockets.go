package xnu

// The kernel variables with the list of a protocol's sockets, of both families.
const (
	TCPSockets = "net.inet.tcp.pcblist_n"
	UDPSockets = "net.inet.udp.pcblist_n"
)

// The format of such a list. It begins and ends with a struct xinpgen. Between them, each
// socket has several structs that begin with their length and kind, 4 bytes each, and are
// padded to SocketAlignment; the one of KindInpcb has the ports (get_pcblist_n in xnu
// bsd/netinet/in_pcblist.c; struct xinpcb_n in bsd/netinet/in_pcb.h; XSO_* in
// bsd/sys/socketvar.h). Sizes and offsets are in bytes.
const (
	SizeXinpgen     = 24
	KindInpcb       = 0x10             // XSO_INPCB
	OffXinpLocal    = 18               // inp_lport, 2 bytes in network order
	MinXinpcb       = OffXinpLocal + 2 // the part of a struct xinpcb_n that is read
	SocketAlignment = 8
)
