// Package darwintest simulates a Mac for tests on any system: it implements the interfaces
// that package darwin works through, refuses what a Mac refuses, and prints what a Mac's
// programs print.
//
// [Kernel] has interfaces, addresses, the routing table and kernel variables; it speaks
// routing messages and answers ifconfig, sysctl and scutil. [PF] is the command line of
// pfctl in front of an [Engine], such as pfsim's machine. Their other methods do what
// happens on a Mac independently of the program under test: cables, DHCP, other software,
// reboots.
package darwintest
