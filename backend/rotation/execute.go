package rotation

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"
	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// job is a role in the hands of a worker. Its role is what storage holds: as
// long as the role's lock is held and every write succeeds, nobody else changes
// it.
type job struct {
	role       *Role
	facts      facts
	step       step
	generation int // of the connection
}

// storageTimeout bounds a storage request; the outcome of one that is cut off
// is unknown, and is found by reading again.
const storageTimeout = 10 * time.Second

// advance moves the roles of one lane as far as they go without waiting. Roles
// that are at the same point share calls to their target.
func (e *Engine) advance(lane string, names []string) pace {
	unlock, err := e.locks.lockAll(e.ctx, names)
	if err != nil {
		return unknown
	}
	defer unlock()
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	jobs, bad := e.load(lane, names)
	e.readAgain(lane, bad)
	began, seen := time.Now(), unknown
	for len(jobs) > 0 && e.ctx.Err() == nil {
		var asked bool
		if jobs, asked = e.round(lane, jobs); asked {
			seen = prompt
		}
		jobs = e.handOver(lane, jobs)
	}
	if seen == prompt && time.Since(began) > kind.CallTimeout/2 {
		return sluggish
	}
	return seen
}

// handOver has other lanes go on with roles that have left this one: what shares a
// call has to be at one target.
func (e *Engine) handOver(lane string, jobs []*job) []*job {
	return slices.DeleteFunc(jobs, func(j *job) bool {
		leaves := j.role.lane() != lane
		if leaves {
			e.wake(j.role.lane(), j.role.Name, time.Now())
		}
		return leaves
	})
}

func (e *Engine) readAgain(lane string, bad map[string]error) {
	var failed error
	for name, err := range bad {
		if storage.IsUndecodable(err) {
			e.o.Logger.Warn("a role cannot be read; trying again", "role", name, "error", err)
		} else {
			failed = err
		}
		e.wake(lane, name, time.Now().Add(rereadPause(err)))
	}
	if failed != nil {
		e.o.Logger.Warn("roles cannot be read; trying again", "lane", lane, "roles", len(bad), "error", failed)
	}
}

// rereadPause is after how long an entry that could not be read is read again.
// One that cannot be decoded mends only by hand, or by a newer version.
func rereadPause(err error) time.Duration {
	if storage.IsUndecodable(err) {
		return pause(7)
	}
	return pause(2)
}

// load reads roles that have something to do in lane, and says of which others
// that is not known.
func (e *Engine) load(lane string, names []string) ([]*job, map[string]error) {
	ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
	defer cancel()
	none := func(err error) ([]*job, map[string]error) {
		bad := map[string]error{}
		for _, name := range names {
			bad[name] = err
		}
		return nil, bad
	}
	if err := e.st.settle(ctx); err != nil {
		return none(err)
	}
	roles, bad := e.st.roles(ctx, names)
	var jobs []*job
	for _, r := range roles {
		if r == nil || r.Run == nil {
			continue
		}
		if r.lane() != lane {
			e.wake(r.lane(), r.Name, time.Now())
			continue
		}
		jobs = append(jobs, &job{role: r, facts: facts{earlier: e.outcomeOf(r), witness: e.witnessOf(r)}})
	}
	if len(jobs) == 0 || jobs[0].role.Connection == "" || strings.HasPrefix(lane, laneOfConsumer) {
		return jobs, bad // no target is asked
	}
	generation, err := e.o.Generation(ctx, jobs[0].role.Connection)
	if err != nil {
		return none(err)
	}
	for _, j := range jobs {
		j.generation = generation
	}
	return jobs, bad
}

// sent is what became of an attempt that is waited for.
type sent struct {
	deadline time.Time
	outcome  *kind.Outcome
}

// keepOutcome keeps, over a wait, what became of a job's call. Who finds none
// after it makes the call again; that is safe, and never ends where a node that
// is passed over does not answer.
func (e *Engine) keepOutcome(j *job) {
	o, a := cmp.Or(j.facts.outcome, j.facts.earlier), j.role.Run.Attempt
	if o == nil || a == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sent[j.role.Name] = sent{a.Deadline, o}
}

