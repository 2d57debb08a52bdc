package rotation

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// isRefusal reports whether err is about the state of roles, not about storage.
func isRefusal(err error) bool {
	var c *Conflict
	return errors.As(err, &c) || errors.Is(err, ErrNotFound)
}

// change reads, changes and writes one role under its lock. What mutate
// refuses is not written.
func (e *Engine) change(ctx context.Context, name string, mutate func(*Role) error) error {
	if err := e.lockRole(ctx, name); err != nil {
		return err
	}
	defer e.locks.unlock(name)
	if err := e.st.settle(ctx); err != nil {
		return err
	}
	r, err := e.st.Role(ctx, name)
	if err != nil {
		return err
	}
	if r == nil {
		return fmt.Errorf("role %q: %w", name, ErrNotFound)
	}
	next := r.clone()
	if err := mutate(next); err != nil {
		return err
	}
	if err := e.putRole(ctx, r, next); err != nil {
		// It may have been written all the same, by then at the latest.
		e.wake(next.lane(), name, time.Now().Add(storageTimeout))
		return err
	}
	if next.Run != nil {
		e.wake(next.lane(), name, time.Now())
	}
	return nil
}

// Update changes a role's configuration. mutate gets a copy and may refuse. What
// Next it sets is taken as it is; a changed schedule sets one otherwise.
func (e *Engine) Update(ctx context.Context, name string, mutate func(*Role) error) error {
	return e.change(ctx, name, func(r *Role) error {
		before, stored, spec := r.Schedule, r.Next, r.Spec
		r.Next = time.Time{}
		if err := mutate(r); err != nil {
			return err
		}
		now := time.Now().UTC()
		r.shortened(spec, now)
		switch {
		case !r.Next.IsZero():
		case before != r.Schedule:
			r.Next = schedule.Next(r.Schedule, r.Name, now)
		default:
			r.Next = stored
			return nil
		}
		r.RetryAt = time.Time{}
		taken := r.Run != nil && !r.Run.Promoted // it is being served
		if !stored.IsZero() && !stored.After(now) && !taken {
			_, passed := schedule.Served(before, r.Name, stored, now)
			r.miss(schedule.Passed{Count: 1, Last: stored})
			r.miss(passed)
		}
		return nil
	})
}

// Creation asks for a new role.
type Creation struct {
	Role *Role
	// Initial is the secret that the role's user has already; nil: make one.
	Initial     *kind.Material
	Overwrite   bool
	Target      string // identity of the target, "" where there is none
	PlaceTarget string // the same of the Vault that the role is published to
	RequestedBy Requester
	// Restores is when the role was deleted that is brought back; zero: it is a new
	// one. Role is then what Tombstone.Revive returns.
	Restores time.Time
	// Check may refuse the role once nobody else can claim what it claims, and have
	// it take over an earlier key that it finds there.
	Check func(ctx context.Context, r *Role) error
}

// Create makes a role. Before anything is stored its target is asked whether
// it could work; then the first version comes about as a rotation of its own.
func (e *Engine) Create(ctx context.Context, c Creation) (*Header, error) {
	h := &Header{
		ID: newID(), Trigger: Create, RequestedBy: c.RequestedBy, Started: time.Now().UTC(),
		Roles: []Part{{Role: c.Role.Name, Kind: c.Role.Kind}}, Restores: !c.Restores.IsZero(),
	}
	if h.Restores {
		h.Reason = "restored: it was deleted at " + c.Restores.UTC().Format(time.RFC3339)
	}
	// From before the tombstone is read: a role of the same name may come and go
	// while the target is asked.
	name := c.Role.Name
	if err := e.lockRole(ctx, name); err != nil {
		return nil, err
	}
	defer e.locks.unlock(name)
	if err := e.st.settle(ctx); err != nil {
		return nil, err
	}
	if old, err := e.st.Role(ctx, name); err != nil || old != nil {
		if err == nil {
			err = &Conflict{Text: fmt.Sprintf("role %q was created by another request", name)}
		}
		return nil, err
	}
	r, err := e.newRole(ctx, c, h)
	if err != nil {
		return nil, err
	}
	if h.Restores { // whoever owns its user has changed the password, too
		if err := e.checkClaims(ctx, r.claims()); err != nil {
			return nil, err
		}
	}
	if err := e.precheck(ctx, r); err != nil {
		return nil, err
	}
	release, err := e.claim(ctx, r)
	if err != nil {
		return nil, err
	}
	defer release()
	if c.Check != nil {
		if err := c.Check(ctx, r); err != nil {
			return nil, err
		}
	}
	if err := e.openRotation(ctx, h, Request{}); err != nil {
		return nil, err
	}
	if err := e.putRole(ctx, nil, r); err != nil {
		e.wake(laneRecover, h.ID, time.Now().Add(storageTimeout))
		return nil, err
	}
	e.wake(r.lane(), r.Name, time.Now())
	return h, nil
}

