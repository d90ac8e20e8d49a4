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
	"github.com/meshhelper/meshhelper/internal/wanted"
)

// peerAddOptions are the flags of peer add, peer rekey and peer config: the commands that
// write a configuration.
type peerAddOptions struct {
	app *app

	name, publicKey, endpoint string
	own, external, qr         bool
	addresses, allow          []string
	keepalive, limit          time.Duration
	limitSet, keepaliveSet    bool   // whether limit and keepalive were given
	limitText, keepaliveText  string // limit and keepalive as they were given
	tunnel, output            string

	file *outputFile // nil: the configuration goes to standard output
	was  *api.Peer   // what a peer was that gets another key, else nil
}

const outputUsage = "write the configuration to a new `FILE` that only its owner can read; an existing file is never overwritten"

// newPeerAddCommand returns `peer add`.
func newPeerAddCommand(a *app) *cobra.Command {
	o := &peerAddOptions{app: a}
	c := &cobra.Command{
		Use: "add NAME", Short: "Add a peer, and print its configuration",
		Long: `Add a peer. Without --public-key the command generates a key pair and prints a
configuration for a stock WireGuard app. It prints it once: the private key is kept
nowhere. --output FILE writes the configuration to a file instead. A peer whose
configuration can't be written isn't added.

If the peer may route, its configuration sends all its traffic through this host, and
else only traffic for this host. With --tunnel split it sends traffic for this host and,
if the peer may route and reach the host's networks (lan), for these networks.

PERMISSIONS are, separated by commas,
` + permissionsHelp(),
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			if o.publicKey == "" && c.Flags().Changed("public-key") {
				return usagef("--public-key is empty; leave it out to have a key made here")
			}
			if err := o.checkOutput(c); err != nil {
				return err
			}
			o.limitSet, o.keepaliveSet = c.Flags().Changed("for"), c.Flags().Changed("keepalive")
			o.limitText, o.keepaliveText = c.Flag("for").Value.String(), c.Flag("keepalive").Value.String()
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
	f.Var(durationFlag(&o.keepalive), "keepalive", "send something this often, such as 25s")
	f.StringSliceVar(&o.allow, "allow", nil, "`PERMISSIONS` besides the kind's: "+strings.Join(mesh.PermissionNames(), ", "))
	f.Var(durationFlag(&o.limit), "for", "how long the permissions of --allow hold, such as 30m, 2h, 1d or 1w; without it, for good")
	f.StringVar(&o.tunnel, "tunnel", "", "what the configuration sends here: full or split (what the peer may)")
	f.StringVar(&o.output, "output", "", outputUsage)
	f.BoolVar(&o.qr, "qr", false, "print the configuration as a QR code, too")
	return c
}

// maxKeyAttempts is how many keys addPeer generates if another command takes the derived
// address between the request for the status and the one that adds the peer. That is rare;
// three times in a row it has another cause.
const maxKeyAttempts = 3

// addPeer adds a peer and writes its configuration. It creates the file of --output first,
// then asks the helper, and then writes; a peer whose new key couldn't be written is removed
// again. A name that already exists is sent with the key it has, so that the helper answers
// either that nothing changes or what differs.
func addPeer(ctx context.Context, o *peerAddOptions) (err error) {
	request, err := o.request()
	if err != nil {
		return err
	}
	surviveClosedPipe()
	was, failed := o.app.client().Peer(ctx, o.name)
	known := failed == nil && was.Name == o.name
	if known && o.qr {
		return errNoQR(o.name)
	}
	if err := o.openOutput(); err != nil {
		return err
	}
	defer func() { err = o.closeOutput(err) }()
	if o.publicKey != "" || known {
		if known && o.publicKey == "" {
			// With its own key it is the same peer, unless another flag differs.
			request.PublicKey = was.PublicKey
		}
		changed, err := o.app.client().AddPeer(ctx, request)
		return o.finish(ctx, changed, mesh.PrivateKey{}, err, nil)
	}
	if err := o.keepsKey(); err != nil {
		return err
	}
	for try := 1; ; try++ {
		private, err := o.app.generateKey(ctx, len(o.addresses) == 0)
		if err != nil {
			return err
		}
		request.PublicKey = private.Public().String()
		// From here on the helper may have added the peer, so a signal must not keep the
		// command from printing the key or removing the peer.
		ctx, stop := uninterruptible(ctx)
		defer stop()
		changed, err := o.app.client().AddPeer(ctx, request)
		var refused *api.Error
		if errors.As(err, &refused) && refused.Code == api.CodeAddressTaken && len(o.addresses) == 0 && try < maxKeyAttempts {
			continue
		}
		return o.finish(ctx, changed, private, err, func(ctx context.Context) (string, error) {
			_, err := o.app.client().RemovePeer(ctx, request.PublicKey)
			return o.name + " isn't added", err
		})
	}
}

// errLongTime refuses a --for that the helper doesn't take.
var errLongTime = usagef("--for is %dd (ten years) at most; without it a permission has no end", wanted.MaxTimed/(24*time.Hour))

// errQRInJSON refuses --qr with --json, whose answer has no place for the drawing.
var errQRInJSON = usagef("--qr and --json exclude each other: a QR code is for a camera, and a program gets the configuration as text")

// checkOutput refuses an --output that names no file. A script with an empty variable would
// print the private key, and "-" would become a file of that name.
func (o *peerAddOptions) checkOutput(c *cobra.Command) error {
	switch {
	case o.output == "" && c.Flags().Changed("output"):
		return usagef("--output is empty; give a file, or leave it out to print the configuration")
	case o.output == "-":
		return usagef("--output: %q is no file; leave --output out to print the configuration, or give ./- for a file of that name", o.output)
	}
	return nil
}

// keepsKey returns an error if a private key that is generated now would be lost, because
// the configuration goes to a stdout that discards it. The key exists nowhere else.
func (o *peerAddOptions) keepsKey() error {
	if o.file != nil || !o.app.discardsOutput() {
		return nil
	}
	return hintf(errors.New("standard output is closed or the null device, so the configuration with the new private key, which is kept nowhere else, would be lost"),
		"give --output FILE, or leave standard output open")
}

// uninterruptibleLimit bounds a change that signals don't interrupt. The helper answers
// within its --wait, 50 s at most (maxWait), and undoing the change takes a second request.
const uninterruptibleLimit = 2 * time.Minute

// uninterruptible returns a context that a signal doesn't end. A change of keys that was
// interrupted could leave a peer whose private key was never printed.
func uninterruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), uninterruptibleLimit)
}

