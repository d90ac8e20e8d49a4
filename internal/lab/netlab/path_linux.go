package netlab

// The path MTU between two hosts.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// PathMTU returns the size of the largest UDP packets that pass between two hosts in each
// direction, as path MTU discovery finds it: each end sends datagrams with DF, at first of
// the size of its interface's MTU, and reduces it to what the kernel learned from ICMP
// errors. from opens the flow.
func (l *Lab) PathMTU(ctx context.Context, from, to *Host, addr netip.Addr) (forth, back int, err error) {
	at := netip.AddrPortFrom(addr, uint16(firstPort+l.next()%flowPorts))
	var near, far *net.UDPConn
	if err := to.Do(func() (err error) {
		if far, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at)); err == nil {
			err = dontFragment(far, addr)
		}
		return err
	}); err != nil {
		return 0, 0, fmt.Errorf("find path MTU to %s: %w", addr, err)
	}
	defer far.Close()
	if err := from.Do(func() (err error) {
		if near, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(at)); err == nil {
			err = dontFragment(near, addr)
		}
		return err
	}); err != nil {
		return 0, 0, fmt.Errorf("find path MTU to %s: %w", addr, err)
	}
	defer near.Close()
	if forth, err = largest(ctx, addr, near, netip.AddrPort{}, far); err != nil {
		return 0, 0, fmt.Errorf("find path MTU to %s: %w", addr, err)
	}
	seen, err := lastSender(near, far)
	if err != nil {
		return forth, 0, fmt.Errorf("find path MTU from %s: %w", addr, err)
	}
	if back, err = largest(ctx, addr, far, seen, near); err != nil {
		return forth, 0, fmt.Errorf("find path MTU from %s: %w", addr, err)
	}
	return forth, back, nil
}

func dontFragment(conn *net.UDPConn, addr netip.Addr) error {
	return control(conn, func(fd int) error {
		if addr.Is6() {
			return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_DO)
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
	})
}

// lastSender sends one small datagram and returns where the other end sees it
// come from.
func lastSender(near, far *net.UDPConn) (netip.AddrPort, error) {
	if _, err := near.Write([]byte("small")); err != nil {
		return netip.AddrPort{}, err
	}
	far.SetReadDeadline(time.Now().Add(PassWait))
	buf := make([]byte, 65536)
	for {
		n, from, err := far.ReadFromUDPAddrPort(buf)
		if err != nil || string(buf[:n]) == "small" {
			return from, err
		}
	}
}

// largest sends datagrams, from Ethernet's size downwards, until one arrives, and returns
// that packet's size with its headers. It reduces the size only when the kernel refuses a
// datagram as larger than the path MTU that it has learned.
func largest(ctx context.Context, addr netip.Addr, out *net.UDPConn, to netip.AddrPort, in *net.UDPConn) (int, error) {
	headers := 28
	if addr.Is6() {
		headers = 48
	}
	buf := make([]byte, 65536)
	size, refusals := 1500, 0
	for ctx.Err() == nil && size > headers {
		var err error
		if to.IsValid() {
			_, err = out.WriteToUDPAddrPort(buf[:size-headers], to)
		} else {
			_, err = out.Write(buf[:size-headers])
		}
		if errors.Is(err, unix.EMSGSIZE) {
			if refusals++; refusals == 2 {
				size, refusals = size-1, 0
			}
			continue
		}
		in.SetReadDeadline(time.Now().Add(probeRetry))
		if n, _, err := in.ReadFromUDPAddrPort(buf); err == nil && n == size-headers {
			return size, nil
		}
	}
	return 0, errors.Join(ctx.Err(), fmt.Errorf("no datagram arrived, the last had %d bytes", size))
}

// traceWait is how long a hop may take to answer.
const traceWait = 5 * time.Second

// Traceroute returns the router that answers at each hop towards an address, and the
// address itself as the last. A hop without an answer is the zero address. It returns an
// error if the address isn't reached within maxHops.
func (h *Host) Traceroute(to netip.Addr, maxHops int) ([]netip.Addr, error) {
	conn, err := h.openICMP(to, netip.Addr{})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	var hops []netip.Addr
	for ttl := 1; ttl <= maxHops; ttl++ {
		if err := conn.setTTL(ttl); err != nil {
			return hops, fmt.Errorf("trace route to %s: %w", to, err)
		}
		id := uint16(h.lab.next())
		hop, err := conn.hop(to, id)
		if err != nil {
			return hops, fmt.Errorf("trace route to %s: %w", to, err)
		}
		hops = append(hops, hop)
		if hop == to {
			return hops, nil
		}
	}
	return hops, fmt.Errorf("trace route to %s: not reached in %d hops", to, maxHops)
}

// hop sends echo requests until a router answers, or for traceWait.
func (c *icmpConn) hop(to netip.Addr, id uint16) (netip.Addr, error) {
	for deadline := time.Now().Add(traceWait); time.Now().Before(deadline); {
		if err := c.echo(to, id, 1, []byte("netlab trace")); err != nil {
			return netip.Addr{}, err
		}
		c.SetReadDeadline(time.Now().Add(10 * probeRetry))
		for {
			m, err := c.read()
			if err != nil {
				break
			}
			if m.isReply() && m.id == id || m.quotes(to, id) {
				return m.from, nil
			}
		}
	}
	return netip.Addr{}, nil
}
