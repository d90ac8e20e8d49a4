package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/stock"
)

// peerAddOptions are the flags of peer add.
type peerAddOptions struct {
	app *app

	name, publicKey, endpoint string
	own, external, qr         bool
	addresses, allow          []string
	keepalive, limit          time.Duration
	timed, pinged             bool // whether limit and keepalive were given
	tunnel, output            string

	file *outputFile // nil: the configuration goes to standard output
	was  *api.Peer   // what a peer was that gets another key, else nil
}

const outputUsage = "write the configuration to a new `FILE` that only its owner can read, and never over one that exists"

func newPeerAddCommand(a *app) *cobra.Command {
	o := &peerAddOptions{app: a}
	c := &cobra.Command{
		Use: "add NAME", Short: "Add a peer, and print its configuration",
		Long: `Add a peer. Without --public-key a key is made here, and a configuration for a
stock WireGuard app is printed, once: the private key is kept nowhere. Write it to a
file with --output FILE. What can't be written isn't added.

The configuration sends everything through this host where the peer may route, and
else what is for this host. With --tunnel split it is what is for this host and, for a
peer that may route and reach its networks (lan), for these.

PERMISSIONS are, separated by commas,
` + permissionsHelp(),
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			if o.publicKey == "" && c.Flags().Changed("public-key") {
				return usagef("--public-key is empty; without it a key is made here")
			}
			o.timed, o.pinged = c.Flags().Changed("for"), c.Flags().Changed("keepalive")
			return addPeer(c.Context(), o)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := c.Flags()
	f.StringVar(&o.publicKey, "public-key", "", "the peer's own `KEY`, in base64")
	f.BoolVar(&o.own, "own", false, "a device of yours; it may connect to this host")
	f.BoolVar(&o.external, "external", false, "another person's device (the default)")
	f.StringSliceVar(&o.addresses, "address", nil, "mesh `ADDRESS`, one per family (derived from the key)")
	f.StringVar(&o.endpoint, "endpoint", "", "`HOST:PORT` where the peer is reached")
	f.DurationVar(&o.keepalive, "keepalive", 0, "send something this often, such as 25s")
	f.StringSliceVar(&o.allow, "allow", nil, "`PERMISSIONS` besides the kind's: "+strings.Join(mesh.PermissionNames(), ", "))
	f.Var(durationFlag(&o.limit), "for", "how long the permissions of --allow hold, such as 30m, 2h, 1d or 1w; without, for good")
	f.StringVar(&o.tunnel, "tunnel", "", "what the configuration sends here: full or split (what the peer may)")
	f.StringVar(&o.output, "output", "", outputUsage)
	f.BoolVar(&o.qr, "qr", false, "print the configuration as a QR code, too")
	return c
}

// keyTries is how often a key is drawn again because another command added a peer
// with its address in the meantime.
const keyTries = 3

func addPeer(ctx context.Context, o *peerAddOptions) (err error) {
	request, err := o.request()
	if err != nil {
		return err
	}
	surviveClosedPipe()
	was, failed := o.app.client().Peer(ctx, o.name)
	known := failed == nil && was.Name == o.name
	if known && o.qr {
		return noQR(o.name)
	}
	if err := o.create(); err != nil {
		return err
	}
	defer func() { err = o.end(err) }()
	if o.publicKey != "" || known {
		if known && o.publicKey == "" {
			// The same peer, unless the helper finds something that differs.
			request.PublicKey = was.PublicKey
		}
		changed, err := o.app.client().AddPeer(ctx, request)
		return o.answer(ctx, changed, mesh.PrivateKey{}, err, nil)
	}
	for try := 1; ; try++ {
		private, err := o.app.drawKey(ctx, len(o.addresses) == 0)
		if err != nil {
			return err
		}
		request.PublicKey = private.Public().String()
		// From here on it may be added, so that the command goes on to its end.
		ctx, stop := unbroken(ctx)
		defer stop()
		changed, err := o.app.client().AddPeer(ctx, request)
		var refused *api.Error
		if errors.As(err, &refused) && refused.Code == api.CodeAddressTaken && len(o.addresses) == 0 && try < keyTries {
			continue
		}
		return o.answer(ctx, changed, private, err, func(ctx context.Context) (string, error) {
			_, err := o.app.client().RemovePeer(ctx, request.PublicKey)
			return o.name + " isn't added", err
		})
	}
}

// unbrokenLimit bounds a change that signals don't break off, and its answer: a helper
// answers in seconds.
const unbrokenLimit = 2 * time.Minute

// unbroken returns a context that a signal doesn't end: what is interrupted in a
// change of keys would leave a peer whose private key was shown to no one.
func unbroken(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), unbrokenLimit)
}

