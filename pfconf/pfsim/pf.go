package pfsim

// A PF is a [Machine] for tests: time passes, and it has the operations by which pfctl, the
// host and other programs change or read a packet filter. They are methods of a type of
// their own so that they aren't linked into a program that only judges packets.
type PF struct{ Machine }

// NewPF returns an empty, disabled packet filter.
func NewPF(o Options) *PF {
	p := new(PF)
	p.setUp(o)
	return p
}
