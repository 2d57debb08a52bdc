package rotation

import "github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"

// Phase is a step of a rotation.
type Phase string

// The phases, in order. Publish comes again after retire, and on the way back
// before the target refuses what failed. Key rings publish and check twice: what
// comes next first, and what is current once it was promoted. A role without
// consumers does not stop at sync and restart, and only a ring does at check.
const (
	Preflight Phase = "preflight" // read-only: could it succeed?
	Generate  Phase = "generate"  // new material, stored as pending
	Apply     Phase = "apply"     // the target accepts pending
	Test      Phase = "test"      // a fresh login proves it at every node
	Promote   Phase = "promote"   // one write: pending is served
	Publish   Phase = "publish"   // the role's document shows what is served
	Sync      Phase = "sync"      // consumers have what is published
	Restart   Phase = "restart"   // and run with it
	Check     Phase = "check"     // and work; without consumers: have had the time to read it
	Grace     Phase = "grace"     // previous is still accepted
	Retire    Phase = "retire"    // the target refuses previous, proven
)

// Phases are all of them, in that order.
var Phases = []Phase{Preflight, Generate, Apply, Test, Promote, Publish, Sync, Restart, Check, Grace, Retire}

// Trigger is why a rotation was started.
type Trigger string

// The triggers.
const (
	Create    Trigger = "create"
	Manual    Trigger = "manual"
	Scheduled Trigger = "schedule"
	Rollback  Trigger = "rollback"
	Reconcile Trigger = "reconcile"
	// RotateRoot is for the admin credential of a connection.
	RotateRoot Trigger = "rotate-root"
	// Retirement takes earlier keys out of a ring.
	Retirement Trigger = "retire"
	// Urgent is after a compromise; see emergency.go.
	Urgent Trigger = "emergency"
)

// State is what a rotation, or a role's part in one, is doing or has come to.
type State string

// The states. The last six are outcomes: nothing happens any more.
const (
	Running        State = "running"
	Waiting        State = "waiting" // for a target that does not answer
	InGrace        State = "grace"
	RollingBack    State = "rolling_back"
	RollbackFailed State = "rollback_failed" // still retried
	Completed      State = "completed"
	Partial        State = "partial" // some roles completed, some did not; or consumers of an emergency did not
	Failed         State = "failed"
	RolledBack     State = "rolled_back"
	Cancelled      State = "cancelled"
	Superseded     State = "superseded"
	Held           State = "held" // a consumer failed, and somebody has to decide
)

// States are all of them, in the order of a rotation's life.
var States = []State{
	Running, Waiting, Held, InGrace, RollingBack, RollbackFailed,
	Completed, Partial, Failed, RolledBack, Cancelled, Superseded,
}

// Meaning says when a rotation is in state s.
func (s State) Meaning() string {
	return map[State]string{
		Running:        "a phase is at work",
		Waiting:        "any phase: a target, a cluster, another rotation at a consumer, or roles of the same unit are waited for; `last_error` says for what",
		Held:           "`sync`, `restart`, `check`: a consumer failed, and the role has `on_failure=hold`; `resume/<id>` goes on, `cancel/<id>` is a `recall`",
		InGrace:        "`grace`: the new version is served and proven, and the previous one is still accepted",
		RollingBack:    "the phases that end in `_back`",
		RollbackFailed: "the same after five tries, which go on; or at once where somebody has to decide, as `last_error` says",
		Completed:      "outcome: what was to be served is, and everything earlier was seen to be refused",
		Partial:        "outcome: some roles completed and others did not; of an emergency also: consumers could not be proven (`missed`)",
		Failed:         "outcome: it ended before the target was changed; a reconcile: it could not be proven",
		RolledBack:     "outcome: it was changed, and changed back",
		Cancelled:      "outcome: somebody ended it before anything was changed",
		Superseded:     "outcome: from any phase, when an emergency takes the role over; its change that may still land is waited for first",
	}[s]
}

// Ended reports whether s is an outcome.
func (s State) Ended() bool {
	switch s {
	case Completed, Partial, Failed, RolledBack, Cancelled, Superseded:
		return true
	default:
		return false
	}
}

// event is what became of a phase.
type event string

const (
	done   event = "done"   // what the phase is for is proven
	bad    event = "bad"    // a definite bad result, or the deadline has passed
	recall event = "recall" // somebody asked to cancel or to roll back
	kept   event = "kept"   // the previous key stays until it is retired by itself
	anew   event = "anew"   // taken back with others that it shared a delivery with: it begins once more, alone
	missed event = "missed" // done, but for consumers of an emergency that could not be proven
)

