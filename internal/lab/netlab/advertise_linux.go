package netlab

// Router advertisements of the picture's routers, by which hosts learn an IPv6 default
// route.

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// advertiseEvery is below RFC 4861's minimum of 3 s, so that a host that lost its
	// route learns it again while a test waits.
	advertiseEvery    = time.Second
	advertiseLifetime = 1800 // seconds, of the router and of the prefix
	uplinkWait        = 20 * time.Second
)

// Advertise has the host send router advertisements (RFC 4861, 4.2) out of an
// interface, every second until the lab closes: it is a default router, and
// addresses of the prefix, a /64, are formed by the receivers.
func (h *Host) Advertise(link string, prefix netip.Prefix) error {
	l, err := h.link(link)
	if err != nil {
		return err
	}
	var fd int
	err = h.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
		if err != nil {
			return err
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255)
	})
	if err != nil {
		return fmt.Errorf("open router advertisement socket on %s: %w", h.Name, err)
	}
	everybody := &unix.SockaddrInet6{Addr: netip.MustParseAddr("ff02::1").As16(), ZoneId: uint32(l.Attrs().Index)}
	message := routerAdvertisement(prefix)
	h.lab.run.Go(func() error {
		defer unix.Close(fd)
		for {
			// It fails while a test has the interface down.
			_ = unix.Sendto(fd, message, 0, everybody)
			select {
			case <-h.lab.ctx.Done():
				return nil
			case <-time.After(advertiseEvery):
			}
		}
	})
	return nil
}

// routerAdvertisement is the message without its checksum, which the kernel
// fills in for ICMPv6 sockets (RFC 3542, 3.1).
func routerAdvertisement(prefix netip.Prefix) []byte {
	m := make([]byte, 16+32)
	m[0] = 134 // router advertisement
	m[4] = 64  // hop limit for the receivers
	binary.BigEndian.PutUint16(m[6:], advertiseLifetime)
	info := m[16:]          // prefix information, RFC 4861, 4.6.2
	info[0], info[1] = 3, 4 // type, length in units of 8 bytes
	info[2] = byte(prefix.Bits())
	info[3] = 0xc0 // on-link, autonomous
	binary.BigEndian.PutUint32(info[4:], advertiseLifetime)
	binary.BigEndian.PutUint32(info[8:], advertiseLifetime)
	addr := prefix.Masked().Addr().As16()
	copy(info[16:], addr[:])
	return m
}

// waitForRoute returns once the host would send to an address from the given
// source.
func (h *Host) waitForRoute(to, source netip.Addr) error {
	for deadline := time.Now().Add(uplinkWait); ; time.Sleep(10 * time.Millisecond) {
		routes, err := h.nl.RouteGet(to.AsSlice())
		if err == nil && len(routes) > 0 {
			if src, ok := netip.AddrFromSlice(routes[0].Src); ok && src.Unmap() == source {
				return nil
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for %s to reach %s from %s: %w", h.Name, to, source, os.ErrDeadlineExceeded)
		}
	}
}
