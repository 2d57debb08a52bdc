package postgresql

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Verify logs in to every node of a connection and says what is there. It
// fails when no primary can be asked, and when that shows that rotations
// through this connection could not work; whether users may be changed is for
// their roles to find out, which may let them change themselves.
func Verify(ctx context.Context, entry *connection.Entry) (*connection.Info, error) {
	f, err := open(ctx, entry)
	if err != nil {
		return nil, err
	}
	defer f.close(ctx)
	primary, err := f.primary()
	if err != nil {
		return nil, err
	}
	info := &connection.Info{Summary: "a primary"}
	if !primary.facts.super && !primary.facts.createRole {
		info.Warnings = append(info.Warnings, fmt.Sprintf("the admin user %s may not change passwords at node %s: give it CREATEROLE, or let roles change their own with allow_self_rotation", primary.facts.admin, primary.node))
	}
	standbys := 0
	for _, n := range f.nodes {
		shown := connection.Node{Name: n.node, Aliases: n.aliases, Note: "no answer"}
		info.Members = append(info.Members, n.dial)
		switch {
		case kind.IsDefinite(n.err):
			return nil, n.err
		case n.err != nil:
			info.Warnings = append(info.Warnings, n.err.Error())
		default:
			role := "primary"
			if n.facts.standby {
				role = "standby"
				standbys++
			}
			shown.Note = role + ", PostgreSQL " + n.facts.version
			info.RunIDs = append(info.RunIDs, "postgresql:"+n.facts.started)
		}
		info.Nodes = append(info.Nodes, shown)
	}
	if standbys > 0 {
		info.Summary = fmt.Sprintf("a primary with %d of its standbys", standbys)
	}
	if system := primary.facts.system; system != "" {
		info.Identity = "postgresql:" + system
		info.Members = append(info.Members, info.Identity)
	} else {
		info.Identity = identity(info.Members)
		info.Warnings = append(info.Warnings, fmt.Sprintf("the admin user may not call pg_control_system() at node %s, so the server is known by its hosts alone: grant EXECUTE on that function", primary.node))
	}
	slices.Sort(info.Members)
	slices.Sort(info.RunIDs)
	return info, nil
}

// identity is what a target is known by that does not say who it is.
func identity(hosts []string) string {
	hosts = slices.Sorted(slices.Values(hosts))
	sum := sha256.Sum256([]byte(strings.Join(hosts, ",")))
	return "postgresql-hosts:" + hex.EncodeToString(sum[:16])
}
