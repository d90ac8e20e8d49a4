package linux

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// transaction collects changes of nftables and sends them as one batch. The library
// encodes tables, chains, sets and elements; rules and timeouts are encoded here, because
// they contain expressions that the library doesn't know.
type transaction struct {
	// Conn encodes but never sends: what it would send goes to captured.
	*nftables.Conn
	captured *[]netlink.Message
	wire     *netlink.Conn
}

// errCaptured ends the library's own sending.
var errCaptured = errors.New("the message was captured")

// newTransaction opens the socket for transactions.
func newTransaction() (transaction, error) {
	t := transaction{captured: new([]netlink.Message)}
	var err error
	t.Conn, err = nftables.New(nftables.WithTestDial(func(ms []netlink.Message) ([]netlink.Message, error) {
		for _, m := range ms {
			if m.Header.Type != unix.NFNL_MSG_BATCH_BEGIN && m.Header.Type != unix.NFNL_MSG_BATCH_END {
				*t.captured = append(*t.captured, m)
			}
		}
		return nil, errCaptured
	}))
	if err != nil {
		return t, err
	}
	if t.wire, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
		return t, err
	}
	if err = errors.Join(t.wire.SetWriteBuffer(sendBuffer), t.wire.SetReadBuffer(receiveBuffer)); err != nil {
		return t, errors.Join(err, t.wire.Close())
	}
	return t, nil
}

// capture moves what the library has encoded so far to captured, so that the order is
// kept.
func (t *transaction) capture() error {
	if err := t.Conn.Flush(); err != nil && !errors.Is(err, errCaptured) {
		return err
	}
	return nil
}

// discard drops everything that was collected.
func (t *transaction) discard() error {
	err := t.capture()
	*t.captured = nil
	return err
}

// addRule appends a rule to a chain of our table.
func (t *transaction) addRule(r rule, chain string) error {
	if err := t.capture(); err != nil {
		return err
	}
	m, err := ruleMessage(r, chain)
	if err != nil {
		return fmt.Errorf("rule %q: %w", r, err)
	}
	*t.captured = append(*t.captured, m)
	return nil
}

// ruleMessage encodes a rule (NFT_MSG_NEWRULE of linux/netfilter/nf_tables.h).
func ruleMessage(r rule, chain string) (netlink.Message, error) {
	es, err := exprs(r)
	if err != nil {
		return netlink.Message{}, err
	}
	list := make([]netlink.Attribute, len(es))
	for i, e := range es {
		b, err := e.marshal()
		if err != nil {
			return netlink.Message{}, err
		}
		list[i] = netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: b}
	}
	body, err := netlink.MarshalAttributes(list)
	if err != nil {
		return netlink.Message{}, err
	}
	attrs := []netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: append([]byte(tableName), 0)},
		{Type: unix.NFTA_RULE_CHAIN, Data: append([]byte(chain), 0)},
		{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: body},
	}
	if r.comment != "" {
		attrs = append(attrs, netlink.Attribute{Type: unix.NFTA_RULE_USERDATA,
			Data: userdata.AppendString(nil, userdata.TypeComment, r.comment)})
	}
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return netlink.Message{}, err
	}
	return netlink.Message{
		Header: netlink.Header{
			Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWRULE,
			Flags: netlink.Request | netlink.Acknowledge | netlink.Create | netlink.Append,
		},
		Data: append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, data...),
	}, nil
}

// addTimeouts adds timeouts to our table (NFT_MSG_NEWOBJ).
func (t *transaction) addTimeouts(o timeouts) error {
	if err := t.capture(); err != nil {
		return err
	}
	m, err := timeoutsMessage(o)
	if err != nil {
		return fmt.Errorf("timeouts %s: %w", o.name, err)
	}
	*t.captured = append(*t.captured, m)
	return nil
}

// Attributes of a timeouts object (linux/netfilter/nf_tables.h).
const (
	timeoutL3Proto = 1 // NFTA_CT_TIMEOUT_L3PROTO
	timeoutL4Proto = 2 // NFTA_CT_TIMEOUT_L4PROTO
	timeoutData    = 3 // NFTA_CT_TIMEOUT_DATA
)

// timeoutsMessage encodes a ct timeout object.
func timeoutsMessage(o timeouts) (netlink.Message, error) {
	list := make([]netlink.Attribute, len(o.states))
	for i, s := range o.states {
		list[i] = netlink.Attribute{Type: s.number, Data: binary.BigEndian.AppendUint32(nil, uint32(s.idle.Seconds()))}
	}
	states, err := netlink.MarshalAttributes(list)
	if err != nil {
		return netlink.Message{}, err
	}
	object, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: timeoutL3Proto, Data: append([]byte{0}, o.nfproto.bytes...)},
		{Type: timeoutL4Proto, Data: o.proto.bytes},
		{Type: unix.NLA_F_NESTED | timeoutData, Data: states},
	})
	if err != nil {
		return netlink.Message{}, err
	}
	data, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_OBJ_TABLE, Data: append([]byte(tableName), 0)},
		{Type: unix.NFTA_OBJ_NAME, Data: append([]byte(o.name), 0)},
		{Type: unix.NFTA_OBJ_TYPE, Data: binary.BigEndian.AppendUint32(nil, objectCtTimeout)},
		{Type: unix.NLA_F_NESTED | unix.NFTA_OBJ_DATA, Data: object},
	})
	if err != nil {
		return netlink.Message{}, err
	}
	return netlink.Message{
		Header: netlink.Header{
			Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWOBJ,
			Flags: netlink.Request | netlink.Acknowledge | netlink.Create,
		},
		Data: append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, data...),
	}, nil
}

// send sends everything collected as one transaction and returns the kernel's errors.
func (t *transaction) send() error {
	err := t.capture()
	ms := *t.captured
	*t.captured = nil
	if err != nil || len(ms) == 0 {
		return err
	}
	edge := func(kind netlink.HeaderType) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: kind, Flags: netlink.Request},
			Data: []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}}
	}
	if err := t.drain(); err != nil {
		return err
	}
	batch := append([]netlink.Message{edge(unix.NFNL_MSG_BATCH_BEGIN)}, ms...)
	for i := range batch {
		batch[i].Header.Sequence, batch[i].Header.PID, batch[i].Header.Length = 0, 0, 0
	}
	if _, err := t.wire.SendMessages(append(batch, edge(unix.NFNL_MSG_BATCH_END))); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	var failed error
	for _, m := range ms {
		if m.Header.Flags&netlink.Acknowledge == 0 {
			continue
		}
		// The kernel reports these once for the whole batch.
		_, err := t.wire.Receive()
		if errors.Is(err, os.ErrPermission) || errors.Is(err, syscall.ENOBUFS) {
			return err
		}
		failed = errors.Join(failed, err)
	}
	return failed
}

// drain drops leftover answers to an earlier transaction. Without CAP_NET_ADMIN the
// kernel answers a batch once, but if another program owns the table it answers each
// message. drain never waits.
func (t *transaction) drain() error {
	raw, err := t.wire.SyscallConn()
	if err != nil {
		return fmt.Errorf("drop old answers: %w", err)
	}
	b := make([]byte, os.Getpagesize())
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		for {
			_, _, failed = unix.Recvfrom(int(fd), b, unix.MSG_DONTWAIT)
			switch failed {
			case nil, unix.EINTR, unix.ENOBUFS:
				continue
			case unix.EAGAIN:
				failed = nil
			}
			return true
		}
	})
	if err = errors.Join(err, failed); err != nil {
		return fmt.Errorf("drop old answers: %w", err)
	}
	return nil
}
