package harmonyflow

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

func (b *backend) pathDeleted() []*framework.Path {
	page := map[string]*framework.FieldSchema{
		"after": {Type: framework.TypeString, Query: true, Description: "Only names after this one: the last one of the page before."},
		"limit": limitField,
	}
	only := map[string]*framework.FieldSchema{"name": nameField}
	lists := operation{call: b.listDeleted, summary: "List deleted roles that can be restored.", verb: "list", suffix: "deleted", fields: keyInfoFields}
	reads := lists
	reads.verb, reads.suffix = "read", "deleted-list"
	return []*framework.Path{
		{
			Pattern: "deleted/?$",
			Fields:  page,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: lists.handler(page),
				logical.ReadOperation: reads.handler(page),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "List deleted roles that can be restored.",
			HelpDescription: "A deleted role is kept for 30 days. Page with after= and limit=.",
		},
		{
			Pattern: "deleted/" + namePattern,
			Fields:  only,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: operation{
					call: b.readDeleted, summary: "Read what is kept of a deleted role, without its secrets.", verb: "read", suffix: "deleted-role",
					fields: deletedAnswer(), errors: []int{404},
				}.handler(only),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis: "What is kept of a deleted role.",
			HelpDescription: `What the role was, which versions it had and which of them its server may accept, and until when
restore/<name> brings it back. No secret is in it.`,
		},
	}
}

func deletedAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"summary": stringField("What is kept, in a sentence."), "follow": stringField("The next command to type."),
		"deleted": stringField("When the role was deleted, RFC 3339."), "restorable_until": stringField("Until when it can be restored, RFC 3339."),
		"kind": stringField("Kind."), "description": stringField("Description."), "connection": stringField("Connection."),
		"username": stringField("User."), "usernames": listField("Users that took turns."), "strategy": stringField("Strategy."),
		"mount": stringField("Mount in the other Vault, of a transit or database-root role."), "key": stringField("Name at that mount."),
		"consumers": listField("Consumers."), "document": stringField("Document that it filled."), "field": stringField("Field of the secret."),
		"publish_connection": stringField("Connection that it was published through."), "publish_mount": stringField("Mount that it was published to."),
		"publish_path": stringField("Path that it was published to."),
		"version":      intField("Version that was current; 0: it never served one."), "versions": mapField("Stage and times of each version kept, by number."),
		"accepted":      {Type: framework.TypeSlice, Description: "Numbers of the versions that its server may accept still, where there is a server."},
		"last_rotation": stringField("When the current version was promoted, RFC 3339."), "last_run": stringField("Id and outcome of its last rotation."),
		"next_rotation": stringField("When it would have rotated by itself, RFC 3339."),
		"earlier":       {Type: framework.TypeSlice, Description: "The same of earlier roles of the name, of other users, each with the command that restores it."},
	}
}

func (b *backend) listDeleted(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	limit, err := pageLimit(d)
	if err != nil {
		return nil, err
	}
	names, err := b.engine.Store().DeletedNames(ctx)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	after := d.Get("after").(string)
	keys, info := []string{}, map[string]any{}
	for _, name := range names {
		if name <= after {
			continue
		}
		if len(keys) == limit {
			break
		}
		left, err := b.engine.Store().Remains(ctx, name)
		if err != nil {
			return nil, err
		}
		if len(left) == 0 {
			continue // it has run out, or its role has been restored just now
		}
		t := left[0]
		keys = append(keys, name)
		info[name] = map[string]any{
			"kind": t.Role.Kind, "connection": t.Role.Connection, "username": firstUser(t.Role.Spec), "version": currentNumber(t.Role),
			"deleted": formatTime(t.Deleted), "restorable_until": formatTime(t.Until()),
		}
	}
	return logical.ListResponseWithInfo(keys, info), nil
}