// outcomeOf is what became of the stored attempt of r, if this engine saw it.
func (e *Engine) outcomeOf(r *Role) *kind.Outcome {
	e.mu.Lock()
	defer e.mu.Unlock()
	s, ok := e.sent[r.Name]
	delete(e.sent, r.Name)
	if !ok || r.Run.Attempt == nil || !r.Run.Attempt.Deadline.Equal(s.deadline) {
		return nil
	}
	return s.outcome
}

// round decides for every job, does what was decided, and returns the jobs
// that can go on, and whether the target was asked anything.
func (e *Engine) round(lane string, jobs []*job) (live []*job, asked bool) {
	now := time.Now()
	config := e.Config()
	by := map[act][]*job{}
	for _, j := range jobs {
		d := &decider{
			role: j.role, facts: &j.facts, now: now, config: config,
			targetless: e.targetless(j.role), generation: j.generation, since: e.since, pause: pause,
		}
		j.step = d.decide()
		by[j.step.act] = append(by[j.step.act], j)
	}
	for _, j := range by[wait] {
		e.keepOutcome(j)
		e.wake(lane, j.role.Name, j.step.until)
		e.lookLater(j.role)
	}
	live = append(live, e.generate(by[generate])...)
	live = append(live, e.storeAll(append(by[store], by[finish]...))...)
	live = append(live, e.publish(by[show])...)
	live = append(live, e.meet(by[meet])...)
	live = append(live, e.reserve(by[reserve])...)
	e.survey(by[scout])
	brought := e.bring(by[bring])
	e.reach(by[reach])
	e.inspect(by[inspect])
	e.call(by[call])
	e.probe(by[probe])
	e.look(by[look])
	e.turn(by[turn])
	e.limit(by[limit])
	e.attest(by[attest])
	there := slices.Concat(by[scout], brought, by[attest], by[inspect], by[reach], by[call], by[probe], by[look], by[turn], by[limit])
	return append(live, there...), len(there) > 0
}

func (e *Engine) targetless(r *Role) bool {
	k := e.o.Kind(r.Kind)
	return k != nil && k.ConnectionType() == ""
}

// inspect is preflight: what could a rotation meet?
func (e *Engine) inspect(jobs []*job) {
	if len(jobs) == 0 {
		return
	}
	users := make([][]kind.User, len(jobs))
	for i, j := range jobs {
		users[i] = j.role.forPreflight(j.generation)
	}
	ctx, cancel := context.WithTimeout(e.ctx, kind.CallTimeout)
	defer cancel()
	target := e.guarded(jobs[0].role)
	findings := make([]kind.Finding, len(jobs))
	for i, found := range spread(users, func(all []kind.User) []kind.Finding { return target.Preflight(ctx, all) }) {
		findings[i], jobs[i].facts.idleInUse = oneFinding(found), idleInUse(found)
	}
	e.forbid(ctx, rolesOf(jobs), findings)
	for i, j := range jobs {
		j.facts.finding = &findings[i]
	}
	// What is accepted has to be known here, and nothing is proven refused yet.
	e.ask(jobs, func(*Role, kind.Material) bool { return true })
}

// probe asks which material the nodes accept. What was proven refused before is
// concluded, so that a role that keeps many versions costs no more logins than another; but
// not where somebody does not trust what was seen before.
func (e *Engine) probe(jobs []*job) {
	if len(jobs) > 0 {
		e.ask(jobs, func(r *Role, m kind.Material) bool {
			return r.Run.Trigger != Reconcile && !r.Run.urgent() && !slices.ContainsFunc(r.Accepted(), m.Same)
		})
	}
}

func (e *Engine) ask(jobs []*job, concluded func(*Role, kind.Material) bool) {
	questions, places := make([][]kind.Question, len(jobs)), make([][][]int, len(jobs))
	for i, j := range jobs {
		questions[i], places[i] = j.role.questions(j.step.ask, j.generation)
		for n := range questions[i] {
			q := &questions[i][n]
			for _, m := range q.Materials {
				if concluded(j.role, m) {
					q.Concluded = append(q.Concluded, m)
				}
			}
		}
	}
	ctx, cancel := context.WithTimeout(e.ctx, kind.CallTimeout)
	defer cancel()
	target := e.guarded(jobs[0].role)
	answers := spread(questions, func(all []kind.Question) []kind.Answer { return target.Probe(ctx, all) })
	for i, j := range jobs {
		answer := j.role.oneAnswer(j.step.ask, answers[i], places[i], j.step.goal)
		j.facts.answer, j.facts.asked = &answer, j.step.ask
	}
}