// leg is a row of the transition table: in phase From (on the way back when
// Back), On leads to phase To, or ends the role's part in the rotation.
type leg struct {
	From Phase
	Back bool
	// Retired: only current is accepted any more; what is left is to say so.
	Retired bool
	// Ahead: the next key is shown, and not used yet.
	Ahead bool
	On    event
	To    Phase
	// ToBack: from here the rotation goes back, and never forward again.
	ToBack bool
	// ToRetired: the previous version has been proven refused.
	ToRetired bool
	ToAhead   bool
	End       State
}

// transitions is the whole state machine. What each phase does, and what
// counts as its event, is in decide.go; nothing else moves a rotation from one
// phase to another. docs/model is the same machine for a model checker.
//
// There is no row that leaves Retire or the way back but by success: both are
// retried until they are proven, because half of either would leave a
// credential that nobody knows to be accepted.
var transitions = []leg{
	{From: Preflight, On: done, To: Generate},
	{From: Preflight, On: bad, End: Failed},
	{From: Preflight, On: recall, End: Cancelled},
	{From: Generate, On: done, To: Apply},
	{From: Generate, On: bad, End: Failed},
	{From: Generate, On: recall, End: Cancelled},
	{From: Apply, On: done, To: Test},
	{From: Apply, On: bad, To: Apply, ToBack: true},
	{From: Apply, On: recall, To: Apply, ToBack: true},
	{From: Test, On: done, To: Promote},
	{From: Test, On: bad, To: Apply, ToBack: true},
	{From: Test, On: recall, To: Apply, ToBack: true},
	{From: Promote, On: done, To: Publish},
	{From: Promote, On: bad, To: Apply, ToBack: true}, // while it waits for its unit
	{From: Promote, On: recall, To: Apply, ToBack: true},
	{From: Publish, On: done, To: Sync},
	{From: Publish, On: recall, To: Publish, ToBack: true}, // promotes back first
	{From: Sync, On: done, To: Restart},
	{From: Sync, On: recall, To: Publish, ToBack: true}, // promotes back first
	{From: Restart, On: done, To: Check},
	{From: Restart, On: recall, To: Publish, ToBack: true}, // promotes back first
	{From: Check, On: done, To: Grace},
	{From: Check, On: recall, To: Publish, ToBack: true}, // promotes back first
	{From: Grace, On: done, To: Retire},
	{From: Grace, On: recall, To: Publish, ToBack: true}, // promotes back first
	{From: Retire, On: done, To: Publish, ToRetired: true},
	{From: Publish, Retired: true, On: done, To: Sync},
	{From: Sync, Retired: true, On: done, End: Completed}, // nothing is restarted any more
	{From: Publish, Back: true, On: done, To: Sync},
	{From: Sync, Back: true, On: done, To: Restart},
	{From: Restart, Back: true, On: done, To: Check},
	{From: Check, Back: true, On: done, To: Apply},
	{From: Apply, Back: true, On: done, End: RolledBack},
	{From: Apply, Back: true, On: anew, To: Preflight},
}

// swapBackTransitions are the way back of a role whose server knows one credential
// and whose consumers have seen the new one: the server comes first.
var swapBackTransitions = []leg{
	{From: Sync, On: recall, To: Apply, ToBack: true},
	{From: Restart, On: recall, To: Apply, ToBack: true},
	{From: Check, On: recall, To: Apply, ToBack: true},
	{From: Grace, On: recall, To: Apply, ToBack: true},
	{From: Apply, Back: true, On: done, To: Publish},
	{From: Publish, Back: true, On: done, To: Sync},
	{From: Sync, Back: true, On: done, To: Restart},
	{From: Restart, Back: true, On: done, To: Check},
	{From: Check, Back: true, On: done, End: RolledBack},
}

// clearedTransitions end the way back of a secret that no server holds: what failed
// leaves what is shown once consumers have left it, and nothing is restarted for that.
var clearedTransitions = []leg{
	{From: Apply, Back: true, On: done, To: Publish},
	{From: Publish, Back: true, On: done, To: Sync},
	{From: Sync, Back: true, On: done, End: RolledBack},
	{From: Sync, Back: true, On: anew, To: Preflight},
}

// reconcileTransitions differ from the rest: nothing is generated and nothing
// promoted, so there is nothing to go back to. A reconcile that cannot be
// proven by its deadline fails and leaves the role drifted.
var reconcileTransitions = []leg{
	{From: Preflight, On: done, To: Apply},
	{From: Preflight, On: bad, End: Failed},
	{From: Preflight, On: recall, End: Cancelled},
	{From: Apply, On: done, To: Test},
	{From: Apply, On: bad, End: Failed},
	{From: Apply, On: recall, End: Cancelled},
	{From: Test, On: done, End: Completed},
	{From: Test, On: bad, End: Failed},
	{From: Test, On: recall, End: Cancelled},
}

