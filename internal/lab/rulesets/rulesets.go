// Package rulesets has rulesets that other software loads into the packet filter of a Linux
// host, reduced to their structure: firewalls, containers, other VPNs, block lists. Tests
// load each next to the helper's table, send packets, and compare what the helper says
// about each packet with whether it arrives.
package rulesets

import "strings"

// A Ruleset is the ruleset of one program.
type Ruleset struct {
	Name string
	// NFT is input of nft(8). IPTables is input of iptables-nft-restore(8), and of
	// ip6tables-nft-restore after IP6Tables. Either may be empty. MESH, WAN and LAN0
	// stand for the names of interfaces, see For.
	NFT, IPTables string
	// Stops has the kinds of packets that the ruleset stops, and Unclear those for which
	// it depends on what the helper can't evaluate. Both are lists, separated by commas, of
	// names, first words of names, or "all"; 4 or 6 behind a name limits it to a family.
	// The names are: net udp, net tcp, net dns, net ping, lan, vm, host udp, host tcp,
	// host ping, answer, wg in, wg out.
	Stops, Unclear string
}

// For returns the ruleset with the names of the interfaces.
func (r Ruleset) For(mesh, wan, lan string) Ruleset {
	names := strings.NewReplacer("MESH", mesh, "WAN", wan, "LAN0", lan)
	r.NFT, r.IPTables = names.Replace(r.NFT), names.Replace(r.IPTables)
	return r
}

// IP6Tables returns IPTables with the names of ICMPv6 in place of those of ICMP, for
// ip6tables-nft-restore(8).
func (r Ruleset) IP6Tables() string {
	return strings.NewReplacer("icmp-port-unreachable", "icmp6-port-unreachable", "-p icmp --icmp-type", "-p ipv6-icmp --icmpv6-type").Replace(r.IPTables)
}

