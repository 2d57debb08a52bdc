package rotation

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Limits of the state machine.
const (
	// Skew is how much later than an attempt's deadline its call may land, by
	// the clock of another node.
	Skew = 3 * time.Second
	// preflightTimeout and credentialTimeout bound how long a target may be
	// unavailable before a rotation fails, or goes back.
	preflightTimeout  = 20 * time.Second
	credentialTimeout = 2 * time.Minute
	// publishTimeout bounds how long another Vault may be unavailable before a
	// rotation that can still go back does.
	publishTimeout = 5 * time.Minute
	// maxCalls is how often a target that says a change was made, and then
	// shows that it was not, is asked again.
	maxCalls = 3
	// settleTries is after how many failed tries a caller is told to read the
	// rotation later; rollbackAlarm is after how many a way back is an alarm.
	settleTries   = 4
	rollbackAlarm = 5
)

// act is what the engine does next for a role.
type act int

const (
	nothing act = iota
	wait
	inspect  // Preflight and Probe
	generate // new material
	call     // Change; its attempt is stored
	probe    // Probe
	show     // what is served, where consumers read it
	reach    // could it be published?
	meet     // where the others of the unit stand
	bring    // what is served, to consumers
	scout    // what stands against it there
	attest   // may a run of before the engine was started be gone on with?
	reserve  // the consumers of the unit
	store    // Put the next state
	finish   // the run has ended: store the outcome
	look     // Keeper.Look
	turn     // Keeper.Turn; its attempt is stored
	limit    // Keeper.Limit; its attempt is stored
)

// step is a decision.
type step struct {
	act    act
	until  time.Time        // wait
	goal   goal             // call, probe
	next   *Role            // store, finish
	permit bool             // store: the attempt in next may be used once it is stored
	ended  *Run             // finish: the run that ended
	state  State            // finish
	ask    []kind.Material  // inspect, probe
	guard  func(*unit) bool // store: only if the others of the unit still stand so
	anew   bool             // store: what was attested is asked about again
}

// facts are what this worker has seen of a role's target since it read the
// role's entry. They are never stored: whoever comes next asks again.
type facts struct {
	finding *kind.Finding
	// idleInUse: the user whose turn it is not has a password.
	idleInUse bool
	answer    *kind.Answer
	asked     []kind.Material
	outcome   *kind.Outcome
	// earlier is what became of the stored attempt, where this engine made the
	// call and then had to wait until nothing of it could land any more.
	earlier *kind.Outcome
	// published is set when the role's document shows what it should.
	published bool
	// reached is set when it was asked whether it could be published.
	reached *reached
	// Of consumers: what became of a step there, how long it may take, what was found
	// there, and whether they are the unit's.
	progress map[string]Progress
	patience time.Duration
	// patiences, in an emergency, are how long the next step may take at each of them.
	patiences map[string]time.Duration
	surveyed  *surveyed
	reserved  *reserved
	unit      *unit // where the others of the unit stand
	witness   *witness
	permit    bool // the stored attempt is this worker's own and not used yet

	// Of secrets that another server keeps.
	sight   *kind.Sight
	turned  *kind.Turned
	limited *kind.Turned
}

// unsaved is why a call does not count, although a fresh login shows that it was
// done: a node that was not passed over answered it with an error. What a node
// did and could not save is gone with its next restart.
func unsaved(o *kind.Outcome, missed []string) error {
	if o == nil {
		return nil
	}
	first := o.Err
	for _, n := range o.Nodes {
		switch {
		case n.Err == nil || slices.Contains(missed, n.Node):
		case kind.IsDefinite(n.Err):
			return n.Err
		case first == nil:
			first = n.Err
		}
	}
	return first
}

// landed reports whether the call of this worker has come back from every
// node, so that nothing of it can still happen.
func (f *facts) landed() bool {
	if f.outcome == nil || f.outcome.Err != nil && !kind.IsDefinite(f.outcome.Err) {
		return false
	}
	return !slices.ContainsFunc(f.outcome.Nodes, func(n kind.NodeError) bool {
		return n.Err != nil && !kind.IsDefinite(n.Err)
	})
}

// rejected is the definite answer of a node to this worker's call, whatever
// the others said.
func (f *facts) rejected() error {
	if f.outcome == nil {
		return nil
	}
	if kind.IsDefinite(f.outcome.Err) {
		return f.outcome.Err
	}
	for _, n := range f.outcome.Nodes {
		if kind.IsDefinite(n.Err) {
			return n.Err
		}
	}
	return nil
}

// goal is a state of the target that a phase wants.
type goal struct {
	call      string
	accept    []kind.Material
	refuse    []kind.Material
	exclusive bool
	lead      kind.Material
	// users are those that are changed, where that is not every user of the role;
	// the others are as they should be, and are asked all the same.
	users       []string
	closeBefore time.Time
}

func (g goal) ask() []kind.Material { return append(slices.Clone(g.accept), g.refuse...) }

// decider decides for one role at one moment. It does no I/O and reads no
// clock: state and facts in, a step out.
type decider struct {
	role   *Role
	facts  *facts
	now    time.Time
	config Config
	// targetless kinds have no server to ask.
	targetless bool
	// generation is that of the connection; nodes remembered from another one are
	// forgotten.
	generation int
	// since is when the engine was started: what is stored from before it may be of a
	// snapshot.
	since time.Time
	// pause is how long to wait before try n, jitter included.
	pause func(n int) time.Duration
}

