package approle

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"

	"github.com/hashicorp/vault/api"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
)

const (
	register = "custom-secret-id"
	lookup   = "secret-id/lookup"
	destroy  = "secret-id/destroy"
)

type target struct {
	clients    *vault.Clients
	connection string
}

// Open returns the Vault behind a connection, as what accepts the secret-ids that
// the connection logs in with. Its user is the role_id.
func Open(clients *vault.Clients, connection string) kind.Target {
	return target{clients: clients, connection: connection}
}

// visit is one call, logged in as the connection itself.
type visit struct {
	clients *vault.Clients
	e       *connection.Entry
	login   *vault.Login
}

// visit logs in anew for each call: what the connection may log in with changes
// while it is rotated.
func (t target) visit(ctx context.Context, work func(context.Context, visit)) error {
	e, err := t.clients.Entry(ctx, t.connection)
	if err != nil {
		return err
	}
	if e.Vault.Auth != connection.AuthAppRole {
		return kind.Definitely("connection %q logs in by %s, and its Vault knows no way to rotate that; only auth=approle can be rotated", e.Name, e.Vault.Auth)
	}
	return t.clients.AsAdmin(ctx, e, func(ctx context.Context, l *vault.Login) {
		work(ctx, visit{clients: t.clients, e: e, login: l})
	})
}

// node is the whole of a Vault: its nodes share what they store, and one answers
// for all.
func (v visit) node() string {
	if u, err := url.Parse(v.e.Vault.Address); err == nil && u.Host != "" {
		return u.Host
	}
	return v.e.Vault.Address
}

// Probe implements kind.Target.
func (t target) Probe(ctx context.Context, questions []kind.Question) []kind.Answer {
	out := make([]kind.Answer, len(questions))
	err := t.visit(ctx, func(ctx context.Context, v visit) {
		for i, q := range questions {
			answer := v.probe(ctx, q)
			if kind.IsDefinite(answer.Err) { // it is about the whole: there is one node
				out[i].Err = answer.Err
				continue
			}
			out[i].Nodes = []kind.NodeAnswer{answer}
		}
	})
	for i := range out {
		if err != nil {
			out[i].Err = err
		}
	}
	return out
}

func (v visit) probe(ctx context.Context, q kind.Question) kind.NodeAnswer {
	a := kind.NodeAnswer{Node: v.node(), Accepts: make([]bool, len(q.Materials))}
	for i, m := range q.Materials {
		if a.Accepts[i], a.Err = v.accepts(ctx, q.User, m); a.Err != nil {
			break
		}
	}
	return a
}

func (v visit) accepts(ctx context.Context, u kind.User, m kind.Material) (bool, error) {
	if !v.isOurs(u, m) {
		return false, nil
	}
	there, err := v.look(ctx, m)
	if err != nil || there == nil {
		return false, err
	}
	return true, v.prove(ctx, m)
}

// isOurs reports whether m is a secret-id of the role_id that u names, and that is
// the connection's.
func (v visit) isOurs(u kind.User, m kind.Material) bool {
	return m.Secret != "" && m.Username == u.Username && v.e.Administers(u.Username)
}

// look is what Vault knows of a secret-id, nil where it is not there.
func (v visit) look(ctx context.Context, m kind.Material) (map[string]any, error) {
	data, err := v.post(ctx, lookup, map[string]any{"secret_id": m.Secret})
	if a := vault.AnswerOf(err); a != nil && a.Known == vault.Incomplete {
		return nil, nil
	}
	return data, err
}

// prove logs in with a secret-id that is there. Where that is refused it is one of
// another AppRole than the role_id: that is neither accepted nor known to be
// refused.
func (v visit) prove(ctx context.Context, m kind.Material) error {
	if m.Same(v.login.Material) {
		return nil // this very call has logged in with it
	}
	err := v.clients.As(ctx, v.e, m, func(context.Context, *vault.Login) {})
	if vault.Refused(err) {
		return &kind.Error{Class: kind.Unavailable, Err: fmt.Errorf("a secret-id is there, and a login with it is refused: %s", v.stranger())}
	}
	return err
}

