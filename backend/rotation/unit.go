package rotation

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Units. The roles of a rotation that fill one document go forward or back
// together: none is promoted before all have passed their test, what they serve is
// published in one write, none retires before all have come as far as their grace,
// and when one goes back all do. The first that retires, each at the end of its own
// grace, ends the way back for all. Each role decides for itself, from what the others have stored: there is no
// entry of a unit that could disagree with theirs. Only the two decisions that
// exclude each other, to retire and to go back after promotion, are made one at a
// time (agreed).

// unitsOf numbers the roles that share a document, or a secret of another mount,
// with each other, directly or through a third; a role that shares none is left
// out.
func unitsOf(t Trigger, roles []*Role) map[string]int {
	if t == Reconcile {
		return nil // it publishes nothing
	}
	first := map[string]*Role{} // of each place
	leader := map[string]string{}
	var root func(name string) string
	root = func(name string) string {
		if up := leader[name]; up != "" && up != name {
			leader[name] = root(up)
			return leader[name]
		}
		return name
	}
	size := map[string]int{}
	for _, r := range roles {
		for _, place := range r.ties() {
			if first[place] == nil {
				first[place] = r
			}
			leader[root(r.Name)] = root(first[place].Name)
		}
	}
	for _, r := range roles {
		size[root(r.Name)]++
	}
	units, number := map[string]int{}, map[string]int{}
	for _, r := range roles {
		top := root(r.Name)
		if size[top] < 2 {
			continue
		}
		if number[top] == 0 {
			number[top] = len(number) + 1
		}
		units[r.Name] = number[top]
	}
	return units
}

// ties are what roles that share it go together for.
func (r *Role) ties() []string {
	out := r.places()
	for _, c := range r.Consumers {
		out = append(out, laneOfConsumer+c)
	}
	return out
}

// places name where the role is shown.
func (r *Role) places() (places []string) {
	if r.Document != "" {
		places = append(places, documentTarget+r.Document)
	}
	if !r.Place.Zero() {
		places = append(places, r.placeTarget())
	}
	return places
}

// Units groups the parts of a rotation by the units that go together. Numbers of
// different children say nothing about each other: those are not grouped.
func Units(h *Header, parts []Part) (units [][]Part) {
	at := map[int]int{}
	for _, p := range parts {
		i, known := at[p.Unit]
		if p.Unit == 0 || len(h.Children) > 0 || !known {
			at[p.Unit] = len(units)
			units = append(units, []Part{p})
			continue
		}
		units[i] = append(units[i], p)
	}
	return units
}

func (h *Header) unit(role string) int {
	for _, p := range h.Roles {
		if p.Role == role {
			return p.Unit
		}
	}
	return 0
}

// member is where a role of the same unit stands.
type member struct {
	name  string
	role  *Role // nil when it was deleted, or has no part in the rotation any more
	ended State // its outcome, where it has one
	late  bool  // it has not begun yet
	batch int   // of an emergency that it has ended: its last delivery
}

// unit is where the others of a role's unit stand, as stored.
type unit struct {
	others []member
	joined []member // those of other rotations that share the delivery
	now    time.Time
}

// all reports whether every other role that still counts is so.
func (u *unit) all(is func(m member) bool) bool {
	for _, m := range u.others {
		if m.gone() {
			continue
		}
		if !is(m) {
			return false
		}
	}
	return true
}

// gone: the role was deleted in the middle of its rotation. The others do not wait
// for it, and do not go back because of it.
func (m member) gone() bool { return m.role == nil && m.ended == "" && !m.late }

func (m member) run() *Run {
	if m.role == nil || m.late || m.ended != "" {
		return nil
	}
	return m.role.Run
}

// ready: it may be promoted, or was.
func (u *unit) ready(m member) bool {
	run := m.run()
	if run == nil {
		return m.ended == Completed
	}
	waits := run.Phase == Promote || run.Ahead && run.Phase == Check && m.role.seen(u.now)
	return !run.Back && run.Recall == "" && waits || run.Promoted && !run.Back
}

// seen reports whether consumers know the next key of a ring: it was proven, or they
// have had the time to read it.
func (r *Role) seen(now time.Time) bool {
	run := r.Run
	return !now.Before(run.CheckUntil) && (!r.consults() || !run.CheckUntil.IsZero())
}

// shown: its next key may be published, if it has one.
func (u *unit) shown(m member) bool {
	run := m.run()
	if run == nil {
		return m.ended == Completed
	}
	return !m.role.announces() || run.Ahead || run.Promoted
}

