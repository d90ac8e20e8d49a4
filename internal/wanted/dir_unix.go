//go:build unix

package wanted

import (
	"fmt"
	"os"

	"github.com/meshhelper/meshhelper/internal/api"
	"github.com/meshhelper/meshhelper/internal/owned"
)

// checkDir refuses a state directory that belongs to a user other than root and the one
// that runs the helper, or that its group or others may write to: they could replace the
// files in it. openDir checks the folders above.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("check state directory: %w", err)
	}
	switch uid, ok := owned.Trusted(info); {
	case !info.IsDir():
		return api.Errorf(api.CodeInternal, "state directory %q is not a directory", dir).WithHint("name a directory with --state-dir")
	case !ok:
		return api.Errorf(api.CodeInternal, "state directory %q belongs to user %d, not to root or the user that runs the helper", dir, uid).
			WithHint("run: chown -R %d %q, after a look at what is in it", os.Geteuid(), dir)
	case info.Mode().Perm()&0o022 != 0:
		return api.Errorf(api.CodeInternal, "state directory %q has mode %s: others may write to it", dir, owned.ModeText(info.Mode())).
			WithHint("%s", owned.ToClose(dir, info.Mode(), "--state-dir"))
	}
	return nil
}