// call makes changes whose attempts are stored.
func (e *Engine) call(jobs []*job) {
	if len(jobs) == 0 {
		return
	}
	deadline := time.Now().Add(kind.CallTimeout)
	changes := make([][]kind.Change, len(jobs))
	for i, j := range jobs {
		changes[i] = j.role.changes(j.step.goal, j.generation)
		if a := j.role.Run.Attempt; a.Deadline.Before(deadline) {
			deadline = a.Deadline
		}
	}
	ctx, cancel := context.WithDeadline(e.ctx, deadline)
	defer cancel()
	target := e.guarded(jobs[0].role)
	outcomes := spread(changes, func(all []kind.Change) []kind.Outcome { return target.Change(ctx, all) })
	for i, j := range jobs {
		outcome := oneOutcome(outcomes[i])
		j.facts.permit, j.facts.answer = false, nil
		j.facts.outcome = &outcome
	}
}

// generate makes new material and stores it, together with the attempt to have
// the target accept it: material that is not stored is never sent.
func (e *Engine) generate(jobs []*job) []*job {
	for _, j := range jobs {
		m, err := e.material(j.role)
		j.step = e.generated(j, m, err)
	}
	return e.storeAll(jobs)
}

func (e *Engine) material(r *Role) (kind.Material, error) {
	if r.Run.Trigger == Rollback {
		v := r.Get(r.Run.Source)
		if v == nil {
			return kind.Material{}, kind.Definitely("version %d is no longer kept", r.Run.Source)
		}
		if !r.turnsTo(v.Material) { // it was not when this was asked for
			return kind.Material{}, kind.Definitely("version %d is one of user %q, which is in use by now; ask again", r.Run.Source, v.Material.Username)
		}
		return r.renewed(v.Material, time.Now()), nil
	}
	k := e.o.Kind(r.Kind)
	if k == nil {
		return kind.Material{}, kind.Definitely("this version of the engine does not know kind %q; install the one that does", r.Kind)
	}
	ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
	defer cancel()
	spec := r.Spec
	if current := r.With(version.Current); r.alternates() && current != nil {
		spec.Username = r.Spec.Turn(current.Material)
	} else if r.alternates() {
		spec.Username = r.inUse()
	}
	return k.Generate(ctx, spec, e.o.Source)
}

func (e *Engine) generated(j *job, m kind.Material, err error) step {
	d := &decider{role: j.role, facts: &j.facts, now: time.Now(), config: e.Config(), targetless: e.targetless(j.role), generation: j.generation, pause: pause}
	if err != nil {
		return d.event(bad, fmt.Sprintf("no new material: %v", err))
	}
	next := j.role.clone()
	run := next.Run
	run.From = numberOf(next.With(version.Current))
	run.To = next.Add(m, run.Rotation, d.now)
	next.Get(run.To).CopyOf = run.Source
	if err := next.roomy(); err != nil {
		return d.event(bad, err.Error())
	}
	next.advance(done, d.now)
	run.rest()
	run.Deadline = d.now.Add(credentialTimeout)
	if !d.targetless {
		run.Attempt = d.attempt(string(Apply))
	}
	return step{act: store, next: next, permit: !d.targetless}
}

func numberOf(v *version.Version) int {
	if v == nil {
		return 0
	}
	return v.Number
}

// storeAll writes what was decided, each role on its own, and returns the jobs
// that can go on. After any error a job is dropped: whether the write was
// applied is found by reading again.
func (e *Engine) storeAll(jobs []*job) []*job {
	var mu sync.Mutex
	var live []*job
	g := errgroup.Group{}
	g.SetLimit(parallelStorage)
	for _, j := range jobs {
		g.Go(func() error {
			goesOn, err := e.store(j)
			if err != nil {
				e.o.Logger.Warn("a role cannot be stored; reading again", "role", j.role.Name, "error", err)
				e.lookAgain(j)
				return nil
			}
			e.mu.Lock()
			delete(e.unstored, j.role.Name)
			e.mu.Unlock()
			if goesOn {
				mu.Lock()
				live = append(live, j)
				mu.Unlock()
			}
			return nil
		})
	}
	_ = g.Wait()
	return live
}

// maxUnstored bounds the pause after errors of storage to eight seconds: when it
// is back, rotations go on soon.
const maxUnstored = 4

