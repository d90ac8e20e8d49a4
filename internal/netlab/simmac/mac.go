package simmac

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/launchd"
	"github.com/meshhelper/meshhelper/pfconf"
)

// StockMain is the main ruleset that /etc/pf.conf of macOS loads at boot. Its last
// line, which loads /etc/pf.anchors/com.apple, stands in stockApple.
const StockMain = `scrub-anchor "com.apple/*"
nat-anchor "com.apple/*"
rdr-anchor "com.apple/*"
dummynet-anchor "com.apple/*"
anchor "com.apple/*"
`

// stockApple is /etc/pf.anchors/com.apple.
const stockApple = `anchor "200.AirDrop/*"
anchor "250.ApplicationFirewall/*"
`

// Options of New.
type Options struct {
	// Seed of everything that is left to chance: tokens, ports.
	Seed uint64 // optional
	// Root is a directory that stands for / where property lists are concerned.
	// What belongs to this process's user there counts as root's.
	Root string // optional; without it there are no property lists
}

// A Mac is a simulated Mac. Its methods may be called at the same time.
type Mac struct {
	// Kernel has the interfaces, the routing table and the kernel variables.
	Kernel *darwin.FakeKernel
	// PF is pfctl and the tokens.
	PF *darwin.FakePF
	// Launchd is launchctl and the services.
	Launchd *launchd.Fake

	options Options
	engine  *engine
	booted  time.Time

	mu      sync.Mutex
	slept   time.Duration
	tunnels map[string]*tunnel
	slow    map[string]time.Duration
	churn   churn

	fragments fragments
	wire      func(link string, packet []byte)
	local     func(packet []byte)
	sharing   []darwin.Token // Internet Sharing's
	allowed   map[string]bool
}

// New returns a Mac that was just booted, with the stock packet filter and no
// network.
func New(o Options) *Mac {
	tokens := rand.New(rand.NewPCG(o.Seed, 1))
	m := &Mac{
		Kernel:  darwin.NewFakeKernel(),
		options: o,
		booted:  time.Now(),
		tunnels: map[string]*tunnel{},
		slow:    map[string]time.Duration{},
		allowed: map[string]bool{},
	}
	m.engine = newEngine(m.Kernel, rand.New(rand.NewPCG(o.Seed, 2)))
	m.PF = &darwin.FakePF{
		Engine:    m.engine,
		NextToken: func() darwin.Token { return darwin.Token(tokens.Uint64()) },
	}
	m.Launchd = &launchd.Fake{Files: m.propertyList}
	return m
}

// Run implements darwin.Runner and launchd.Runner.
func (m *Mac) Run(ctx context.Context, stdin []byte, path string, args ...string) ([]byte, []byte, int, error) {
	if err := m.wait(ctx, path); err != nil {
		return nil, nil, -1, fmt.Errorf("run %s: %w", path, err)
	}
	if path == firewallPath {
		stdout, status := m.firewall(args)
		return []byte(stdout), nil, status, ctx.Err()
	}
	for _, r := range []darwin.Runner{m.PF, m.Kernel, m.Launchd} {
		stdout, stderr, status, err := r.Run(ctx, stdin, path, args...)
		if !errors.Is(err, exec.ErrNotFound) {
			return stdout, stderr, status, err
		}
	}
	return nil, nil, -1, &exec.Error{Name: path, Err: exec.ErrNotFound}
}

// firewallPath is the program of the Application Firewall.
const firewallPath = "/usr/libexec/ApplicationFirewall/socketfilterfw"

// firewall knows the three verbs by which programs are registered. It tells of
// failures on stdout and exits 0 all the same.
func (m *Mac) firewall(args []string) (stdout string, status int) {
	if len(args) != 2 {
		return "usage: socketfilterfw ...\n", 255
	}
	verb, program := args[0], args[1]
	m.mu.Lock()
	defer m.mu.Unlock()
	_, known := m.allowed[program]
	switch {
	case verb == "--add":
		if !known {
			m.allowed[program] = false
		}
		return fmt.Sprintf("Application at path ( %s ) added to firewall\n", program), 0
	case !known:
		return "The application is not part of the firewall\n", 0
	case verb == "--unblockapp":
		m.allowed[program] = true
		return fmt.Sprintf("Incoming connection to the application at ( %s ) is permitted\n", program), 0
	case verb == "--remove":
		delete(m.allowed, program)
		return fmt.Sprintf("Application at path ( %s ) removed from firewall\n", program), 0
	}
	return "usage: socketfilterfw ...\n", 255
}

