//go:build !unix

package wanted

import "errors"

// lockDir fails: without a lock, two helpers could write the same document.
func lockDir(string) (func() error, error) {
	return nil, errors.New("locking a state directory is not supported on this system")
}
