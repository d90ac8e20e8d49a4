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

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// conntrack is the kernel's table of flows. It is read entry by entry and never
// held as a whole: one peer may have a hundred thousand.
type conntrack struct {
	// dump and del are sockets of their own, so that entries are deleted while the
	// others are still being read.
	dump, del *os.File
	seq       uint32
	in, out   []byte
	entry     flowEntry // that is looked at
	// interrupted says that the table changed in a way that may have left entries out.
	interrupted bool
}

// Sizes in bytes: what the kernel fills at most for one answer of a dump
// (netlink_dump in net/netlink/af_netlink.c), and what goes into one batch of
// deletions, whose errors have to fit in the socket's buffer.
const (
	dumpBuffer  = 64 << 10
	deleteBatch = 16 << 10
)

// Messages and attributes of ctnetlink (linux/netfilter/nfnetlink_conntrack.h).
const (
	ctGet    = unix.NFNL_SUBSYS_CTNETLINK<<8 | 1
	ctDelete = unix.NFNL_SUBSYS_CTNETLINK<<8 | 2

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaStatus     = 3
	ctaProtoInfo  = 4
	ctaTimeout    = 7
	ctaID         = 12
	ctaZone       = 18
	ctaFilter     = 25

	ctaFilterOrigFlags = 1
	filterBySource     = 1 // CTA_FILTER_F_CTA_IP_SRC

	ctaTupleIP    = 1
	ctaTupleProto = 2
	ctaIPv4Src    = 1
	ctaIPv4Dst    = 2
	ctaIPv6Src    = 3
	ctaIPv6Dst    = 4

	ctaProtoNum    = 1
	ctaProtoSport  = 2
	ctaProtoDport  = 3
	ctaICMPType    = 5
	ctaICMPv6Type  = 8
	ctaInfoTCP     = 1      // CTA_PROTOINFO_TCP
	ctaTCPState    = 1      // CTA_PROTOINFO_TCP_STATE
	ipsSourceNAT   = 1 << 4 // IPS_SRC_NAT (linux/netfilter/nf_conntrack_common.h)
	attributeFlags = unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER
)

func openConntrack() (*conntrack, error) {
	c := &conntrack{in: make([]byte, dumpBuffer), out: make([]byte, 0, deleteBatch)}
	var err error
	if c.dump, err = openNetfilter(); err != nil {
		return nil, err
	}
	if c.del, err = openNetfilter(); err != nil {
		return nil, errors.Join(err, c.dump.Close())
	}
	return c, nil
}

// openNetfilter opens a socket that has deadlines.
func openNetfilter() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	if err != nil {
		return nil, fmt.Errorf("open conntrack: %w", os.NewSyscallError("socket", err))
	}
	return os.NewFile(uintptr(fd), "conntrack"), nil
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
// entry is looked at. A look that the kernel calls interrupted, which it doesn't do to this
// table so far, is an error and is repeated by the caller: do has been called. The memory that it takes doesn't depend on how many there are.
func (c *conntrack) each(ctx context.Context, family byte, src netip.Addr, do func(*flowEntry) error) error {
	c.seq++
	c.interrupted = false
	if err := c.send(c.dump, c.request(family, src)); err != nil {
		return fmt.Errorf("list flows: %w", err)
	}
	var failed error
	for {
		n, err := c.dump.Read(c.in)
		if err != nil {
			if errors.Is(err, syscall.EINTR) || errors.Is(err, syscall.ENOBUFS) {
				continue
			}
			return fmt.Errorf("list flows: %w", err)
		}
		// Whatever happens the dump is read to its end: the socket is used again.
		if failed == nil {
			failed = ctx.Err()
		}
		done, err := c.answer(c.in[:n], func(data []byte) {
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
		if done || err != nil {
			return errors.Join(failed, err)
		}
	}
}

// answer hands the entries of one answer to do, and reports the end of the dump.
func (c *conntrack) answer(b []byte, do func([]byte)) (done bool, err error) {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return true, errors.New("list flows: a message of the kernel is cut off")
		}
		kind, flags, seq := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:]), binary.NativeEndian.Uint32(b[8:])
		data := b[unix.SizeofNlMsghdr:size]
		b = b[min((size+3)&^3, len(b)):]
		if seq != c.seq {
			continue
		}
		c.interrupted = c.interrupted || flags&unix.NLM_F_DUMP_INTR != 0
		switch kind {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			if len(data) >= 4 {
				if errno := int32(binary.NativeEndian.Uint32(data)); errno < 0 {
					return true, fmt.Errorf("list flows: %w", syscall.Errno(-errno))
				}
			}
			if c.interrupted {
				return true, fmt.Errorf("list flows: %w", nlconn.ErrInterrupted)
			}
			return true, nil
		}
		do(data)
	}
	return false, nil
}

