package linux

import (
	"context"
	"errors"
	"iter"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	mdlayher "github.com/mdlayher/netlink"

	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/lab/netlab"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
)

// shortly is the deadline of these tests' contexts.
const shortly = 300 * time.Millisecond

// returns fails the test if do takes minutes, instead of hanging with it.
func returns(t *testing.T, what string, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatalf("%s didn't return", what)
	}
}

// TestStalledStep has each call hang in a step. Its caller and the next one get an error
// when their contexts end; the hanging call isn't continued later, and what it had opened
// is closed.
func TestStalledStep(t *testing.T) {
	w := newWorld(t)
	w.findForwarding("0")
	before := w.snapshot()
	w.open()
	w.p.worker.grace = shortly
	r := w.enforce(meshOf(grants{ann: all}))
	narrower, err := policy.Compile(meshOf(grants{ann: all, bob: mesh.Routing}), r.Host(), time.Unix(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	release := make(chan struct{})
	w.stall(StepTable, release)
	for _, end := range []struct {
		name string
		of   func() (context.Context, context.CancelFunc)
	}{
		{"deadline", func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(context.Background(), shortly)
		}},
		{"cancelled", func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(context.Background())
			time.AfterFunc(shortly, cancel)
			return ctx, cancel
		}},
	} {
		// The first one hangs by itself, the others wait behind it.
		for name, call := range w.calls(narrower) {
			returns(t, name, func() {
				ctx, cancel := end.of()
				defer cancel()
				err := call(ctx)
				var step *host.StepError
				if !errors.Is(err, errHung) || !errors.As(err, &step) || step.Step != StepTable {
					t.Errorf("%s, %s: %v", name, end.name, err)
				}
			})
		}
	}
	close(release)
	if err := w.p.run(context.Background(), func() error { return nil }); err != nil {
		t.Error("a call after the one that hung:", err)
	}
	if may := w.elements("may_routing4"); len(may) > 0 {
		t.Errorf("a call whose context has ended opened for %v", may)
	}
	if now := w.p.forward.now(meshName); now.IPv4 || now.IPv6 {
		t.Errorf("after a call whose context has ended the host forwards: %+v", now)
	}
	if drift := w.inspect(w.enforce(meshOf(grants{ann: all}))).Drift; len(drift) > 0 {
		t.Errorf("after the recovery: %v", drift)
	}
	w.close()
	if diff := before.Diff(w.snapshot()); len(diff) > 0 {
		t.Errorf("the host isn't as it was: %v", diff)
	}
}

// TestRendererBesideAHungCall reads Renderer and Limits while an abandoned Enforce goes
// on: neither waits for it, and the race detector finds nothing.
func TestRendererBesideAHungCall(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	r := w.enforce(meshOf(grants{ann: all}))
	w.p.worker.grace = shortly
	release, loads := make(chan struct{}), 0
	w.p.o.Step = func(name string) {
		if name != StepTable {
			return
		}
		if loads++; loads == 2 { // the table is loaded
			<-release
		}
	}
	narrower, err := policy.Compile(meshOf(grants{ann: mesh.Incoming}), r.Host(), time.Unix(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), shortly)
	defer cancel()
	if err := w.p.Enforce(ctx, narrower); !errors.Is(err, errHung) {
		t.Fatalf("Enforce doesn't hang: %v", err)
	}
	read := func() {
		if w.p.Renderer() == nil {
			t.Error("no renderer while rules are loaded")
		}
		w.p.Limits()
	}
	returns(t, "Renderer", read)
	close(release)
	read() // in no order with what Enforce writes now
	if err := w.p.run(context.Background(), func() error { return nil }); err != nil {
		t.Error("a call after the one that hung:", err)
	}
	read()
}

// stall makes a step wait, once.
func (g *rig) stall(step string, release <-chan struct{}) {
	var once sync.Once
	announce := g.p.o.Step
	g.p.o.Step = func(name string) {
		announce(name)
		if name == step {
			once.Do(func() { <-release })
		}
	}
}

