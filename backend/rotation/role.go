package rotation

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/vault/sdk/helper/jsonutil"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/schedule"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Role is one secret under rotation. It is stored as one entry, because one
// Put is the only atomic thing that Vault's storage gives: configuration,
// material, phase and the next time change together or not at all.
type Role struct {
	Name        string `json:"name"`
	Kind        string `json:"kind"`
	Description string `json:"description,omitempty"`
	Connection  string `json:"connection,omitempty"`
	// Target is the identity of the server behind the connection when the role
	// claimed its user there.
	Target string `json:"target,omitempty"`

	// Given is what the user wrote, Spec the same with the kind's defaults.
	Given       kind.Spec      `json:"given"`
	Spec        kind.Spec      `json:"spec"`
	Schedule    schedule.Spec  `json:"schedule"`
	GracePeriod *time.Duration `json:"grace_period,omitempty"` // nil: the mount's
	// UntilUnused: grace ends when nobody uses the previous version any more, not
	// before GraceMinimum (nil: a default).
	UntilUnused  bool           `json:"grace_until_unused,omitempty"`
	GraceMinimum *time.Duration `json:"grace_minimum,omitempty"`
	KeepVersions int            `json:"keep_versions,omitempty"` // 0: the mount's
	AllowPartial bool           `json:"allow_partial,omitempty"`
	// A scheduled rotation waits until the last one of another role ended this
	// long ago; see Engine.apart.
	ApartFrom string        `json:"apart_from,omitempty"`
	ApartBy   time.Duration `json:"apart_by,omitempty"`

	// Document is the document that the role fills, Field where the secret goes
	// in it and UsernameField where its user; Spec.PreviousField names the third.
	Document string `json:"document,omitempty"`
	// Place is where the same fields are published to another mount; PlaceTarget is
	// the identity of the Vault behind its connection when the role claimed them.
	Place         publish.Place `json:"place,omitzero"`
	PlaceTarget   string        `json:"place_target,omitempty"`
	Field         string        `json:"field,omitempty"`
	UsernameField string        `json:"username_field,omitempty"`

	version.Set

	// Run is the role's part in a rotation that has not ended.
	Run *Run `json:"run,omitempty"`
	// Next is the stored time of the next scheduled rotation. It is never
	// computed anew from the clock: a slot that nobody served stays due.
	Next         time.Time `json:"next,omitzero"`
	LastRotation time.Time `json:"last_rotation,omitzero"`
	// Of a ring whose propagation_delay or max_token_ttl was made shorter: when
	// consumers that go by the longer one have read again, and until when what was
	// signed for longer counts.
	ReadBy      time.Time `json:"read_by,omitzero"`
	CountsUntil time.Time `json:"counts_until,omitzero"`
	// MissedSlots counts the slots that came due and had no rotation of their
	// own; LastMissed is the latest of them.
	MissedSlots int       `json:"missed_slots,omitempty"`
	LastMissed  time.Time `json:"last_missed,omitzero"`
	LastRun     *Ending   `json:"last_run,omitempty"`
	// Failures counts scheduled rotations that failed in a row; the next try is
	// not before RetryAt.
	Failures int       `json:"failures,omitempty"`
	RetryAt  time.Time `json:"retry_at,omitzero"`
	// Suspended is why scheduled rotations have stopped.
	Suspended string `json:"suspended,omitempty"`
	Drift     *Drift `json:"drift,omitempty"`
	// AutoReconcile: what the target accepts is looked at now and then, and mended.
	AutoReconcile bool `json:"auto_reconcile,omitempty"`
	// LookAt is when, next.
	LookAt time.Time `json:"look_at,omitzero"`
	// Unmended is how many reconciles in a row have failed.
	Unmended int `json:"unmended,omitempty"`
	// Consumers are those that have to run with what the role serves before anything
	// earlier is refused. HoldOnFailure: one that fails is for people to decide about.
	Consumers     []string `json:"consumers,omitempty"`
	HoldOnFailure bool     `json:"hold_on_failure,omitempty"`
	// SecretHosts are where checks of its consumers may send its secret.
	SecretHosts []string `json:"secret_hosts,omitempty"`
	// Profile is what its user was found to be, beside its password; see
	// kind.Finding.
	Profile []string `json:"profile,omitempty"`
	// Nodes held this role's user when it was last proven; see
	// connection.Entry.Generation.
	Nodes           []string  `json:"nodes,omitempty"`
	NodesGeneration int       `json:"nodes_generation,omitempty"`
	Created         time.Time `json:"created"`
	// Of a role that was deleted: Restored is the rotation that brought it back, and
	// Beside the version that the one it was deleted in had left accepted beside the
	// current one.
	Restored string `json:"restored,omitempty"`
	Beside   int    `json:"beside,omitempty"`
}

