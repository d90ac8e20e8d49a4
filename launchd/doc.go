// Package launchd installs and drives macOS system daemons: it writes and reads
// a job's property list, checks it by launchd's rules before launchd does, and
// runs launchctl(1) so that its races and bare numbers become waits and
// sentences.
//
// launchd is process 1 of a Mac. A daemon is a file in /Library/LaunchDaemons,
// named after its label, that says which program to start and when to start it
// again. Four things about it surprise people, and this package exists for them:
//
//   - launchd refuses a property list that a user other than root could have written,
//     and says only "5: Input/output error". See [Job.Check] and [CheckFile].
//   - Unloading returns before the daemon is gone, and loading answers 5 until it
//     is. See [Launchctl.Bootout] and [Launchctl.Bootstrap].
//   - A service can be switched off by `launchctl disable` or by the user in
//     Login Items & Extensions, and stays so across reboots and installs. See
//     [Launchctl.Disabled] and [Launchctl.LoginItem].
//   - What `launchctl print` shows is, in its manual's words, not API. [ParsePrint]
//     takes three facts from it and survives the loss of each.
//
// Nothing here needs a Mac to build or test: commands go through [Runner], and
// In tests, package launchdtest stands for launchd and refuses what it refuses.
package launchd