func (d *decider) decide() step {
	run := d.role.Run
	if run == nil {
		return step{}
	}
	if d.role.kept() {
		return d.keep()
	}
	// A change that was sent by somebody who did not come back may still land:
	// neither ask nor change anything before it no longer can.
	if a := run.Attempt; a != nil && !a.Landed && !d.facts.permit && !d.facts.landed() {
		if t := a.Deadline.Add(Skew); d.now.Before(t) {
			if err := d.facts.rejected(); err != nil && run.Doomed == "" && !d.patient() {
				return d.doom(err)
			}
			return step{act: wait, until: t}
		}
	}
	if d.now.Before(run.RetryAt) {
		return step{act: wait, until: run.RetryAt}
	}
	if d.joint() {
		if d.facts.unit == nil {
			return step{act: meet}
		}
		if s, ok := d.together(); ok {
			return s
		}
	}
	if d.acts() {
		if s, ok := d.vouch(); !ok {
			return s
		}
	}
	if run.Phase == Publish {
		return d.publish()
	}
	if run.Back && d.role.isDelivery(run.Phase) {
		return d.deliver()
	}
	if run.Back {
		return d.undo()
	}
	switch run.Phase {
	case Preflight:
		return d.preflight()
	case Generate:
		return d.begin()
	case Apply, Test:
		return d.apply()
	case Promote: // a role that is alone does not stop here
		if d.targetless {
			return d.promoted(nil)
		}
		return d.pursue(d.applyGoal(), d.promoted) // it is long since it was tested
	case Sync, Restart:
		return d.deliver()
	case Check:
		if d.role.consults() {
			return d.deliver()
		}
		return d.check()
	case Grace:
		return d.grace()
	case Retire:
		return d.retire()
	default: // publish is above, and nothing else is stored
		return step{}
	}
}

// preflight: nothing has happened yet, and nothing is changed here.
func (d *decider) preflight() step {
	run := d.role.Run
	switch {
	case run.Recall != "":
		return d.event(recall, run.Recall)
	case d.role.surveys():
		return d.preflightThere()
	case d.unreached():
		return step{act: reach}
	case d.facts.reached != nil && d.facts.reached.err != nil:
		return d.retry(d.facts.reached.err, bad)
	case (d.role.announces() || run.urgent() && d.role.ring()) && d.role.crowded() != "":
		return d.event(bad, d.role.crowded())
	case d.targetless:
		return d.event(done, "")
	case d.facts.finding == nil:
		return step{act: inspect, ask: d.role.All()}
	}
	if err := d.unavailable(); err != nil {
		return d.retry(err, bad)
	}
	if problem := d.problem(); problem != "" {
		return d.event(bad, problem)
	}
	return d.event(done, "")
}

// preflightThere is preflight at consumers, which are reserved first. It is stored when
// it is over, and its lane is left: a cluster that hangs holds up no target.
func (d *decider) preflightThere() step {
	reserved, surveyed := d.facts.reserved, d.facts.surveyed
	switch {
	case reserved == nil:
		return step{act: reserve}
	case reserved.waits != "":
		return d.queue(reserved.waits)
	case surveyed == nil:
		return step{act: scout}
	case surveyed.err != nil:
		return d.retry(surveyed.err, bad)
	case surveyed.problem() != "":
		return d.event(bad, surveyed.problem())
	}
	next := d.role.clone()
	next.Run.rest()
	next.Run.Surveyed, next.Run.Deadline = true, d.now.Add(preflightTimeout)
	if next.Run.Joint = reserved.joint; reserved.joint != nil {
		next.mark(d.now, reserved.joint.told(next.Run.Rotation))
	}
	return step{act: store, next: next}
}

// queue waits for consumers that are another unit's. That is no failure, and has no
// deadline: a rotation ends.
func (d *decider) queue(waits string) step {
	run := d.role.Run
	if run.Error == clip(waits) && run.Deadline.Sub(d.now) > preflightTimeout/2 {
		return step{act: wait, until: d.now.Add(pollPause)} // no write for each look
	}
	next := d.role.clone()
	next.Run.Deadline = d.now.Add(preflightTimeout + pollPause)
	next.Run.RetryAt = d.now.Add(pollPause)
	next.Run.Error = clip(waits)
	next.Run.Tries = max(run.Tries, settleTries) // whoever asked need not wait for it
	next.mark(d.now, "preflight: waiting: "+waits)
	return step{act: store, next: next}
}

// unavailable says why preflight has no complete answer.
func (d *decider) unavailable() error {
	finding, answer := d.facts.finding, d.facts.answer
	for _, err := range []error{finding.Err, answer.Err} {
		if err != nil && !kind.IsDefinite(err) {
			return err
		}
	}
	down := map[string]error{}
	up := false
	for _, n := range finding.Nodes {
		if n.Err != nil {
			down[n.Node] = n.Err
		}
	}
	for _, n := range answer.Nodes {
		if n.Err != nil {
			down[n.Node] = n.Err
		} else {
			up = true
		}
	}
	if len(down) == 0 || d.role.passesOver() && up && unreachable(down) {
		return nil
	}
	return downError(down, d.role.passesOver())
}

// unreachable reports whether clients cannot get at any of these nodes either. A
// node that answers, and be it by a refusal, is one that consumers may log in
// to: nothing passes it over.
func unreachable(down map[string]error) bool {
	for _, err := range down {
		if !kind.IsUnreachable(err) {
			return false
		}
	}
	return true
}

func downError(down map[string]error, partial bool) error {
	var nodes []string
	blocking := partial && !unreachable(down)
	for n, err := range down {
		if !blocking || !kind.IsUnreachable(err) {
			nodes = append(nodes, fmt.Sprintf("%s (%v)", n, err))
		}
	}
	slices.Sort(nodes)
	if blocking {
		return fmt.Errorf("%s could be reached and not be asked; allow_partial passes over only nodes that nobody reaches",
			strings.Join(nodes, ", "))
	}
	return fmt.Errorf("no answer from %s; a rotation needs every known node, or allow_partial=true on the role",
		strings.Join(nodes, ", "))
}