// ringTransitions are those of key rings: the next key is published, and
// consumers have had the time to read it, before it is promoted.
var ringTransitions = []leg{
	{From: Preflight, On: done, To: Generate},
	{From: Preflight, On: bad, End: Failed},
	{From: Preflight, On: recall, End: Cancelled},
	{From: Generate, On: done, To: Apply},
	{From: Generate, On: bad, End: Failed},
	{From: Generate, On: recall, End: Cancelled},
	{From: Apply, On: done, To: Test}, // no server holds keys
	{From: Apply, On: recall, To: Apply, ToBack: true},
	{From: Test, On: done, To: Publish, ToAhead: true},
	{From: Publish, Ahead: true, On: done, To: Sync, ToAhead: true},
	{From: Publish, Ahead: true, On: recall, To: Publish, ToBack: true},
	{From: Sync, Ahead: true, On: done, To: Restart, ToAhead: true},
	{From: Sync, Ahead: true, On: recall, To: Publish, ToBack: true},
	{From: Restart, Ahead: true, On: done, To: Check, ToAhead: true},
	{From: Restart, Ahead: true, On: recall, To: Publish, ToBack: true},
	{From: Check, Ahead: true, On: done, To: Promote},
	{From: Check, Ahead: true, On: recall, To: Publish, ToBack: true},
	{From: Promote, On: done, To: Publish},
	{From: Publish, On: done, To: Sync},
	{From: Publish, On: recall, To: Publish, ToBack: true}, // promotes back first
	{From: Sync, On: done, To: Restart},
	{From: Sync, On: recall, To: Publish, ToBack: true}, // promotes back first
	{From: Restart, On: done, To: Check},
	{From: Restart, On: recall, To: Publish, ToBack: true}, // promotes back first
	{From: Check, On: done, To: Grace},
	{From: Check, On: recall, To: Publish, ToBack: true}, // promotes back first
	{From: Grace, On: done, To: Retire},
	{From: Grace, On: kept, End: Completed},
	{From: Grace, On: recall, To: Publish, ToBack: true}, // promotes back first
	{From: Retire, On: done, To: Publish, ToRetired: true},
	{From: Publish, Retired: true, On: done, To: Sync},
	{From: Sync, Retired: true, On: done, End: Completed},
	{From: Publish, Back: true, On: done, To: Sync},
	{From: Sync, Back: true, On: done, To: Restart},
	{From: Restart, Back: true, On: done, To: Check},
	{From: Check, Back: true, On: done, To: Apply},
	{From: Apply, Back: true, On: done, End: RolledBack},
}

// retireTransitions are for earlier keys that leave their ring.
var retireTransitions = []leg{
	{From: Preflight, On: done, To: Retire},
	{From: Preflight, On: bad, End: Failed},
	{From: Preflight, On: recall, End: Cancelled},
	{From: Retire, On: done, To: Publish, ToRetired: true},
	{From: Publish, Retired: true, On: done, To: Sync},
	{From: Sync, Retired: true, On: done, End: Completed},
}

// emergencyTransitions end everything but the new version as soon as that is served,
// and only then bring it to consumers. Once a server has heard of it nothing leads
// back, and what fails is tried again for as long as it takes.
var emergencyTransitions = []leg{
	{From: Preflight, On: done, To: Generate},
	{From: Preflight, On: bad, End: Failed},
	{From: Preflight, On: recall, End: Cancelled},
	{From: Generate, On: done, To: Apply},
	{From: Generate, On: bad, End: Failed},
	{From: Generate, On: recall, End: Cancelled},
	{From: Apply, On: done, To: Test},
	{From: Test, On: done, To: Promote},
	{From: Promote, On: done, To: Retire},
	{From: Retire, On: done, To: Publish, ToRetired: true},
	{From: Publish, Retired: true, On: done, To: Sync},
	{From: Sync, Retired: true, On: done, To: Restart},
	{From: Restart, Retired: true, On: done, To: Check},
	{From: Check, Retired: true, On: done, End: Completed},
	{From: Check, Retired: true, On: missed, End: Partial},
	// Where a node does not refuse the earlier ones, others do: consumers are brought the
	// new one all the same, and then that node is gone on with.
	{From: Retire, On: bad, To: Publish},
	{From: Publish, On: done, To: Sync},
	{From: Sync, On: done, To: Restart},
	{From: Restart, On: done, To: Check},
	{From: Check, On: done, To: Retire},
}

// follow returns the row for an event, and whether there is one.
func (r *Role) follow(on event) (leg, bool) {
	run := r.Run
	for _, l := range r.legs() {
		if l.From == run.Phase && l.Back == run.Back && l.Retired == run.Retired && l.Ahead == run.Ahead && l.On == on {
			return l, true
		}
	}
	return leg{}, false
}

// graceful reports whether previous material stays accepted after promotion.
func (r *Role) graceful() bool {
	return r.Spec.Strategy != kind.Swap && r.Run.Trigger != Create && !r.Run.urgent()
}
