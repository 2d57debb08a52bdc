package rotation

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Consumers. What is published is brought to who uses it, and only when every one
// of them was seen to work with it does grace begin:
//
//	… → publish → sync → restart → check → grace → …
//
// on the way back in the same order, before the target refuses what failed; where no
// server holds the secret, that stays shown as previous until then. The
// roles of a rotation that share a consumer are a unit, and its first role that has
// a consumer does the steps there for all; what it has done stands in its run. A
// consumer is one unit's from before anything is changed until it was checked: all
// consumers of a unit are reserved at once, or none (docs/model, consumers.pml). Those
// who wait for the same share one delivery (joint.go).

// Delivery is one time that what roles serve is brought to a consumer.
type Delivery struct {
	Consumer string
	// ID is the same for every step of the delivery, and no other one's.
	ID    string
	Since time.Time
	// Holds is what has to be there, and Lacks what must not be any more, by role.
	Holds, Lacks []Shown
	// Undone, on the way back, is what was shown between; that of key rings stays.
	Undone []Shown
	// Emergency is what else is to be done there; nil where there is none.
	Emergency *Emergency
	// Sure: a look counts only pods that are sure to run with what they are to hold, those
	// that the delivery ID has restarted or that began after their Secrets last changed,
	// and makes no checks.
	Sure bool
}

// Emergency is what a rotation after a compromise does at consumers beyond what every
// rotation does.
type Emergency struct {
	// Namespaces are restarted whole, where they are those of consumers.
	Namespaces []string `json:"namespaces,omitempty"`
	// Hooks are the names of those that are called; NoHooks: none is. Else all are.
	Hooks   []string `json:"hooks,omitempty"`
	NoHooks bool     `json:"no_hooks,omitempty"`
}

// Shown is a value that a role shows to consumers. It prints as its role alone.
type Shown struct {
	Role  string
	Field string // what it is called where it is published; "" where it has no name
	Value string
}

// Format implements fmt.Formatter for every verb.
func (s Shown) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.Role+": (secret)") }

// Progress is how far a step of a delivery is.
type Progress struct {
	Done bool
	// Err is why it is not; definite where waiting does not help.
	Err error
	// Waits is for what it waits, where nothing is wrong.
	Waits string
	// Told is what was done and seen, a line each.
	Told []string
	// Seen is the same of every object that was looked at.
	Seen *seen.Consumer
}

// Survey is what was found at a consumer before anything is changed.
type Survey struct {
	Err      error
	Problems []string
	Notes    []string
	Plan     []string
}

// Deliverer brings what roles serve to consumers. Each call is bounded by its
// context, idempotent, and does what can be done now.
type Deliverer interface {
	// Survey changes nothing. role is who asks: a consumer says which may use it.
	Survey(ctx context.Context, consumer, role string) Survey
	// Radius changes nothing. It says what an emergency would do at a consumer, and in
	// Notes what would stand against it there.
	Radius(ctx context.Context, consumer string, what Emergency) Survey
	// Deliver does what can be done now of step Sync, Restart or Check.
	Deliver(ctx context.Context, step Phase, d Delivery) Progress
	// Patience is how long step may take at a consumer, in all.
	Patience(ctx context.Context, consumer string, step Phase) (time.Duration, error)
	// Look shows how a consumer stands, and changes nothing. It answers with what could
	// be seen until its context ended. The ID of its delivery is that of the rotation
	// that made what is served, and Since when the consumer's Secrets got it.
	Look(ctx context.Context, d Delivery) *seen.Consumer
}

// pollPause is how soon a step that waits for a cluster is looked at again. While
// nothing moves that becomes less often, up to longestPoll.
const (
	pollPause   = 2 * time.Second
	longestPoll = 10 * time.Second
)

// delivered is how far a role has brought a consumer.
type delivered struct {
	Consumer string `json:"consumer"`
	Step     Phase  `json:"step"` // the last one that is done
	// Until, in an emergency, is until when the next one may take.
	Until time.Time `json:"until,omitzero"`
}

// delivers reports whether the run stops at its consumers.
func (r *Role) delivers() bool { return len(r.Consumers) > 0 }

// isDelivery reports whether phase p is one at consumers; a ring without any waits in
// check by the clock.
func (r *Role) isDelivery(p Phase) bool {
	return p == Sync || p == Restart || p == Check && r.consults()
}

