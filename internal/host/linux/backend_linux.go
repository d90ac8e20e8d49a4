package linux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/nlconn"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// sysctlRoot is the directory of the network sysctls. The kernel shows those of the
// network namespace of the reading thread (proc(5)).
const sysctlRoot = "/proc/sys/net"

// Backend makes this Linux host enforce rulesets. Except for Watch, Others, ByOthers, Way
// and what Renderer returns, its methods must be called from one goroutine at a time. It
// belongs to the network namespace of the thread that called [New].
//
// When the context of a call ends, the call stops before its next step and closes what it
// has opened; that has a time limit of its own, closeLimit. A call that hangs in the
// kernel is abandoned, and the next call starts once it has returned.
type Backend struct {
	o Options
	// worker runs the methods that use the kernel or the fields below, on a thread in the
	// backend's network namespace. Only Limits and Renderer run on the caller's goroutine;
	// others and packets have workers of their own.
	worker *worker
	// nl is for links, addresses, routes and policy rules, xfrm for IPsec policies.
	nl     *nlconn.Handle
	xfrm   *nlconn.Handle // nil if the kernel has no IPsec
	routes *nlconn.Conn   // for requests that nl can't encode
	// outOfSync is set when a request on a socket was abandoned, so that its answer may
	// still arrive; reopen then replaces the sockets. unbind detaches the sockets from
	// the context of the running call.
	outOfSync bool
	unbind    func()

	// What is enforced, and the facts that belong to it: our table, the kernel's flows,
	// the ports of translated flows, and the forwarding flags with their journal.
	filter  *filter
	flows   *conntrack
	ports   ports
	forward *forwarding
	lock    io.Closer // nil until this process is the host's only helper

	// The mesh interface as it was requested, its name, its device (nil while it isn't open)
	// and its index, by which it is found after a rename.
	cfg  host.Interface
	name string
	dev  tun.Device
	link link
	// network opens the sockets on the mesh addresses.
	network host.KernelNetwork

	// enforced is the ruleset of the last successful Enforce; nil while the closed table
	// is loaded.
	enforced *policy.Ruleset
	// last is the ruleset that was loaded last, including that of the closed table.
	last *policy.Ruleset
	// loadedPorts is the range of ports in the table that Enforce loaded last.
	loadedPorts portRange
	// loadedParams are the parameters of that table.
	loadedParams params
	// render is the function that Renderer returns; nil while no rules are loaded. It is
	// atomic because an abandoned Enforce may still set it when Renderer is called.
	render atomic.Pointer[func(*policy.Ruleset) (anchor, text string, err error)]
	// cutOnce is set after the first Cut, which also ends flows from an earlier helper's
	// time.
	cutOnce bool
	// unbounded is set if the kernel lacks the modules that count flows and set timeouts.
	// It is atomic for the same reason as render: Limits reads it.
	unbounded atomic.Bool
	// sources is the last observed value of params.sources.
	sources map[bool]netip.Addr
	// maxFlows overrides flowsPerPeer in tests; 0: not set.
	maxFlows uint32

	// others and packets answer questions that only inform: what other software has
	// against a whole ruleset, and what happens to one packet. They share nothing with
	// the fields above but observed.
	others   others
	packets  informer
	observed observed
}