// request turns the flags into the body of the request, without a generated
// key.
func (o *peerAddOptions) request() (api.NewPeer, error) {
	r := api.NewPeer{
		Name: o.name, PublicKey: o.publicKey, Addresses: o.addresses, Endpoint: o.endpoint,
		Permissions: map[string]api.PermissionChange{}, Tunnel: o.tunnel,
	}
	switch {
	case o.tunnel != "" && o.tunnel != mesh.TunnelFull && o.tunnel != mesh.TunnelSplit:
		return r, usagef("--tunnel %q is unknown: it is full or split", o.tunnel)
	case o.publicKey != "" && o.qr:
		return r, usagef("--qr needs the private key, which is with the one that made --public-key; without --public-key a key is made here")
	case o.timed && o.limit <= 0:
		return r, usagef("--for %v ends before it begins", o.limit)
	case o.timed && len(o.allow) == 0:
		return r, usagef("--for says how long the permissions of --allow hold, and there is no --allow")
	case o.own && o.external:
		return r, usagef("--own and --external exclude each other")
	case o.own:
		r.Kind = mesh.Own
	case o.external:
		r.Kind = mesh.External
	}
	if o.pinged {
		r.Keepalive = o.keepalive.String()
	}
	wanted, err := parsePermissions(o.allow)
	if err != nil {
		return r, err
	}
	for _, one := range wanted {
		c := api.PermissionChange{Allowed: true}
		if o.timed {
			c.For = new(shortDuration(o.limit))
		}
		r.Permissions[one.Name] = c
	}
	return r, nil
}

// drawKey makes a private key here. Where its addresses are to be derived, it
// is one whose addresses are free.
func (a *app) drawKey(ctx context.Context, derived bool) (mesh.PrivateKey, error) {
	s, err := a.client().Status(ctx)
	if err != nil {
		return mesh.PrivateKey{}, err
	}
	if !derived {
		return mesh.GeneratePrivateKey(a.random)
	}
	prefixes, err := prefixesOf(s)
	if err != nil {
		return mesh.PrivateKey{}, err
	}
	taken := addressSet(s)
	key, _, err := prefixes.GenerateFree(a.random, func(a netip.Addr) bool { return taken[a] })
	if errors.Is(err, mesh.ErrMeshFull) {
		return key, api.Errorf(api.CodeMeshFull, "the mesh is full: %v", err).
			WithHint("remove a peer, or take larger mesh prefixes: meshhelper settings mesh-prefix4 PREFIX")
	}
	return key, err
}

func prefixesOf(s api.Status) (mesh.Prefixes, error) {
	if len(s.MeshPrefixes) != 2 {
		return mesh.Prefixes{}, errors.New("the helper didn't say its mesh prefixes")
	}
	p := mesh.Prefixes{V4: s.MeshPrefixes[0], V6: s.MeshPrefixes[1]}
	return p, p.Validate()
}

// answer says what was added or changed, and prints its configuration. A peer that is
// saved but not in force yet, or in force but not saved, needs its private key just the
// same: it is never shown again. Where a new key can't be written the change is taken
// back by undo, for the configuration would be lost, and a peer would be left that
// no device can be.
func (o *peerAddOptions) answer(ctx context.Context, changed api.Changed, private mesh.PrivateKey, err error, undo func(context.Context) (string, error)) error {
	var refused *api.Error
	half := errors.As(err, &refused) && (refused.Code == api.CodeNotInForce || refused.Code == api.CodeNotSaved)
	if err != nil && (!half || private.IsZero()) {
		return err
	}
	peer := changed.Peer
	if half {
		var failed error
		peer, failed = o.app.client().Peer(ctx, o.name)
		if refused.Code == api.CodeNotSaved && (failed != nil || peer.PublicKey != private.Public().String()) {
			return err // nothing was changed
		}
		if failed != nil {
			return errors.Join(err, failed)
		}
		changed.Peer = peer
	}
	failed := o.write(ctx, changed, private, half)
	if failed == nil {
		return err
	}
	if private.IsZero() || o.file != nil && o.file.done {
		return errors.Join(err, failed) // nothing is lost
	}
	said, notUndone := undo(ctx)
	if notUndone != nil {
		return errors.Join(err, &takenBack{fmt.Errorf("the configuration of %s couldn't be written: %w; what was printed of it isn't whole, and taking the change back failed, too: %w; "+
			"make a new key with: meshhelper peer rekey %s", o.name, failed, notUndone, o.name)})
	}
	return errors.Join(err, &takenBack{fmt.Errorf("%s: its configuration couldn't be written: %w; what was printed of it is void", said, failed)})
}

