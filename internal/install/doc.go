// Package install installs the helper as a service, of launchd on a Mac and of systemd on
// Linux, upgrades it in place, and uninstalls it.
//
// [Install] and [Uninstall] run a list of [Step]s, each described by a sentence, so that
// a dry run prints exactly what a run would do. Install stops at the first step that
// fails and can be repeated. Uninstall goes on after a failure, works when the helper is
// dead or half removed, and reports what is left. [Checks] is what `meshhelper doctor`
// reports about the installed service.
//
// No user other than root may be able to replace a program that runs as root: it is
// copied to a folder that only root can write to, every folder above it is checked,
// and launchd's own rules are checked before launchd sees the property list.
package install
