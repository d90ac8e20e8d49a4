// Package xnu has the binary formats and names by which the kernel of macOS exchanges data
// with programs: routing messages, the list of sockets, and kernel variables. Package
// darwin reads the formats and writes requests; the simulated kernel of package darwintest
// does the reverse. Sharing one implementation keeps the two in agreement.
//
// Nothing here needs a Mac. The layouts of routing messages are those of xnu
// bsd/net/route.h, bsd/net/if.h and bsd/net/if_var.h. golang.org/x/net/route has the
// same sizes, but builds only on BSDs. Each socket address in a message is padded to 4
// bytes (ROUNDUP32 of xnu bsd/net/rtsock.c).
package xnu
