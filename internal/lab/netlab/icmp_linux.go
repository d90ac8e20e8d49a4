package netlab

// ICMP sockets for echo probes and for errors about them.

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// icmpConn is a raw socket of one family's ICMP on a host.
type icmpConn struct {
	*net.IPConn
	v6 bool
}

// icmpMessage is a message as it was received.
type icmpMessage struct {
	from       netip.Addr
	kind, code uint8
	id         uint16 // of echo messages
	body       []byte // after the first 8 bytes
	v6         bool
}

// openICMP opens a socket for messages to an address, from a source if one is given.
func (h *Host) openICMP(to, src netip.Addr) (*icmpConn, error) {
	c := &icmpConn{v6: to.Is6()}
	network := "ip4:1"
	if c.v6 {
		network = "ip6:58"
	}
	var local *net.IPAddr
	if src.IsValid() {
		local = &net.IPAddr{IP: src.AsSlice()}
	}
	err := h.Do(func() (err error) {
		c.IPConn, err = net.ListenIP(network, local)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open ICMP socket on %s: %w", h.Name, err)
	}
	return c, nil
}

// echo sends an echo request.
func (c *icmpConn) echo(to netip.Addr, id, seq uint16, body []byte) error {
	return c.send(to, echoRequest4, echoRequest6, id, seq, body)
}

// reply sends an echo reply, with or without a request before.
func (c *icmpConn) reply(to netip.Addr, id, seq uint16, body []byte) error {
	return c.send(to, echoReply4, echoReply6, id, seq, body)
}

func (c *icmpConn) send(to netip.Addr, kind4, kind6 uint8, id, seq uint16, body []byte) error {
	m := make([]byte, 8, 8+len(body))
	m[0] = kind4
	if c.v6 {
		m[0] = kind6 // the kernel fills in the checksum
	}
	binary.BigEndian.PutUint16(m[4:], id)
	binary.BigEndian.PutUint16(m[6:], seq)
	m = append(m, body...)
	if !c.v6 {
		binary.BigEndian.PutUint16(m[2:], checksum(m, 0))
	}
	_, err := c.WriteToIP(m, &net.IPAddr{IP: to.AsSlice()})
	return err
}

// setTTL sets the hop limit (TTL) of later packets.
func (c *icmpConn) setTTL(hops int) error {
	return control(c, func(fd int) error {
		if c.v6 {
			return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, hops)
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL, hops)
	})
}

// read returns the next message, until the read deadline.
func (c *icmpConn) read() (icmpMessage, error) {
	buf := make([]byte, 65536)
	for {
		n, from, err := c.ReadFromIP(buf)
		if err != nil {
			return icmpMessage{}, err
		}
		if n < 8 {
			continue
		}
		addr, _ := netip.AddrFromSlice(from.IP)
		return icmpMessage{from: addr.Unmap(), kind: buf[0], code: buf[1],
			id: binary.BigEndian.Uint16(buf[4:]), body: buf[8:n:n], v6: c.v6}, nil
	}
}

func (m icmpMessage) isReply() bool {
	return !m.v6 && m.kind == echoReply4 || m.v6 && m.kind == echoReply6
}

func (m icmpMessage) isRequest() bool {
	return !m.v6 && m.kind == echoRequest4 || m.v6 && m.kind == echoRequest6
}

// quotes says whether the message is an error about an echo request of ours.
func (m icmpMessage) quotes(to netip.Addr, id uint16) bool {
	if m.isReply() || m.isRequest() {
		return false
	}
	p, ok := ParsePacket(m.body)
	return ok && p.Dst == to && p.SrcPort == id
}
