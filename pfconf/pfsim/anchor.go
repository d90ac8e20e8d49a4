package pfsim

import (
	"fmt"
	"slices"
	"strings"
)

// anchorNode is an anchor with its five lists of rules, the kernel's pf_anchor with its
// pf_ruleset. An anchor that was ever loaded stays: macOS takes a reference to it for
// each part of a load and releases only the last (pfioctl_ioc_trans in pf_ioctl.c).
// Others exist as long as a rule calls them.
type anchorNode struct {
	path     string
	name     string        // last component of path
	parent   *anchorNode   // nil: the main ruleset
	children []*anchorNode // in byte order of their names
	lists    [ruleLists][]*crule
	loaded   bool // at least once
	calls    int  // rules that call it
	match    bool // a rule in it matched the packet that is evaluated
}

// newAnchorNode returns an anchor below parent, nil for the main ruleset, without adding
// it to the parent's children.
func newAnchorNode(parent *anchorNode, name string) *anchorNode {
	a := &anchorNode{parent: parent, name: name, path: name}
	if parent != nil && parent.path != "" {
		a.path = parent.path + "/" + name
	}
	return a
}

// child returns the index of the child of that name, or the one at which to insert it, and
// whether it exists.
func (a *anchorNode) child(name string) (int, bool) {
	return slices.BinarySearchFunc(a.children, name, func(c *anchorNode, n string) int { return strings.Compare(c.name, n) })
}

// find returns the anchor below a at a relative path, nil if there is none.
func (a *anchorNode) find(path string) *anchorNode {
	if path == "" {
		return a
	}
	for name := range strings.SplitSeq(path, "/") {
		i, ok := a.child(name)
		if !ok {
			return nil
		}
		a = a.children[i]
	}
	return a
}

// create returns the anchor below a at a relative path. It adds the anchors on the path
// that don't exist (pf_find_or_create_ruleset in pf_ruleset.c).
func (a *anchorNode) create(path string) *anchorNode {
	if path == "" {
		return a
	}
	for name := range strings.SplitSeq(path, "/") {
		i, ok := a.child(name)
		if !ok {
			a.children = slices.Insert(a.children, i, newAnchorNode(a, name))
		}
		a = a.children[i]
	}
	return a
}

// release removes an anchor that nothing needs any more, and likewise those above it
// (pf_remove_if_empty_ruleset in pf_ruleset.c).
func (a *anchorNode) release() {
	for a.parent != nil && !a.loaded && a.calls == 0 && len(a.children) == 0 {
		up := a.parent
		if i, ok := up.child(a.name); ok {
			up.children = slices.Delete(up.children, i, i+1)
		}
		a = up
	}
}

// anchorCall resolves the anchor that a rule calls (pf_anchor_setup in pf_ruleset.c).
// Names are relative to the caller's anchor unless they begin with a slash.
func (c compiler) anchorCall(out *crule) error {
	name := out.rule.Anchor
	path := ""
	if abs, ok := strings.CutPrefix(name, "/"); ok {
		name = abs
	} else {
		path = c.anchor
		for {
			rest, up := strings.CutPrefix(name, "../")
			if !up {
				break
			}
			if path == "" {
				return fmt.Errorf("anchor %q: above the main ruleset", out.rule.Anchor)
			}
			path = path[:max(strings.LastIndexByte(path, '/'), 0)]
			name = rest
		}
	}
	if path != "" {
		name = path + "/" + name
	}
	name, out.wildcard = strings.CutSuffix(name, "/*")
	if err := checkAnchorLength(name); err != nil {
		return err
	}
	out.call = c.m.main.create(name)
	out.call.calls++
	return nil
}

// frame says where to continue after an anchor.
type frame struct {
	rules    []*crule
	at       int           // index of caller in rules
	caller   *crule        // the rule that called the anchor
	children []*anchorNode // of a wildcard call, else nil
	child    int           // index of the one being walked
}

// walker goes through a list of rules and the anchors called from it. It follows
// pf_step_into_anchor and pf_step_out_of_anchor (pf.c), including their treatment of
// quick and of recorded matches. Like the kernel's stack it is used for one packet after
// the other.
type walker struct {
	list   ruleList
	rules  []*crule // being walked
	at     int      // index of the current rule
	depth  int      // frames in use
	stack  [maxAnchorDepth]frame
	steps  int    // rules tried
	gaveUp bool   // after maxSteps
	filter bool   // list is the filter's, the only one for which matches are recorded
	match  bool   // a rule matched since the last step into an anchor
	top    *crule // the anchor rule of the main ruleset through which the current rule was reached
}

// begin moves to the first rule of a list of the main ruleset.
func (w *walker) begin(m *Machine, l ruleList) {
	w.list, w.rules, w.at, w.depth = l, m.main.lists[l], 0, 0
	w.steps, w.match, w.top = 0, false, nil
	w.filter = l == filterList
}

// next returns the rule to try, or nil at the end.
func (w *walker) next() *crule {
	for w.at >= len(w.rules) {
		if w.depth == 0 || w.stepOut() {
			return nil
		}
	}
	if w.steps++; w.steps > maxSteps {
		w.gaveUp = true
		return nil
	}
	r := w.rules[w.at]
	r.evaluations++
	return r
}

// skip moves past the current rule.
func (w *walker) skip() { w.at++ }

// miss moves past r, the current rule, and past those behind it that would mismatch in
// the same field (the kernel's skip steps).
func (w *walker) miss(r *crule, by mismatch) {
	if by < skipFields {
		w.at += int(r.skips[by])
	} else {
		w.at++
	}
}

// stepInto enters the anchor that r, the current rule, calls. It forgets earlier matches:
// if an anchor with quick contains anchors, the quick applies only if a rule matched in the
// last of them or behind it.
func (w *walker) stepInto(r *crule) {
	r.call.match = false
	w.match = false
	if w.depth == len(w.stack) {
		// The kernel logs "anchor stack overflow" and skips the call.
		w.at++
		return
	}
	if w.depth == 0 {
		w.top = r
	}
	f := &w.stack[w.depth]
	w.depth++
	*f = frame{rules: w.rules, at: w.at, caller: r}
	if !r.wildcard {
		w.rules, w.at = r.call.lists[w.list], 0
		return
	}
	f.children = r.call.children
	w.rules, w.at = nil, 0
	if len(f.children) > 0 {
		w.rules = f.children[0].lists[w.list]
	}
}

// stepOut leaves anchors until there is a rule to try, or the list ends. It reports whether
// an anchor rule with quick ends the walk, which it never does for translation rules.
func (w *walker) stepOut() bool {
	quick := false
	for w.at >= len(w.rules) && w.depth > 0 {
		f := &w.stack[w.depth-1]
		if w.nextChild(f) {
			continue
		}
		w.depth--
		if w.depth == 0 {
			w.top = nil
		}
		if f.caller.call.match || w.filter && w.match {
			quick = f.caller.quick
		}
		w.rules, w.at = f.rules, f.at+1
	}
	return quick && !w.list.translates()
}

// nextChild moves to the next child of a wildcard call and reports whether there is one.
func (w *walker) nextChild(f *frame) bool {
	if f.child >= len(f.children) {
		return false
	}
	// A match in a child is recorded at the wildcard's anchor, for the quick of the call.
	if f.children[f.child].match || w.filter && w.match {
		f.caller.call.match = true
		w.match = false
	}
	f.child++
	if f.child >= len(f.children) {
		return false
	}
	w.rules, w.at = f.children[f.child].lists[w.list], 0
	return true
}
