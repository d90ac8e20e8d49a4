// Package wanted holds what people asked for: peers and their permissions, and the
// settings. It is the one writer of the state directory's document.
//
// Start reading at [State]. [State.AddPeer], [State.ChangePeer] and [State.RemovePeer]
// validate a request and apply it to a copy of the [Document]. Each change makes a new
// generation; a published document is immutable.
//
// A change that revokes a permission doesn't wait for the disk; one that grants a permission
// does. What is revoked is in force at the guard at once ([Options.Narrow]) and saved
// afterwards: should that fail, it is back after a restart, and [State.Problem] says so. What
// is granted is saved first and published afterwards. A caller waits for the disk no
// longer than its own time limit.
//
// [State.Run] ends permissions when their time is up and retries failed saves.
//
// A permission ends by a clock of the package's own, which follows the wall clock but never goes
// back behind a saved time, so that setting the wall clock back doesn't prolong a permission.
//
// The state directory has the document in state.json, with a copy for a person to restore,
// settings.json, the host's key and the clock's last time. Each is replaced by rename(2). All
// writes happen in one goroutine, which exists while there are any, because a disk can hang.
//
// The package knows nothing of hosts, packet filters or tunnels. The caller that opens a
// State learns of changes through the callbacks in [Options] and acts on them.
package wanted