// Run is a role's part in a rotation, from start to end.
type Run struct {
	Rotation string  `json:"rotation"`
	Trigger  Trigger `json:"trigger"`
	Phase    Phase   `json:"phase"`
	// Back is the direction. It is stored before the first step back and never
	// turns forward again.
	Back bool `json:"back,omitempty"`
	// Why is for what it goes back; Error is what holds it up on the way.
	Why string `json:"why,omitempty"`
	// Retired: previous has been proven refused, and what is left of the run is
	// to publish that.
	Retired bool `json:"retired,omitempty"`
	// Ahead: the next key of a ring is shown, and not used yet.
	Ahead  bool   `json:"ahead,omitempty"`
	Recall string `json:"recall,omitempty"` // who asked to go back, in words
	// Doomed is why the run gives up as soon as what it sent can no longer land.
	Doomed string `json:"doomed,omitempty"`
	// Promoted: the new material was served; only then is a way back a matter
	// for consumers.
	Promoted bool `json:"promoted,omitempty"`

	// Unit is that of the role's part in the rotation; see Part.
	Unit int `json:"unit,omitempty"`

	From int `json:"from,omitempty"` // the version that was current
	To   int `json:"to,omitempty"`   // the version this run is about

	// Attempt is a change sent to the target. Whoever reads it from storage
	// waits until its deadline has passed: it may still land.
	Attempt *version.Attempt `json:"attempt,omitempty"`

	Started time.Time `json:"started"`
	// Vouched is when somebody said that what is stored of the run is so, which who finds it
	// after a start of the engine doubts; Doubt: it waits for that.
	Vouched time.Time `json:"vouched,omitzero"`
	Doubt   bool      `json:"doubt,omitempty"`
	// Unasked: it went back when no node answered that could have been asked about that.
	Unasked    bool      `json:"unasked,omitempty"`
	Deadline   time.Time `json:"deadline,omitzero"` // of the phase
	GraceUntil time.Time `json:"grace_until,omitzero"`
	GraceFrom  time.Time `json:"grace_from,omitzero"`
	// Usage is who was seen to use the previous version meanwhile.
	Usage *Usage `json:"usage,omitempty"`
	// CheckUntil is when every consumer has read what was published.
	CheckUntil time.Time `json:"check_until,omitzero"`
	RetireNow  bool      `json:"retire_now,omitempty"`
	// CloseBefore is when previous began to be refused: sessions from before then
	// may be its.
	CloseBefore time.Time `json:"close_before,omitzero"`
	Reapply     bool      `json:"reapply,omitempty"` // reconcile during grace

	Tries   int       `json:"tries,omitempty"`
	RetryAt time.Time `json:"retry_at,omitzero"`
	Error   string    `json:"error,omitempty"`

	// Adopted: the pending version came from the user and the target accepts
	// it already; it is never refused on the way back.
	Adopted bool `json:"adopted,omitempty"`
	// Overwrite: a create may end credentials that it was not told about.
	Overwrite bool `json:"overwrite,omitempty"`
	// Restores: what it creates is a role that was deleted.
	Restores bool `json:"restores,omitempty"`
	// Source is the version whose material a rollback brings back.
	Source int `json:"source,omitempty"`

	// Of a run at its consumers: when what they are to have was published, and how far
	// this role has brought each of those that it delivers to.
	PublishedAt time.Time `json:"published_at,omitzero"`
	Surveyed    bool      `json:"surveyed,omitempty"` // its consumers are reserved, and nothing stands against it there
	// Joint is who shares the delivery. Again: it goes back with them and then begins
	// anew, alone; Anew is when it did.
	Joint     *joint      `json:"joint,omitempty"`
	Again     bool        `json:"again,omitempty"`
	Anew      time.Time   `json:"anew,omitzero"`
	Delivered []delivered `json:"delivered,omitempty"`
	// Held is why somebody has to decide.
	Held string `json:"held,omitempty"`
	// SwapsBack: consumers have seen the new credential of a server that knows one.
	SwapsBack bool `json:"swaps_back,omitempty"`
	// Cleared: on the way back, what failed is not shown any more.
	Cleared bool `json:"cleared,omitempty"`

	Missed []string `json:"missed,omitempty"` // nodes passed over (allow_partial)

	// Of an emergency: what it does at consumers, the number of its delivery, which of
	// its unit have begun that, and where consumers could not be proven.
	Emergency *Emergency `json:"emergency,omitempty"`
	TookOver  string     `json:"took_over,omitempty"` // the rotation that it has ended
	Batch     int        `json:"batch,omitempty"`
	Begun     bool       `json:"begun,omitempty"`
	Over      bool       `json:"over,omitempty"` // all its consumers are done
	Unproven  []unproven `json:"unproven,omitempty"`
	// Refused is when every earlier version was proven to be refused.
	Refused time.Time `json:"refused,omitzero"`

	// Of a secret that another server keeps; see keep.go. Before is the version that
	// it showed before it was asked for a new one, 0 where it shows none, and Shown
	// the newest seen since. Reply is what it answered.
	Before int    `json:"before,omitempty"`
	Shown  int    `json:"shown,omitempty"`
	Reply  string `json:"reply,omitempty"`

	Timeline []Moment `json:"timeline,omitempty"`
}

