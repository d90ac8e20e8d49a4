//go:build !unix

package launchd

import "errors"

// Lstat always fails: files on this system have no numeric owner.
func Lstat(string) (File, error) {
	return File{}, errors.New("stat file: not supported on this platform")
}