// lookAgain has what is stored of a job's role read again after an error. Where
// the end of a run was written after all, the role has no run that a worker
// could find: its rotation is looked at.
func (e *Engine) lookAgain(j *job) {
	e.mu.Lock()
	e.unstored[j.role.Name]++ // the target is asked anew each time: not too often
	n := e.unstored[j.role.Name]
	e.mu.Unlock()
	at := time.Now().Add(pause(min(n, maxUnstored)))
	if j.step.act == finish {
		e.wake(laneRecover, j.step.ended.Rotation+"/"+j.role.Name, at)
		return
	}
	e.wake(j.role.lane(), j.role.Name, at)
}

func (e *Engine) store(j *job) (goesOn bool, err error) {
	ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
	defer cancel()
	s := j.step
	if s.act == finish {
		agreed, err := e.agreed(ctx, j, func() error { return e.storeEnd(ctx, j) })
		return !agreed, err
	}
	agreed, err := e.agreed(ctx, j, func() error { return e.putRole(ctx, j.role, s.next) })
	if err != nil || !agreed {
		return true, err
	}
	if s.next.Run.Phase != j.role.Run.Phase || s.next.Run.Back != j.role.Run.Back {
		e.o.Logger.Debug("phase", "role", s.next.Name, "rotation", s.next.Run.Rotation,
			"phase", s.next.Run.Phase, "back", s.next.Run.Back)
	}
	e.progress(s.next)
	e.wakeUnit(s.next.Run.Rotation, s.next.Run.Unit, s.next.Name)
	e.wakeJoint(s.next.Run.Joint, s.next.Name)
	j.role = s.next
	j.facts = facts{permit: s.permit, witness: j.facts.witness}
	if s.anew {
		j.facts.witness = nil
		e.forgetWitness(s.next.Name)
	}
	return true, nil
}

// putRole writes a role and keeps the queue of due roles in step.
func (e *Engine) putRole(ctx context.Context, old, next *Role) error {
	if err := e.st.PutRole(ctx, old, next); err != nil {
		// It may be stored all the same; what is due is checked against the role.
		e.due.note(next.Name, soonest(old, next))
		e.scheduleDue()
		e.census.doubt(next.Name)
		return err
	}
	e.noteDue(next)
	e.census.note(next.Name, next)
	return nil
}

