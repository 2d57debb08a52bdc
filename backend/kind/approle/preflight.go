package approle

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind/keeper"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
)

func (v visit) nameless() string {
	return fmt.Sprintf("connection %q does not say which AppRole it logs in to; write connections/%s with role=<name of the AppRole>, which rotate-root needs",
		v.e.Name, v.e.Name)
}

func (v visit) missing() string {
	return fmt.Sprintf("there is no AppRole at %s; write connections/%s with role=<name of the AppRole>, as it is at that mount", v.role(), v.e.Name)
}

func (v visit) stranger() string {
	return fmt.Sprintf("%s is not the AppRole that the role_id of connection %q is of; write connections/%s with role=<its name>", v.role(), v.e.Name, v.e.Name)
}

// Preflight implements kind.Target.
func (t target) Preflight(ctx context.Context, users []kind.User) []kind.Finding {
	out := make([]kind.Finding, len(users))
	err := t.visit(ctx, func(ctx context.Context, v visit) {
		for i, u := range users {
			out[i] = v.preflight(ctx, u)
		}
	})
	for i := range out {
		if err != nil {
			out[i].Err = err
		}
	}
	return out
}

func (v visit) preflight(ctx context.Context, u kind.User) kind.Finding {
	f := kind.Finding{Nodes: []kind.NodeError{{Node: v.node()}}}
	if !v.e.Administers(u.Username) {
		f.Problems = []string{fmt.Sprintf("%.80q is not the role_id of connection %q", u.Username, v.e.Name)}
		return f
	}
	f.HasCredential = true // the call has logged in
	if v.e.Vault.Role == "" {
		f.Problems = []string{v.nameless()}
		return f
	}
	for _, check := range []func(context.Context, *kind.Finding) (more bool, err error){v.permissions, v.settings, v.identity} {
		more, err := check(ctx, &f)
		if err != nil {
			f.Err = err
		}
		if err != nil || !more {
			break
		}
	}
	return f
}

// permissions looks at what the policy allows.
func (v visit) permissions(ctx context.Context, f *kind.Finding) (more bool, err error) {
	switch missing, known := keeper.Lacks(ctx, v.login.Do, v.role()+"/"+register, v.role()+"/"+lookup, v.role()+"/"+destroy); {
	case !known:
		f.Notes = append(f.Notes, keeper.Unasked)
	case len(missing) > 0:
		f.Problems = append(f.Problems, keeper.Forbidden(missing))
		return false, nil
	}
	return true, ctx.Err()
}

// settings looks at those of the AppRole that a rotation cannot live with.
func (v visit) settings(ctx context.Context, f *kind.Finding) (more bool, err error) {
	data, err := keeper.Read(ctx, v.login.Do, v.role())
	switch {
	case forbidden(err):
		f.Notes = append(f.Notes, fmt.Sprintf("the token may not read %s: secret_id_num_uses and secret_id_ttl, which should both be 0, were not looked at", v.role()))
		return true, nil
	case err != nil:
		return false, err
	case data == nil:
		f.Problems = append(f.Problems, v.missing())
		return false, nil
	}
	if bound, ok := data["bind_secret_id"].(bool); ok && !bound {
		f.Problems = append(f.Problems, fmt.Sprintf("%s has bind_secret_id=false, so a login needs no secret-id and there is nothing to rotate; set it to true", v.role()))
	}
	if local, _ := data["local_secret_ids"].(bool); local {
		f.Problems = append(f.Problems, fmt.Sprintf("%s has local_secret_ids=true, so each cluster has secret-ids of its own and one cannot answer for all; take an AppRole without it", v.role()))
	}
	for _, limit := range []struct{ field, spent string }{
		{"secret_id_num_uses", "each login with a secret-id counts"}, {"token_num_uses", "each request of a rotation counts"},
	} {
		if n := keeper.Number(data[limit.field]); n != 0 {
			f.Problems = append(f.Problems, fmt.Sprintf("%s has %s=%d, and %s; set it to 0", v.role(), limit.field, n, limit.spent))
		}
	}
	if ttl := time.Duration(keeper.Number(data["secret_id_ttl"])) * time.Second; ttl != 0 {
		f.Notes = append(f.Notes, fmt.Sprintf("%s has secret_id_ttl=%s: a new secret-id ends by itself after that, so rotate more often", v.role(), ttl))
	}
	return true, nil
}

// identity proves that role and role_id are of one AppRole: it has the secret-id
// that was logged in with.
func (v visit) identity(ctx context.Context, f *kind.Finding) (more bool, err error) {
	roleID, err := keeper.Read(ctx, v.login.Do, v.role()+"/role-id")
	if err != nil && !forbidden(err) { // a policy need not allow this: the next question answers it, too
		return false, err
	}
	there, err := v.look(ctx, v.login.Material)
	switch id, _ := roleID["role_id"].(string); {
	case kind.IsDefinite(err):
		f.Problems = append(f.Problems, err.Error())
	case err != nil:
		return false, err
	case there == nil, id != "" && id != v.login.Material.Username:
		f.Problems = append(f.Problems, v.stranger())
	}
	return true, nil
}

func forbidden(err error) bool {
	a := vault.AnswerOf(err)
	return a != nil && a.Status == http.StatusForbidden
}
