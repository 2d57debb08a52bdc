package harmonyflow

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// documentField is the name of a document, which may be in folders.
var documentField = &framework.FieldSchema{
	Type: framework.TypeString, Required: true,
	Description: "Document: up to eight parts of A-Z a-z 0-9 _ . - with slashes between them.",
}

func (b *backend) pathDocuments() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"document":      documentField,
		"allowed_roles": {Type: framework.TypeCommaStringSlice, Description: "Roles (or globs) that may fill the document; empty for none. Without settings any role may."},
	}
	only := map[string]*framework.FieldSchema{"document": documentField}
	return []*framework.Path{
		{
			Pattern: "documents/?$",
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: operation{
					call: b.listDocuments, summary: "List documents that have settings.", verb: "list", suffix: "documents", fields: keyInfoFields,
				}.handler(nil),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "List documents that have settings.",
			HelpDescription: "Lists documents, and folders of them, for which it was written who may fill them.",
		},
		{
			Pattern: "documents/(?P<document>.+)",
			Fields:  fields,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: operation{
					call: b.readDocument, summary: "Read who may fill a document.", verb: "read", suffix: "document", errors: []int{400, 404},
					fields: map[string]*framework.FieldSchema{"allowed_roles": listField("Roles.")},
				}.handler(only),
				logical.UpdateOperation: operation{
					call: b.writeDocument, summary: "Say who may fill a document.", verb: "write", suffix: "document", none: true, errors: []int{400}, mutating: true,
				}.handler(fields),
				logical.DeleteOperation: operation{
					call: b.deleteDocument, summary: "Let any role fill a document again.", verb: "delete", suffix: "document", none: true, errors: []int{400}, mutating: true,
				}.handler(only),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis: "Who may fill a document.",
			HelpDescription: `A document is one secret that consumers read at data/<document>; roles fill fields of it. Its settings say which
roles may be created with it; what it holds already stays.`,
		},
	}
}

func (b *backend) listDocuments(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	names, err := b.documents.ListSettings(ctx, "")
	if err != nil {
		return nil, err
	}
	return logical.ListResponse(names), nil
}

func (b *backend) readDocument(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("document").(string)
	if err := publish.CheckName(name); err != nil {
		return refuse("%v", err)
	}
	s, err := b.documents.SettingsOf(ctx, name)
	if err != nil || s == nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{"allowed_roles": orEmpty(s.AllowedRoles)}}, nil
}

func (b *backend) writeDocument(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("document").(string)
	if err := publish.CheckName(name); err != nil {
		return refuse("%v", err)
	}
	s, err := b.documents.SettingsOf(ctx, name)
	if err != nil {
		return nil, err
	}
	if s == nil {
		s = &publish.Settings{}
	}
	setStrings(d, "allowed_roles", &s.AllowedRoles)
	for _, p := range s.AllowedRoles {
		if _, err := path.Match(p, ""); err != nil {
			return refuse("allowed_roles holds %.64q, which is no glob; use names, or * and ? within them", p)
		}
	}
	return nil, b.documents.PutSettings(ctx, name, s)
}

func (b *backend) deleteDocument(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("document").(string)
	if err := publish.CheckName(name); err != nil {
		return refuse("%v", err)
	}
	return nil, b.documents.DeleteSettings(ctx, name)
}

// applyDocument sets, on a role that is being created, where it is published.
func (b *backend) applyDocument(ctx context.Context, r *rotation.Role, d *framework.FieldData) error {
	r.Document, r.Field, r.UsernameField = d.Get("document").(string), d.Get("field").(string), d.Get("username_field").(string)
	return b.mayFill(ctx, r)
}

// mayFill refuses a role that could not fill what it names, or may not.
func (b *backend) mayFill(ctx context.Context, r *rotation.Role) error {
	if err := checkDocument(r, b.entry(r.Kind).ConnectionType() != ""); err != nil {
		return badRequest("%w", err)
	}
	if r.Document == "" {
		return nil
	}
	s, err := b.documents.SettingsOf(ctx, r.Document)
	if err != nil {
		return err
	}
	if s != nil && !slices.ContainsFunc(s.AllowedRoles, func(p string) bool { ok, err := path.Match(p, r.Name); return err == nil && ok }) {
		return badRequest("document %q does not allow role %q; add it to allowed_roles of documents/%s", r.Document, r.Name, r.Document)
	}
	return nil
}