// problem is a definite reason against the rotation, or "".
func (d *decider) problem() string {
	finding, answer, run := d.facts.finding, d.facts.answer, d.role.Run
	for _, err := range []error{finding.Err, answer.Err} {
		if err != nil {
			return err.Error()
		}
	}
	if len(finding.Problems) > 0 {
		return strings.Join(finding.Problems, "; ")
	}
	if d.role.alternates() && !keepable(finding.Profile) {
		return fmt.Sprintf("what user %q may do takes more than %d KiB to describe, so that no other can be kept like it: give it fewer rules, or rotate it with another strategy",
			d.role.inUse(), maxProfile>>10)
	}
	if run.Trigger == Reconcile || run.urgent() { // whatever is accepted is about to be refused
		return ""
	}
	current := d.role.With(version.Current)
	if run.Adopted {
		current = d.role.With(version.Pending)
	}
	if current == nil && finding.HasCredential && !run.Overwrite {
		return fmt.Sprintf("user %q has a password already; give it as initial_password to adopt it, "+
			"or set overwrite_existing=true to replace it", d.role.inUse())
	}
	if problem := d.idleProblem(); problem != "" {
		return problem
	}
	for _, n := range answer.Nodes {
		if n.Err != nil || run.Overwrite {
			continue
		}
		if problem := d.nodeProblem(n, current); problem != "" {
			return problem
		}
	}
	return ""
}

func (d *decider) nodeProblem(n kind.NodeAnswer, current *version.Version) string {
	user := d.role.inUse()
	if current != nil {
		if i := slices.IndexFunc(d.facts.asked, current.Material.Same); i < 0 || !n.Accepts[i] {
			if d.role.Run.Restores {
				return d.refusesRestored(n, current)
			}
			if d.role.Run.Adopted {
				return fmt.Sprintf("node %s refuses the initial_password of user %q", n.Node, user)
			}
			if d.role.Root() {
				return fmt.Sprintf("node %s refuses the current version (%d) of user %q; set its password there, and write connections/%s with that and force=true",
					n.Node, current.Number, user, d.role.Connection)
			}
			return fmt.Sprintf("node %s refuses the current version (%d) of user %q; run reconcile/%s/%s, which puts it back; "+
				"if somebody changed it on purpose, delete the role and create it with their password as initial_password",
				n.Node, current.Number, user, d.role.Kind, d.role.Name)
		}
	}
	if n.Extra != 0 && current != nil {
		user := userNames(d.role.usernames())
		if d.role.Run.Restores {
			return fmt.Sprintf("node %s accepts passwords for user %s that role %q did not have when it was deleted; "+
				"remove them, or restore it with overwrite_existing=true, which does that", n.Node, user, d.role.Name)
		}
		if d.role.Run.Adopted {
			return fmt.Sprintf("node %s accepts further passwords for user %s besides initial_password; "+
				"remove them, or set overwrite_existing=true", n.Node, user)
		}
		if d.role.Root() {
			return fmt.Sprintf("node %s accepts passwords for user %s that this engine does not know; remove them", n.Node, user)
		}
		return fmt.Sprintf("node %s accepts passwords for user %s that this engine does not know; "+
			"remove them, or run reconcile/%s/%s, which leaves only the current version",
			n.Node, user, d.role.Kind, d.role.Name)
	}
	return ""
}

// apply: pending is stored; the target may or may not accept it.
func (d *decider) apply() step {
	run := d.role.Run
	switch {
	case run.Doomed != "":
		return d.event(bad, run.Doomed)
	case run.Recall != "" && !d.facts.permit:
		return d.event(recall, run.Recall)
	case d.role.announces():
		return d.announce()
	case d.targetless:
		return d.promote(nil)
	case (run.Trigger == Reconcile || d.role.putsBack()) && d.unsent() && d.vouched():
		return d.send(d.role.clone(), d.applyGoal())
	}
	return d.pursue(d.applyGoal(), d.promote)
}

func (d *decider) applyGoal() goal {
	r := d.role
	g := goal{call: string(Apply)}
	if r.Run.Trigger == Reconcile {
		return d.onlyCurrent(g)
	}
	pending := r.With(version.Pending)
	g.accept, g.lead = []kind.Material{pending.Material}, pending.Material
	current := r.With(version.Current)
	if r.Run.urgent() { // where it is refused already, it is not to be accepted again
		current = nil
	}
	switch {
	case r.Spec.Strategy == kind.Swap:
		g.exclusive = true
	case r.alternates():
		g.exclusive, g.users = true, []string{pending.Material.Username}
		if current != nil {
			g.accept = append(g.accept, current.Material)
		}
	case current != nil && !current.Material.Same(pending.Material):
		g.accept = append(g.accept, current.Material)
	}
	return g
}

// onlyCurrent makes g refuse everything but what is served.
func (d *decider) onlyCurrent(g goal) goal {
	current := d.role.With(version.Current).Material
	g.accept, g.lead, g.exclusive = []kind.Material{current}, current, true
	g.refuse = slices.DeleteFunc(d.role.All(), current.Same)
	return g
}

// promote is reached when a fresh login at every node has proven the goal of
// apply. For a reconcile that is the end.
func (d *decider) promote(v *verdict) step {
	if d.role.Run.Trigger == Reconcile {
		return d.end(Completed, v)
	}
	if d.role.Run.Unit != 0 && d.role.Run.Phase != Check && !d.last() && !d.role.Run.urgent() {
		next := d.role.clone()
		d.learn(next, v)
		next.advance(done, d.now) // apply → test
		next.advance(done, d.now) // test → promote
		next.Run.rest()
		return step{act: store, next: next}
	}
	return d.promoted(v)
}