func (b *backend) readDeleted(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	left, err := b.remains(ctx, name)
	if err != nil {
		return nil, err
	}
	r, err := b.engine.Store().Role(ctx, name)
	if err != nil {
		return nil, err
	}
	command := "vault write -f " + req.MountPoint + "restore/" + name
	data := describeDeleted(left[0])
	data["follow"] = command
	data["summary"] = fmt.Sprintf("deleted at %s, and can be restored until %s", formatTime(left[0].Deleted.Truncate(time.Second)), formatTime(left[0].Until().Truncate(time.Second)))
	if r != nil {
		data["follow"] = "vault read " + req.MountPoint + "roles/" + name
		data["summary"] = data["summary"].(string) + ", once the role that has its name now is deleted"
		if r.Run != nil && r.Run.Restores {
			data["summary"], data["follow"] = "it is being restored", "vault read "+req.MountPoint+"rotations/"+r.Run.Rotation
		}
	}
	earlier := []any{}
	for _, t := range left[1:] {
		one := describeDeleted(t)
		one["follow"] = command + " deleted=" + formatTime(t.Deleted)
		earlier = append(earlier, one)
	}
	data["earlier"] = earlier
	return &logical.Response{Data: data}, nil
}

// remains are what is kept of deleted roles of a name, of which there is one at least.
func (b *backend) remains(ctx context.Context, name string) ([]*rotation.Tombstone, error) {
	left, err := b.engine.Store().Remains(ctx, name)
	if err == nil && len(left) == 0 {
		err = notFound("there is no deleted role %.128q to restore; what is deleted is kept for 30 days: list deleted/ to see what there is", name)
	}
	return left, err
}

func describeDeleted(t *rotation.Tombstone) map[string]any {
	r := t.Role
	accepted := []any{}
	for _, number := range t.Accepted() {
		accepted = append(accepted, int64(number))
	}
	data := map[string]any{
		"deleted": formatTime(t.Deleted), "restorable_until": formatTime(t.Until()), "kind": r.Kind, "description": r.Description,
		"connection": r.Connection, "username": r.Spec.Username, "usernames": orEmpty(r.Spec.Usernames), "strategy": string(r.Spec.Strategy),
		"mount": r.Spec.Mount, "key": r.Spec.Key, "consumers": orEmpty(r.Consumers), "document": r.Document, "field": r.Field,
		"version": currentNumber(r), "versions": versionInfo(r), "accepted": accepted,
		"last_rotation": formatTime(r.LastRotation), "last_run": "", "next_rotation": formatTime(r.Next),
	}
	describePlace(r, data)
	if r.LastRun != nil {
		data["last_run"] = fmt.Sprintf("%s: %s", r.LastRun.Rotation, r.LastRun.State)
	}
	return data
}

func (b *backend) pathRestore() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"name": nameField,
		"overwrite_existing": {
			Type:        framework.TypeBool,
			Description: "Where the server refuses what the role served, have it accept that again instead of what it accepts now; replace what stands in the fields that the role fills. After an emergency that was given up: make a new version.",
		},
		"deleted": {Type: framework.TypeString, Description: "Of several roles of the name that were deleted, restore the one that was deleted then, as deleted/<name> shows it. Default: the last."},
	}
	answer := rotationAnswer()
	answer["next_rotations"] = nextRotationsField()
	return []*framework.Path{{
		Pattern: "restore/" + namePattern,
		Fields:  fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: operation{
				call: b.restoreRole, summary: "Bring a deleted role back.", verb: "restore", suffix: "role", fields: answer, errors: []int{404, 409}, mutating: true,
			}.handler(fields),
		},
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis: "Bring a deleted role back.",
		HelpDescription: `The role comes back with its configuration and its versions, and what it served is served again, under the next
number, once a login at every node has proven it. Nothing is taken away from anybody: where the role was deleted in
the middle of a rotation, the previous version stays accepted until the next rotation has moved consumers. Its
connection must serve it still, and nobody else may have its user or its fields by now. Where the server refuses what
the role served nothing is changed; overwrite_existing=true puts it back there. Its schedule goes on: a time that has
passed meanwhile is not made up for. A repeat answers with the same rotation.`,
	}}
}

func (b *backend) restoreRole(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	at, err := deletedAt(d)
	if err != nil {
		return nil, err
	}
	r, err := b.engine.Store().Role(ctx, name)
	if err != nil {
		return nil, err
	}
	if r != nil {
		return b.restoredBefore(ctx, req, r, at)
	}
	id, err := b.restore(ctx, req, name, at, d.Get("overwrite_existing").(bool))
	if err != nil {
		var taken *rotation.Conflict
		if r, _ := b.engine.Store().Role(ctx, name); r != nil && errors.As(err, &taken) { // another request was first
			return b.restoredBefore(ctx, req, r, at)
		}
		return nil, err
	}
	return b.answerRestored(ctx, req, id, name)
}

