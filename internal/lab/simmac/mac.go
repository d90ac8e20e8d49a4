package simmac

// The simulated Mac: the programs that it runs, its kernel's tables, the Application
// Firewall, and its files.

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/darwin"
	"github.com/meshhelper/meshhelper/darwin/darwintest"
	"github.com/meshhelper/meshhelper/launchd"
	"github.com/meshhelper/meshhelper/launchd/launchdtest"
	"github.com/meshhelper/meshhelper/pfconf/pfsim"
)

// StockMain is the main ruleset of Apple's /etc/pf.conf. The anchor that its last line
// loads from /etc/pf.anchors/com.apple is in stockApple.
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

// Options configures a [Mac].
type Options struct {
	// Seed is for everything random: tokens and ports.
	Seed uint64 // optional
	// Root is a directory that stands for / for property lists and programs. Files of
	// this process's user count as root's.
	Root string // optional; without it there are no property lists
}

// A Mac is a simulated Mac. Its methods may be called concurrently.
type Mac struct {
	// Kernel has the interfaces, the routing table and the sysctls.
	Kernel *darwintest.Kernel
	// PF is pfctl, with the tokens.
	PF *darwintest.PF
	// Launchd is launchctl, with the services.
	Launchd *launchdtest.Launchd

	options Options
	engine  *engine

	mu      sync.Mutex
	slept   time.Duration
	tunnels map[string]*tunnel
	slow    map[string]time.Duration
	churn   churn

	fragments fragments
	wire      func(link string, packet []byte)
	local     func(packet []byte)
	sharing   []darwin.Token  // Internet Sharing's
	allowed   map[string]bool // registered with the Application Firewall
	alf       Firewall
}

// New returns a Mac that just booted, with Apple's pf rulesets and no network.
func New(o Options) *Mac {
	tokens := rand.New(rand.NewPCG(o.Seed, 1))
	m := &Mac{
		Kernel:  darwintest.NewKernel(),
		options: o,
		tunnels: map[string]*tunnel{},
		slow:    map[string]time.Duration{},
		allowed: map[string]bool{},
	}
	m.engine = newEngine(m.Kernel, rand.New(rand.NewPCG(o.Seed, 2)))
	m.PF = &darwintest.PF{
		Engine:    m.engine,
		NextToken: func() darwin.Token { return darwin.Token(tokens.Uint64()) },
	}
	m.Launchd = &launchdtest.Launchd{Files: m.propertyList, Program: m.program}
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

// firewallPath is the command of the Application Firewall.
const firewallPath = "/usr/libexec/ApplicationFirewall/socketfilterfw"

// A Firewall is the configuration and behaviour of the Application Firewall.
type Firewall struct {
	// On and BlockAll are its two settings.
	On, BlockAll bool
	// Refuses makes it register no program, with a message but exit status 0.
	Refuses bool
	// Managed makes it refuse all changes, as on a Mac with a configuration profile.
	Managed bool
	// Newer makes it print the messages of newer releases, whose --getappblocked
	// reports a program as permitted that isn't registered.
	Newer bool
}

// SetFirewall configures the Application Firewall, which is off at first. Registered
// programs stay registered.
func (m *Mac) SetFirewall(f Firewall) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.alf = f
}

// Messages of socketfilterfw (socket_vmnet PR#51, and captures of macOS 26).
const (
	notPart  = "The application is not part of the firewall\n"
	managed  = "Firewall settings cannot be modified from command line on managed Mac computers.\n"
	alfUsage = "usage: socketfilterfw ...\n"
)

// firewall runs socketfilterfw, which reports failures on stdout and exits with 0.
func (m *Mac) firewall(args []string) (stdout string, status int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch len(args) {
	case 1:
		return m.firewallState(args[0])
	case 2:
		return m.firewallProgram(args[0], args[1])
	}
	return alfUsage, 255
}

