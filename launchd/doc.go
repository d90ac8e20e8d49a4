// Package launchd installs and controls macOS system daemons: it writes and reads a
// job's property list, checks it by launchd's rules before launchd does, and runs
// launchctl(1). Where launchctl returns too early it waits, and where launchctl prints a
// number it returns an error with the cause and a hint.
//
// launchd is process 1 of a Mac. A daemon is a file in /Library/LaunchDaemons,
// named after its label, that says which program to start and when to restart it.
// This package exists because four things about launchd are surprising:
//
//   - launchd refuses a property list that a user other than root could have written,
//     and says only "5: Input/output error". See [Job.Check] and [CheckFile].
//   - Unloading returns before the daemon is gone, and loading answers 5 until it
//     is. See [Launchctl.Bootout] and [Launchctl.Bootstrap].
//   - A service can be switched off by `launchctl disable` or by the user in
//     Login Items & Extensions, and stays so across reboots and installs. See
//     [Launchctl.Disabled] and [Launchctl.LoginItem].
//   - What `launchctl print` shows is, in its manual's words, not API. [ParsePrint]
//     reads it, and each field of [Status] may be missing.
//
// Nothing here needs a Mac to build or test: commands go through [Runner]. In tests,
// package launchdtest takes launchd's place and refuses what launchd refuses.
package launchd
