//go:build !linux && !darwin

package api

import "errors"

// credentialsOf fails, so that no connection is served.
func credentialsOf(int) (Credentials, error) {
	return Credentials{}, errors.New("peer credentials are not supported on this system")
}
