package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// States of sockets (include/net/tcp_states.h). A bound UDP socket is in "close", a
// connected one in "established".
const (
	tcpListen = 10
	anyState  = 0xffff
)

// Sizes and offsets, in bytes, of struct inet_diag_req_v2 and inet_diag_msg
// (linux/inet_diag.h).
const (
	diagRequest = 56
	diagMessage = 72
	diagPort    = 4  // idiag_sport, after family, state, timer and retrans
	diagUser    = 64 // idiag_uid, after the addresses, the expiry and the queues
)

// sockets are the kinds of sockets that could receive a peer's answer: UDP ones, and
// listening TCP ones. A connected TCP socket has its own flow in conntrack, and no other
// flow is translated to its addresses and ports.
var sockets = []struct {
	family, proto uint8
	states        uint32
	file          string // file in /proc/net, used if the kernel lacks the module for netlink
}{
	{unix.AF_INET, unix.IPPROTO_UDP, anyState, "udp"},
	{unix.AF_INET6, unix.IPPROTO_UDP, anyState, "udp6"},
	{unix.AF_INET, unix.IPPROTO_TCP, 1 << tcpListen, "tcp"},
	{unix.AF_INET6, unix.IPPROTO_TCP, 1 << tcpListen, "tcp6"},
}

// boundPort is a port that a user's socket is bound to.
type boundPort struct {
	port uint16
	uid  uint32
}

// boundPorts returns the ports that sockets of the host are bound to, each with the user
// of one of its sockets.
func boundPorts(diag *nlconn.Conn) (map[uint16]uint32, error) {
	have := map[uint16]uint32{}
	for _, s := range sockets {
		ports, err := diagPorts(diag, s.family, s.proto, s.states)
		if err != nil {
			if ports, err = procPorts(s.file, s.states); errors.Is(err, os.ErrNotExist) {
				continue // a kernel without IPv6
			}
		}
		if err != nil {
			return nil, fmt.Errorf("list sockets: %w", err)
		}
		for _, p := range ports {
			have[p.port] = p.uid
		}
	}
	delete(have, 0)
	return have, nil
}

// diagPorts asks the kernel for the ports of sockets in these states (sock_diag(7)).
func diagPorts(diag *nlconn.Conn, family, proto uint8, states uint32) ([]boundPort, error) {
	request := make([]byte, diagRequest)
	request[0], request[1] = family, proto
	binary.NativeEndian.PutUint32(request[4:], states)
	ms, err := diag.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request | netlink.Dump},
		Data:   request,
	})
	if err != nil {
		return nil, err
	}
	var out []boundPort
	for _, m := range ms {
		if len(m.Data) >= diagMessage {
			out = append(out, boundPort{binary.BigEndian.Uint16(m.Data[diagPort:]), binary.NativeEndian.Uint32(m.Data[diagUser:])})
		}
	}
	return out, nil
}

// procPorts reads the same from /proc/net, which the kernel prints whole.
func procPorts(file string, states uint32) ([]boundPort, error) {
	b, err := os.ReadFile("/proc/thread-self/net/" + file)
	if err != nil {
		return nil, err
	}
	return parseProcPorts(string(b), states)
}

// parseProcPorts parses lines such as
//
//	0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 1000 ...
//
// below a line of titles (proc(5)): number, local address and port, remote address and
// port, state, queues, timer, retransmissions, user.
func parseProcPorts(text string, states uint32) ([]boundPort, error) {
	var out []boundPort
	for i, line := range strings.Split(text, "\n") {
		fields := strings.Fields(line)
		if i == 0 || len(fields) == 0 {
			continue
		}
		if len(fields) < 8 {
			return nil, fmt.Errorf("read line %q: want eight fields", line)
		}
		_, port, _ := strings.Cut(fields[1], ":")
		p, err := strconv.ParseUint(port, 16, 16)
		if err != nil {
			return nil, fmt.Errorf("read port of line %q: %w", line, err)
		}
		state, err := strconv.ParseUint(fields[3], 16, 4)
		if err != nil {
			return nil, fmt.Errorf("read state of line %q: %w", line, err)
		}
		uid, err := strconv.ParseUint(fields[7], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("read user of line %q: %w", line, err)
		}
		if states&(1<<state) != 0 {
			out = append(out, boundPort{uint16(p), uint32(uid)})
		}
	}
	return out, nil
}
