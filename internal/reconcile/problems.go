package reconcile

import (
	"errors"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/host"
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
		return host.Problem{Step: step.Step, Message: step.Err.Error(), Hint: step.Hint}
	}
	name, message, found := strings.Cut(err.Error(), ": ")
	if !found {
		name, message = "reconcile", err.Error()
	}
	return host.Problem{Step: name, Message: message}
}