// takenBack is an answer that couldn't be written, and what became of the change.
type takenBack struct{ err error }

func (e *takenBack) Error() string { return e.err.Error() }
func (e *takenBack) Unwrap() error { return e.err }

// write prints the answer, or writes the configuration to the file that was asked for,
// and returns when it is where it is to stay.
func (o *peerAddOptions) write(ctx context.Context, changed api.Changed, private mesh.PrivateKey, half bool) error {
	config, err := o.app.configOf(ctx, o.name, private, o.shows())
	if err != nil {
		return err
	}
	if o.file != nil {
		if err := o.file.write(config.Text()); err != nil {
			return err
		}
	}
	err = o.app.print(addAnswer{changed.Peer, config.Text()}, func() { o.tell(changed, config, half) })
	return cmp.Or(err, o.app.written())
}

// shows reports whether a configuration is printed.
func (o *peerAddOptions) shows() bool { return o.publicKey == "" || o.output != "" }

// addAnswer is what peer add and rekey print with --json.
type addAnswer struct {
	Peer   api.Peer `json:"peer"`
	Config string   `json:"config"`
}

// tell says what holds: on stdout, unless that is for the configuration alone.
func (o *peerAddOptions) tell(changed api.Changed, config stock.Config, half bool) {
	show := o.shows() && o.file == nil
	speak := o.app.say
	if show || o.qr {
		speak = o.app.talk
	}
	name, addresses := changed.Peer.Name, joinAddresses(changed.Peer.Addresses)
	switch {
	case half:
	case o.was != nil:
		what := "its addresses are now " + addresses
		if slices.Equal(o.was.Addresses, changed.Peer.Addresses) {
			what = "its addresses stay " + addresses
		}
		speak("%s has a new key; %s. The old key is dead, and so is every configuration that has it", name, what)
	case changed.Already:
		speak("%s is already a peer, with %s; it may: %s", name, addresses, describePermissions(changed.Peer.Permissions))
		if o.timed {
			o.app.talk("--for changes nothing of a peer that exists; for another end run: meshhelper peer allow %s %s --for %s", name, strings.Join(o.allow, ","), shortDuration(o.limit))
		}
	default:
		speak("%s is now a peer, with %s; it may: %s", name, addresses, describePermissions(changed.Peer.Permissions))
	}
	if o.file != nil {
		speak("its configuration is in %s", o.output)
	}
	if o.publicKey != "" && !o.shows() {
		o.app.talk("for its configuration, with a placeholder for its private key, run: meshhelper peer config %s", name)
	}
	if end := changed.Peer.Permissions.Of(mesh.Routing).Until; changed.Peer.Tunnel == mesh.TunnelFull && !end.IsZero() {
		o.app.talk("the configuration sends everything; from %s on %s has no internet while it is connected", formatEnd(end), name)
	}
	if show {
		o.app.sayWhole(strings.TrimSuffix(config.Text(), "\n"))
	}
	if o.qr {
		o.app.printQR(config, name)
	}
}

// configOf asks for a peer's configuration and puts the private key in, which
// never leaves this process but on stdout or in the file of --output. What its owner has
// to look at is said when it is shown.
func (a *app) configOf(ctx context.Context, ref string, private mesh.PrivateKey, shown bool) (stock.Config, error) {
	c, err := a.client().Config(ctx, ref)
	if err != nil {
		return stock.Config{}, err
	}
	parsed, err := stock.ParseConfig(c.Text)
	if err != nil {
		return stock.Config{}, err
	}
	parsed.PrivateKey = private
	if !shown {
		return parsed, nil
	}
	for _, w := range c.Warnings {
		a.talk("warning: %s", w)
	}
	if private.IsZero() {
		a.talk("put the peer's private key in place of the placeholder; for a new key run: meshhelper peer rekey %s", ref)
	}
	return parsed, nil
}

