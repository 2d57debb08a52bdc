package harmonyflow

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

func (b *backend) pathRoles() []*framework.Path {
	fields := roleFields()
	remove := map[string]*framework.FieldSchema{
		"name": nameField,
		"abandon": {
			Type: framework.TypeBool, Query: true,
			Description: "Delete the role although its rotation waits for a target that will not come back. Only when deleting.",
		},
	}
	all := maps.Clone(fields)
	maps.Copy(all, remove)
	answer := roleAnswer()
	written := rotationAnswer()
	written["next_rotations"] = nextRotationsField()
	write := func(call framework.OperationFunc, summary, verb string) framework.OperationHandler {
		return operation{
			call: call, summary: summary, verb: verb, suffix: "role", fields: written, errors: []int{404, 409}, mutating: true,
		}.handler(fields)
	}
	return []*framework.Path{
		{
			Pattern: "roles/?$",
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: operation{
					call: b.listRoles, summary: "List roles.", verb: "list", suffix: "roles", fields: keyInfoFields,
				}.handler(nil),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "List roles.",
			HelpDescription: "Lists the names of all roles, with kind, state and version.",
		},
		{
			Pattern:        "roles/" + namePattern,
			Fields:         all,
			ExistenceCheck: b.roleExists,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: operation{
					call: b.readRole, summary: "Read a role, without its secrets.", verb: "read", suffix: "role", fields: answer, errors: []int{404},
				}.handler(nil),
				logical.CreateOperation: write(b.createRole, "Create a role: adopt an existing secret, or make the first version.", "write"),
				logical.UpdateOperation: write(b.updateRole, "Change a role; what is not given stays.", "write"),
				logical.PatchOperation:  write(b.updateRole, "Change a role; what is not given stays.", "patch"),
				logical.DeleteOperation: operation{
					call: b.deleteRole, summary: "Delete a role; its secret goes on working.", verb: "delete", suffix: "role", none: true, errors: []int{409}, mutating: true,
				}.handler(remove),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis: "One secret under rotation.",
			HelpDescription: `Creating a role adopts the secret its user has (initial_password, initial_value), proven by a login, or makes
the first version. With usernames it is that of the first user, and the second has no password yet. Where the user has a password that was not given, the request is refused unless
overwrite_existing=true. An earlier key of a ring that consumers find in previous_field is adopted beside
initial_value. While a role rotates only its schedule, its grace and description may be
changed. A write answers with the next three times at which the role rotates by itself. Deleting one leaves
its secret working, and keeps it for 30 days: restore/<name> brings it back, and creating the role again goes on
with its version numbers. A role that is in a rotation is not deleted. Where the rotation waits for a server that is gone for good, in grace,
retire or on its way back, abandon=true ends it where it stands: vault delete harmonyflow/roles/<name> abandon=true.
Nothing more is asked of the server, which, should it come back, accepts what it accepted last.`,
		},
	}
}