// Moment is a line of a rotation's timeline.
type Moment struct {
	At   time.Time `json:"at"`
	What string    `json:"what"`
}

// Ending is how the last rotation of a role ended.
type Ending struct {
	Rotation string    `json:"rotation"`
	Trigger  Trigger   `json:"trigger"`
	State    State     `json:"state"`
	Error    string    `json:"error,omitempty"`
	At       time.Time `json:"at"`
}

// Drift is a known difference between what is stored and what the target
// accepts.
type Drift struct {
	Since  time.Time `json:"since"`
	Reason string    `json:"reason"`
	// Missed are nodes that were passed over and may accept old material. The
	// engine heals them by itself when they answer again.
	Missed  []string  `json:"missed,omitempty"`
	Tries   int       `json:"tries,omitempty"`
	RetryAt time.Time `json:"retry_at,omitzero"`
}

// maxTimeline bounds a timeline; a rotation that waits for days repeats itself.
const maxTimeline = 64

// Bounds on what others' errors and users' reasons may add to an entry: so many
// characters, and so many bytes of JSON, which writes some characters as six.
const (
	maxRunes = 256
	maxText  = 512
)

// clip shortens a text to what may go into an entry. What is not UTF-8 is left
// out: JSON would make more of it. What a terminal would act on becomes a question mark.
func clip(s string) string { return clipTo(s, maxRunes, maxText) }

func clipTo(s string, runes, size int) string {
	if runes == 0 {
		return ""
	}
	var out strings.Builder
	size -= len("…") + 2 // the quotes
	n := 0
	for i, r := range s {
		if r == utf8.RuneError {
			if _, width := utf8.DecodeRuneInString(s[i:]); width == 1 {
				continue
			}
		}
		if !unicode.IsPrint(r) {
			r = '?'
		}
		cost := escaped(r)
		if n == runes || cost > size {
			return out.String() + "…"
		}
		out.WriteRune(r)
		n++
		size -= cost
	}
	return out.String()
}

