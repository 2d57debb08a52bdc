package harmonyflow

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// The admin credential of a connection is rotated by rotate-root/, and by a
// schedule that is written with the connection. Both adopt it first.

func (b *backend) pathRotateRoot() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"name":            nameField,
		"dry_run":         boolField("Give the plan and what preflight finds, and change nothing."),
		"reason":          reasonField,
		"idempotency_key": idempotencyField,
	}
	return []*framework.Path{{
		Pattern: "rotate-root/" + namePattern,
		Fields:  fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: operation{
				call: b.rotateRoot, summary: "Rotate the admin credential of a connection.", verb: "rotate", suffix: "root",
				fields: rotationAnswer(), errors: []int{404, 409}, mutating: true,
			}.handler(fields),
		},
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis: "Rotate the admin credential of a connection.",
		HelpDescription: `The password (of a vault connection with auth=approle the secret id) that the engine itself logs in with is
changed like that of a role: stored before the server hears of it, proven by logins at every node, and forgotten when it was
seen to be refused. Whatever of it the server may accept meanwhile is tried at each login, so that nothing locks
the engine out. From then on nobody else knows it, and a write of the connection with another password is refused
without force=true. Give the connection rotation_period or rotation_schedule to have it done by itself. A
connection whose user other people log in as needs one of its own first.`,
	}}
}

// rootFields say how the admin credential of a connection rotates.
func rootFields() map[string]*framework.FieldSchema {
	fields := map[string]*framework.FieldSchema{
		"password_policy": {Type: framework.TypeString, Description: "Vault password policy that makes new passwords of the admin user."},
		"force":           {Type: framework.TypeBool, Query: true, Description: "Replace an admin credential that rotate-root manages by the one given, which somebody has set at the server. When deleting: forget it."},
	}
	for name, f := range scheduleFields() {
		if !strings.HasPrefix(name, "apart_") {
			own := *f
			own.Description = "Of the admin credential. " + f.Description
			fields[name] = &own
		}
	}
	return fields
}

func rootAnswer() map[string]*framework.FieldSchema {
	fields := map[string]*framework.FieldSchema{
		"managed":         boolField("Whether rotate-root manages the admin credential."),
		"admin_version":   intField("Its version."),
		"admin_state":     stringField("idle, rotating, drifted or suspended."),
		"last_rotation":   stringField("When it was rotated last, RFC 3339."),
		"last_error":      stringField("What went wrong last."),
		"rotation_id":     stringField("Rotation that it is in."),
		"password_policy": stringField("Vault password policy that makes new passwords of the admin user."),
	}
	for name, f := range scheduleAnswer() {
		if !strings.HasPrefix(name, "apart_") {
			fields[name] = f
		}
	}
	return fields
}

// describeRoot shows how the admin credential of a connection stands; r is nil
// where it is not managed.
func describeRoot(r *rotation.Role, data map[string]any) {
	data["managed"] = r != nil
	if r == nil {
		return
	}
	described := map[string]any{}
	describeRun(r, described)
	describeSchedule(r, described)
	for name := range rootAnswer() {
		if v, ok := described[name]; ok {
			data[name] = v
		}
	}
	data["admin_version"], data["admin_state"] = currentNumber(r), r.State()
	data["last_rotation"], data["password_policy"] = formatTime(r.LastRotation), r.Given.PasswordPolicy
}

// rootOf is connection.Root.
func (b *backend) rootOf(ctx context.Context, name string) (*version.Set, error) {
	r, err := b.engine.Store().Root(ctx, name)
	if err != nil || r == nil {
		return nil, err
	}
	set := r.Set.Clone()
	return &set, nil
}

// rootKind is the kind that rotates what a connection logs in with.
func (b *backend) rootKind(e *connection.Entry) (*kindEntry, error) {
	for i, k := range b.kinds {
		ofVault := k.root != nil && e.Vault != nil && e.Vault.Auth == connection.AuthAppRole
		if k.ConnectionType() == e.Type && (k.open != nil || ofVault) {
			return &b.kinds[i], nil
		}
	}
	if e.Vault != nil {
		return nil, badRequest("connection %q logs in with auth=%s, which nobody can rotate from here; use auth=approle, "+
			"or write the connection with a new %s when there is one", e.Name, e.Vault.Auth, vaultLogins[e.Vault.Auth].secret)
	}
	return nil, badRequest("the admin credential of a connection of type %s cannot be rotated", e.Type)
}

