package linux

import "log/slog"

// Options say how a backend works.
type Options struct {
	// StateDir is the directory of the journal; it exists and only root writes
	// there.
	StateDir string // required
	// Log gets what the backend does; nil discards it.
	Log *slog.Logger // optional
	// ResolverFiles are the files in the form of resolv.conf(5) that name the
	// host's DNS servers; nil means the system's.
	ResolverFiles []string // optional
	// Step is called before and after each enforcing step, with one of [Steps], so
	// that tests can end the process there.
	Step func(name string) // optional
}
