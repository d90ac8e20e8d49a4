package launchd

import (
	"fmt"
	"path"
)

// Chain describes program and each directory above it, for CheckProgram.
func Chain(program string) ([]File, error) {
	if bad := absolute("program", program); bad != "" {
		return nil, fmt.Errorf("stat program: %s", bad)
	}
	var chain []File
	for p := program; ; p = path.Dir(p) {
		f, err := Lstat(p)
		if err != nil {
			return nil, err
		}
		chain = append(chain, f)
		if p == "/" {
			return chain, nil
		}
	}
}
