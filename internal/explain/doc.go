// Package explain says why a packet passes or doesn't, and what is wrong with a host.
//
// Each answer takes all things together: the policy, whether it is in force, the way that
// the kernel would send the packet, what other software's rules do with it and with its
// answer, and whether the tunnel's own datagrams arrive. [Explainer.Explain] answers about
// one packet, [Explainer.Doctor] about every precondition, [Explainer.Rules] shows the
// rules as loaded, and [Explainer.Problems] is what the status lists. They share what they
// look at, so that they never contradict each other. [Explain] and [ChecksWithout] answer
// without a running helper.
//
// A question is answered from the [held.State] that the loop published and from questions
// to the parts of a host that exist for them ([host.Others], [host.Judge], [host.Ways]).
// Nothing here is waited for by the loop.
package explain
