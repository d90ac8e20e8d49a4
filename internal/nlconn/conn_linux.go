package nlconn

import (
	"encoding/binary"
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
// After an Execute that a deadline ended it must be closed: the answer may still come.
type Conn struct{ *conn }

// Dial opens a socket of a netlink family, such as unix.NETLINK_NETFILTER.
func Dial(family int) (*Conn, error) {
	c, err := netlink.Dial(family, nil)
	if err != nil {
		return nil, err
	}
	return &Conn{c}, nil
}

// Execute sends a request and returns the answer, which is whole where it is a list (Request
// and Dump in the flags).
func (c *Conn) Execute(m netlink.Message) ([]netlink.Message, error) {
	if !isList(m.Header) {
		return c.conn.Execute(m)
	}
	return whole(func() ([]netlink.Message, error) {
		request, err := c.Send(m)
		if err != nil {
			return nil, err
		}
		return c.list(request.Header.Sequence)
	})
}

// isList reports whether a request is for a list. Requests for changes have other meanings
// for the two bits of Dump, and never both.
func isList(h netlink.Header) bool { return h.Flags&netlink.Dump == netlink.Dump }

// listBuffer is the most that the kernel fills of one part of a list (netlink_dump in
// net/netlink/af_netlink.c), in bytes.
const listBuffer = 64 << 10

// list reads the list that was asked for with a sequence number, to its end.
func (c *Conn) list(sequence uint32) ([]netlink.Message, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var a answer
	b := make([]byte, listBuffer)
	for !a.done {
		var n, flags int
		var from unix.Sockaddr
		var errno error
		if err := raw.Read(func(fd uintptr) bool {
			n, _, flags, from, errno = unix.Recvmsg(int(fd), b, nil, unix.MSG_DONTWAIT)
			return errno != unix.EAGAIN
		}); err != nil {
			return nil, err
		}
		switch kernel, _ := from.(*unix.SockaddrNetlink); {
		case errno == unix.EINTR:
		case errno != nil:
			return nil, os.NewSyscallError("recvmsg", errno)
		case flags&unix.MSG_TRUNC != 0:
			return nil, fmt.Errorf("a part of the list has more than %d bytes", listBuffer)
		case kernel == nil || kernel.Pid != 0: // another process may write to the socket, too
		default:
			if err := a.read(b[:n], sequence); err != nil {
				return nil, err
			}
		}
	}
	return a.messages, a.err()
}

// answer is a list that is being read.
type answer struct {
	messages    []netlink.Message
	done        bool
	interrupted bool
	errno       syscall.Errno
}

// read takes in a part of the answer to the request with a sequence number.
func (a *answer) read(b []byte, sequence uint32) error {
	ms, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return fmt.Errorf("parse a part of a list: %w", err)
	}
	for _, m := range ms {
		if m.Header.Seq != sequence || a.done {
			continue // the end of an earlier answer
		}
		a.interrupted = a.interrupted || m.Header.Flags&unix.NLM_F_DUMP_INTR != 0
		switch m.Header.Type {
		case unix.NLMSG_NOOP:
		case unix.NLMSG_ERROR, unix.NLMSG_DONE:
			a.done = true
			if len(m.Data) >= 4 {
				a.errno = syscall.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
			}
		default:
			a.messages = append(a.messages, netlink.Message{
				Header: netlink.Header{
					Length: m.Header.Len, Type: netlink.HeaderType(m.Header.Type), Flags: netlink.HeaderFlags(m.Header.Flags),
					Sequence: m.Header.Seq, PID: m.Header.Pid,
				},
				Data: append([]byte(nil), m.Data...),
			})
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