var deliveryRank = map[Phase]int{"": 0, Sync: 1, Restart: 2, Check: 3}

// consults reports whether a run asks its consumers first, and stops at them. What is
// created is brought to them by the first rotation: they may be made after it.
func (r *Role) consults() bool {
	return r.delivers() && r.Run != nil && r.Run.Trigger != Create && r.Run.Trigger != Reconcile
}

// surveys reports whether preflight has still to ask the role's consumers.
func (r *Role) surveys() bool {
	return r.consults() && r.Run.Phase == Preflight && !r.Run.Surveyed && !r.Run.urgent() // nothing there stops an emergency
}

// deliveryID tells the ways of a rotation apart: what comes next of a ring, what is
// promoted, and what is taken back.
func (run *Run) deliveryID() string {
	way := "1"
	switch {
	case run.urgent():
		return run.emergencyID()
	case run.Ahead:
		way = "0"
	case run.Cleared, run.Retired:
		way = "3"
	case run.Back:
		way = "2"
	}
	if run.shares() { // one for all, and another one than that of a rotation alone
		return run.Joint.ID + "~" + way
	}
	return run.Rotation + "-" + way
}

// undeliveredOn goes on where no consumers are waited for.
func (d *decider) undeliveredOn(next *Role) step {
	for next.Run.Phase == Sync || next.Run.Phase == Restart {
		next.advance(done, d.now)
	}
	if next.announces() {
		return d.startCheck(next)
	}
	next.advance(done, d.now) // check → grace
	return d.afterGrace(next)
}

// undeliveredBack is the same on the way back.
func (d *decider) undeliveredBack(next *Role) step {
	for next.Run.Phase != Apply {
		next.advance(done, d.now)
	}
	return d.startUndo(next)
}

// wasShown reports whether consumers can have read what is taken back.
func (d *decider) wasShown(next *Role) bool { return next.Run.Promoted || next.ring() }

// enterDelivery is the beginning of the first phase at consumers.
func (d *decider) enterDelivery(next *Role) step {
	run := next.Run
	run.rest()
	run.Delivered, run.PublishedAt, run.CheckUntil = nil, d.now.UTC(), time.Time{}
	if run.urgent() {
		return d.enterRescue(next)
	}
	return step{act: store, next: next}
}

// deliver is a phase at consumers: what this role has to do there is done, and what
// others of its unit do is waited for.
func (d *decider) deliver() step {
	run, r := d.role.Run, d.role
	if run.urgent() {
		return d.rescue()
	}
	switch {
	case run.Recall != "" && !run.Back && !run.Retired && !run.shares(): // else when it is over
		return d.turnBack(run.Recall)
	case (run.Retired || run.Cleared) && d.expired(): // what is left is told, and holds up no other rotation
		next := d.role.clone()
		next.mark(d.now, "sync: given up: "+run.Error)
		if run.Cleared {
			return d.clearedAll(next)
		}
		return d.endAs(next, Completed, nil)
	case run.Held != "":
		return step{act: wait, until: d.now.Add(time.Hour)} // until somebody decides
	case d.facts.progress == nil && len(d.mine()) > 0:
		return step{act: bring}
	}
	waits := ""
	next := r.clone()
	for _, c := range d.mine() {
		p := d.facts.progress[c]
		for _, line := range p.Told {
			next.mark(d.now, fmt.Sprintf("%s: %s: %s", run.Phase, c, line))
		}
		switch {
		case p.Done:
			next.Run.reached(c, run.Phase)
		case p.Err != nil && kind.IsDefinite(p.Err):
			return d.failedDelivery(next, fmt.Sprintf("consumer %q: %v", c, p.Err))
		case p.Err != nil:
			waits = cmp.Or(waits, fmt.Sprintf("consumer %q: %v", c, p.Err))
		default:
			waits = cmp.Or(waits, fmt.Sprintf("consumer %q: %s", c, p.Waits))
		}
	}
	switch {
	case waits != "" && d.expired() && !run.Back && !run.Retired:
		return d.failedDelivery(next, late(run.Phase)+waits)
	case waits != "":
		return d.pollAgain(next, waits)
	}
	if !slices.Equal(next.Run.Delivered, run.Delivered) {
		return step{act: store, next: next}
	}
	if other := d.undelivered(); other != "" {
		return step{act: wait, until: d.now.Add(pollPause)}
	}
	return d.deliveredAll(next)
}

