package linux

import (
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	mdlayher "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// FuzzForeignRule parses and evaluates arbitrary bytes as another program's rule: nothing
// panics.
func FuzzForeignRule(f *testing.F) {
	exprs, err := expr.Marshal(unix.NFPROTO_INET, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte("mesh0")})
	if err != nil {
		f.Fatal(err)
	}
	list, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: exprs}})
	if err != nil {
		f.Fatal(err)
	}
	rule, err := mdlayher.MarshalAttributes([]mdlayher.Attribute{
		{Type: unix.NFTA_RULE_HANDLE, Data: []byte{0, 0, 0, 0, 0, 0, 0, 7}},
		{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: list},
		{Type: unix.NFTA_RULE_USERDATA, Data: []byte{0, 3, 'a', 'b', 0}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append([]byte{1, 0, 0, 0}, rule...))
	f.Add([]byte{1, 0, 0})
	table := &nftables.Table{Name: "t", Family: nftables.TableFamilyINet}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseForeignRule(unix.NFPROTO_INET, b)
		if err != nil {
			return
		}
		none := func(mdlayher.Message) ([]mdlayher.Message, error) { return nil, unix.ENOENT }
		for _, s := range []sample{
			{iif: "mesh0", oif: "eth0", src: ann4, dst: bob4, proto: unix.IPPROTO_TCP},
			{iif: "eth0", src: ann6, dst: own6, proto: unix.IPPROTO_ICMPV6, reply: true},
		} {
			w := newWalk(&evaluator{ask: none, index: func(string) int { return 1 }, rules: map[string][]foreignRule{}, sets: map[string]foreignSet{}}, s)
			w.rule(table, r)
		}
	})
}
