// Command meshhelper turns this computer into a router for WireGuard peers,
// one toggle per peer and permission.
package main

func main() {}
