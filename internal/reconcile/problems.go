package reconcile

import (
	"errors"
	"slices"
	"strings"

	"github.com/meshhelper/meshhelper/internal/events"
	"github.com/meshhelper/meshhelper/internal/host"
)

// addProblem takes an error apart for status and, where it is news, the
// journal.
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

// problemOf returns an error in the words of status.
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
