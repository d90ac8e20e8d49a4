// Package explain says why a packet passes or doesn't, and what is wrong with a host.
//
// An answer combines everything that the packet meets: the policy, whether it is in force, the
// kernel's route for the packet, what other software's rules do with it and with its answer, and
// whether the tunnel's own datagrams arrive. [Explainer.Explain] answers about one packet,
// [Explainer.Doctor] checks every precondition, [Explainer.Rules] shows the rules as loaded, and
// [Explainer.Problems] is what status lists. They use the same functions for the same facts, so
// that they never contradict each other. [Explain] and [ChecksWithout] work without a running
// helper.
//
// An answer is made from the [held.State] that the loop published and from the parts of a host
// that may be called at any time ([host.Others], [host.Judge], [host.Ways]). The loop never
// waits for anything here. A host without one of these parts has fewer stops in its answers, no
// errors.
//
// The results are for people: a [api.Check] or an [api.Stop] has a message, which says what is
// wrong, and a hint, which says what to do about it. Messages may quote names from other
// software, so Explain and Doctor escape what a terminal doesn't print (package plain); the caller
// of Problems does that itself.
package explain
