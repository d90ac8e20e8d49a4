package linux

import "log/slog"

// Options configures a [Backend].
type Options struct {
	// StateDir is the directory of the journal. It must exist, and only root may write to
	// it.
	StateDir string // required
	// Log receives the steps that the backend takes; nil discards them.
	Log *slog.Logger // optional
	// ResolverFiles are files in the format of resolv.conf(5) that list the host's DNS
	// servers; nil means those of the system.
	ResolverFiles []string // optional
	// Step is called with the name of an enforcing step, such as [StepLock], before and after
	// the step; tests end the process in it.
	Step func(name string) // optional
}
