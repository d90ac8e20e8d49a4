package main

import (
	"context"
	"errors"
	"net/netip"
	"time"

	"github.com/spf13/cobra"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/wireguard"
)

// peerAddOptions are the flags of peer add.
type peerAddOptions struct {
	app *app

	name, publicKey, endpoint string
	own, external, qr         bool
	addresses, allow          []string
	keepalive                 time.Duration
}

func newPeerAddCommand(a *app) *cobra.Command {
	o := &peerAddOptions{app: a}
	c := &cobra.Command{
		Use: "add NAME", Short: "Add a peer, and print its configuration",
		Long: `Add a peer. Without --public-key a key is made here, and a configuration for a
stock WireGuard app is printed, once: the private key is kept nowhere.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			if o.publicKey == "" && c.Flags().Changed("public-key") {
				return usagef("--public-key is empty; without it a key is made here")
			}
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
	f.StringSliceVar(&o.allow, "allow", nil, "`PERMISSIONS` besides the kind's: incoming, routing, lan")
	f.BoolVar(&o.qr, "qr", false, "print the configuration as a QR code, too")
	return c
}

// keyTries is how often a key is drawn again because another command added a peer
// with its address in the meantime.
const keyTries = 3

func addPeer(ctx context.Context, o *peerAddOptions) error {
	request, err := o.request()
	if err != nil {
		return err
	}
	if o.publicKey != "" {
		changed, err := o.app.client().AddPeer(ctx, request)
		return o.answer(ctx, changed, wireguard.PrivateKey{}, err)
	}
	if was, err := o.app.client().Peer(ctx, o.name); err == nil && was.Name == o.name {
		// The same peer, unless the helper finds something that differs.
		request.PublicKey = was.PublicKey
		changed, err := o.app.client().AddPeer(ctx, request)
		return o.answer(ctx, changed, wireguard.PrivateKey{}, err)
	}
	for try := 1; ; try++ {
		private, err := o.app.drawKey(ctx, len(o.addresses) == 0)
		if err != nil {
			return err
		}
		request.PublicKey = private.Public().String()
		changed, err := o.app.client().AddPeer(ctx, request)
		var refused *api.Error
		if errors.As(err, &refused) && refused.Code == api.CodeAddressTaken && len(o.addresses) == 0 && try < keyTries {
			continue
		}
		return o.answer(ctx, changed, private, err)
	}
}

// request turns the flags into the body of the request, without a generated
// key.
func (o *peerAddOptions) request() (api.NewPeer, error) {
	r := api.NewPeer{
		Name: o.name, PublicKey: o.publicKey, Addresses: o.addresses, Endpoint: o.endpoint,
		Permissions: map[string]api.PermissionChange{},
	}
	switch {
	case o.own && o.external:
		return r, usagef("--own and --external exclude each other")
	case o.own:
		r.Kind = api.Own
	case o.external:
		r.Kind = api.External
	}
	if o.keepalive != 0 {
		r.Keepalive = o.keepalive.String()
	}
	wanted, err := parsePermissions(o.allow)
	if err != nil {
		return r, err
	}
	for _, one := range wanted {
		r.Permissions[one.String()] = api.PermissionChange{Allowed: true}
	}
	return r, nil
}

// drawKey makes a private key here. Where its addresses are to be derived, it
// is one whose addresses are free.
func (a *app) drawKey(ctx context.Context, derived bool) (wireguard.PrivateKey, error) {
	s, err := a.client().Status(ctx)
	if err != nil {
		return wireguard.PrivateKey{}, err
	}
	if !derived {
		return wireguard.GeneratePrivateKey(a.random)
	}
	prefixes, err := prefixesOf(s)
	if err != nil {
		return wireguard.PrivateKey{}, err
	}
	taken := addressSet(s)
	key, _, err := prefixes.GenerateFree(a.random, func(a netip.Addr) bool { return taken[a] })
	if errors.Is(err, wireguard.ErrMeshFull) {
		return key, api.Errorf(api.CodeMeshFull, "the mesh is full: %v", err).
			WithHint("remove a peer, or run the helper with larger mesh prefixes")
	}
	return key, err
}

func prefixesOf(s api.Status) (wireguard.Prefixes, error) {
	if len(s.MeshPrefixes) != 2 {
		return wireguard.Prefixes{}, errors.New("the helper didn't say its mesh prefixes")
	}
	p := wireguard.Prefixes{V4: s.MeshPrefixes[0], V6: s.MeshPrefixes[1]}
	return p, p.Validate()
}

// answer says what was added, and prints its configuration. A peer that is saved but
// not in force yet, or in force but not saved, needs its private key just the same:
// it is never shown again.
func (o *peerAddOptions) answer(ctx context.Context, changed api.Changed, private wireguard.PrivateKey, err error) error {
	ctx = context.WithoutCancel(ctx)
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
	}
	config, failed := o.app.configOf(ctx, o.name, private, o.publicKey == "" || o.qr)
	if failed != nil {
		return errors.Join(err, failed)
	}
	if !private.IsZero() {
		o.app.unread = "; the private key is lost with it: for a new one run: meshhelper peer rekey " + o.name
	}
	printed := o.app.print(addAnswer{peer, config}, func() { o.tell(changed, config, half) })
	return errors.Join(err, printed)
}

// addAnswer is what peer add and rekey print with --json.
type addAnswer struct {
	Peer   api.Peer `json:"peer"`
	Config string   `json:"config"`
}

// tell says what holds: on stdout, unless that is for the configuration alone.
func (o *peerAddOptions) tell(changed api.Changed, config string, half bool) {
	speak, show := o.app.talk, true
	if o.publicKey != "" && !o.qr {
		speak, show = o.app.say, false
	}
	switch {
	case half:
	case changed.Already:
		speak("%s is already a peer, with %s", o.name, joinAddresses(changed.Peer.Addresses))
	default:
		speak("%s is now a peer, with %s; it may: %s", o.name, joinAddresses(changed.Peer.Addresses),
			describePermissions(changed.Peer.Permissions))
	}
	if show {
		o.app.printConfig(config, o.qr)
	}
}

// configOf asks for a peer's configuration and puts the private key in, which
// never leaves this process but on stdout. What its owner has to look at is said
// when it is shown.
func (a *app) configOf(ctx context.Context, ref string, private wireguard.PrivateKey, shown bool) (string, error) {
	c, err := a.client().Config(ctx, ref)
	if err != nil {
		return "", err
	}
	parsed, err := wireguard.ParseConfig(c.Text)
	if err != nil {
		return "", err
	}
	parsed.PrivateKey = private
	if !shown {
		return parsed.Text(), nil
	}
	for _, w := range c.Warnings {
		a.talk("warning: %s", w)
	}
	if private.IsZero() {
		a.talk("put the peer's private key in place of the placeholder; for a new key run: meshhelper peer rekey %s", ref)
	}
	return parsed.Text(), nil
}

func (a *app) printConfig(config string, qr bool) {
	a.say("%s", config[:len(config)-1])
	if !qr {
		return
	}
	code, err := wireguard.EncodeQR(config)
	if err != nil {
		a.talk("warning: %v", err)
		return
	}
	a.say("\n%s", code.Terminal(a.terminal && a.getenv("NO_COLOR") == ""))
}

func newPeerConfigCommand(a *app) *cobra.Command {
	var qr bool
	c := &cobra.Command{
		Use: "config NAME", Short: "Print a peer's configuration, with a placeholder for its private key", Args: cobra.ExactArgs(1),
		ValidArgsFunction: a.completePeers,
		RunE: func(c *cobra.Command, args []string) error {
			config, err := a.configOf(c.Context(), args[0], wireguard.PrivateKey{}, true)
			if err != nil {
				return err
			}
			return a.print(map[string]string{"config": config}, func() { a.printConfig(config, qr) })
		},
	}
	c.Flags().BoolVar(&qr, "qr", false, "print it as a QR code, too")
	return c
}

func newPeerRekeyCommand(a *app) *cobra.Command {
	var qr bool
	c := &cobra.Command{
		Use: "rekey NAME", Short: "Make a new key for a peer, and print its configuration", Args: cobra.ExactArgs(1),
		ValidArgsFunction: a.completePeers,
		RunE:              func(c *cobra.Command, args []string) error { return rekeyPeer(c.Context(), a, args[0], qr) },
	}
	c.Flags().BoolVar(&qr, "qr", false, "print the configuration as a QR code, too")
	return c
}

func rekeyPeer(ctx context.Context, a *app, ref string, qr bool) error {
	was, err := a.client().Peer(ctx, ref)
	if err != nil {
		return err
	}
	private, err := a.drawKey(ctx, true)
	if err != nil {
		return err
	}
	changed, err := a.client().ChangePeer(ctx, was.Name, api.PeerChange{PublicKey: private.Public().String()})
	o := &peerAddOptions{app: a, name: was.Name, qr: qr}
	return o.answer(ctx, changed, private, err)
}
