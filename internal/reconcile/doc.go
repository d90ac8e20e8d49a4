// Package reconcile makes the host hold what is wanted.
//
// It is one loop. Each round observes the host, compiles the policy for it, has the guard
// and then the host enforce the ruleset, reads back what is enforced, and cuts the running
// flows of peers that lost a permission. Between rounds the loop waits for a change of what
// is wanted, for the host's watcher, for the end of a permission, and for a tick, which
// finds what no event reports: rules that another program changed.
//
// What a round found is published as a [held.State]. A command that changed something waits
// for a state of its generation or a later one.
//
// # Closed
//
// Where the host can't be brought to hold what is wanted, the loop closes: it enforces the
// mesh without any permission, which any filter that works at all can do, says why in the
// state, and tries again with growing pauses. Closed is a state of forwarding alone. The
// tunnel stays, and so does what keeps peers' packets from leaving in clear.
//
// A look at the host that fails (a dump that was interrupted, a pfctl that was busy) is
// tried again and closes nothing. A step that fails closes what it can't hold. Each step
// and each look has a time limit of its own, so that one that used up all of its time
// leaves as much as ever to close in.
//
// # Narrowing
//
// A permission that is taken away doesn't wait for the loop. The writer of what is wanted
// calls [Gate.Limit] first, which has the guard pass the less of what the loop enforces
// and what is wanted now. The loop then follows with the packet filter.
//
// Two rules for changes here: the loop alone talks to the host's link, observer and
// enforcer and publishes states; the gate alone talks to the guard.
package reconcile
