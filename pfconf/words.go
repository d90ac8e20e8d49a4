package pfconf

// anchorWords are the keywords that call an anchor, one for each kind of its rules.
var anchorWords = map[Action]string{
	Anchor: "anchor", NatAnchor: "nat-anchor", BinatAnchor: "binat-anchor", RdrAnchor: "rdr-anchor",
	ScrubAnchor: "scrub-anchor", DummynetAnchor: "dummynet-anchor",
}

var actionWords = [...]string{Pass: "pass", Block: "block", Scrub: "scrub", NoScrub: "no scrub", Nat: "nat",
	NoNat: "no nat", Binat: "binat", NoBinat: "no binat", Rdr: "rdr", NoRdr: "no rdr"}

// String returns the keywords that a rule of the action begins with.
func (a Action) String() string {
	if w, ok := anchorWords[a]; ok {
		return w
	}
	return at(actionWords[:], a)
}

// at returns words[i], or ? for a value beyond the list: String must not panic on a
// rule that Validate would refuse.
func at[T ~uint8](words []string, i T) string {
	if int(i) < len(words) {
		return words[i]
	}
	return "?"
}

// String returns in, out or in-out.
func (d Direction) String() string { return at([]string{"in-out", "in", "out"}, d) }

// String returns inet, inet6 or any.
func (f Family) String() string { return at([]string{"any", "inet", "inet6"}, f) }

// String returns the operator as pf.conf writes it, before a number or between two.
func (op CompareOp) String() string {
	return at([]string{"=", "!=", "<", "<=", ">", ">=", ":", "><", "<>"}, op)
}

// String returns the words of the state kind; "" for the default.
func (k StateKind) String() string {
	return at([]string{"", "no state", "keep state", "modulate state", "synproxy state"}, k)
}

// String returns the option's word; "" for the default.
func (sp StatePolicy) String() string { return at([]string{"", "floating", "if-bound"}, sp) }

// String returns the option's words; "" for none.
func (t SourceTrack) String() string {
	return at([]string{"", "source-track", "source-track rule", "source-track global"}, t)
}

// String returns the words that follow the table of overload, with a leading space.
func (f FlushKind) String() string { return at([]string{"", " flush", " flush global"}, f) }

// String returns the word after fragment; "" for the default.
func (m FragmentMode) String() string { return at([]string{"", "reassemble", "crop", "drop-ovl"}, m) }

// String returns the pool type's word; "" for the default.
func (k PoolKind) String() string {
	return at([]string{"", "bitmask", "random", "source-hash", "round-robin"}, k)
}

// String returns the keyword of the route.
func (k RouteKind) String() string {
	return at([]string{"route-to", "reply-to", "dup-to", "fastroute"}, k)
}
