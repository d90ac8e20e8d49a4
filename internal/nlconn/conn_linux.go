package nlconn

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// conn has the embedded field without a name that other packages could use to go around
// Execute.
type conn = netlink.Conn

// A Conn is mdlayher/netlink's with lists that are whole. It is for one goroutine at a time.
// After a question that a deadline ended it must be closed: the answer may still come.
type Conn struct {
	*conn
	part []byte // of a list, listBuffer long
}

// Dial opens a socket of a netlink family, such as unix.NETLINK_NETFILTER.
func Dial(family int) (*Conn, error) {
	c, err := netlink.Dial(family, nil)
	if err != nil {
		return nil, err
	}
	return &Conn{conn: c}, nil
}

// Execute sends a request and returns the answer, which is whole where it is a list (Request
// and Dump in the flags).
func (c *Conn) Execute(m netlink.Message) ([]netlink.Message, error) {
	if !isList(m.Header) {
		return c.conn.Execute(m)
	}
	return whole(func() (ms []netlink.Message, err error) {
		err = c.Each(m, func(h netlink.Header, data []byte) {
			ms = append(ms, netlink.Message{Header: h, Data: bytes.Clone(data)})
		})
		return ms, err
	})
}

// isList reports whether a request is for a list. Requests for changes have other meanings
// for the two bits of Dump, and never both.
func isList(h netlink.Header) bool { return h.Flags&netlink.Dump == netlink.Dump }

// listBuffer is the most that the kernel fills of one part of a list (netlink_dump in
// net/netlink/af_netlink.c), in bytes.
const listBuffer = 64 << 10

// Each sends a request for a list and calls do for each entry, whose data is valid until do
// returns: a list that is long takes no more memory than a short one. A list that was
// interrupted is ErrInterrupted in the end, and isn't asked for again, for do has seen
// entries.
func (c *Conn) Each(m netlink.Message, do func(h netlink.Header, data []byte)) error {
	request, err := c.Send(m)
	if err != nil {
		return err
	}
	return c.list(request.Header.Sequence, do)
}

// list reads the list that was asked for with a sequence number, to its end.
func (c *Conn) list(sequence uint32, do func(netlink.Header, []byte)) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if c.part == nil {
		c.part = make([]byte, listBuffer)
	}
	a := answer{sequence: sequence, do: do}
	for !a.done {
		var n, flags int
		var from unix.Sockaddr
		var errno error
		if err := raw.Read(func(fd uintptr) bool {
			n, _, flags, from, errno = unix.Recvmsg(int(fd), c.part, nil, unix.MSG_DONTWAIT)
			return errno != unix.EAGAIN
		}); err != nil {
			return err
		}
		switch kernel, _ := from.(*unix.SockaddrNetlink); {
		case errno == unix.EINTR, errno == unix.ENOBUFS: // of a list nothing is lost
		case errno != nil:
			return os.NewSyscallError("recvmsg", errno)
		case flags&unix.MSG_TRUNC != 0:
			return fmt.Errorf("a part of a list has more than %d bytes", listBuffer)
		case kernel == nil || kernel.Pid != 0: // another process may write to the socket, too
		default:
			if err := a.read(c.part[:n]); err != nil {
				return err
			}
		}
	}
	return a.err()
}

// answer is a list that is being read.
type answer struct {
	sequence    uint32 // of the request
	do          func(netlink.Header, []byte)
	done        bool
	interrupted bool
	errno       syscall.Errno
}

var errCut = errors.New("a message of the kernel's is cut off")

// read takes in a part of the answer (struct nlmsghdr in linux/netlink.h).
func (a *answer) read(b []byte) error {
	for len(b) > 0 && !a.done {
		if len(b) < unix.SizeofNlMsghdr {
			return errCut
		}
		order := binary.NativeEndian
		h := netlink.Header{
			Length: order.Uint32(b), Type: netlink.HeaderType(order.Uint16(b[4:])), Flags: netlink.HeaderFlags(order.Uint16(b[6:])),
			Sequence: order.Uint32(b[8:]), PID: order.Uint32(b[12:]),
		}
		if h.Length < unix.SizeofNlMsghdr || uint64(h.Length) > uint64(len(b)) {
			return errCut
		}
		data := b[unix.SizeofNlMsghdr:h.Length]
		b = b[min((int(h.Length)+3)&^3, len(b)):]
		if h.Sequence != a.sequence {
			continue // the end of an earlier answer
		}
		a.interrupted = a.interrupted || h.Flags&netlink.DumpInterrupted != 0
		switch h.Type {
		case netlink.Noop:
		case netlink.Error, netlink.Done:
			a.done = true
			if len(data) >= 4 {
				a.errno = syscall.Errno(-int32(order.Uint32(data)))
			}
		default:
			a.do(h, data)
		}
	}
	return nil
}

func (a *answer) err() error {
	switch {
	case a.errno != 0:
		return os.NewSyscallError("netlink", a.errno)
	case a.interrupted:
		return ErrInterrupted
	}
	return nil
}