func (m *Mac) firewallState(verb string) (stdout string, status int) {
	switch verb {
	case "--getglobalstate":
		switch {
		case m.alf.On && m.alf.BlockAll:
			return "Firewall is enabled. (State = 2)\n", 0
		case m.alf.On:
			return "Firewall is enabled. (State = 1)\n", 0
		}
		return "Firewall is disabled. (State = 0)\n", 0
	case "--getblockall":
		word := "disabled"
		if m.alf.BlockAll {
			word = "enabled"
		}
		return "Firewall has block all state set to " + word + ".\n", 0
	case "--listapps":
		format, head := "%d :  %s \n \t ( %s incoming connections ) \n\n", "ALF: total number of apps = %d \n\n"
		if m.alf.Newer {
			format, head = "%d : %s \n             (%s incoming connections)\n", "Total number of apps = %d \n"
		}
		out := fmt.Sprintf(head, len(m.allowed))
		for i, program := range slices.Sorted(maps.Keys(m.allowed)) {
			word := "Block"
			if m.allowed[program] {
				word = "Allow"
			}
			out += fmt.Sprintf(format, i+1, program, word)
		}
		return out, 0
	}
	return alfUsage, 255
}

func (m *Mac) firewallProgram(verb, program string) (stdout string, status int) {
	allowed, known := m.allowed[program]
	changes := verb == "--add" || verb == "--unblockapp" || verb == "--remove"
	switch {
	case changes && m.alf.Managed:
		return managed, 0
	case changes && m.alf.Refuses:
		return notPart, 0
	case verb == "--add":
		if known {
			return "The application is already a part of the firewall\n", 0
		}
		m.allowed[program] = true
		return fmt.Sprintf("Application at path ( %s ) added to firewall\n", program), 0
	case verb == "--getappblocked" && !known && m.alf.Newer:
		return fmt.Sprintf("Incoming connection to %s is permitted.\n", program), 0
	case !known:
		return notPart, 0
	case verb == "--getappblocked":
		word := "blocked"
		if allowed {
			word = "permitted"
		}
		if m.alf.Newer {
			return fmt.Sprintf("Incoming connection to %s is %s.\n", program, word), 0
		}
		return "Incoming connection to the application is " + word + "\n", 0
	case verb == "--unblockapp":
		m.allowed[program] = true
		return "Incoming connection to the application is permitted\n", 0
	case verb == "--blockapp":
		m.allowed[program] = false
		return "Incoming connection to the application is blocked\n", 0
	case verb == "--remove":
		delete(m.allowed, program)
		return fmt.Sprintf("Application at path ( %s ) removed from firewall\n", program), 0
	}
	return alfUsage, 255
}

// Allowed reports whether the Application Firewall lets packets to a program.
func (m *Mac) Allowed(program string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.allowed[program]
}

// Hang makes a program, given by its path, hang until its caller gives up, which is after
// darwin.DefaultTimeout.
func (m *Mac) Hang(path string, hangs bool) {
	if hangs {
		m.Slow(path, math.MaxInt64)
	} else {
		m.Slow(path, 0)
	}
}

// wait waits for the time that a program takes, or until its caller gives up.
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

// Table implements darwin.Kernel.
func (m *Mac) Table(name string) ([]byte, error) { return m.Kernel.Table(name) }

// Now returns the Mac's wall clock, which advances during sleep. The monotonic clock is
// the test's.
func (m *Mac) Now() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Now().Round(0).Add(m.slept)
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

// program returns the file information of an executable below Options.Root.
func (m *Mac) program(path string) (fs.FileInfo, string, error) {
	if m.options.Root == "" {
		return nil, "", fs.ErrNotExist
	}
	file := filepath.Join(m.options.Root, path)
	info, err := os.Stat(file)
	if err != nil {
		return nil, "", err
	}
	data, err := os.ReadFile(file)
	digest := sha256.Sum256(data)
	return info, string(digest[:]), err
}

// AddEthernet adds an interface with addresses, and a default route by it for each
// router. The first router of all is also the Mac's DNS resolver. Further default routes
// of a family are scoped to their interface (RTF_IFSCOPE), as macOS makes them.
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

// Judge runs f with pf's machine, whose interfaces and clock are up to date, for uses
// that Mac has no method for. f must not keep it.
func (m *Mac) Judge(f func(*pfsim.PF)) { m.engine.do(f) }
