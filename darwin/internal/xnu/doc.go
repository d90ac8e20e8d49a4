// Package xnu is how the kernel of macOS speaks to programs, as bytes and names:
// routing messages, the list of sockets, and kernel variables. Package darwin reads
// it, and the kernel of darwintest writes it.
//
// Nothing here needs a Mac. The layouts of routing messages are those of xnu
// bsd/net/route.h, bsd/net/if.h and bsd/net/if_var.h; golang.org/x/net/route has the
// same sizes, but only builds on BSDs. Each socket address in a message is padded to 4
// bytes (ROUNDUP32 of xnu bsd/net/rtsock.c).
package xnu
