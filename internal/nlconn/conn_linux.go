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

// conn makes the embedded field unexported, so that other packages can't bypass Execute.
type conn = netlink.Conn

// A Conn is a netlink.Conn of mdlayher/netlink whose dumps are complete. Only one goroutine
// at a time may use it. After a request that a deadline ended, the caller must close it: the
// answer may still arrive.
type Conn struct {
	*conn
	part []byte // buffer for one part of a dump, of listBuffer bytes
}

// Dial opens a socket of a netlink family, such as unix.NETLINK_NETFILTER.
func Dial(family int) (*Conn, error) {
	c, err := netlink.Dial(family, nil)
	if err != nil {
		return nil, err
	}
	return &Conn{conn: c}, nil
}

// Execute sends a request and returns the answer. It repeats an interrupted dump (a request
// with netlink.Dump in its flags) as [ErrInterrupted] says.
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

// isList reports whether a request is for a dump. In a request for a change the two bits of
// netlink.Dump have other meanings and are never both set.
func isList(h netlink.Header) bool { return h.Flags&netlink.Dump == netlink.Dump }

// listBuffer is the largest part of a dump that the kernel sends, in bytes (netlink_dump in
// net/netlink/af_netlink.c).
const listBuffer = 64 << 10

// Each sends a request for a dump and calls do for each entry, so that a long dump takes no
// more memory than a short one. data is valid until do returns. If the dump was interrupted,
// Each returns ErrInterrupted at the end and doesn't retry, since do has seen entries.
func (c *Conn) Each(m netlink.Message, do func(h netlink.Header, data []byte)) error {
	request, err := c.Send(m)
	if err != nil {
		return err
	}
	return c.list(request.Header.Sequence, do)
}

// list reads the dump that answers the request with the sequence number, to its end.
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
		case errno == unix.EINTR, errno == unix.ENOBUFS: // the kernel goes on with the dump
		case errno != nil:
			return os.NewSyscallError("recvmsg", errno)
		case flags&unix.MSG_TRUNC != 0:
			return fmt.Errorf("read dump: a part has more than %d bytes", listBuffer)
		case kernel == nil || kernel.Pid != 0: // another process may write to the socket, too
		default:
			if err := a.read(c.part[:n]); err != nil {
				return err
			}
		}
	}
	return a.err()
}

// An answer is the dump that is being read.
type answer struct {
	sequence    uint32 // of the request
	do          func(netlink.Header, []byte)
	done        bool
	interrupted bool
	errno       syscall.Errno
}

var errCut = errors.New("read dump: message is truncated")

// read parses one part of the dump: messages with a struct nlmsghdr (linux/netlink.h).
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
			continue // of an earlier request
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
