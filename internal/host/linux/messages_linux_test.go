package linux

import (
	"encoding/binary"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

func message(t testing.TB, attrs ...netlink.Attribute) []byte {
	t.Helper()
	b, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		t.Fatal(err)
	}
	return append(make([]byte, nfgenmsg), b...)
}

func FuzzParseRule(f *testing.F) {
	f.Add(message(f, netlink.Attribute{Type: unix.NFTA_RULE_CHAIN, Data: []byte("judge\x00")},
		netlink.Attribute{Type: unix.NFTA_RULE_EXPRESSIONS, Data: []byte{1, 2, 3}}))
	f.Add([]byte{})
	f.Add([]byte{0, 0, 0, 0, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		chain, expressions, err := parseRule(b)
		if err == nil && len(chain)+len(expressions) > len(b) {
			t.Errorf("%d bytes gave %q and %d bytes", len(b), chain, len(expressions))
		}
	})
}

func FuzzGeneration(f *testing.F) {
	f.Add(message(f, netlink.Attribute{Type: unix.NFTA_GEN_ID, Data: []byte{0, 0, 0, 7}}), uint16(unix.NFTA_GEN_ID))
	f.Add([]byte{0, 0, 0, 0, 5, 0, 1, 0, 9}, uint16(1))
	f.Fuzz(func(t *testing.T, b []byte, attr uint16) {
		if v, ok := generationAttr(b, attr); !ok && v != 0 {
			t.Errorf("nothing found, but %d", v)
		}
	})
}

func TestGeneration(t *testing.T) {
	b := message(t, netlink.Attribute{Type: unix.NFTA_GEN_ID, Data: binary.BigEndian.AppendUint32(nil, 7)},
		netlink.Attribute{Type: unix.NFTA_GEN_PROC_PID, Data: binary.BigEndian.AppendUint32(nil, 1234)})
	if v, ok := generationAttr(b, unix.NFTA_GEN_PROC_PID); !ok || v != 1234 {
		t.Errorf("process %d, %v", v, ok)
	}
}

// FuzzNexthop parses arbitrary bytes as a nexthop object.
func FuzzNexthop(f *testing.F) {
	f.Add([]byte{2, 0, 0, 0, 0, 0, 0, 0, 8, 0, 1, 0, 7, 0, 0, 0, 8, 0, 5, 0, 2, 0, 0, 0})
	f.Add([]byte{2, 0, 0, 0, 0, 0, 0, 0, 12, 0, 2, 0, 7, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, err := parseNexthop(b); err == nil && len(n.group)*nhaGroupMember > len(b) {
			t.Errorf("%d bytes gave %+v", len(b), n)
		}
	})
}
