// Package rotation is the core: roles, their versions, and the state machine
// that takes a role from one version to the next without losing a credential.
//
//	preflight → generate → apply → test → promote → publish → grace → retire → publish
//	               └──────────┴── any failure before retire ────────┴──→ rolling back
//
// Publish has the role's document show what is served; a role without one does
// not stop there. Key rings take more steps, because consumers hold several keys:
//
//	… → test → publish → check → promote → publish → check → grace → retire → publish
//
// The next key is shown first and used when everybody has had the time to read it
// (ring.go).
//
// Two facts are kept apart and never folded into one flag: which material a
// target accepts, which is always probed and never only remembered, and which
// version is served, which is the stage "current" in the role's entry.
//
// The rules that make it safe, each of which a test and docs/model try to break:
//
//   - One entry a role. Everything that changes together is in it (Role).
//   - Intent before effect. New material is stored as pending, and an attempt
//     with a deadline, before a target hears of either (decide.go).
//   - A change that may still land is waited for before anything is asked or
//     changed again (decider.decide).
//   - A login proves what a node holds in memory; that it is saved, only the good
//     answer to a call. So an error of a node that answers counts, and whoever
//     finds an attempt outstanding makes its call once more (decider.pursue).
//   - After an error of a write, what is stored is read, not assumed (store in
//     execute.go drops the job).
//   - A write of unknown outcome is settled by a later one before anything is
//     decided from what is read (storage.Fenced.Settle).
//   - A change that a node answered with an error does not count as made, whatever
//     it shows now: it may not have been saved (decider.pursue).
//   - The direction is stored before the first step back, and never turns.
//   - Material is forgotten only after every known node was seen to refuse it
//     (version.Set.Prune).
//
// A secret that another server makes and keeps has a shorter machine (keep.go):
// it is asked for a new version once, and nothing is served or taken back here.
//
// decide.go is the machine: state, facts and a clock in, one step out, no I/O.
// phase.go is its transition table, as data. execute.go does the steps for many
// roles at once; engine.go decides when; begin.go, operate.go and due.go are the
// ways in. proof.go keeps what was seen at consumers, and success.go says what of a
// rotation's conditions of success that shows. The package knows no target and no
// cluster: it sees kind.Target, kind.Keeper and Deliverer.
package rotation
