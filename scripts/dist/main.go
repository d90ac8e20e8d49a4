// Command dist builds the archives of a release, on any system that has Go:
//
//	go run ./scripts/dist -version v1.2.3
//
// For macOS it makes one universal executable, a Mach-O of two slices, so that users
// needn't know which processor their Mac has. The arm64 slice must be signed, if only ad
// hoc, or the kernel kills it. Go's linker signs it, and a change of any byte afterwards
// would invalidate the signature. So the slices are joined unchanged, and the signature is
// checked, page by page, before packing. For Linux there is one archive for each processor.
//
// Each archive contains the executable, the completions, the licence, README without its
// parts about the source, the pages that README links to, and their checksums. The
// checksums of the archives are in a file beside them. Builds are reproducible: the same
// commit and the same release of Go give the same bytes, since names, times and owners
// don't come from the machine that builds.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
)

func main() {
	out := flag.String("o", "dist", "`folder` to write to")
	version := flag.String("version", "", "`version` to build (the commit)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *out, *version); err != nil {
		fmt.Fprintln(os.Stderr, "dist:", err)
		os.Exit(1)
	}
}

// run writes the archives and their checksums to the folder out.
func run(ctx context.Context, out, version string) error {
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	b := &builder{version: version}
	common, err := b.common(ctx)
	if err != nil {
		return err
	}
	var sums bytes.Buffer
	for _, p := range packages {
		program, err := b.program(ctx, p)
		if err != nil {
			return err
		}
		stem := "meshhelper-" + b.version + "-" + p.name
		data, err := pack(stem, append(common, file{"meshhelper", 0o755, program}), b.time)
		if err != nil {
			return err
		}
		name := stem + ".tar.gz"
		if err := os.WriteFile(filepath.Join(out, name), data, 0o644); err != nil {
			return err
		}
		fmt.Printf("%s: %.1f MB\n", filepath.Join(out, name), float64(len(data))/1e6)
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256(data), name)
	}
	return os.WriteFile(filepath.Join(out, "SHA256SUMS"), sums.Bytes(), 0o644)
}

// checkVersion fails for a version that can't be part of a file's name.
func checkVersion(v string) error {
	if v == "" || strings.ContainsAny(v, `/\ `) || strings.HasPrefix(v, ".") {
		return fmt.Errorf("version %q can't be part of a file's name", v)
	}
	return nil
}
