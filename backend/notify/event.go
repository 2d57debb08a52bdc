package notify

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// Kind is what an event is about.
type Kind string

// The kinds of events. A rotation has each of its own at most once.
const (
	Started    Kind = "started"
	Promoted   Kind = "promoted"    // every role of it serves its new version, or has failed
	Failing    Kind = "failed"      // a role of it failed, or is on its way back
	Holding    Kind = "held"        // somebody has to decide
	Completed  Kind = "completed"   // all of it
	RolledBack Kind = "rolled_back" // it ended, and roles of it serve what they served before
	Overdue    Kind = "overdue"     // roles that should have rotated over an hour ago
	Emergency  Kind = "emergency"   // one has begun: every earlier version of its roles is about to be refused
	Drift      Kind = "drift"       // roles whose target differs from what is stored
	Test       Kind = "test"        // somebody asked for it
)

// Kinds are those that can be chosen.
var Kinds = []Kind{Started, Promoted, Failing, Holding, Completed, RolledBack, Emergency, Overdue, Drift}

// maxNamed is how many roles an event names.
const maxNamed = 20

// Event is what is sent. It holds no material.
type Event struct {
	ID   string    `json:"id"`
	Kind Kind      `json:"event"`
	At   time.Time `json:"at"`
	// Of a rotation.
	Rotation    string         `json:"rotation_id,omitempty"`
	Trigger     string         `json:"trigger,omitempty"`
	State       rotation.State `json:"state,omitempty"`
	Reason      string         `json:"reason,omitempty"`
	RequestedBy string         `json:"requested_by,omitempty"`
	// Roles are the first of those that it is about.
	Roles   []Role `json:"roles,omitempty"`
	Total   int    `json:"roles_total,omitempty"`
	Summary string `json:"summary"`
}

// Role is one of those that an event is about.
type Role struct {
	Role    string         `json:"role"`
	Kind    string         `json:"kind"`
	Version int            `json:"version,omitempty"`
	State   rotation.State `json:"state,omitempty"`
	Error   string         `json:"error,omitempty"`
}

// label is how people know it.
func (r Role) label() string { return rotation.Label(r.Kind, r.Role) }

// idOf is the same for the same event, however often it is found.
func idOf(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return "evt_" + hex.EncodeToString(sum[:12])
}

// eventsOf are the events that are true of a rotation, as it is stored.
func eventsOf(h *rotation.Header, parts []rotation.Part) []Event {
	out := []Event{event(h, parts, Started, nil)}
	if h.Trigger == rotation.Urgent {
		out = append(out, event(h, parts, Emergency, nil))
	}
	promoted, open := 0, 0
	for _, p := range parts {
		switch {
		case p.Served(), p.State == rotation.Completed, p.State == rotation.Partial, !p.Refused.IsZero():
			promoted++
		case !p.State.Ended() && !turned(p):
			open++
		}
	}
	if promoted > 0 && open == 0 {
		out = append(out, event(h, parts, Promoted, nil))
	}
	for kind, is := range map[Kind]func(rotation.Part) bool{
		Failing: func(p rotation.Part) bool {
			return turned(p) || p.State == rotation.Failed || p.State == rotation.Partial
		},
		Holding: func(p rotation.Part) bool { return p.State == rotation.Held },
	} {
		if slices.ContainsFunc(parts, is) {
			out = append(out, event(h, parts, kind, is))
		}
	}
	if h.State == "" {
		return out
	}
	back := func(p rotation.Part) bool { return p.State == rotation.RolledBack }
	switch {
	case h.State == rotation.Completed:
		out = append(out, event(h, parts, Completed, nil))
	case slices.ContainsFunc(parts, back):
		out = append(out, event(h, parts, RolledBack, back))
	}
	return out
}

// turned reports whether a part is on its way back, or has come to its end there.
func turned(p rotation.Part) bool {
	return p.State == rotation.RollingBack || p.State == rotation.RollbackFailed || p.State == rotation.RolledBack
}

// event is about the parts that are as asked for; nil: all.
func event(h *rotation.Header, parts []rotation.Part, k Kind, is func(rotation.Part) bool) Event {
	e := Event{
		ID: idOf(h.ID, string(k)), Kind: k, At: time.Now().UTC(), Rotation: h.ID, Trigger: string(h.Trigger), State: rotation.StateOf(h, parts),
		Reason: h.Reason, RequestedBy: h.RequestedBy.DisplayName,
	}
	for _, p := range parts {
		if is != nil && !is(p) {
			continue
		}
		if e.Total++; e.Total <= maxNamed {
			e.Roles = append(e.Roles, Role{Role: p.Key(), Kind: p.Kind, Version: p.Version, State: p.State, Error: p.Error})
		}
	}
	e.Summary = e.sentence()
	return e
}

// ofRoles is an event about roles, whatever rotation they are in.
func ofRoles(k Kind, roles []Role) Event {
	slices.SortFunc(roles, func(a, b Role) int { return strings.Compare(a.label(), b.label()) })
	e := Event{Kind: k, At: time.Now().UTC(), Total: len(roles), Roles: roles[:min(maxNamed, len(roles))]}
	e.ID = idOf(string(k), e.At.Format(time.RFC3339Nano))
	e.Summary = e.sentence()
	return e
}

func (e Event) sentence() string {
	what := map[Kind]string{
		Started: "rotation started", Promoted: "the new version is served", Failing: "rotation failed", Holding: "a consumer failed; resume or cancel the rotation",
		Completed: "rotation completed", RolledBack: "rolled back; what was served before is served", Overdue: "should have rotated over an hour ago",
		Emergency: "an emergency rotation has begun; earlier versions are refused as soon as the new one is served",
		Drift:     "the target differs from what is stored", Test: "a test of this notification",
	}[e.Kind]
	var names []string
	for _, r := range e.Roles {
		names = append(names, r.label())
	}
	who := strings.Join(names, ", ")
	if e.Total > len(names) {
		who += fmt.Sprintf(" and %d more", e.Total-len(names))
	}
	if who == "" {
		return what
	}
	return who + ": " + what
}
