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
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func (b *backend) pathConnections() []*framework.Path {
	fields, answer := b.connectionFields()
	verified := map[string]*framework.FieldSchema{
		"summary": stringField("What was found."), "nodes": listField("Nodes that were logged in to."),
	}
	return []*framework.Path{
		{
			Pattern: "connections/?$",
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: operation{
					call: b.listConnections, summary: "List connections.", verb: "list", suffix: "connections", fields: keyInfoFields,
				}.handler(nil),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "List connections.",
			HelpDescription: "Lists the names of all connections, with their types.",
		},
		{
			Pattern:        "connections/" + namePattern,
			Fields:         fields,
			ExistenceCheck: b.connectionExists,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: operation{
					call: b.readConnection, summary: "Read a connection, without its secrets.", verb: "read", suffix: "connection", fields: answer, errors: []int{404},
				}.handler(nil),
				logical.CreateOperation: operation{
					call: b.writeConnection, summary: "Create a connection.", verb: "write", suffix: "connection", fields: verified, errors: []int{409}, mutating: true,
				}.handler(fields),
				logical.UpdateOperation: operation{
					call: b.writeConnection, summary: "Change a connection.", verb: "write", suffix: "connection", fields: verified, errors: []int{409}, mutating: true,
				}.handler(fields),
				logical.DeleteOperation: operation{
					call: b.deleteConnection, summary: "Delete a connection that no role uses.", verb: "delete", suffix: "connection", none: true, errors: []int{409}, mutating: true,
				}.handler(map[string]*framework.FieldSchema{"name": nameField, "force": rootFields()["force"]}),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "How the engine reaches a server with admin rights.",
			HelpDescription: b.connectionHelp(),
		},
	}
}

func (b *backend) listConnections(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	names, err := b.connections.List(ctx)
	if err != nil {
		return nil, err
	}
	info := map[string]any{}
	for _, name := range names {
		e, err := b.connections.Get(ctx, name)
		if err != nil {
			return nil, err
		}
		if e != nil {
			info[name] = map[string]any{"type": e.Type}
		}
	}
	return logical.ListResponseWithInfo(names, info), nil
}

func (b *backend) connectionExists(ctx context.Context, _ *logical.Request, d *framework.FieldData) (bool, error) {
	name := d.Get("name").(string)
	if checkName(name) != nil {
		return false, nil //nolint:nilerr // the write refuses it
	}
	e, err := b.connections.Get(ctx, name)
	return e != nil, err
}

func (b *backend) readConnection(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	e, err := b.connections.Get(ctx, d.Get("name").(string))
	if err != nil || e == nil {
		return nil, err
	}
	t, err := b.connectionType(e.Type)
	if err != nil {
		return nil, err
	}
	data := t.describe(e)
	data["type"], data["allowed_roles"], data["identity"] = e.Type, orEmpty(e.AllowedRoles), e.Identity
	root, err := b.engine.Store().Root(ctx, e.Name)
	if err != nil {
		return nil, err
	}
	describeRoot(root, data)
	return &logical.Response{Data: data}, nil
}