func checkDocument(r *rotation.Role, hasUser bool) error {
	previous := r.Spec.PreviousField
	if !r.Shows() {
		if r.Field != "" || r.UsernameField != "" {
			return fmt.Errorf("field and username_field are fields of a document, or of a secret of another mount; give document or publish_connection with them")
		}
		return nil
	}
	if r.Document != "" {
		if err := publish.CheckName(r.Document); err != nil {
			return err
		}
	}
	if err := publish.CheckField("field", r.Field); err != nil {
		return err
	}
	if r.UsernameField != "" && !hasUser {
		return fmt.Errorf("username_field is %.64q; secrets of kind %s have no user", r.UsernameField, r.Kind)
	}
	seen := []string{}
	for what, name := range map[string]string{
		"field": r.Field, "username_field": r.UsernameField, "previous_field": previous,
		"next_field": r.Spec.NextField, "keys_field": r.Spec.KeysField,
	} {
		if name == "" {
			continue
		}
		if err := publish.CheckField(what, name); err != nil {
			return err
		}
		if slices.Contains(seen, name) {
			return fmt.Errorf("%s is %.64q, which another field of the role names too; each needs a name of its own", what, name)
		}
		seen = append(seen, name)
	}
	if r.Spec.Strategy == kind.Alternate && (r.UsernameField == "" || previous != "") {
		return fmt.Errorf("with strategy %q the user changes with the password, so username_field is needed, and previous_field cannot be: a password without its user is a trap", kind.Alternate)
	}
	if previous != "" && r.Spec.Strategy != kind.Overlap && r.Spec.Strategy != kind.KeyRing {
		return fmt.Errorf("previous_field is for strategies %q and %q, where the previous secret stays accepted; this role has %q",
			kind.Overlap, kind.KeyRing, r.Spec.Strategy)
	}
	return checkRing(r)
}

// checkRing refuses a ring whose document shows nothing but the key that is in
// use: who verifies or decrypts would meet the next one only when it is used.
func checkRing(r *rotation.Role) error {
	s := r.Spec
	if s.Strategy != kind.KeyRing || !r.Shows() || s.PreviousField != "" || s.KeysField != "" || s.PublicJWKS {
		return nil
	}
	where := r.Place.String()
	if r.Document != "" {
		where = "document " + r.Document
	}
	return fmt.Errorf("in %s consumers would see no key but the one in use, and so could not check what the next one makes; "+
		"give keys_field or previous_field (for a key pair, public_jwks=true does as well)", where)
}

// holds reports whether what a field of a document holds is of the role's own
// ring: a role that is created again goes on with the keys that it left there.
func holds(ring kind.Ring, r *rotation.Role, field, held string) bool {
	values, ids := map[string]bool{}, map[string]string{}
	for _, v := range r.Versions {
		if form, err := ring.Verifying(v.Material); err == nil {
			values[v.Material.Secret], values[form], ids[v.Material.KeyID] = true, true, form
		}
	}
	if field != r.Spec.KeysField {
		return values[held]
	}
	var keys map[string]string
	if json.Unmarshal([]byte(held), &keys) != nil {
		return false
	}
	for id, key := range keys {
		if known, ok := ids[id]; !ok || known != key {
			return false
		}
	}
	return true
}

// unfilled refuses a role whose fields hold something already, where it is to be
// shown, that nobody gave: consumers read it.
func (b *backend) unfilled(ctx context.Context, r *rotation.Role, overwrite bool) error {
	if !r.Shows() || overwrite {
		return nil
	}
	places, err := b.shownAt(ctx, r)
	if err != nil {
		return err
	}
	for where, body := range places {
		if err := b.unfilledIn(ctx, r, where, body); err != nil {
			return err
		}
	}
	return nil
}

func (b *backend) unfilledIn(ctx context.Context, r *rotation.Role, where string, body map[string]string) error {
	ring, isRing := b.kind(r.Kind).(kind.Ring)
	shown := map[string]string{r.UsernameField: firstUser(r.Spec)}
	if v := r.Get(r.Run.To); v != nil {
		shown[r.Field] = v.Material.Secret
	}
	for _, field := range r.Fields() {
		held := body[field]
		if held == "" || held == shown[field] || isRing && holds(ring, r, field, held) || r.Run.Restores && leftThere(r, held) {
			continue
		}
		if isRing && field == r.Spec.PreviousField {
			if err := b.takeOver(ctx, ring, r, held); err != nil {
				return conflict("field %q of %s holds a value that no role owns and that cannot be taken over as an earlier key (%v); empty it once nothing needs it any more, or set overwrite_existing=true to replace it", field, where, err)
			}
			continue
		}
		remedy := "empty it once nothing needs it any more"
		if field == r.Field {
			remedy = "give it as initial_password or initial_value"
		}
		return conflict("field %q of %s holds a value already that no role owns and that was not given; %s, or set overwrite_existing=true to replace it", field, where, remedy)
	}
	return nil
}

// leftThere reports whether what a field holds is what a deleted role has shown.
func leftThere(r *rotation.Role, held string) bool {
	return slices.Contains(r.Spec.Owns(), held) || slices.ContainsFunc(r.Versions, func(v version.Version) bool { return v.Material.Secret == held })
}

// takeOver makes what consumers find as the previous key an earlier key of a ring
// whose current one is adopted: it goes on counting as long as an earlier key does.
func (b *backend) takeOver(ctx context.Context, ring kind.Ring, r *rotation.Role, held string) error {
	adopter, ok := ring.(kind.Adopter)
	switch {
	case !ok:
		return fmt.Errorf("kind %s takes none over", r.Kind)
	case !r.Run.Adopted:
		return errors.New("the key that is in use was not given")
	case r.With(version.Previous) != nil:
		return errors.New("the role has an earlier key already")
	}
	if err := b.entry(r.Kind).CheckInitial(r.Spec, held); err != nil {
		return err
	}
	m, err := adopter.Adopt(ctx, r.Spec, held, source{b})
	if err != nil {
		return err
	}
	if form, err := ring.Verifying(m); err != nil || form != held {
		return errors.New("only the public half of a key stands there")
	}
	r.TakeOver(m, time.Now())
	return nil
}