// promoted makes the coming version current. It has just been proven, and with it
// those of its unit.
func (d *decider) promoted(v *verdict) step {
	next := d.role.clone()
	d.learn(next, v)
	for next.Run.Phase != Promote {
		next.advance(done, d.now)
	}
	next.Promote(d.now)
	if v := next.Get(next.Beside); v != nil && v.Stage == version.Previous && next.Served(v.Material) {
		v.Stage = version.Retired // a rollback serves it, under the newer number
	}
	if run := next.Run; !run.Restores || !run.Adopted { // which is as old as it was
		next.LastRotation = d.now
	}
	d.serveSlot(next)
	run := next.Run
	run.Promoted = true
	run.rest()
	if grace := next.Grace(d.config); next.graceful() && grace > 0 {
		run.beginGrace(d.now, grace)
	}
	if run.urgent() {
		return d.endEarlier(next)
	}
	if next.ring() {
		next.dateKeys(d.now)
	}
	next.advance(done, d.now) // promote → publish
	if next.publishes() {
		next.limitPublish(d.now)
		return step{act: store, next: next}
	}
	return d.afterPublish(next)
}

func (run *Run) beginGrace(now time.Time, grace time.Duration) {
	run.GraceFrom, run.GraceUntil = now.UTC(), now.Add(grace)
}

// afterPublish leaves the publish phase forwards: into check, grace, or past it.
func (d *decider) afterPublish(next *Role) step {
	if run := next.Run; !run.GraceUntil.IsZero() {
		// Consumers read of it only now, however long ago it was promoted.
		run.beginGrace(d.now, next.Grace(d.config))
		next.date(run.From, d.now)
	}
	next.advance(done, d.now) // publish → sync
	if next.consults() {
		return d.enterDelivery(next)
	}
	return d.undeliveredOn(next)
}

// afterGrace goes on from the beginning of grace, which may be its end.
func (d *decider) afterGrace(next *Role) step {
	if next.beside() != nil && next.Run.Restores {
		return d.endBeside(next)
	}
	if next.Run.GraceUntil.After(d.now) || next.Run.Unit != 0 || d.leavesLane(next) {
		return step{act: store, next: next}
	}
	return d.startRetire(next)
}

// serveSlot sets the next time after a rotation, whatever asked for it.
func (d *decider) serveSlot(next *Role) {
	if next.Run.Trigger == Create && next.Next.After(d.now) {
		return // it was given with the role
	}
	following, passed := schedule.Served(next.Schedule, next.Name, next.Next, d.now)
	next.Next = following
	next.miss(passed)
}

// grace: both are accepted, and anything can still be taken back.
func (d *decider) grace() step {
	run := d.role.Run
	switch {
	case run.Recall != "":
		if s, ok := d.reserveBack(); ok {
			return s
		}
		return d.takeBack(run.Recall)
	case run.Reapply:
		if s, ok := d.vouchNow(); !ok {
			return s
		}
		return d.reapply()
	case !d.graceOver():
		return step{act: wait, until: run.GraceUntil}
	case d.role.beside() != nil && run.Restores:
		return d.endBeside(d.role.clone())
	case d.role.ring() && run.GraceUntil.IsZero() && run.Trigger != Create:
		return d.guarded(d.endAs(d.role.clone(), Completed, nil)) // its unit has waited for others
	}
	if s, ok := d.vouchNow(); !ok {
		return s
	}
	if d.doubted() && d.role.consults() {
		if s, ok := d.leftBy(); !ok {
			return s
		}
	}
	return d.guarded(d.startRetire(d.role.clone()))
}

// reserveBack takes the consumers once more where a way back begins in grace, when they
// are nobody's.
func (d *decider) reserveBack() (step, bool) {
	switch reserved := d.facts.reserved; {
	case d.role.Run.Phase != Grace || !d.role.consults():
		return step{}, false
	case reserved == nil:
		return step{act: reserve}, true
	case reserved.waits != "":
		return step{act: wait, until: d.now.Add(pollPause)}, true
	}
	return step{}, false
}

// reapply restores what the target should accept during grace.
func (d *decider) reapply() step {
	r := d.role
	applied := func(v *verdict) step {
		next := r.clone()
		d.learn(next, v)
		next.Run.Reapply = false
		next.Run.rest()
		next.mark(d.now, "reconciled during grace")
		return step{act: store, next: next}
	}
	if d.targetless {
		return applied(nil)
	}
	g := goal{call: string(Reconcile), exclusive: true}
	g.lead = r.With(version.Current).Material
	g.accept = []kind.Material{g.lead}
	if p := r.With(version.Previous); p != nil {
		g.accept = append(g.accept, p.Material)
	}
	if d.unsent() {
		return d.send(r.clone(), g)
	}
	return d.pursue(g, applied)
}

func (d *decider) startRetire(next *Role) step {
	next.advance(done, d.now) // grace → retire, in an emergency promote → retire
	next.Run.rest()
	next.Run.CloseBefore = d.now
	permit := false
	if !d.targetless && (next.Spec.Strategy != kind.Swap || next.closes()) && d.vouched() {
		next.Run.Attempt = d.attempt(string(Retire))
		permit = true
	}
	return step{act: store, next: next, permit: permit}
}

// retire: the point of no return is behind. Only current stays accepted.
func (d *decider) retire() step {
	switch {
	case d.targetless:
		return d.retired(nil)
	case d.heldUp():
		return d.bringMeanwhile()
	case d.doubted() && d.role.consults() && !d.facts.permit && d.facts.outcome == nil && d.vouched():
		if s, ok := d.leftBy(); !ok {
			return s
		}
	}
	g := d.onlyCurrent(goal{call: string(Retire)})
	g.users = d.onlyUser(d.role.usernames()[len(d.role.usernames())-1])
	if d.role.closes() {
		g.closeBefore = d.role.closeBefore(d.now)
	}
	return d.pursue(g, d.retired)
}

