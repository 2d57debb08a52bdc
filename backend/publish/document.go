// Package publish brings what roles serve to where consumers read it: documents
// with the shape of KV version 2 secrets.
package publish

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// Document is one secret that consumers read. It is one entry, written in one
// Put: body, version and times belong together, and what is read is the same to
// the byte as long as the version is the same (Vault Secrets Operator restarts
// workloads when it is not).
type Document struct {
	Name    string    `json:"name"`
	Version int       `json:"version"`
	First   time.Time `json:"first"` // of version 1
	// Times are when the last versions were written, the current one last.
	// Clients insist on a time even of versions that are gone.
	Times []time.Time       `json:"times,omitempty"`
	Body  map[string]string `json:"body"`
	// Previous is what was shown before, while its secrets are still accepted.
	Previous *Former `json:"previous,omitempty"`
	// Shows is the version of each role that the body holds.
	Shows map[string]int `json:"shows,omitempty"`
}

// Former is the version before the current one.
type Former struct {
	Version int               `json:"version"`
	Body    map[string]string `json:"body"`
}

// View is what a role shows in its document.
type View struct {
	Role    string
	Version int
	Fields  map[string]string
	// Retired: what the document held before must not be read any more.
	Retired bool
}

// maxDocument bounds a document: several values of the largest size fit.
const maxDocument = 512 << 10

// Documents reads and writes documents.
type Documents struct{ s logical.Storage }

// NewDocuments returns the documents in s.
func NewDocuments(s logical.Storage) *Documents { return &Documents{s: s} }

// Get reads a document; nil when nothing was published to it.
func (d *Documents) Get(ctx context.Context, name string) (*Document, error) {
	return storage.Get[Document](ctx, d.s, storage.Document+name)
}

// List names what is below a folder; folders end with a slash.
func (d *Documents) List(ctx context.Context, folder string) ([]string, error) {
	return d.s.List(ctx, storage.Document+folder)
}

// Publish makes a document show views, all of it, in one Put and so as one
// version. Fields of other roles stay as they are; a document that shows the views
// already keeps its version.
func (d *Documents) Publish(ctx context.Context, name string, views []View) error {
	doc, err := d.Get(ctx, name)
	if err != nil {
		return err
	}
	if doc == nil {
		doc = &Document{Name: name}
	}
	next := doc.with(views, time.Now().UTC())
	if next == nil {
		return nil
	}
	return storage.Put(ctx, d.s, storage.Document+name, next, maxDocument)
}

// with returns the document as it has to be to show views; nil when it is so.
func (doc *Document) with(views []View, now time.Time) *Document {
	body, shows, retired := maps.Clone(doc.Body), maps.Clone(doc.Shows), false
	if body == nil {
		body = map[string]string{}
	}
	if shows == nil {
		shows = map[string]int{}
	}
	for _, v := range views {
		maps.Copy(body, v.Fields)
		shows[v.Role] = v.Version
		retired = retired || v.Retired
	}
	changed := !maps.Equal(body, doc.Body)
	stale := retired && doc.Previous != nil
	if !changed && !stale && maps.Equal(shows, doc.Shows) {
		return nil
	}
	next := *doc
	next.Shows = shows
	if changed {
		next.Previous = nil
		if doc.Version > 0 {
			next.Previous = &Former{Version: doc.Version, Body: doc.Body}
		}
		next.Version, next.Body = doc.Version+1, body
		if next.First.IsZero() {
			next.First = now
		}
		times := append(slices.Clone(doc.Times), now)
		next.Times = times[max(0, len(times)-listed):]
	}
	if retired {
		// The version before this one holds material that is refused by now.
		next.Previous = nil
	}
	return &next
}

// listed is how many versions are listed, whether they can be read or not.
const listed = 10

// Oldest is the first version that is listed.
func (doc *Document) Oldest() int { return doc.Version - len(doc.Times) + 1 }

// Updated is when the current version was written; zero where that is not known.
func (doc *Document) Updated() time.Time {
	if len(doc.Times) == 0 {
		return time.Time{}
	}
	return doc.Times[len(doc.Times)-1]
}

// At returns the body of a version (0: the current one), nil for one that can
// no longer be read, and when it was written. ok is false for a version that
// never was or is not listed any more.
func (doc *Document) At(version int) (body map[string]string, number int, created time.Time, ok bool) {
	if version == 0 {
		version = doc.Version
	}
	if version < doc.Oldest() || version > doc.Version {
		return nil, 0, time.Time{}, false
	}
	created = doc.Times[version-doc.Oldest()]
	switch {
	case version == doc.Version:
		body = doc.Body
	case doc.Previous != nil && version == doc.Previous.Version:
		body = doc.Previous.Body
	}
	return body, version, created, true
}

var (
	nameRegexp  = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,126}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,126}){0,7}$`)
	fieldRegexp = regexp.MustCompile(`^[A-Za-z0-9._-]{1,253}$`)
)

// CheckName refuses names that KV clients could not read.
func CheckName(name string) error {
	if !nameRegexp.MatchString(name) || strings.Contains("/"+name+"/", "/data/") || strings.Contains(name, "..") {
		return fmt.Errorf("document is %.80q; use up to eight parts of A-Z a-z 0-9 _ . - with slashes between them, none of them \"data\" or with two dots in a row", name)
	}
	return nil
}

// CheckField refuses names that a Kubernetes Secret could not carry.
func CheckField(what, name string) error {
	if !fieldRegexp.MatchString(name) || name == "." || strings.HasPrefix(name, "..") {
		return fmt.Errorf("%s is %.80q; use 1 to 253 of the characters A-Z a-z 0-9 . _ -", what, name)
	}
	return nil
}

// Settings say who may fill a document.
type Settings struct {
	AllowedRoles []string `json:"allowed_roles,omitempty"`
}

// SettingsOf reads the settings of a document; nil when it has none.
func (d *Documents) SettingsOf(ctx context.Context, name string) (*Settings, error) {
	return storage.Get[Settings](ctx, d.s, storage.DocumentSettings+name)
}

// PutSettings writes the settings of a document.
func (d *Documents) PutSettings(ctx context.Context, name string, s *Settings) error {
	return storage.Put(ctx, d.s, storage.DocumentSettings+name, s, maxSettings)
}

// DeleteSettings removes them: any role of the mount may fill the document.
func (d *Documents) DeleteSettings(ctx context.Context, name string) error {
	return d.s.Delete(ctx, storage.DocumentSettings+name)
}

// ListSettings names the documents below a folder that have settings.
func (d *Documents) ListSettings(ctx context.Context, folder string) ([]string, error) {
	return d.s.List(ctx, storage.DocumentSettings+folder)
}

const maxSettings = 64 << 10
