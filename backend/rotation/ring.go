package rotation

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Key rings. Consumers of a ring hold several keys: one that signs or encrypts,
// and others that only verify or decrypt. No server has to be told; what can go
// wrong is that one consumer uses a key before another has read it, or after
// another has forgotten it. So the next key is shown first, and used when
// everybody has had the time to read it; and a key that was ever used stays until
// nothing that was made with it counts any more, whatever became of its rotation.

// ring reports whether the role is a key ring.
func (r *Role) ring() bool { return r.Spec.Strategy == kind.KeyRing }

// announces reports whether the run shows a next key before it is used. At a
// create nobody verifies anything yet.
func (r *Role) announces() bool {
	t := r.Run.Trigger
	return r.ring() && t != Create && t != Reconcile && t != Retirement && t != Urgent
}

// tokens is how long a key is needed after the next one was promoted: the last
// consumer to read that may sign with the old one until then, and what it signs
// lasts as long as any. Zero for keys that encrypt.
func (r *Role) tokens() time.Duration {
	if r.Spec.MaxTokenTTL == 0 {
		return 0
	}
	return r.Spec.PropagationDelay + r.Spec.MaxTokenTTL
}

// shortened keeps what consumers were promised under spec was: to change it does not
// change what they have read and signed before.
func (r *Role) shortened(was kind.Spec, now time.Time) {
	before := &Role{Spec: was}
	if !r.ring() || !before.ring() {
		return
	}
	if r.Spec.PropagationDelay < was.PropagationDelay {
		r.ReadBy = later(r.ReadBy, now.Add(was.PropagationDelay))
	}
	if r.tokens() < before.tokens() {
		r.CountsUntil = later(r.CountsUntil, now.Add(before.tokens()))
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// ringTTL is for how long what creds/ answers may be kept: half of the time that
// consumers are given to read a change, and not beyond the next one.
func (r *Role) ringTTL(now time.Time) time.Duration {
	ttl := r.Spec.PropagationDelay / 2
	at := r.Next
	if run := r.Run; run != nil {
		if at = run.CheckUntil; run.Ahead && run.Phase != Check {
			return 0
		}
	}
	if !at.IsZero() && at.After(now) {
		ttl = min(ttl, at.Sub(now))
	}
	return max(ttl, time.Second)
}

// leaves is when an earlier key leaves the ring by itself; zero: never.
func (r *Role) leaves(v *version.Version) time.Time {
	switch {
	case !v.RetireAt.IsZero():
		return v.RetireAt
	case r.Spec.RetireAfter > 0 && !v.Replaced.IsZero():
		return v.Replaced.Add(r.Spec.RetireAfter)
	}
	return time.Time{}
}

// held is why an earlier key may not leave the ring yet, or "".
func (r *Role) held(v *version.Version) string {
	if r.Spec.RequireReencryptionAck && v.Acked.IsZero() {
		return fmt.Sprintf("what version %d of role %q encrypted has not been acknowledged as encrypted anew; "+
			"write ack/%s/%s version=%d when it has", v.Number, r.Name, r.Kind, r.Name, v.Number)
	}
	return ""
}

// retireAt is when the first of the earlier keys leaves by itself; zero: none
// does, or a rotation under way sees to it.
func (r *Role) retireAt() (first time.Time) {
	if !r.ring() || r.Run != nil {
		return first
	}
	for i := range r.Versions {
		v := &r.Versions[i]
		if v.Stage != version.Previous || r.held(v) != "" {
			continue
		}
		if at := r.leaves(v); !at.IsZero() && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// outdated names the keys that the retire phase takes out of the ring.
func (r *Role) outdated(now time.Time) (numbers []int) {
	run := r.Run
	for i := range r.Versions {
		v := &r.Versions[i]
		if v.Stage != version.Previous {
			continue
		}
		at := r.leaves(v)
		asked := run.Trigger == Retirement && run.Source == v.Number || run.RetireNow && run.From == v.Number
		if asked || !at.IsZero() && !at.After(now) && r.held(v) == "" {
			numbers = append(numbers, v.Number)
		}
	}
	return numbers
}

// crowded says why there is no room to show a next key, or "".
func (r *Role) crowded() string {
	v := r.With(version.Previous)
	if r.Run.urgent() && !r.decrypts() { // the earlier keys leave with this one
		return ""
	}
	if !r.Shows() || r.Spec.KeysField != "" || r.Spec.PublicJWKS || v == nil {
		return ""
	}
	if source := r.Get(r.Run.Source); source != nil && source.Material.Same(v.Material) {
		return "" // the two only swap places
	}
	return fmt.Sprintf("version %d of role %q is still needed, and what consumers read has room for one earlier key only; "+
		"retire it with retire/%s/%s version=%d, or wait until it retires", v.Number, r.Name, r.Kind, r.Name, v.Number)
}

// showRing fills the fields of a ring. Without a field of its own the next key
// travels in that of the previous one, and promotion swaps the two.
func (r *Role) showRing(k kind.Kind, fields map[string]string) error {
	ring, ok := k.(kind.Ring)
	if !ok {
		return kind.Definitely("this version of the engine does not know kind %q; install the one that does", r.Kind)
	}
	form := func(v *version.Version) (string, error) {
		if v == nil {
			return "", nil
		}
		return ring.Verifying(v.Material)
	}
	next, err := form(r.With(version.Next))
	if err != nil {
		return err
	}
	previous, err := form(r.With(version.Previous))
	if err != nil {
		return err
	}
	spec := r.Spec
	switch {
	case spec.NextField != "":
		fields[spec.NextField] = next
	case next != "":
		previous = next
	}
	if spec.PreviousField != "" {
		fields[spec.PreviousField] = previous
	}
	if spec.KeysField == "" {
		return nil
	}
	keys := map[string]string{}
	for _, v := range r.Ring() {
		if keys[v.Material.KeyID], err = form(&v); err != nil {
			return err
		}
	}
	raw, err := json.Marshal(keys) // sorted by id: the same keys are the same bytes
	fields[spec.KeysField] = string(raw)
	return err
}

// announce shows the next key to those who verify, before anybody uses it.
func (d *decider) announce() step {
	next := d.role.clone()
	next.advance(done, d.now) // apply → test
	next.advance(done, d.now) // test → publish, ahead
	next.Announce()
	next.Run.rest()
	next.limitPublish(d.now)
	return step{act: store, next: next}
}

// check waits until every consumer has had the time to read what was published.
func (d *decider) check() step {
	run := d.role.Run
	switch {
	case run.Recall != "":
		return d.takeBack(run.Recall)
	case d.now.Before(run.CheckUntil):
		return step{act: wait, until: run.CheckUntil}
	case run.Ahead:
		return d.promote(nil)
	}
	return d.afterCheck(d.role.clone())
}

// startCheck sets until when consumers may take to read what was published.
// After promotion those of keys that sign may take as long as the grace, which
// is longer.
func (d *decider) startCheck(next *Role) step {
	if !next.Run.Ahead && next.Spec.MaxTokenTTL > 0 {
		return d.afterCheck(next)
	}
	next.Run.CheckUntil = later(d.now.Add(next.Spec.PropagationDelay), next.ReadBy)
	return step{act: store, next: next}
}

// afterCheck leaves the second check. Keys that encrypt stay in their ring as
// long as they are needed, and no rotation waits for that.
func (d *decider) afterCheck(next *Role) step {
	next.advance(done, d.now) // check → grace
	if next.Spec.MaxTokenTTL == 0 && next.Run.Unit == 0 {
		next.Run.rest()
		return d.endAs(next, Completed, nil)
	}
	return d.afterGrace(next)
}

// dateKeys says when the keys leave that were replaced, and joins numbers that
// hold one key.
func (r *Role) dateKeys(now time.Time) {
	for i := range r.Versions {
		v := &r.Versions[i]
		if v.Stage != version.Previous {
			continue
		}
		if r.Served(v.Material) { // it is in use again, under the newer number
			v.Stage = version.Retired
			continue
		}
		if v.RetireAt.IsZero() {
			r.date(v.Number, now)
		}
	}
}

// date counts the time that a key is still needed from now on: consumers have
// read only now that another is in use.
func (r *Role) date(number int, now time.Time) {
	v := r.Get(number)
	if v == nil || v.Stage != version.Previous {
		return
	}
	v.Replaced = now
	if ttl := r.tokens(); ttl > 0 {
		v.RetireAt = later(now.Add(ttl), r.CountsUntil)
	}
}

// concludeRing records what has left the ring.
func (d *decider) concludeRing(next *Role) {
	run := next.Run
	switch {
	case run.Back: // what was used stays; what never was is gone
		if v := next.Get(run.To); v != nil && v.Stage == version.Failed && v.Refused.IsZero() {
			v.Refused = d.now
		}
	case run.Phase == Retire:
		next.LeaveCompromised(d.now)
		for _, number := range next.outdated(d.now) {
			next.Leave(number, d.now)
		}
	}
}

// inheritRing goes on with the keys of a deleted role: what they made still
// counts.
func (r *Role) inheritRing(now time.Time) {
	for i := range r.Versions {
		switch v := &r.Versions[i]; v.Stage {
		case version.Current:
			v.Stage, v.Replaced = version.Previous, now
		case version.Pending, version.Next:
			v.Stage, v.Refused = version.Failed, now
		default: // it is where it was
		}
	}
}

// leaveAll records that no key of a deleted role is in the ring.
func (r *Role) leaveAll(now time.Time) {
	for i := range r.Versions {
		if v := &r.Versions[i]; v.Refused.IsZero() {
			v.Refused = now
		}
	}
}

// goesOn refuses to create a role again with another key than it had: consumers
// that hold the keys of the deleted one would meet a key that they never saw.
func (r *Role) goesOn() *Conflict {
	return &Conflict{Text: fmt.Sprintf("role %q was deleted, and consumers may hold its keys; create it without initial_value and overwrite_existing, "+
		"so that it goes on with them, and then rotate/%s/%s", r.Name, r.Kind, r.Name)}
}

// TakeOver puts a key that was in use before the one that is being adopted in
// front of it: when it was replaced nobody knows, so its time counts from now.
func (r *Role) TakeOver(m kind.Material, now time.Time) {
	i := slices.IndexFunc(r.Versions, func(v version.Version) bool { return v.Number == r.Run.To })
	adopted := &r.Versions[i]
	earlier := version.Version{
		Number: adopted.Number, Stage: version.Previous, Material: m, Created: adopted.Created, Rotation: adopted.Rotation, Replaced: now,
	}
	if ttl := r.tokens(); ttl > 0 {
		earlier.RetireAt = now.Add(ttl)
	}
	r.Last++
	adopted.Number, r.Run.To = r.Last, r.Last
	r.Versions = slices.Insert(r.Versions, i, earlier)
}

// takenOut is why version number cannot leave the ring on request, or "".
func (r *Role) takenOut(number int) (*version.Version, string) {
	var earlier []*version.Version
	for i := range r.Versions {
		if v := &r.Versions[i]; v.Stage == version.Previous && (number == 0 || v.Number == number) {
			earlier = append(earlier, v)
		}
	}
	switch {
	case len(earlier) == 0 && number == 0:
		return nil, ""
	case len(earlier) == 0:
		return nil, fmt.Sprintf("version %d of role %q is not an earlier key of the ring; read roles/%s to see which are", number, r.Name, r.Name)
	case len(earlier) > 1:
		return nil, fmt.Sprintf("role %q has %d earlier keys; say which is to leave with version=%d", r.Name, len(earlier), earlier[0].Number)
	}
	return earlier[0], r.held(earlier[0])
}

// ringCriteria lists what a rotation of a ring has to show.
func ringCriteria(r *Role, run *Run) []Criterion {
	var kept []int
	for _, v := range r.Versions {
		if v.Stage == version.Previous {
			kept = append(kept, v.Number)
		}
	}
	slices.Sort(kept)
	detail := "every earlier key has left the ring"
	if len(kept) > 0 {
		detail = fmt.Sprintf("still in the ring, because what they made may still count: versions %v", kept)
	}
	if run.Trigger == Retirement {
		return []Criterion{{Name: "outdated keys have left the ring", Met: run.Retired || run.Phase == Retire, Detail: detail}}
	}
	return []Criterion{
		{Name: "new version served", Met: run.Promoted && !run.Back},
		{
			Name: "shown to every consumer before it was used", Met: run.Promoted,
			Detail: fmt.Sprintf("published %s before promotion", r.Spec.PropagationDelay),
		},
		{Name: "no key left while it was needed", Met: true, Detail: detail},
	}
}