// escaped is how many bytes r takes in JSON, at most.
func escaped(r rune) int {
	switch {
	case r < ' ', strings.ContainsRune("<>&\u007f\u2028\u2029", r):
		return len(`\u0000`)
	case r == '"', r == '\\':
		return 2
	}
	return utf8.RuneLen(r)
}

func (r *Role) mark(now time.Time, what string) {
	t := &r.Run.Timeline
	what = clip(what)
	if n := len(*t); n > 0 && (*t)[n-1].What == what {
		return
	}
	if len(*t) >= maxTimeline {
		*t = slices.Delete(*t, maxTimeline/2, maxTimeline/2+1)
	}
	*t = append(*t, Moment{At: now.UTC(), What: what})
}

// State is the role's own state, as status and roles show it.
func (r *Role) State() string {
	switch {
	case r.Run != nil && r.Run.Phase == Grace && !r.Run.Back:
		return "grace"
	case r.Run != nil:
		return "rotating"
	case r.Drift != nil:
		return "drifted"
	case r.Suspended != "":
		return "suspended"
	}
	return "idle"
}

// state is the state of the role's part in its rotation.
func (run *Run) state() State {
	switch {
	case run.Held != "":
		return Held
	case run.Back && (run.Tries >= rollbackAlarm || run.Doubt):
		return RollbackFailed
	case run.Back:
		return RollingBack
	case run.Doubt:
		return Waiting
	case run.Phase == Grace && !run.Reapply:
		return InGrace
	case run.Tries > 0, run.Phase == Check && !run.CheckUntil.IsZero():
		return Waiting
	}
	return Running
}

// settled reports whether the credential phases are over: the new material is
// served, or the rotation is on its way back or must wait for its target. Where
// there is no grace, retiring follows at once and is one of them.
func (run *Run) settled() bool {
	graceOver := run.Phase == Retire && !run.GraceUntil.IsZero()
	return run.Back || run.Phase == Sync || run.Phase == Restart || run.Phase == Check || run.Phase == Grace || run.Retired || graceOver || run.Doubt || run.Tries >= settleTries
}

// laneOfConsumer begins lanes of work at consumers.
const laneOfConsumer = "consumer/"

// lane is what a role's work shares with that of others: kind and connections.
func (r *Role) lane() string {
	if run := r.Run; run != nil && (r.surveys() || r.isDelivery(run.Phase)) {
		return laneOfConsumer + r.Consumers[0] // a cluster that hangs holds up its consumers alone
	}
	return r.targetLane()
}

// targetLane is the same without consumers: roles of one share calls to a target.
func (r *Role) targetLane() string {
	lane := r.Kind + "/" + r.Connection
	if r.Root() { // it does not wait behind hundreds of roles that log in with it
		return lane + "/root"
	}
	if c := r.Place.Connection; c != "" && c != r.Connection {
		lane += "/" + c
	}
	return lane
}

// Grace returns how long previous stays accepted after promotion. Keys that sign
// stay as long as what they signed last; keys that encrypt until they are
// retired, which no rotation waits for.
func (r *Role) Grace(c Config) time.Duration {
	if r.ring() {
		return r.tokens()
	}
	if r.GracePeriod != nil {
		return *r.GracePeriod
	}
	return c.GracePeriod
}

func (r *Role) keep(c Config) int {
	if r.KeepVersions > 0 {
		return r.KeepVersions
	}
	return c.KeepVersions
}

// TTL is how long the served version is sure to stay current: until the stored
// next time, and 0 while a newer one is on its way. ok is false without
// automatic rotation.
func (r *Role) TTL(now time.Time) (ttl time.Duration, ok bool) {
	if r.swapping() {
		return 0, true
	}
	if r.Run != nil && !r.Run.Back && (r.With(version.Pending) != nil || r.Run.urgent() && !r.Run.Promoted) {
		return 0, true
	}
	if r.ring() { // whoever uses keys has to see the next one before it is used
		return r.ringTTL(now), true
	}
	if r.Next.IsZero() {
		return 0, false
	}
	return max(0, r.Next.Sub(now)), true
}