// request returns the request for the flags, with the key of --public-key or none. Its
// errors are usageErrors; what depends on the mesh, the helper checks.
func (o *peerAddOptions) request() (api.NewPeer, error) {
	r := api.NewPeer{
		Name: o.name, PublicKey: o.publicKey, Addresses: o.addresses, Endpoint: o.endpoint,
		Permissions: map[string]api.PermissionChange{}, Tunnel: o.tunnel,
	}
	switch {
	case o.tunnel != "" && o.tunnel != mesh.TunnelFull && o.tunnel != mesh.TunnelSplit:
		return r, usagef("--tunnel %q is unknown: it is full or split", o.tunnel)
	case o.publicKey != "" && o.qr:
		return r, usagef("--qr needs the private key of --public-key, which isn't known here; without --public-key a key is made here")
	case o.qr && o.app.json:
		return r, errQRInJSON
	case o.limitSet && o.limit <= 0:
		return r, usagef("--for %s ends before it begins", o.limitText)
	case o.limit > wanted.MaxTimed:
		return r, errLongTime
	case o.keepalive < 0 || o.keepalive > mesh.MaxKeepalive || o.keepalive%time.Second != 0:
		return r, usagef("--keepalive: %q is not a number of whole seconds from 0s to %ds, such as 25s", o.keepaliveText, mesh.MaxKeepalive/time.Second)
	case o.limitSet && len(o.allow) == 0:
		return r, usagef("--for says how long the permissions of --allow hold, but --allow isn't given")
	case o.own && o.external:
		return r, usagef("--own and --external exclude each other")
	case o.own:
		r.Kind = mesh.Own
	case o.external:
		r.Kind = mesh.External
	}
	if o.keepaliveSet {
		r.Keepalive = o.keepalive.String()
	}
	allowed, err := parsePermissions(o.allow)
	if err != nil {
		return r, err
	}
	for _, one := range allowed {
		c := api.PermissionChange{Allowed: true}
		if o.limitSet {
			c.For = new(shortDuration(o.limit))
		}
		r.Permissions[one.Name] = c
	}
	return r, nil
}

