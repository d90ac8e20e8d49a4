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

// conntrack is the kernel's table of flows. It is read entry by entry and never
// held as a whole: one peer may have a hundred thousand.
type conntrack struct {
	// dump and del are sockets of their own, so that entries are deleted while the
	// others are still being read.
	dump  *nlconn.Conn
	del   *os.File
	out   []byte    // a batch of deletions
	entry flowEntry // that is looked at
}

// deleteBatch is what goes into one batch of deletions, in bytes: their errors have to fit in
// the socket's buffer.
const deleteBatch = 16 << 10

// Messages of ctnetlink, and what of linux/netfilter/nfnetlink_conntrack.h and
// nf_conntrack_common.h the library doesn't have.
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

func openConntrack() (*conntrack, error) {
	dump, err := nlconn.Dial(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open conntrack: %w", err)
	}
	// Deletions are sent by the hundred and answered by errors alone, which no library does.
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open conntrack: %w", os.NewSyscallError("socket", err)), dump.Close())
	}
	return &conntrack{dump: dump, del: os.NewFile(uintptr(fd), "conntrack"), out: make([]byte, 0, deleteBatch)}, nil
}

func (c *conntrack) close() error { return errors.Join(c.dump.Close(), c.del.Close()) }

// tuple is one direction of a flow.
type tuple struct {
	src, dst netip.Addr
	proto    uint8
	// sport and dport are 0 where the protocol has none; kind is ICMP's type.
	sport, dport uint16
	kind         uint8
}

// flowEntry is an entry of conntrack. It is valid until the next one is read.
type flowEntry struct {
	family      byte // AF_INET or AF_INET6
	orig, reply tuple
	status      uint32
	timeout     uint32 // seconds that are left
	state       uint8  // of a TCP connection
	// name are the attributes that name the entry to the kernel.
	name []byte
}

// translated reports whether the flow leaves with another source than the opener's.
func (e *flowEntry) translated() bool { return e.status&ipsSourceNAT != 0 }

// ended reports whether the flow is a connection that both ends closed or one reset: such
// a one isn't counted by nft (already_closed in net/netfilter/nf_conncount.c).
func (e *flowEntry) ended() bool {
	return e.orig.proto == unix.IPPROTO_TCP && (e.state == stateTimeWait || e.state == stateClose)
}

// each calls do for the entries of a family, AF_UNSPEC being both, whose flows were
// opened from src, or for all where src isn't valid. Kernels since 5.8 look for an IPv4
// address themselves; what they do with an IPv6 one is wrong, in 6.18 still: they leave out
// those that match (ctnetlink_filter_match_tuple in
// net/netfilter/nf_conntrack_netlink.c). After an error of do, or the end of ctx, no other
// entry is looked at. A list that the kernel calls interrupted, which of this table it never
// does so far, is an error: do has been called. The memory that it takes doesn't depend on
// how many there are.
func (c *conntrack) each(ctx context.Context, family byte, src netip.Addr, do func(*flowEntry) error) error {
	// Whatever happens the list is read to its end: the socket is used again.
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

// request is the message that asks for entries.
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

// appendMessage appends a message of netlink.
func appendMessage(to []byte, kind, flags uint16, data []byte) []byte {
	to = binary.NativeEndian.AppendUint32(to, uint32(unix.SizeofNlMsghdr+len(data)))
	to = binary.NativeEndian.AppendUint16(to, kind)
	to = binary.NativeEndian.AppendUint16(to, flags)
	to = append(to, make([]byte, 8)...) // sequence number and sender, which nothing asks for
	return append(to, data...)
}

func appendAttr(to []byte, kind uint16, data []byte) []byte {
	to = binary.NativeEndian.AppendUint16(to, uint16(4+len(data)))
	to = binary.NativeEndian.AppendUint16(to, kind)
	to = append(to, data...)
	return append(to, make([]byte, -len(data)&3)...)
}

// forget deletes an entry, with others in one batch: flush sends the last one. An
// entry that has ended by itself is no error.
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

// flush deletes what was to be forgotten. The kernel is done with a batch when it
// has taken it, and answers only with errors.
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

// errorBuffer is more than an error takes that repeats its request, in bytes.
const errorBuffer = 64 << 10

// errors reads the errors of the last batch.
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

// deleteErrors returns an error of a batch other than that an entry has ended.
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

// attrs calls do for each attribute of b, without its flags, until do returns
// false. It reports whether b was understood.
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

// parseFlow reads an entry, whose name it appends to name. What of it isn't understood
// makes it none, which is then left as it is.
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

// parseProtoInfo reads the state of a TCP connection; other protocols have none.
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

// bigEndian reads a number of at most four bytes.
func bigEndian(b []byte) (n uint32) {
	for _, c := range b[:min(len(b), 4)] {
		n = n<<8 | uint32(c)
	}
	return n
}

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
