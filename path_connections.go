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
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/redis"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

func (b *backend) pathConnections() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"name": nameField,
		"type": {Type: framework.TypeString, AllowedValues: []any{connection.TypeRedis}, Description: "What is connected to: redis."},
		"verify_connection": {
			Type: framework.TypeBool, Default: true,
			Description: "Whether a write logs in at every node first, and is refused when that fails. Default true.",
		},
		"allowed_roles":     {Type: framework.TypeCommaStringSlice, Description: "Roles (or globs) that may use the connection; none by default."},
		"allowed_usernames": {Type: framework.TypeCommaStringSlice, Description: "Users (or globs) that roles may manage here; by default any but the connection's own."},
		"address_map":       {Type: framework.TypeKVPairs, Description: "Addresses to dial instead of discovered ones: discovered=reachable."},
		"addresses":         {Type: framework.TypeCommaStringSlice, Description: "Seed addresses, host:port; the other nodes are discovered."},
		"topology":          {Type: framework.TypeString, Description: "auto (default), standalone or cluster."},
		"username":          {Type: framework.TypeString, Description: "Admin user. Default \"default\"."},
		"password":          {Type: framework.TypeString, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true}, Description: "Its password. Never read back."},
		"persistence":       {Type: framework.TypeString, Description: "How a node makes users survive its restart: auto (default), acl-save, config-rewrite, none."},
		"allowed_cidrs":     {Type: framework.TypeCommaStringSlice, Description: "Networks that discovered nodes may be in; by default those of the seeds (/24, /64)."},
		"forget_nodes":      {Type: framework.TypeBool, Description: "Forget nodes that roles were on and that are not found now: they are gone for good. A change of addresses, address_map, allowed_cidrs or topology does so, too."},
	}
	answer := map[string]*framework.FieldSchema{
		"type": stringField("Type."), "allowed_roles": listField("Roles."), "allowed_usernames": listField("Users."),
		"address_map": mapField("Discovered to reachable."), "addresses": listField("Seeds."), "topology": stringField("Topology."),
		"username": stringField("Admin user."), "persistence": stringField("Persistence."), "allowed_cidrs": listField("Networks."),
		"identity": stringField("What the target is known by, whatever the connection's name."),
	}
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
					call: b.readConnection, summary: "Read a connection, without its password.", verb: "read", suffix: "connection", fields: answer, errors: []int{404},
				}.handler(nil),
				logical.CreateOperation: operation{
					call: b.writeConnection, summary: "Create a connection.", verb: "write", suffix: "connection", fields: verified, errors: []int{409}, mutating: true,
				}.handler(fields),
				logical.UpdateOperation: operation{
					call: b.writeConnection, summary: "Change a connection.", verb: "write", suffix: "connection", fields: verified, errors: []int{409}, mutating: true,
				}.handler(fields),
				logical.DeleteOperation: operation{
					call: b.deleteConnection, summary: "Delete a connection that no role uses.", verb: "delete", suffix: "connection", none: true, errors: []int{409}, mutating: true,
				}.handler(nil),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis: "How the engine reaches a server with admin rights.",
			HelpDescription: `A write logs in at every node with the admin user, unless verify_connection=false, and remembers
who may use the connection. A partial write keeps what was not given; a write that changes addresses or
address_map must bring the password again, or the stored one could be sent to a stranger. Nodes that roles were
on are remembered, also while they are down: a rotation needs them. Once they are gone for good a write with
forget_nodes=true forgets them, as does one that changes addresses, address_map, allowed_cidrs or topology.`,
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
	data := map[string]any{
		"type": e.Type, "allowed_roles": orEmpty(e.AllowedRoles), "allowed_usernames": orEmpty(e.AllowedUsernames),
		"address_map": stringMap(e.AddressMap), "username": e.Username(), "identity": e.Identity,
		"addresses": orEmpty(e.Redis.Addresses), "topology": e.Redis.Topology,
		"persistence": e.Redis.Persistence, "allowed_cidrs": orEmpty(e.Redis.AllowedCIDRs),
	}
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

func (b *backend) writeConnection(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
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
	e, err := connectionFrom(before, name, d)
	if err != nil {
		return refuse("%v", err)
	}
	resp := &logical.Response{Data: map[string]any{}}
	var info *redis.Info
	if d.Get("verify_connection").(bool) {
		found, err := verify(ctx, e)
		if err != nil {
			return refuse("connection %q cannot be used: %v; nothing was stored (verify_connection=false stores it all the same)", name, err)
		}
		b.refreshOthers(ctx, e)
		info, resp.Warnings = &found, found.Warnings
	}
	resp.Data["summary"], resp.Data["nodes"] = found(info)
	if before != nil {
		more, err := b.loosened(ctx, before, e, info)
		if err != nil {
			return nil, err
		}
		resp.Warnings = append(resp.Warnings, more...)
	}
	if err := b.putIdentified(ctx, before, e, info); err != nil {
		return nil, err
	}
	return resp, nil
}