// retired is reached when previous has been proven refused: it leaves the
// role's document, if there is one.
func (d *decider) retired(v *verdict) step {
	next := d.proven(v)
	if next.Run.urgent() && len(next.Run.Missed) == 0 {
		next.Run.Refused = d.now.UTC()
		next.mark(d.now, "every earlier version is refused")
	}
	switch {
	case next.Run.Over:
		return d.rescued(next)
	case !d.role.Shows() && !d.role.rescues():
		return d.endAs(next, Completed, v)
	}
	next.advance(done, d.now) // retire → publish
	next.Run.rest()
	return step{act: store, next: next}
}

// takeBack turns back what is shown. Where the new version was promoted, the
// previous material is served again, under a new number. Both stay accepted; what
// failed is refused after that, last of all.
func (d *decider) takeBack(reason string) step {
	if s, ok := d.mayServeAgain(); !ok {
		return s
	}
	if d.role.Spec.Strategy == kind.Swap && !d.targetless {
		return d.swapBack(reason)
	}
	next := d.role.clone()
	run := next.Run
	if run.Phase == Grace {
		run.Joint = nil // that delivery is over
	}
	run.Again = run.shares() && d.role.isDelivery(run.Phase)
	switch {
	case run.Ahead:
		next.mark(d.now, "the next key is taken back: "+reason)
		next.Discard(false, d.now)
	case next.ring():
		next.mark(d.now, "the previous key is used again: "+reason)
		next.PromoteRingBack(run.Rotation, d.now)
		next.dateKeys(d.now)
		next.LastRotation = d.now
	default:
		next.mark(d.now, "serving the previous material again: "+reason)
		next.PromoteBack(run.Rotation, d.now)
		next.LastRotation = d.now
	}
	next.advance(recall, d.now) // → publish, on the way back
	run.Error, run.Why, run.Held = clip(reason), clip(reason), ""
	if next.publishes() {
		run.rest()
		return step{act: store, next: next}
	}
	return d.undeliveredBack(next)
}

func (d *decider) startUndo(next *Role) step {
	next.Run.rest()
	permit := false
	if !d.targetless && !d.leavesLane(next) && d.vouched() {
		next.Run.Attempt = d.attempt("undo")
		permit = true
	}
	return step{act: store, next: next, permit: permit}
}

// leavesLane reports whether another lane goes on with next: no attempt is stored that
// this worker would not make.
func (d *decider) leavesLane(next *Role) bool { return next.lane() != d.role.lane() }

// undo: the direction is stored. The target has to refuse what failed.
func (d *decider) undo() step {
	r := d.role
	if r.Run.Unasked && !d.facts.permit && d.facts.outcome == nil {
		if s, ok := d.mayUndo(); !ok {
			return s
		}
	}
	if !d.targetless && r.Run.Attempt == nil && r.Run.Tries == 0 && d.vouched() {
		return d.startUndo(r.clone())
	}
	if d.targetless && r.lingering() != nil {
		next := r.clone()
		next.Run.Cleared = true
		next.advance(done, d.now) // apply → publish
		next.Run.rest()
		return step{act: store, next: next}
	}
	if r.swapping() {
		return d.unswap()
	}
	failing := r.Get(r.Run.To)
	g := goal{call: "undo"}
	if current := r.With(version.Current); current != nil {
		g.accept, g.lead = []kind.Material{current.Material}, current.Material
	}
	harmless := failing == nil || r.Run.Adopted || r.Served(failing.Material)
	if d.targetless || harmless {
		return d.takenBack(nil)
	}
	g.refuse = []kind.Material{failing.Material}
	g.exclusive = r.Spec.Strategy != kind.Overlap && len(g.accept) > 0
	g.users = d.onlyUser(failing.Material.Username)
	return d.pursue(g, func(v *verdict) step {
		if !r.Run.SwapsBack {
			return d.takenBack(v)
		}
		next := d.proven(v)
		next.advance(done, d.now) // apply → publish: the server knows what is served
		next.Run.rest()
		return step{act: store, next: next}
	})
}

// swapping reports whether a role on its way back serves what failed, because its
// server has not been seen to know the previous material again.
func (r *Role) swapping() bool {
	run := r.Run
	return run != nil && run.SwapsBack && numberOf(r.With(version.Current)) == run.To
}

// unswap has the server know the previous material again, and then serves that.
func (d *decider) unswap() step {
	r := d.role
	previous, failing := r.With(version.Previous).Material, r.With(version.Current).Material
	g := goal{call: "undo", accept: []kind.Material{previous}, lead: previous, exclusive: true}
	if !failing.Same(previous) {
		g.refuse = []kind.Material{failing}
	}
	return d.pursue(g, func(v *verdict) step {
		next := r.clone()
		next.mark(d.now, "serving the previous material again")
		next.PromoteBack(next.Run.Rotation, d.now)
		next.LastRotation = d.now
		next = d.provenAs(next, v)
		next.advance(done, d.now) // apply → publish: the server knows what is served
		next.Run.rest()
		return step{act: store, next: next}
	})
}

// takenBack is the end of a way back, proven by v, or a new beginning.
func (d *decider) takenBack(v *verdict) step {
	if run := d.role.Run; run.Again && run.Recall == "" {
		return d.again(d.proven(v))
	}
	return d.end(RolledBack, v)
}

