// Package pfconf is pf, the packet filter of macOS and the BSDs, as data.
//
// A [Ruleset] is the text of one pf.conf file or of one anchor. [Parse] reads
// it, [Ruleset.String] prints it, and [Ruleset.Expand] turns it into what the
// kernel is given: a [Loaded] ruleset, in which every list has become one rule
// per combination and every default is spelled out.
//
// The dialect is that of macOS: the generation of OpenBSD 4.1 to 4.3, which has
// translation rules (nat, rdr, binat) apart from filter rules.
package pfconf
