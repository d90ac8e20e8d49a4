package wanted

import (
	"bytes"
	"encoding"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"

	"github.com/meshhelper/meshhelper/internal/mesh"
)

// unknown has the fields of a JSON object on disk that this version doesn't know: those of
// the object itself, and those of the objects in its known fields. A nil *unknown is empty.
// An unknown is immutable, so that documents can share it.
type unknown struct {
	fields map[string]json.RawMessage
	inside map[string]*unknown // by the name of the known field
}

// unknownOf returns the fields of the JSON object text that the type t doesn't have. t is
// a struct with json tags, or mesh.Grants. Objects in lists are skipped.
func unknownOf(text []byte, t reflect.Type) (*unknown, error) {
	var object map[string]json.RawMessage
	if err := json.Unmarshal(text, &object); err != nil {
		return nil, err
	}
	known := fieldsOf(t)
	u := &unknown{fields: map[string]json.RawMessage{}, inside: map[string]*unknown{}}
	for name, value := range object {
		field, ok := known.find(name)
		if !ok {
			u.fields[name] = value
			continue
		}
		if fieldsOf(field.typ) == nil || bytes.Equal(bytes.TrimSpace(value), []byte("null")) {
			continue
		}
		inside, err := unknownOf(value, field.typ)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if inside != nil {
			u.inside[field.name] = inside
		}
	}
	if len(u.fields) == 0 && len(u.inside) == 0 {
		return nil, nil
	}
	return u, nil
}

// addTo returns the JSON object text with the unknown fields added.
func (u *unknown) addTo(text []byte) ([]byte, error) {
	if u == nil {
		return text, nil
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(text, &object); err != nil {
		return nil, err
	}
	for name, value := range u.fields {
		object[name] = value
	}
	for name, inside := range u.inside {
		value, ok := object[name]
		if !ok {
			continue // omitempty left the field out, and its unknown fields go with it
		}
		with, err := inside.addTo(value)
		if err != nil {
			return nil, err
		}
		object[name] = with
	}
	return json.Marshal(object)
}

// field is a known field of a JSON object.
type field struct {
	name string
	typ  reflect.Type
}

// fields are the known fields of a JSON object.
type fields []field

// find returns the field that encoding/json decodes a name into. encoding/json ignores
// case, so a name in other letters is known, too.
func (fs fields) find(name string) (field, bool) {
	for _, f := range fs {
		if strings.EqualFold(f.name, name) {
			return f, true
		}
	}
	return field{}, false
}

// fieldsOf returns the fields of a type that is encoded as a JSON object, and nil for any
// other type. mesh.Grants is an array in Go and an object with permission names in JSON.
func fieldsOf(t reflect.Type) fields {
	var out fields
	switch {
	case t == reflect.TypeFor[mesh.Grants]():
		for _, p := range mesh.AllPermissions {
			out = append(out, field{p.Name, t.Elem()})
		}
	case t.Kind() == reflect.Struct && !t.Implements(reflect.TypeFor[encoding.TextMarshaler]()):
		for i := range t.NumField() {
			if name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ","); name != "" && name != "-" {
				out = append(out, field{name, t.Field(i).Type})
			}
		}
	}
	return out
}

// extras has the unknown fields of a document: those at the top, and those of its peers by
// key. A later version's fields thus survive a downgrade. Unknown fields of Former and
// Removed entries, which are short-lived, are dropped.
type extras struct {
	top   *unknown
	peers map[mesh.PublicKey]*unknown
}

// extrasOf returns the fields of text, from which doc was decoded, that doc doesn't have.
func extrasOf(text []byte, doc *Document) (*extras, error) {
	top, err := unknownOf(text, reflect.TypeFor[Document]())
	if err != nil {
		return nil, err
	}
	var lists struct {
		Peers []json.RawMessage `json:"peers"`
	}
	if err := json.Unmarshal(text, &lists); err != nil {
		return nil, err
	}
	out := &extras{top: top, peers: map[mesh.PublicKey]*unknown{}}
	for i, raw := range lists.Peers {
		u, err := unknownOf(raw, reflect.TypeFor[mesh.Peer]())
		if err != nil {
			return nil, fmt.Errorf("peer %d: %w", i+1, err)
		}
		if u != nil {
			out.peers[doc.Peers[i].PublicKey] = u
		}
	}
	if out.top == nil && len(out.peers) == 0 {
		return nil, nil
	}
	return out, nil
}

// addTo returns text, which is doc encoded, with the unknown fields added.
func (u *extras) addTo(text []byte, doc *Document) ([]byte, error) {
	if u == nil {
		return text, nil
	}
	var object map[string]json.RawMessage
	var peers []json.RawMessage
	if err := json.Unmarshal(text, &object); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(object["peers"], &peers); err != nil {
		return nil, err
	}
	for i := range doc.Peers {
		with, err := u.peers[doc.Peers[i].PublicKey].addTo(peers[i])
		if err != nil {
			return nil, err
		}
		peers[i] = with
	}
	list, err := json.Marshal(peers)
	if err != nil {
		return nil, err
	}
	object["peers"] = list
	if text, err = json.Marshal(object); err != nil {
		return nil, err
	}
	return u.top.addTo(text)
}

// carryOver returns the unknown fields for a document after an edit of the document before.
// A peer that gets another key keeps its unknown fields. Those of a removed peer are
// dropped, so that they don't reappear when a peer with that key is added again.
func (u *extras) carryOver(before, after *Document) *extras {
	if u == nil || len(u.peers) == 0 {
		return u
	}
	out := &extras{top: u.top, peers: map[mesh.PublicKey]*unknown{}}
	for i := range after.Peers {
		if key := after.Peers[i].PublicKey; u.peers[key] != nil {
			out.peers[key] = u.peers[key]
		}
	}
	for i, p := range before.rekeyed(after) {
		if rest := u.peers[before.Peers[i].PublicKey]; rest != nil {
			out.peers[p.PublicKey] = rest
		}
	}
	return out
}