func roleFields() map[string]*framework.FieldSchema {
	sensitive := &framework.DisplayAttributes{Sensitive: true}
	fields := map[string]*framework.FieldSchema{
		"name":               nameField,
		"kind":               {Type: framework.TypeString, Description: "Kind of secret, such as redis, postgresql, rabbitmq or api-key. Given once."},
		"description":        {Type: framework.TypeString, Description: "A sentence for people, up to 1024 bytes."},
		"connection":         {Type: framework.TypeString, Description: "Connection whose server holds the user. Given once."},
		"username":           {Type: framework.TypeString, Description: "User under rotation. Given once."},
		"strategy":           {Type: framework.TypeString, Description: "overlap (both accepted until retired), alternate (two users take turns, both accepted until retired), swap (one replaces the other) or key-ring (jwt and encryption-key); the kind says which it can do and which is its default."},
		"initial_password":   {Type: framework.TypeString, DisplayAttrs: sensitive, Description: "Password the user has now; adopted as version 1. Only when creating. Never read back."},
		"initial_value":      {Type: framework.TypeString, DisplayAttrs: sensitive, Description: "The same for kinds without users. Only when creating. Never read back."},
		"overwrite_existing": {Type: framework.TypeBool, Description: "Replace a password that was not given. Only when creating."},
		"password_policy":    {Type: framework.TypeString, Description: "Vault password policy that makes new secrets."},
		"length":             {Type: framework.TypeInt64, Description: "Size of a new secret: characters of a password or api-key (default 32), random bytes of a shared jwt secret (default as its hash), bits of an RSA key (2048, 3072, 4096; default 2048) or encryption-key (128, 192, 256; default 256)."},
		"encoding":           {Type: framework.TypeString, Description: "Characters of an api-key: alphanumeric (default), hex or base64url; of a shared jwt secret: base64 (default), base64url or hex."},
		"prefix":             {Type: framework.TypeString, Description: "Put before each api-key."},
		"previous_field":     {Type: framework.TypeString, Description: "Name under which creds/, and the role's document, also carry the previous secret during grace; makes the strategy of an api-key overlap. Key rings show it in their document only, and the next key before it is used where there is no next_field."},
		"document":           {Type: framework.TypeString, Description: "Document that the role fills, read at data/<document>. Given once."},
		"field":              {Type: framework.TypeString, Description: "Field of the document, and of the secret of another mount, that holds the secret. Given once."},
		"username_field":     {Type: framework.TypeString, Description: "Field that holds the user, likewise. Given once."},
		"grace_period":       {Type: framework.TypeDurationSecond, Description: "How long the previous version stays accepted after promotion; empty for the mount's."},
		"keep_versions":      {Type: framework.TypeInt64, Description: "How many versions are kept; 0 for the mount's. None that may still be accepted is ever forgotten."},
		"allow_partial":      {Type: framework.TypeBool, Description: "Rotate even while nodes are down; they are healed when they return."},
	}
	maps.Copy(fields, userFields())
	maps.Copy(fields, graceFields())
	maps.Copy(fields, consumerFields())
	maps.Copy(fields, ringFields())
	maps.Copy(fields, keptFields())
	maps.Copy(fields, scheduleFields())
	maps.Copy(fields, publishFields())
	return fields
}

func roleAnswer() map[string]*framework.FieldSchema {
	fields := map[string]*framework.FieldSchema{
		"kind": stringField("Kind."), "description": stringField("Description."), "connection": stringField("Connection."),
		"username": stringField("User."), "strategy": stringField("Strategy."), "password_policy": stringField("Policy."),
		"length": intField("Length."), "encoding": stringField("Encoding."), "prefix": stringField("Prefix."), "previous_field": stringField("Field."),
		"document": stringField("Document."), "field": stringField("Field of the secret."), "username_field": stringField("Field of the user."),
		"grace_period":  durationField("Grace, in seconds; the mount's where the role has none. Key rings have none."),
		"keep_versions": intField("Versions kept; the mount's where the role has none."), "allow_partial": boolField("Whether nodes may be down."),
		"state": stringField("idle, rotating, grace, suspended or drifted."), "version": intField("Current version."),
		"versions":      mapField("Stage and times of each version kept, by number."),
		"last_rotation": stringField("When the current version was promoted, RFC 3339."),
		"rotation_id":   stringField("Rotation under way."),
		"last_error":    stringField("Why the last rotation failed, or what the running one waits for."),
		"last_run":      stringField("Id and outcome of the last rotation."),
		"suspended":     stringField("Why scheduled rotations have stopped."),
		"drift":         stringField("How the target differs from what is stored."),
		"retry_at":      stringField("Not before then a failed scheduled rotation is tried again, RFC 3339."),
		"missed_nodes":  listField("Nodes that were passed over."),
	}
	maps.Copy(fields, userAnswer())
	maps.Copy(fields, graceAnswer())
	maps.Copy(fields, consumerAnswer())
	maps.Copy(fields, ringAnswer())
	maps.Copy(fields, keptAnswer())
	maps.Copy(fields, scheduleAnswer())
	maps.Copy(fields, publishAnswer())
	return fields
}

func (b *backend) listRoles(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	names, err := b.engine.Store().RoleNames(ctx)
	if err != nil {
		return nil, err
	}
	roles, err := b.engine.Store().Roles(ctx, names)
	if err != nil {
		return nil, err
	}
	info := map[string]any{}
	for _, r := range roles {
		if r != nil {
			info[r.Name] = map[string]any{"kind": r.Kind, "state": r.State(), "version": currentNumber(r)}
		}
	}
	return logical.ListResponseWithInfo(names, info), nil
}

