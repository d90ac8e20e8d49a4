package linux

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/nlconn"
)

// watchSockets are the sockets of one call of Watch.
type watchSockets struct {
	route, rules *nlconn.Conn
	ipsec        *nlconn.Conn // nil if the kernel has no IPsec
}

// routeGroups are the multicast groups for everything that Observe and Inspect read:
// links, addresses, routes, policy rules and forwarding flags (netconf) of both families
// (linux/rtnetlink.h).
var routeGroups = []uint32{
	unix.RTNLGRP_LINK,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV4_NETCONF,
	unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV6_NETCONF,
}

// watchBuffer is the requested size of the sockets' receive buffers, in bytes. An overrun
// loses nothing, because it counts as a change.
const watchBuffer = 1 << 20

// openWatch opens the sockets and joins the groups.
func openWatch() (w watchSockets, err error) {
	if w.route, err = subscribe(unix.NETLINK_ROUTE, routeGroups...); err != nil {
		return watchSockets{}, err
	}
	// A route that only refers to a nexthop object changes with it, without a message of
	// its own if net.ipv4.nexthop_compat_mode is 0. The group exists since Linux 5.3.
	_ = w.route.JoinGroup(unix.RTNLGRP_NEXTHOP)
	if w.rules, err = subscribe(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES); err != nil {
		return watchSockets{}, errors.Join(err, w.route.Close())
	}
	// Without this socket an IPsec policy is seen at the next observation.
	w.ipsec, _ = subscribe(unix.NETLINK_XFRM, nl.XFRMNLGRP_POLICY)
	return w, nil
}

// close closes the sockets, which ends reads from them.
func (w watchSockets) close() error {
	err := errors.Join(w.route.Close(), w.rules.Close())
	if w.ipsec != nil {
		err = errors.Join(err, w.ipsec.Close())
	}
	return err
}

// subscribe opens a socket of a netlink family and joins groups.
func subscribe(family int, groups ...uint32) (*nlconn.Conn, error) {
	c, err := nlconn.Dial(family)
	if err != nil {
		return nil, fmt.Errorf("watch netlink %d: %w", family, err)
	}
	// A smaller buffer only overruns earlier.
	_ = c.SetReadBuffer(watchBuffer)
	for _, g := range groups {
		if err := c.JoinGroup(g); err != nil {
			c.Close()
			return nil, fmt.Errorf("join group %d of netlink %d: %w", g, family, err)
		}
	}
	return c, nil
}

// Watch implements [host.Observer]. This process's own changes of nftables don't count.
// It opens its sockets in the backend's network namespace, so it can be called again
// after an error.
func (p *Backend) Watch(ctx context.Context, changed func()) error {
	w, err := ask(ctx, p, openWatch)
	if err != nil {
		return err
	}
	changed() // for changes while no socket was open
	return w.watch(ctx, changed)
}

// watch calls changed for relevant messages until ctx ends or a socket fails, and closes
// the sockets.
func (w watchSockets) watch(ctx context.Context, changed func()) error {
	g, ctx := errgroup.WithContext(ctx)
	closed := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { closed <- w.close() })
	all := func([]netlink.Message) bool { return true }
	g.Go(func() error { return follow(ctx, w.route, changed, (&addressTracker{}).anyChange) })
	if w.ipsec != nil {
		g.Go(func() error { return follow(ctx, w.ipsec, changed, all) })
	}
	g.Go(func() error { return follow(ctx, w.rules, changed, byOthers) })
	err := g.Wait()
	if stop() {
		closed <- w.close()
	}
	<-closed
	return err
}

// maxBadMessages is how many failed reads in a row count as a failure of the socket.
const maxBadMessages = 16