// New returns a backend without changing the host. It fails if the kernel's netlink
// sockets can't be opened.
func New(o Options) (*Backend, error) {
	if o.StateDir == "" {
		return nil, errors.New("open the host: the journal needs a state directory")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.ResolverFiles == nil {
		o.ResolverFiles = resolverFiles
	}
	if o.Step == nil {
		o.Step = func(string) {}
	}
	worker, err := newWorker()
	if err != nil {
		return nil, fmt.Errorf("open the host: %w", err)
	}
	announce := o.Step
	o.Step = func(name string) {
		worker.step.Store(name)
		o.Log.Debug("enforcing step", "step", name)
		announce(name)
	}
	p := &Backend{o: o, worker: worker, unbind: func() {}, sources: map[bool]netip.Addr{}}
	if err := p.dial(); err != nil {
		return nil, errors.Join(err, p.release())
	}
	p.others.informer = informer{task: stepOthers, sys: sysctls{sysctlRoot}, observed: &p.observed, readsFlows: true}
	p.packets = informer{task: "examine a packet", sys: sysctls{sysctlRoot}, observed: &p.observed}
	for _, i := range []*informer{&p.others.informer, &p.packets} {
		if err := i.start(); err != nil {
			return nil, errors.Join(err, p.release())
		}
	}
	p.forward = &forwarding{
		sys: sysctls{sysctlRoot}, dir: o.StateDir, writer: &journalWriter{dir: o.StateDir}, boot: bootID(), step: o.Step,
		byIndex: p.nameOf, index: p.indexOf,
	}
	return p, nil
}

// dial opens the sockets. A kernel without IPsec has no XFRM family, which isn't an
// error.
func (p *Backend) dial() (err error) {
	if p.nl, err = nlconn.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	if p.xfrm, err = nlconn.NewHandle(unix.NETLINK_XFRM); err != nil {
		p.xfrm = nil
	}
	if p.filter, err = openFilter(); err != nil {
		return err
	}
	if p.routes, err = dialRoutes(); err != nil {
		return err
	}
	if p.flows, err = openConntrack(); err != nil {
		return err
	}
	if p.ports.diag, err = nlconn.Dial(unix.NETLINK_SOCK_DIAG); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	return nil
}

// dialRoutes opens the socket for route lookups and nexthop objects.
func dialRoutes() (*nlconn.Conn, error) {
	c, err := nlconn.Dial(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return c, nil
}

// Host returns the parts of this host.
func (p *Backend) Host() host.Host {
	return host.Host{
		Name: "linux", Language: "nft", Link: p, Observer: p, Enforcer: p,
		Others: p, Judge: p, Ways: p, Renderer: p, Network: &p.network,
	}
}

// Limits implements [host.Enforcer]. Conntrack has one entry per flow, forwarded or not.
// Until its module is loaded there is no maximum to read, and the guard's memory alone
// bounds flows.
func (p *Backend) Limits() host.Limits {
	l := host.Limits{States: p.states(), PerForwarded: 1, Reassembly: p.reassembly()}
	if l.States > 0 {
		l.PerPeer = len(families) * int(p.flowsOf(l.States))
	}
	return l
}

// states returns how many entries conntrack may hold, or 0 if that can't be read.
func (p *Backend) states() int {
	text, err := p.forward.sys.read(flowMax)
	if err != nil {
		return 0
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0
	}
	return max(n, 0)
}

// reassembly returns the kernel's memory limit for reassembling fragments, in bytes: the
// smallest of the limits that apply, or 0 if one can't be read. By default it is 4 MiB
// for the whole host, which 1,676 first fragments fill for 30 s; so the guard has to
// bound what peers send. Conntrack reassembles IPv6 fragments in a memory of its own
// (net/ipv6/netfilter/nf_conntrack_reasm.c), and everything that a peer sends through the
// host passes it.
func (p *Backend) reassembly() int {
	least := 0
	for _, name := range []string{"ipv4/ipfrag_high_thresh", "ipv6/ip6frag_high_thresh", "netfilter/nf_conntrack_frag6_high_thresh"} {
		text, err := p.forward.sys.read(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without IPv6, or a module that isn't loaded
		}
		// With a threshold of 0 the kernel reassembles nothing.
		n, err := strconv.Atoi(text)
		if err != nil || n < 0 {
			return 0
		}
		if n = max(n, 1); least == 0 || n < least {
			least = n
		}
	}
	return least
}

// bootID returns the ID of this boot, which ties the journal to it: sysctls don't outlive
// a boot. It is empty if /proc can't be read.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// nameOf returns the current name of the interface with this index.
func (p *Backend) nameOf(index int) (string, bool) {
	l, err := p.nl.LinkByIndex(index)
	if err != nil {
		return "", false
	}
	return l.Attrs().Name, true
}

// indexOf returns the index of the interface with this name, or 0.
func (p *Backend) indexOf(name string) int {
	l, err := p.nl.LinkByName(name)
	if err != nil {
		return 0
	}
	return l.Attrs().Index
}

// step runs one enforcing step and names it in the error. It doesn't start the step if
// ctx has ended; steps that close are given a context of their own.
func (p *Backend) step(ctx context.Context, name string, do func() error) error {
	p.o.Step(name)
	if ctx.Err() != nil {
		return stepError(name, context.Cause(ctx))
	}
	err := do()
	p.o.Step(name)
	return stepError(name, err)
}

// stepIfNeeded runs an enforcing step that may have nothing to change. do calls begin
// before each change; the first call announces the step.
func (p *Backend) stepIfNeeded(name string, do func(begin func()) error) error {
	begun := false
	err := do(func() {
		if !begun {
			begun = true
			p.o.Step(name)
		}
	})
	if begun {
		p.o.Step(name)
	}
	return stepError(name, err)
}

// stepError wraps err in a [host.StepError] with a hint, unless it already is one.
func stepError(step string, err error) error {
	var already *host.StepError
	if err == nil || errors.As(err, &already) {
		return err
	}
	e := &host.StepError{Step: step, Err: err}
	switch {
	case errors.Is(err, fs.ErrPermission):
		e.Hint = "run the helper as root"
	case step == StepLock:
		e.Hint = "see `meshhelper status`; there is one helper per host"
	case errors.Is(err, syscall.EROFS) && step != StepJournal:
		e.Hint = "make /proc/sys/net writable in the container"
	case step == StepJournal:
		e.Hint = "make sure that the state directory is writable and its disk not full"
	}
	return e
}

// Open implements [host.Link]: it takes the lock, restores what a killed helper left,
// loads the closed table, which lets nothing of a peer pass, and creates the mesh
// interface. It may be called again after the interface was lost. After an error,
// forwarding is as it was found; the table stays, unless this was the first call and the
// host had no such table before.
func (p *Backend) Open(ctx context.Context, cfg host.Interface) (tun.Device, error) {
	if cfg.MTU < 1280 || cfg.MTU > 65535 {
		return nil, fmt.Errorf("MTU %d: want 1280 to 65535", cfg.MTU)
	}
	if cfg.Name != "" && !usableName(cfg.Name) {
		return nil, fmt.Errorf("name %q: want 1 to 15 letters, digits and . _ - @ : +", cfg.Name)
	}
	return ask(ctx, p, func() (tun.Device, error) { return p.open(ctx, cfg) })
}

// open takes the steps of Open. It undoes them after an error.
func (p *Backend) open(ctx context.Context, cfg host.Interface) (tun.Device, error) {
	fresh, err := p.takeOver(ctx)
	if err != nil {
		return nil, err
	}
	p.cfg = cfg
	err = p.step(ctx, StepClosed, func() error { return p.loadClosed(noInterface) })
	if err == nil {
		err = p.step(ctx, StepInterface, func() error { return p.makeInterface(cfg) })
	}
	if err == nil {
		return p.dev, nil
	}
	// A host that had no table before is left without one. On any other host the table
	// stays until Close, to keep packets for peers from leaving unencrypted.
	back := p.undoOpen
	if fresh {
		back = p.removeAll
	}
	return nil, errors.Join(err, p.withCloseLimit(ctx, back))
}

// noInterface stands for the mesh interface while there is none. No interface can have
// this name (dev_valid_name in net/core/dev.c refuses the colon), so another program's
// interface with the mesh interface's name isn't mistaken for it.
const noInterface = ":none:"

// takeOver takes the lock and restores the forwarding that a killed helper changed. That
// helper's table stays until ours replaces it, because it keeps packets for peers from
// leaving unencrypted. fresh reports that the lock was taken now and the host had no such
// table.
func (p *Backend) takeOver(ctx context.Context) (fresh bool, err error) {
	if p.lock != nil {
		return false, nil
	}
	err = p.step(ctx, StepLock, func() (err error) {
		p.lock, err = lock()
		return err
	})
	if err != nil {
		return false, err
	}
	err = p.step(ctx, StepRepair, func() error {
		there, err := p.filter.present()
		if err != nil {
			return err
		}
		fresh = !there
		if err := p.forward.open(); err != nil {
			return err
		}
		forgotten, err := p.forward.revertAll()
		return errors.Join(err, <-forgotten) // also removes the journal of another boot
	})
	if err != nil {
		p.unlock()
	}
	return fresh, err
}

// unlock releases the lock, if it is held.
func (p *Backend) unlock() {
	if p.lock != nil {
		p.lock.Close()
		p.lock = nil
	}
}

// loadClosed loads the closed table: that of a mesh without peers on an interface with
// this name. Forwarding may still be on when a lost mesh interface is replaced.
func (p *Backend) loadClosed(name string) error {
	mesh := policy.Mesh{Prefixes: p.cfg.Prefixes, Addresses: p.cfg.Addresses}
	host := policy.Host{Interface: name}
	if p.last != nil {
		// Keep what is known about other owners of the mesh prefix, and treat all peers
		// as former ones, so that nothing for them leaves unencrypted. At the start
		// neither is known, and nothing to the mesh prefixes leaves at all.
		host, mesh.ListenPort = p.last.Host(), p.last.Mesh().ListenPort
		host.Interface, mesh.Former = name, p.last.Mesh().Former
		for _, peer := range p.last.Peers() {
			mesh.Former = append(mesh.Former[:len(mesh.Former):len(mesh.Former)], peer.Addresses[:]...)
		}
	}
	host.FoundForwarding = p.found()
	r, err := policy.Compile(mesh, host, time.Time{})
	if err != nil {
		return err
	}
	p.enforced = nil
	with := p.params()
	if err := p.applyBounded(compile(r, with), r, with); err != nil {
		return err
	}
	p.last = r
	return nil
}

// found returns the families that the host forwarded before the helper changed anything.
func (p *Backend) found() policy.Families {
	return policy.Families{IPv4: p.forward.found4(), IPv6: p.forward.found6()}
}

// params returns the parameters of the table as the host is now.
func (p *Backend) params() params {
	return params{
		mtu: p.cfg.MTU, transit4: p.forward.transit4(p.name), bridges: p.bridges(),
		ipsec: p.xfrm != nil, uid: uint32(os.Geteuid()),
		ports: p.ports.now, around: p.ports.around, sockets: p.ports.host.boundIn(p.ports.around),
		flowsPerPeer: p.flowsPerPeer(), established: p.established(), sources: maps.Clone(p.sources),
	}
}

// bridges lists the bridges if the kernel passes bridged frames to the packet filter as
// if the host forwarded them (br_netfilter; net.bridge.bridge-nf-call-iptables and
// -ip6tables).
func (p *Backend) bridges() []string {
	on := func(name string) bool {
		v, err := p.forward.sys.read("bridge/bridge-nf-call-" + name)
		return err == nil && v != "0"
	}
	if !on("iptables") && !on("ip6tables") {
		return nil
	}
	links, err := p.nl.LinkList()
	if err != nil {
		return nil // their frames are dropped until the next observation
	}
	var out []string
	for _, l := range links {
		if l.Type() == "bridge" && usableName(l.Attrs().Name) {
			out = append(out, l.Attrs().Name)
		}
	}
	slices.Sort(out)
	return out
}

// makeInterface creates the mesh interface, and replaces one whose device is dead.
func (p *Backend) makeInterface(cfg host.Interface) (err error) {
	if p.dev != nil { // its device is dead
		if err := p.removeInterface(); err != nil {
			return err
		}
	}
	if p.dev, p.name, err = createTUN(cfg); err != nil {
		return err
	}
	p.link = link{p.nl, p.indexOf(p.name)}
	if err := restrictInterface(p.forward.sys, p.name); err != nil {
		return err
	}
	// The interface is still down: load the closed table for its name, which is known
	// only now.
	if err := p.loadClosed(p.name); err != nil {
		return err
	}
	p.network.Opened(p.name, cfg)
	return nil
}

// Observe implements [host.Observer].
func (p *Backend) Observe(ctx context.Context) (policy.Host, error) {
	return ask(ctx, p, func() (policy.Host, error) {
		h, err := p.observe()
		if err == nil {
			p.excludeBound(ctx)
		}
		return h, err
	})
}

// observe reads the facts about the host. Names in the journal are refreshed first,
// because FoundForwarding depends on them.
func (p *Backend) observe() (policy.Host, error) {
	p.forward.refresh()
	h, err := observer{p.nl, p.xfrm, p.routes, p.name, p.cfg.Addresses, p.sources}.facts()
	if err != nil {
		return policy.Host{}, fmt.Errorf("observe host: %w", err)
	}
	h.Resolvers = readResolvers(p.o.ResolverFiles)
	h.Forwarding = policy.Families{IPv4: true, IPv6: p.hasIPv6()}
	h.FoundForwarding = p.found()
	if err := p.observePorts(&h); err != nil {
		return policy.Host{}, fmt.Errorf("observe host: %w", err)
	}
	return h, nil
}

// hasIPv6 reports whether IPv6 is enabled on the mesh interface, even if another program
// renamed it.
func (p *Backend) hasIPv6() bool {
	now, ok := p.nameOf(p.link.index)
	if !ok {
		return false
	}
	v, err := p.forward.sys.read(conf("ipv6", now, "disable_ipv6"))
	return err == nil && v == "0"
}

// Enforce implements [host.Enforcer].
func (p *Backend) Enforce(ctx context.Context, r *policy.Ruleset) error {
	return p.run(ctx, func() error {
		if p.dev == nil {
			return errors.New("enforce ruleset: the mesh interface isn't open")
		}
		if got := r.Host().Interface; got != p.name {
			return fmt.Errorf("enforce ruleset: it is for interface %q, want %q", got, p.name)
		}
		err := p.enforce(ctx, r)
		if ctx.Err() != nil {
			// The caller gets an error, so r must not be in force.
			return errors.Join(err, context.Cause(ctx), p.withCloseLimit(ctx, p.failClosed))
		}
		return err
	})
}

// enforce runs the steps of Enforce in order: interface, table, stale routes, forwarding.
func (p *Backend) enforce(ctx context.Context, r *policy.Ruleset) error {
	// Load the table even if the interface failed: it may be narrower than the loaded
	// one.
	stale, linkErr := p.enforceLink(r)
	if err := errors.Join(linkErr, p.enforceTable(ctx, r)); err != nil {
		return err
	}
	if err := stale(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return stepError(StepForwarding, err)
	}
	return stepError(StepForwarding, p.forward.apply(p.need(r)))
}

// enforceLink gives the mesh interface its name, its addresses and the peers' routes. It
// returns a function that deletes the routes of removed peers, to be called after the new
// table is loaded.
func (p *Backend) enforceLink(r *policy.Ruleset) (stale func() error, err error) {
	if err := p.link.rename(p.name); err != nil {
		return nil, stepError(StepAddresses, err)
	}
	ipv6 := p.hasIPv6()
	if err := p.enforceAddresses(r, ipv6); err != nil {
		return nil, err
	}
	want := peerRoutes(r, ipv6)
	have, err := p.link.routes()
	if err == nil {
		err = p.stepIfNeeded(StepAddRoutes, func(begin func()) error { return p.link.addRoutes(have, want, begin) })
	}
	return func() error {
		return p.stepIfNeeded(StepDelRoutes, func(begin func()) error { return p.link.delRoutes(have, want, begin) })
	}, stepError(StepAddRoutes, err)
}

// enforceAddresses sets the mesh addresses, without IPv6 if the kernel has none, and
// brings the interface up.
func (p *Backend) enforceAddresses(r *policy.Ruleset, ipv6 bool) error {
	want := r.Mesh().Addresses
	if !ipv6 {
		want = slices.DeleteFunc(slices.Clone(want), netip.Addr.Is6)
	}
	err := p.stepIfNeeded(StepAddresses, func(begin func()) error { return p.link.setAddrs(want, begin) })
	if err == nil {
		err = p.link.up()
	}
	return stepError(StepAddresses, err)
}

// enforceTable makes the kernel hold the table of r, even if another program changed it.
// If that fails, it closes: nothing of a peer passes then.
func (p *Backend) enforceTable(ctx context.Context, r *policy.Ruleset) error {
	with := p.params()
	t := compile(r, with)
	loaded := func() {
		if p.unbounded.Load() { // applyBounded may have found that out just now
			with.flowsPerPeer = p.flowsPerPeer()
		}
		p.enforced, p.last, p.loadedPorts = r, r, p.ports.now
		p.renderWith(with)
	}
	if p.filter.isLoaded(t) {
		loaded()
		return nil
	}
	err := p.step(ctx, StepTable, func() error { return p.applyBounded(t, r, with) })
	switch {
	case err == nil:
		loaded()
		return nil
	case ctx.Err() != nil:
		return err // Enforce closes then
	}
	return errors.Join(err, p.withCloseLimit(ctx, p.failClosed))
}

// renderWith makes Renderer render with these parameters.
func (p *Backend) renderWith(with params) {
	p.loadedParams = with
	f := func(r *policy.Ruleset) (anchor, text string, err error) { return "", compile(r, with).String(), nil }
	p.render.Store(&f)
}

// Renderer implements [host.Renderer]. It doesn't wait for a call that hangs.
func (p *Backend) Renderer() func(*policy.Ruleset) (anchor, text string, err error) {
	if f := p.render.Load(); f != nil {
		return *f
	}
	return nil
}

// failClosed stops peers' packets after the table couldn't be loaded: it loads the closed
// table and switches forwarding off. Even if no table can be loaded the interface stays
// up. The caller closes the guard when it gets the error, and the routes by the interface
// keep the host's own packets to peers from leaving by the uplink.
func (p *Backend) failClosed() error {
	return errors.Join(stepError(StepTable, p.loadClosed(p.name)), stepError(StepRestore, p.forward.apply(need{mesh: p.name})))
}

// need returns the forwarding that a ruleset requires: as little as its permissions
// allow. Answers arrive by the uplink or, with lan, by any interface that leads to a
// network of class lan.
func (p *Backend) need(r *policy.Ruleset) need {
	n := need{mesh: p.name}
	var have mesh.Permissions
	for _, peer := range r.Peers() {
		have |= peer.Permissions
	}
	h := r.Host()
	if !have.Has(mesh.Routing) {
		return n
	}
	lan := have.Has(mesh.LAN)
	n.ipv6 = h.Forwarding.IPv6 && (h.Uplink6 != "" || lan)
	if !h.Forwarding.IPv4 || h.Uplink4 == "" && !lan {
		return n
	}
	n.ipv4 = append(n.ipv4, p.name)
	n.ipv4 = append(n.ipv4, h.Uplinks(netip.IPv4Unspecified())...)
	if lan {
		n.ipv4 = append(n.ipv4, ipv4Interfaces(h)...)
	}
	slices.Sort(n.ipv4)
	n.ipv4 = slices.Compact(n.ipv4)
	return n
}

// ipv4Interfaces lists the interfaces by which a host reaches anything over IPv4.
func ipv4Interfaces(h policy.Host) []string {
	var out []string
	add := func(iface string, a netip.Addr) {
		if iface != h.Interface && iface != "lo" && a.Is4() {
			out = append(out, iface)
		}
	}
	for _, i := range h.Interfaces {
		for _, a := range i.Addresses {
			add(i.Name, a.Addr())
		}
	}
	for _, r := range h.Routes {
		add(r.Interface, r.Prefix.Addr())
	}
	return out
}

// Close implements [host.Link]. The backend can't be used afterwards. If ctx ends in less
// than closeLimit, Close still takes that long.
func (p *Backend) Close(ctx context.Context) ([]host.Problem, error) {
	if end, ok := ctx.Deadline(); ctx.Err() != nil || ok && time.Until(end) < closeLimit {
		fresh, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
		defer cancel()
		ctx = fresh
	}
	left, err := ask(ctx, p, func() ([]host.Problem, error) {
		if _, err := p.takeOver(ctx); err != nil {
			return nil, err
		}
		left := p.leftOn()
		return left, p.withCloseLimit(ctx, p.removeAll)
	})
	if errors.Is(err, errHung) {
		return nil, err // the abandoned call still uses the sockets
	}
	return left, errors.Join(err, p.release())
}

// undoOpen cleans up after a failed Open: it restores forwarding and removes the
// interface. The table stays.
func (p *Backend) undoOpen() error {
	forgotten, err := p.restoreAndRemove()
	return errors.Join(err, stepError(StepRestore, <-forgotten))
}

// restoreAndRemove restores forwarding and removes the interface. forgotten receives the
// result of writing the journal, which closing doesn't wait for.
func (p *Backend) restoreAndRemove() (forgotten <-chan error, err error) {
	forgotten, err = p.forward.revertAll()
	err = stepError(StepRestore, err)
	if p.dev != nil {
		err = errors.Join(err, p.step(context.Background(), StepRemoveInterface, p.removeInterface))
	}
	return forgotten, err
}

// removeAll removes everything in reverse order, the table last: it must hold until the
// interface is gone.
func (p *Backend) removeAll() error {
	defer p.unlock()
	p.enforced, p.last = nil, nil
	forgotten, err := p.restoreAndRemove()
	err = errors.Join(err, p.step(context.Background(), StepRemoveTable, p.filter.remove))
	return errors.Join(err, stepError(StepRestore, <-forgotten))
}

// release closes the sockets and ends the workers.
func (p *Backend) release() error {
	p.worker.stop()
	limit, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	errs := []error{p.others.release(limit), p.packets.release(limit)}
	for _, h := range []*nlconn.Handle{p.nl, p.xfrm} {
		if h != nil {
			h.Close()
		}
	}
	if p.filter != nil {
		errs = append(errs, p.filter.close())
	}
	if p.routes != nil {
		errs = append(errs, p.routes.Close())
	}
	if p.flows != nil {
		errs = append(errs, p.flows.close())
	}
	if p.ports.diag != nil {
		errs = append(errs, p.ports.diag.Close())
	}
	return errors.Join(errs...)
}

// leftOn reports forwarding that the helper switched on and that stays on because another
// program needs it by now.
func (p *Backend) leftOn() []host.Problem {
	ours := slices.ContainsFunc(p.forward.j.Changed, func(s sysctlChange) bool { return strings.HasPrefix(s.Name, "ipv4/") })
	if !ours || !p.forward.found4() {
		return nil
	}
	return []host.Problem{{
		Step:    StepRestore,
		Message: "IPv4 forwarding stays on: another program switched it on (net.ipv4.ip_forward) while the helper ran",
		Hint:    "`sysctl -w net.ipv4.ip_forward=0` switches it off if no program needs it any more",
	}}
}

// removeInterface closes the TUN device; the kernel then deletes the interface with its
// addresses and routes.
func (p *Backend) removeInterface() error {
	p.network.Closed()
	err := p.dev.Close()
	if errors.Is(err, os.ErrClosed) {
		err = nil
	}
	p.dev = nil
	return err
}

// transit4 lists the interfaces on which IPv4 forwarding was on before the helper came,
// on a host that didn't forward as a whole.
func (f *forwarding) transit4(mesh string) []string {
	if f.found4() {
		return nil // every interface does
	}
	names, _ := f.sys.interfaces("ipv4")
	var out []string
	for _, n := range names {
		if n == "all" || n == "default" || n == mesh {
			continue
		}
		name := conf("ipv4", n, "forwarding")
		if v, err := f.sys.read(name); err == nil && v != "0" && f.j.find(name) == nil {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out
}

// revertAll restores all changed sysctls. forgotten receives the result of writing the
// journal.
func (f *forwarding) revertAll() (forgotten <-chan error, err error) {
	_, err = f.restoreMatching(func(sysctlChange) bool { return true })
	return f.writer.write(f.j), err
}