// pursue brings the target to a goal: an attempt is stored, the call made, and
// the goal proven by probing. The proof alone is not enough where a call was
// made: a login shows what a node holds in memory, and only the call's own good
// answer that the node has saved it. So an error of a node that answers counts
// as much as a refused login, and whoever resumes starts with the probe and
// makes the call once more, which is idempotent, before the goal is met.
func (d *decider) pursue(g goal, met func(*verdict) step) step {
	f, run := d.facts, d.role.Run
	switch {
	case f.permit:
		return step{act: call, goal: g}
	case f.answer == nil:
		return step{act: probe, goal: g, ask: g.ask()}
	}
	if s, ok := d.lateVouch(); !ok {
		return s
	}
	v := judge(*f.answer, f.asked, g, d.role.passesOver())
	if v.met {
		switch err := unsaved(f.outcome, v.missed); {
		case err != nil:
			return d.retry(err, bad)
		case f.outcome == nil && run.Attempt != nil:
			return d.confirm(g, v, met)
		}
		return met(v)
	}
	switch {
	case f.outcome != nil: // asked just now, and still not so
		return d.retry(d.refusal(v), bad)
	case v.unmet == nil: // nobody to ask
		return d.retry(v.unavailable, bad)
	}
	if a := run.Attempt; a != nil && !a.Landed { // nobody learnt what became of it
		return d.sendAgain(g, v.unmet)
	}
	return d.send(d.role.clone(), g)
}

// confirm is for a goal that looks met, and a call that nobody knows to have
// come to its end.
func (d *decider) confirm(g goal, v *verdict, met func(*verdict) step) step {
	err := unsaved(d.facts.earlier, v.missed)
	switch {
	case err != nil:
		return d.sendAgain(g, err)
	case d.facts.earlier != nil: // all but the nodes that are passed over
		return met(v)
	}
	return d.send(d.role.clone(), g)
}

// sendAgain repeats a call whose outcome is unknown, or gives up.
func (d *decider) sendAgain(g goal, err error) step {
	if d.expired() && !d.patient() {
		return d.event(bad, err.Error())
	}
	next := d.role.clone()
	next.Run.Tries++
	next.Run.Error = clip("the outcome of a call is unknown: " + err.Error())
	return d.send(next, g)
}

// send stores the intent to call, as part of next.
func (d *decider) send(next *Role, g goal) step {
	next.Run.Doubt = false
	next.Run.Attempt = d.attempt(g.call)
	return step{act: store, next: next, permit: true}
}

// onlyUser limits a change to one of two users: the one in use is left alone, until
// it turns out that somebody has changed that, too.
func (d *decider) onlyUser(name string) []string {
	if !d.role.alternates() || d.role.Run.Tries > 0 {
		return nil
	}
	return []string{name}
}

// unsent reports whether nobody has made the call of this phase, as far as is
// stored. What is restored is called for even where it looks right already: it
// may be so in a node's memory alone.
func (d *decider) unsent() bool {
	return d.role.Run.Attempt == nil && !d.facts.permit && d.facts.outcome == nil
}

// patient phases are retried for ever: half of them is no place to stop.
func (d *decider) patient() bool {
	run := d.role.Run
	return run.Back || run.Phase == Retire || run.Phase == Grace || run.Phase == Publish || run.urgent()
}

func (d *decider) expired() bool {
	deadline := d.role.Run.Deadline
	return !deadline.IsZero() && !d.now.Before(deadline)
}

// refusal is the most telling reason why a call did not reach its goal.
func (d *decider) refusal(v *verdict) error {
	if err := d.facts.outcome.Err; err != nil {
		return err
	}
	var first error
	for _, n := range d.facts.outcome.Nodes {
		if kind.IsDefinite(n.Err) {
			return n.Err
		}
		if first == nil {
			first = n.Err
		}
	}
	for _, err := range []error{first, v.unmet, v.unavailable} {
		if err != nil {
			return err
		}
	}
	return fmt.Errorf("the target did not do what it was asked to do")
}

// retry stores why the goal was not reached, and when to try again; or gives
// up with event on, where giving up is allowed.
func (d *decider) retry(err error, on event) step {
	run := d.role.Run
	if !d.patient() {
		exhausted := d.facts.landed() && run.Tries+1 >= maxCalls
		if kind.IsDefinite(err) || d.expired() || exhausted {
			return d.event(on, err.Error())
		}
	}
	return d.putOff(err)
}

// putOff stores why the goal was not reached, and when to try again.
func (d *decider) putOff(err error) step {
	next := d.role.clone()
	r := next.Run
	if r.Phase == Promote && r.Deadline.IsZero() { // from now on its unit waits for it
		r.Deadline = d.now.Add(credentialTimeout)
	}
	r.Tries++
	r.Error = clip(err.Error())
	r.RetryAt = d.now.Add(d.pause(r.Tries))
	if d.facts.landed() {
		d.settleAttempt(r)
	}
	next.mark(d.now, fmt.Sprintf("%s: waiting: %s", r.Phase, r.Error))
	return step{act: store, next: next}
}

// settleAttempt keeps of a call that has landed what is still open: where a node
// answered it with an error, it is made again before the goal counts as met.
func (d *decider) settleAttempt(run *Run) {
	if run.Attempt == nil || unsaved(d.facts.outcome, nil) == nil {
		run.Attempt = nil
		return
	}
	landed := *run.Attempt
	landed.Landed = true
	run.Attempt = &landed
}

// doom stores that the rotation gives up, as soon as nothing that was sent can
// still happen: part of a call has an unknown outcome.
func (d *decider) doom(err error) step {
	next := d.role.clone()
	next.Run.Doomed = clip(err.Error())
	next.Run.Error = next.Run.Doomed
	next.mark(d.now, fmt.Sprintf("%s: giving up: %s", next.Run.Phase, err))
	return step{act: store, next: next}
}