// dueAt is when the engine has to look at the role by itself: for its next
// scheduled rotation, or to heal nodes that were passed over. Zero: never.
func (r *Role) dueAt() time.Time {
	var at time.Time
	if !r.Next.IsZero() && r.Suspended == "" {
		if at = r.Next; r.RetryAt.After(at) {
			at = r.RetryAt
		}
	}
	if r.Drift != nil && len(r.Drift.Missed) > 0 && (at.IsZero() || r.Drift.RetryAt.Before(at)) {
		at = r.Drift.RetryAt
	}
	if looks := r.looksAt(); !looks.IsZero() && (at.IsZero() || looks.Before(at)) {
		at = looks
	}
	if leaves := r.retireAt(); !leaves.IsZero() && (at.IsZero() || leaves.Before(at)) {
		at = leaves
	}
	return at
}

// miss accounts for slots that were passed over.
func (r *Role) miss(passed schedule.Passed) {
	r.MissedSlots += passed.Count
	if passed.Last.After(r.LastMissed) {
		r.LastMissed = passed.Last
	}
}

// NextRotations are the next n times at which the role rotates by itself. The
// first may have passed: then it is due.
func (r *Role) NextRotations(now time.Time, n int) []time.Time {
	if r.Next.IsZero() || r.Next.After(now) {
		return schedule.NextN(r.Schedule, r.Name, r.Next, n)
	}
	then := schedule.Next(r.Schedule, r.Name, now)
	return append([]time.Time{r.Next}, schedule.NextN(r.Schedule, r.Name, then, n-1)...)
}

// PreviousServed returns the previous version while it is accepted and may be
// handed out, and until when.
func (r *Role) PreviousServed() (*version.Version, time.Time) {
	if r.ring() {
		v := r.With(version.Previous)
		if v == nil {
			return nil, time.Time{}
		}
		return v, r.leaves(v)
	}
	run := r.Run
	for _, v := range []*version.Version{r.lingering(), r.beside()} {
		if v != nil {
			return v, time.Time{}
		}
	}
	if run == nil || run.Back || run.Retired || run.GraceUntil.IsZero() && run.Phase != Grace {
		return nil, time.Time{}
	}
	switch run.Phase {
	case Publish, Sync, Restart, Check, Grace:
	default:
		return nil, time.Time{}
	}
	return r.With(version.Previous), run.GraceUntil
}

// lingering is the version that failed, of a secret that no server holds: who checks
// such secrets goes by what is shown. It stays shown as previous on the way back until
// every consumer was seen to have left it; nil for all others.
func (r *Role) lingering() *version.Version {
	run := r.Run
	if run == nil || !run.Back || !run.Promoted || run.Cleared || !r.consults() {
		return nil
	}
	if r.Connection != "" || r.Spec.Strategy != kind.Overlap || r.Spec.PreviousField == "" {
		return nil
	}
	v := r.Get(run.To)
	if v == nil || r.Served(v.Material) {
		return nil
	}
	return v
}

// returnable reports whether what is shown can be taken back: previous is still
// accepted, or what comes next is not used yet. With swap it is not, from apply
// on.
func (r *Role) returnable() bool {
	run := r.Run
	switch {
	case run.Back || run.Retired || run.Trigger == Create || run.Trigger == Retirement:
		return false
	case run.Ahead:
		return true
	}
	// What no server holds can be exchanged for what was there before. A server that
	// knows one credential is told the old one again where consumers fail with the new.
	failing := run.Phase == Sync || run.Phase == Restart || run.Phase == Check && r.consults()
	reversible := r.Spec.Strategy != kind.Swap || r.Connection == "" || failing
	return reversible && r.With(version.Previous) != nil
}

