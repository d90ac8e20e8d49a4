// Command demo shows the product at work with real packets: hosts in network namespaces,
// stock WireGuard on the peers, the real helper on the host B. After each command it
// shows which host reaches which, and compares that with the policy. It exits with status
// 1 if anything differs.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/lab/trial"
)

func main() { os.Exit(netlab.Main(run)) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := play(ctx, os.Stdout, painter(os.Stdout)); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		return 1
	}
	return 0
}

// play builds the hosts, plays the story to out, and removes everything.
func play(ctx context.Context, out io.Writer, paint func(string) string) (err error) {
	lab, err := netlab.New()
	if err != nil {
		return fmt.Errorf("there is nothing to show the product on: %w", err)
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	s, err := newStory(ctx, lab, &story{out: out, paint: paint})
	if err != nil {
		return err
	}
	for _, scene := range []func(context.Context) error{
		s.nothingAllowed, s.routing, s.lan, s.peersApart, s.download, s.end,
	} {
		err := scene(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx) // other errors are consequences of it
		}
		if err != nil {
			return err
		}
	}
	if s.wrong > 0 {
		return fmt.Errorf("%d of %d probes found something else than the policy says", s.wrong, s.judged)
	}
	s.say("%d probes judged, each as the policy says.", s.judged)
	return nil
}

// newStory builds the picture of s, starts the helper and adds the peers.
func newStory(ctx context.Context, lab *netlab.Lab, s *story) (*story, error) {
	s.say("Building meshhelper and wireguard-go ...")
	picture, err := netlab.NewPicture(lab)
	if err != nil {
		return nil, err
	}
	for _, h := range picture.Hosts() {
		if err := h.Serve(); err != nil {
			return nil, err
		}
	}
	if s.mesh, err = trial.New(picture); err != nil {
		return nil, err
	}
	s.say("%s", cast)
	if err := s.mesh.Start(ctx); err != nil {
		return nil, err
	}
	for _, p := range []struct {
		name, kind string
		host       *netlab.Host
	}{{"A", "--own", picture.A}, {"C", "--external", picture.C}, {"D", "--own", picture.D}} {
		s.command("peer", "add", p.name, p.kind, "--tunnel", "full")
		if _, err := s.mesh.AddPeer(ctx, p.name, p.host, p.kind); err != nil {
			return nil, err
		}
	}
	return s, nil
}