// All has the rulesets. The first is empty, to compare with.
var All = []Ruleset{
	{Name: "nothing"},
	{Name: "OpenWrt's fw4 without a zone for the mesh", Stops: "net, lan, vm, host", Unclear: "host tcp", NFT: `
table inet fw4 {
	set lans { type ifname; elements = { "LAN0" } }
	chain input {
		type filter hook input priority filter; policy drop;
		iif "lo" accept comment "!fw4: Accept traffic from loopback"
		ct state vmap { established : accept, related : accept } comment "!fw4: Handle inbound flows"
		tcp flags & (fin | syn | rst | ack) == syn jump syn_flood
		iifname "LAN0" jump input_lan
		iifname "WAN" jump input_wan
		jump handle_reject
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state vmap { established : accept, related : accept }
		iifname @lans jump forward_lan
		iifname "WAN" jump forward_wan
		jump handle_reject
	}
	chain output {
		type filter hook output priority filter; policy accept;
		oif "lo" accept
		ct state vmap { established : accept, related : accept }
	}
	chain handle_reject {
		meta l4proto tcp reject with tcp reset
		reject with icmpx type port-unreachable
	}
	chain syn_flood {
		limit rate 25/second burst 50 packets return
		drop
	}
	chain input_lan {
		accept
	}
	chain input_wan {
		udp dport 51820 counter accept comment "!fw4: Allow-WireGuard"
		meta nfproto ipv4 udp dport 68 accept
		icmp type echo-request accept
		jump handle_reject
	}
	chain forward_lan {
		oifname "WAN" accept
	}
	chain forward_wan {
		meta l4proto esp accept
		jump handle_reject
	}
	chain srcnat {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "WAN" masquerade
	}
	chain mangle_forward {
		type filter hook forward priority mangle; policy accept;
		iifname "WAN" tcp flags syn tcp option maxseg size set rt mtu
	}
}`},
	{Name: "OpenWrt's fw4 with a zone for the mesh", Unclear: "host tcp", NFT: `
table inet fw4 {
	chain input {
		type filter hook input priority filter; policy drop;
		ct state vmap { established : accept, related : accept }
		tcp flags & (fin | syn | rst | ack) == syn jump syn_flood
		iifname { "MESH", "LAN0" } accept
		iifname "WAN" udp dport 51820 accept
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state vmap { established : accept, related : accept }
		iifname { "MESH", "LAN0" } jump accept_to
	}
	chain accept_to {
		oifname vmap { "WAN" : accept, "LAN0" : accept, "virbr0" : accept }
	}
	chain syn_flood {
		limit rate 25/second burst 50 packets return
		drop
	}
}`},
	{Name: "NixOS", Stops: "host udp, wg in, host tcp", NFT: `
table inet nixos-fw {
	chain rpfilter {
		type filter hook prerouting priority mangle + 10; policy drop;
		meta nfproto ipv4 udp sport . udp dport { 67 . 68, 68 . 67 } accept
		fib saddr . mark . iif oif exists accept
		jump rpfilter-allow
	}
	chain rpfilter-allow { }
	chain input {
		type filter hook input priority filter; policy drop;
		iifname { "lo" } accept comment "trusted interfaces"
		ct state vmap { invalid : drop, established : accept, related : accept, new : jump input-allow, untracked : jump input-allow }
		tcp flags & (fin | syn | rst | ack) == syn log level info prefix "refused connection: "
	}
	chain input-allow {
		tcp dport { 80, 443 } accept
		udp dport { 5353 } accept
		icmp type echo-request accept
		icmpv6 type != { nd-redirect, 139 } accept
		ip6 daddr fe80::/64 udp dport 546 accept
	}
}`},
	{Name: "NixOS with the port open and the mesh trusted", NFT: `
table inet nixos-fw {
	chain input {
		type filter hook input priority filter; policy drop;
		iifname vmap { "lo" : accept, "MESH" : accept, "WAN" : jump input-allow }
		ct state vmap { invalid : drop, established : accept, related : accept, new : jump input-allow, untracked : jump input-allow }
	}
	chain input-allow {
		ct state established accept
		udp dport { 51820 } accept
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state vmap { invalid : drop, established : accept, related : accept, new : jump forward-allow }
		jump forward-allow
	}
	chain forward-allow {
		iifname "MESH" accept
	}
}`},
	{Name: "firewalld, the mesh in the zone public", Stops: "net, lan, vm, host udp, wg in", NFT: `
table inet firewalld {
	chain mangle_PREROUTING {
		type filter hook prerouting priority mangle + 10; policy accept;
		icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
		meta nfproto ipv6 fib saddr . mark . iif oif missing drop
		jump mangle_PREROUTING_ZONES
	}
	chain mangle_PREROUTING_ZONES {
		iifname "WAN" goto mangle_PRE_public
		goto mangle_PRE_public
	}
	chain mangle_PRE_public { }
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		jump filter_INPUT_ZONES
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		ip6 daddr { ::/96, ::ffff:0.0.0.0/96, 2002::/24, 2002:a00::/24 } reject with icmpv6 addr-unreachable
		jump filter_FORWARD_ZONES
		reject with icmpx admin-prohibited
	}
	chain filter_OUTPUT {
		type filter hook output priority filter + 10; policy accept;
		ct state { established, related } accept
		oifname "lo" accept
		ip6 daddr { ::/96, ::ffff:0.0.0.0/96 } reject with icmpv6 addr-unreachable
	}
	chain filter_INPUT_ZONES {
		iifname "WAN" goto filter_IN_public
		goto filter_IN_public
	}
	chain filter_FORWARD_ZONES {
		iifname "WAN" goto filter_FWD_public
		goto filter_FWD_public
	}
	chain filter_IN_public {
		jump filter_IN_public_allow
		meta l4proto { icmp, ipv6-icmp } accept
	}
	chain filter_IN_public_allow {
		tcp dport 22 accept
		ip6 daddr fe80::/64 udp dport 546 accept
	}
	chain filter_FWD_public { }
}`},
	{Name: "firewalld, the mesh in the zone trusted", NFT: `
table inet firewalld {
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		jump filter_INPUT_ZONES
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		iifname "MESH" goto filter_FWD_trusted
		reject with icmpx admin-prohibited
	}
	chain filter_INPUT_ZONES {
		iifname "MESH" goto filter_IN_trusted
		goto filter_IN_public
	}
	chain filter_IN_trusted {
		accept
	}
	chain filter_IN_public {
		udp dport 51820 accept
	}
	chain filter_FWD_trusted {
		accept
	}
}`},
	{Name: "firewalld's sets of sources", Stops: "host udp 4, host tcp 4, host ping 4, host udp 6, host tcp 6, host ping 6", NFT: `
table inet firewalld {
	set sources { type ipv4_addr; flags interval; elements = { 100.64.0.0-100.64.0.9, 100.64.0.11/32, 192.168.0.0/16 } }
	set sources6 { type ipv6_addr; flags interval; elements = { fd6d:6573:6800::1-fd6d:6573:6800::9 } }
	chain filter_INPUT {
		type filter hook input priority filter; policy accept;
		ip saddr @sources goto trusted
		ip6 saddr @sources6 goto trusted
		iifname "MESH" drop
	}
	chain trusted {
		accept
	}
}`},
	{Name: "ufw", Stops: "net udp, net tcp, net dns, lan, vm, host udp, host tcp, wg in", IPTables: `*filter
:INPUT DROP
:FORWARD DROP
:OUTPUT ACCEPT
:ufw-before-input - [0:0]
:ufw-before-forward - [0:0]
:ufw-before-output - [0:0]
:ufw-not-local - [0:0]
:ufw-user-input - [0:0]
-A INPUT -j ufw-before-input
-A FORWARD -j ufw-before-forward
-A OUTPUT -j ufw-before-output
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp --icmp-type echo-request -j ACCEPT
-A ufw-before-input -j ufw-not-local
-A ufw-before-input -j ufw-user-input
-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw-not-local -j DROP
-A ufw-user-input -p tcp --dport 80 -j ACCEPT
-A ufw-user-input -p tcp -m multiport --dports 443,8000:8080 -j ACCEPT
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -p icmp --icmp-type echo-request -j ACCEPT
-A ufw-before-output -m conntrack --ctstate RELATED,ESTABLISHED,NEW -j ACCEPT
COMMIT
`},
	{Name: "ufw that lets the mesh through", Unclear: "host tcp", IPTables: `*filter
:INPUT DROP
:FORWARD DROP
:OUTPUT ACCEPT
:ufw-user-input - [0:0]
:ufw-user-limit - [0:0]
:ufw-user-forward - [0:0]
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -j ufw-user-input
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -j ufw-user-forward
-A ufw-user-input -p udp -m udp --dport 51820 -j ACCEPT
-A ufw-user-input -p tcp -m tcp --dport 22 -m conntrack --ctstate NEW -m recent --set --name DEFAULT
-A ufw-user-input -p tcp -m tcp --dport 22 -m conntrack --ctstate NEW -m recent --update --seconds 30 --hitcount 6 --name DEFAULT -j ufw-user-limit
-A ufw-user-input -i MESH -j ACCEPT
-A ufw-user-limit -m limit --limit 3/min -j LOG --log-prefix "limit block"
-A ufw-user-limit -j REJECT
-A ufw-user-forward -i MESH -j ACCEPT
COMMIT
`},
	{Name: "Docker", Stops: "net, lan, vm, answer", IPTables: `*nat
:PREROUTING ACCEPT
:POSTROUTING ACCEPT
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j REDIRECT --to-ports 80
COMMIT
*filter
:INPUT ACCEPT
:FORWARD DROP
:OUTPUT ACCEPT
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER-USER -j RETURN
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
COMMIT
`},
	{Name: "Docker with the mesh let through in DOCKER-USER", IPTables: `*filter
:FORWARD DROP
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -i docker0 -j ACCEPT
-A DOCKER-USER -i MESH -j ACCEPT
-A DOCKER-USER -o MESH -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-USER -j RETURN
COMMIT
`},
	{Name: "Docker's port that a peer meets", Stops: "host tcp", IPTables: `*nat
:PREROUTING ACCEPT
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 22 -j DNAT --to-destination :2222
COMMIT
`},
	{Name: "libvirt", Stops: "vm", IPTables: `*filter
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
:LIBVIRT_INP - [0:0]
:LIBVIRT_FWI - [0:0]
:LIBVIRT_FWO - [0:0]
:LIBVIRT_FWX - [0:0]
-A INPUT -j LIBVIRT_INP
-A FORWARD -j LIBVIRT_FWX
-A FORWARD -j LIBVIRT_FWI
-A FORWARD -j LIBVIRT_FWO
-A LIBVIRT_INP -i virbr0 -p udp -m udp --dport 53 -j ACCEPT
-A LIBVIRT_FWI -o virbr0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A LIBVIRT_FWI -o virbr0 -j REJECT --reject-with icmp-port-unreachable
-A LIBVIRT_FWO -i virbr0 -j REJECT --reject-with icmp-port-unreachable
-A LIBVIRT_FWX -i virbr0 -o virbr0 -j ACCEPT
COMMIT
`},
	{Name: "libvirt by nft", Stops: "vm", NFT: `
table ip libvirt_network {
	chain forward {
		type filter hook forward priority filter; policy accept;
		counter jump guest_cross
		counter jump guest_input
	}
	chain guest_cross {
		iif "virbr0" oif "virbr0" counter accept
	}
	chain guest_input {
		oif "virbr0" ip daddr 192.168.122.0/24 ct state established,related counter accept
		oif "virbr0" counter reject
	}
}
table ip6 libvirt_network {
	chain forward {
		type filter hook forward priority filter; policy accept;
		oif "virbr0" ip6 daddr fd22::/64 ct state established,related counter accept
		oif "virbr0" counter reject
	}
}`},
	{Name: "Tailscale", Stops: "host udp 4, host tcp 4, host ping 4", IPTables: `*filter
:INPUT ACCEPT
:FORWARD ACCEPT
:ts-input - [0:0]
:ts-forward - [0:0]
-A INPUT -j ts-input
-A FORWARD -j ts-forward
-A ts-input -i tailscale0 -j ACCEPT
-A ts-input -p udp -m udp --dport 41641 -j ACCEPT
-A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
-A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT
-A ts-forward -o tailscale0 -j ACCEPT
COMMIT
`, NFT: `
table ip tailscale {
	chain INPUT {
		type filter hook input priority filter; policy accept;
		counter jump ts-input
	}
	chain ts-input {
		iifname "lo" ip saddr 100.64.0.1 counter accept
		iifname != "tailscale0" ip saddr 100.115.92.0/23 counter return
		iifname != "tailscale0" ip saddr 100.64.0.0/10 counter drop
	}
	chain FORWARD {
		type filter hook forward priority filter; policy accept;
		oifname "tailscale0" ip saddr 100.64.0.0/10 counter drop
	}
}`},
	{Name: "Tailscale's refusal of its prefix on the way out", Stops: "net 4, lan 4, vm 4", NFT: `
table ip filter {
	chain FORWARD {
		type filter hook forward priority filter; policy accept;
		counter jump ts-forward
	}
	chain ts-forward {
		iifname "tailscale0" counter meta mark set meta mark & 0xff00ffff | 0x00040000
		meta mark & 0x00ff0000 == 0x00040000 counter accept
		oifname != "tailscale0" ip saddr 100.64.0.0/10 counter drop
	}
}`},
	{Name: "a block list with intervals that isn't met", NFT: `
table inet blocklist {
	set bad { type ipv4_addr; flags interval; auto-merge; elements = { 192.0.2.0/26, 192.0.2.128/31, 198.51.100.0/24, 203.0.113.64/26 } }
	set bad6 { type ipv6_addr; flags interval; elements = { 2001:db8:dead::/48, 2001:db8:1111::/127 } }
	chain through {
		type filter hook forward priority -10; policy accept;
		ip daddr @bad counter drop
		ip saddr @bad counter drop
		ip6 daddr @bad6 counter drop
	}
	chain in {
		type filter hook input priority -10; policy accept;
		ip saddr @bad counter drop
	}
}`},
	{Name: "a block list with intervals that is met", Stops: "net, answer", NFT: `
table inet blocklist {
	set bad { type ipv4_addr; flags interval; elements = { 192.0.2.128/25, 198.51.100.0/24 } }
	set bad6 { type ipv6_addr; flags interval; elements = { 2001:db8:1111::1-2001:db8:1111::f } }
	chain through {
		type filter hook forward priority -10; policy accept;
		ip daddr @bad counter drop
		ip saddr @bad counter drop
		ip6 daddr @bad6 counter drop
		ip6 saddr @bad6 counter drop
	}
}`},
	{Name: "a ban with a timeout, as fail2ban's", Stops: "wg in 4, host tcp", NFT: `
table inet f2b-table {
	set addr-set { type ipv4_addr; timeout 1h; elements = { 192.0.2.130 timeout 10m, 192.0.2.131 } }
	set ssh { typeof ip saddr . tcp dport; flags timeout; elements = { 100.64.0.10 . 22 timeout 5m } }
	set ssh6 { type ipv6_addr . inet_service; flags timeout; elements = { fd6d:6573:6800::10 . 22 timeout 5m } }
	chain f2b-chain {
		type filter hook input priority filter - 1; policy accept;
		ip saddr @addr-set reject
		ip saddr . tcp dport @ssh reject with tcp reset
		ip6 saddr . tcp dport @ssh6 reject with tcp reset
	}
}`},
	{Name: "concatenations with intervals", Stops: "net udp 4, host ping 6", NFT: `
table inet concat {
	set pairs { type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags interval; elements = { 100.64.0.0/24 . 192.0.2.0/24 . udp . 40000-40010, 100.64.0.0/24 . 192.0.2.0/24 . tcp . 80-90 } }
	set pings { type ipv6_addr . icmpv6_type; elements = { fd6d:6573:6800::10 . echo-request } }
	chain through {
		type filter hook forward priority filter; policy accept;
		ip saddr . ip daddr . meta l4proto . th dport @pairs drop
	}
	chain in {
		type filter hook input priority filter; policy accept;
		ip6 saddr . icmpv6 type @pings drop
	}
}`},
	{Name: "concatenations of interfaces that let pass", Stops: "vm, host tcp", NFT: `
table inet zones {
	chain through {
		type filter hook forward priority filter; policy drop;
		iifname . oifname vmap { "MESH" . "WAN" : accept, "MESH" . "LAN0" : jump lan, "WAN" . "MESH" : accept }
	}
	chain lan {
		meta l4proto . th dport vmap { udp . 40001 : accept, tcp . 445 : accept }
	}
	chain in {
		type filter hook input priority filter; policy accept;
		iifname . tcp dport { "MESH" . 22 } drop
	}
}`},
	{Name: "ports by a verdict map", Stops: "host tcp, net tcp", NFT: `
table inet ports {
	chain in {
		type filter hook input priority filter; policy accept;
		tcp dport vmap { 22 : drop, 80 : accept, 8000-8999 : drop }
	}
	chain through {
		type filter hook forward priority filter; policy accept;
		tcp dport vmap { 0-442 : accept, 443-444 : goto refuse, 445-65535 : accept }
	}
	chain refuse {
		reject with tcp reset
	}
}`},
	{Name: "a named verdict map of interfaces", Stops: "lan, vm", NFT: `
table inet named {
	map ways { type ifname : verdict; elements = { "WAN" : accept, "LAN0" : drop, "virbr0" : jump machines } }
	chain machines {
		ip daddr 192.168.122.0/24 drop
		ip6 daddr fd22::/64 drop
	}
	chain through {
		type filter hook forward priority filter; policy drop;
		oifname vmap @ways
		oifname "MESH" accept
	}
}`},
	{Name: "a named map of marks", Stops: "net, lan", NFT: `
table inet marks {
	map mark4 { type ifname : mark; elements = { "WAN" : 0x10, "LAN0" : 0x20 } }
	chain before {
		type filter hook forward priority mangle; policy accept;
		iifname "MESH" meta mark set oifname map @mark4
	}
	chain through {
		type filter hook forward priority filter; policy accept;
		meta mark { 0x10, 0x20 } drop
	}
}`},
	{Name: "marks that let pass", Stops: "host udp, host ping", NFT: `
table inet marks {
	chain pre {
		type filter hook prerouting priority mangle; policy accept;
		iifname "MESH" tcp dport 22 meta mark set 0x1
		iifname "MESH" meta mark != 0x1 meta mark set meta mark | 0x200
	}
	chain in {
		type filter hook input priority filter; policy accept;
		meta mark & 0xff == 0x1 accept
		iifname "MESH" drop
	}
}`},
	{Name: "conntrack's marks", Stops: "net tcp, host tcp", Unclear: "answer", NFT: `
table inet ctmarks {
	chain pre {
		type filter hook prerouting priority mangle; policy accept;
		meta l4proto tcp ct state new ct mark set 0x7
	}
	chain through {
		type filter hook forward priority filter; policy accept;
		ct mark 0x7 drop
	}
	chain in {
		type filter hook input priority filter; policy accept;
		ct mark & 0x4 == 0x4 drop
	}
}`},
	{Name: "a named quota that isn't used up", NFT: `
table inet quotas {
	quota month { over 500000 mbytes }
	counter seen { }
	chain through {
		type filter hook forward priority filter; policy accept;
		counter name "seen"
		quota name "month" drop
	}
	chain in {
		type filter hook input priority filter; policy accept;
		quota over 100 mbytes drop
	}
}`},
	{Name: "a quota that is used up", Stops: "net, lan, vm, answer", NFT: `
table inet quotas {
	quota month { over 100 bytes used 100 bytes }
	chain through {
		type filter hook forward priority filter; policy accept;
		quota name "month" drop
	}
}`},
	{Name: "a named quota up to which is let through", NFT: `
table inet quotas {
	quota month { until 500000 mbytes }
	chain through {
		type filter hook forward priority filter; policy drop;
		quota name "month" accept
	}
}`},
	{Name: "a named limit", Unclear: "net, lan, vm, answer", NFT: `
table inet limits {
	limit some { rate 400/minute }
	chain through {
		type filter hook forward priority filter; policy accept;
		limit name "some" accept
		drop
	}
}`},
	{Name: "a limit only on the log", NFT: `
table inet limits {
	chain through {
		type filter hook forward priority filter; policy accept;
		iifname "MESH" limit rate 1/minute log prefix "mesh " counter
	}
	chain in {
		type filter hook input priority filter; policy accept;
		limit rate over 10/second counter
	}
}`},
	{Name: "a meter of sources", Unclear: "host tcp", NFT: `
table inet meters {
	set flood { type ipv4_addr; size 65535; flags dynamic, timeout; timeout 1m; }
	set flood6 { type ipv6_addr; size 65535; flags dynamic, timeout; timeout 1m; }
	chain in {
		type filter hook input priority filter; policy accept;
		tcp dport 22 ct state new add @flood { ip saddr limit rate over 10/minute } drop
		tcp dport 22 ct state new add @flood6 { ip6 saddr limit rate over 10/minute } drop
	}
}`},
	{Name: "port knocking", Stops: "host tcp", NFT: `
table inet knock {
	set knocked { type ipv4_addr; flags dynamic, timeout; timeout 30s; }
	chain in {
		type filter hook input priority filter; policy accept;
		iifname "MESH" tcp dport 7000 add @knocked { ip saddr timeout 30s }
		tcp dport 22 ip saddr @knocked accept
		tcp dport 22 drop
	}
}`},
	{Name: "a bound on connections", Unclear: "net udp, net tcp, net ping, net dns, lan, vm", NFT: `
table inet bounds {
	chain through {
		type filter hook forward priority filter; policy accept;
		iifname "MESH" ct count over 20 reject
	}
}`},
	{Name: "users of this host", NFT: `
table inet users {
	chain out {
		type filter hook output priority filter; policy accept;
		oifname "WAN" meta skuid 1001 drop
	}
}`},
	{Name: "WireGuard's port closed on the way in", Stops: "wg in", NFT: `
table inet host {
	chain in {
		type filter hook input priority filter; policy drop;
		ct state established,related accept
		iifname { "lo", "MESH" } accept
		meta l4proto { icmp, ipv6-icmp } accept
		udp dport { 53, 123, 500, 4500 } accept
		udp dport 51821-60000 accept
	}
}`},
	{Name: "WireGuard's port closed on the way out", Stops: "wg out", NFT: `
table inet host {
	chain out {
		type filter hook output priority filter; policy drop;
		oifname { "lo", "MESH" } accept
		ct state established accept
		meta l4proto { icmp, ipv6-icmp, tcp } accept
		udp dport { 53, 123, 443 } accept
	}
}`},
	{Name: "WireGuard's port taken in prerouting", Stops: "wg in", NFT: `
table inet early {
	chain pre {
		type filter hook prerouting priority raw; policy accept;
		iifname "WAN" udp dport 51000-52000 fib daddr type local drop
	}
}`},
	{Name: "notrack of what the peers send", Stops: "net, lan, vm", Unclear: "", NFT: `
table inet raw {
	chain pre {
		type filter hook prerouting priority raw; policy accept;
		iifname "MESH" ip daddr != 100.64.0.1 notrack
		iifname "MESH" ip6 daddr != fd6d:6573:6800::1 notrack
	}
}`},
	{Name: "notrack of what the uplink sends", Stops: "answer", NFT: `
table inet raw {
	chain pre {
		type filter hook prerouting priority raw; policy accept;
		iifname "WAN" udp dport != 51820 notrack
	}
}`},
	{Name: "conntrack's zones", Unclear: "net, lan, vm, host", NFT: `
table inet zones {
	chain pre {
		type filter hook prerouting priority raw; policy accept;
		iifname "MESH" ct zone set 7
	}
}`},
	{Name: "DNS that is redirected", Stops: "net dns", NFT: `
table inet dns {
	chain dstnat {
		type nat hook prerouting priority dstnat; policy accept;
		iifname "MESH" meta l4proto { tcp, udp } th dport 53 counter redirect to :5353
	}
}`},
	{Name: "DNS that is sent elsewhere, except from some", Stops: "net dns 6", NFT: `
table ip nat {
	set except { type ipv4_addr; flags interval; elements = { 100.64.0.8/29 } }
	chain PREROUTING {
		type nat hook prerouting priority dstnat; policy accept;
		ip saddr @except return
		udp dport 53 dnat to 192.168.77.2
	}
}
table ip6 nat {
	chain PREROUTING {
		type nat hook prerouting priority dstnat; policy accept;
		udp dport 53 dnat to fd77::2
	}
}`},
	{Name: "servers by numgen and jhash", Unclear: "host tcp", NFT: `
table inet balance {
	chain dstnat {
		type nat hook prerouting priority dstnat; policy accept;
		iifname "MESH" tcp dport 22 redirect to numgen random mod 2 map { 0 : 2201, 1 : 2202 }
		iifname "LAN0" dnat ip to jhash ip saddr mod 2 map { 0 : 192.168.122.2, 1 : 192.168.122.3 }
	}
}`},
	{Name: "a share by numgen", Unclear: "net, lan, vm, answer", NFT: `
table inet share {
	chain through {
		type filter hook forward priority filter; policy accept;
		numgen random mod 10 < 5 drop
	}
}`},
	{Name: "reverse paths", NFT: `
table inet paths {
	chain pre {
		type filter hook prerouting priority raw; policy accept;
		fib saddr . iif oif missing drop
		fib saddr type { broadcast, anycast, multicast } drop
		iifname "MESH" fib saddr . iif oif 0 drop
	}
}`},
	{Name: "only what is for this host, by fib", Stops: "net, lan, vm", NFT: `
table inet paths {
	chain pre {
		type filter hook prerouting priority filter; policy accept;
		iifname "MESH" fib daddr type != { local, broadcast, multicast } drop
	}
}`},
	{Name: "private sources from the uplink", Stops: "net 4, lan 4, vm 4", NFT: `
table inet bogons {
	set bogons { type ipv4_addr; flags interval, constant; elements = { 10.0.0.0/8, 100.64.0.0/10, 172.16.0.0/12, 192.168.0.0/16 } }
	chain in {
		type filter hook input priority filter; policy accept;
		iifname "WAN" ip saddr @bogons drop
	}
	chain through {
		type filter hook forward priority filter; policy accept;
		iifname != "LAN0" oifname != "MESH" ip saddr @bogons drop
	}
}`},
	{Name: "a guard of ingress", Stops: "net tcp, host tcp, wg in 4", NFT: `
table netdev early {
	chain wan {
		type filter hook ingress device "WAN" priority 0; policy accept;
		ip saddr 192.0.2.130 udp dport 51820 drop
	}
	chain mesh {
		type filter hook ingress device "MESH" priority 0; policy accept;
		meta l4proto tcp drop
	}
}`},
	{Name: "a hop limit, a size and a type of service", Stops: "host ping", NFT: `
table inet fields {
	chain through {
		type filter hook forward priority filter; policy accept;
		ip ttl 1 drop
		ip6 hoplimit < 2 drop
		ip dscp ef drop
	}
	chain in {
		type filter hook input priority filter; policy accept;
		icmp type { echo-request, timestamp-request } drop
		icmpv6 type echo-request drop
		ip frag-off & 0x1fff != 0 drop
		exthdr frag exists drop
		ip option rr exists drop
	}
}`},
	{Name: "sizes that aren't known", Unclear: "net, lan, vm, answer", NFT: `
table inet fields {
	chain through {
		type filter hook forward priority filter; policy accept;
		meta length > 1000 drop
	}
}`},
	{Name: "bits that are shifted, which isn't evaluated", Unclear: "net, lan, vm", NFT: `
table inet shifted {
	chain pre {
		type filter hook prerouting priority mangle; policy accept;
		iifname "MESH" meta mark set 0x10
		iifname "MESH" meta mark set meta mark << 1
	}
	chain through {
		type filter hook forward priority filter; policy accept;
		meta mark 0x20 drop
	}
}`},
	{Name: "a set whose elements have quotas", Unclear: "host udp 4, host tcp 4, host ping 4", NFT: `
table inet parts {
	set some { type ipv4_addr; flags dynamic; quota over 1 bytes; elements = { 100.64.0.10 } }
	chain in {
		type filter hook input priority filter; policy accept;
		ip saddr @some drop
	}
}`},
	{Name: "a set whose elements have counters", Stops: "host 4", NFT: `
table inet parts {
	set some { type ipv4_addr; counter; elements = { 100.64.0.10 } }
	chain in {
		type filter hook input priority filter; policy accept;
		ip saddr @some drop
	}
}`},
	{Name: "ranges of marks and of conntrack's", Stops: "net tcp, host tcp", NFT: `
table inet ranges {
	chain pre {
		type filter hook prerouting priority mangle; policy accept;
		iifname "MESH" meta l4proto tcp meta mark set 0x105
		iifname "MESH" meta l4proto udp meta mark set 0x501
		ct mark set meta mark
	}
	chain through {
		type filter hook forward priority filter; policy accept;
		meta mark 0x100-0x1ff drop
	}
	chain in {
		type filter hook input priority filter; policy accept;
		ct mark { 0x100-0x10a } drop
	}
}`},
	{Name: "what conntrack hasn't seen", Stops: "net, lan, vm, host, answer, wg in", NFT: `
table inet early {
	chain pre {
		type filter hook prerouting priority raw; policy accept;
		ct state invalid drop
	}
}`},
	{Name: "the interface on the way out, before it is known", NFT: `
table inet early {
	chain pre {
		type filter hook prerouting priority mangle; policy accept;
		oifname "WAN" drop
		oifname "MESH" drop
	}
}`},
	{Name: "the directions of flows", Stops: "net, lan, vm, host", NFT: `
table inet directions {
	chain through {
		type filter hook forward priority filter; policy accept;
		iifname "MESH" ct direction original drop
		ct direction reply accept
	}
	chain in {
		type filter hook input priority filter; policy accept;
		iifname "MESH" ct direction != reply drop
	}
}`},
	{Name: "interfaces by a beginning of their names", Stops: "net, lan, vm, host", NFT: `
table inet names {
	chain through {
		type filter hook forward priority filter; policy accept;
		iifname "wg*" drop
	}
	chain in {
		type filter hook input priority filter; policy accept;
		iifname { "wg*", "tun*" } drop
	}
}`},
	{Name: "a set of all that isn't named", Stops: "host tcp", NFT: `
table inet catchall {
	map verdicts { type inet_service : verdict; elements = { 80 : accept, 443 : accept, * : drop } }
	chain in {
		type filter hook input priority filter; policy accept;
		iifname "MESH" tcp dport vmap @verdicts
	}
}`},
	{Name: "a mark that is set behind a condition that isn't known", Unclear: "net, lan, vm, answer", NFT: `
table inet sizes {
	chain through {
		type filter hook forward priority filter; policy accept;
		meta length > 2000 jump large
		meta mark 7 drop
	}
	chain large {
		meta mark set 7
	}
}`},
	{Name: "conntrack's mark behind a condition that isn't known", Unclear: "net, lan, vm, answer", NFT: `
table inet sizes {
	chain through {
		type filter hook forward priority filter; policy drop;
		ct mark set 0
		meta length > 2000 jump large
		ct mark 7 accept
		ct mark 0 accept
	}
	chain large {
		ct mark set 7
	}
}`},
	{Name: "a transparent proxy that doesn't run", Unclear: "net udp, net tcp, net dns, lan, vm, host udp, host tcp", NFT: `
table inet proxy {
	chain pre {
		type filter hook prerouting priority mangle; policy accept;
		iifname "MESH" meta l4proto { tcp, udp } tproxy to :1234
	}
}`},
	{Name: "packets that are taken away at ingress", Unclear: "net, lan, vm, host", NFT: `
table netdev early {
	chain mesh {
		type filter hook ingress device "MESH" priority 0; policy accept;
		fwd to "lo"
	}
}`},
	{Name: "copies of packets", NFT: `
table ip copies {
	chain pre {
		type filter hook prerouting priority mangle; policy accept;
		iifname "MESH" dup to 192.168.77.2 device "LAN0"
	}
}`},
	{Name: "destinations that are rewritten without conntrack", Stops: "net 4, net 6, vm 4, host udp", NFT: `
table inet stateless {
	chain through {
		type filter hook forward priority mangle; policy accept;
		iifname "MESH" oifname "WAN" ip daddr set 10.9.9.9
		iifname "MESH" oifname "WAN" ip6 daddr set 2001:db8:9::9
		oifname "virbr0" ip daddr set 192.168.122.9
		oifname "LAN0" ip daddr set ip daddr
	}
	chain in {
		type filter hook input priority mangle; policy accept;
		iifname "MESH" udp dport 40001 udp dport set 40002
	}
}`},
	{Name: "sources that are rewritten without conntrack", Unclear: "net 4", NFT: `
table ip stateless {
	chain through {
		type filter hook postrouting priority 200; policy accept;
		iifname "MESH" oifname "WAN" ip saddr set 192.0.2.77
	}
}`},
	{Name: "a hop limit that is rewritten", Stops: "", Unclear: "net 6, lan 6, vm 6", NFT: `
table inet hops {
	chain pre {
		type filter hook prerouting priority mangle; policy accept;
		iifname "MESH" ip ttl set 65
		iifname "MESH" ip6 hoplimit set 1
	}
	chain post {
		type filter hook postrouting priority mangle; policy accept;
		ip dscp set cs1
		ip6 dscp set cs1
	}
}`},
	{Name: "fields of a packet that differ from one to another", Unclear: "net udp, net dns, lan, vm, answer", NFT: `
table inet lengths {
	chain through {
		type filter hook forward priority filter; policy accept;
		udp length != 8 drop
	}
}`},
	{Name: "a set of all with a limit", Unclear: "host 4", NFT: `
table inet catchall {
	set s { type ipv4_addr; flags interval; limit rate over 1/second; elements = { * } }
	chain in {
		type filter hook input priority filter; policy accept;
		iifname "MESH" ip saddr @s drop
	}
}`},
	{Name: "iptables' match of what conntrack hasn't seen", Stops: "net, lan, vm, host", IPTables: `*raw
:PREROUTING ACCEPT
-A PREROUTING -i MESH -m conntrack --ctstate INVALID -j DROP
COMMIT
`},
	{Name: "iptables' match of translated flows", Unclear: "answer", IPTables: `*filter
:FORWARD ACCEPT
-A FORWARD -m conntrack --ctstate SNAT -j DROP
COMMIT
`},
	{Name: "iptables' match of answers before they are translated", Stops: "host, wg in, answer", IPTables: `*raw
:PREROUTING ACCEPT
-A PREROUTING -m addrtype --dst-type LOCAL -j DROP
COMMIT
`},
	{Name: "WireGuard's packets without conntrack", NFT: `
table inet raw {
	chain pre {
		type filter hook prerouting priority raw; policy accept;
		iifname "WAN" udp dport 51820 notrack
	}
	chain out {
		type filter hook output priority raw; policy accept;
		oifname "WAN" udp sport 51820 notrack
	}
}`},
	{Name: "WireGuard's packets without conntrack, which a firewall wants", Stops: "wg in", NFT: `
table inet raw {
	chain pre {
		type filter hook prerouting priority raw; policy accept;
		iifname "WAN" udp dport 51820 notrack
	}
	chain in {
		type filter hook input priority filter; policy accept;
		iifname "MESH" accept
		ct state untracked drop
	}
}`},
	{Name: "notrack where conntrack has seen the packet", NFT: `
table inet late {
	chain through {
		type filter hook forward priority filter; policy accept;
		notrack
		ct state untracked drop
	}
	chain in {
		type filter hook input priority filter; policy accept;
		notrack
	}
}`},
	{Name: "conntrack's mark before there is a flow", NFT: `
table inet early {
	chain pre {
		type filter hook prerouting priority raw; policy accept;
		iifname "MESH" ct mark set 7
	}
	chain through {
		type filter hook forward priority filter; policy accept;
		iifname "MESH" ct mark 7 drop
	}
}`},
	{Name: "conntrack's zones by iptables", Unclear: "net, lan, vm, host", IPTables: `*raw
:PREROUTING ACCEPT
-A PREROUTING -i MESH -j CT --zone 7
COMMIT
`},
	{Name: "networks that iptables maps", Stops: "net 4, lan 4, vm 4, host 4", IPTables: `*nat
:PREROUTING ACCEPT
-4 -A PREROUTING -i MESH -j NETMAP --to 198.51.100.0/24
COMMIT
`},
	{Name: "a set that a rule before adds to", Stops: "", Unclear: "host 4", NFT: `
table inet knock {
	set knocked { type ipv4_addr; flags dynamic, timeout; timeout 30s; }
	chain in {
		type filter hook input priority filter; policy accept;
		iifname "MESH" add @knocked { ip saddr timeout 30s }
		ip saddr @knocked drop
	}
}`},
	{Name: "a quota that the packet may use up", Unclear: "net, lan, vm, answer", NFT: `
table inet quotas {
	chain through {
		type filter hook forward priority filter; policy accept;
		quota over 60 kbytes drop
	}
}`},
	{Name: "a proxy of handshakes by name", Unclear: "net tcp", NFT: `
table inet handshakes {
	synproxy some { mss 1460 wscale 7 }
	chain through {
		type filter hook forward priority filter; policy accept;
		tcp dport 443 synproxy name "some"
	}
}`},
	{Name: "Kubernetes", IPTables: `*filter
:INPUT ACCEPT
:FORWARD ACCEPT
:OUTPUT ACCEPT
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A KUBE-FIREWALL -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -m mark --mark 0x8000/0x8000 -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:POSTROUTING ACCEPT
:KUBE-POSTROUTING - [0:0]
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
COMMIT
`},
	{Name: "a kill switch of another VPN", Stops: "net, lan, vm, wg out", NFT: `
table inet killswitch {
	chain out {
		type filter hook output priority filter; policy drop;
		oifname { "lo", "tun0", "MESH" } accept
		udp dport 1194 ip daddr 198.51.100.7 accept
	}
	chain through {
		type filter hook forward priority filter; policy drop;
		oifname "tun0" accept
		oifname "MESH" accept
	}
}`},
	{Name: "an accept in one table and a drop in the next", Stops: "net", NFT: `
table inet first {
	chain through {
		type filter hook forward priority -10; policy accept;
		iifname "MESH" accept
	}
}
table inet second {
	chain through {
		type filter hook forward priority 10; policy accept;
		iifname "MESH" oifname "WAN" drop
	}
}`},
	{Name: "a drop after translation", Stops: "net tcp", NFT: `
table inet late {
	chain post {
		type filter hook postrouting priority 200; policy accept;
		oifname "WAN" tcp dport 443 drop
		iifname "MESH" oifname "WAN" udp dport 9 drop
	}
}`},
	{Name: "translation by others", NFT: `
table ip nat {
	chain POSTROUTING {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr 192.168.0.0/16 oifname "WAN" masquerade
		oifname "WAN" counter masquerade random
	}
}`},
	{Name: "segment sizes and helpers", NFT: `
table inet sizes {
	ct helper ftp { type "ftp" protocol tcp; }
	chain through {
		type filter hook forward priority mangle; policy accept;
		tcp flags syn tcp option maxseg size set 1360
		tcp dport 21 ct helper set "ftp"
	}
}`},
	{Name: "iptables' matches", Stops: "host udp, host tcp, vm", IPTables: `*mangle
:FORWARD ACCEPT
-A FORWARD -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
COMMIT
*filter
:INPUT ACCEPT
:FORWARD ACCEPT
-A INPUT -i MESH -p tcp -m multiport --dports 21,22,25 -j REJECT
-A INPUT -i MESH -p udp -m udp --dport 40000:40010 -m comment --comment "not here" -j DROP
-A INPUT -i MESH -m pkttype --pkt-type broadcast -j DROP
-A FORWARD -i MESH -o vir+ -j DROP
-A FORWARD -p tcp -m tcp ! --dport 1:1023 -j DROP
COMMIT
`},
	{Name: "iptables' matches that aren't understood", Unclear: "net, lan, vm, answer, host udp, host tcp, host ping", IPTables: `*filter
:INPUT ACCEPT
:FORWARD ACCEPT
-A INPUT -i MESH -m time --timestart 01:00 --timestop 23:00 -j DROP
-A FORWARD -m statistic --mode random --probability 0.5 -j DROP
COMMIT
`},
}
