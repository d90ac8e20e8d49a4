// Package learned keeps what a host found out about its peers, as opposed to what people
// asked for: the endpoint and time at which each peer was last heard, its traffic totals, and
// the addresses of names. A [Book] holds it in memory and saves it to one file.
//
// Losing it does no harm: a host without it waits until its peers send, resolves names again
// and counts from zero. So it is saved seldom, an unreadable file counts as none, and nothing
// of it is ever part of the wanted document.
package learned
