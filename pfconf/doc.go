// Package pfconf represents pf.conf, the rulesets of macOS's packet filter pf, as data: it
// parses, validates, expands and prints rulesets as pfctl does, and parses what pfctl
// shows of a running pf, on any machine. Package pfsim evaluates packets against these
// rulesets as the kernel does.
//
// # pf in five minutes
//
// On a host that forwards, pf sees each packet twice: inbound on the interface on which it
// arrives, and, if it passes there, outbound on the one by which it leaves. It sees a
// packet to the host itself inbound only, and one from the host outbound only. Each time
// pf does the same:
//
//  1. If the packet belongs to a state, that is, a flow that was allowed before, it
//     passes without an evaluation of rules.
//  2. Else the translation rules are searched: outbound nat and binat, inbound rdr
//     and binat. The first one that matches changes the packet's addresses, and the
//     search ends. A rule that begins with "no" only ends the search.
//  3. Then the filter rules are searched, with the translated addresses. The last one
//     that matches decides, unless one with the word quick matches: that ends the
//     search. When none matches, the packet passes.
//  4. A pass rule creates a state, so that replies and later packets of the flow pass
//     by step 1. A translation always creates one.
//
// A ruleset is a text of one statement a line:
//
//	uplink = "en0"                                  # a macro, pasted for $uplink
//	table <friends> persist { 100.64.0.0/10 }       # a set of addresses
//	set skip on lo0                                 # options
//	scrub in all                                    # normalisation: joins fragments
//	nat on $uplink inet from <friends> to any -> ($uplink)
//	rdr on $uplink inet proto tcp from any to ($uplink) port 8080 -> 100.64.0.2 port 80
//	block in all                                    # filter rules
//	pass in on utun4 inet from <friends> to any
//	pass in quick on $uplink proto tcp from any to any port ssh
//
// pf requires this order: options, scrub, translation, filter rules. Macros and tables may
// stand anywhere. Some things are surprising at first:
//
//   - A pass rule for TCP matches only the first packet of a connection, flags
//     S/SA. The rest passes by the state, or not at all.
//   - States outlive their rules. Removing a rule ends no existing flow; pfctl -k does.
//   - A name in parentheses, (en0), is looked up for each packet; without them it is
//     replaced by the interface's addresses when the ruleset is loaded.
//   - A state floats by default: its packets may come through any interface. keep state
//     (if-bound) ties it to the interface on which it was created.
//   - Lists in braces are only shorthand: the kernel gets a rule for each combination.
//     Negation in a list is hardly ever what was meant: from { !a, !b } is two rules, of
//     which one always matches.
//   - On macOS there are no interface groups: on utun never matches utun4.
//
// # Anchors
//
// An anchor is a ruleset with a name, such as com.apple/250.mesh, that is loaded
// separately. It has no effect until another ruleset calls it: with nat-anchor, rdr-anchor,
// binat-anchor and scrub-anchor for those kinds of rules, and with anchor for filter rules.
// The search goes into the anchor's rules where the call stands, and comes back; quick
// within an anchor ends everything. anchor "com.apple/*" calls all direct children of
// com.apple, in the byte order of their names. The stock ruleset of macOS is nothing but
// such calls, and a program that wants to add rules loads a child of com.apple.
//
// # Using the package
//
// A [Ruleset] is the content of one file or anchor, as written. [Parse] reads text
// and [Ruleset.String] prints it; a ruleset can also be built from [Rule], [Table] and
// the other types. [Ruleset.Validate] reports whether pfctl would accept it; a valid
// ruleset that is printed parses to the same ruleset.
//
// [Ruleset.Expand] does what pfctl does while it loads: the [Loaded] ruleset has one
// rule for each combination, defaults written out, and [Loaded.ShowRules] and
// [Loaded.ShowNat] return exactly the lines that pfctl -sr and -sn print for it.
//
// In the other direction, [ParseShown], [ParseTables], [ParseTableEntries], [ParseInfo],
// [ParseReferences], [ParseStates] and [ParseAnchors] read what pfctl shows of a
// running pf.
//
// # The dialect
//
// This is the pf of macOS, of the generation of OpenBSD 4.1 to 4.3: translation rules
// stand apart from filter rules; there is no match, nat-to, received-on or prio. The
// last line of a text has to end in a newline, as pfctl insists. dummynet rules and
// ALTQ are kept as text, see [Ruleset.Unknown].
//
// The facts come from pf.conf(5) and pfctl(8), from the pfctl of that generation, from
// xnu's bsd/net/pf*.c, and from measurements: the tests run on the conformance vectors in
// pfsim's testdata, which record what Apple's own code did.
package pfconf
