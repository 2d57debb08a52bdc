package harmonyflow

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/notify"
)

// eventTimeout is how long Vault has to take an event of its own.
const eventTimeout = 5 * time.Second

// event sends an event of Vault's own, where it takes them: subscribing is a matter
// of Vault Enterprise, and elsewhere nobody hears it.
func (b *backend) event(e notify.Event) {
	ctx, cancel := context.WithTimeout(context.Background(), eventTimeout)
	defer cancel()
	metadata, err := b.metadataOf(e)
	if err == nil {
		err = b.SendEvent(ctx, logical.EventType("harmonyflow/"+string(e.Kind)), &logical.EventData{Id: e.ID, Metadata: metadata})
	}
	if err != nil && !errors.Is(err, framework.ErrNoEvents) {
		b.Logger().Trace("Vault takes no event", "error", err)
	}
}

// metadataOf is what notifications carry of e, and what Vault asks for: the path that a
// subscriber needs a right to, what to read now, and whether it has changed.
func (b *backend) metadataOf(e notify.Event) (*structpb.Struct, error) {
	raw, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	out := new(structpb.Struct)
	if err := out.UnmarshalJSON(raw); err != nil {
		return nil, err
	}
	path := "status"
	if e.Rotation != "" {
		path = "rotations/" + e.Rotation
	}
	read, modified := path, "false"
	if e.Kind == notify.Promoted || e.Kind == notify.RolledBack {
		read, modified = cmp.Or(b.servedBy(e.Roles), path), "true"
	}
	for name, value := range map[string]string{
		logical.EventMetadataPath: path, logical.EventMetadataDataPath: read, logical.EventMetadataModified: modified,
		logical.EventMetadataOperation: string(e.Kind),
	} {
		out.Fields[name] = structpb.NewStringValue(value)
	}
	return out, nil
}

// servedBy is where the one role of roles is served, or "": there may be several, and
// admin credentials and what another server keeps are not served.
func (b *backend) servedBy(roles []notify.Role) string {
	if len(roles) != 1 || strings.HasPrefix(roles[0].Role, "rotate-root/") {
		return ""
	}
	if k := b.offered(roles[0].Kind); k == nil || k.keep != nil {
		return ""
	}
	return "creds/" + roles[0].Role
}
