package linux

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"syscall"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// conntrack is the kernel's table of flows (net/netfilter/nf_conntrack_core.c). Its
// entries are read one by one and never held in memory together: a single peer may have a
// hundred thousand.
type conntrack struct {
	// dump lists entries and del deletes them: separate sockets, because entries are
	// deleted while the rest of the list is still being read.
	dump  *nlconn.Conn
	del   *os.File
	out   []byte    // the batch of deletions that flush sends
	entry flowEntry // the entry that each passes on, reused to allocate nothing
}

// deleteBatch is the size of one batch of deletions, in bytes. It is small because the
// errors of a batch must fit in the socket's receive buffer.
const deleteBatch = 16 << 10

// Message types of ctnetlink, and constants that the library lacks: from
// linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_common.h.
const (
	ctGet    = unix.NFNL_SUBSYS_CTNETLINK<<8 | nl.IPCTNL_MSG_CT_GET
	ctDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | nl.IPCTNL_MSG_CT_DELETE

	ctaFilter          = 25 // CTA_FILTER
	ctaFilterOrigFlags = 1  // CTA_FILTER_ORIG_FLAGS
	filterBySource     = 1  // CTA_FILTER_F_CTA_IP_SRC

	ctaICMPType   = 5 // CTA_PROTO_ICMP_TYPE
	ctaICMPv6Type = 8 // CTA_PROTO_ICMPV6_TYPE

	ipsSourceNAT   = 1 << 4 // IPS_SRC_NAT
	attributeFlags = unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER
)

// openConntrack opens the two sockets.
func openConntrack() (*conntrack, error) {
	dump, err := nlconn.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open conntrack: %w", err)
	}
	// Deletions are sent in batches and only errors are answered, which no library
	// supports.
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open conntrack: %w", os.NewSyscallError("socket", err)), dump.Close())
	}
	return &conntrack{dump: dump, del: os.NewFile(uintptr(fd), "conntrack"), out: make([]byte, 0, deleteBatch)}, nil
}

// close closes both sockets.
func (c *conntrack) close() error { return errors.Join(c.dump.Close(), c.del.Close()) }

// tuple holds the addresses and ports of one direction of a flow.
type tuple struct {
	src, dst netip.Addr
	proto    uint8
	// sport and dport are 0 for protocols without ports; kind is the ICMP type.
	sport, dport uint16
	kind         uint8
}

// flowEntry is an entry of conntrack. It is valid until the next one is read.
type flowEntry struct {
	family      byte // AF_INET or AF_INET6
	orig, reply tuple
	status      uint32
	timeout     uint32 // seconds until the entry ends, if no packet comes
	// state is that of a TCP connection (linux/netfilter/nf_conntrack_tcp.h), else 0.
	state uint8 // of a TCP connection
	// name holds the encoded attributes that identify the entry to the kernel: tuple, ID
	// and zone.
	name []byte
}

// translated reports whether the source of the flow's packets is translated (SNAT).
func (e *flowEntry) translated() bool { return e.status&ipsSourceNAT != 0 }

// ended reports whether the flow is a TCP connection that both ends closed or one end
// reset. nft's connlimit doesn't count those (already_closed in
// net/netfilter/nf_conncount.c).
func (e *flowEntry) ended() bool {
	return e.orig.proto == unix.IPPROTO_TCP && (e.state == stateTimeWait || e.state == stateClose)
}

// each calls do for the entries of a family (AF_UNSPEC: both) whose flows were opened
// from src, or for all if src isn't valid. An error of do, or the end of ctx, skips the
// remaining entries. Memory use doesn't depend on the number of entries.
//
// Kernels since 5.8 filter by an IPv4 source themselves. Their filter by an IPv6 one is
// broken, also in 6.18: it leaves out the entries that match
// (ctnetlink_filter_match_tuple in net/netfilter/nf_conntrack_netlink.c), so IPv6 entries
// are filtered here. A dump that the kernel reports as interrupted is an error and isn't
// retried, because do has already been called; no kernel so far reports that for this
// table.
func (c *conntrack) each(ctx context.Context, family byte, src netip.Addr, do func(*flowEntry) error) error {
	// Always read the list to its end, because the socket is used again.
	var failed error
	err := c.dump.Each(request(family, src), func(_ netlink.Header, data []byte) {
		if failed == nil {
			failed = ctx.Err()
		}
		if failed != nil {
			return
		}
		var ok bool
		e := &c.entry
		*e, ok = parseFlow(data, e.name[:0])
		if ok && (family == unix.AF_UNSPEC || e.family == family) && (!src.IsValid() || e.orig.src == src) {
			failed = do(e)
		}
	})
	if err != nil {
		err = fmt.Errorf("list flows: %w", err)
	}
	return errors.Join(failed, err)
}