func orEmpty(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

func stringMap(m map[string]string) map[string]any {
	out := map[string]any{}
	for k, v := range m {
		out[k] = v
	}
	return out
}

func (b *backend) writeConnection(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	unlock, err := b.holdConnection(ctx, name, b.connections.Lock)
	if err != nil {
		return nil, err
	}
	defer unlock()
	before, err := b.connections.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	t, err := b.typeGiven(before, d)
	if err != nil {
		return refuse("%v", err)
	}
	e, err := t.connectionFrom(before, name, req, d)
	if err != nil {
		return refuse("%v", err)
	}
	replaces, err := b.checkRoot(ctx, before, e, req, d)
	if err != nil {
		return nil, err
	}
	resp := &logical.Response{Data: map[string]any{}}
	var info *connection.Info
	if d.Get("verify_connection").(bool) {
		if info, err = b.tryConnection(ctx, e); err != nil {
			return refuse("connection %q cannot be used: %v; nothing was stored (verify_connection=false stores it all the same)", name, err)
		}
		b.refreshOthers(ctx, e)
		resp.Warnings = info.Warnings
	}
	resp.Data["summary"], resp.Data["nodes"] = found(info)
	if before != nil {
		more, err := b.loosened(ctx, t, before, e, info)
		if err != nil {
			return nil, err
		}
		resp.Warnings = append(resp.Warnings, more...)
	}
	if err := b.moveRoot(ctx, before, e, info, replaces); err != nil {
		return nil, err
	}
	if err := b.putIdentified(ctx, before, e, info); err != nil {
		return nil, err
	}
	if err := b.scheduleRoot(ctx, e, req, d); err != nil {
		return nil, err // with an answer beside it Vault would take it for the client's fault
	}
	return resp, nil
}

// loosened says what a change of a connection gives up.
func (b *backend) loosened(ctx context.Context, t *connectionType, before, e *connection.Entry, info *connection.Info) ([]string, error) {
	var out []string
	if len(before.AllowedUsernames) > 0 && len(e.AllowedUsernames) == 0 {
		out = append(out, "allowed_usernames is empty now: roles of this connection may manage every user but admin users")
	}
	if !t.nodes || before.Generation == e.Generation {
		return out, nil
	}
	if info == nil {
		return append(out, "nodes that roles were on and that are down now are forgotten: what they accept is no longer looked at"), nil
	}
	gone := map[string]bool{}
	err := b.engine.Store().EachRole(ctx, func(r *rotation.Role) bool {
		if r.Connection == e.Name && r.NodesGeneration == before.Generation {
			for _, n := range r.Nodes {
				if !slices.ContainsFunc(info.Nodes, func(i connection.Node) bool { return i.Name == n || slices.Contains(i.Aliases, n) }) {
					gone[n] = true
				}
			}
		}
		return true
	})
	if len(gone) > 0 {
		out = append(out, "nodes that roles were on were not found and are forgotten; where one comes back it may accept old passwords: "+
			strings.Join(slices.Sorted(maps.Keys(gone)), ", "))
	}
	return out, err
}

// tryConnection logs in to what a connection leads to, and gives up before a
// client does.
func (b *backend) tryConnection(ctx context.Context, e *connection.Entry) (*connection.Info, error) {
	t, err := b.connectionType(e.Type)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, kind.CallTimeout)
	defer cancel()
	return t.verify(ctx, e)
}

// holdConnection locks a connection.
func (b *backend) holdConnection(
	ctx context.Context, name string, lock func(context.Context, string) (func(), error),
) (unlock func(), err error) {
	if unlock, err = lock(ctx, name); err != nil {
		return nil, conflict("connection %q is being tried by another request; try again", name)
	}
	return unlock, nil
}

// found says what a connection leads to; nil: it was not tried.
func found(info *connection.Info) (summary string, nodes []string) {
	if info == nil {
		return "stored without being tried", []string{}
	}
	nodes = make([]string, 0, len(info.Nodes))
	for _, n := range info.Nodes {
		nodes = append(nodes, fmt.Sprintf("%s (%s)", n.Name, n.Note))
	}
	return info.Summary, nodes
}

// userOf names a role that uses a connection; "" when none does.
func (b *backend) userOf(ctx context.Context, name string) (string, error) {
	return b.engine.Store().FirstRole(ctx, func(r *rotation.Role) bool { return r.Connection == name || r.Place.Connection == name })
}

func setStrings(d *framework.FieldData, name string, to *[]string) {
	if v, ok := d.GetOk(name); ok {
		*to = v.([]string)
	}
}

func setString(d *framework.FieldData, name string, to *string, empty string) {
	if v, ok := d.GetOk(name); ok {
		if *to = v.(string); *to == "" {
			*to = empty
		}
	}
}

// deleteConnection refuses while a role uses the connection: its admin password
// would be the only thing left that can reach what the role manages.
func (b *backend) deleteConnection(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	unlock, err := b.holdConnection(ctx, name, b.connections.Lock)
	if err != nil {
		return nil, err
	}
	defer unlock()
	e, err := b.connections.Get(ctx, name)
	if err == nil {
		err = forgettable(e, d)
	}
	if err != nil {
		return nil, err
	}
	user, err := b.userOf(ctx, name)
	if err != nil {
		return nil, err
	}
	if user != "" {
		return nil, conflict("connection %q is used by role %q; delete the roles that use it first", name, user)
	}
	if user, err = b.consumerOf(ctx, name); err != nil {
		return nil, err
	}
	if user != "" {
		return nil, conflict("connection %q is used by consumer %q; delete the consumers that use it first", name, user)
	}
	if err := b.forgetRoot(ctx, name, d.Get("force").(bool)); err != nil { // first: it may refuse
		return nil, err
	}
	return nil, b.connections.Delete(ctx, name)
}