// newRoot is the role that the admin credential of a connection would be.
func (b *backend) newRoot(e *connection.Entry, policy string) (*rotation.Role, error) {
	k, err := b.rootKind(e)
	if err != nil {
		return nil, err
	}
	r := &rotation.Role{Name: rotation.RootName(e.Name), Kind: k.Name(), Connection: e.Name, Target: e.Identity}
	r.Given = kind.Spec{Username: e.Username(), PasswordPolicy: policy}
	r.Spec = r.Given
	r.Spec.Role = r.Name
	if err := k.Complete(&r.Spec); err != nil {
		return nil, badRequest("the admin credential of connection %q cannot be rotated: %w", e.Name, err)
	}
	return r, nil
}

func (b *backend) rotateRoot(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	e, err := b.connections.Get(ctx, name)
	switch {
	case err != nil:
		return nil, err
	case e == nil:
		return nil, notFound("there is no connection %.128q; list connections/ to see which there are", name)
	}
	if _, err := b.rootKind(e); err != nil {
		return nil, err
	}
	root := rotation.RootName(name)
	asked := rotation.Request{
		Trigger: rotation.RotateRoot, Roles: []string{root}, RequestedBy: requester(req), Reason: d.Get("reason").(string), Keys: requestKeys(req, d),
	}
	again, err := b.repeated(ctx, asked)
	if err == nil && !again && !d.Get("dry_run").(bool) {
		err = b.notFrozen(ctx)
	}
	if err != nil {
		return nil, err
	}
	if d.Get("dry_run").(bool) {
		return b.planRoot(ctx, req, e)
	}
	if !again {
		if err := b.adoptRoot(ctx, name); err != nil {
			return nil, err
		}
	}
	h, err := b.engine.Begin(ctx, asked)
	if err != nil {
		return nil, err
	}
	return b.answerOne(ctx, req, h.ID, root, rotation.Settled, forward)
}

// planRoot is plan for the admin credential of a connection, adopted or not.
func (b *backend) planRoot(ctx context.Context, req *logical.Request, e *connection.Entry) (*logical.Response, error) {
	if e.Managed {
		return b.plan(ctx, req, []string{rotation.RootName(e.Name)})
	}
	r, err := b.newRoot(e, "")
	if err != nil {
		return nil, err
	}
	v := e.Admin.With(version.Current)
	if v == nil {
		return nil, badRequest("connection %q has no admin credential; write it again with one", e.Name)
	}
	r.AdoptAs(v.Material, time.Now())
	reports, err := b.engine.ExamineNew(ctx, r)
	if err != nil {
		return nil, err
	}
	return planned(req, reports), nil
}

// adoptRoot has the engine keep the admin credential of a connection, if it does
// not do so already. Nothing is changed at the server.
func (b *backend) adoptRoot(ctx context.Context, name string) error {
	r, err := b.engine.Store().Root(ctx, name)
	if err != nil {
		return err
	}
	if r != nil {
		e, err := b.connections.Must(ctx, name)
		if err != nil {
			return err
		}
		return b.soleAdmin(ctx, e)
	}
	if err := b.identify(ctx, name); err != nil {
		return err
	}
	unlock, err := b.holdConnection(ctx, name, b.connections.Lock)
	if err != nil {
		return err
	}
	defer unlock()
	e, err := b.connections.Must(ctx, name)
	if err != nil {
		return err
	}
	return b.adopt(ctx, e, "", nil)
}

// adopt is adoptRoot for a connection that is locked. prepare may change the role
// before it is stored.
func (b *backend) adopt(ctx context.Context, e *connection.Entry, policy string, prepare func(*rotation.Role) error) error {
	r, err := b.newRoot(e, policy)
	if err == nil && prepare != nil {
		err = prepare(r)
	}
	if err != nil {
		return err
	}
	if e.Identity == "" {
		return conflict("connection %q was stored without being tried, so that nobody knows which server it leads to; write it again without verify_connection=false", e.Name)
	}
	v := e.Admin.With(version.Current)
	if v == nil {
		return badRequest("connection %q has no admin credential; write it again with one", e.Name)
	}
	if err := b.engine.AdoptRoot(ctx, r, v.Material, func(ctx context.Context) error { return b.soleAdmin(ctx, e) }); err != nil {
		return err
	}
	e.Managed = true
	return b.connections.Put(ctx, e) // without it
}

// soleAdmin refuses to rotate what another connection logs in with as well, however
// that came about: it may have been stored without being tried, or moved.
func (b *backend) soleAdmin(ctx context.Context, e *connection.Entry) error {
	others, err := b.others(ctx, e)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(others, func(k *connection.Entry) bool { return k.Same(e) && k.Administers(e.Username()) })
	if i >= 0 {
		return conflict("connection %q logs in to the same server as the same user, and would be locked out; give one of them a user of its own", others[i].Name)
	}
	return nil
}

