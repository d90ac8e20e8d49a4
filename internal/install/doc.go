// Package install puts the helper on a Mac as a service of launchd, and on Linux as one
// of systemd, upgrades it in place, and takes it away again.
//
// Both are lists of [Step]s, each with a sentence that says what it does, so that
// a dry run prints exactly what a run would do. Installing stops at the first step
// that fails and can be repeated. Uninstalling goes on, works when the helper is
// dead or half removed, and ends by saying what is left.
//
// A program that runs as root must not be replaceable by any other user: it is
// copied to a folder that only root can write, every folder above it is checked,
// and launchd's own rules are checked before launchd sees the property list.
package install