func (b *backend) roleExists(ctx context.Context, _ *logical.Request, d *framework.FieldData) (bool, error) {
	name := d.Get("name").(string)
	if checkName(name) != nil {
		return false, nil //nolint:nilerr // the write refuses it
	}
	r, err := b.engine.Store().Role(ctx, name)
	return r != nil, err
}

func currentNumber(r *rotation.Role) int64 {
	if v := r.With(version.Current); v != nil {
		return int64(v.Number)
	}
	return 0
}

func (b *backend) readRole(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.engine.Store().Role(ctx, d.Get("name").(string))
	if err != nil || r == nil {
		return nil, err
	}
	c, err := b.engine.LoadConfig(ctx)
	if err != nil {
		return nil, err
	}
	return &logical.Response{Data: describeRole(r, c)}, nil
}

// describeRole is what is read of a role. What it says of a field that the kind takes
// may be written, and changes nothing: so roles can be declared.
func describeRole(r *rotation.Role, c rotation.Config) map[string]any {
	keep := r.KeepVersions
	if keep == 0 {
		keep = c.KeepVersions
	}
	data := map[string]any{
		"kind": r.Kind, "description": r.Description, "connection": r.Connection, "username": r.Spec.Username,
		"strategy": string(r.Spec.Strategy), "password_policy": r.Spec.PasswordPolicy, "length": int64(r.Spec.Length),
		"encoding": r.Spec.Encoding, "prefix": r.Spec.Prefix, "previous_field": r.Spec.PreviousField,
		"document": r.Document, "field": r.Field, "username_field": r.UsernameField,
		"grace_period": seconds(r.Grace(c)), "keep_versions": int64(keep),
		"allow_partial": r.AllowPartial, "state": r.State(), "version": currentNumber(r), "versions": versionInfo(r),
		"last_rotation": formatTime(r.LastRotation), "suspended": r.Suspended,
		"retry_at": formatTime(r.RetryAt),
	}
	describeUsers(r, data)
	describeGrace(r, c, data)
	describeConsumers(r, data)
	describeRing(r, data)
	describeKept(r, data)
	describeSchedule(r, data)
	describePlace(r, data)
	describeRun(r, data)
	return data
}

func describeRun(r *rotation.Role, data map[string]any) {
	data["rotation_id"], data["last_error"], data["last_run"], data["drift"] = "", "", "", ""
	data["missed_nodes"] = []string{}
	if r.LastRun != nil {
		data["last_run"] = fmt.Sprintf("%s: %s", r.LastRun.Rotation, r.LastRun.State)
		data["last_error"] = r.LastRun.Error
	}
	if r.Run != nil {
		data["rotation_id"], data["last_error"] = r.Run.Rotation, r.Run.Error
	}
	if r.Drift != nil {
		data["drift"], data["missed_nodes"] = r.Drift.Reason, orEmpty(r.Drift.Missed)
	}
}

func versionInfo(r *rotation.Role) map[string]any {
	out := map[string]any{}
	for _, v := range r.Versions {
		info := map[string]any{"stage": string(v.Stage), "created": formatTime(v.Created), "rotation_id": v.Rotation}
		if !v.Promoted.IsZero() {
			info["promoted"] = formatTime(v.Promoted)
		}
		if !v.Refused.IsZero() && !r.Served(v.Material) {
			info["refused"] = formatTime(v.Refused)
		}
		if v.Evidence != "" {
			info["evidence"] = v.Evidence
		}
		if v.CopyOf != 0 {
			info["copy_of"] = int64(v.CopyOf)
		}
		out[fmt.Sprint(v.Number)] = info
	}
	return out
}