// late says what to do about consumers that take longer than they may.
func late(p Phase) string {
	if p == Sync {
		return "not in time: "
	}
	return "not in time (mend it, or raise rollout_timeout): "
}

// pollAgain looks again in a moment; what is waited for is stored when it changes.
func (d *decider) pollAgain(next *Role, waits string) step {
	run := next.Run
	waits = clip(waits)
	same := d.role.Run.Error == waits && slices.Equal(run.Delivered, d.role.Run.Delivered) && len(run.Timeline) == len(d.role.Run.Timeline)
	if same && !d.role.Run.Deadline.IsZero() {
		return step{act: wait, until: d.now.Add(d.stillPause())}
	}
	if run.Deadline.IsZero() {
		run.Deadline = d.now.Add(d.facts.patience)
	}
	run.Error, run.RetryAt = waits, d.now.Add(pollPause)
	for _, p := range d.facts.progress {
		if p.Err != nil { // something is wrong, and is not only waited for
			run.Tries++
			run.RetryAt = d.now.Add(max(pollPause, d.pause(run.Tries)))
			break
		}
	}
	return step{act: store, next: next}
}

// stillPause is until the next look while nothing moves: as long again as half the
// time since something did, which is when the pause that is stored began. It is never
// past the deadline.
func (d *decider) stillPause() time.Duration {
	run := d.role.Run
	pause := min(max(pollPause, d.now.Sub(run.RetryAt)/2), longestPoll)
	if left := run.Deadline.Sub(d.now); left > 0 {
		pause = min(pause, max(left, time.Millisecond))
	}
	return pause
}

// failedDelivery goes back, or holds where the role says so.
func (d *decider) failedDelivery(next *Role, why string) step {
	run := d.role.Run
	switch {
	case run.Back || run.Retired: // there is no way back from here
		return d.pollAgain(next, why)
	case d.role.HoldOnFailure && run.Promoted:
		next.Run.Held, next.Run.Error = clip(why), clip(why)
		next.mark(d.now, "held: "+why)
		return step{act: store, next: next}
	}
	return d.turnBack(why)
}

// turnBack takes back what is shown, with the unit.
func (d *decider) turnBack(why string) step {
	s := d.takeBack(why)
	if s.act != store || !s.next.Run.Back { // not yet
		return s
	}
	s.guard = func(u *unit) bool { return u.fixed() == "" }
	if d.role.Run.Unit == 0 {
		s.guard = nil
	}
	return s
}

// swapBack is for a target that knows one credential: it has to know the old one
// again before that is served. For as long as it cannot be told, what it knows works.
func (d *decider) swapBack(why string) step {
	next := d.role.clone()
	next.mark(d.now, "the previous material is put back, and consumers may be refused until they have it: "+why)
	next.Run.SwapsBack = true
	next.advance(recall, d.now) // → apply, on the way back
	next.Run.Error, next.Run.Why, next.Run.Held = clip(why), clip(why), ""
	return d.startUndo(next)
}

// deliveredAll leaves a phase at consumers.
func (d *decider) deliveredAll(next *Role) step {
	run := next.Run
	phase := run.Phase
	switch {
	case run.Retired && phase == Sync:
		return d.endAs(next, Completed, nil)
	case run.SwapsBack && phase == Check:
		return d.endAs(next, RolledBack, nil)
	case run.Cleared && phase == Sync:
		return d.clearedAll(next)
	case next.ring() && phase == Check && d.now.Before(next.readBy()):
		return step{act: wait, until: next.readBy()}
	case run.Ahead && phase == Check && run.Unit != 0 && run.CheckUntil.IsZero():
		run.CheckUntil = d.now // the others of the unit see it by that
		return step{act: store, next: next}
	}
	if phase != Check {
		next.advance(done, d.now)
		next.Run.rest()
		return step{act: store, next: next}
	}
	switch {
	case run.Back:
		if next.ring() {
			next.date(run.To, d.now) // they have signed with it until now
		}
		next.advance(done, d.now) // check → apply, on the way back
		return d.startUndo(next)
	case run.Ahead:
		return d.promote(nil)
	case next.ring():
		if !run.GraceUntil.IsZero() {
			run.beginGrace(d.now, next.Grace(d.config)) // counted from the proof: they have signed with the other until now
		}
		next.date(run.From, d.now)
		return d.afterCheck(next)
	}
	next.advance(done, d.now) // check → grace
	if !next.Run.GraceUntil.IsZero() {
		next.Run.beginGrace(d.now, next.Grace(d.config)) // counted from the proof
	}
	next.Run.rest()
	return d.afterGrace(next)
}

