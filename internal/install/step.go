package install

import (
	"context"
	"errors"
	"fmt"
)

// A Step is one action of Install or Uninstall.
type Step struct {
	// Text describes the action, without a full stop.
	Text string
	// Optional says that a failure is reported and the following steps still run.
	Optional bool

	do func(ctx context.Context) error
}

// errNothing is returned by a step that found nothing to do.
var errNothing = errors.New("nothing to do")

// A Report function is called after each step that did something, with the step's error
// or nil.
type Report func(s Step, err error)

// until runs the steps up to the first one that fails and isn't optional.
func until(ctx context.Context, steps []Step, report Report) error {
	for _, s := range steps {
		err := run(ctx, s, report)
		if err != nil && !s.Optional {
			return err
		}
	}
	return nil
}

// through runs all steps and returns the errors of those that aren't optional. It stops
// early only at errAnother.
func through(ctx context.Context, steps []Step, report Report) error {
	var failed []error
	for _, s := range steps {
		if err := run(ctx, s, report); err != nil && !s.Optional {
			failed = append(failed, err)
			if errors.Is(err, errAnother) {
				break
			}
		}
	}
	return errors.Join(failed...)
}

// run runs a step, unless ctx has ended, and reports it. A step that had nothing to do isn't
// reported. The error begins with the step's text.
func run(ctx context.Context, s Step, report Report) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", s.Text, err)
	}
	err := s.do(ctx)
	if errors.Is(err, errNothing) {
		return nil
	}
	report(s, err)
	if err != nil {
		return fmt.Errorf("%s: %w", s.Text, err)
	}
	return nil
}