// follow calls changed for messages that matter, until ctx ends or the socket fails.
// After an error, when messages may be lost, it calls matters with none and reports a
// change.
func follow(ctx context.Context, c *nlconn.Conn, changed func(), matters func([]netlink.Message) bool) error {
	for failures := 0; ; {
		ms, err := c.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.EINTR):
			matters(nil)
			changed()
		case errors.Is(err, os.ErrClosed), errors.Is(err, syscall.EBADF), err != nil && failures >= maxBadMessages:
			return fmt.Errorf("watch host: %w", err)
		case err != nil:
			// Whatever the message was, report a change.
			failures++
			matters(nil)
			changed()
		default:
			if failures = 0; matters(ms) {
				changed()
			}
		}
	}
}

// addressTracker distinguishes messages that change an address from those that only renew
// its lifetimes. The kernel sends a renewal for each router advertisement and address
// (RFC 4862 5.5.3), so otherwise any neighbour could make the helper observe the host as
// often as it likes.
type addressTracker struct {
	// known is the last message about each address, keyed by family, prefix length,
	// interface and address.
	known map[string]string
}

// maxKnownAddresses bounds the map. A host with more addresses is observed more often.
const maxKnownAddresses = 4096

// anyChange reports whether any of the messages is more than a renewal. It is called
// without messages when some were lost.
func (n *addressTracker) anyChange(ms []netlink.Message) bool {
	if len(ms) == 0 || len(n.known) > maxKnownAddresses {
		n.known = nil
	}
	changed := len(ms) == 0
	for _, m := range ms { // each of them, as isRenewal also remembers
		changed = !n.isRenewal(m) || changed
	}
	return changed
}

// isRenewal reports whether a message repeats what is known about an address, except for
// lifetimes.
func (n *addressTracker) isRenewal(m netlink.Message) bool {
	if m.Header.Type != unix.RTM_NEWADDR && m.Header.Type != unix.RTM_DELADDR || len(m.Data) < unix.SizeofIfAddrmsg {
		return false
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[unix.SizeofIfAddrmsg:])
	if err != nil {
		return false
	}
	// The key is family, prefix length and interface of struct ifaddrmsg
	// (linux/if_addr.h); flags and scope are between them.
	head := m.Data[:unix.SizeofIfAddrmsg]
	key, told := string(head[:2])+string(head[4:]), string(head)
	for ad.Next() {
		switch ad.Type() {
		case unix.IFA_CACHEINFO: // the lifetimes
			continue
		case unix.IFA_ADDRESS, unix.IFA_LOCAL:
			key += string(ad.Bytes())
		}
		told += fmt.Sprintf("%d %x\n", ad.Type(), ad.Bytes())
	}
	if ad.Err() != nil {
		return false
	}
	if m.Header.Type == unix.RTM_DELADDR {
		delete(n.known, key)
		return false
	}
	if n.known[key] == told {
		return true
	}
	if n.known == nil {
		n.known = map[string]string{}
	}
	n.known[key] = told
	return false
}

// newGeneration is the message that ends each transaction of nftables. It has the number
// of the process (NFTA_GEN_PROC_PID in linux/netfilter/nf_tables.h).
const newGeneration = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN

// byOthers reports whether another process made any of the transactions.
func byOthers(ms []netlink.Message) bool {
	for _, m := range ms {
		if m.Header.Type != newGeneration {
			continue
		}
		if pid, ok := generationAttr(m.Data, unix.NFTA_GEN_PROC_PID); !ok || int(pid) != os.Getpid() {
			return true
		}
	}
	return false
}

// nfgenmsg is the size of struct nfgenmsg, the header before netfilter's attributes, in
// bytes (linux/netfilter/nfnetlink.h).
const nfgenmsg = 4

// generationAttr returns a numeric attribute of a message about a generation.
func generationAttr(b []byte, attr uint16) (uint32, bool) {
	if len(b) < nfgenmsg {
		return 0, false
	}
	ad, err := netlink.NewAttributeDecoder(b[nfgenmsg:])
	if err != nil {
		return 0, false
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		if ad.Type() == attr && len(ad.Bytes()) == 4 {
			return ad.Uint32(), true
		}
	}
	return 0, false
}
