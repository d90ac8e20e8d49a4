// Package darwintest is a Mac to test with, where there is none: what stands behind
// the seams of package darwin, refuses what a Mac refuses, and prints what its
// programs print.
//
// [Kernel] routes: interfaces, addresses, the routing table and kernel variables, by
// routing messages and by ifconfig, sysctl and scutil. [PF] is the command line of
// pfctl in front of an [Engine], such as pfsim's machine. Their other methods are what
// happens on a Mac without the program under test: cables, DHCP, other software,
// reboots.
package darwintest