// promoted: what it serves now may be published.
func (u *unit) promoted(m member) bool {
	run := m.run()
	return run == nil && m.ended == Completed || run != nil && run.Promoted && !run.Back
}

// arrived: it has come as far as its grace, and nobody has asked to take it back.
func (u *unit) arrived(m member) bool {
	run := m.run()
	switch {
	case run == nil:
		return m.ended == Completed
	case run.Back:
		return false
	case run.Phase == Retire || run.Retired:
		return true
	}
	return run.Phase == Grace && run.Recall == ""
}

// leaving: it is about to publish that its previous version is gone. One whose
// server does not answer is not counted.
func (u *unit) leaving(m member) bool {
	run := m.run()
	if run == nil || run.Back || run.Retired || run.Tries > 0 {
		return false
	}
	return run.Phase == Retire || run.Phase == Grace && (run.RetireNow || !u.now.Before(run.GraceUntil))
}

// settledBack: nothing of it is shown that would have to be taken back.
func (u *unit) settledBack(m member) bool {
	run := m.run()
	return run == nil || run.Back && !m.role.swapping() || !run.Promoted && !run.Ahead
}

// failure is why the unit goes back, or "".
func (u *unit) failure() string {
	for _, m := range u.others {
		switch run := m.run(); {
		case run != nil && run.Back:
			return fmt.Sprintf("role %q, of the same unit, is rolled back: %s", m.name, run.Error)
		case m.ended != "" && m.ended != Completed:
			return fmt.Sprintf("role %q, of the same unit, did not succeed (%s)", m.name, m.ended)
		}
	}
	return ""
}

// succeeding is the unit without those that went back when the rest no longer
// could.
func (u *unit) succeeding() *unit {
	rest := &unit{now: u.now}
	for _, m := range u.others {
		if run := m.run(); run != nil && !run.Back || m.ended == Completed || m.late {
			rest.others = append(rest.others, m)
		}
	}
	return rest
}

// fixed is a role that can no longer go back, or "".
func (u *unit) fixed() string {
	for _, m := range u.others {
		run := m.run()
		if m.ended == Completed || run != nil && (run.Retired || run.Phase == Retire && !run.Back) {
			return m.name
		}
		if run != nil && run.Promoted && !run.Back && !m.role.returnable() {
			return m.name
		}
	}
	return ""
}

// unitPause is how often a role that waits for its unit looks by itself. Whoever
// it waits for wakes it.
const unitPause = 15 * time.Second

// joint reports whether a role has to know where its unit stands.
func (d *decider) joint() bool {
	run := d.role.Run
	if run.shares() && (d.role.isDelivery(run.Phase) || run.Phase == Publish && run.Back) {
		return true
	}
	if run.Unit == 0 {
		return false
	}
	switch run.Phase {
	case Preflight:
		return run.alone()
	case Promote, Publish, Sync, Restart, Check, Grace:
		return true
	case Generate:
		return d.last() && !run.urgent()
	default: // the rest each does for itself
		return false
	}
}

// last reports whether the role is one whose server forgets the current password
// when it hears of the new one. Such roles apply when all others are ready, and are
// promoted as soon as they are proven: until then what they serve is refused. Where
// a unit has several, one of them can fail when it is too late for the rest: that
// what is served works comes before that all go together.
func (d *decider) last() bool {
	return d.role.Spec.Strategy == kind.Swap && !d.targetless && d.role.Run.Trigger != Create
}

// together holds a role back until its unit has come as far, or turns it round
// with its unit. ok is false when the role may go on by itself.
func (d *decider) together() (s step, ok bool) {
	run, u := d.role.Run, d.facts.unit
	if run.urgent() {
		return d.gather()
	}
	if run.Phase == Preflight { // what went back with it begins anew, too
		return d.await(u.all(func(m member) bool { return m.run() == nil || !m.role.Run.Back }))
	}
	if run.Back && d.role.isDelivery(run.Phase) {
		return d.await(u.alongside(d.role, run.Phase) && u.jointlyAt(run, run.Phase))
	}
	if run.Cleared && run.Phase == Publish { // one write, or one of them would show again what another has cleared
		return d.await(u.all(func(m member) bool { return m.run() == nil || m.role.lingering() == nil }) && u.leftBack())
	}
	if run.Back {
		return d.await(run.Phase != Publish || u.all(u.settledBack) && u.jointlyBack())
	}
	if run.Retired && run.Phase != Publish {
		return step{}, false
	}
	if run.Retired {
		return d.await(u.succeeding().all(func(m member) bool { return !u.leaving(m) })) // one write for those that retire together
	}
	if s, ok := d.turn(); ok {
		return s, true
	}
	if u.failure() != "" {
		u = u.succeeding()
	}
	switch {
	case run.Phase == Generate:
		return d.await(u.all(func(m member) bool { return u.ready(m) || m.run() != nil && m.last() && m.role.Run.Phase != Preflight }))
	case run.Phase == Promote, run.Phase == Check && run.Ahead && d.role.seen(d.now):
		return d.await(u.all(u.ready))
	case run.Phase == Publish && run.Ahead:
		return d.await(u.all(u.shown))
	case run.Phase == Publish:
		return d.await(u.all(u.promoted))
	case d.role.isDelivery(run.Phase):
		return d.await(u.alongside(d.role, run.Phase) && u.jointlyAt(run, run.Phase))
	case run.Phase == Grace && d.graceOver():
		return d.await(u.all(u.arrived))
	}
	return step{}, false
}

