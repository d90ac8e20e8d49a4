package netlab

// Echo servers, and the record of which probes a host received.

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// EchoPort is the TCP and UDP port of the echo servers (RFC 862).
const EchoPort = 7

// serveTimeout bounds a connection to an echo server.
const serveTimeout = 10 * time.Second

// tokenForm matches a token in a payload: a fixed prefix and a number.
var tokenForm = regexp.MustCompile(`netlab:[0-9a-f]{16}`)

func (l *Lab) token() string { return fmt.Sprintf("netlab:%016x", l.next()) }

// witness records which probes a host received.
type witness struct {
	watch *Watch

	mu     sync.Mutex
	seen   map[string]bool // tokens that an interface received
	served map[string]bool // tokens that a server received
}

// pick is a [Host.Watch] predicate that records tokens and keeps no packet. An ICMP error
// that quotes a probe doesn't count as the probe.
func (w *witness) pick(p Packet) bool {
	if p.Out || p.Is(ICMP) && !p.isEcho() {
		return false
	}
	word := string(tokenForm.Find(p.Payload))
	if word != "" {
		w.mu.Lock()
		w.seen[word] = true
		w.mu.Unlock()
	}
	return false
}

func (w *witness) answered(token string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.served[token]
}

func (w *witness) saw(token string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen[token]
}

// Serve starts the host's echo servers, TCP and UDP, on EchoPort of every address, and
// records every probe that any of its interfaces receives. The servers answer with what
// they received and its source address.
func (h *Host) Serve() error {
	if h.witness != nil {
		return nil
	}
	w := &witness{seen: map[string]bool{}, served: map[string]bool{}}
	var err error
	if w.watch, err = h.Watch(w.pick); err != nil {
		return err
	}
	h.witness = w
	for _, start := range []func() error{h.serveTCP, h.serveUDP} {
		if err := start(); err != nil {
			return fmt.Errorf("serve on %s: %w", h.Name, err)
		}
	}
	return nil
}

func (h *Host) serveTCP() error {
	var listener *net.TCPListener
	if err := h.Do(func() (err error) {
		listener, err = net.ListenTCP("tcp", &net.TCPAddr{Port: EchoPort})
		return err
	}); err != nil {
		return err
	}
	h.lab.onClose(listener.Close)
	h.lab.run.Go(func() error {
		for {
			conn, err := listener.AcceptTCP()
			if err != nil {
				return nil // closed
			}
			h.lab.run.Go(func() error {
				h.answerTCP(conn)
				return nil
			})
		}
	})
	return nil
}

// answerTCP answers one line.
func (h *Host) answerTCP(conn *net.TCPConn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(serveTimeout))
	word, err := bufio.NewReader(conn).ReadSlice('\n')
	if err == nil {
		conn.Write(h.witness.answer(bytes.TrimSpace(word), conn.RemoteAddr().(*net.TCPAddr).AddrPort()))
	}
}

// answer records what a server received and returns the answer.
func (w *witness) answer(word []byte, from netip.AddrPort) []byte {
	w.mu.Lock()
	w.served[string(word)] = true
	w.mu.Unlock()
	return fmt.Appendf(nil, "%s %s\n", word, unmap(from))
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func (h *Host) serveUDP() error {
	var conn *net.UDPConn
	if err := h.Do(func() (err error) {
		if conn, err = net.ListenUDP("udp", &net.UDPAddr{Port: EchoPort}); err != nil {
			return err
		}
		// Answers leave from the address that was asked, also a mapped IPv4 one.
		return control(conn, func(fd int) error {
			return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		})
	}); err != nil {
		return err
	}
	h.lab.onClose(conn.Close)
	h.lab.run.Go(func() error {
		h.answerUDP(conn)
		return nil
	})
	return nil
}

func (h *Host) answerUDP(conn *net.UDPConn) {
	buf, info := make([]byte, 2048), make([]byte, 256)
	for {
		n, size, _, from, err := conn.ReadMsgUDPAddrPort(buf, info)
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue // an ICMP error about an earlier answer
		}
		conn.WriteMsgUDPAddrPort(h.witness.answer(buf[:n], from), withoutInterface(info[:size]), from)
	}
}

// withoutInterface turns a received packet information into the one for the answer: it
// keeps the local address, and clears the interface so that the host's routes choose it.
func withoutInterface(info []byte) []byte {
	const index = unix.SizeofCmsghdr + 16 // of in6_pktinfo: after the address
	if len(info) >= index+4 {
		clear(info[index : index+4])
	}
	return info
}

// control runs f with the file descriptor of a connection.
func control(conn syscall.Conn, f func(fd int) error) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = f(int(fd)) }); err != nil {
		return err
	}
	return failed
}

// isEcho says whether an ICMP message is an echo request or reply.
func (p Packet) isEcho() bool {
	if p.Proto == protoICMPv6 {
		return p.Type == echoRequest6 || p.Type == echoReply6
	}
	return p.Type == echoRequest4 || p.Type == echoReply4
}
