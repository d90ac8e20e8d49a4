// Command dist builds what a release consists of, on any system that has Go:
//
//	go run ./scripts/dist -version v1.2.3
//
// For macOS it makes one universal executable, a Mach-O of two slices, since
// no user should have to know what processor a Mac has. The slice for arm64 must
// be signed, if only ad hoc, or the kernel kills it; Go's linker does that, and
// nothing may touch a byte afterwards. So the slices are put side by side as they
// are, and the signature is checked, page by page, before anything is packed.
// For Linux there is one archive for each processor.
//
// Each archive has the executable, the completions, licence, README without what is
// about the source, the pages that it links to, and the checksums of these; beside the archives are their own. The same commit built
// by the same release of Go gives the same bytes: names, times and owners don't
// come from this machine.
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

// checkVersion keeps a version from being a path.
func checkVersion(v string) error {
	if v == "" || strings.ContainsAny(v, `/\ `) || strings.HasPrefix(v, ".") {
		return fmt.Errorf("version %q can't be part of a file's name", v)
	}
	return nil
}
