package darwin_test

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/darwin/darwintest"
	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
)

// TestEphemeralPorts reads the ephemeral ranges, also one that the kernel counts down,
// and refuses invalid values.
func TestEphemeralPorts(t *testing.T) {
	k := darwintest.NewKernel()
	s := darwin.NewSysctl(k, k)
	if got, err := s.EphemeralPorts(); err != nil || !slices.Equal(got, []darwin.PortRange{{49152, 65535}, {49152, 65535}}) {
		t.Errorf("the default ranges are %v, %v", got, err)
	}
	k.SetVariable(xnu.PortFirst, "60000") // first above last: the kernel counts down
	k.SetVariable(xnu.PortLast, "30000")
	if got, err := s.EphemeralPorts(); err != nil || got[0] != (darwin.PortRange{30000, 60000}) {
		t.Errorf("the range downwards is %v, %v", got, err)
	}
	for _, bad := range []string{"", "65536", "-1", "x"} {
		k.SetVariable(xnu.PortFirst, bad)
		if got, err := s.EphemeralPorts(); err == nil {
			t.Errorf("%q: %v", bad, got)
		}
	}
}

// TestReadSockets reads the ports of all sockets: each once, and none of a closed socket.
func TestReadSockets(t *testing.T) {
	k := darwintest.NewKernel()
	if s, err := darwin.ReadSockets(k); err != nil || len(s.TCP) != 0 || !slices.Equal(s.UDP, []uint16{5353}) {
		t.Errorf("at first: %v, %v", s, err)
	}
	k.BindUDP(500)
	k.BindUDP(41641)
	k.BindUDP(41641) // a second socket with the same port
	closed := k.BindUDP(4500)
	k.BindTCP(22)
	closed()
	s, err := darwin.ReadSockets(k)
	if err != nil || !slices.Equal(s.UDP, []uint16{500, 5353, 41641}) || !slices.Equal(s.TCP, []uint16{22}) {
		t.Errorf("the bound ports are %v, %v", s, err)
	}
	k.Boot()
	if s, err := darwin.ReadSockets(k); err != nil || len(s.TCP) != 0 || !slices.Equal(s.UDP, []uint16{5353}) {
		t.Errorf("after a boot: %v, %v", s, err)
	}
}

// TestSocketListsRefused parses lists that no kernel returns: a malformed list is an
// error, not an empty one.
func TestSocketListsRefused(t *testing.T) {
	k := darwintest.NewKernel()
	k.BindUDP(500)
	good, err := k.Table(xnu.UDPSockets)
	if err != nil {
		t.Fatal(err)
	}
	for n := range good[:len(good)-xnu.SizeXinpgen+xnu.SocketAlignment] {
		if ports, err := darwin.ParseSockets(good[:n]); err == nil {
			t.Errorf("%d of %d bytes: %v", n, len(good), ports)
		}
	}
	long := slices.Clone(good)
	binary.LittleEndian.PutUint32(long[xnu.SizeXinpgen:], 1<<31)
	if ports, err := darwin.ParseSockets(long); err == nil {
		t.Errorf("a struct that exceeds the list: %v", ports)
	}
}

func FuzzSockets(f *testing.F) {
	k := darwintest.NewKernel()
	k.BindUDP(500)
	k.BindUDP(51820)
	b, err := k.Table(xnu.UDPSockets)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		ports, err := darwin.ParseSockets(b)
		if err != nil && ports != nil || slices.Contains(ports, 0) || !slices.IsSorted(ports) || len(ports) > len(b)/xnu.MinXinpcb {
			t.Errorf("%v, %v", ports, err)
		}
	})
}
