package harmonyflow

import (
	"context"

	"github.com/hashicorp/vault/sdk/framework"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// What a role serves can also stand in a secret of another mount, which existing
// consumers read.

func publishFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"publish_connection": {Type: framework.TypeString, Description: "Connection of type vault through which the role's fields are also published to a secret of KV version 2. Given once."},
		"publish_mount":      {Type: framework.TypeString, Description: "Mount of that secret, as vault secrets list shows it, without the slash at its end. Given once."},
		"publish_path":       {Type: framework.TypeString, Description: "Path of that secret below the mount, as vault kv get takes it. Given once."},
	}
}

func publishAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"publish_connection": stringField("Connection."), "publish_mount": stringField("Mount."), "publish_path": stringField("Path."),
	}
}

func describePlace(r *rotation.Role, data map[string]any) {
	data["publish_connection"], data["publish_mount"], data["publish_path"] = r.Place.Connection, r.Place.Mount, r.Place.Path
}

// applyPlace sets, on a role that is being created, where else it is published.
func applyPlace(r *rotation.Role, d *framework.FieldData) error {
	r.Place = publish.Place{
		Connection: d.Get("publish_connection").(string), Mount: d.Get("publish_mount").(string), Path: d.Get("publish_path").(string),
	}
	if r.Place.Zero() {
		return nil
	}
	if r.Place.Connection != "" {
		if err := checkName(r.Place.Connection); err != nil {
			return badRequest("publish_connection: %w", err)
		}
	}
	if err := publish.CheckPlace(r.Place); err != nil {
		return badRequest("%w", err)
	}
	return nil
}

// holdPlace checks that a new role may publish where it is to, and keeps the
// connection what it is until release.
func (b *backend) holdPlace(ctx context.Context, c *rotation.Creation) (release func(), err error) {
	place := c.Role.Place
	if place.Zero() {
		return func() {}, nil
	}
	if _, err := b.publishes(ctx, c.Role); err != nil {
		return nil, err
	}
	if err := b.identify(ctx, place.Connection); err != nil {
		return nil, err
	}
	if release, err = b.holdConnection(ctx, place.Connection, b.connections.Share); err != nil {
		return nil, err
	}
	e, err := b.publishes(ctx, c.Role)
	if err != nil {
		release()
		return nil, err
	}
	c.PlaceTarget = e.Identity
	return release, nil
}

// publishes returns the connection that a role publishes through, if it lets it.
func (b *backend) publishes(ctx context.Context, r *rotation.Role) (*connection.Entry, error) {
	e, err := b.connections.Must(ctx, r.Place.Connection)
	switch {
	case err != nil:
		return nil, err
	case e.Type != connection.TypeVault:
		return nil, kind.Definitely("publish_connection %q is of type %s; give one of type %s", e.Name, e.Type, connection.TypeVault)
	case !e.AllowsRole(r.Name):
		return nil, kind.Definitely("connection %q does not allow role %q; add it to its allowed_roles", e.Name, r.Name)
	case !e.AllowsPublish(r.Place.Mount, r.Place.Path):
		return nil, kind.Definitely("connection %q does not allow publishing to %s; add it to its allowed_publish_paths", e.Name, r.Place)
	}
	return e, nil
}

// reach is rotation.Options.Reach.
func (b *backend) reach(ctx context.Context, r *rotation.Role) error {
	if _, err := b.publishes(ctx, r); err != nil {
		return err
	}
	return b.remote.Check(ctx, r.Place)
}

// shownAt reads what stands in a role's fields where it is to be shown.
func (b *backend) shownAt(ctx context.Context, r *rotation.Role) (map[string]map[string]string, error) {
	held := map[string]map[string]string{}
	if r.Document != "" {
		doc, err := b.documents.Get(ctx, r.Document)
		if err != nil {
			return nil, err
		}
		if doc != nil {
			held["document "+r.Document] = doc.Body
		}
	}
	if !r.Place.Zero() {
		body, err := b.remote.Held(ctx, r.Place, r.Fields())
		if err != nil {
			return nil, err
		}
		held[r.Place.String()] = body
	}
	return held, nil
}
