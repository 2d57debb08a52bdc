package rotation

import (
	"slices"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// noteDocument checks a write of the document: its version goes up by one with
// each change of what it shows, and never else.
func (w *world) noteDocument(name string, value []byte) {
	if value == nil {
		w.violateLocked("document %s was removed", name)
		return
	}
	next := &publish.Document{}
	if err := jsonutil.DecodeJSON(value, next); err != nil {
		w.violateLocked("document: %v", err)
	}
	w.noteShow(next)
}

// noteShow is noteDocument for what consumers read, wherever it stands.
func (w *world) noteShow(next *publish.Document) {
	if before := w.doc; before != nil {
		changed := 0
		for field, secret := range next.Body {
			if before.Body[field] != secret {
				changed++
			}
		}
		for field := range before.Body {
			if _, ok := next.Body[field]; !ok {
				w.violateLocked("field %s of the document was lost", field)
			}
		}
		if bump := next.Version - before.Version; bump < 0 || bump > 1 || (bump == 1) != (changed > 0) {
			w.violateLocked("the document went from version %d to %d with %d changes", before.Version, next.Version, changed)
		}
	}
	w.doc = next
	w.checkUnits()
	for _, r := range w.roles {
		if r.ring() {
			w.noteShown(r)
		}
	}
}

// checkDocument: what the document shows of a role is one of its promoted
// versions, with the user that goes with it and the version before it; and what
// it shows as current is accepted at every node, like what is served.
func (w *world) checkDocument() {
	if w.doc == nil || w.tampered["u-a"] {
		return
	}
	for _, r := range w.roles {
		secret, ok := w.doc.Body[r.Field]
		if !ok || !r.Shows() {
			continue
		}
		if r.ring() {
			w.checkShownRing(r, secret)
			continue
		}
		user := w.doc.Body[r.UsernameField]
		if !slices.Contains(r.Spec.Owns(), user) {
			w.violateLocked("the document shows user %q of role %s", user, r.Name)
		}
		current := r.With(version.Current)
		fresh := current != nil && current.Material.Secret == secret
		if previous := w.doc.Body[r.Spec.PreviousField]; previous != "" && previous == secret {
			w.violateLocked("the document shows %s of role %s twice", secret, r.Name)
		}
		if r.Run == nil || r.Run.Phase == Grace {
			if !fresh {
				w.violateLocked("the document shows %s of role %s, which serves %v", secret, r.Name, describe(r))
			}
		}
		if r.Spec.Strategy != kind.Swap && !r.AllowPartial {
			w.checkShown(r, kind.Material{Username: user, Secret: secret})
		}
	}
}

func (w *world) checkShown(r *Role, m kind.Material) {
	if r.Run.urgent() || w.leftOut { // it may show what is refused until the new one is published
		return
	}
	for _, n := range w.order {
		if !w.nodes[n].takes(m) && !w.passedOver(r, n) {
			w.violateLocked("node %s refuses %s, which the document shows of role %s: %s", n, m.Secret, r.Name, describe(r))
		}
	}
}

// checkPublished: at rest the document shows what is served, and nothing else.
func (w *world) checkPublished(r *Role, m kind.Material) {
	if !r.Shows() {
		return
	}
	if w.doc == nil || w.doc.Body[r.Field] != m.Secret {
		// A role that was seeded is published with its first rotation.
		if r.LastRun != nil && r.LastRun.State == Completed && r.LastRun.Trigger != Reconcile {
			w.violateLocked("at rest the document does not show what role %s serves", r.Name)
		}
		return
	}
	left := "" // of a rotation in which it was deleted: no server holds it, and consumers may have it
	if v := r.beside(); v != nil && r.Connection == "" {
		left = v.Material.Secret
	}
	if p := w.doc.Body[r.Spec.PreviousField]; r.Spec.PreviousField != "" && p != left {
		w.violateLocked("at rest the document still shows the previous %s of role %s", p, r.Name)
	}
	if w.doc.Previous != nil && w.doc.Previous.Body[r.Field] != m.Secret && w.doc.Previous.Body[r.Field] != "" {
		w.violateLocked("at rest an earlier version of the document can still be read")
	}
}

// checkUnits: of the roles of a unit the document shows what all serve now, or what
// all served before.
func (w *world) checkUnits() {
	for _, r := range w.roles {
		run := r.Run
		if run == nil || run.urgent() || run.Unit == 0 || run.To == 0 || w.shape.strategy == kind.Swap {
			continue
		}
		for _, o := range w.roles {
			if o.Run == nil || o.Run.Rotation != run.Rotation || o.Run.Unit != run.Unit || o.Run.To == 0 {
				continue
			}
			if w.showsNew(r) != w.showsNew(o) {
				w.violateLocked("the document shows the new version of %s and the old one of %s: %s; %s", r.Name, o.Name, describe(r), describe(o))
			}
		}
	}
}

func (w *world) showsNew(r *Role) bool {
	v := r.Get(r.Run.To)
	return v != nil && w.doc.Body[r.Field] == v.Material.Secret
}

// checkTogether: the roles of a unit have come to the same end. Where a server
// knows one password only, one of several may fail when the rest are through.
func (w *world) checkTogether(h *Header) {
	succeeded := map[int]string{}
	for _, p := range h.Roles {
		if p.Unit == 0 || h.Trigger == Urgent || p.State == Superseded || w.shape.strategy == kind.Swap || w.roles[p.Role] == nil {
			continue
		}
		word := "went back"
		if p.State == Completed {
			word = "went forward"
		}
		if before, ok := succeeded[p.Unit]; ok && before != word {
			w.violateLocked("of one unit of rotation %s role %s %s, and others %s: %+v", h.ID, p.Role, word, before, h.Roles)
		}
		succeeded[p.Unit] = word
	}
}