// request returns the message that asks for a dump of entries (IPCTNL_MSG_CT_GET).
func request(family byte, src netip.Addr) netlink.Message {
	data := []byte{family, unix.NFNETLINK_V0, 0, 0}
	if src.Is4() {
		data = appendAttr(data, unix.NLA_F_NESTED|nl.CTA_TUPLE_ORIG,
			appendAttr(nil, unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, appendAttr(nil, nl.CTA_IP_V4_SRC, src.AsSlice())))
		data = appendAttr(data, unix.NLA_F_NESTED|ctaFilter,
			appendAttr(nil, ctaFilterOrigFlags, binary.NativeEndian.AppendUint32(nil, filterBySource)))
	}
	return netlink.Message{Header: netlink.Header{Type: ctGet, Flags: netlink.Request | netlink.Dump}, Data: data}
}

// appendMessage appends a netlink message (struct nlmsghdr in linux/netlink.h).
func appendMessage(to []byte, kind, flags uint16, data []byte) []byte {
	to = binary.NativeEndian.AppendUint32(to, uint32(unix.SizeofNlMsghdr+len(data)))
	to = binary.NativeEndian.AppendUint16(to, kind)
	to = binary.NativeEndian.AppendUint16(to, flags)
	to = append(to, make([]byte, 8)...) // sequence number and port ID, which stay 0
	return append(to, data...)
}

// appendAttr appends an attribute (struct nlattr), padded to four bytes.
func appendAttr(to []byte, kind uint16, data []byte) []byte {
	to = binary.NativeEndian.AppendUint16(to, uint16(4+len(data)))
	to = binary.NativeEndian.AppendUint16(to, kind)
	to = append(to, data...)
	return append(to, make([]byte, -len(data)&3)...)
}

// queueDelete adds the deletion of an entry to the batch and sends full batches; flush
// sends the rest. It isn't an error if the entry has ended by itself.
func (c *conntrack) queueDelete(e *flowEntry) error {
	data := slices.Concat([]byte{e.family, unix.NFNETLINK_V0, 0, 0}, e.name)
	if len(c.out)+unix.SizeofNlMsghdr+len(data) > deleteBatch {
		if err := c.flush(); err != nil {
			return err
		}
	}
	c.out = appendMessage(c.out, ctDelete, unix.NLM_F_REQUEST, data)
	return nil
}

// flush sends the batch. The kernel has handled it once the write returns, and answers
// only with errors.
func (c *conntrack) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	_, err := c.del.Write(c.out)
	c.out = c.out[:0]
	if err != nil {
		return fmt.Errorf("delete flows: %w", err)
	}
	return c.errors()
}

// errorBuffer is the size of the buffer for one error message, in bytes; an error repeats
// its request, which is at most deleteBatch.
const errorBuffer = 64 << 10

// errors reads the errors of the last batch without waiting.
func (c *conntrack) errors() error {
	raw, err := c.del.SyscallConn()
	if err != nil {
		return err
	}
	b := make([]byte, errorBuffer)
	var failed error
	for {
		var n int
		var errno error
		if err := raw.Read(func(fd uintptr) bool {
			n, errno = unix.Read(int(fd), b)
			return true // never wait
		}); err != nil {
			return err
		}
		switch {
		case errors.Is(errno, unix.EAGAIN):
			return failed
		case errors.Is(errno, unix.EINTR), errors.Is(errno, unix.ENOBUFS):
			continue
		case errno != nil:
			return fmt.Errorf("delete flows: %w", errno)
		}
		failed = errors.Join(failed, deleteErrors(b[:n]))
	}
}

// deleteErrors returns the first error of a batch, ignoring entries that have already
// ended (ENOENT).
func deleteErrors(b []byte) error {
	for len(b) >= unix.SizeofNlMsghdr+4 {
		size := int(binary.NativeEndian.Uint32(b))
		errno := int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:]))
		if errno < 0 && syscall.Errno(-errno) != unix.ENOENT {
			return fmt.Errorf("delete flows: %w", syscall.Errno(-errno))
		}
		if size < unix.SizeofNlMsghdr {
			break
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return nil
}

