package pfsim

// A PF is a [Machine] that runs on, for tests: time passes in it, and what pfctl, the
// host and other programs do to a packet filter can be done to it and read of it. Its
// methods are no part of a program that only judges packets by a [Machine].
type PF struct{ Machine }

// NewPF returns an empty, disabled packet filter.
func NewPF(o Options) *PF {
	p := new(PF)
	p.setUp(o)
	return p
}
