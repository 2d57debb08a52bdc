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
		fields: withTLS(map[string]*framework.FieldSchema{
			"allowed_usernames": allowedUsernamesField,
			"address_map":       addressMapField,
			"addresses":         {Type: framework.TypeCommaStringSlice, Description: "Seed addresses, host:port; the other nodes are discovered. With sentinel_master those of sentinels."},
			"topology":          {Type: framework.TypeString, Description: "auto (default), standalone, cluster or sentinel."},
			"tls":               {Type: framework.TypeBool, Description: "Whether nodes and sentinels are spoken to over TLS."},
			"username":          usernameField,
			"password":          passwordField,
			"persistence":       {Type: framework.TypeString, Description: "How a node makes users survive its restart: auto (default), acl-save, config-rewrite, none."},
			"allowed_cidrs":     {Type: framework.TypeCommaStringSlice, Description: "Networks that discovered nodes may be in; by default those of the seeds (/24, /64)."},
			"forget_nodes":      {Type: framework.TypeBool, Description: "Forget nodes that roles were on and that are not found now: they are gone for good. A change of addresses, address_map, allowed_cidrs or topology does so, too."},

			"sentinel_master":    {Type: framework.TypeString, Description: "What the sentinels at addresses call the primary."},
			"sentinel_username":  {Type: framework.TypeString, Description: "User at the sentinels, where they want a login."},
			"sentinel_password":  {Type: framework.TypeString, DisplayAttrs: &framework.DisplayAttributes{Sensitive: true}, Description: "Its password. Never read back."},
			"sentinel_auth_user": {Type: framework.TypeString, Description: "User that the sentinels log in to nodes as (their auth-user); by default the one that CLIENT LIST shows."},
		}),
		answer: withTLSAnswer(map[string]*framework.FieldSchema{
			"allowed_usernames": listField("Users."), "address_map": mapField("Discovered to reachable."), "addresses": listField("Seeds."),
			"topology": stringField("Topology."), "username": stringField("Admin user."), "persistence": stringField("Persistence."),
			"allowed_cidrs": listField("Networks."), "tls": boolField("Whether TLS is spoken."),
			"sentinel_master": stringField("What sentinels call the primary."), "sentinel_username": stringField("User at the sentinels."),
			"sentinel_auth_user": stringField("User that sentinels log in to nodes as."),
		}),
		help: `redis: the admin user is "default" unless username is given. Nodes that roles were on are remembered, also while
they are down: a rotation needs them. Once they are gone for good a write with forget_nodes=true forgets them, as
does one that changes addresses, address_map, allowed_cidrs, topology or sentinel_master. With tls=true certificates
are checked for the host that is dialled, or for tls_server_name.`,
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
	setString(d, "sentinel_master", &e.Redis.Sentinel.Master, "")
	setString(d, "sentinel_auth_user", &e.Redis.Sentinel.AuthUser, "")
	if v, ok := d.GetOk("address_map"); ok {
		e.AddressMap = v.(map[string]string)
	}
	if err := setRedisTLS(e, d); err != nil {
		return err
	}
	same := before != nil && sameRedisNodes(before, e)
	if forget, _ := d.Get("forget_nodes").(bool); forget || !same || before.Redis.Topology != e.Redis.Topology {
		e.Generation++
	}
	if !same {
		e.Members, e.RunIDs = nil, nil // found when it is verified, at the latest when the next role is created
	}
	moved := ""
	if before != nil && !sameRedis(before, e) {
		moved = "addresses, address_map, allowed_cidrs, sentinel_master, tls, tls_ca, tls_server_name or tls_skip_verify"
	}
	if err := setPassword(before, e, d, "default", moved); err != nil {
		return err
	}
	if err := setSentinelLogin(&e.Redis.Sentinel, d, moved); err != nil {
		return err
	}
	return redis.ValidateConfig(e.Redis)
}

// setRedisTLS sets what was given of TLS. Whom to trust says nothing where no TLS
// is spoken: passwords would go over the wire in the belief that it is.
func setRedisTLS(e *connection.Entry, d *framework.FieldData) error {
	if v, ok := d.GetOk("tls"); ok {
		e.Redis.TLS = v.(bool)
	}
	if err := setTLS(e, d); err != nil {
		return err
	}
	if !e.Redis.TLS && e.TLS != (connection.TLS{}) {
		return fmt.Errorf("tls is false, and tls_ca, tls_cert, tls_server_name or tls_skip_verify are set: give tls=true, or leave them empty")
	}
	return nil
}

// setSentinelLogin sets what sentinels are logged in to with. As with the admin
// user's, who changes where it is sent has to bring it again.
func setSentinelLogin(s *connection.Sentinel, d *framework.FieldData, moved string) error {
	username, renamed := d.GetOk("sentinel_username")
	password, given := d.GetOk("sentinel_password")
	renamed = renamed && username.(string) != s.Login.Username
	switch {
	case given:
		s.Login.Secret = password.(string)
	case s.Login.Secret != "" && moved != "":
		return fmt.Errorf("%s change where the stored sentinel_password is sent; give it in the same request (or empty, where sentinels want none)", moved)
	case s.Login.Secret != "" && renamed:
		return fmt.Errorf("sentinel_username changes; give sentinel_password in the same request")
	}
	if renamed {
		s.Login.Username = username.(string)
	}
	return nil
}

func describeRedis(e *connection.Entry) map[string]any {
	return describeTLS(e, map[string]any{
		"allowed_usernames": orEmpty(e.AllowedUsernames), "address_map": stringMap(e.AddressMap), "username": e.Username(),
		"addresses": orEmpty(e.Redis.Addresses), "topology": e.Redis.Topology,
		"persistence": e.Redis.Persistence, "allowed_cidrs": orEmpty(e.Redis.AllowedCIDRs), "tls": e.Redis.TLS,
		"sentinel_master": e.Redis.Sentinel.Master, "sentinel_username": e.Redis.Sentinel.Login.Username,
		"sentinel_auth_user": e.Redis.Sentinel.AuthUser,
	})
}

func sameRedis(before, e *connection.Entry) bool {
	return sameRedisNodes(before, e) && before.Redis.TLS == e.Redis.TLS && before.TLS.SameTrust(e.TLS)
}

// sameRedisNodes reports whether the same nodes are found: whom they are trusted
// to be does not change which ones there are.
func sameRedisNodes(before, e *connection.Entry) bool {
	return maps.Equal(before.AddressMap, e.AddressMap) &&
		slices.Equal(before.Redis.Addresses, e.Redis.Addresses) &&
		slices.Equal(before.Redis.AllowedCIDRs, e.Redis.AllowedCIDRs) &&
		before.Redis.Sentinel.Master == e.Redis.Sentinel.Master
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
	if found.Sentinels != nil {
		info.Summary += ", " + count(len(found.Sentinels), "sentinel")
	}
	for i := range found.Sentinels {
		found.Sentinels[i].Name = "sentinel " + found.Sentinels[i].Name
	}
	for _, n := range append(found.Nodes, found.Sentinels...) {
		note := "no answer"
		if n.Err == nil {
			note = fmt.Sprintf("%s, Redis %s", n.Role, n.Version)
		}
		info.Nodes = append(info.Nodes, connection.Node{Name: n.Name, Aliases: n.Aliases, Note: note})
	}
	return info, nil
}
