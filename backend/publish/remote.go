package publish

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/hashicorp/vault/api"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
)

// Place is a secret in a KV version 2 mount of a Vault. Roles fill fields of it;
// it has others that belong to somebody else.
type Place struct {
	Connection string `json:"connection"`
	Mount      string `json:"mount"`
	Path       string `json:"path"`
}

func (p Place) String() string { return p.Mount + "/" + p.Path }

// Zero reports whether p is no place.
func (p Place) Zero() bool { return p == Place{} }

// CheckPlace refuses mounts and paths that KV clients could not read.
func CheckPlace(p Place) error {
	if p.Connection == "" {
		return errors.New("publish_connection is missing; give a connection of type vault")
	}
	if err := vault.CheckMount("publish_mount", p.Mount); err != nil {
		return err
	}
	if !nameRegexp.MatchString(p.Path) || strings.Contains(p.Path, "..") {
		return fmt.Errorf("publish_path is %.80q; use up to eight parts of A-Z a-z 0-9 _ . - with slashes between them, as vault kv put takes it (without the mount and without \"data\")", p.Path)
	}
	return nil
}

const (
	// maxSecret bounds a whole secret. Vault's storage takes 1 MiB an entry.
	maxSecret = 512 << 10
	// Who met another writer waits a random part of these before trying again.
	againFirst = 20 * time.Millisecond
	againMost  = 500 * time.Millisecond
	// maxWrites is how often one Publish writes where somebody else undoes it: each
	// write is a version, and KV keeps ten.
	maxWrites = 3
)

// Remote publishes to KV version 2 mounts of other Vaults, and of the one that
// the engine runs in.
//
// A write names the version that it was made from (check-and-set), so it changes
// nothing when somebody else was faster, and is applied at most once. One whose
// outcome is not known may still be on its way when Publish returns: it can land
// as long as nobody has written meanwhile (or the secret was erased with its
// metadata: its versions begin anew). Whoever wants to publish something else
// then, the former fields included, has to wait until no call of before can be
// applied any more; publishing the same again is safe.
type Remote struct {
	clients    *vault.Clients
	againFirst time.Duration
}

// NewRemote returns a Remote that logs in with clients.
func NewRemote(clients *vault.Clients) *Remote {
	return &Remote{clients: clients, againFirst: againFirst}
}

// Publish makes the secret at place hold fields, and leaves its other fields as
// they are. It writes nothing where they stand there already, and otherwise one
// version, which it reads back. It gives up when ctx ends.
func (r *Remote) Publish(ctx context.Context, place Place, fields map[string]string) error {
	for name, value := range fields {
		if !utf8.ValidString(value) {
			return kind.Definitely("field %q of %s would hold bytes that are no text, which JSON cannot carry; give the role an encoding that is text", name, place)
		}
	}
	return r.at(ctx, place, func(ctx context.Context, s secret) error { return s.publish(ctx, fields, r.againFirst) })
}