// Allowed reports whether the Application Firewall lets packets to a program.
func (m *Mac) Allowed(program string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.allowed[program]
}

// Hang makes a program, by its path, do nothing until its caller gives up, which
// is after darwin.DefaultTimeout.
func (m *Mac) Hang(path string, hangs bool) {
	if hangs {
		m.Slow(path, math.MaxInt64)
	} else {
		m.Slow(path, 0)
	}
}

// wait waits as long as the program takes, or until its caller gives up.
func (m *Mac) wait(ctx context.Context, path string) error {
	m.mu.Lock()
	d := m.slow[path]
	m.mu.Unlock()
	if d == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, darwin.DefaultTimeout)
	defer cancel()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Interfaces implements darwin.Kernel.
func (m *Mac) Interfaces() ([]byte, error) { return m.Kernel.Interfaces() }

// Routes implements darwin.Kernel.
func (m *Mac) Routes() ([]byte, error) { return m.Kernel.Routes() }

// OpenRoute implements darwin.Kernel.
func (m *Mac) OpenRoute() (io.ReadWriteCloser, error) { return m.Kernel.OpenRoute() }

// Sysctl implements darwin.Kernel.
func (m *Mac) Sysctl(name string) (string, error) { return m.Kernel.Sysctl(name) }

// Clock is the Mac's: the wall clock runs on through sleep.
func (m *Mac) Clock() darwin.Clock {
	return func() (time.Time, time.Duration) {
		m.mu.Lock()
		defer m.mu.Unlock()
		return time.Now().Round(0).Add(m.slept), time.Since(m.booted)
	}
}

// propertyList reads a file below Options.Root.
func (m *Mac) propertyList(path string) (launchd.File, []byte, error) {
	if m.options.Root == "" {
		return launchd.File{}, nil, fs.ErrNotExist
	}
	file := filepath.Join(m.options.Root, path)
	f, err := launchd.Lstat(file)
	if err != nil {
		return launchd.File{}, nil, err
	}
	f.Path = path
	if f.UID == uint32(os.Geteuid()) {
		f.UID = 0
	}
	data, err := os.ReadFile(file)
	return f, data, err
}

// AddEthernet adds an interface with its addresses, and if a router is given the
// default route by it. The first router of all is also the resolver. Further defaults of a family are scoped, as macOS makes
// them.
func (m *Mac) AddEthernet(name string, addresses []string, routers ...string) error {
	flags := darwin.InterfaceUp | darwin.InterfaceBroadcast | darwin.InterfaceRunning | darwin.InterfaceMulticast
	index := m.Kernel.AddInterface(name, flags, 1500)
	for _, a := range addresses {
		p, err := netip.ParsePrefix(a)
		if err == nil {
			err = m.Kernel.AddAddress(name, p)
		}
		if err != nil {
			return fmt.Errorf("add %s to %s: %w", a, name, err)
		}
	}
	for _, r := range routers {
		if err := m.addDefault(index, r); err != nil {
			return fmt.Errorf("add default route by %s: %w", r, err)
		}
		if len(m.Kernel.DNS()) == 0 {
			m.Kernel.SetResolvers([]darwin.Resolver{{Servers: []netip.Addr{netip.MustParseAddr(r)}, Interface: name}})
		}
	}
	return nil
}

func (m *Mac) addDefault(index int, router string) error {
	gateway, err := netip.ParseAddr(router)
	if err != nil {
		return err
	}
	all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if gateway.Is6() {
		all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	r := darwin.Route{Dst: all, Gateway: gateway, Index: index,
		Flags: darwin.RouteUp | darwin.RouteGateway | darwin.RouteStatic}
	if err := m.Kernel.AddRoute(r); err == nil {
		return nil
	}
	r.Flags |= darwin.RouteScoped
	return m.Kernel.AddRoute(r)
}

// Judge runs f with pf's machine, whose interfaces and clock are up to date, for
// what isn't offered here. f must not keep it.
func (m *Mac) Judge(f func(*pfconf.Machine)) { m.engine.do(f) }