// soonest is the first time at which any of roles has to be looked at.
func soonest(roles ...*Role) time.Time {
	var first time.Time
	for _, r := range roles {
		if r == nil {
			continue
		}
		if at := r.dueAt(); !at.IsZero() && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// storeEnd writes the outcome of a run: its evidence first, so that a role
// without a run always has it.
func (e *Engine) storeEnd(ctx context.Context, j *job) error {
	s := j.step
	ev := evidence(j.role, s)
	if err := e.st.putEvidence(ctx, s.ended.Rotation, ev); err != nil {
		return err
	}
	if err := e.storeOutcome(ctx, j.role, s); err != nil {
		return err
	}
	e.o.Logger.Info("rotation ended", "role", j.role.Name, "kind", j.role.Kind,
		"rotation", s.ended.Rotation, "version", ev.Version, "state", s.state, "error", ev.Error)
	e.o.Recorder.Ended(ev.outcome())
	e.endedPart(s.ended.Rotation, ev.Part)
	e.forgetLooks(j.role.Name)
	e.forgetWitness(j.role.Name)
	e.wakeUnit(s.ended.Rotation, s.ended.Unit, j.role.Name)
	e.wakeJoint(s.ended.Joint, j.role.Name)
	return nil
}

// storeOutcome writes the role as it is after a run. A create that did not come
// to a first version leaves no role behind.
func (e *Engine) storeOutcome(ctx context.Context, old *Role, s step) error {
	if s.ended.Trigger != Create || s.next.With(version.Current) != nil {
		if err := e.putRole(ctx, old, s.next); err != nil {
			return err
		}
		if s.ended.Trigger == Create {
			return e.inherited(ctx, s.next)
		}
		return nil
	}
	return e.abandon(ctx, s.next)
}

// abandon removes a role whose create failed. What an earlier role of the name
// left behind stays as it was; numbers that were used are not used again, and
// material that a node may have accepted is kept.
func (e *Engine) abandon(ctx context.Context, r *Role) error {
	t, err := e.st.Tombstone(ctx, r.Name)
	if err != nil {
		return err
	}
	mine := t.about(r)
	if mine == nil {
		return e.bury(ctx, r)
	}
	mine.Role.Set.Last = r.Set.Last
	for _, v := range r.Versions {
		if mine.Role.Get(v.Number) == nil {
			mine.Role.Versions = append(mine.Role.Versions, v)
		}
	}
	mine.Role.Prune(mine.Role.keep(e.Config()))
	if err := e.st.putTombstone(ctx, t); err != nil {
		return err
	}
	return e.remove(ctx, r)
}

// inherited drops the tombstone whose versions r goes on with; what earlier
// roles of the name left to other users is kept.
func (e *Engine) inherited(ctx context.Context, r *Role) error {
	t, err := e.st.Tombstone(ctx, r.Name)
	if err != nil || t.about(r) == nil {
		return err
	}
	if rest := t.without(t.about(r)); rest != nil {
		return e.st.putTombstone(ctx, rest)
	}
	return e.st.dropTombstone(ctx, r.Name)
}

func evidence(before *Role, s step) *Evidence {
	r, run := s.next, s.ended
	ev := &Evidence{
		Part: Part{Role: r.Name, Kind: r.Kind, Version: run.To, State: s.state, Error: run.Error, Unit: run.Unit, Refused: run.Refused, Clients: clip(run.Usage.Line())},
		From: run.From, Trigger: run.Trigger, Started: run.Started, Finished: r.LastRun.At,
		Nodes: r.Nodes, Missed: run.Missed, Timeline: run.Timeline, Usage: run.Usage, Batch: run.Batch,
	}
	if ev.Version == 0 {
		ev.Version = numberOf(r.With(version.Current))
	}
	if s.state == Completed {
		ev.Error = ""
	}
	ev.Criteria = criteria(before, s)
	ev.Account = accountOf(r, run)
	ev.fit()
	return ev
}

// fit shortens evidence to what its entry takes, however much its role's entry
// held: evidence that cannot be stored would keep its role rotating for ever.
func (ev *Evidence) fit() {
	ev.Error = clip(ev.Error)
	ev.Timeline = slices.Clone(ev.Timeline)
	for i := range ev.Timeline {
		ev.Timeline[i].What = clip(ev.Timeline[i].What)
	}
	ev.Timeline = sparse(ev.Timeline, maxTimeline)
	for many := maxTimeline; many > 0 && !ev.fits(); many /= 2 {
		ev.Timeline = sparse(ev.Timeline, many)
		ev.Nodes, ev.Missed = sparse(ev.Nodes, many), sparse(ev.Missed, many)
	}
}

func (ev *Evidence) fits() bool {
	raw, err := jsonutil.EncodeJSON(ev)
	return err == nil && len(raw) <= maxSmallEntry
}

// sparse keeps the beginning and the end of a list that is too long.
func sparse[T any](list []T, most int) []T {
	if len(list) <= most {
		return list
	}
	return slices.Concat(list[:most/2], list[len(list)-most/2:])
}

// criteria lists what a rotation has to show, and what was seen of it.
func criteria(before *Role, s step) []Criterion {
	r, run := s.next, s.ended
	if r.kept() {
		return keptCriteria(r, run, s.state)
	}
	if run.Trigger == Reconcile {
		return []Criterion{{Name: "the target accepts the current version and nothing else", Met: s.state == Completed && len(run.Missed) == 0, Detail: nodesDetail(r, run)}}
	}
	if r.ring() {
		return ringCriteria(r, run)
	}
	refused := 0
	for _, v := range r.Versions {
		if v.Stage != version.Current && v.Refused.IsZero() {
			refused++
		}
	}
	detail := nodesDetail(r, run)
	if before.Connection == "" {
		detail = "no server holds this secret"
	}
	return []Criterion{
		{Name: "new version served", Met: run.Promoted && !run.Back},
		{Name: "new version accepted by a fresh login at every node", Met: run.Promoted && len(run.Missed) == 0, Detail: detail},
		{Name: "earlier versions refused at every node", Met: refused == 0, Detail: detail},
	}
}

func nodesDetail(r *Role, run *Run) string {
	return fmt.Sprintf("%d of %d nodes", len(r.Nodes)-len(run.Missed), len(r.Nodes))
}