// calls are the methods of the contract that can hang, Enforce first.
func (g *rig) calls(r *policy.Ruleset) func(func(string, func(context.Context) error) bool) {
	return func(yield func(string, func(context.Context) error) bool) {
		_ = yield("Enforce", func(ctx context.Context) error { return g.p.Enforce(ctx, r) }) &&
			yield("Observe", func(ctx context.Context) error { _, err := g.p.Observe(ctx); return err }) &&
			yield("Inspect", func(ctx context.Context) error { _, err := g.p.Inspect(ctx, r); return err }) &&
			yield("Cut", func(ctx context.Context) error { return g.p.Cut(ctx, r, []policy.Narrowed{{Name: "ann"}}) }) &&
			yield("Open", func(ctx context.Context) error { _, err := g.p.Open(ctx, g.p.cfg); return err })
	}
}

// TestInformingApart holds each worker that answers questions, with a question to both
// waiting: nothing that enforces waits with them. And it holds the enforcing worker: the
// questions are answered all the same, so none of them is asked there.
func TestInformingApart(t *testing.T) {
	g := newRig(t)
	g.open()
	defer g.close()
	r := g.enforce(meshOf(grants{ann: all}))
	packet := host.Packet{In: meshName, Packet: policy.Packet{
		Src: ann4, Dst: netip.MustParseAddr("198.51.100.1"), Proto: policy.ProtoTCP, SrcPort: 50000, DstPort: 443,
	}}
	ask := func() error {
		_, err := g.p.Others(t.Context(), r, nil)
		_, werr := g.p.Way(t.Context(), packet)
		_, jerr := g.p.ByOthers(t.Context(), packet, netlab.Uplink, false)
		return errors.Join(err, werr, jerr)
	}
	hold := func(w *worker) (release func()) {
		held, end, done := make(chan struct{}), make(chan struct{}), make(chan error)
		go func() {
			done <- w.run(context.Background(), func() error { close(held); <-end; return nil })
		}()
		<-held
		return func() {
			close(end)
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}

	others, packets := hold(g.p.others.worker), hold(g.p.packets.worker)
	answered := make(chan error)
	go func() { answered <- ask() }()
	for name, call := range g.calls(r) {
		if name == "Open" {
			continue // the interface is open
		}
		returns(t, name, func() {
			if err := call(context.Background()); err != nil {
				t.Errorf("%s while a question is stuck: %v", name, err)
			}
		})
	}
	select {
	case err := <-answered:
		t.Errorf("the questions didn't wait for their workers: %v", err)
	default:
	}
	others()
	packets()
	returns(t, "the waiting question", func() { <-answered }) // it may have run out of time

	release := hold(g.p.worker)
	returns(t, "a question", func() {
		if err := ask(); err != nil {
			t.Errorf("while the enforcing worker is held: %v", err)
		}
	})
	release()
}

// silent is a netlink socket whose kernel never answers.
type silent struct {
	ended chan struct{}
	end   sync.Once
	mu    sync.Mutex
	timer *time.Timer
}

func newSilent() *mdlayher.Conn { return mdlayher.NewConn(&silent{ended: make(chan struct{})}, 0) }

func (s *silent) Close() error                          { return nil }
func (s *silent) Send(mdlayher.Message) error           { return nil }
func (s *silent) SendMessages([]mdlayher.Message) error { return nil }
func (s *silent) SetReadDeadline(end time.Time) error   { return s.SetDeadline(end) }
func (s *silent) SetWriteDeadline(time.Time) error      { return nil }
func (s *silent) Receive() ([]mdlayher.Message, error) {
	<-s.ended
	return nil, os.ErrDeadlineExceeded
}

func (s *silent) ReceiveIter() iter.Seq2[mdlayher.Message, error] {
	return func(yield func(mdlayher.Message, error) bool) {
		_, err := s.Receive()
		yield(mdlayher.Message{}, err)
	}
}

func (s *silent) SetDeadline(end time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.timer != nil {
		s.timer.Stop()
	}
	if !end.IsZero() {
		s.timer = time.AfterFunc(time.Until(end), func() { s.end.Do(func() { close(s.ended) }) })
	}
	return nil
}

// TestSilentKernel has the kernel not answer on a socket for nftables. The caller gets an
// error when its context ends, nothing is left behind, and the sockets are replaced.
func TestSilentKernel(t *testing.T) {
	w := newWorld(t)
	w.open()
	defer w.close()
	r := w.enforce(meshOf(grants{ann: all}))
	for name, call := range w.calls(r) {
		if name != "Enforce" && name != "Inspect" {
			continue // they don't use this socket
		}
		for _, cancelled := range []bool{false, true} {
			w.p.filter.sock.Close()
			w.p.filter.sock = newSilent()
			returns(t, name, func() {
				ctx, cancel := context.WithTimeout(context.Background(), shortly)
				if cancelled {
					cancel()
					ctx, cancel = context.WithCancel(context.Background())
					time.AfterFunc(shortly, cancel)
				}
				defer cancel()
				if err := call(ctx); err == nil || errors.Is(err, errHung) {
					t.Errorf("%s of a silent kernel: %v", name, err)
				}
			})
			if name == "Enforce" {
				if may := w.elements("may_routing4"); len(may) > 0 {
					t.Errorf("after it failed, %v may route", may)
				}
			}
			if drift := w.inspect(w.enforce(meshOf(grants{ann: all}))).Drift; len(drift) > 0 {
				t.Errorf("after %s: %v", name, drift)
			}
		}
	}
}

// TestCloseAfterTheEnd closes with a context that has ended: everything is closed all the
// same.
func TestCloseAfterTheEnd(t *testing.T) {
	g := newRig(t)
	before := g.snapshot()
	g.open()
	g.enforce(meshOf(grants{ann: all}))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := g.p.Close(ctx); err != nil {
		t.Error(err)
	}
	if diff := before.Diff(g.snapshot()); len(diff) > 0 {
		t.Errorf("the host isn't as it was: %v", diff)
	}
}

// TestFrozenDisk has writes of the journal hang. Narrowing doesn't wait for it.
func TestFrozenDisk(t *testing.T) {
	g := newRig(t)
	if err := g.pic.B.SetSysctl("net.ipv4.ip_forward", "0"); err != nil {
		t.Fatal(err)
	}
	g.open()
	g.enforce(meshOf(grants{ann: all}))
	thaw := make(chan struct{})
	freeze(t, g.p.forward.writer)
	go func() {
		<-thaw
		g.p.forward.writer.run()
	}()
	returns(t, "Enforce", func() { g.enforce(meshOf(grants{ann: mesh.Incoming})) })
	if now := g.p.forward.now(meshName); now.IPv4 || now.IPv6 {
		t.Errorf("while the disk is frozen the host still forwards: %+v", now)
	}
	// Widening waits, and doesn't happen.
	ctx, cancel := context.WithTimeout(context.Background(), shortly)
	defer cancel()
	g.p.worker.grace = shortly
	returns(t, "Enforce", func() {
		h, err := g.p.Observe(context.Background())
		if err != nil {
			t.Error(err)
			return
		}
		r, err := policy.Compile(meshOf(grants{ann: all}), h, time.Unix(0, 0))
		if err != nil {
			t.Error(err)
			return
		}
		if err := g.p.Enforce(ctx, r); !errors.Is(err, errHung) {
			t.Errorf("Enforce of what widens: %v", err)
		}
	})
	if now := g.p.forward.now(meshName); now.IPv4 || now.IPv6 {
		t.Errorf("the host forwards before the disk knows: %+v", now)
	}
	close(thaw)
	g.enforce(meshOf(grants{ann: all}))
	g.close()
	if g.journalExists() {
		t.Error("the journal is left")
	}
}

// freeze starts a write of the journal that doesn't end by itself.
func freeze(t *testing.T, s *journalWriter) {
	t.Helper()
	for range 10000 {
		s.mu.Lock()
		idle := !s.busy
		s.busy = s.busy || idle
		s.mu.Unlock()
		if idle {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("the journal is written for ever")
}