// createRole makes a role, and answers with the rotation that brings its first
// version about.
func (b *backend) createRole(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	if h, err := b.createdBy(ctx, d.Get("name").(string), req.ID); err != nil {
		return nil, err
	} else if h != nil {
		return b.answerCreated(ctx, req, h.ID, d.Get("name").(string))
	}
	r := &rotation.Role{Name: d.Get("name").(string)}
	r.Kind, r.Connection = d.Get("kind").(string), d.Get("connection").(string)
	r.Given.Username = d.Get("username").(string)
	k := b.offered(r.Kind)
	if k == nil {
		return refuse("kind is %.64q; allowed are %s", r.Kind, b.kindNames())
	}
	c, err := b.engine.LoadConfig(ctx)
	if err != nil {
		return nil, err
	}
	if err := applyRole(r, k, c, req, d); err != nil {
		return refuse("%v", err)
	}
	initial, err := b.initialMaterial(ctx, r, k, d)
	if err != nil {
		return nil, err
	}
	if err := applyPlace(r, d); err != nil {
		return nil, err
	}
	if err := b.applyDocument(ctx, r, d); err != nil {
		return nil, err
	}
	if err := b.checkPolicy(ctx, d); err != nil {
		return nil, err
	}
	if err := b.checkConsumers(ctx, r.Name, d); err != nil {
		return nil, err
	}
	h, err := b.create(ctx, k, rotation.Creation{
		Role: r, Initial: initial, Overwrite: d.Get("overwrite_existing").(bool), RequestedBy: requester(req),
	})
	if err != nil {
		return nil, err
	}
	return b.answerCreated(ctx, req, h.ID, r.Name)
}

func (b *backend) answerCreated(ctx context.Context, req *logical.Request, id, name string) (*logical.Response, error) {
	resp, err := b.answerOne(ctx, req, id, name, rotation.Over, forward)
	if err != nil {
		return nil, err
	}
	r, err := b.engine.Store().Role(ctx, name)
	if err != nil {
		return nil, err
	}
	tellNext(resp, r)
	return resp, nil
}

// createdBy returns the rotation that created a role for a request: Vault sends
// the same request again when the plugin dies under it.
func (b *backend) createdBy(ctx context.Context, name, request string) (*rotation.Header, error) {
	r, err := b.engine.Store().Role(ctx, name)
	if err != nil || r == nil || request == "" {
		return nil, err
	}
	var made string
	switch {
	case r.Run != nil:
		made = r.Run.Rotation
	case r.LastRun != nil:
		made = r.LastRun.Rotation
	}
	h, err := b.engine.Store().Header(ctx, made)
	if err != nil || h == nil || h.Trigger != rotation.Create || h.RequestedBy.RequestID != request {
		return nil, err
	}
	return h, nil
}

// create makes a role while its connection stays what it is.
func (b *backend) create(ctx context.Context, k *kindEntry, c rotation.Creation) (*rotation.Header, error) {
	c.Check = func(ctx context.Context, r *rotation.Role) error { return b.unfilled(ctx, r, c.Overwrite) }
	releasePlace, err := b.holdPlace(ctx, &c)
	if err != nil {
		return nil, err
	}
	defer releasePlace()
	if k.ConnectionType() == "" {
		if c.Role.Connection != "" {
			return nil, badRequest("connection is %.64q; roles of kind %s need none", c.Role.Connection, c.Role.Kind)
		}
		return b.engine.Create(ctx, c)
	}
	e, err := b.usable(ctx, c.Role, k)
	if err == nil && c.Overwrite && len(e.AllowedUsernames) == 0 {
		err = badRequest("overwrite_existing replaces a password that nobody gave, so connection %q has to name the user: add %q to its allowed_usernames", e.Name, c.Role.Spec.Owns())
	}
	if err == nil {
		err = b.identify(ctx, e.Name)
	}
	if err != nil {
		return nil, err
	}
	release, err := b.holdConnection(ctx, c.Role.Connection, b.connections.Share)
	if err != nil {
		return nil, err
	}
	defer release()
	if e, err = b.usable(ctx, c.Role, k); err != nil {
		return nil, err
	}
	if err := b.soleOwner(ctx, e, c.Role); err != nil {
		return nil, err
	}
	c.Target = e.Identity
	unfilled := c.Check
	c.Check = func(ctx context.Context, r *rotation.Role) error {
		// Again, now that no connection can take the user as its admin any more.
		if err := b.soleOwner(ctx, e, r); err != nil {
			return err
		}
		return unfilled(ctx, r)
	}
	return b.engine.Create(ctx, c)
}