// printQR prints a configuration as a QR code, where the terminal has room for it.
func (a *app) printQR(config stock.Config, name string) {
	code, err := stock.EncodeQR(config.Compact())
	if err != nil {
		a.talk("warning: %v; a phone takes the configuration as a file, too", err)
		return
	}
	if a.columns > 0 && code.Size() > a.columns {
		a.talk("warning: the QR code is %d columns wide and this terminal %d, so it isn't printed: make the window wider or its letters smaller, "+
			"and run: meshhelper peer rekey %s --qr, or for a file instead: meshhelper peer rekey %s --output FILE", code.Size(), a.columns, name, name)
		return
	}
	text := code.Terminal(a.terminal && a.getenv("NO_COLOR") == "")
	a.sayWhole("\n" + text)
	if need := strings.Count(text, "\n") + 1; a.rows > 0 && need > a.rows { // and the prompt
		a.talk("warning: the QR code needs %d rows and this terminal has %d, so it may not be whole to the camera: make the window higher or its letters smaller, "+
			"and run: meshhelper peer rekey %s --qr, or for a file instead: meshhelper peer rekey %s --output FILE", need, a.rows, name, name)
	}
}

// noQR refuses a QR code of a configuration without its private key: a phone that scans
// it gets a tunnel that can't work.
func noQR(name string) error {
	return fmt.Errorf("a QR code can't be made for %q, for its private key is kept nowhere: make a new key with: meshhelper peer rekey %s --qr", name, name)
}

func newPeerConfigCommand(a *app) *cobra.Command {
	o := &peerAddOptions{app: a}
	c := &cobra.Command{
		Use: "config NAME", Short: "Print a peer's configuration, with a placeholder for its private key",
		ValidArgsFunction: a.completePeers,
		RunE:              func(c *cobra.Command, args []string) error { return printConfig(c.Context(), o, args[0]) },
	}
	c.Flags().BoolVar(&o.qr, "qr", false, "refused: a QR code needs the private key; see: meshhelper peer rekey --qr")
	c.Flags().StringVar(&o.output, "output", "", outputUsage)
	return c
}

func printConfig(ctx context.Context, o *peerAddOptions, ref string) (err error) {
	peer, err := o.app.client().Peer(ctx, ref)
	if err != nil {
		return err
	}
	if o.qr {
		return noQR(peer.Name)
	}
	if err := o.create(); err != nil {
		return err
	}
	defer func() { err = o.end(err) }()
	config, err := o.app.configOf(ctx, peer.Name, mesh.PrivateKey{}, true)
	if err != nil {
		return err
	}
	if o.file != nil {
		if err := o.file.write(config.Text()); err != nil {
			return err
		}
	}
	err = o.app.print(map[string]string{"config": config.Text()}, func() {
		if o.file != nil {
			o.app.say("the configuration of %s is in %s", peer.Name, o.output)
			return
		}
		o.app.sayWhole(strings.TrimSuffix(config.Text(), "\n"))
	})
	return cmp.Or(err, o.app.written())
}

func newPeerRekeyCommand(a *app) *cobra.Command {
	o := &peerAddOptions{app: a}
	c := &cobra.Command{
		Use: "rekey NAME", Short: "Make a new key for a peer, and print its configuration",
		Long: `Make a new key for a peer, and print its configuration, once: the private key is
kept nowhere. The old key is dead at once, and addresses that were derived from it
change. A configuration that can't be written changes nothing.`,
		ValidArgsFunction: a.completePeers,
		RunE:              func(c *cobra.Command, args []string) error { return rekeyPeer(c.Context(), o, args[0]) },
	}
	c.Flags().BoolVar(&o.qr, "qr", false, "print the configuration as a QR code, too")
	c.Flags().StringVar(&o.output, "output", "", outputUsage)
	return c
}

func rekeyPeer(ctx context.Context, o *peerAddOptions, ref string) (err error) {
	was, err := o.app.client().Peer(ctx, ref)
	if err != nil {
		return err
	}
	o.name, o.was = was.Name, &was
	surviveClosedPipe()
	if err := o.create(); err != nil {
		return err
	}
	defer func() { err = o.end(err) }()
	private, err := o.app.drawKey(ctx, true)
	if err != nil {
		return err
	}
	ctx, stop := unbroken(ctx)
	defer stop()
	changed, err := o.app.client().ChangePeer(ctx, was.Name, api.PeerChange{PublicKey: private.Public().String()})
	return o.answer(ctx, changed, private, err, func(ctx context.Context) (string, error) {
		_, err := o.app.client().ChangePeer(ctx, was.Name, api.PeerChange{PublicKey: was.PublicKey})
		return was.Name + " keeps its old key", err
	})
}
