package rotation

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// A deleted role comes back by the rotation that creates a role: what it served is
// adopted, under a new number, once a fresh login has proven it, and only when the
// role is stored is its tombstone removed. What differs is that the role is what it
// was, and that nothing is taken away from anybody: where it was deleted in the
// middle of a rotation, clients may still have what that had left accepted.

// Until is until when the role can be brought back.
func (t *Tombstone) Until() time.Time { return t.Deleted.Add(tombstoneAge) }

// about is what t, or an earlier role of its name, left of the user of r; nil for
// nothing.
func (t *Tombstone) about(r *Role) *Tombstone {
	for ; t != nil; t = t.Earlier {
		if r.sameUser(t.Role) {
			return t
		}
	}
	return nil
}

// without is what stays when one of them goes.
func (t *Tombstone) without(gone *Tombstone) *Tombstone {
	switch {
	case t == nil:
		return nil
	case t == gone:
		return t.Earlier
	}
	t.Earlier = t.Earlier.without(gone)
	return t
}

// last is the highest number that a role of the name has used.
func (t *Tombstone) last() (last int) {
	for ; t != nil; t = t.Earlier {
		last = max(last, t.Role.Set.Last)
	}
	return last
}

// Remains are what deleted roles of a name left that can be brought back, the last
// deleted first.
func (st *Store) Remains(ctx context.Context, name string) ([]*Tombstone, error) {
	t, err := st.Tombstone(ctx, name)
	if err != nil || t == nil {
		return nil, err
	}
	r, err := st.Role(ctx, name)
	if err != nil {
		return nil, err
	}
	var gone *Tombstone // the role has gone on with it, and it is about to be removed
	if r != nil && r.With(version.Current) != nil {
		gone = t.about(r)
	}
	var out []*Tombstone
	for ; t != nil; t = t.Earlier {
		if t != gone && time.Now().Before(t.Until()) {
			out = append(out, t)
		}
	}
	return out, nil
}

// DeletedNames lists the roles that people have made and deleted.
func (st *Store) DeletedNames(ctx context.Context) ([]string, error) {
	names, err := st.s.List(ctx, storage.Deleted)
	return slices.DeleteFunc(names, IsRoot), err
}

// Revive returns what the role is to be: what it was given, and nothing of what it
// was doing. Its schedule goes on in the future.
func (t *Tombstone) Revive(now time.Time) *Role {
	r := t.Role.clone()
	r.Spec.Role, r.Given.Role = r.Name, r.Name
	r.Set, r.Run, r.LastRun, r.Drift = version.Set{}, nil, nil, nil
	r.Failures, r.RetryAt, r.Unmended = 0, time.Time{}, 0
	r.Restored, r.Beside = "", 0
	r.SetAutoReconcile(r.AutoReconcile, now)
	if !r.Next.After(now) {
		r.Next = schedule.Next(r.Schedule, r.Name, now)
	}
	return r
}

// Accepted are the numbers of the versions that a target may accept, whatever their
// stage.
func (t *Tombstone) Accepted() (numbers []int) {
	for _, v := range t.Role.Versions {
		if t.Role.Connection != "" && !t.Role.kept() && (v.Stage == version.Current || v.Refused.IsZero() && !t.Role.Served(v.Material)) {
			numbers = append(numbers, v.Number)
		}
	}
	return numbers
}

// restored makes r, which is what its tombstone revives, the role that it was.
func (r *Role) restored(t *Tombstone, c Creation, h *Header, now time.Time) (*Role, error) {
	mine := t.about(r)
	if err := r.mayReturn(t, mine, c, now); err != nil {
		return nil, err
	}
	old := mine.Role
	left := r.inherit(t)
	r.Restored = h.ID
	r.Run = newRun(h, now)
	r.Run.Restores, r.Run.Overwrite = true, c.Overwrite
	r.mark(now, string(Preflight))
	switch {
	case r.kept(): // what is there is taken as it is found
	case old.exposed():
		r.Compromise(r.decrypts(), now)
	case left != nil:
		r.goOnWith(old, *left, now)
		if !c.Overwrite {
			r.keepBeside(old.leftBeside())
		}
	default: // there never was anything, and something is made
	}
	return r, nil
}

// mayReturn refuses to restore what cannot be what it was.
func (r *Role) mayReturn(t, mine *Tombstone, c Creation, now time.Time) error {
	asked := t
	for asked != nil && !asked.Deleted.Equal(c.Restores) {
		asked = asked.Earlier
	}
	switch {
	case asked == nil || !now.Before(asked.Until()):
		return &Conflict{Text: fmt.Sprintf("role %q was restored or deleted by another request; read deleted/%s", r.Name, r.Name)}
	case !r.sameUser(asked.Role):
		return &Conflict{Text: fmt.Sprintf("connection %q leads to another server than the one that role %q had its user at; "+
			"let it lead there again, or write roles/%s anew for this one, with initial_password", r.Connection, r.Name, r.Name)}
	case asked != mine:
		return &Conflict{Text: fmt.Sprintf("a role %q of the same user was deleted after that, at %s, and has gone on with it; restore that one",
			r.Name, mine.Deleted.UTC().Format(time.RFC3339Nano))}
	}
	old := asked.Role
	switch {
	case c.Overwrite || r.kept():
		return nil
	case old.exposed():
		return &Conflict{Text: fmt.Sprintf("role %q was deleted in the middle of emergency %s, so version %d is known to others; "+
			"restore it with overwrite_existing=true, which makes a new version and has every earlier one refused",
			r.Name, old.LastRun.Rotation, numberOf(old.With(version.Current)))}
	case old.With(version.Current) == nil:
		return &Conflict{Text: fmt.Sprintf("role %q was deleted before it served anything; write roles/%s anew", r.Name, r.Name)}
	}
	return nil
}