// clearedAll is the end of a way back on which what failed is not shown any more, which
// is what its refusal is; or a new beginning.
func (d *decider) clearedAll(next *Role) step {
	d.conclude(next)
	if next.Run.Again && next.Run.Recall == "" {
		return d.again(next)
	}
	return d.endAs(next, RolledBack, nil)
}

// readBy is when those that nobody has named have read what a ring shows, too. After
// promotion those of keys that sign may take as long as the grace.
func (r *Role) readBy() time.Time {
	if !r.Run.Ahead && r.Spec.MaxTokenTTL > 0 {
		return time.Time{}
	}
	return later(r.Run.PublishedAt.Add(r.Spec.PropagationDelay), r.ReadBy)
}

func (run *Run) reached(consumer string, step Phase) {
	for i := range run.Delivered {
		if run.Delivered[i].Consumer == consumer {
			run.Delivered[i].Step, run.Delivered[i].Until = step, time.Time{}
			return
		}
	}
	run.Delivered = append(slices.Clone(run.Delivered), delivered{Consumer: consumer, Step: step})
}

func (run *Run) stepAt(consumer string) Phase {
	for _, d := range run.Delivered {
		if d.Consumer == consumer {
			return d.Step
		}
	}
	return ""
}

// stepFor is the step that is done at a consumer now: that of the phase, but for an
// emergency, where no consumer waits for another one.
func (run *Run) stepFor(consumer string) Phase {
	if !run.urgent() {
		return run.Phase
	}
	return map[Phase]Phase{"": Sync, Sync: Restart, Restart: Check, Check: Check}[run.stepAt(consumer)]
}

// mine are the consumers that this role delivers to for its unit, and that are not
// done with this phase.
func (d *decider) mine() []string {
	var out []string
	phase := d.role.Run.Phase
	if d.role.Run.urgent() { // each goes on by itself
		phase = Check
	}
	for _, c := range d.role.Consumers {
		if d.leader(c) == d.role.Name && deliveryRank[d.role.Run.stepAt(c)] < deliveryRank[phase] {
			out = append(out, c)
		}
	}
	return out
}

// leader is the role of the unit that delivers to a consumer: the first that has it
// and is on the same way.
func (d *decider) leader(consumer string) string {
	first := d.role.Name
	for _, m := range d.facts.unit.everybody() {
		run := m.run()
		if run != nil && run.deliveryID() == d.role.Run.deliveryID() && m.name < first && slices.Contains(m.role.Consumers, consumer) {
			first = m.name
		}
	}
	return first
}

// undelivered names a consumer that another role of the unit is not done with, or
// "".
func (d *decider) undelivered() string {
	for _, c := range d.role.Consumers {
		name := d.leader(c)
		if name == d.role.Name {
			continue
		}
		for _, m := range d.facts.unit.everybody() {
			if m.name == name && deliveryRank[m.role.Run.stepAt(c)] < deliveryRank[d.role.Run.Phase] {
				return c
			}
		}
	}
	return ""
}

// alongside reports whether a role of the unit has come as far as phase p at its
// consumers, or need not.
func (u *unit) alongside(self *Role, p Phase) bool {
	return u.all(func(m member) bool {
		run := m.run()
		switch {
		case run == nil, !m.role.delivers():
			return true
		case run.deliveryID() != self.Run.deliveryID(): // other barriers hold it up
			return true
		}
		rank := func(p Phase) int {
			if r, ok := deliveryRank[p]; ok && r > 0 {
				return r
			}
			if p == Publish {
				return 0
			}
			return len(deliveryRank)
		}
		return rank(run.Phase) >= rank(p)
	})
}