func (m member) last() bool {
	return m.role.Spec.Strategy == kind.Swap && m.role.Connection != ""
}

func (d *decider) await(reached bool) (step, bool) {
	if reached {
		return step{}, false
	}
	// The same moments for everybody who looks in between: each look waits for the
	// next of them, and they must not add up.
	return step{act: wait, until: d.now.UTC().Truncate(unitPause).Add(unitPause)}, true
}

// turn goes back with the unit, or says that it is too late for that.
func (d *decider) turn() (step, bool) {
	run, u := d.role.Run, d.facts.unit
	why := run.Recall
	if run.shares() && d.role.isDelivery(run.Phase) {
		why = u.jointFailure() // a recall is heard when the delivery is over
	}
	if why == "" {
		why = u.failure()
	}
	if why == "" {
		return step{}, false
	}
	stuck := u.fixed()
	if stuck == "" && run.Promoted && !d.role.returnable() {
		stuck = d.role.Name
	}
	if stuck != "" {
		if run.Recall == "" {
			return step{}, false
		}
		next := d.role.clone()
		next.Run.Recall = ""
		next.mark(d.now, fmt.Sprintf("not taken back: role %q, of the same unit, can no longer go back", stuck))
		return step{act: store, next: next}, true
	}
	if run.Phase == Promote || run.Phase == Generate {
		return d.event(recall, why), true
	}
	if s, ok := d.reserveBack(); ok {
		return s, true
	}
	return d.turnBack(why), true
}

// graceOver reports whether the role's grace has ended.
func (d *decider) graceOver() bool {
	run := d.role.Run
	return run.RetireNow || !d.now.Before(run.GraceUntil)
}

// guarded has a step stored only if the unit still agrees when it is.
func (d *decider) guarded(s step) step {
	if u := d.facts.unit; u != nil {
		stays := d.role.Run.Promoted && !d.role.returnable()
		s.guard = func(u *unit) bool {
			if u.failure() != "" && (stays || u.fixed() != "") {
				u = u.succeeding()
			}
			return u.all(u.arrived)
		}
	}
	return s
}

// unitID is what the runs of a unit have in common.
type unitID struct {
	rotation string
	number   int
}

func (run *Run) unitID() unitID { return unitID{run.Rotation, run.Unit} }

// meet reads where the units of jobs stand, each unit once.
func (e *Engine) meet(jobs []*job) []*job {
	byUnit := map[unitID][]*job{}
	for _, j := range jobs {
		byUnit[j.role.Run.unitID()] = append(byUnit[j.role.Run.unitID()], j)
	}
	var live []*job
	for id, jobs := range byUnit {
		ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
		u, err := e.unitOf(ctx, id)
		cancel()
		if err != nil {
			e.o.Logger.Warn("the roles of a unit cannot be read; trying again", "rotation", id.rotation, "unit", id.number, "error", err)
		}
		for _, j := range jobs {
			if err != nil {
				e.wake(j.role.lane(), j.role.Name, time.Now().Add(rereadPause(err)))
				continue
			}
			j.facts.unit = u.but(j.role.Name)
			joined, unread := e.joinedOf(j.role)
			if unread != nil {
				e.wake(j.role.lane(), j.role.Name, time.Now().Add(rereadPause(unread)))
				continue
			}
			j.facts.unit.joined = joined
			e.settleFor(j.role, j.facts.unit)
			live = append(live, j)
		}
	}
	return live
}

