package install

import (
	"context"
	"errors"
	"fmt"
)

// A Step is one thing that is done.
type Step struct {
	// Text says what, without a full stop.
	Text string
	// Optional steps may fail: what they return is told and the rest goes on.
	Optional bool

	do func(ctx context.Context) error
}

// errNothing is what a step gives that found nothing to do.
var errNothing = errors.New("nothing to do")

// Report is told of each step after it was tried, with its error. A step that found
// nothing to do isn't told of.
type Report func(s Step, err error)

// until runs the steps up to the first failure.
func until(ctx context.Context, steps []Step, report Report) error {
	for _, s := range steps {
		err := run(ctx, s, report)
		if err != nil && !s.Optional {
			return err
		}
	}
	return nil
}

// through runs all steps and returns what failed. Beside another helper it ends.
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