// bring does what can be done now at the consumers of roles, and returns the jobs
// that can go on: what was proven is kept first.
func (e *Engine) bring(jobs []*job) (live []*job) {
	for _, j := range jobs {
		j.facts.progress, j.facts.patiences = map[string]Progress{}, map[string]time.Duration{}
		d := &decider{role: j.role, facts: &j.facts}
		mine := d.mine()
		deliveries := make([]Delivery, len(mine))
		for i, c := range mine {
			deliveries[i] = e.delivery(d, c)
		}
		results := make([]Progress, len(mine))
		g := errgroup.Group{}
		g.SetLimit(parallelConsumers)
		for i := range mine {
			g.Go(func() error {
				ctx, cancel := context.WithTimeout(e.ctx, kind.CallTimeout)
				defer cancel()
				results[i] = e.guardedDelivery(func() Progress {
					return e.o.Consumers.Deliver(ctx, j.role.Run.stepFor(mine[i]), deliveries[i])
				})
				return nil
			})
		}
		_ = g.Wait()
		if err := e.keepProofs(j, deliveries, results); err != nil {
			e.o.Logger.Warn("what was seen at consumers cannot be stored; looking again", "role", j.role.Name, "error", err)
			e.wake(j.role.lane(), j.role.Name, time.Now().Add(pause(2)))
			continue
		}
		live = append(live, j)
		for i, c := range mine {
			j.facts.progress[c] = results[i]
			if j.role.Run.urgent() {
				j.facts.patiences[c] = e.patience(c, j.role.Run.stepFor(c))
			}
			if j.role.Run.Deadline.IsZero() { // it is for the whole phase
				j.facts.patience = max(j.facts.patience, e.patience(c, j.role.Run.Phase))
			}
		}
	}
	return live
}

// parallelConsumers is how many consumers of one role are worked at at once.
const parallelConsumers = 8

// defaultPatience is for a consumer that cannot be read.
const defaultPatience = 10 * time.Minute

func (e *Engine) patience(consumer string, step Phase) time.Duration {
	ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
	defer cancel()
	d, err := e.o.Consumers.Patience(ctx, consumer, step)
	if err != nil {
		return defaultPatience
	}
	return d
}

func (e *Engine) guardedDelivery(call func() Progress) (p Progress) {
	err := e.guardedPublication(func() error { p = call(); return nil })
	if err != nil {
		p = Progress{Err: err}
	}
	return p
}

// delivery is what a consumer has to get from the roles of the unit.
func (e *Engine) delivery(d *decider, consumer string) Delivery {
	out := Delivery{Consumer: consumer, ID: d.role.Run.deliveryID(), Since: d.role.Run.PublishedAt, Emergency: d.role.Run.emergency()}
	e.addShown(&out, d.role)
	for _, m := range d.facts.unit.everybody() {
		if run := m.run(); run != nil && run.deliveryID() == d.role.Run.deliveryID() {
			out.Since = later(out.Since, run.PublishedAt)
			e.addShown(&out, m.role)
		}
	}
	return out
}

func (e *Engine) addShown(to *Delivery, r *Role) {
	if !slices.Contains(r.Consumers, to.Consumer) || r.With(version.Current) == nil {
		return
	}
	if v := r.cleared(); v != nil {
		to.Lacks = append(to.Lacks, Shown{Role: r.Name, Value: v.Material.Secret})
	}
	fields := map[string]string{"": r.With(version.Current).Material.Secret}
	if r.Shows() {
		if v, err := r.view(e.o.Kind(r.Kind)); err == nil {
			fields = v.Fields
		}
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		if fields[name] != "" {
			to.Holds = append(to.Holds, Shown{r.Name, name, fields[name]})
		}
	}
	if v := r.undone(); v != nil && !r.ring() && !r.Served(v.Material) {
		to.Undone = append(to.Undone, Shown{r.Name, "", v.Material.Secret})
	}
	if v := r.replaced(); v != nil && r.Spec.PreviousField != "" && !r.ring() && !r.Served(v.Material) {
		to.Lacks = append(to.Lacks, Shown{r.Name, "", v.Material.Secret})
	}
}

// cleared is the version that a run has taken out of what consumers read, or nil.
func (r *Role) cleared() *version.Version {
	if r.Run == nil || !r.Run.Cleared {
		return nil
	}
	return r.Get(r.Run.To)
}

// undone is the version that a run takes back, or nil.
func (r *Role) undone() *version.Version {
	if r.Run == nil || !r.Run.Back || r.Run.Cleared {
		return nil
	}
	return r.Get(r.Run.To)
}

