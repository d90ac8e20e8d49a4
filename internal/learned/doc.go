// Package learned keeps what a host found out about its peers, beside what people asked
// for: where each was last heard and when, what was counted of it, and which addresses
// names stand for. A [Book] holds it in memory and in one file.
//
// All of it may be lost without harm: a host without it waits until peers send by
// themselves, looks names up again, and counts from zero. So it is saved seldom, a file that
// can't be read is as none, and nothing of it is ever in the document of what is wanted.
package learned