// event follows the transition table out of the current phase.
func (d *decider) event(on event, reason string) step {
	run := d.role.Run
	l, ok := d.role.follow(on)
	if !ok || run.TookOver != "" && on != done {
		return d.retry(fmt.Errorf("%s", reason), on)
	}
	if l.ToBack {
		if s, ok := d.mayUndo(); !ok {
			return s
		}
	}
	next := d.role.clone()
	next.Run.Error = clip(reason)
	switch {
	case l.End != "":
		return d.endAs(next, l.End, nil)
	case l.ToBack:
		next.Run.Unasked = !d.vouched()
		next.Run.Why = next.Run.Error
		next.mark(d.now, fmt.Sprintf("%s: rolling back: %s", run.Phase, reason))
		next.advance(on, d.now)
		next.Discard(false, d.now)
		return d.startUndo(next)
	}
	next.advance(on, d.now)
	next.Run.rest()
	if next.Run.Phase == Generate && (run.Adopted || run.Trigger == Reconcile) {
		next.advance(done, d.now) // there is nothing to generate
	}
	if next.Run.Phase == Apply {
		next.Run.Deadline = d.now.Add(credentialTimeout)
	}
	if current := next.With(version.Current); current != nil && run.Trigger == Reconcile {
		current.Material = next.renewed(current.Material, d.now)
	}
	if d.facts.finding != nil {
		d.remember(next, d.facts.answer.Nodes)
		next.Run.Adopted = run.Adopted && (run.Restores || d.acceptedEverywhere(next.With(version.Pending)))
		if profile := d.facts.finding.Profile; len(profile) > 0 {
			next.Profile = nil
			if keepable(profile) {
				next.Profile = profile
			}
		}
	}
	return step{act: store, next: next}
}

// maxProfile bounds what an entry keeps of what a user was found to be.
const maxProfile = 64 << 10

// keepable reports whether a profile may go into an entry. One that is larger is not
// remembered: its user is not made again, and has none that is made like it.
func keepable(profile []string) bool {
	raw, err := jsonutil.EncodeJSON(profile)
	return err == nil && len(raw) <= maxProfile
}

func (d *decider) acceptedEverywhere(v *version.Version) bool {
	i := slices.IndexFunc(d.facts.asked, v.Material.Same)
	return i >= 0 && !slices.ContainsFunc(d.facts.answer.Nodes, func(n kind.NodeAnswer) bool {
		return n.Err == nil && !n.Accepts[i]
	})
}

func (d *decider) attempt(name string) *version.Attempt {
	return &version.Attempt{Call: name, Deadline: d.now.Add(kind.CallTimeout)}
}

// rest clears what belongs to the phase that was left.
func (run *Run) rest() {
	run.Attempt, run.Tries, run.RetryAt, run.Doubt = nil, 0, time.Time{}, false
	if !run.Back {
		run.Error = ""
	}
}

// advance follows the transition table; the caller knows that the row exists.
func (r *Role) advance(on event, now time.Time) {
	l, ok := r.follow(on)
	if !ok {
		panic(fmt.Sprintf("no transition from %s by %s", r.Run.Phase, on))
	}
	if l.End != "" {
		return
	}
	r.Run.Phase = l.To
	r.Run.Back = r.Run.Back || l.ToBack
	r.Run.Retired = r.Run.Retired || l.ToRetired
	r.Run.Ahead = l.ToAhead
	r.Run.Deadline = time.Time{}
	if !r.Run.Back && r.stopsAt(l.To) {
		r.mark(now, string(l.To))
	}
}

// stopsAt reports whether a phase is one of this role's.
func (r *Role) stopsAt(p Phase) bool {
	switch p {
	case Publish:
		return r.Shows()
	case Sync, Restart:
		return r.consults()
	case Check:
		return r.consults() || r.ring()
	default:
		return true
	}
}

// learn keeps what a verdict showed about nodes.
func (d *decider) learn(next *Role, v *verdict) {
	if v == nil {
		return
	}
	d.remember(next, d.facts.answer.Nodes)
	if o := d.facts.outcome; o != nil {
		for _, note := range o.Notes {
			next.mark(d.now, note)
		}
	}
	next.Run.Missed = v.missed
	if len(v.missed) > 0 {
		next.mark(d.now, "passed over: "+strings.Join(v.missed, ", "))
	}
}

func (d *decider) remember(next *Role, nodes []kind.NodeAnswer) {
	next.Nodes, next.NodesGeneration = nil, d.generation
	for _, n := range nodes {
		next.Nodes = append(next.Nodes, n.Node)
	}
	slices.Sort(next.Nodes)
}

// end is the end of the run, proven by v (nil where there is no target).
func (d *decider) end(state State, v *verdict) step {
	return d.endAs(d.proven(v), state, v)
}

// proven is the role with what v has shown (nil where there is no target).
func (d *decider) proven(v *verdict) *Role { return d.provenAs(d.role.clone(), v) }

func (d *decider) provenAs(next *Role, v *verdict) *Role {
	d.learn(next, v)
	if v == nil || len(v.missed) == 0 {
		d.conclude(next)
		next.Drift = d.lingering(next)
	} else {
		next.Drift = &Drift{
			Since:  d.now,
			Reason: "nodes were passed over and may still accept old material",
			Missed: v.missed,
		}
		next.Drift.RetryAt = d.now.Add(healBackoff(next, d.role.Drift))
	}
	return next
}

// lingering is the drift that a proven end leaves: a way back says nothing about
// what nodes that were passed over earlier still accept.
func (d *decider) lingering(next *Role) *Drift {
	drift := next.Drift
	if !next.Run.Back || drift == nil || len(drift.Missed) == 0 || len(next.Accepted()) == 1 {
		return nil
	}
	return drift
}