func deletedAt(d *framework.FieldData) (at time.Time, err error) {
	given := d.Get("deleted").(string)
	if given == "" {
		return at, nil
	}
	if at, err = time.Parse(time.RFC3339Nano, given); err != nil {
		return at, badRequest("deleted is %.64q; give the time that deleted/<name> shows, such as 2026-11-30T03:00:00.5Z", given)
	}
	return at, nil
}

// restore begins to bring a role back: what it is checked for is what a new one is.
func (b *backend) restore(ctx context.Context, req *logical.Request, name string, at time.Time, overwrite bool) (id string, err error) {
	left, err := b.remains(ctx, name)
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(left, func(t *rotation.Tombstone) bool { return at.IsZero() || t.Deleted.Equal(at) })
	if i < 0 {
		return "", notFound("no role %.128q that can be restored was deleted at %s; read deleted/%s", name, formatTime(at), name)
	}
	r := left[i].Revive(time.Now())
	k := b.offered(r.Kind)
	if k == nil {
		return "", conflict("role %q is of kind %q, which this version does not know; install the one that does", name, r.Kind)
	}
	if overwrite && isKept(r) {
		return "", badRequest("field %q is not for kind %s, whose secret another Vault keeps and nobody sees", "overwrite_existing", r.Kind)
	}
	if err := b.standsUp(ctx, r, k); err != nil {
		return "", err
	}
	h, err := b.create(ctx, k, rotation.Creation{Role: r, Restores: left[i].Deleted, Overwrite: overwrite, RequestedBy: requester(req)})
	if err != nil {
		return "", err
	}
	return h.ID, nil
}

// standsUp refuses a role that could not be created as it is.
func (b *backend) standsUp(ctx context.Context, r *rotation.Role, k *kindEntry) error {
	c, err := b.engine.LoadConfig(ctx)
	if err != nil {
		return err
	}
	nothing := &framework.FieldData{Raw: map[string]any{}, Schema: roleFields()}
	if err := applyRole(r, k, c, &logical.Request{}, nothing); err != nil {
		return badRequest("%w", err)
	}
	if err := b.mayFill(ctx, r); err != nil {
		return err
	}
	if err := b.makes(ctx, r.Spec.PasswordPolicy); err != nil {
		return err
	}
	return b.serves(ctx, r.Name, r.Consumers)
}

// restoredBefore answers a restore of a role that exists: a repeat is told what became
// of the first, and all else that the name is taken.
func (b *backend) restoredBefore(ctx context.Context, req *logical.Request, r *rotation.Role, at time.Time) (*logical.Response, error) {
	left, err := b.engine.Store().Remains(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	last := r.Run != nil && r.Run.Rotation == r.Restored || r.LastRun != nil && r.LastRun.Rotation == r.Restored
	other := slices.ContainsFunc(left, func(t *rotation.Tombstone) bool { return t.Deleted.Equal(at) }) && r.With(version.Current) != nil
	if r.Restored != "" && !other && (last || len(left) == 0) {
		h, err := b.engine.Store().Header(ctx, r.Restored)
		if err != nil {
			return nil, err
		}
		if h != nil {
			return b.answerRestored(ctx, req, h.ID, r.Name)
		}
	}
	if len(left) == 0 {
		return nil, conflict("role %q exists, and there is no deleted one of its name to restore; read roles/%s", r.Name, r.Name)
	}
	return nil, conflict("role %q exists, and a deleted role is restored under its own name alone: delete roles/%s first, "+
		"whose secret goes on working, and then restore the one that was deleted at %s with deleted=%s",
		r.Name, r.Name, formatTime(left[0].Deleted.Truncate(time.Second)), formatTime(left[0].Deleted))
}

func (b *backend) answerRestored(ctx context.Context, req *logical.Request, id, name string) (*logical.Response, error) {
	resp, err := b.answerCreated(ctx, req, id, name)
	if err != nil {
		return nil, err
	}
	r, err := b.engine.Store().Role(ctx, name)
	if err != nil || r == nil || r.Beside == 0 || r.Run != nil {
		return resp, err
	}
	if v, _ := r.PreviousServed(); v != nil {
		resp.AddWarning(fmt.Sprintf("the role was deleted in the middle of a rotation: version %d stays accepted beside the current one until rotate/%s/%s has moved consumers",
			v.Number, r.Kind, name))
	}
	return resp, nil
}
