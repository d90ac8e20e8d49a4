// Package events has the helper's events: [Event], and a [Journal] of the latest ones that
// survives a restart.
//
// Recording an event never delays the work that it reports: it waits neither for a disk nor
// for a reader, and a reader that is too slow misses events. An event has the uid of the user
// that asked for a change; the client looks up the name, as the user database may block.
package events

import "time"

// Event is a line of GET /v1/events.
type Event struct {
	// Seq numbers the events from 1. It continues after a restart with the same state
	// directory, with a gap (see seqStep). Any other gap means that the reader was too slow.
	Seq     uint64    `json:"seq"`
	Time    time.Time `json:"time"`
	Kind    Kind      `json:"kind"`
	Peer    string    `json:"peer,omitempty"`
	Message string    `json:"message"`
	// UID is the user that asked for a change; nil for events that no user caused.
	UID *uint32 `json:"uid,omitempty"`
}

// Kind is the kind of an event.
type Kind string

// The kinds of event.
const (
	State     Kind = "state"     // the helper started, stopped, closed, enforces again
	Change    Kind = "change"    // the wanted state changed
	Expired   Kind = "expired"   // a permission's time was up
	Handshake Kind = "handshake" // a peer connected
	Refused   Kind = "refused"   // packets of a peer were refused
	Denied    Kind = "denied"    // a local user's request was refused
	Repair    Kind = "repair"    // the helper undid a change of the host by others
	Problem   Kind = "problem"   // something doesn't work
)