// generateKey generates a private key. With derived, the mesh addresses that follow from
// its public key are ones that neither the host nor a peer has; on a full mesh that is an
// error (CodeMeshFull).
func (a *app) generateKey(ctx context.Context, derived bool) (mesh.PrivateKey, error) {
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
			WithHint("remove a peer, or choose a larger mesh prefix: meshhelper settings mesh-prefix4 PREFIX")
	}
	return key, err
}

// prefixesOf returns the mesh prefixes in a status, which come as IPv4 and IPv6.
func prefixesOf(s api.Status) (mesh.Prefixes, error) {
	if len(s.MeshPrefixes) != 2 {
		return mesh.Prefixes{}, errors.New("the helper's status has no mesh prefixes")
	}
	p := mesh.Prefixes{V4: s.MeshPrefixes[0], V6: s.MeshPrefixes[1]}
	return p, p.Validate()
}

// finish reports the peer that was added or changed, and writes its configuration. err is
// the helper's answer. private is the new key, zero if the command made none.
//
// A peer that is saved but not in force yet (CodeNotInForce), or in force but not saved
// (CodeNotSaved), still gets its configuration, because the private key exists only here;
// finish returns err all the same. If a configuration with a new key can't be written, undo
// takes the change back, since no device could use the peer. undo returns what holds then,
// as a clause: "phone isn't added".
func (o *peerAddOptions) finish(ctx context.Context, changed api.Changed, private mesh.PrivateKey, err error, undo func(context.Context) (string, error)) error {
	var refused *api.Error
	partial := errors.As(err, &refused) && (refused.Code == api.CodeNotInForce || refused.Code == api.CodeNotSaved)
	if err != nil && (!partial || private.IsZero()) {
		return err
	}
	peer := changed.Peer
	if partial {
		var failed error
		peer, failed = o.app.client().Peer(ctx, o.name)
		if refused.Code == api.CodeNotSaved && (failed != nil || peer.PublicKey != private.Public().String()) {
			return err // the helper changed nothing
		}
		if failed != nil {
			return errors.Join(err, failed)
		}
		changed.Peer = peer
	}
	failed := o.write(ctx, changed, private, partial)
	if failed == nil {
		return err
	}
	if private.IsZero() || o.file != nil && o.file.done {
		return errors.Join(err, failed) // no private key is lost: there is none, or the file has it
	}
	holds, notUndone := undo(ctx)
	if notUndone != nil {
		return errors.Join(err, &undoneError{fmt.Errorf("the configuration of %s couldn't be written: %w; what was printed of it is incomplete, and undoing the change failed, too: %w; "+
			"make a new key with: meshhelper peer rekey %s", o.name, failed, notUndone, o.name)})
	}
	return errors.Join(err, &undoneError{fmt.Errorf("%s: its configuration couldn't be written: %w; what was printed of it is invalid", holds, failed)})
}

// undoneError is an answer that couldn't be written, and says whether the change was undone.
type undoneError struct{ err error }

func (e *undoneError) Error() string { return e.err.Error() }
func (e *undoneError) Unwrap() error { return e.err }

// write prints the answer and, with --output, writes the configuration to the file. It
// returns nil only once the file, or stdout if that is a file, is on disk.
func (o *peerAddOptions) write(ctx context.Context, changed api.Changed, private mesh.PrivateKey, partial bool) error {
	config, remarks, err := o.app.configOf(ctx, o.name, private)
	if err != nil {
		return err
	}
	if !o.printsConfig() {
		remarks = nil
	}
	if o.file != nil {
		if err := o.file.write(config.Text()); err != nil {
			return err
		}
	}
	err = o.app.print(addAnswer{changed.Peer, config.Text()}, func() { o.report(changed, config, partial) })
	o.app.talkAll(remarks)
	return cmp.Or(err, o.app.outputError())
}

// printsConfig reports whether the command gives out a configuration, on stdout or in a
// file. For a peer with --public-key it doesn't, unless --output is given: without the
// private key the configuration isn't usable as it is.
func (o *peerAddOptions) printsConfig() bool { return o.publicKey == "" || o.output != "" }

