package harmonyflow

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// connectionType is how connections of one type are written, shown and tried.
type connectionType struct {
	name string
	// fields are those that it takes beside the common ones. Types may share a
	// name, with one and the same schema type.
	fields map[string]*framework.FieldSchema
	// answer is what reading shows beside the common fields.
	answer map[string]*framework.FieldSchema
	help   string
	// nodes: it leads to nodes that roles remember, and that are known again by
	// their run ids.
	nodes bool
	// apply sets what was given, fills in defaults and refuses what cannot be. e is
	// a copy of before, but for what pointers lead to; before is nil for a new
	// connection.
	apply    func(before, e *connection.Entry, d *framework.FieldData) error
	describe func(e *connection.Entry) map[string]any
	// sameEndpoint reports whether credentials go where they went before.
	sameEndpoint func(before, e *connection.Entry) bool
	verify       func(ctx context.Context, e *connection.Entry) (*connection.Info, error)
}

// connectionTypes is the registry: a new type is a file and a line here.
func connectionTypes() []connectionType {
	return []connectionType{
		redisConnection(),
		postgresqlConnection(),
		vaultConnection(),
		rabbitmqConnection(),
		kubernetesConnection(),
	}
}

// commonConnectionFields are those that every connection has.
func commonConnectionFields() map[string]*framework.FieldSchema {
	fields := map[string]*framework.FieldSchema{
		"name": nameField,
		"type": {Type: framework.TypeString, Description: "What is connected to."},
		"verify_connection": {
			Type: framework.TypeBool, Default: true,
			Description: "Whether a write logs in first (at every node), and is refused when that fails. Default true.",
		},
		"allowed_roles": {Type: framework.TypeCommaStringSlice, Description: "Roles (or globs) that may use the connection; none by default."},
	}
	maps.Copy(fields, rootFields())
	return fields
}

// connectionFields are the fields of all types together.
func (b *backend) connectionFields() (fields, answer map[string]*framework.FieldSchema) {
	fields = commonConnectionFields()
	for _, t := range b.connectionTypes {
		fields["type"].AllowedValues = append(fields["type"].AllowedValues, t.name)
	}
	fields["type"].Description = "What is connected to: " + b.connectionTypeNames() + "."
	answer = map[string]*framework.FieldSchema{
		"type": stringField("Type."), "allowed_roles": listField("Roles."),
		"identity": stringField("What the target is known by, whatever the connection's name."),
	}
	maps.Copy(answer, rootAnswer())
	for _, t := range b.connectionTypes {
		addFields(fields, t.fields)
		addFields(answer, t.answer)
	}
	return fields, answer
}

// addFields adds what one type has to what others have.
func addFields(to, fields map[string]*framework.FieldSchema) {
	for name, f := range fields {
		both := *f
		if known := to[name]; known != nil && known.Description != f.Description {
			both.Description = known.Description + " " + f.Description
		}
		to[name] = &both
	}
}

func (b *backend) connectionHelp() string {
	help := `A write logs in first, unless verify_connection=false, and remembers who may use the connection. A partial
write keeps what was not given; a write that changes where credentials are sent must bring them again, or the
stored ones could be sent to a stranger.`
	for _, t := range b.connectionTypes {
		help += "\n\n" + t.help
	}
	return help
}

func (b *backend) connectionTypeNames() string {
	names := make([]string, len(b.connectionTypes))
	for i, t := range b.connectionTypes {
		names[i] = t.name
	}
	return strings.Join(names, " or ")
}

func (b *backend) connectionType(name string) (*connectionType, error) {
	i := slices.IndexFunc(b.connectionTypes, func(t connectionType) bool { return t.name == name })
	if i < 0 {
		return nil, fmt.Errorf("type %.64q is not known; allowed is %s", name, b.connectionTypeNames())
	}
	return &b.connectionTypes[i], nil
}

// typeGiven is the type that is asked for, and stays what it was.
func (b *backend) typeGiven(before *connection.Entry, d *framework.FieldData) (*connectionType, error) {
	given, ok := d.GetOk("type")
	switch {
	case !ok && before == nil:
		return nil, fmt.Errorf("type is missing; allowed is %s", b.connectionTypeNames())
	case !ok:
		return b.connectionType(before.Type)
	}
	t, err := b.connectionType(given.(string))
	if err == nil && before != nil && before.Type != t.name {
		err = fmt.Errorf("type is %.64q, and the connection is one of type %s; write a new connection", t.name, before.Type)
	}
	return t, err
}

// connectionFrom applies what was given to what is stored, and refuses what
// cannot be.
func (t *connectionType) connectionFrom(
	before *connection.Entry, name string, req *logical.Request, d *framework.FieldData,
) (*connection.Entry, error) {
	common := commonConnectionFields()
	for field := range req.Data {
		if t.fields[field] == nil && common[field] == nil {
			return nil, fmt.Errorf("field %q is not for a connection of type %s, which takes %s beside the common ones",
				field, t.name, strings.Join(slices.Sorted(maps.Keys(t.fields)), ", "))
		}
	}
	e := &connection.Entry{Name: name, Type: t.name}
	if before != nil {
		copied := *before
		e = &copied
	}
	setStrings(d, "allowed_roles", &e.AllowedRoles)
	if err := t.apply(before, e, d); err != nil {
		return nil, err
	}
	return e, e.CheckPatterns()
}

// These are of several types, whose admin logs in with a user and a password.
var (
	usernameField = &framework.FieldSchema{Type: framework.TypeString, Description: "Admin user."}
	passwordField = &framework.FieldSchema{
		Type: framework.TypeString, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true}, Description: "Its password. Never read back.",
	}
	addressMapField = &framework.FieldSchema{
		Type: framework.TypeKVPairs, Description: "Addresses to dial instead of discovered ones: discovered=reachable.",
	}
	allowedUsernamesField = &framework.FieldSchema{
		Type: framework.TypeCommaStringSlice, Description: "Users (or globs) that roles may manage here; by default any but the connection's own.",
	}
)

// setPassword sets an admin credential of username and password. Who changes
// where it is sent has to bring it again: moved names the fields that did, ""
// when none has.
func setPassword(before, e *connection.Entry, d *framework.FieldData, username, moved string) error {
	password, given := d.GetOk("password")
	renamed, isRenamed := d.GetOk("username")
	switch {
	case before == nil && !given:
		return fmt.Errorf("password is missing; give the admin user's password")
	case before != nil && !given && moved != "":
		return fmt.Errorf("%s change where the stored password is sent; give its password in the same request", moved)
	case before != nil && !given && isRenamed && renamed.(string) != before.Username():
		return fmt.Errorf("username changes; give its password in the same request")
	case !given:
		return nil
	}
	m := kind.Material{Username: username, Secret: password.(string)}
	if before != nil {
		m.Username = before.Username()
	}
	if isRenamed && renamed.(string) != "" {
		m.Username = renamed.(string)
	}
	if m.Secret == "" {
		return fmt.Errorf("password is empty; the admin user needs one")
	}
	setAdmin(e, m)
	return nil
}

// setAdmin sets the admin credential, unless it is the one that is stored.
func setAdmin(e *connection.Entry, m kind.Material) {
	if current := e.Admin.With(version.Current); current == nil || !current.Material.Same(m) {
		e.Admin = connection.NewAdmin(m)
	}
}
