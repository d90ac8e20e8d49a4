// Package lab is where the product is tried on hosts: its rooms make the hosts, or
// run the product on them. No program that people install has any of it.
//
// To choose a room, begin with what the test is about:
//
//   - The helper on Linux, from its commands to packets that stock WireGuard sends:
//     trial. The packets are real, on hosts that netlab makes.
//   - The helper on macOS, on any machine: mactrial. Its packets are judged by the
//     simulated Mac that simmac is; the daemon, the guard and the host are the product's.
//   - The helper on a real Mac: mactest. It runs as root by `make test-mac`; its script
//     also runs on Linux against the helper there.
//   - One package of the product, on hosts in a network: netlab, from the package's own
//     tests.
//   - One package of the product, with a Mac's commands, routing table and pf: simmac,
//     from the package's own tests.
//   - The product beside firewalls, containers and other VPNs on Linux: rulesets has
//     what they load, in shape, to put on a host of netlab.
//   - What people are shown: demo is a program that plays the product's story.
//
// What stands for what, and what a room needs:
//
//	room      stands for        packets          needs
//	netlab    Linux hosts       real             Linux, and root or the right to make user namespaces
//	trial     -                 real             as netlab
//	demo      -                 real             as netlab
//	simmac    a Mac             values, bytes    nothing
//	mactrial  -                 by simmac        nothing
//	mactest   a Mac's peer      real             a Mac and root; for its script on Linux, as netlab
//	rulesets  other software    -                nothing
//
// Without root a process that calls netlab.Main runs in a user namespace of its own,
// where that is permitted; where it isn't, such tests are skipped and say why.
//
// A test that has to end the helper at a step, or to look at the host there, sets
// Options.Step of the host that it runs: it is called before and after each step that
// changes the host. On a simulated Mac, simmac's Stepper adds calls after each command and
// routing message of a step, and the test calls Process.Kill there; in trial, where the
// helper is another process, a stepper waits in it and sends SIGKILL.
package lab