// Change implements kind.Target.
func (t target) Change(ctx context.Context, changes []kind.Change) []kind.Outcome {
	out := make([]kind.Outcome, len(changes))
	err := t.visit(ctx, func(ctx context.Context, v visit) {
		for i, c := range changes {
			out[i].Nodes = []kind.NodeError{{Node: v.node(), Err: v.change(ctx, c)}}
		}
	})
	for i := range out {
		out[i].Err = err
	}
	return out
}

func (v visit) change(ctx context.Context, c kind.Change) error {
	if !v.e.Administers(c.Username) {
		return kind.Definitely("%.80q is not the role_id of connection %q; only that can be rotated here", c.Username, v.e.Name)
	}
	for _, m := range c.Accept {
		if !v.isOurs(c.User, m) {
			return kind.Definitely("the AppRole of connection %q was to accept what is no secret-id of its role_id; report it as a defect", v.e.Name)
		}
		if err := v.accept(ctx, m); err != nil {
			return err
		}
	}
	for _, m := range v.refused(c) {
		if _, err := v.post(ctx, destroy, map[string]any{"secret_id": m.Secret}); err != nil {
			return err // what is not there is answered like what was
		}
	}
	return nil
}

// accept makes a secret-id, or proves that an earlier call whose answer was lost
// has made it.
func (v visit) accept(ctx context.Context, m kind.Material) error {
	there, err := v.look(ctx, m)
	if err != nil {
		return err
	}
	if there != nil {
		return v.prove(ctx, m)
	}
	limits, err := v.limits(ctx)
	if err != nil {
		return err
	}
	return v.register(ctx, m, limits)
}

func (v visit) register(ctx context.Context, m kind.Material, body map[string]any) error {
	body["secret_id"] = m.Secret
	v.clients.Forgive(v.e, m)
	_, err := v.post(ctx, register, body)
	if a := vault.AnswerOf(err); a != nil && a.Known == vault.Registered { // that call has landed since
		return v.prove(ctx, m)
	}
	return err
}

// limits are what the secret-id that is in use has of its own, beside what its
// AppRole says: from where it and its tokens may be used, and what its tokens
// carry. A new one without them could do more, or less.
func (v visit) limits(ctx context.Context) (map[string]any, error) {
	now, err := v.look(ctx, v.login.Material)
	switch {
	case err != nil:
		return nil, err
	case now == nil: // and nothing is made at an AppRole of somebody else
		return nil, kind.Definitely("%s", v.stranger())
	}
	out := map[string]any{}
	for _, field := range []string{"cidr_list", "token_bound_cidrs"} {
		if list, _ := now[field].([]any); len(list) > 0 {
			out[field] = list
		}
	}
	if metadata, _ := now["metadata"].(map[string]any); len(metadata) > 0 {
		text, err := json.Marshal(metadata)
		if err != nil {
			return nil, kind.Definitely("the metadata of the secret-id of connection %q cannot be read (%T)", v.e.Name, err)
		}
		out["metadata"] = string(text)
	}
	return out, nil
}

// refused are the secret-ids to destroy. Those of others stay.
func (v visit) refused(c kind.Change) []kind.Material {
	candidates := slices.Clone(c.Refuse)
	if c.Exclusive {
		candidates = append(candidates, v.e.Admin.Logins()...)
	}
	var out []kind.Material
	for _, m := range candidates {
		if v.isOurs(c.User, m) && !slices.ContainsFunc(c.Accept, m.Same) && !slices.ContainsFunc(out, m.Same) {
			out = append(out, m)
		}
	}
	return out
}

// role is where the AppRole is.
func (v visit) role() string { return "auth/" + v.e.Vault.AuthMount + "/role/" + v.e.Vault.Role }

// post writes below the AppRole.
func (v visit) post(ctx context.Context, path string, body map[string]any) (data map[string]any, err error) {
	if v.e.Vault.Role == "" {
		return nil, kind.Definitely("%s", v.nameless())
	}
	err = v.login.Do(ctx, func(ctx context.Context, client *api.Client) error {
		answer, err := client.Logical().WriteWithContext(ctx, v.role()+"/"+path, body)
		if answer != nil {
			data = answer.Data
		}
		return err
	})
	if a := vault.AnswerOf(err); a != nil && a.Known == vault.Nonexistent { // which comes with 500
		return nil, kind.Definitely("%s", v.missing())
	}
	return data, err
}
