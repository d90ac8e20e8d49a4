package reconcile

import (
	"errors"
	"slices"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/host"
)

// The steps of errors that name none themselves.
const (
	stepOpen   = "open mesh interface"
	stepTunnel = "tunnel"
)

// addProblem adds an error to this round's problems, unless it is one of them. It records an
// event if the problem is new, so that one that lasts is recorded once.
func (l *Loop) addProblem(err error) {
	p := problemOf(err)
	if slices.Contains(l.problems, p) {
		return
	}
	l.problems = append(l.problems, p)
	if l.news.Is(p) {
		l.o.Record(events.Event{Kind: events.Problem, Message: p.Step + ": " + p.Message})
	}
}

// problemOf returns an error as a problem: the step is that of a host.StepError, otherwise the
// part before the first colon, as in "observe host: ...".
func problemOf(err error) host.Problem {
	var step *host.StepError
	if errors.As(err, &step) {
		return host.Problem{Step: step.Step, Message: step.Err.Error(), Hint: step.Hint, Kind: step.Kind}
	}
	return host.Problem{Step: "reconcile", Message: err.Error()}
}