// replaced is the version that a run has seen to be refused, or nil.
func (r *Role) replaced() *version.Version {
	if r.Run == nil || !r.Run.Retired {
		return nil
	}
	return r.Get(r.Run.From)
}

// surveyTimeout bounds the look at a consumer before anything is changed. It asks for
// every right and tries every restart, at the rate that an API server is spared by.
const surveyTimeout = 30 * time.Second

// surveyed is what was found at the consumers of a role.
type surveyed struct {
	err      error
	problems []string
	notes    []string
	plan     []string
}

// survey looks at the consumers of roles before anything is changed.
func (e *Engine) survey(jobs []*job) {
	for _, j := range jobs {
		s := e.surveyOf(e.ctx, j.role)
		j.facts.surveyed = &s
	}
}

func (e *Engine) surveyOf(ctx context.Context, r *Role) surveyed {
	found := make([]Survey, len(r.Consumers))
	g := errgroup.Group{}
	g.SetLimit(parallelConsumers)
	for i, c := range r.Consumers {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, surveyTimeout)
			defer cancel()
			err := e.guardedPublication(func() error { found[i] = e.o.Consumers.Survey(ctx, c, r.Name); return nil })
			if err != nil {
				found[i].Err = err
			}
			return nil
		})
	}
	_ = g.Wait()
	var out surveyed
	for i, s := range found {
		if s.Err != nil && !kind.IsDefinite(s.Err) {
			out.err = cmp.Or(out.err, fmt.Errorf("consumer %q: %w", r.Consumers[i], s.Err))
		} else if s.Err != nil {
			s.Problems = append(s.Problems, s.Err.Error())
		}
		for _, p := range s.Problems {
			out.problems = append(out.problems, fmt.Sprintf("consumer %q: %s", r.Consumers[i], p))
		}
		for _, n := range s.Notes {
			out.notes = append(out.notes, fmt.Sprintf("consumer %q: %s", r.Consumers[i], n))
		}
		out.plan = append(out.plan, s.Plan...)
	}
	return out
}

// surveyProblem is a definite reason against the rotation at its consumers, or "".
func (s *surveyed) problem() string { return strings.Join(s.problems, "; ") }

func (s *surveyed) definite() error {
	if len(s.problems) == 0 {
		return nil
	}
	return errors.New(s.problem())
}

// reservationsLock is no role's name. Reservations are made one unit at a time.
const reservationsLock = "reservations/"

// reserved is what became of an attempt to reserve the consumers of a unit.
type reserved struct {
	waits string
	joint *joint // who shares them
}

// reserve takes the consumers of units, all of each or none.
func (e *Engine) reserve(jobs []*job) []*job {
	var live []*job
	for _, j := range jobs {
		ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
		got, err := e.reserveFor(ctx, j.role)
		cancel()
		if err != nil {
			e.o.Logger.Warn("consumers cannot be reserved; trying again", "role", j.role.Name, "error", err)
			e.wake(j.role.lane(), j.role.Name, time.Now().Add(rereadPause(err)))
			continue
		}
		j.facts.reserved = &got
		live = append(live, j)
	}
	return live
}

// Resume goes on with a rotation that is held.
func (e *Engine) Resume(ctx context.Context, id string) (*Header, error) {
	h, err := e.st.Header(ctx, id)
	if err != nil {
		return nil, err
	}
	if h == nil {
		return nil, fmt.Errorf("rotation %q: %w", id, ErrNotFound)
	}
	resumed := false
	for _, p := range h.Roles {
		err := e.change(ctx, p.Role, func(r *Role) error {
			if r.Run == nil || r.Run.Rotation != id || r.Run.Held == "" {
				return errNoRun
			}
			run := r.Run
			run.Held, run.Error, run.Deadline, run.RetryAt, run.Tries = "", "", time.Time{}, time.Time{}, 0
			r.mark(time.Now(), "resumed on request")
			return nil
		})
		switch {
		case err == nil:
			resumed = true
		case !errors.Is(err, errNoRun) && !errors.Is(err, ErrNotFound):
			return nil, err
		}
	}
	if !resumed && h.State.Ended() {
		return nil, &Conflict{Rotation: id, Text: fmt.Sprintf("rotation %s has ended (%s); there is nothing to resume", id, h.State)}
	}
	return h, nil // a repeat finds nothing held, and that is what was asked for
}
