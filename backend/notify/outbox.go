package notify

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// letter is what is stored of one rotation, or of one event about roles: which events
// were found, and who still has to get them.
type letter struct {
	id     string
	Told   []Kind    `json:"told,omitempty"`
	Events []sending `json:"events,omitempty"`
	// Over: nothing more will be found.
	Over bool `json:"over,omitempty"`
}

// sending is an event that somebody still has to get.
type sending struct {
	Event
	To []string `json:"to"`
}

func (l *letter) told(k Kind) bool { return slices.Contains(l.Told, k) }

// add has e sent to those who want it.
func (l *letter) add(e Event, all []*Notification) {
	l.Told = append(l.Told, e.Kind)
	var to []string
	for _, n := range all {
		if n.wants(e.Kind) {
			to = append(to, n.Name)
		}
	}
	if len(to) > 0 {
		l.Events = append(l.Events, sending{Event: e, To: to})
	}
}

// strike takes a receiver of an event out, and every event that has none left.
func (l *letter) strike(keep func(e Event, to string) bool) (changed bool) {
	var events []sending
	for _, s := range l.Events {
		to := slices.DeleteFunc(slices.Clone(s.To), func(name string) bool { return !keep(s.Event, name) })
		changed = changed || len(to) != len(s.To)
		if len(to) > 0 {
			events = append(events, sending{Event: s.Event, To: to})
		}
	}
	l.Events = events
	return changed
}

// telling says where to look after a start.
type telling struct {
	// Since: every rotation that was begun before is told.
	Since time.Time `json:"since"`
	// Roles are those that were told to be overdue or drifted, by kind of event.
	Roles map[Kind][]string `json:"roles,omitempty"`
}

type outbox struct{ s logical.Storage }

func (o outbox) letter(ctx context.Context, id string) (*letter, error) {
	l, err := storage.Get[letter](ctx, o.s, storage.Outbox+id)
	switch {
	case storage.IsUndecodable(err): // a newer version has told it, or will be told it
		return &letter{id: id, Over: true}, nil
	case err != nil:
		return nil, err
	case l == nil:
		l = &letter{}
	}
	l.id = id
	return l, nil
}

func (o outbox) put(ctx context.Context, l *letter) error {
	return storage.Put(ctx, o.s, storage.Outbox+l.id, l, maxEntry)
}

func (o outbox) drop(ctx context.Context, id string) error {
	if err := o.s.Delete(ctx, storage.Outbox+id); err != nil {
		return fmt.Errorf("deleting what was told: %w", err)
	}
	return nil
}

// letters reads all of them.
func (o outbox) letters(ctx context.Context) (map[string]*letter, error) {
	ids, err := o.s.List(ctx, storage.Outbox)
	if err != nil {
		return nil, err
	}
	out := map[string]*letter{}
	for _, id := range ids {
		if out[id], err = o.letter(ctx, id); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (o outbox) telling(ctx context.Context) (*telling, error) {
	t, err := storage.Get[telling](ctx, o.s, storage.Telling)
	if err != nil || t == nil {
		return nil, err
	}
	t.Roles = maps.Clone(t.Roles)
	return t, nil
}

func (o outbox) putTelling(ctx context.Context, t *telling) error {
	return storage.Put(ctx, o.s, storage.Telling, t, 4*maxEntry)
}
