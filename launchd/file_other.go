//go:build !unix

package launchd

import "errors"

// Lstat isn't available: this system's files have no owner by number.
func Lstat(string) (File, error) {
	return File{}, errors.New("look at file: not supported on this system")
}