// updateRole changes what was given.
func (b *backend) updateRole(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	c, err := b.engine.LoadConfig(ctx)
	if err != nil {
		return nil, err
	}
	if err := b.checkPolicy(ctx, d); err != nil {
		return nil, err
	}
	if err := b.checkConsumers(ctx, name, d); err != nil {
		return nil, err
	}
	err = b.engine.Update(ctx, name, func(r *rotation.Role) error {
		k := b.entry(r.Kind)
		if k == nil {
			return badRequest("kind %q is not known to this version; install the one that does", r.Kind)
		}
		if err := fixed(r, d); err != nil {
			return badRequest("%w", err)
		}
		before := describeRole(r, c)
		if err := applyRole(r, k, c, req, d); err != nil {
			return badRequest("%w", err)
		}
		return onlyWhileRotating(r, before, describeRole(r, c), req)
	})
	if err != nil {
		return nil, err
	}
	changed, err := b.engine.Store().Role(ctx, name)
	if err != nil {
		return nil, err
	}
	resp := &logical.Response{
		Data: map[string]any{"summary": fmt.Sprintf("role %q changed", name), "follow": "vault read " + req.MountPoint + "roles/" + name},
	}
	tellNext(resp, changed)
	return resp, nil
}

// checkPolicy refuses a password policy that makes no passwords.
func (b *backend) checkPolicy(ctx context.Context, d *framework.FieldData) error {
	policy, _ := d.Get("password_policy").(string)
	return b.makes(ctx, policy)
}

// makes is checkPolicy for that of a role.
func (b *backend) makes(ctx context.Context, policy string) error {
	if policy != "" {
		if _, err := (source{b}).FromPolicy(ctx, policy); err != nil {
			return badRequest("%w", err)
		}
	}
	return nil
}

// fixed refuses to change what makes a role the role it is.
func fixed(r *rotation.Role, d *framework.FieldData) error {
	fixed := map[string]string{
		"kind": r.Kind, "connection": r.Connection, "username": r.Given.Username,
		"document": r.Document, "field": r.Field, "username_field": r.UsernameField,
		"mount": r.Spec.Mount, "key": r.Spec.Key,
		"publish_connection": r.Place.Connection, "publish_mount": r.Place.Mount, "publish_path": r.Place.Path,
	}
	if r.Shows() { // the role owns those fields of it
		fixed["previous_field"] = r.Given.PreviousField
		fixed["next_field"], fixed["keys_field"] = r.Given.NextField, r.Given.KeysField
	}
	if r.Spec.Algorithm != "" { // a ring has keys of one algorithm: their material does not tell it
		fixed["algorithm"] = r.Spec.Algorithm
	}
	for name, was := range fixed {
		if v, ok := d.GetOk(name); ok && v.(string) != was {
			return fmt.Errorf("%s of role %q is %q and cannot be changed to %q; create another role", name, r.Name, was, v)
		}
	}
	if err := sameUsers(r, d); err != nil {
		return err
	}
	for _, name := range []string{"initial_password", "initial_value", "overwrite_existing"} {
		if _, ok := d.GetOk(name); ok {
			return fmt.Errorf("%s is for creating a role, and role %q exists; rotate it instead", name, r.Name)
		}
	}
	return nil
}

// freeWhileRotating are the fields that a running rotation does not mind.
var freeWhileRotating = []string{
	"name", "kind", "connection", "username", "usernames", "description", "grace_period", "grace_until_unused", "grace_minimum",
	"rotation_period", "rotation_schedule", "rotation_timezone", "rotation_window", "jitter", "missed_policy", "apart_from", "apart_by",
	"disable_automated_rotation",
}

// onlyWhileRotating refuses what a running rotation would mind. Who declares all of
// a role with each write may, as long as such a field stays what it is.
func onlyWhileRotating(r *rotation.Role, before, after map[string]any, req *logical.Request) error {
	if r.Run == nil {
		return nil
	}
	for name := range req.Data {
		was, told := before[name]
		same := told && name != "next_rotation" && reflect.DeepEqual(was, after[name])
		// Promotion sets the next time; one that is given before would not last.
		if free := same || slices.Contains(freeWhileRotating, name) || name == "next_rotation" && r.Run.Promoted; !free {
			return &rotation.Conflict{Rotation: r.Run.Rotation, Text: fmt.Sprintf(
				"role %q is in rotation %s; while it rotates only description, grace_period, grace_until_unused, grace_minimum and its schedule may be changed, not %s",
				r.Name, r.Run.Rotation, name)}
		}
	}
	return nil
}

