// Package connection holds how the engine reaches a system with admin rights:
// the stored entry, what may be reached through it and by whom, and its admin
// credential. How a particular system is spoken to is the business of the
// package that speaks to it (kind/redis).
package connection

import (
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// TypeRedis is a connection to a Redis: standalone, with replicas, or a
// cluster.
const TypeRedis = "redis"

// TypeRabbitMQ is a connection to a RabbitMQ: one broker, or a cluster.
const TypeRabbitMQ = "rabbitmq"

// Entry is a stored connection.
type Entry struct {
	Name             string            `json:"name"`
	Type             string            `json:"type"`
	AllowedRoles     []string          `json:"allowed_roles,omitempty"`
	AllowedUsernames []string          `json:"allowed_usernames,omitempty"`
	AddressMap       map[string]string `json:"address_map,omitempty"`

	TLS TLS `json:"tls,omitzero"`

	Redis      *Redis      `json:"redis,omitempty"`
	Vault      *Vault      `json:"vault,omitempty"`
	RabbitMQ   *RabbitMQ   `json:"rabbitmq,omitempty"`
	PostgreSQL *PostgreSQL `json:"postgresql,omitempty"`
	Kubernetes *Kubernetes `json:"kubernetes,omitempty"`

	// Admin is the credential the engine itself logs in with. It is a managed
	// credential like any other: several versions exist while it is rotated.
	Admin Admin `json:"admin,omitzero"`
	// Managed: Admin is kept by the engine that rotates it, and is no part of the
	// stored entry.
	Managed bool `json:"-"`

	// Identity names the target itself (cluster id, replication topology), so
	// that two connections to one server are known to be the same target.
	Identity string `json:"identity,omitempty"`
	// Members are the nodes that Identity was made of, and the seeds. A target
	// keeps its identity as long as one of them stays: nodes come and go.
	Members []string `json:"members,omitempty"`
	// RunIDs are the run ids of the nodes when they were last seen. They tell that
	// two addresses lead to one server.
	RunIDs []string `json:"run_ids,omitempty"`
	// Generation counts the writes that said which nodes there are. Nodes that a
	// role remembers from before the last of them are forgotten: that is how an
	// operator says that a node is gone for good.
	Generation int `json:"generation"`
}

// whole refuses an entry without what a connection of its type has.
func (e *Entry) whole() error {
	lacks := map[string]bool{
		TypeRedis: e.Redis == nil, TypeVault: e.Vault == nil, TypeRabbitMQ: e.RabbitMQ == nil,
		TypePostgreSQL: e.PostgreSQL == nil, TypeKubernetes: e.Kubernetes == nil,
	}
	if lacks[e.Type] {
		return fmt.Errorf("it is of type %s, and says nothing about that", e.Type)
	}
	return nil
}

// Redis is what a connection of type redis has beyond the common fields.
type Redis struct {
	Addresses    []string `json:"addresses"`
	Topology     string   `json:"topology"`    // auto, standalone, cluster, sentinel
	Persistence  string   `json:"persistence"` // auto, acl-save, config-rewrite, none
	AllowedCIDRs []string `json:"allowed_cidrs,omitempty"`
	// TLS: nodes and sentinels are spoken to over it. Addresses have no scheme that
	// could say so.
	TLS      bool     `json:"tls,omitempty"`
	Sentinel Sentinel `json:"sentinel,omitzero"`
}

// Sentinel says which nodes the sentinels at the addresses watch.
type Sentinel struct {
	Master string `json:"master,omitempty"` // what they call the primary; "" where there are none
	// Login is what the engine logs in to the sentinels with.
	Login kind.Material `json:"login,omitzero"`
	// AuthUser is the user that sentinels log in to the nodes as; "": it is seen
	// there.
	AuthUser string `json:"auth_user,omitempty"`
}

// Watched reports whether the addresses are those of sentinels.
func (r *Redis) Watched() bool { return r.Sentinel.Master != "" }

// seeds are the addresses as they are dialled. Sentinels watch the nodes of
// several primaries, which the name of one tells apart.
func (r *Redis) seeds(reach func(string) string) []string {
	var out []string
	for _, a := range r.Addresses {
		seed := reach(a)
		if r.Watched() {
			seed += "/" + r.Sentinel.Master
		}
		out = append(out, seed)
	}
	return out
}

// RabbitMQ is what a connection of type rabbitmq has beyond the common fields.
type RabbitMQ struct {
	ManagementURLs []string `json:"management_urls"`
	AMQPURLs       []string `json:"amqp_urls,omitempty"` // empty: as the brokers say themselves
	VHosts         []string `json:"vhosts,omitempty"`    // empty: those that a user may use
}

// Hosts are where the management URLs lead: a path may tell clusters apart.
func (r *RabbitMQ) Hosts() []string {
	var out []string
	for _, text := range r.ManagementURLs {
		if u, err := url.Parse(text); err == nil {
			out = append(out, u.Host+strings.TrimRight(u.Path, "/"))
		}
	}
	return out
}

// Info is what was found behind a connection when it was tried.
type Info struct {
	// Identity, Members and RunIDs become those of the Entry.
	Identity string
	Members  []string
	RunIDs   []string
	Summary  string
	Nodes    []Node
	// Warnings are sentences about what is wrong but does not make the connection
	// useless.
	Warnings []string
}

// Node is one server behind a connection.
type Node struct {
	Name    string
	Aliases []string // other addresses that it answers to
	Note    string   // what it is, or that it did not answer
}

// Admin is a connection's own credential. Several versions of it exist while it is
// rotated.
type Admin struct{ version.Set }

// NewAdmin returns an admin credential whose first version is m.
func NewAdmin(m kind.Material) Admin {
	return Admin{Set: version.Set{Last: 1, Versions: []version.Version{
		{Number: 1, Stage: version.Current, Material: m},
	}}}
}

// Logins returns the credentials to try at a login, in order: what is current, and
// whatever else was not proven refused, also by a rotation that is on its way
// back. There is more than one only while the admin credential itself is being
// rotated: which of them a server accepts is found by asking it.
func (a Admin) Logins() []kind.Material {
	var out []kind.Material
	if v := a.With(version.Current); v != nil {
		out = append(out, v.Material)
	}
	for _, m := range a.Accepted() {
		if !slices.ContainsFunc(out, m.Same) {
			out = append(out, m)
		}
	}
	return out
}

// Username is the user the engine logs in as.
func (e *Entry) Username() string {
	if v := e.Admin.With(version.Current); v != nil {
		return v.Material.Username
	}
	return ""
}

// AllowsRole reports whether the connection serves role. Patterns are globs,
// as in Vault's database engine; by default none is allowed.
func (e *Entry) AllowsRole(role string) bool { return matchAny(e.AllowedRoles, role) }

// AllowsUsername reports whether roles of the connection may manage username.
// Without a list every user but the connection's own may be managed.
func (e *Entry) AllowsUsername(username string) bool {
	return len(e.AllowedUsernames) == 0 || matchAny(e.AllowedUsernames, username)
}

func matchAny(patterns []string, s string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		ok, err := path.Match(p, s)
		return err == nil && ok
	})
}