// exposed reports whether the role was deleted in an emergency that had not replaced
// what it served.
func (r *Role) exposed() bool {
	end, current := r.LastRun, r.With(version.Current)
	return end != nil && end.Trigger == Urgent && end.State == Cancelled && current != nil && current.Rotation != end.Rotation && !r.kept()
}

// goOnWith has the run adopt what old served. Where its server ends passwords by
// itself, it is to last as long as a new one.
func (r *Role) goOnWith(old *Role, left kind.Material, now time.Time) {
	was := old.With(version.Current)
	r.Run.To = r.Add(r.renewed(left, now), r.Run.Rotation, now)
	r.Run.Adopted = true
	v := r.Get(r.Run.To)
	v.CopyOf, v.Created = was.Number, was.Created
}

// putsBack reports whether the target is told what a restored role served even where it
// accepts that: its end may have to be put off, and what an earlier try has put there may
// be in a node's memory alone.
func (r *Role) putsBack() bool {
	adopted := r.Get(r.Run.To)
	if !r.Run.Restores || !r.Run.Adopted || adopted == nil {
		return false
	}
	tried := slices.ContainsFunc(r.Versions, func(v version.Version) bool {
		return v.Stage == version.Failed && v.Refused.IsZero() && v.Material.Same(adopted.Material)
	})
	return tried || r.Run.Overwrite || r.Spec.ValidFor > 0
}

// leftBeside is the version that clients may still have, because the rotation in
// which the role was deleted did not come to the end of it; 0 for none. What was
// never served nobody has, and what is known to others is not waited for.
func (r *Role) leftBeside() int {
	if v := r.beside(); v != nil {
		return v.Number
	}
	if end := r.LastRun; r.ring() || r.kept() || end == nil || end.State != Cancelled || end.Trigger == Urgent {
		return 0
	}
	for _, v := range slices.Backward(r.Versions) {
		failing := v.Stage == version.Failed && v.Rotation == r.LastRun.Rotation && !v.Promoted.IsZero()
		if (v.Stage == version.Previous || failing) && v.Refused.IsZero() && v.Compromised.IsZero() && !r.Served(v.Material) {
			return v.Number
		}
	}
	return 0
}

// keepBeside has a version stay accepted until a rotation has moved consumers.
func (r *Role) keepBeside(number int) {
	v := r.Get(number)
	if v == nil {
		return
	}
	r.Beside = number
	v.TakenBack = v.TakenBack || v.Stage == version.Failed
	v.Stage = version.Previous
}

// beside is the version that a restored role has left accepted beside the current
// one; nil for none, or while a rotation sees to its end.
func (r *Role) beside() *version.Version {
	v := r.Get(r.Beside)
	switch {
	case v == nil || v.Stage != version.Previous || !v.Refused.IsZero() || !v.Compromised.IsZero() || r.Served(v.Material):
		return nil
	case r.Run == nil || r.Run.Restores:
		return v
	case r.Run.Promoted || r.Run.Back || r.Run.urgent() || r.alternates():
		return nil
	}
	return v
}

// endBeside ends a restore that leaves a version accepted.
func (d *decider) endBeside(next *Role) step {
	v := next.beside()
	next.Run.rest()
	if !d.targetless {
		reason := fmt.Sprintf("the role was deleted in the middle of a rotation, and version %d is accepted beside the current one: "+
			"rotate/%s/%s ends that when consumers have moved, reconcile/%s/%s at once", v.Number, next.Kind, next.Name, next.Kind, next.Name)
		if len(next.Run.Missed) > 0 {
			reason += "; passed over: " + strings.Join(next.Run.Missed, ", ")
		}
		next.Drift = &Drift{Since: d.now, Reason: clip(reason)}
	}
	next.mark(d.now, fmt.Sprintf("version %d stays accepted until the next rotation has moved consumers", v.Number))
	return d.endAs(next, Completed, nil)
}

// refusesRestored is why what a deleted role served cannot be adopted at a node.
func (d *decider) refusesRestored(n kind.NodeAnswer, adopted *version.Version) string {
	r := d.role
	instead := ""
	for _, v := range slices.Backward(r.Versions) {
		i := slices.IndexFunc(d.facts.asked, v.Material.Same)
		if v.Number != adopted.Number && !v.Material.Same(adopted.Material) && i >= 0 && n.Accepts[i] {
			instead = fmt.Sprintf(", and accepts version %d", v.Number)
			break
		}
	}
	return fmt.Sprintf("node %s refuses version %d of user %q, which role %q served when it was deleted%s; "+
		"to have it accepted again restore with overwrite_existing=true, to adopt the password that is there now write roles/%s anew with initial_password",
		n.Node, adopted.CopyOf, r.inUse(), r.Name, instead, r.Name)
}
