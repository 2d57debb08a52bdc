package rotation

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// Joint deliveries. Rotations that waited for the same consumers are brought there
// together: one sync, one restart, one check. That is all they share. Where it fails
// nobody can say whose fault it was, so that all go back together, and each that did not
// ask for it begins anew, alone (docs/adr/0008).

// party is a unit of a rotation, or a role of it that is alone (Unit is 0).
type party struct {
	Rotation string   `json:"rotation"`
	Unit     int      `json:"unit,omitempty"`
	Roles    []string `json:"roles"`
}

func (p party) is(r *Role) bool {
	return p.Rotation == r.Run.Rotation && slices.Contains(p.Roles, r.Name)
}

// joint is who shares a delivery.
type joint struct {
	ID      string  `json:"id"` // the rotation that made the reservation
	Parties []party `json:"parties"`
}

// told says with whom rotation id shares it.
func (j *joint) told(id string) string {
	var others []string
	for _, p := range j.Parties {
		if p.Rotation != id && !slices.Contains(others, p.Rotation) {
			others = append(others, p.Rotation)
		}
	}
	return fmt.Sprintf("its consumers are brought what %d rotations serve, with one restart; the others: %s", len(others)+1, strings.Join(others, ", "))
}

// Bounds on who is joined: each of its runs names them all.
const (
	maxParties    = 16
	maxJointRoles = 64
)

// joinable reports whether the delivery of a run may be shared. Going back is to cost
// the others nothing, which it would with swap, and nobody is to wait for what somebody
// has to decide. A ring is delivered twice.
func (r *Role) joinable() bool {
	swaps := r.Spec.Strategy == kind.Swap && r.Connection != ""
	return r.consults() && !swaps && !r.ring() && !r.HoldOnFailure && !r.Run.alone()
}

// queued reports whether a run waits for consumers, and may share them.
func (r *Role) queued(rotation string) bool {
	run := r.Run
	return run != nil && run.Rotation == rotation && run.Phase == Preflight && !run.Surveyed && run.Recall == "" && r.joinable()
}

// shares reports whether the run is in a joint delivery, or on the way to it or back
// from it.
func (run *Run) shares() bool { return run.Joint != nil && !run.Retired }

// alone: it went back with others once, and shares no delivery any more.
func (run *Run) alone() bool { return !run.Anew.IsZero() }

// waiting is who wants consumers that are another's, as of its last look.
type waiting struct {
	party
	consumers []string
	at        time.Time
}

// forgotten is after how long who does not look any more is not asked.
const forgotten = 30 * time.Second

// wantsLater remembers who waits, for whoever gets the same consumers.
func (e *Engine) wantsLater(p party, consumers []string, now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.waiting[p.key()] = waiting{p, slices.Sorted(slices.Values(consumers)), now}
}

func (p party) key() string { return p.Rotation + "/" + strings.Join(p.Roles, ",") }

// alsoWaiting are the others that wait for exactly the same consumers, as stored: whoever
// is in none of its own phases but preflight.
func (e *Engine) alsoWaiting(ctx context.Context, mine party, consumers []string, now time.Time) ([]party, error) {
	want := slices.Sorted(slices.Values(consumers))
	e.mu.Lock()
	delete(e.waiting, mine.key())
	var maybe []waiting
	for key, w := range e.waiting {
		if now.Sub(w.at) > forgotten {
			delete(e.waiting, key)
		} else if slices.Equal(w.consumers, want) {
			maybe = append(maybe, w)
		}
	}
	e.mu.Unlock()
	slices.SortFunc(maybe, func(a, b waiting) int { return strings.Compare(a.key(), b.key()) })
	out, many := []party{}, len(mine.Roles)
	for _, w := range maybe {
		roles, err := e.st.Roles(ctx, w.Roles)
		if err != nil {
			return nil, err
		}
		ready := !slices.ContainsFunc(roles, func(r *Role) bool { return r == nil || !r.queued(w.Rotation) })
		if !ready || len(out)+1 >= maxParties || many+len(roles) > maxJointRoles {
			continue
		}
		out, many = append(out, w.party), many+len(roles)
		e.mu.Lock()
		delete(e.waiting, w.key())
		e.mu.Unlock()
	}
	return out, nil
}

// reservation says whose a consumer is: of a unit, and of those that share its delivery.
type reservation struct {
	party
	Joined []party `json:"joined,omitempty"`
}