func (e *Engine) newRole(ctx context.Context, c Creation, h *Header) (*Role, error) {
	now := time.Now()
	r := c.Role.clone()
	r.Created = now.UTC()
	r.Target, r.PlaceTarget = c.Target, c.PlaceTarget
	t, err := e.st.Tombstone(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if !c.Restores.IsZero() {
		return r.restored(t, c, h, now)
	}
	initial := c.Initial
	if t != nil {
		left := r.inherit(t)
		if initial == nil && !c.Overwrite && !r.kept() {
			initial = left
		}
		if r.ring() && left != nil && (initial == nil || !initial.Same(*left)) {
			return nil, r.goesOn()
		}
	}
	r.Run = newRun(h, now)
	r.Run.Overwrite = c.Overwrite
	r.mark(now, string(Preflight))
	if initial != nil {
		r.Run.To = r.Add(*initial, h.ID, now)
		r.Run.Adopted = true
	}
	return r, nil
}

// inherit goes on with the versions of a deleted role of the same name, and
// returns what its user was left with.
func (r *Role) inherit(t *Tombstone) *kind.Material {
	r.Set.Last = t.last()
	mine := t.about(r)
	if mine == nil {
		return nil
	}
	old := mine.Role
	current := old.With(version.Current)
	r.Versions = slices.Clone(old.Versions)
	if r.ring() && old.Spec.Algorithm == r.Spec.Algorithm {
		r.ReadBy, r.CountsUntil = old.ReadBy, old.CountsUntil
		r.shortened(old.Spec, time.Now().UTC())
		r.inheritRing(time.Now())
		return materialOf(current)
	}
	for i := range r.Versions {
		switch v := &r.Versions[i]; v.Stage {
		case version.Current, version.Previous, version.Pending, version.Next:
			v.Stage = version.Retired
		default: // it is where it was
		}
	}
	if r.ring() { // its keys are of another algorithm
		r.leaveAll(time.Now())
		return nil
	}
	return materialOf(current)
}

func materialOf(v *version.Version) *kind.Material {
	if v == nil {
		return nil
	}
	return &v.Material
}

// precheck asks the target, without changing anything, what a rotation of r
// would meet first.
func (e *Engine) precheck(ctx context.Context, r *Role) error {
	report, err := e.examine(ctx, []*Role{r})
	if err != nil {
		return err
	}
	if report[0].Err == nil {
		return nil
	}
	return &Conflict{Text: report[0].Err.Error()}
}

// claim takes for r what only one role may own: the user of its target, and
// its fields of a document. release gives back the locks under which they were
// taken; the claims themselves stay.
func (e *Engine) claim(ctx context.Context, r *Role) (release func(), err error) {
	claims := r.claims()
	keys := make([]string, len(claims))
	for i, c := range claims {
		keys[i] = c.key()
	}
	if release, err = e.locks.lockAll(ctx, keys); err != nil {
		return nil, err
	}
	if err := e.checkClaims(ctx, claims); err != nil {
		release()
		return nil, err
	}
	for _, c := range claims {
		if err := e.putClaim(ctx, c); err != nil {
			release()
			return nil, err
		}
	}
	return release, nil
}

func (e *Engine) checkClaims(ctx context.Context, claims []Claim) error {
	for _, c := range claims {
		if err := e.checkClaim(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) checkClaim(ctx context.Context, c Claim) error {
	owner, err := e.Owner(ctx, c.Target, c.Username)
	if err == nil && owner != "" && owner != c.Role {
		err = &Conflict{Text: c.taken(owner)}
	}
	return err
}

func (e *Engine) putClaim(ctx context.Context, c Claim) error {
	return storage.Put(ctx, e.st.s, c.key(), c, maxSmallEntry)
}

// documentTarget keeps documents apart from the identities of servers.
const documentTarget = "document:"

// placeTarget does so for secrets of other mounts.
const placeTarget = "place:"

// claims are what r owns alone.
func (r *Role) claims() []Claim {
	var out []Claim
	if r.Target != "" {
		for _, user := range r.Spec.Owns() {
			out = append(out, Claim{Role: r.Name, Target: r.Target, Username: user})
		}
	}
	for _, place := range r.places() {
		for _, field := range r.Fields() {
			out = append(out, Claim{Role: r.Name, Target: place, Username: field})
		}
	}
	return out
}

// Fields are those that the role fills where it is shown.
func (r *Role) Fields() []string {
	fields := []string{r.Field, r.UsernameField, r.Spec.PreviousField, r.Spec.NextField, r.Spec.KeysField}
	return slices.DeleteFunc(fields, func(f string) bool { return f == "" })
}

// placeTarget names the role's secret of another mount, whatever connection leads
// there.
func (r *Role) placeTarget() string {
	return placeTarget + r.PlaceTarget + ":" + r.Place.String()
}

func (r *Role) holds(key string) bool {
	return slices.ContainsFunc(r.claims(), func(c Claim) bool { return c.key() == key })
}

// Delete forgets a role. Its credential goes on working, and a tombstone keeps
// it for thirty days.
func (e *Engine) Delete(ctx context.Context, name string) error {
	if err := e.lockRole(ctx, name); err != nil {
		return err
	}
	defer e.locks.unlock(name)
	if err := e.st.settle(ctx); err != nil {
		return err
	}
	r, err := e.st.Role(ctx, name)
	if err != nil || r == nil {
		return err // deleting what does not exist succeeds, as everywhere in Vault
	}
	if r.Run != nil {
		return busy(r)
	}
	return e.bury(ctx, r)
}

// bury replaces a role by its tombstone and gives its claim back. The order
// matters: at no moment is the material in neither place.
func (e *Engine) bury(ctx context.Context, r *Role) error {
	if err := e.entomb(ctx, r); err != nil {
		return err
	}
	return e.remove(ctx, r)
}

// entomb keeps what a role holds, if it holds anything.
func (e *Engine) entomb(ctx context.Context, r *Role) error {
	dead := r.clone()
	dead.Run = nil
	if len(dead.Versions) == 0 {
		return nil
	}
	t := &Tombstone{Role: dead, Deleted: time.Now().UTC()}
	earlier, err := e.st.Tombstone(ctx, r.Name)
	if err != nil {
		return err
	}
	switch {
	case earlier == nil:
	case r.Root() || !r.sameUser(earlier.Role):
		earlier.Role.Profile = nil // it is found anew, and would crowd out credentials
		t.Earlier = earlier
	default: // the role has gone on with it, or this is done again
		t.Earlier = earlier.Earlier
	}
	return e.st.putTombstone(ctx, t)
}

// sameUser reports whether r and other are about the same user, so that the
// material of one tells what the other's target may accept.
func (r *Role) sameUser(other *Role) bool {
	return other.Kind == r.Kind && other.Target == r.Target && slices.Equal(other.Spec.Owns(), r.Spec.Owns())
}

func (e *Engine) remove(ctx context.Context, r *Role) error {
	if err := e.st.DeleteRole(ctx, r); err != nil {
		e.census.doubt(r.Name)
		return err
	}
	e.census.note(r.Name, nil)
	e.due.note(r.Name, time.Time{})
	return e.releaseClaims(ctx, r)
}

// releaseClaims gives back what r owned. The role is gone by now: a claim that
// stays because storage fails is stale, and is taken over.
func (e *Engine) releaseClaims(ctx context.Context, r *Role) error {
	for _, c := range r.claims() {
		if err := e.dropClaim(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) dropClaim(ctx context.Context, c Claim) error {
	if err := e.locks.lock(ctx, c.key()); err != nil {
		return nil // see releaseClaims
	}
	defer e.locks.unlock(c.key())
	held, err := storage.Get[Claim](ctx, e.st.s, c.key())
	if err != nil || held == nil || held.Role != c.Role {
		return nil // see releaseClaims
	}
	return e.st.s.Delete(ctx, c.key())
}

// RollBack reverses the running rotation of a role before its retire phase, or
// starts a new one that brings the newest retired material back.
func (e *Engine) RollBack(ctx context.Context, name string, req Request) (id string, err error) {
	reason := "rollback was asked for"
	if req.Reason != "" {
		reason += ": " + req.Reason
	}
	id, h, err := e.remembered(ctx, req)
	if err != nil {
		return "", err
	}
	var back *version.Version
	err = e.change(ctx, name, func(r *Role) error {
		switch {
		case r.kept():
			return noWayBack(r)
		case h != nil && (r.Run == nil || r.Run.Rotation != h.ID || slices.Contains(req.keys(), h.Request)):
			return errRepeated // it has ended, or is what this very request started
		case r.Run != nil:
			id = r.Run.Rotation
			return e.recall(ctx, r, reason, req)
		}
		if back = newest(r); back == nil {
			return &Conflict{Text: fmt.Sprintf("role %q keeps no earlier material to go back to", name)}
		}
		return errNoRun
	})
	switch {
	case err == nil, errors.Is(err, errRepeated):
		return id, nil
	case !errors.Is(err, errNoRun):
		return "", err
	}
	req.Trigger, req.Roles, req.Source = Rollback, []string{name}, back.Number
	if h, err = e.Begin(ctx, req); err != nil {
		return "", err
	}
	return h.ID, nil
}

var (
	errNoRun    = errors.New("no rotation is running")
	errRepeated = errors.New("the request was answered before")
)

// recall turns a run back for a request. The request is stored first: a repeat
// that comes after the run has ended must not start another way back.
func (e *Engine) recall(ctx context.Context, r *Role, reason string, req Request) error {
	if err := e.unitStays(ctx, r); err != nil {
		return err
	}
	if err := recallRun(r, reason); err != nil {
		return err
	}
	return e.remember(ctx, req, r.Run.Rotation)
}

// recallRun turns a run back, as far as it still can.
func recallRun(r *Role, reason string) error {
	run := r.Run
	if run.Back || run.Recall != "" {
		run.Again = false
		return nil // it is on its way
	}
	if r.asked() || run.committed() {
		return &Conflict{Rotation: run.Rotation, Text: fmt.Sprintf("role %q is in rotation %s: ", r.Name, run.Rotation) + advice(r)}
	}
	if run.Phase == Retire || run.Phase == Sync && run.Retired || run.Phase == Publish && !r.returnable() {
		return &Conflict{Rotation: run.Rotation, Text: fmt.Sprintf(
			"rotation %s of role %q is already retiring the previous version; wait until it has completed, "+
				"then rollback/%s/%s starts a rotation back", run.Rotation, r.Name, r.Kind, r.Name)}
	}
	run.Recall = clip(reason)
	run.RetryAt = time.Time{}
	return nil
}

// Cancel stops a rotation that has not retired anything: it rolls back.
func (e *Engine) Cancel(ctx context.Context, id, reason string) (*Header, error) {
	h, err := e.st.Header(ctx, id)
	if err != nil {
		return nil, err
	}
	if h == nil {
		return nil, fmt.Errorf("rotation %q: %w", id, ErrNotFound)
	}
	if h.State.Ended() {
		return e.cancelled(ctx, h, &Conflict{
			Rotation: id, Text: fmt.Sprintf("rotation %s has ended (%s); there is nothing to cancel", id, h.State),
		})
	}
	if err := e.cancelMissing(ctx, h); err != nil {
		return nil, err
	}
	if reason == "" {
		reason = "cancelled on request"
	}
	var refused error
	recalled := false
	for _, part := range e.cancelParts(ctx, h, reason) {
		switch {
		case part == nil:
			recalled = true
		case errors.Is(part, errNoRun):
		case isRefusal(part):
			refused = part
		default:
			return nil, part
		}
	}
	switch {
	case recalled:
		return h, nil
	case refused != nil:
		return nil, refused
	}
	return e.cancelled(ctx, h, &Conflict{
		Rotation: id, Text: fmt.Sprintf("rotation %s is over at every role; there is nothing to cancel", id),
	})
}

// cancelled answers a cancel that finds nothing more to do: one that comes again
// after it worked is not refused.
func (e *Engine) cancelled(ctx context.Context, h *Header, otherwise *Conflict) (*Header, error) {
	parts, err := e.st.AllParts(ctx, h)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(parts, func(p Part) bool { return p.State == RolledBack || p.State == Cancelled }) {
		return h, nil
	}
	return nil, otherwise
}

// cancelParts cancels the children and roles of a rotation, and returns what
// became of each.
func (e *Engine) cancelParts(ctx context.Context, h *Header, reason string) []error {
	var errs []error
	for _, child := range h.Children {
		_, err := e.Cancel(ctx, child, reason)
		errs = append(errs, err)
	}
	for _, p := range h.Roles {
		errs = append(errs, e.change(ctx, p.Role, func(r *Role) error {
			if r.Run == nil || r.Run.Rotation != h.ID {
				return errNoRun
			}
			if err := e.unitStays(ctx, r); err != nil {
				return err
			}
			return recallRun(r, reason)
		}))
	}
	return errs
}

// Retire ends the grace of a role now, or takes an earlier key out of its ring:
// number, or the only one there is. id is "" when there is nothing to retire.
func (e *Engine) Retire(ctx context.Context, name string, number int, req Request) (id string, err error) {
	id, h, err := e.remembered(ctx, req)
	if h != nil || err != nil {
		return id, err
	}
	var earlier *version.Version
	err = e.change(ctx, name, func(r *Role) error {
		if r.Run != nil {
			id = r.Run.Rotation
			if err := retireRun(r, number); err != nil {
				return err
			}
			return e.remember(ctx, req, id) // first: a repeat may come when the run has ended
		}
		if !r.ring() {
			return errNoRun
		}
		v, why := r.takenOut(number)
		if why != "" {
			return &Conflict{Text: why}
		}
		earlier = v
		return errNoRun
	})
	switch {
	case err == nil:
		return id, nil
	case !errors.Is(err, errNoRun):
		return "", err
	case earlier == nil:
		return "", nil
	}
	req.Trigger, req.Roles, req.Source = Retirement, []string{name}, earlier.Number
	if h, err = e.Begin(ctx, req); err != nil {
		return "", err
	}
	return h.ID, nil
}

// retireRun has a run in its grace period retire the previous version now.
func retireRun(r *Role, number int) error {
	run := r.Run
	switch {
	case number != 0 && number != run.From:
		return busy(r)
	case !run.Back && (run.Phase == Retire || run.Retired):
		return nil
	case run.Back || run.Phase != Grace:
		return &Conflict{Rotation: run.Rotation, Text: fmt.Sprintf(
			"rotation %s of role %q is in phase %s; only a rotation whose checks have passed can retire the previous version",
			run.Rotation, r.Name, run.Phase)}
	}
	run.RetireNow = true
	r.mark(time.Now(), "retire was asked for")
	return nil
}

// Acknowledge records that nothing needs an earlier key of a ring any more: what
// it encrypted has been encrypted anew.
func (e *Engine) Acknowledge(ctx context.Context, name string, number int) error {
	return e.change(ctx, name, func(r *Role) error {
		v := r.Get(number)
		switch {
		case v == nil:
			return fmt.Errorf("version %d of role %q: %w", number, name, ErrNotFound)
		case v.Stage == version.Current || v.Stage == version.Next || v.Stage == version.Pending:
			return &Conflict{Text: fmt.Sprintf("version %d of role %q is %s, and encrypts or soon will; rotate first, and acknowledge it when it is an earlier one", number, name, v.Stage)}
		case v.Acked.IsZero():
			v.Acked = time.Now().UTC()
		}
		return nil
	})
}

// ReconcileRole applies again what the target should accept. During a grace
// period the running rotation does it.
func (e *Engine) ReconcileRole(ctx context.Context, name string, req Request) (id string, err error) {
	id, h, err := e.remembered(ctx, req)
	if h != nil || err != nil {
		return id, err
	}
	err = e.change(ctx, name, func(r *Role) error {
		run := r.Run
		switch {
		case r.kept():
			return nothingToApply(r)
		case run == nil && r.With(version.Current) == nil:
			return &Conflict{Text: fmt.Sprintf("role %q has no current version to apply", name)}
		case run == nil:
			return errNoRun
		case run.Phase == Grace && !run.Back:
			run.Reapply = true
		case !run.Doubt:
			return busy(r)
		}
		id = run.Rotation
		run.vouchFor(time.Now())
		return nil
	})
	if err == nil {
		return id, e.remember(ctx, req, id)
	}
	if !errors.Is(err, errNoRun) {
		return "", err
	}
	req.Trigger, req.Roles = Reconcile, []string{name}
	if h, err = e.Begin(ctx, req); err != nil {
		return "", err
	}
	return h.ID, nil
}