// addAnswer is what peer add and peer rekey print with --json.
type addAnswer struct {
	Peer   api.Peer `json:"peer"`
	Config string   `json:"config"` // a placeholder stands for a private key that isn't known
}

// report says what now holds of the peer. It does so on stdout, or on stderr if stdout is
// for the configuration alone, which may be piped into a file. With partial, the error says
// what holds, and report leaves that out.
func (o *peerAddOptions) report(changed api.Changed, config stock.Config, partial bool) {
	show := o.printsConfig() && o.file == nil
	say := o.app.say
	if show || o.qr {
		say = o.app.talk
	}
	name, addresses := changed.Peer.Name, joinAddresses(changed.Peer.Addresses)
	switch {
	case partial:
	case o.was != nil:
		what := "its addresses are now " + addresses
		if slices.Equal(o.was.Addresses, changed.Peer.Addresses) {
			what = "its addresses stay " + addresses
		}
		say("%s has a new key; %s. The old key no longer works, nor does any configuration that has it", name, what)
	case changed.Already:
		say("%s is already a peer, with %s; it may: %s", name, addresses, describePermissions(changed.Peer.Permissions))
		if o.limitSet {
			o.app.talk("--for doesn't change a peer that already exists; for another end run: meshhelper peer allow %s %s --for %s", name, strings.Join(o.allow, ","), shortDuration(o.limit))
		}
	default:
		say("%s is now a peer, with %s; it may: %s", name, addresses, describePermissions(changed.Peer.Permissions))
	}
	if o.file != nil {
		say("its configuration is in %s", o.output)
	}
	if o.publicKey != "" && !o.printsConfig() {
		o.app.talk("for its configuration, with a placeholder for its private key, run: meshhelper peer config %s", name)
	}
	if end := changed.Peer.Permissions.Of(mesh.Routing).Until; changed.Peer.Tunnel == mesh.TunnelFull && !end.IsZero() {
		o.app.talk("the configuration sends everything; from %s on %s has no internet while it is connected", formatEnd(end), name)
	}
	if show {
		o.app.sayVerbatim(strings.TrimSuffix(config.Text(), "\n"))
	}
	if o.qr {
		o.app.printQR(config, name)
	}
}

// configOf asks the helper for a peer's configuration and fills in the private key, if it
// is known. The key leaves this process only on stdout or in the file of --output: the
// helper never sees it. remarks are warnings and advice about the configuration, which the
// caller prints after its answer.
func (a *app) configOf(ctx context.Context, ref string, private mesh.PrivateKey) (config stock.Config, remarks []string, err error) {
	c, err := a.client().Config(ctx, ref)
	if err != nil {
		return stock.Config{}, nil, err
	}
	if config, err = stock.ParseConfig(c.Text); err != nil {
		return stock.Config{}, nil, err
	}
	config.PrivateKey = private
	for _, w := range c.Warnings {
		remarks = append(remarks, "warning: "+w)
	}
	if private.IsZero() {
		remarks = append(remarks, "put the peer's private key in place of the placeholder; for a new key run: meshhelper peer rekey "+ref)
	}
	return config, remarks, nil
}

// talkAll writes each remark to stderr.
func (a *app) talkAll(remarks []string) {
	for _, r := range remarks {
		a.talk("%s", r)
	}
}

// printQR prints a configuration as a QR code, if the terminal is wide enough: a wrapped
// code can't be scanned. One that is too high may still be scanned after the terminal was
// resized, so it is printed with a warning. The configuration itself was given out before,
// so neither case is an error.
func (a *app) printQR(config stock.Config, name string) {
	code, err := stock.EncodeQR(config.Compact())
	if err != nil {
		a.talk("warning: %v; a phone can also import the configuration as a file", err)
		return
	}
	if a.columns > 0 && code.Size() > a.columns {
		a.talk("warning: the QR code is %d columns wide and this terminal %d, so it isn't printed: make the window wider or its font smaller, "+
			"and run: meshhelper peer rekey %s --qr, or for a file instead: meshhelper peer rekey %s --output FILE", code.Size(), a.columns, name, name)
		return
	}
	text := code.Terminal(a.terminal && a.getenv("NO_COLOR") == "")
	a.sayVerbatim("\n" + text)
	if need := strings.Count(text, "\n") + 1; a.rows > 0 && need > a.rows { // one row for the prompt
		a.talk("warning: the QR code needs %d rows and this terminal has %d, so a camera may not see all of it: make the window higher or its font smaller, "+
			"and run: meshhelper peer rekey %s --qr, or for a file instead: meshhelper peer rekey %s --output FILE", need, a.rows, name, name)
	}
}