func (res *reservation) parties() []party { return append([]party{res.party}, res.Joined...) }

func (res *reservation) of(r *Role) bool {
	return slices.ContainsFunc(res.parties(), func(p party) bool { return p.is(r) })
}

// joint is who shares the delivery, nil where nobody does.
func (res *reservation) joint() *joint {
	if len(res.Joined) == 0 {
		return nil
	}
	return &joint{ID: res.Rotation, Parties: res.parties()}
}

// reserveFor takes the consumers of a role's unit, all or none, and with them those who
// wait for the same.
func (e *Engine) reserveFor(ctx context.Context, r *Role) (reserved, error) {
	if err := e.locks.lock(ctx, reservationsLock); err != nil {
		return reserved{}, err
	}
	defer e.locks.unlock(reservationsLock)
	if err := e.st.settle(ctx); err != nil {
		return reserved{}, err
	}
	mine, consumers, joins, err := e.partyOf(ctx, r)
	if err != nil {
		return reserved{}, err
	}
	made, waits, err := e.reservedBy(ctx, r, consumers)
	if err != nil {
		return reserved{}, err
	}
	if waits != "" {
		if joins {
			e.wantsLater(mine, consumers, time.Now())
		}
		return reserved{waits: waits}, nil
	}
	if made == nil {
		made = &reservation{party: mine}
		if joins {
			if made.Joined, err = e.alsoWaiting(ctx, mine, consumers, time.Now()); err != nil {
				return reserved{}, err
			}
		}
	}
	for _, c := range consumers {
		if err := storage.Put(ctx, e.st.s, storage.Reservation+c, made, maxSmallEntry); err != nil {
			return reserved{}, err
		}
	}
	e.wakeJoint(made.joint(), r.Name)
	return reserved{joint: made.joint()}, nil
}

// partyOf is the unit of a role, what it needs, and whether it may share that.
func (e *Engine) partyOf(ctx context.Context, r *Role) (p party, consumers []string, joins bool, err error) {
	p = party{Rotation: r.Run.Rotation, Unit: r.Run.Unit, Roles: []string{r.Name}}
	consumers, joins = slices.Clone(r.Consumers), r.queued(p.Rotation)
	if p.Unit == 0 {
		return p, consumers, joins, nil
	}
	if p.Roles, _, err = e.unitNames(ctx, r.Run.unitID()); err != nil {
		return p, nil, false, err
	}
	roles, err := e.st.Roles(ctx, p.Roles)
	if err != nil {
		return p, nil, false, err
	}
	for _, o := range roles {
		if o != nil {
			consumers = union(consumers, o.Consumers)
			joins = joins && o.queued(p.Rotation)
		}
	}
	return p, consumers, joins, nil
}

// reservedBy is the reservation that a role has a part in already, nil where it has
// none, and who else holds one of the consumers, or "".
func (e *Engine) reservedBy(ctx context.Context, r *Role, consumers []string) (made *reservation, waits string, err error) {
	for _, c := range consumers {
		held, err := storage.Get[reservation](ctx, e.st.s, storage.Reservation+c)
		if err != nil {
			return nil, "", err
		}
		if held == nil {
			continue
		}
		if r.queued(r.Run.Rotation) && held.of(r) { // an earlier look has made it, for all of them
			made = held
			continue
		}
		for _, p := range held.parties() {
			if p.is(r) {
				continue
			}
			busy, err := e.holds(ctx, held, p)
			if err != nil {
				return nil, "", err
			}
			if busy {
				return nil, fmt.Sprintf("consumer %q is another rotation's until it was checked (%s)", c, p.Rotation), nil
			}
		}
	}
	return made, "", nil
}

// holds reports whether a reservation is still needed by a party of it: until every role
// of that has come to its grace, to its end, or to where it goes on without the others.
func (e *Engine) holds(ctx context.Context, held *reservation, p party) (bool, error) {
	roles, err := e.st.Roles(ctx, p.Roles)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(roles, func(r *Role) bool {
		if r == nil || r.Run == nil || r.Run.Rotation != p.Rotation {
			return false
		}
		run := r.Run
		// A delivery that was shared is over for who begins anew, and for who goes back from
		// his grace: he needs a reservation of his own.
		left := len(held.Joined) > 0 && !run.Back && (run.alone() || run.Phase == Grace)
		over := !run.Back && run.Recall == "" && (run.Phase == Grace || run.Phase == Retire || run.Retired)
		return !over && !left
	}), nil
}

