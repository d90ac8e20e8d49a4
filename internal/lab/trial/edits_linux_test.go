package trial

// Helpers that are built with some lines of the source replaced.

import (
	_ "embed"
	"flag"
	"testing"

	"github.com/meshhelper/meshhelper/internal/lab/netlab"
)

// soak runs the long version of the tests: as many kills, packets and seconds as
// docs/security.md promises.
var soak = flag.Bool("soak", false, "run the long versions of the proofs")

//go:embed testdata/stepped.go
var steppedSource string

const hostFile, guardFile, nftFile = "cmd/meshhelper/host_linux.go", "internal/guard/guard.go", "internal/host/linux/nft.go"

// stepped is a helper that reports each call of Options.Step; see stepper.
var stepped = []netlab.Edit{
	{File: hostFile, Old: "linux.Options{StateDir: o.stateDir", New: "linux.Options{Step: awaitStep(), StateDir: o.stateDir"},
	{File: "cmd/meshhelper/stepped.go", New: steppedSource},
}

// withoutGuard is a helper whose guard passes everything, and withoutFilter one whose
// table drops nothing but still translates.
var (
	withoutGuard = []netlab.Edit{
		{File: guardFile, Old: "\tpass := d.judgeWrite(v, bufs, offset)\n", New: "\tpass := bufs\n\t_ = v\n"},
		{File: guardFile, Old: "\t\td.turned = d.judgeRead(bufs[:n], sizes, offset, d.turned[:0])\n", New: ""},
	}
	withoutFilter = []netlab.Edit{
		{File: nftFile, Old: "{ c.add(action{verb: drop}, comment, ms...) }", New: "{}"},
	}
)

// use has the mesh run an edited helper.
func use(t *testing.T, m *Mesh, name string, edits []netlab.Edit) {
	t.Helper()
	var err error
	if m.helper, err = netlab.BuildEdited(program, name, edits...); err != nil {
		t.Fatal(err)
	}
}