// request is the message that asks for entries.
func (c *conntrack) request(family byte, src netip.Addr) []byte {
	data := []byte{family, unix.NFNETLINK_V0, 0, 0}
	if src.Is4() {
		data = appendAttr(data, unix.NLA_F_NESTED|ctaTupleOrig,
			appendAttr(nil, unix.NLA_F_NESTED|ctaTupleIP, appendAttr(nil, ctaIPv4Src, src.AsSlice())))
		data = appendAttr(data, unix.NLA_F_NESTED|ctaFilter,
			appendAttr(nil, ctaFilterOrigFlags, binary.NativeEndian.AppendUint32(nil, filterBySource)))
	}
	return c.message(nil, ctGet, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, data)
}

// message appends a message of netlink.
func (c *conntrack) message(to []byte, kind, flags uint16, data []byte) []byte {
	to = binary.NativeEndian.AppendUint32(to, uint32(unix.SizeofNlMsghdr+len(data)))
	to = binary.NativeEndian.AppendUint16(to, kind)
	to = binary.NativeEndian.AppendUint16(to, flags)
	to = binary.NativeEndian.AppendUint32(to, c.seq)
	to = binary.NativeEndian.AppendUint32(to, 0)
	return append(to, data...)
}

func appendAttr(to []byte, kind uint16, data []byte) []byte {
	to = binary.NativeEndian.AppendUint16(to, uint16(4+len(data)))
	to = binary.NativeEndian.AppendUint16(to, kind)
	to = append(to, data...)
	return append(to, make([]byte, -len(data)&3)...)
}

func (c *conntrack) send(to *os.File, message []byte) error {
	_, err := to.Write(message)
	return err
}

// forget deletes an entry, with others in one batch: flush sends the last one. An
// entry that has ended by itself is no error.
func (c *conntrack) forget(e *flowEntry) error {
	data := slices.Concat([]byte{e.family, unix.NFNETLINK_V0, 0, 0}, e.name)
	if len(c.out)+unix.SizeofNlMsghdr+len(data) > deleteBatch {
		if err := c.flush(); err != nil {
			return err
		}
	}
	c.out = c.message(c.out, ctDelete, unix.NLM_F_REQUEST, data)
	return nil
}

// flush deletes what was to be forgotten. The kernel is done with a batch when it
// has taken it, and answers only with errors.
func (c *conntrack) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	err := c.send(c.del, c.out)
	c.out = c.out[:0]
	if err != nil {
		return fmt.Errorf("delete flows: %w", err)
	}
	return c.errors()
}

// errors reads the errors of the last batch.
func (c *conntrack) errors() error {
	raw, err := c.del.SyscallConn()
	if err != nil {
		return err
	}
	b := make([]byte, dumpBuffer)
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
		case ctaTupleOrig:
			good = parseTuple(value, &e.orig) && good
			e.name = append(e.name, whole...)
		case ctaID, ctaZone:
			e.name = append(e.name, whole...)
		case ctaTupleReply:
			good = parseTuple(value, &e.reply) && good
		case ctaStatus:
			e.status = bigEndian(value)
		case ctaTimeout:
			e.timeout = bigEndian(value)
		case ctaProtoInfo:
			good = parseProtoInfo(value, &e.state) && good
		}
	}) && good
	return e, good && e.orig.src.IsValid() && e.orig.dst.IsValid() && e.reply.src.IsValid() && e.reply.dst.IsValid()
}

// parseProtoInfo reads the state of a TCP connection; other protocols have none.
func parseProtoInfo(b []byte, state *uint8) bool {
	good := true
	return attrs(b, func(kind uint16, _, value []byte) {
		if kind != ctaInfoTCP {
			return
		}
		good = attrs(value, func(kind uint16, _, value []byte) {
			if kind == ctaTCPState {
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
		case ctaTupleIP:
			good = parseTupleIP(value, t) && good
		case ctaTupleProto:
			good = parseTupleProto(value, t) && good
		}
	}) && good
}

func parseTupleIP(b []byte, t *tuple) bool {
	return attrs(b, func(kind uint16, _, value []byte) {
		a, _ := netip.AddrFromSlice(value)
		switch kind {
		case ctaIPv4Src, ctaIPv6Src:
			t.src = a
		case ctaIPv4Dst, ctaIPv6Dst:
			t.dst = a
		}
	})
}

func parseTupleProto(b []byte, t *tuple) bool {
	return attrs(b, func(kind uint16, _, value []byte) {
		n := bigEndian(value)
		switch kind {
		case ctaProtoNum:
			t.proto = uint8(n)
		case ctaProtoSport:
			t.sport = uint16(n)
		case ctaProtoDport:
			t.dport = uint16(n)
		case ctaICMPType, ctaICMPv6Type:
			t.kind = uint8(n)
		}
	})
}