// loosened says what a change of a connection gives up.
func (b *backend) loosened(ctx context.Context, before, e *connection.Entry, info *redis.Info) ([]string, error) {
	var out []string
	if len(before.AllowedUsernames) > 0 && len(e.AllowedUsernames) == 0 {
		out = append(out, "allowed_usernames is empty now: roles of this connection may manage every user but admin users")
	}
	if before.Generation == e.Generation {
		return out, nil
	}
	if info == nil {
		return append(out, "nodes that roles were on and that are down now are forgotten: what they accept is no longer looked at"), nil
	}
	gone := map[string]bool{}
	err := b.engine.Store().EachRole(ctx, func(r *rotation.Role) bool {
		if r.Connection == e.Name && r.NodesGeneration == before.Generation {
			for _, n := range r.Nodes {
				if !slices.ContainsFunc(info.Nodes, func(i redis.Node) bool { return i.Name == n || slices.Contains(i.Aliases, n) }) {
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

// verify looks at every node of a connection, and gives up before a client
// does.
func verify(ctx context.Context, e *connection.Entry) (redis.Info, error) {
	ctx, cancel := context.WithTimeout(ctx, kind.CallTimeout)
	defer cancel()
	return redis.Verify(ctx, e)
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
func found(info *redis.Info) (summary string, nodes []string) {
	if info == nil {
		return "stored without being tried", []string{}
	}
	nodes = make([]string, 0, len(info.Nodes))
	for _, n := range info.Nodes {
		switch {
		case n.Err != nil:
			nodes = append(nodes, n.Name+" (no answer)")
		default:
			nodes = append(nodes, fmt.Sprintf("%s (%s, Redis %s)", n.Name, n.Role, n.Version))
		}
	}
	return info.Topology + ", " + count(len(nodes), "node"), nodes
}

// userOf names a role that uses a connection; "" when none does.
func (b *backend) userOf(ctx context.Context, name string) (string, error) {
	return b.engine.Store().FirstRole(ctx, func(r *rotation.Role) bool { return r.Connection == name })
}

// connectionFrom applies what was given to what is stored, and refuses what
// cannot be.
func connectionFrom(before *connection.Entry, name string, d *framework.FieldData) (*connection.Entry, error) {
	e := &connection.Entry{Name: name, Redis: &connection.Redis{Topology: "auto", Persistence: "auto"}}
	if before != nil {
		copied, settings := *before, *before.Redis
		e = &copied
		e.Redis = &settings
	}
	if err := setType(e, d); err != nil {
		return nil, err
	}
	setStrings(d, "allowed_roles", &e.AllowedRoles)
	setStrings(d, "allowed_usernames", &e.AllowedUsernames)
	setStrings(d, "addresses", &e.Redis.Addresses)
	setStrings(d, "allowed_cidrs", &e.Redis.AllowedCIDRs)
	setString(d, "topology", &e.Redis.Topology, "auto")
	setString(d, "persistence", &e.Redis.Persistence, "auto")
	if v, ok := d.GetOk("address_map"); ok {
		e.AddressMap = v.(map[string]string)
	}
	if forget, _ := d.Get("forget_nodes").(bool); forget || !sameEndpoint(before, e) || before.Redis.Topology != e.Redis.Topology {
		e.Generation++
	}
	if before != nil && !sameEndpoint(before, e) {
		e.Members, e.RunIDs = nil, nil // found when it is verified, at the latest when the next role is created
	}
	if err := setAdmin(before, e, d); err != nil {
		return nil, err
	}
	if err := e.CheckPatterns(); err != nil {
		return nil, err
	}
	return e, redis.ValidateConfig(e.Redis)
}

func setType(e *connection.Entry, d *framework.FieldData) error {
	given, ok := d.GetOk("type")
	switch {
	case !ok && e.Type == "":
		return fmt.Errorf("type is missing; allowed is %s", connection.TypeRedis)
	case !ok:
		return nil
	case given.(string) != connection.TypeRedis:
		return fmt.Errorf("type %.64q is not known; allowed is %s", given, connection.TypeRedis)
	}
	e.Type = given.(string)
	return nil
}

// setAdmin sets the admin credential. Who changes where it is sent has to bring
// it again.
func setAdmin(before, e *connection.Entry, d *framework.FieldData) error {
	password, given := d.GetOk("password")
	username, renamed := d.GetOk("username")
	switch {
	case before == nil && !given:
		return fmt.Errorf("password is missing; give the admin user's password")
	case before != nil && !given && !sameEndpoint(before, e):
		return fmt.Errorf("addresses, address_map or allowed_cidrs change where the stored password is sent; give its password in the same request")
	case before != nil && !given && renamed && username.(string) != before.Username():
		return fmt.Errorf("username changes; give its password in the same request")
	case !given:
		return nil
	}
	m := kind.Material{Username: "default", Secret: password.(string)}
	if before != nil {
		m.Username = before.Username()
	}
	if renamed && username.(string) != "" {
		m.Username = username.(string)
	}
	if m.Secret == "" {
		return fmt.Errorf("password is empty; the admin user needs one")
	}
	if current := e.Admin.With(version.Current); current == nil || !current.Material.Same(m) {
		e.Admin = connection.NewAdmin(m)
	}
	return nil
}

func sameEndpoint(before, e *connection.Entry) bool {
	if before == nil {
		return false
	}
	if len(before.AddressMap) != len(e.AddressMap) {
		return false
	}
	for k, v := range before.AddressMap {
		if e.AddressMap[k] != v {
			return false
		}
	}
	return slices.Equal(before.Redis.Addresses, e.Redis.Addresses) &&
		slices.Equal(before.Redis.AllowedCIDRs, e.Redis.AllowedCIDRs)
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
	user, err := b.userOf(ctx, name)
	if err != nil {
		return nil, err
	}
	if user != "" {
		return nil, conflict("connection %q is used by role %q; delete the roles that use it first", name, user)
	}
	return nil, b.connections.Delete(ctx, name)
}
