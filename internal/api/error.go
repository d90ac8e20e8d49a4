package api

import (
	"errors"
	"fmt"
	"net/http"
)

// The codes of errors. They are part of the contract with scripts.
const (
	CodeBadRequest     = "bad_request"
	CodeBadName        = "bad_name"
	CodeBadKey         = "bad_key"
	CodeBadAddress     = "bad_address"
	CodeBadPermission  = "bad_permission"
	CodeBadSetting     = "bad_setting"
	CodeUnknownSetting = "unknown_setting"
	CodeBadEndpoint    = "bad_endpoint"
	CodeForbidden      = "forbidden"
	CodeUnknownPeer    = "unknown_peer"
	CodeNotFound       = "not_found"
	CodeAlreadyRemoved = "already_removed"
	CodeBadMethod      = "method_not_allowed"
	CodeNameTaken      = "name_taken"
	CodeKeyTaken       = "key_taken"
	CodeAddressTaken   = "address_taken"
	CodeMeshFull       = "mesh_full"
	CodeTooLarge       = "too_large"
	CodeInternal       = "internal"
	CodeUnsupported    = "unsupported"
	CodeNotReady       = "not_ready"
	CodeNotSaved       = "not_saved"
	CodeNotInForce     = "not_in_force"
)

// statusOfCode has the HTTP status of each code.
var statusOfCode = map[string]int{
	CodeBadRequest:     http.StatusBadRequest,
	CodeBadName:        http.StatusBadRequest,
	CodeBadKey:         http.StatusBadRequest,
	CodeBadAddress:     http.StatusBadRequest,
	CodeBadPermission:  http.StatusBadRequest,
	CodeBadSetting:     http.StatusBadRequest,
	CodeUnknownSetting: http.StatusNotFound,
	CodeBadEndpoint:    http.StatusBadRequest,
	CodeForbidden:      http.StatusForbidden,
	CodeUnknownPeer:    http.StatusNotFound,
	CodeNotFound:       http.StatusNotFound,
	CodeAlreadyRemoved: http.StatusNotFound,
	CodeBadMethod:      http.StatusMethodNotAllowed,
	CodeNameTaken:      http.StatusConflict,
	CodeKeyTaken:       http.StatusConflict,
	CodeAddressTaken:   http.StatusConflict,
	CodeMeshFull:       http.StatusConflict,
	CodeTooLarge:       http.StatusRequestEntityTooLarge,
	CodeInternal:       http.StatusInternalServerError,
	CodeUnsupported:    http.StatusNotImplemented,
	CodeNotReady:       http.StatusServiceUnavailable,
	CodeNotSaved:       http.StatusInsufficientStorage,
	CodeNotInForce:     http.StatusServiceUnavailable,
}

// Error is a refusal or failure as the socket reports it. Code is for programs, Message and
// Hint are for people.
type Error struct {
	Code    string `json:"code"`    // one of the Code constants
	Message string `json:"message"` // what is wrong, with the offending input quoted
	Hint    string `json:"hint"`    // what to do about it, or ""
}

// Errorf returns an Error without a hint. What the message quotes must not be a
// secret.
func Errorf(code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// WithHint returns a copy of e with a hint.
func (e *Error) WithHint(format string, args ...any) *Error {
	return &Error{Code: e.Code, Message: e.Message, Hint: fmt.Sprintf(format, args...)}
}

// Error returns the message, and the hint where there is one.
func (e *Error) Error() string {
	if e.Hint == "" {
		return e.Message
	}
	return e.Message + "; " + e.Hint
}

// HTTPStatus returns the status for the code, 500 for an unknown one.
func (e *Error) HTTPStatus() int {
	if status, ok := statusOfCode[e.Code]; ok {
		return status
	}
	return http.StatusInternalServerError
}

// WrongByItself reports whether the request is wrong in itself, whatever the state of the
// mesh and the caller's rights: a name with a space, say, or a malformed key. An address
// outside the mesh prefixes isn't, as it depends on the mesh.
func (e *Error) WrongByItself() bool {
	switch e.Code {
	case CodeBadRequest, CodeBadName, CodeBadKey, CodeBadPermission, CodeBadEndpoint:
		return true
	}
	return false
}

// asError returns the *Error in the chain of err, or else wraps it with code internal. Its
// text may tell details of the host, but only administrators of the host may read.
func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return Errorf(CodeInternal, "%v", err)
}
