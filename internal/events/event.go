// Package events holds what happened: [Event], and a [Journal] of the last events, which
// outlasts a restart of the helper.
//
// What informs never holds up what protects: recording an event waits for no disk, no
// reader and no log, and a reader that is too slow misses events. An event has the user
// who asked for a change by number: names are for who shows it, since a user database may
// not answer.
package events

import "time"

// Event is something that happened; a line of GET /v1/events.
type Event struct {
	// Seq counts the events from 1, and goes on, with a gap, where the helper starts again
	// on the same state. Another gap means that the reader was too slow.
	Seq     uint64    `json:"seq"`
	Time    time.Time `json:"time"`
	Kind    Kind      `json:"kind"`
	Peer    string    `json:"peer,omitempty"`
	Message string    `json:"message"`
	// UID is the user who asked for a change; nil where no user did.
	UID *uint32 `json:"uid,omitempty"`
}

// Kind says what an event is about.
type Kind string

// The kinds of event.
const (
	State     Kind = "state"     // the helper started, stopped, closed, enforces again
	Change    Kind = "change"    // the wanted state changed
	Expired   Kind = "expired"   // a permission ended by itself
	Handshake Kind = "handshake" // a peer connected
	Refused   Kind = "refused"   // packets of a peer were refused
	Denied    Kind = "denied"    // a local user asked for what it may not
	Repair    Kind = "repair"    // something on the host was put right
	Problem   Kind = "problem"   // something doesn't work
)