// everybody are the others that deliver with a role: those of its unit, and those that
// share its delivery.
func (u *unit) everybody() []member {
	if u == nil {
		return nil
	}
	return slices.Concat(u.others, u.joined)
}

// joinedOf reads where those of other rotations stand that share a role's delivery. Who
// has left it is none of them.
func (e *Engine) joinedOf(r *Role) ([]member, error) {
	ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
	defer cancel()
	var out []member
	if !r.Run.shares() {
		return nil, nil
	}
	for _, p := range r.Run.Joint.Parties {
		if p.Rotation == r.Run.Rotation && p.Unit == r.Run.Unit && (p.Unit != 0 || p.is(r)) {
			continue
		}
		roles, err := e.st.Roles(ctx, p.Roles)
		if err != nil {
			return nil, err
		}
		for i, o := range roles {
			if o != nil && o.Run != nil && o.Run.Rotation == p.Rotation && o.Run.joins(r.Run.Joint) {
				out = append(out, member{name: p.Roles[i], role: o})
			}
		}
	}
	return out, nil
}

// joins reports whether a run is in a joint delivery, or is to be and has not noted it
// yet.
func (run *Run) joins(j *joint) bool {
	if run.Joint != nil {
		return run.Joint.ID == j.ID && !run.Retired
	}
	return run.Phase == Preflight && !run.Surveyed && !run.alone()
}

// dropped: it went back before anything of it was shown.
func (m member) dropped() bool { return m.role.Run.Back && !m.role.Run.Promoted }

// past: its delivery is proven.
func (m member) past() bool {
	run := m.role.Run
	return !run.Back && (run.Phase == Grace || run.Phase == Retire || run.Retired)
}

// jointFailure is why a delivery that is shared goes back, or "".
func (u *unit) jointFailure() string {
	for _, m := range u.joined {
		if run := m.role.Run; run.Back && run.Promoted {
			return fmt.Sprintf("role %q, whose delivery is shared (rotation %s), goes back: %s", m.name, run.Rotation, run.Error)
		}
	}
	return ""
}

// jointlyAt reports whether all that share a delivery have come as far as phase p of it,
// on the way that self is on.
func (u *unit) jointlyAt(self *Run, p Phase) bool {
	for _, m := range u.joined {
		run := m.role.Run
		if m.dropped() || m.past() || run.Back && (run.Phase == Apply || run.Cleared) {
			continue
		}
		if run.Back != self.Back || !slices.Contains([]Phase{Sync, Restart, Check}, run.Phase) || deliveryRank[run.Phase] < deliveryRank[p] {
			return false
		}
	}
	return true
}

// jointlyBack reports whether all that share a delivery have turned back: from then on
// nothing new of them is brought anywhere.
func (u *unit) jointlyBack() bool {
	return !slices.ContainsFunc(u.joined, func(m member) bool { return !m.role.Run.Back && !m.past() })
}

// leftBack reports whether all that share a delivery have left its way back: what one of
// them clears is a delivery of its own.
func (u *unit) leftBack() bool {
	return !slices.ContainsFunc(u.joined, func(m member) bool {
		run := m.role.Run
		return run.Back && !run.Cleared && slices.Contains([]Phase{Sync, Restart, Check}, run.Phase)
	})
}

// again begins a run anew whose delivery failed together with others.
func (d *decider) again(next *Role) step {
	run := next.Run
	next.mark(d.now, "taken back together with others; it goes on alone")
	l, ok := next.follow(anew)
	if !ok {
		panic(fmt.Sprintf("no way to begin anew from %s", run.Phase))
	}
	next.Run = &Run{
		Rotation: run.Rotation, Trigger: run.Trigger, Phase: l.To, Source: run.Source, Unit: run.Unit,
		Started: run.Started, Deadline: d.now.Add(preflightTimeout), Anew: d.now.UTC(), Timeline: next.Run.Timeline,
	}
	next.Prune(next.keep(d.config))
	return step{act: store, next: next}
}

// wakeJoint has those that share a delivery look again.
func (e *Engine) wakeJoint(j *joint, except string) {
	if j == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, p := range j.Parties {
		t := e.tracks[p.Rotation]
		if t == nil {
			continue
		}
		for _, name := range p.Roles {
			if lane := t.lanes[name]; name != except && lane != "" && t.open[name] {
				e.wakeLocked(lane, name, time.Now())
			}
		}
	}
	e.nudge()
}
