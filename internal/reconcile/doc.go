// Package reconcile makes the host enforce the wanted state.
//
// It is one loop. Each round observes the host, compiles the policy for it, has the guard
// and then the host enforce the ruleset, reads back what is enforced, and cuts the running
// flows of peers that lost a permission. Between rounds the loop waits for a change of the
// wanted state, for the host's watcher, for the end of a permission, and for a tick, which
// finds what no event reports: rules that another program changed.
//
// Each round publishes its result as a [held.State]. A command that changed something waits
// for a state of its generation or a later one.
//
// # Closed
//
// If the host can't be made to enforce the wanted state, the loop closes: it enforces the mesh
// without any permission, which any working filter can do, publishes the reason, and tries
// again with growing pauses. The tunnel and the rules that keep packets to peers from leaving
// in clear stay in place.
//
// An observation or inspection that fails (an interrupted dump, a busy pfctl) is repeated and
// closes nothing; an enforcing step that fails closes. Each of them has a time limit of its
// own, so that closing has its full time after a step that used up all of its own.
//
// # Narrowing
//
// A revoked permission doesn't wait for the loop. Package wanted calls [Gate.Limit] with each
// document, which has the guard pass only what both the loop's ruleset and the document allow.
// The loop then follows with the packet filter.
//
// # Invariants
//
// The loop alone calls the host's link, observer and enforcer and publishes states, from one
// goroutine. The gate alone gives the guard its rulesets.
package reconcile