// applyRole sets what was given and checks the whole.
func applyRole(r *rotation.Role, k *kindEntry, c rotation.Config, req *logical.Request, d *framework.FieldData) error {
	if err := kindFields(k, r, req); err != nil {
		return err
	}
	setString(d, "description", &r.Description, "")
	if len(r.Description) > 1024 {
		return fmt.Errorf("description has %d bytes; at most 1024 are allowed", len(r.Description))
	}
	minimum := r.Given.MinDecryptionVersion
	applySpec(&r.Given, d)
	applyKeptSpec(&r.Given, d)
	applyUsersSpec(&r.Given, d)
	r.Spec = r.Given
	r.Spec.Role = r.Name
	if given := req.Data["propagation_delay"]; !cleared(given) && r.Given.PropagationDelay == 0 {
		return fmt.Errorf("propagation_delay is %v; it must be at least 1s, or empty for the default", given)
	}
	if err := k.Complete(&r.Spec); err != nil {
		return err
	}
	if err := checkRing(r); err != nil {
		return err
	}
	if err := checkKept(r, minimum, req); err != nil {
		return err
	}
	if v, ok := d.GetOk("keep_versions"); ok {
		r.KeepVersions = int(v.(int64))
		if r.KeepVersions != 0 && (r.KeepVersions < 2 || r.KeepVersions > maxKeepVersions) {
			return fmt.Errorf("keep_versions is %d; it may be 2 to %d, or 0 for the mount's", r.KeepVersions, maxKeepVersions)
		}
	}
	if v, ok := d.GetOk("allow_partial"); ok {
		r.AllowPartial = v.(bool)
	}
	if err := applyUsers(r, k, d); err != nil {
		return err
	}
	if err := applyConsumers(r, d); err != nil {
		return err
	}
	if err := applySchedule(r, c, req, d); err != nil {
		return err
	}
	if err := applyUnused(r, c, req, d); err != nil {
		return err
	}
	return checkExpiry(r, c, req)
}

func applySpec(s *kind.Spec, d *framework.FieldData) {
	strategy := string(s.Strategy)
	setString(d, "strategy", &strategy, "")
	s.Strategy = kind.Strategy(strategy)
	setString(d, "password_policy", &s.PasswordPolicy, "")
	setString(d, "encoding", &s.Encoding, "")
	setString(d, "prefix", &s.Prefix, "")
	setString(d, "previous_field", &s.PreviousField, "")
	setString(d, "algorithm", &s.Algorithm, "")
	setString(d, "next_field", &s.NextField, "")
	setString(d, "keys_field", &s.KeysField, "")
	if v, ok := d.GetOk("length"); ok {
		s.Length = int(v.(int64))
	}
	for name, to := range map[string]*time.Duration{
		"max_token_ttl": &s.MaxTokenTTL, "propagation_delay": &s.PropagationDelay, "retire_after": &s.RetireAfter,
	} {
		if _, ok := d.GetOk(name); ok {
			*to = duration(d, name)
		}
	}
	for name, to := range map[string]*bool{
		"require_reencryption_ack": &s.RequireReencryptionAck, "public_jwks": &s.PublicJWKS,
	} {
		if v, ok := d.GetOk(name); ok {
			*to = v.(bool)
		}
	}
}

// kindFields refuses fields that another kind has.
func kindFields(k *kindEntry, r *rotation.Role, req *logical.Request) error {
	for _, name := range kindsOwn {
		if _, given := req.Data[name]; given && !slices.Contains(k.Fields(), name) {
			return fmt.Errorf("field %q is not for kind %s, which takes %v beside the common ones", name, k.Name(), k.Fields())
		}
	}
	if !cleared(req.Data["document"]) || !cleared(req.Data["publish_connection"]) || r.Shows() {
		return nil
	}
	for _, name := range []string{"previous_field", "next_field", "keys_field"} {
		alone := name == "previous_field" && slices.Contains(k.Fields(), name) // creds/ shows it too
		if !alone && !cleared(req.Data[name]) {
			return fmt.Errorf("field %q is for roles of kind %s that are shown to consumers; give document or publish_connection with it", name, k.Name())
		}
	}
	return nil
}