// healBackoff spaces the tries to heal nodes that do not answer.
func healBackoff(next *Role, before *Drift) time.Duration {
	if before != nil && slices.Equal(before.Missed, next.Drift.Missed) {
		next.Drift.Since, next.Drift.Tries = before.Since, before.Tries+1
	}
	return min(10*time.Minute, 15*time.Second<<min(next.Drift.Tries, 6))
}

// conclude records as refused what has been proven refused.
func (d *decider) conclude(next *Role) {
	if next.ring() {
		d.concludeRing(next)
		return
	}
	if next.Run.Back {
		if v := next.Get(next.Run.To); v != nil && !next.Run.Adopted {
			next.MarkRefused(v.Material, d.now)
			if v.Refused.IsZero() { // its material is served under another number
				v.Refused = d.now
			}
		}
		return
	}
	for _, m := range next.All() {
		next.MarkRefused(m, d.now)
	}
}

func (d *decider) endAs(next *Role, state State, v *verdict) step {
	ended := next.Run
	if ended.Back && ended.Why != "" {
		ended.Error = ended.Why // not the last thing that was waited for on the way
	}
	reason := clip(ended.Error) // an earlier version may have stored more
	if state == Completed {
		reason = ""
	}
	next.mark(d.now, string(state))
	ended = next.Run
	next.Run = nil
	next.LastRun = &Ending{
		Rotation: ended.Rotation, Trigger: ended.Trigger, State: state, Error: reason, At: d.now,
	}
	if ended.Phase == Preflight && state == Failed && next.Drift == nil && d.currentRefused() {
		next.Drift = &Drift{Since: d.now, Reason: reason}
	}
	switch {
	case state == Completed, state == Partial:
		next.mended(d.now)
	case ended.Trigger == Reconcile:
		d.stillDrifted(next, ended, reason)
		next.unmended(d.now)
	}
	d.settleSchedule(next, ended, state, reason)
	next.Prune(next.keep(d.config))
	return step{act: finish, next: next, ended: ended, state: state}
}

// stillDrifted records that a reconcile did not come to its end. The next try to
// heal by itself is not at once: what failed now would fail then.
func (d *decider) stillDrifted(next *Role, ended *Run, reason string) {
	if next.Drift == nil {
		if ended.Phase != Preflight { // which alone shows no difference
			next.Drift = &Drift{Since: d.now, Reason: clip("not reconciled: " + reason)}
		}
		return
	}
	drift := *next.Drift
	next.Drift = &drift
	drift.RetryAt = d.now.Add(healBackoff(next, &drift))
}

func (d *decider) settleSchedule(next *Role, ended *Run, state State, reason string) {
	switch {
	case ended.Trigger == Reconcile, ended.Trigger == Retirement, ended.Restores:
	case state == Completed, state == Partial:
		next.Failures, next.RetryAt, next.Suspended = 0, time.Time{}, ""
	case ended.Promoted:
		next.Suspended = clip(fmt.Sprintf("rotation %s was rolled back after promotion: %s", ended.Rotation, reason))
	case ended.Trigger == Scheduled:
		next.Failures++
		next.RetryAt = d.now.Add(scheduleBackoff(next.Failures))
	}
}

// currentRefused reports whether preflight saw a node that answers and refuses
// what is served.
func (d *decider) currentRefused() bool {
	current := d.role.With(version.Current)
	if current == nil || d.facts.answer == nil {
		return false
	}
	i := slices.IndexFunc(d.facts.asked, current.Material.Same)
	return i >= 0 && slices.ContainsFunc(d.facts.answer.Nodes, func(n kind.NodeAnswer) bool {
		return n.Err == nil && !n.Accepts[i]
	})
}

// scheduleBackoff spaces the tries of a slot that keeps failing: 1m, 2m, … 1h.
func scheduleBackoff(failures int) time.Duration {
	return min(time.Hour, time.Minute<<min(failures-1, 6))
}

// verdict is what an answer means for a goal.
type verdict struct {
	met         bool
	missed      []string // nodes that could not be asked
	unmet       error    // a node that answered, and shows something else
	unavailable error
}

func judge(a kind.Answer, asked []kind.Material, g goal, allowPartial bool) *verdict {
	v := &verdict{unavailable: a.Err}
	down := map[string]error{}
	for _, n := range a.Nodes {
		if n.Err != nil {
			down[n.Node] = n.Err
			v.missed = append(v.missed, n.Node)
			continue
		}
		if err := g.check(n, asked); err != nil && v.unmet == nil {
			v.unmet = err
		}
	}
	slices.Sort(v.missed)
	if len(down) > 0 && v.unavailable == nil {
		v.unavailable = downError(down, allowPartial)
	}
	if len(a.Nodes) == 0 && v.unavailable == nil {
		v.unavailable = fmt.Errorf("the target named no node to prove anything at; check the connection's addresses")
	}
	reachable := len(a.Nodes) - len(v.missed)
	complete := v.unavailable == nil || allowPartial && a.Err == nil && reachable > 0 && unreachable(down)
	v.met = v.unmet == nil && complete
	return v
}

// check says what is missing for the goal at a node that answered.
func (g goal) check(n kind.NodeAnswer, asked []kind.Material) error {
	accepts := func(m kind.Material) bool {
		i := slices.IndexFunc(asked, m.Same)
		return i >= 0 && n.Accepts[i]
	}
	for _, m := range g.accept {
		if !accepts(m) {
			return fmt.Errorf("node %s refuses a login that it should accept", n.Node)
		}
	}
	for _, m := range g.refuse {
		if accepts(m) {
			return fmt.Errorf("node %s accepts a login that it should refuse", n.Node)
		}
	}
	if g.exclusive && n.Extra != 0 {
		return fmt.Errorf("node %s accepts passwords that this engine does not know", n.Node)
	}
	if n.Problem != "" {
		return fmt.Errorf("node %s: %s", n.Node, n.Problem)
	}
	return nil
}