// scheduleRoot applies what a write of a connection says about the rotation of its
// admin credential. The connection is stored and locked.
func (b *backend) scheduleRoot(ctx context.Context, e *connection.Entry, req *logical.Request, d *framework.FieldData) error {
	if !givesRoot(req) {
		return nil
	}
	c, err := b.engine.LoadConfig(ctx)
	if err != nil {
		return err
	}
	if !e.Managed {
		return b.adopt(ctx, e, "", func(r *rotation.Role) error { return b.applyRoot(r, c, req, d) })
	}
	return b.engine.Update(ctx, rotation.RootName(e.Name), func(r *rotation.Role) error { return b.applyRoot(r, c, req, d) })
}

// givesRoot reports whether a write says anything about the rotation of the admin
// credential.
func givesRoot(req *logical.Request) bool {
	fields := rootFields()
	delete(fields, "force")
	return slices.ContainsFunc(slices.Collect(maps.Keys(req.Data)), func(name string) bool { return fields[name] != nil })
}

func (b *backend) applyRoot(r *rotation.Role, c rotation.Config, req *logical.Request, d *framework.FieldData) error {
	setString(d, "password_policy", &r.Given.PasswordPolicy, "")
	r.Spec.PasswordPolicy = r.Given.PasswordPolicy
	if err := applySchedule(r, c, req, d); err != nil {
		return badRequest("%w", err)
	}
	return nil
}

// checkRoot refuses, before anything is stored, what a write of a connection may
// not say about an admin credential, and reports whether it replaces one that is
// managed.
func (b *backend) checkRoot(ctx context.Context, before, e *connection.Entry, req *logical.Request, d *framework.FieldData) (replaces bool, err error) {
	if givesRoot(req) {
		if tried := d.Get("verify_connection").(bool); !tried && e.Identity == "" {
			return false, badRequest("verify_connection is false, and the admin credential of a server that was never logged in to cannot be rotated; leave one of them out")
		}
		c, err := b.engine.LoadConfig(ctx)
		if err != nil {
			return false, err
		}
		if err := b.checkPolicy(ctx, d); err != nil {
			return false, err
		}
		trial, err := b.newRoot(e, "")
		if err == nil && e.Managed { // what is not given stays as it is
			trial, err = b.engine.Store().Root(ctx, e.Name)
		}
		if err == nil {
			err = b.applyRoot(trial, c, req, d)
		}
		if err != nil {
			return false, err
		}
	}
	if before == nil || !before.Managed || e.Admin.Served(before.Admin.With(version.Current).Material) {
		return false, nil
	}
	switch {
	case e.Username() != before.Username():
		return false, badRequest("rotate-root manages the password of user %q, which nobody else knows; to log in as %q write another connection", before.Username(), e.Username())
	case !d.Get("force").(bool):
		return false, badRequest("the admin credential of connection %q is managed by rotate-root, and what is given is another one; leave it out, "+
			"or, where somebody has set it at the server, give force=true as well", e.Name)
	}
	return true, nil
}

// moveRoot has a managed admin credential follow its connection, which is about to
// be stored: to another server, or as another credential. What could refuse the
// connection has done so before anything of that is stored; and a credential that
// is replaced must not go where the connection leads from now on.
func (b *backend) moveRoot(ctx context.Context, before, e *connection.Entry, info *connection.Info, replaces bool) error {
	if !e.Managed {
		return nil
	}
	if err := b.identified(ctx, before, e, info, func() error { return nil }); err != nil {
		return err
	}
	if replaces {
		return b.engine.ReplaceRoot(ctx, e.Name, e.Identity, e.Admin.With(version.Current).Material)
	}
	return b.engine.MoveRoot(ctx, e.Name, e.Identity)
}

// forgetRoot forgets the admin credential of a connection; with force also while
// its rotation waits for a server that will not come back.
func (b *backend) forgetRoot(ctx context.Context, name string, force bool) error {
	if force {
		return b.engine.Abandon(ctx, rotation.RootName(name), "the connection was deleted with force=true")
	}
	return b.engine.DropRoot(ctx, name)
}

// forgettable refuses to delete a connection whose admin credential nobody else
// knows.
func forgettable(e *connection.Entry, d *framework.FieldData) error {
	if e == nil || !e.Managed || d.Get("force").(bool) {
		return nil
	}
	if v := e.Admin.With(version.Current); v != nil && v.Rotation == "" {
		return nil // whoever wrote the connection gave it
	}
	return conflict("the password of user %q was made by rotate-root/%s and nobody else knows it; set another one at the server, and delete the connection with force=true",
		e.Username(), e.Name)
}
