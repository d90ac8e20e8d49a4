package host

import (
	"fmt"
	"strings"
)

// maxLabel is the longest name of a pf anchor, in bytes: PF_ANCHOR_NAME_SIZE (xnu
// bsd/net/pfvar.h) less the final NUL. launchd and systemd accept longer ones.
const maxLabel = 63

// CheckLabel refuses a label of the service that launchd, systemd or pf wouldn't accept
// as a name, or that would lead to a file in another folder.
func CheckLabel(label string) error {
	switch {
	case label == "" || len(label) > maxLabel:
		return fmt.Errorf("label of %d bytes: want 1 to %d", len(label), maxLabel)
	case !isAlphanumeric(label[0]):
		// pfctl reserves names that begin with an underscore.
		return fmt.Errorf("label %q: want a letter or digit first", label)
	}
	for i := range len(label) {
		if c := label[i]; !isAlphanumeric(c) && !strings.ContainsRune(".-_", rune(c)) {
			return fmt.Errorf("label %q: unexpected %q", label, c)
		}
	}
	return nil
}

func isAlphanumeric(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}
