package mactrial

// The helper under launchd, stopped while a command that it needs is slow or hangs.

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/host"
	"github.com/meshhelper/meshhelper/internal/install"
	"github.com/meshhelper/meshhelper/internal/lab/simmac"
	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/policy"
	"github.com/meshhelper/meshhelper/launchd"
)

const label, list = "org.meshhelper", "/Library/LaunchDaemons/org.meshhelper.plist"

// A service is the helper run by launchd: started, ended with SIGTERM, and with SIGKILL
// if that takes too long.
type service struct {
	*rig
	ctl    *launchd.Launchctl
	mu     sync.Mutex
	end    []error // of each helper that exited by itself
	killed int
}

func newService(t *testing.T) *service {
	s := &service{rig: newRig(t)}
	l := s.mac.Launchd
	l.Files = func(path string) (launchd.File, []byte, error) {
		j := &launchd.Job{Label: label, ProgramArguments: []string{"/opt/meshhelper"}, KeepAlive: &launchd.KeepAlive{Always: true},
			ExitTimeOut: new(install.ExitTimeOut)}
		data, err := j.Render()
		return launchd.File{Path: path, Mode: 0o644}, data, err
	}
	l.Program = nil
	var proc *simmac.Process
	var cancel context.CancelFunc
	var ended chan struct{}
	var failed error
	l.Start = func(*launchd.Job, int) {
		s.must(s.begin())
		var ctx context.Context
		ctx, cancel = context.WithCancel(context.Background())
		ended, proc = make(chan struct{}), s.proc
		d := s.d
		go func() {
			failed = errors.Join(d.Run(ctx), d.Close())
			close(ended)
		}()
	}
	l.Stop = func(string) {
		cancel()
		<-ended
		s.mu.Lock()
		defer s.mu.Unlock()
		s.end = append(s.end, failed)
	}
	l.Kill = func(string) {
		s.mu.Lock()
		s.killed++
		s.mu.Unlock()
		proc.Kill()
		// A killed process can no longer change the Mac, but it still holds the lock of
		// its state directory.
		cancel()
		<-ended
	}
	s.ctl = launchd.New(launchd.Options{Runner: l})
	return s
}

// load starts the helper and waits until it enforces.
func (s *service) load() {
	s.t.Helper()
	if _, err := s.ctl.Load(s.t.Context(), label, list); err != nil {
		s.t.Fatal(err)
	}
	s.wait("the helper enforces", func() bool { return s.d.Status().State == api.Enforcing })
	s.own = s.d.Status().Addresses
}

// closed checks that the Mac forwards nothing for peers, and no other transit.
func (s *service) closed(l *leakage, when string) {
	s.t.Helper()
	l.mustNotPass(s.rig, when)
	for family := range 2 {
		for _, proto := range protos {
			c := s.peers["C"][family]
			for _, p := range []host.Packet{
				s.opening(lan, printer[family], server[family], proto), // transit
				s.opening(uplink, server[family], c, proto),
				s.opening(s.device().name, c, server[family], proto),
			} {
				if o := s.mac.Inject(p.In, bytesOf(p, 2, false)); o.Fate == simmac.Forwarded {
					s.t.Errorf("%s: %+v was forwarded by %s", when, p, o.Link)
				}
			}
		}
	}
}

// TestLeavingInTime has launchd stop the helper while a command that it needs is slow or
// hangs. The helper exits before launchd's SIGKILL or is killed by it. The Mac is closed
// then, and the next helper enforces and restores it.
func TestLeavingInTime(t *testing.T) {
	const pfctl, sysctl = "/sbin/pfctl", "/usr/sbin/sysctl"
	for name, tt := range map[string]struct {
		spoil func(s *service)
		// within is how long leaving may take. 0 stands for LeaveLimit and a second for
		// the command that is running at SIGTERM.
		within time.Duration
		// killed means that launchd has to kill the helper.
		killed bool
	}{
		"pfctl takes a second":     {func(s *service) { s.mac.Slow(pfctl, time.Second) }, 0, false},
		"pfctl takes four seconds": {func(s *service) { s.mac.Slow(pfctl, 4*time.Second) }, 0, false},
		"pfctl hangs":              {func(s *service) { s.mac.Hang(pfctl, true) }, 0, false},
		"sysctl hangs":             {func(s *service) { s.mac.Hang(sysctl, true) }, 6 * time.Second, false},
		"both hang":                {func(s *service) { s.mac.Hang(pfctl, true); s.mac.Hang(sysctl, true) }, 0, false},
		"pfctl hangs from forwarding on": {func(s *service) {
			s.watchSteps(func() {
				if s.mac.Kernel.Variable("net.inet.ip.forwarding") == "0" {
					s.mac.Hang(pfctl, true)
				}
			})
		}, 0, false},
		"the tunnel hangs":          {func(s *service) { s.hang = make(chan struct{}) }, 0, false},
		"the tunnel and pfctl hang": {func(s *service) { s.hang = make(chan struct{}); s.mac.Hang(pfctl, true) }, 0, false},
		"the helper hears no SIGTERM": {func(s *service) {
			gone := s.dead.Done()
			s.mac.Launchd.Stop = func(string) { <-gone }
		}, time.Duration(install.ExitTimeOut+1) * time.Second, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newService(t)
				found := s.mac.Dump()
				stop := s.mac.Launchd.Stop
				s.load()
				s.add("A", "own")
				s.add("C", "external")
				s.permit("A", everything)
				s.permit("C", mesh.Routing)
				tt.spoil(s)
				begin := time.Now()
				if err := s.ctl.Bootout(t.Context(), label); err != nil {
					t.Error(err)
				}
				took := time.Since(begin)
				limit := tt.within
				if limit == 0 {
					limit = host.LeaveLimit + time.Second
				}
				if took > limit || tt.killed != (s.killed == 1) {
					t.Errorf("gone after %v, killed %d times", took, s.killed)
				}
				s.closed(&leakage{}, name)
				t.Logf("gone after %v: %v", took, s.end)

				s.watchSteps(nil)
				s.mac.Slow(pfctl, 0)
				s.mac.Slow(sysctl, 0)
				if s.hang != nil {
					close(s.hang)
				}
				s.buried()
				s.mac.Launchd.Stop = stop
				s.load()
				j := &judge{g: s.rig}
				j.few(s.rules(s.may, policy.Families{}))
				if err := s.ctl.Bootout(t.Context(), label); err != nil {
					t.Error(err)
				}
				s.asFound(found)
				s.buried()
				if s.end[len(s.end)-1] != nil || j.differences > 0 {
					t.Errorf("ends %v; %d differences", s.end, j.differences)
				}
			})
		})
	}
}
