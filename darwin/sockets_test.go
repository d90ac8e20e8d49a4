package darwin

import (
	"encoding/binary"
	"slices"
	"testing"
)

func TestEphemeralPorts(t *testing.T) {
	k := NewFakeKernel()
	s := NewSysctl(k, k)
	if got, err := s.EphemeralPorts(); err != nil || !slices.Equal(got, []PortRange{{49152, 65535}, {49152, 65535}}) {
		t.Errorf("%v, %v", got, err)
	}
	k.SetVariable(portFirst, "60000") // downwards
	k.SetVariable(portLast, "30000")
	if got, err := s.EphemeralPorts(); err != nil || got[0] != (PortRange{30000, 60000}) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range []string{"", "65536", "-1", "x"} {
		k.SetVariable(portFirst, bad)
		if got, err := s.EphemeralPorts(); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

func TestReadSockets(t *testing.T) {
	k := NewFakeKernel()
	if s, err := ReadSockets(k); err != nil || len(s.TCP) != 0 || !slices.Equal(s.UDP, []uint16{5353}) {
		t.Errorf("at first %v, %v", s, err)
	}
	k.BindUDP(500)
	k.BindUDP(41641)
	k.BindUDP(41641) // by another socket
	closed := k.BindUDP(4500)
	k.BindTCP(22)
	closed()
	s, err := ReadSockets(k)
	if err != nil || !slices.Equal(s.UDP, []uint16{500, 5353, 41641}) || !slices.Equal(s.TCP, []uint16{22}) {
		t.Errorf("%v, %v", s, err)
	}
	k.Boot()
	if s, err := ReadSockets(k); err != nil || len(s.TCP) != 0 || !slices.Equal(s.UDP, []uint16{5353}) {
		t.Errorf("after a boot %v, %v", s, err)
	}
}

// TestSocketListsRefused has lists that no kernel gives: a wrong one isn't taken for
// one without sockets.
func TestSocketListsRefused(t *testing.T) {
	k := NewFakeKernel()
	k.BindUDP(500)
	good, err := k.Table(udpSockets)
	if err != nil {
		t.Fatal(err)
	}
	for n := range good[:len(good)-sizeXinpgen+socketAlignment] {
		if ports, err := parseSockets(good[:n]); err == nil {
			t.Errorf("%d of %d bytes: %v", n, len(good), ports)
		}
	}
	long := slices.Clone(good)
	binary.LittleEndian.PutUint32(long[sizeXinpgen:], 1<<31)
	if ports, err := parseSockets(long); err == nil {
		t.Errorf("a struct beyond the end: %v", ports)
	}
}

func FuzzSockets(f *testing.F) {
	k := NewFakeKernel()
	k.BindUDP(500)
	k.BindUDP(51820)
	b, err := k.Table(udpSockets)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		ports, err := parseSockets(b)
		if err != nil && ports != nil || slices.Contains(ports, 0) || !slices.IsSorted(ports) || len(ports) > len(b)/minXinpcb {
			t.Errorf("%v, %v", ports, err)
		}
	})
}