// Reach returns the address to dial for a node that was discovered as addr.
func (e *Entry) Reach(addr string) string {
	if mapped, ok := e.AddressMap[addr]; ok {
		return mapped
	}
	return addr
}

// CheckDiscovered refuses a discovered node outside the networks that the
// connection may send its admin credential to: allowed_cidrs, or the networks
// (/24, /64) of the seeds as they resolved.
func (e *Entry) CheckDiscovered(node netip.Addr, seeds []netip.Addr) error {
	node = node.Unmap()
	var allowed []netip.Prefix
	if e.Redis != nil {
		for _, c := range e.Redis.AllowedCIDRs {
			p, err := netip.ParsePrefix(c)
			if err != nil {
				return fmt.Errorf("allowed_cidrs holds %.64q, which is no network; write the connection again", c)
			}
			allowed = append(allowed, p)
		}
	}
	if len(allowed) == 0 {
		for _, s := range seeds {
			bits := 24
			if s = s.Unmap(); s.Is6() {
				bits = 64
			}
			if p, err := s.Prefix(bits); err == nil {
				allowed = append(allowed, p)
			}
		}
	}
	if slices.ContainsFunc(allowed, func(p netip.Prefix) bool { return p.Contains(node) }) {
		return nil
	}
	return fmt.Errorf("discovered node %s is outside the networks that connection %q may reach; "+
		"add its network to allowed_cidrs, or map it with address_map", node, e.Name)
}

// Overlaps reports whether e and k lead to one target: they share a member, or
// a server that has not restarted since both were looked at.
func (e *Entry) Overlaps(k *Entry) bool {
	shares := func(a, b []string) bool {
		return slices.ContainsFunc(a, func(s string) bool { return slices.Contains(b, s) })
	}
	return k.Type == e.Type && (shares(k.names(), e.names()) || shares(k.RunIDs, e.RunIDs))
}

// names are the members of e, and its seeds as they are dialled: all that is
// known of a connection that was stored without being tried.
func (e *Entry) names() []string {
	out := slices.Clone(e.Members)
	if e.Redis != nil {
		out = append(out, e.Redis.seeds(e.Reach)...)
	}
	if e.RabbitMQ != nil {
		out = append(out, e.RabbitMQ.Hosts()...)
	}
	if e.PostgreSQL != nil {
		out = append(out, e.PostgreSQL.Hosts...)
	}
	return out
}

// Same reports whether e and k are known to lead to one target.
func (e *Entry) Same(k *Entry) bool {
	return k.Type == e.Type && e.Identity != "" && e.Identity == k.Identity || e.Overlaps(k)
}

// Recognize gives e the identity of a target that is known already, under any
// connection's name, if the two are one.
func (e *Entry) Recognize(known []*Entry) {
	for _, k := range known {
		if k.Identity != "" && e.Overlaps(k) {
			e.Identity = k.Identity
			return
		}
	}
}

// Administers reports whether username is, or may be by now, the user that the
// engine logs in as.
func (e *Entry) Administers(username string) bool {
	return slices.ContainsFunc(e.Admin.Versions, func(v version.Version) bool { return v.Material.Username == username })
}

// CheckPatterns refuses globs that could never match.
func (e *Entry) CheckPatterns() error {
	lists := map[string][]string{"allowed_roles": e.AllowedRoles, "allowed_usernames": e.AllowedUsernames}
	if e.Vault != nil {
		lists["allowed_publish_paths"] = e.Vault.AllowedPublishPaths
	}
	for field, patterns := range lists {
		for _, p := range patterns {
			if _, err := path.Match(p, ""); err != nil {
				return fmt.Errorf("%s holds %.64q, which is no glob; use names, or * and ? within them", field, p)
			}
		}
	}
	return nil
}
