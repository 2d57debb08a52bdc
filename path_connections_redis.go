package harmonyflow

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/redis"
)

func redisConnection() connectionType {
	return connectionType{
		name: connection.TypeRedis,
		fields: map[string]*framework.FieldSchema{
			"allowed_usernames": allowedUsernamesField,
			"address_map":       addressMapField,
			"addresses":         {Type: framework.TypeCommaStringSlice, Description: "Seed addresses, host:port; the other nodes are discovered."},
			"topology":          {Type: framework.TypeString, Description: "auto (default), standalone or cluster."},
			"username":          usernameField,
			"password":          passwordField,
			"persistence":       {Type: framework.TypeString, Description: "How a node makes users survive its restart: auto (default), acl-save, config-rewrite, none."},
			"allowed_cidrs":     {Type: framework.TypeCommaStringSlice, Description: "Networks that discovered nodes may be in; by default those of the seeds (/24, /64)."},
			"forget_nodes":      {Type: framework.TypeBool, Description: "Forget nodes that roles were on and that are not found now: they are gone for good. A change of addresses, address_map, allowed_cidrs or topology does so, too."},
		},
		answer: map[string]*framework.FieldSchema{
			"allowed_usernames": listField("Users."), "address_map": mapField("Discovered to reachable."), "addresses": listField("Seeds."),
			"topology": stringField("Topology."), "username": stringField("Admin user."), "persistence": stringField("Persistence."),
			"allowed_cidrs": listField("Networks."),
		},
		help: `redis: the admin user is "default" unless username is given. Nodes that roles were on are remembered, also while
they are down: a rotation needs them. Once they are gone for good a write with forget_nodes=true forgets them, as
does one that changes addresses, address_map, allowed_cidrs or topology.`,
		nodes:        true,
		apply:        applyRedis,
		describe:     describeRedis,
		sameEndpoint: sameRedis,
		verify:       verifyRedis,
	}
}

func applyRedis(before, e *connection.Entry, d *framework.FieldData) error {
	settings := connection.Redis{Topology: "auto", Persistence: "auto"}
	if before != nil {
		settings = *before.Redis
	}
	e.Redis = &settings
	setStrings(d, "allowed_usernames", &e.AllowedUsernames)
	setStrings(d, "addresses", &e.Redis.Addresses)
	setStrings(d, "allowed_cidrs", &e.Redis.AllowedCIDRs)
	setString(d, "topology", &e.Redis.Topology, "auto")
	setString(d, "persistence", &e.Redis.Persistence, "auto")
	if v, ok := d.GetOk("address_map"); ok {
		e.AddressMap = v.(map[string]string)
	}
	same := before != nil && sameRedis(before, e)
	if forget, _ := d.Get("forget_nodes").(bool); forget || !same || before.Redis.Topology != e.Redis.Topology {
		e.Generation++
	}
	moved := ""
	if before != nil && !same {
		e.Members, e.RunIDs = nil, nil // found when it is verified, at the latest when the next role is created
		moved = "addresses, address_map or allowed_cidrs"
	}
	if err := setPassword(before, e, d, "default", moved); err != nil {
		return err
	}
	return redis.ValidateConfig(e.Redis)
}

func describeRedis(e *connection.Entry) map[string]any {
	return map[string]any{
		"allowed_usernames": orEmpty(e.AllowedUsernames), "address_map": stringMap(e.AddressMap), "username": e.Username(),
		"addresses": orEmpty(e.Redis.Addresses), "topology": e.Redis.Topology,
		"persistence": e.Redis.Persistence, "allowed_cidrs": orEmpty(e.Redis.AllowedCIDRs),
	}
}

func sameRedis(before, e *connection.Entry) bool {
	return maps.Equal(before.AddressMap, e.AddressMap) &&
		slices.Equal(before.Redis.Addresses, e.Redis.Addresses) &&
		slices.Equal(before.Redis.AllowedCIDRs, e.Redis.AllowedCIDRs)
}

func verifyRedis(ctx context.Context, e *connection.Entry) (*connection.Info, error) {
	found, err := redis.Verify(ctx, e)
	if err != nil {
		return nil, err
	}
	info := &connection.Info{
		Identity: found.Identity, Members: found.Members, RunIDs: found.RunIDs, Warnings: found.Warnings,
		Summary: found.Topology + ", " + count(len(found.Nodes), "node"),
	}
	for _, n := range found.Nodes {
		note := "no answer"
		if n.Err == nil {
			note = fmt.Sprintf("%s, Redis %s", n.Role, n.Version)
		}
		info.Nodes = append(info.Nodes, connection.Node{Name: n.Name, Aliases: n.Aliases, Note: note})
	}
	return info, nil
}