// unitStays refuses to take a role back whose unit can no longer go with it.
func (e *Engine) unitStays(ctx context.Context, r *Role) error {
	run := r.Run
	if run.Unit == 0 || !run.Promoted || run.Back {
		return nil
	}
	u, err := e.unitOf(ctx, run.unitID())
	if err != nil {
		return err
	}
	if stuck := u.but(r.Name).fixed(); stuck != "" {
		return &Conflict{Rotation: run.Rotation, Text: fmt.Sprintf(
			"role %q, of the same unit in rotation %s, can no longer go back; wait until role %q has completed, then rollback/%s/%s starts a rotation back",
			stuck, run.Rotation, r.Name, r.Kind, r.Name)}
	}
	return nil
}

// but is what the unit is to one of its roles.
func (u *unit) but(name string) *unit {
	return &unit{now: u.now, others: slices.DeleteFunc(slices.Clone(u.others), func(m member) bool { return m.name == name })}
}

// unitOf reads where all roles of a unit stand.
func (e *Engine) unitOf(ctx context.Context, id unitID) (*unit, error) {
	if err := e.st.settle(ctx); err != nil {
		return nil, err
	}
	if id.number == 0 { // each is alone
		return &unit{now: time.Now()}, nil
	}
	names, started, err := e.unitNames(ctx, id)
	if err != nil {
		return nil, err
	}
	u := &unit{now: time.Now()}
	roles, err := e.st.Roles(ctx, names)
	if err != nil {
		return nil, err
	}
	for i, name := range names {
		m, err := e.member(ctx, name, roles[i], id.rotation, started)
		if err != nil {
			return nil, err
		}
		u.others = append(u.others, m)
	}
	return u, nil
}

func (e *Engine) unitNames(ctx context.Context, id unitID) (names []string, started time.Time, err error) {
	e.mu.Lock()
	t := e.tracks[id.rotation]
	e.mu.Unlock()
	var h *Header
	if t != nil {
		h = t.header
	} else if h, err = e.st.Header(ctx, id.rotation); err != nil || h == nil {
		return nil, started, err
	}
	for _, p := range h.Roles {
		if p.Unit == id.number {
			names = append(names, p.Role)
		}
	}
	return names, h.Started, nil
}

func (e *Engine) member(ctx context.Context, name string, r *Role, id string, started time.Time) (member, error) {
	m := member{name: name}
	if r != nil && r.Run != nil && r.Run.Rotation == id {
		m.role = r
		return m, nil
	}
	ev, err := e.st.Evidence(ctx, id, name)
	if ev != nil {
		m.batch = ev.Batch
	}
	switch {
	case err != nil:
		return m, err
	case r == nil:
		return m, nil // it was deleted
	case ev != nil && ev.State == Superseded:
		return m, nil // an emergency has taken it over: the others go on without it
	case ev != nil:
		m.ended = ev.State
	case r.Run != nil || r.LastRun != nil && r.LastRun.At.After(started):
		m.ended = Superseded // it never began; see resumePart
	default:
		m.late = true
	}
	return m, nil
}

// settleFor tells those who wait for a role's answer that it waits for consumers of
// another one.
func (e *Engine) settleFor(r *Role, u *unit) {
	for _, m := range u.others {
		if run := m.run(); run != nil && run.Phase == Check && r.Run.Phase == Promote {
			e.settlePart(r)
			return
		}
	}
}

// unitLock keeps the locks of units apart from those of roles.
const unitLock = "unit/"

// agreed stores a step that has to fit what the rest of the unit does: what the
// others have stored is read again, and nobody of the unit can store such a step
// of its own meanwhile. It reports whether the step was stored.
func (e *Engine) agreed(ctx context.Context, j *job, put func() error) (bool, error) {
	if j.step.guard == nil {
		return true, put()
	}
	id := j.role.Run.unitID()
	key := fmt.Sprintf("%s%s/%d", unitLock, id.rotation, id.number)
	if err := e.locks.lock(ctx, key); err != nil {
		return false, err
	}
	defer e.locks.unlock(key)
	u, err := e.unitOf(ctx, id)
	if err != nil {
		return false, err
	}
	if !j.step.guard(u.but(j.role.Name)) {
		j.facts.unit = nil // it is looked at again
		return false, nil
	}
	return true, put()
}

// wakeUnit has the others of a role's unit look again.
func (e *Engine) wakeUnit(id string, n int, except string) {
	if n == 0 {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	t := e.tracks[id]
	if t == nil {
		return
	}
	for _, p := range t.header.Roles {
		if lane := t.lanes[p.Role]; p.Unit == n && p.Role != except && lane != "" && t.open[p.Role] {
			e.wakeLocked(lane, p.Role, time.Now())
		}
	}
	e.nudge()
}