// attrs calls do for each attribute of b, with flags cleared from its type. It reports
// whether b is well-formed.
func attrs(b []byte, do func(kind uint16, whole, value []byte)) bool {
	for len(b) > 0 {
		if len(b) < 4 {
			return false
		}
		size := int(binary.NativeEndian.Uint16(b))
		if size < 4 || size > len(b) {
			return false
		}
		end := min((size+3)&^3, len(b))
		do(binary.NativeEndian.Uint16(b[2:])&^attributeFlags, b[:end], b[4:size])
		b = b[end:]
	}
	return true
}

// parseFlow parses an entry and appends its identifying attributes to name. ok is false
// for an entry that isn't understood, which is then left alone.
func parseFlow(b, name []byte) (flowEntry, bool) {
	if len(b) < nfgenmsg {
		return flowEntry{}, false
	}
	e := flowEntry{family: b[0], name: name}
	good := true
	good = attrs(b[nfgenmsg:], func(kind uint16, whole, value []byte) {
		switch kind {
		case nl.CTA_TUPLE_ORIG:
			good = parseTuple(value, &e.orig) && good
			e.name = append(e.name, whole...)
		case nl.CTA_ID, nl.CTA_ZONE:
			e.name = append(e.name, whole...)
		case nl.CTA_TUPLE_REPLY:
			good = parseTuple(value, &e.reply) && good
		case nl.CTA_STATUS:
			e.status = bigEndian(value)
		case nl.CTA_TIMEOUT:
			e.timeout = bigEndian(value)
		case nl.CTA_PROTOINFO:
			good = parseProtoInfo(value, &e.state) && good
		}
	}) && good
	return e, good && e.orig.src.IsValid() && e.orig.dst.IsValid() && e.reply.src.IsValid() && e.reply.dst.IsValid()
}

// parseProtoInfo parses the state of a TCP connection (CTA_PROTOINFO_TCP_STATE).
func parseProtoInfo(b []byte, state *uint8) bool {
	good := true
	return attrs(b, func(kind uint16, _, value []byte) {
		if kind != nl.CTA_PROTOINFO_TCP {
			return
		}
		good = attrs(value, func(kind uint16, _, value []byte) {
			if kind == nl.CTA_PROTOINFO_TCP_STATE {
				*state = uint8(bigEndian(value))
			}
		}) && good
	}) && good
}

// bigEndian decodes a number of at most four bytes.
func bigEndian(b []byte) (n uint32) {
	for _, c := range b[:min(len(b), 4)] {
		n = n<<8 | uint32(c)
	}
	return n
}

// parseTuple parses one direction of a flow: CTA_TUPLE_IP and CTA_TUPLE_PROTO.
func parseTuple(b []byte, t *tuple) bool {
	good := true
	return attrs(b, func(kind uint16, _, value []byte) {
		switch kind {
		case nl.CTA_TUPLE_IP:
			good = parseTupleIP(value, t) && good
		case nl.CTA_TUPLE_PROTO:
			good = parseTupleProto(value, t) && good
		}
	}) && good
}

// parseTupleIP parses the addresses of a tuple.
func parseTupleIP(b []byte, t *tuple) bool {
	return attrs(b, func(kind uint16, _, value []byte) {
		a, _ := netip.AddrFromSlice(value)
		switch kind {
		case nl.CTA_IP_V4_SRC, nl.CTA_IP_V6_SRC:
			t.src = a
		case nl.CTA_IP_V4_DST, nl.CTA_IP_V6_DST:
			t.dst = a
		}
	})
}

// parseTupleProto parses the protocol with its ports or ICMP type.
func parseTupleProto(b []byte, t *tuple) bool {
	return attrs(b, func(kind uint16, _, value []byte) {
		n := bigEndian(value)
		switch kind {
		case nl.CTA_PROTO_NUM:
			t.proto = uint8(n)
		case nl.CTA_PROTO_SRC_PORT:
			t.sport = uint16(n)
		case nl.CTA_PROTO_DST_PORT:
			t.dport = uint16(n)
		case ctaICMPType, ctaICMPv6Type:
			t.kind = uint8(n)
		}
	})
}