// kindsOwn are the fields that only some kinds have. A role of any kind has a
// previous_field, where it fills a document.
var kindsOwn = []string{
	"username", "usernames", "strategy", "password_policy", "length", "encoding", "prefix",
	"close_connections", "valid_until", "allow_self_rotation",
	"mount", "key", "min_decryption_version",
	"algorithm", "max_token_ttl", "propagation_delay", "next_field", "keys_field", "retire_after", "require_reencryption_ack", "public_jwks",
}

// cleared reports whether a field was given as empty.
func cleared(v any) bool { return v == nil || v == "" }

// usable returns the connection of a role if it serves it.
func (b *backend) usable(ctx context.Context, r *rotation.Role, k *kindEntry) (*connection.Entry, error) {
	if r.Connection == "" {
		return nil, badRequest("connection is missing; a role of kind %s needs one of type %s", r.Kind, k.ConnectionType())
	}
	if err := checkName(r.Connection); err != nil {
		return nil, badRequest("connection: %w", err)
	}
	e, err := b.connections.Must(ctx, r.Connection)
	if err != nil {
		return nil, err
	}
	if e.Type != k.ConnectionType() {
		return nil, badRequest("connection %q is of type %s; a role of kind %s needs %s", e.Name, e.Type, r.Kind, k.ConnectionType())
	}
	return e, allows(e, r)
}

// allows refuses a role that its connection does not serve.
func allows(e *connection.Entry, r *rotation.Role) error {
	if !e.AllowsRole(r.Name) {
		return kind.Definitely("connection %q does not allow role %q; add it to its allowed_roles", e.Name, r.Name)
	}
	for _, user := range r.Spec.Owns() {
		switch {
		case e.Administers(user):
			return kind.Definitely("username %q is the connection's own admin user, which a role must not rotate; rotate-root/%s is for that: use another role", user, e.Name)
		case !e.AllowsUsername(user):
			return kind.Definitely("connection %q does not allow user %q; add it to its allowed_usernames", e.Name, user)
		}
	}
	return nil
}

// permit is rotation.Options.Permit: what a connection allowed when a role was
// created it may have taken back since.
func (b *backend) permit(ctx context.Context, roles []*rotation.Role) []error {
	errs := make([]error, len(roles))
	e, err := b.connections.Must(ctx, roles[0].Connection)
	for i, r := range roles {
		switch {
		case err != nil:
			errs[i] = err
		case r.Root():
			errs[i] = b.permitRoot(ctx, e)
		default:
			errs[i] = allows(e, r)
		}
	}
	return errs
}

// permitRoot is permit for the admin credential of a connection.
func (b *backend) permitRoot(ctx context.Context, e *connection.Entry) error {
	err := b.soleAdmin(ctx, e)
	var shared *rotation.Conflict
	if errors.As(err, &shared) {
		err = kind.Definitely("%s", shared.Text)
	}
	return err
}

// initialMaterial reads the secret that is to be adopted; nil for none.
func (b *backend) initialMaterial(ctx context.Context, r *rotation.Role, k *kindEntry, d *framework.FieldData) (*kind.Material, error) {
	right, wrong := "initial_value", "initial_password"
	if k.ConnectionType() != "" {
		right, wrong = wrong, right
	}
	if _, ok := d.GetOk(wrong); ok {
		return nil, badRequest("field %q is not for kind %s; use %s", wrong, r.Kind, right)
	}
	v, ok := d.GetOk(right)
	if !ok {
		return nil, nil
	}
	if err := k.CheckInitial(r.Spec, v.(string)); err != nil {
		return nil, badRequest("%w", err)
	}
	if a, ok := k.Kind.(kind.Adopter); ok {
		m, err := a.Adopt(ctx, r.Spec, v.(string), source{b})
		if err != nil {
			return nil, err
		}
		return &m, b.nameAsBefore(ctx, r, &m)
	}
	return &kind.Material{Username: firstUser(r.Spec), Secret: v.(string)}, nil
}

func (b *backend) deleteRole(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	if d.Get("abandon").(bool) {
		return nil, b.engine.Abandon(ctx, name, "the role was deleted with abandon=true")
	}
	return nil, b.engine.Delete(ctx, name)
}