// errNoQR refuses a QR code for a configuration without its private key. A phone would
// import it without an error, as a tunnel that can't work.
func errNoQR(name string) error {
	return fmt.Errorf("a QR code can't be made for %q, because its private key is kept nowhere: make a new key with: meshhelper peer rekey %s --qr", name, name)
}

// newPeerConfigCommand returns `peer config`. Its --qr only leads to peer rekey --qr.
func newPeerConfigCommand(a *app) *cobra.Command {
	o := &peerAddOptions{app: a}
	c := &cobra.Command{
		Use: "config NAME", Short: "Print a peer's configuration, with a placeholder for its private key",
		ValidArgsFunction: a.completePeers,
		RunE: func(c *cobra.Command, args []string) error {
			if o.qr {
				return &usageError{errNoQR(args[0])}
			}
			if err := o.checkOutput(c); err != nil {
				return err
			}
			return printConfig(c.Context(), o, args[0])
		},
	}
	c.Flags().BoolVar(&o.qr, "qr", false, "refused: a QR code needs the private key; see: meshhelper peer rekey --qr")
	c.Flags().StringVar(&o.output, "output", "", outputUsage)
	return c
}

// printConfig prints a peer's configuration, or writes it to the file of --output, with a
// placeholder for the private key.
func printConfig(ctx context.Context, o *peerAddOptions, ref string) (err error) {
	peer, err := o.app.client().Peer(ctx, ref)
	if err != nil {
		return err
	}
	if err := o.openOutput(); err != nil {
		return err
	}
	defer func() { err = o.closeOutput(err) }()
	config, remarks, err := o.app.configOf(ctx, peer.Name, mesh.PrivateKey{})
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
		o.app.sayVerbatim(strings.TrimSuffix(config.Text(), "\n"))
	})
	o.app.talkAll(remarks)
	return cmp.Or(err, o.app.outputError())
}

// newPeerRekeyCommand returns `peer rekey`.
func newPeerRekeyCommand(a *app) *cobra.Command {
	o := &peerAddOptions{app: a}
	c := &cobra.Command{
		Use: "rekey NAME", Short: "Make a new key for a peer, and print its configuration",
		Long: `Make a new key for a peer, and print its configuration, once: the private key is
kept nowhere. The old key stops working at once, and addresses that were derived from
it change. If the configuration can't be written, the old key stays.`,
		ValidArgsFunction: a.completePeers,
		RunE: func(c *cobra.Command, args []string) error {
			if o.qr && a.json {
				return errQRInJSON
			}
			if err := o.checkOutput(c); err != nil {
				return err
			}
			return rekeyPeer(c.Context(), o, args[0])
		},
	}
	c.Flags().BoolVar(&o.qr, "qr", false, "print the configuration as a QR code, too")
	c.Flags().StringVar(&o.output, "output", "", outputUsage)
	return c
}

// rekeyPeer gives a peer a new key and writes its configuration, like addPeer. To undo the
// change it gives the peer its old key again.
func rekeyPeer(ctx context.Context, o *peerAddOptions, ref string) (err error) {
	was, err := o.app.client().Peer(ctx, ref)
	if err != nil {
		return err
	}
	o.name, o.was = was.Name, &was
	surviveClosedPipe()
	if err := o.openOutput(); err != nil {
		return err
	}
	defer func() { err = o.closeOutput(err) }()
	if err := o.keepsKey(); err != nil {
		return err
	}
	private, err := o.app.generateKey(ctx, true)
	if err != nil {
		return err
	}
	ctx, stop := uninterruptible(ctx)
	defer stop()
	changed, err := o.app.client().ChangePeer(ctx, was.Name, api.PeerChange{PublicKey: private.Public().String()})
	return o.finish(ctx, changed, private, err, func(ctx context.Context) (string, error) {
		_, err := o.app.client().ChangePeer(ctx, was.Name, api.PeerChange{PublicKey: was.PublicKey})
		return was.Name + " keeps its old key", err
	})
}