// Held returns what stands in those of fields that the secret at place has. What
// is no string is returned as its JSON.
func (r *Remote) Held(ctx context.Context, place Place, fields []string) (map[string]string, error) {
	held := map[string]string{}
	err := r.at(ctx, place, func(ctx context.Context, s secret) error {
		now, err := s.read(ctx)
		if err != nil {
			return err
		}
		for _, name := range fields {
			if raw, ok := now.body[name]; ok {
				held[name] = textOf(raw)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return held, nil
}

// Check says why place could not be published to, and changes nothing.
func (r *Remote) Check(ctx context.Context, place Place) error {
	return r.at(ctx, place, func(ctx context.Context, s secret) error {
		if _, err := s.read(ctx); err != nil {
			return err
		}
		if err := s.checkMount(ctx); err != nil {
			return err
		}
		return s.checkWritable(ctx)
	})
}

// at calls do with the secret at place, if the connection allows it.
func (r *Remote) at(ctx context.Context, place Place, do func(context.Context, secret) error) error {
	if err := CheckPlace(place); err != nil {
		return kind.Definitely("%w", err)
	}
	e, err := r.clients.Entry(ctx, place.Connection)
	if err != nil {
		return err
	}
	if !e.AllowsPublish(place.Mount, place.Path) {
		return kind.Definitely("connection %q does not allow publishing to %s; add it to its allowed_publish_paths", place.Connection, place)
	}
	return r.clients.Do(ctx, place.Connection, func(ctx context.Context, c *api.Client) error {
		return do(ctx, secret{client: c, place: place})
	})
}

// secret is a secret of KV version 2, reached by a client that is logged in.
type secret struct {
	client *api.Client
	place  Place
}

// content is what a secret holds. Values are kept as they came: a number in them
// may have more digits than any type of Go.
type content struct {
	version int // 0: there is none
	body    map[string]json.RawMessage
}

// publish reads, merges and writes until what it reads holds fields. That
// somebody else writes in between, or deletes the secret, makes it go round once
// more.
func (s secret) publish(ctx context.Context, fields map[string]string, pause time.Duration) error {
	var wrote *content
	for writes := 0; ; pause = min(2*pause, againMost) {
		now, err := s.read(ctx)
		if err != nil {
			return err
		}
		if wrote != nil && now.version == wrote.version && !now.shows(wrote) {
			return kind.Definitely("%s does not hold in version %d what was written to it; look for something between the engine and the Vault of connection %q that changes requests", s.place, now.version, s.place.Connection)
		}
		next := now.with(fields)
		if next == nil {
			return nil
		}
		if writes == maxWrites {
			return &kind.Error{Class: kind.Unavailable, Err: fmt.Errorf("somebody else writes fields of %s that a role owns; find out who in the audit log of that Vault, and leave them to one of the two", s.place)}
		}
		switch err := s.write(ctx, next, now.version); {
		case err == nil:
			writes, wrote = writes+1, next
			continue
		case !isMismatch(err):
			return err
		}
		select {
		case <-ctx.Done():
			return &kind.Error{Class: kind.Unavailable, Err: fmt.Errorf("%s is being written by others all the time: %w", s.place, ctx.Err())}
		case <-time.After(pause/2 + rand.N(pause)): //nolint:gosec // it spreads, and guards nothing
		}
	}
}

// with returns the content that has fields, too; nil when c has them.
func (c *content) with(fields map[string]string) *content {
	next := &content{version: c.version + 1, body: maps.Clone(c.body)}
	if next.body == nil {
		next.body = map[string]json.RawMessage{}
	}
	changed := false
	for name, value := range fields {
		if raw, ok := c.body[name]; ok && isString(raw, value) {
			continue
		}
		changed = true
		next.body[name] = quote(value)
	}
	if !changed {
		return nil
	}
	return next
}

// shows reports whether c is what was written: field by field, because Vault
// writes JSON in a form of its own.
func (c *content) shows(wrote *content) bool {
	return maps.EqualFunc(c.body, wrote.body, sameJSON)
}

func quote(text string) json.RawMessage {
	raw, err := json.Marshal(text)
	if err != nil {
		panic(err) // a string always has a JSON form
	}
	return raw
}

func isString(raw json.RawMessage, text string) bool {
	var s *string
	return json.Unmarshal(raw, &s) == nil && s != nil && *s == text
}

func textOf(raw json.RawMessage) string {
	var s *string
	if json.Unmarshal(raw, &s) == nil && s != nil {
		return *s
	}
	return string(raw)
}

// sameJSON compares values and not texts. Numbers are equal when they are the
// same float64: Vault writes them in another form than it got them, and no more
// exactly than that.
func sameJSON(a, b json.RawMessage) bool {
	var x, y any
	return bytes.Equal(a, b) || json.Unmarshal(a, &x) == nil && json.Unmarshal(b, &y) == nil && reflect.DeepEqual(x, y)
}

// read returns what the secret holds. One that was deleted or destroyed holds
// nothing and has a version, which the next write has to name.
func (s secret) read(ctx context.Context) (*content, error) {
	resp, err := s.client.Logical().ReadRawWithContext(ctx, s.path())
	if resp != nil {
		defer resp.Body.Close()
	}
	answer := vault.AnswerOf(err)
	if err != nil && (answer == nil || answer.Status != http.StatusNotFound || answer.Known != "") {
		return nil, err
	}
	var got struct {
		Errors []string `json:"errors"`
		Data   *struct {
			Data     map[string]json.RawMessage `json:"data"`
			Metadata *struct {
				Version int `json:"version"`
			} `json:"metadata"`
		} `json:"data"`
	}
	if decodeErr := json.NewDecoder(resp.Body).Decode(&got); decodeErr != nil {
		if err != nil {
			return nil, err // a 404 that is not Vault's
		}
		var shape *json.UnmarshalTypeError
		if errors.As(decodeErr, &shape) {
			return nil, s.notKV()
		}
		return nil, fmt.Errorf("reading an answer: %w", decodeErr)
	}
	switch {
	case err != nil && len(got.Errors) > 0:
		return nil, err
	case err != nil && got.Data == nil:
		return &content{}, nil
	case got.Data == nil || got.Data.Metadata == nil:
		return nil, s.notKV()
	}
	return &content{version: got.Data.Metadata.Version, body: got.Data.Data}, nil
}

// write makes next the version after the one it was made from.
func (s secret) write(ctx context.Context, next *content, from int) error {
	raw, err := json.Marshal(map[string]any{"options": map[string]int{"cas": from}, "data": next.body})
	if err != nil {
		return kind.Definitely("%s holds what cannot be written again (%T)", s.place, err)
	}
	if len(raw) > maxSecret {
		return kind.Definitely("%s would have %d bytes and may have %d; publish to a secret of its own", s.place, len(raw), maxSecret)
	}
	// A mount of version 1 would take the request for the secret itself.
	if err := s.checkMount(ctx); err != nil {
		return err
	}
	_, err = s.client.Logical().WriteBytesWithContext(ctx, s.path(), raw)
	return err
}

func isMismatch(err error) bool {
	a := vault.AnswerOf(err)
	return a != nil && a.Status == http.StatusBadRequest && a.Known == vault.Mismatch
}

// checkMount asks what `vault kv` asks before it writes. It needs no policy
// beyond that for the secret itself.
func (s secret) checkMount(ctx context.Context) error {
	answer, err := s.client.Logical().ReadWithContext(ctx, "sys/internal/ui/mounts/"+s.place.Mount)
	if err != nil {
		return err
	}
	if answer == nil {
		return s.notKV()
	}
	options, _ := answer.Data["options"].(map[string]any)
	if answer.Data["path"] != s.place.Mount+"/" || answer.Data["type"] != "kv" || options["version"] != "2" {
		return s.notKV()
	}
	return nil
}

// checkWritable asks what the token may do with the secret. That may be asked by
// everybody, unless a policy takes it away: then a write will tell.
func (s secret) checkWritable(ctx context.Context) error {
	may, err := s.client.Sys().CapabilitiesSelfWithContext(ctx, s.path())
	if a := vault.AnswerOf(err); a != nil && a.Status == http.StatusForbidden {
		return nil
	}
	if err != nil {
		return err
	}
	if slices.Contains(may, "root") || slices.Contains(may, "create") && slices.Contains(may, "update") {
		return nil
	}
	return kind.Definitely("the token of connection %q may not write %s; give its policy create, read and update on %s", s.place.Connection, s.place, s.path())
}

func (s secret) notKV() error {
	return kind.Definitely("%s/ of the Vault of connection %q is no mount of KV version 2, and nothing is written to it; give publish_mount as vault secrets list shows it, without the slash at its end", s.place.Mount, s.place.Connection)
}

func (s secret) path() string { return s.place.Mount + "/data/" + s.place.Path }
