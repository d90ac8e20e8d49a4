package pfsim

import (
	"fmt"
	"slices"
	"strings"
)

// anchorNode is an anchor with its five lists of rules. Once loaded it stays:
// the kernel of macOS never frees it. Others live as long as a rule calls them.
type anchorNode struct {
	path     string
	name     string
	parent   *anchorNode
	children []*anchorNode // in byte order of their names
	lists    [ruleLists][]*crule
	loaded   bool
	calls    int
	// match is the kernel's note that something matched in here.
	match bool
}

func newAnchorNode(parent *anchorNode, name string) *anchorNode {
	a := &anchorNode{parent: parent, name: name, path: name}
	if parent != nil && parent.path != "" {
		a.path = parent.path + "/" + name
	}
	return a
}

// child returns the index of a child's name and whether it exists.
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

// create returns the anchor below a at a relative path and makes what is
// missing of it.
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

// release forgets an anchor that nothing needs, and those above it.
func (a *anchorNode) release() {
	for a.parent != nil && !a.loaded && a.calls == 0 && len(a.children) == 0 {
		up := a.parent
		if i, ok := up.child(a.name); ok {
			up.children = slices.Delete(up.children, i, i+1)
		}
		a = up
	}
}

// anchorCall resolves the anchor that a rule calls, as pf_anchor_setup does:
// names are relative to the caller unless they begin with a slash.
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

// frame is where to go on after an anchor.
type frame struct {
	rules    []*crule
	at       int
	caller   *crule
	children []*anchorNode // of a wildcard call; nil else
	child    int
}

// walker runs through a list of rules and the anchors called from it. It is a
// port of pf_step_into_anchor and pf_step_out_of_anchor with what they do to
// quick and to the notes of matches; the kernel too has one for all packets.
type walker struct {
	list   ruleList
	rules  []*crule
	at     int
	depth  int
	stack  [maxAnchorDepth]frame
	steps  int
	gaveUp bool   // there were more than maxSteps
	filter bool   // the notes of matches count
	match  bool   // a rule matched since the last step into an anchor
	top    *crule // the main ruleset's anchor rule that led here
}

// begin goes to the first rule of a list of the main ruleset.
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

// skip goes on behind the present rule.
func (w *walker) skip() { w.at++ }

// miss goes on behind r, the present rule, and those that mismatch for the same
// reason.
func (w *walker) miss(r *crule, by mismatch) {
	if by < skipFields {
		w.at += int(r.skips[by])
	} else {
		w.at++
	}
}

// stepInto enters the anchor that r, the present rule, calls. That forgets what
// matched so far: of anchors within an anchor with quick, only a match in or
// behind the last one makes the quick count.
func (w *walker) stepInto(r *crule) {
	r.call.match = false
	w.match = false
	if w.depth == len(w.stack) {
		// The kernel complains to its log and leaves the call out.
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

// stepOut leaves anchors until there is a rule again, or none. It reports that
// an anchor rule with quick ends the walk.
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

// nextChild goes to the next child of a wildcard call, if there is one.
func (w *walker) nextChild(f *frame) bool {
	if f.child >= len(f.children) {
		return false
	}
	// A match in one child is noted at the wildcard's anchor, for its quick.
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
