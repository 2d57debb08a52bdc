package redis

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Info is what Verify found behind a connection.
type Info struct {
	// Identity names the target itself as it stands. Two connections to the
	// same servers have the same one.
	Identity string
	// Members are what Identity was made of, node ids of a cluster or addresses,
	// and the seeds as they are dialled. Targets that share a member are one target, whatever joined or
	// left in between.
	Members []string
	// RunIDs are the run ids of the nodes that answered. A server has the same one
	// by whatever address it is reached, until it restarts.
	RunIDs []string
	// Topology is "cluster", "sentinel", "replicated" or "standalone".
	Topology  string
	Nodes     []Node
	Sentinels []Node // those that watch Nodes
	// Warnings are sentences about what is wrong but does not make the
	// connection useless.
	Warnings []string
}

// Node is one server behind a connection.
type Node struct {
	Name    string
	Aliases []string // other addresses that it answers to
	Version string   // "" when it could not be asked
	Role    string   // "primary", "replica", or "" when it could not be asked
	Err     error
}

// ValidateConfig fills defaults into the redis fields of a connection and
// refuses what cannot work, with one sentence that names the field.
func ValidateConfig(c *connection.Redis) error {
	if c == nil || len(c.Addresses) == 0 {
		return fmt.Errorf("addresses is empty: give the host:port of at least one redis node")
	}
	for _, a := range c.Addresses {
		host, port, err := net.SplitHostPort(a)
		switch {
		case strings.ContainsAny(a, "/@ "): // what may be a password is not repeated
			return errors.New("addresses holds one with a scheme, credentials or a space: each has to be host:port")
		case err != nil || host == "" || port == "":
			return fmt.Errorf("addresses holds %.253q: each has to be host:port, without a scheme or credentials", a)
		}
		if _, err := netip.ParseAddrPort("127.0.0.1:" + port); err != nil {
			return fmt.Errorf("addresses holds %.253q: its port has to be a number from 1 to 65535", a)
		}
	}
	if c.Topology == "" {
		c.Topology = TopologyAuto
	}
	if !slices.Contains([]string{TopologyAuto, TopologyStandalone, TopologyCluster, TopologySentinel}, c.Topology) {
		return fmt.Errorf("topology is %.64q: allowed are auto, standalone, cluster and sentinel", c.Topology)
	}
	if err := validateSentinel(c); err != nil {
		return err
	}
	if c.Persistence == "" {
		c.Persistence = PersistAuto
	}
	if !slices.Contains([]string{PersistAuto, PersistACL, PersistRewrite, PersistNone}, c.Persistence) {
		return fmt.Errorf("persistence is %.64q: allowed are auto, acl-save, config-rewrite and none", c.Persistence)
	}
	for _, cidr := range c.AllowedCIDRs {
		if _, err := netip.ParsePrefix(cidr); err != nil {
			return fmt.Errorf("allowed_cidrs holds %.64q: each has to be a network such as 10.1.0.0/16", cidr)
		}
	}
	return nil
}

// Verify logs in to every node of a connection and says what is there. It
// fails when no node can be asked, and when one of them shows that rotations
// through this connection could not work.
func Verify(ctx context.Context, entry *connection.Entry) (Info, error) {
	f, err := discover(ctx, entry, nil)
	if err != nil {
		return Info{}, err
	}
	defer f.close()
	info := Info{Members: f.members(), Topology: f.topology()}
	info.Identity = f.identity(info.Members)
	if !entry.Redis.Watched() { // sentinels may watch others as well
		for _, a := range entry.Redis.Addresses {
			info.Members = append(info.Members, entry.Reach(a))
		}
	}
	slices.Sort(info.Members)
	info.Members = slices.Compact(info.Members)
	if err := f.verifySentinels(&info); err != nil {
		return Info{}, err
	}
	primaries := 0
	for _, n := range f.nodes {
		shown := Node{Name: n.name, Aliases: n.aliases, Err: n.err}
		if n.err != nil {
			if kind.IsDefinite(n.err) {
				return Info{}, n.err
			}
			info.Warnings = append(info.Warnings, n.err.Error())
			info.Nodes = append(info.Nodes, shown)
			continue
		}
		if n.facts.runID != "" {
			info.RunIDs = append(info.RunIDs, n.facts.runID)
		}
		shown.Version, shown.Role = n.facts.version, "primary"
		if n.facts.replica {
			shown.Role = "replica"
		} else {
			primaries++
		}
		if !n.facts.may("acl|setuser") {
			return Info{}, kind.Definitely("%s", n.cannot(entry.Redis.Persistence, false)[0])
		}
		info.Warnings = append(info.Warnings, n.cannot(entry.Redis.Persistence, false)...)
		info.Warnings = append(info.Warnings, n.warnings()...)
		info.Nodes = append(info.Nodes, shown)
	}
	slices.Sort(info.RunIDs)
	if primaries > 1 && info.Topology != TopologyCluster {
		info.Warnings = append(info.Warnings, "addresses leads to several primaries that do not belong together: users are changed on all of them, so check that this is meant")
	}
	return info, nil
}

func (f *fleet) topology() string {
	switch {
	case f.watch != nil:
		return TopologySentinel
	case f.isCluster():
		return TopologyCluster
	case len(f.nodes) > 1:
		return "replicated"
	}
	return TopologyStandalone
}

// members outlive restarts and failovers: node ids of a cluster, addresses
// otherwise (a run id, or a replication id, does not).
func (f *fleet) members() []string {
	var out []string
	for _, n := range f.nodes {
		switch {
		case f.isCluster():
			for _, m := range n.facts.members {
				out = append(out, m.id)
			}
		case n.err == nil:
			out = append(out, n.s.addr)
		default:
			out = append(out, f.entry.Reach(n.name))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (f *fleet) identity(members []string) string {
	prefix := "redis:"
	if f.isCluster() {
		prefix = "redis-cluster:"
	}
	sum := sha256.Sum256([]byte(strings.Join(members, ",")))
	return prefix + hex.EncodeToString(sum[:16])
}
