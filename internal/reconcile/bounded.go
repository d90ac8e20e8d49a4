package reconcile

import (
	"errors"
	"sync"
	"time"

	"github.com/meshhelper/meshhelper/internal/mesh"
	"github.com/meshhelper/meshhelper/internal/tunnel"
)

// errHung is returned for each call to a tunnel that didn't return from an earlier one.
var errHung = errors.New("the tunnel doesn't answer")

// boundedTunnel is a tunnel whose calls that take the WireGuard device's locks return within
// StepLimit. A tunnel that takes longer counts as ended: the loop closes, and makes another.
// Otherwise a device that hangs would hold up every later change, with the filter as it was.
type boundedTunnel struct {
	Tunnel
	hung   chan struct{} // closed when a call took longer
	noHung sync.Once     // closes it
	done   chan struct{}
}

// bound returns t with limits.
func bound(t Tunnel) *boundedTunnel {
	b := &boundedTunnel{Tunnel: t, hung: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(b.done)
		select {
		case <-t.Done():
		case <-b.hung:
		}
	}()
	return b
}

// hasHung reports whether a call took longer than StepLimit.
func (b *boundedTunnel) hasHung() bool {
	select {
	case <-b.hung:
		return true
	default:
		return false
	}
}

// Done is closed when the tunnel has ended, or hangs.
func (b *boundedTunnel) Done() <-chan struct{} { return b.done }

func (b *boundedTunnel) Sync(want []tunnel.Peer) error {
	_, err := answerOf(b, func() (struct{}, error) { return struct{}{}, b.Tunnel.Sync(want) })
	return err
}

func (b *boundedTunnel) Stats() (map[mesh.PublicKey]tunnel.PeerStats, error) {
	return answerOf(b, b.Tunnel.Stats)
}

// answerOf returns what call returns, or errHung if that takes longer than StepLimit.
// No call is begun after that.
func answerOf[T any](b *boundedTunnel, call func() (T, error)) (none T, _ error) {
	if b.hasHung() {
		return none, errHung
	}
	var value T
	var err error
	if !returnsWithin(StepLimit, b.hung, func() { value, err = call() }) {
		b.noHung.Do(func() { close(b.hung) })
		return none, errHung // and nothing of value and err, which call may still write
	}
	return value, err
}

// returnsWithin reports whether call returns within limit, and before giveUp is closed.
// Otherwise call goes on in its goroutine, since nothing can interrupt it.
func returnsWithin(limit time.Duration, giveUp <-chan struct{}, call func()) bool {
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		call()
	}()
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-returned:
		return true
	case <-giveUp:
	case <-t.C:
	}
	return false
}