// publishes reports whether a run stops in the publish phase. Key rings do without
// a document as well: what creds/ shows is stored before the time is counted that
// consumers have to read it, because that write may take.
func (r *Role) publishes() bool { return r.Shows() || r.ring() || r.delivers() }

// Shows reports whether what the role serves is written where consumers read it.
func (r *Role) Shows() bool { return r.Document != "" || !r.Place.Zero() }

// view is what the role's document has to show as things stand. The field of
// the previous value is emptied, not removed: who reads it by name finds it.
func (r *Role) view(k kind.Kind) (publish.View, error) {
	current := r.With(version.Current)
	v := publish.View{Role: r.Name, Version: current.Number, Fields: map[string]string{r.Field: current.Material.Secret}}
	v.Retired = r.Run != nil && (r.Run.Retired || r.Run.Back || r.Run.urgent() || r.Run.Restores && r.Connection != "")
	if r.UsernameField != "" {
		v.Fields[r.UsernameField] = current.Material.Username
	}
	if r.ring() {
		return v, r.showRing(k, v.Fields)
	}
	if name := r.Spec.PreviousField; name != "" {
		v.Fields[name] = ""
		// What a server has beside the current one may end there at once, by a reconcile,
		// which publishes nothing.
		if p, _ := r.PreviousServed(); p != nil && (r.Connection == "" || p.Number != r.Beside) {
			v.Fields[name] = p.Material.Secret
		}
	}
	return v, nil
}

// roomy refuses a role whose entry could grow out of its limit before its run
// has ended: the way back serves old material under a further version, and the
// timeline gets longer. Once material is at the target it is too late to notice.
func (r *Role) roomy() error {
	c := r.clone()
	c.Promote(time.Time{})
	c.PromoteBack("", time.Time{})
	raw, err := jsonutil.EncodeJSON(c)
	if err == nil && len(raw)+(maxTimeline+1)*(maxText+64)+usageRoom > maxRoleEntry {
		err = fmt.Errorf("the entry of role %q would have %d bytes: too many for a rotation to be safe; "+
			"use shorter values or a smaller keep_versions", r.Name, len(raw))
	}
	return err
}

func (r *Role) clone() *Role {
	c := *r
	c.Set = r.Set.Clone()
	c.Consumers, c.SecretHosts = slices.Clone(r.Consumers), slices.Clone(r.SecretHosts)
	c.Nodes, c.Profile = slices.Clone(r.Nodes), slices.Clone(r.Profile)
	if r.Run != nil {
		run := *r.Run
		run.Timeline = slices.Clone(run.Timeline)
		run.Missed, run.Delivered, run.Unproven = slices.Clone(run.Missed), slices.Clone(run.Delivered), slices.Clone(run.Unproven)
		c.Run = &run
	}
	if r.Drift != nil {
		d := *r.Drift
		c.Drift = &d
	}
	return &c
}

// Config holds the mount's defaults.
type Config struct {
	GracePeriod  time.Duration `json:"grace_period"`
	KeepVersions int           `json:"keep_versions"`
	Workers      int           `json:"workers"`
	Freeze       bool          `json:"freeze"`
	FreezeUntil  time.Time     `json:"freeze_until,omitzero"` // zero: until it is ended
	FreezeReason string        `json:"freeze_reason,omitempty"`
	// AllowedHosts are those that checks may send requests to: names, or *. and a
	// domain.
	AllowedHosts []string `json:"allowed_hosts,omitempty"`
}

// Frozen reports whether no rotation may start now. A freeze that has an end
// ends by itself, without anything being written.
func (c Config) Frozen(now time.Time) bool {
	return c.Freeze && (c.FreezeUntil.IsZero() || now.Before(c.FreezeUntil))
}

// DefaultConfig is the configuration of a new mount.
func DefaultConfig() Config {
	return Config{GracePeriod: time.Hour, KeepVersions: 5, Workers: 32}
}
