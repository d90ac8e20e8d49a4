package darwin

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/meshhelper/meshhelper/darwin/internal/xnu"
)

// sysctlPath is sysctl(8), which only sets variables here. x/sys only has getters
// on macOS, and the alternatives to this program are a raw system call, whose
// numbers Apple doesn't promise, or a linkname into package syscall.
const sysctlPath = "/usr/sbin/sysctl"

// A Sysctl reads kernel variables with sysctl(3), which starts no process, and writes them
// with sysctl(8).
type Sysctl struct {
	r Runner
	k Kernel
}

// NewSysctl returns a Sysctl that writes through r and reads through k.
func NewSysctl(r Runner, k Kernel) *Sysctl { return &Sysctl{r, k} }

// A Family is an address family of the internet.
type Family int

// The two families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

func (f Family) String() string { return "IPv" + strconv.Itoa(int(f)) }

func (f Family) forwarding() string {
	if f == IPv6 {
		return xnu.IPv6Forwarding
	}
	return xnu.IPv4Forwarding
}

// Forwarding reports whether the kernel forwards packets of the family.
func (s *Sysctl) Forwarding(f Family) (bool, error) {
	v, err := s.get(f.forwarding())
	if err != nil {
		return false, err
	}
	n, err := strconv.ParseInt(v, 10, 32)
	if err != nil {
		return false, fmt.Errorf("read %s: %q is not a number", f.forwarding(), v)
	}
	return n != 0, nil
}

// SetForwarding turns forwarding of the family on or off, and reads it back, since
// compliance agents and other software change it, too.
//
// While it is on, macOS also accepts packets to a tunnel's address that arrive on
// other interfaces (xnu bsd/netinet/ip_input.c: the weak end system model): pair
// it with filter rules.
func (s *Sysctl) SetForwarding(ctx context.Context, f Family, on bool) error {
	assign := f.forwarding() + "=0"
	if on {
		assign = f.forwarding() + "=1"
	}
	args := []string{"-w", assign}
	_, stderr, status, err := s.r.Run(ctx, nil, sysctlPath, args...)
	if err == nil && status != 0 {
		err = failure(stderr, status, sysctlPath, args)
	}
	if err != nil {
		return fmt.Errorf("set %s: %w", assign, err)
	}
	now, err := s.Forwarding(f)
	if err != nil {
		return err
	}
	if now != on {
		return fmt.Errorf("set %s: still %v afterwards", assign, now)
	}
	return nil
}

// ClosesTunnels reports whether the kernel, while it doesn't forward, drops packets of
// the family to a tunnel's address that arrive on another interface. Macs do, unless
// told otherwise.
func (s *Sysctl) ClosesTunnels(f Family) (bool, error) {
	name := xnu.IPv4CheckInterface
	if f == IPv6 {
		name = xnu.IPv6CheckInterface
	}
	v, err := s.get(name)
	return v == "1" || v == "2", err
}

// BootSession returns the ID of this boot of the kernel, a UUID in capitals. Values that
// were saved under another ID, such as a packet filter token, are void.
func (s *Sysctl) BootSession() (string, error) {
	v, err := s.get(xnu.BootSession)
	if err == nil && v == "" {
		err = errors.New("read " + xnu.BootSession + ": empty")
	}
	return v, err
}

func (s *Sysctl) get(name string) (string, error) {
	v, err := s.k.Sysctl(name)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	return v, nil
}
