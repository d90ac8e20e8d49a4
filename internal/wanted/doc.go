// Package wanted holds what people asked for: peers and their permissions, and the
// settings. It is the one writer of the state directory's document.
//
// A newcomer starts at [State]: [State.AddPeer], [State.ChangePeer] and [State.RemovePeer]
// check what is asked for and change a copy of the [Document], of which every change makes
// a new generation; a document that was published is never changed. What a change takes
// away is in force at the guard at once ([Options.Narrow]) and saved afterwards; what it
// gives is saved first. Nothing waits for the disk for longer than it chose to.
// [State.Keep] has permissions end by themselves, and tries again to save what couldn't be
// saved.
//
// The package knows nothing of hosts, packet filters or tunnels: whoever opens a State is
// told of changes, and does what is to be done about them.
package wanted
