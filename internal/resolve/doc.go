// Package resolve keeps the addresses of endpoints that people gave by name: peers', and
// this host's own as it is seen from outside.
//
// What is found is learned, not wanted: it goes into the book of package learned, from which
// the tunnel takes where to reach a peer, and the policy which addresses from outside are
// this host's. A name keeps its last address while a name server is silent, also over a
// restart.
//
// Names are looked up beside each other in two lanes, those that were found last time and
// those that weren't, so that names that time out don't keep others waiting.
package resolve
