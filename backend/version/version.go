// Package version holds the generations of one credential and their stages.
//
// A Set is a plain value: it is stored inside a role's or a connection's entry
// and changed only by the operations here, each of which leaves it in a state
// that is safe to store. Material is compared by content, never by number,
// because a rollback serves old material under a new number.
package version

import (
	"slices"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Stage is the label of a version.
type Stage string

// A version is pending until it is proven at its target, current while it is
// served, previous while it is still accepted beside the current one, and
// retired once it was proven refused. A version that was taken back is failed.
// The next key of a ring is shown to those who verify before it signs.
const (
	Pending     Stage = "pending"
	Next        Stage = "next"
	Current     Stage = "current"
	Previous    Stage = "previous"
	Retired     Stage = "retired"
	Failed      Stage = "failed"
	Compromised Stage = "compromised"
)

// Version is one generation of a credential.
type Version struct {
	Number   int           `json:"number"`
	Stage    Stage         `json:"stage"`
	Material kind.Material `json:"material"`
	Created  time.Time     `json:"created"`
	Promoted time.Time     `json:"promoted,omitzero"`
	// Refused is when every known node was seen to refuse the material, or
	// when it is known never to have reached one. Until then the version is
	// not forgotten.
	Refused  time.Time `json:"refused,omitzero"`
	Rotation string    `json:"rotation,omitempty"`
	// Of a key that stays in its ring after it was current: since when it has
	// been another's, when it leaves by itself (zero: as its role says), since
	// when nothing needs it any more, and whether its rotation was taken back.
	Replaced  time.Time `json:"replaced,omitzero"`
	RetireAt  time.Time `json:"retire_at,omitzero"`
	Acked     time.Time `json:"acked,omitzero"`
	TakenBack bool      `json:"taken_back,omitempty"`
	// CopyOf is the version whose material this one carries again.
	CopyOf int `json:"copy_of,omitempty"`
	// Compromised is since when it is known to somebody who must not know it.
	Compromised time.Time `json:"compromised,omitzero"`
	// Evidence is what was seen of a version whose material nobody sees.
	Evidence string `json:"evidence,omitempty"`
}

// Attempt is a change that was sent to a target and whose outcome may be
// unknown until its deadline has passed.
type Attempt struct {
	Call     string    `json:"call"`
	Deadline time.Time `json:"deadline"`
	// Landed: nothing of it can still happen, and a node answered it with an
	// error. It is made again before what it was for counts as done.
	Landed bool `json:"landed,omitempty"`
}

// Set is all versions of one credential, oldest first.
type Set struct {
	Versions []Version `json:"versions,omitempty"`
	// Last is the highest number ever used; numbers are never used again.
	Last int `json:"last"`
}

// With returns the newest version at stage, or nil.
func (s *Set) With(stage Stage) *Version {
	for i := len(s.Versions) - 1; i >= 0; i-- {
		if s.Versions[i].Stage == stage {
			return &s.Versions[i]
		}
	}
	return nil
}

// Get returns version number, or nil.
func (s *Set) Get(number int) *Version {
	for i := range s.Versions {
		if s.Versions[i].Number == number {
			return &s.Versions[i]
		}
	}
	return nil
}

// Add appends material as a new pending version and returns its number.
func (s *Set) Add(m kind.Material, rotation string, now time.Time) int {
	s.Last++
	s.Versions = append(s.Versions, Version{
		Number: s.Last, Stage: Pending, Material: m, Created: now, Rotation: rotation,
	})
	return s.Last
}

// Coming returns the version that is to be current: pending, or next.
func (s *Set) Coming() *Version {
	if v := s.With(Pending); v != nil {
		return v
	}
	return s.With(Next)
}

// Promote makes the coming version current and current previous.
func (s *Set) Promote(now time.Time) {
	v := s.Coming()
	if current := s.With(Current); current != nil {
		current.Stage, current.Replaced = Previous, now
	}
	if v != nil {
		v.Stage, v.Promoted = Current, now
	}
}

// Announce makes pending the next key of its ring.
func (s *Set) Announce() {
	if v := s.With(Pending); v != nil {
		v.Stage = Next
	}
}

// Ring returns the keys of a ring, newest first: what is current, what comes
// next, and what was current and has not left. Material that stands under two
// numbers is one key.
func (s *Set) Ring() []Version {
	var out []Version
	for _, v := range slices.Backward(s.Versions) {
		switch v.Stage {
		case Current, Next, Previous:
			if !slices.ContainsFunc(out, func(o Version) bool { return o.Material.Same(v.Material) }) {
				out = append(out, v)
			}
		default: // it is not in the ring
		}
	}
	return out
}

// Leave takes version number out of the ring.
func (s *Set) Leave(number int, now time.Time) {
	v := s.Get(number)
	if v == nil {
		return
	}
	if v.Stage = Retired; v.TakenBack {
		v.Stage = Failed
	}
	v.Refused = now
	s.MarkRefused(v.Material, now) // with the earlier numbers of the same key
}

// PromoteBack serves the material of previous again, under a new number, and
// marks what was current as failed. It returns the new number.
func (s *Set) PromoteBack(rotation string, now time.Time) int {
	prev := s.With(Previous)
	if prev == nil {
		return 0
	}
	if v := s.With(Current); v != nil {
		v.Stage = Failed
	}
	material, number := prev.Material, prev.Number
	prev.Stage = Retired // its material goes on under the new number
	s.Last++
	s.Versions = append(s.Versions, Version{
		Number: s.Last, Stage: Current, Material: material, Created: now, Promoted: now,
		Rotation: rotation, CopyOf: number,
	})
	return s.Last
}

// PromoteRingBack is PromoteBack for a ring: what was current has signed, and so
// stays in the ring as previous.
func (s *Set) PromoteRingBack(rotation string, now time.Time) int {
	taken := s.With(Current)
	number := s.PromoteBack(rotation, now)
	if number == 0 || taken == nil {
		return number
	}
	taken = s.Get(taken.Number) // the slice may have moved
	taken.Stage, taken.Replaced, taken.TakenBack = Previous, now, true
	return number
}

// Discard marks the coming version as failed. refused says whether it is known to be
// accepted nowhere.
func (s *Set) Discard(refused bool, now time.Time) {
	if v := s.Coming(); v != nil {
		v.Stage = Failed
		if refused {
			v.Refused = now
		}
	}
}

// Compromise records that whatever is not served is known to somebody who must not know
// it. Where decrypts is set, the keys of a ring stay in it for what they encrypted.
func (s *Set) Compromise(decrypts bool, now time.Time) {
	for i := range s.Versions {
		v := &s.Versions[i]
		if v.Stage == Current || s.Served(v.Material) {
			continue
		}
		if v.Compromised.IsZero() {
			v.Compromised = now
		}
		if v.Stage != Previous || !decrypts {
			v.Stage = Compromised
		}
	}
}

// LeaveCompromised records that no compromised key is in the ring any more that does not
// have to decrypt.
func (s *Set) LeaveCompromised(now time.Time) {
	for i := range s.Versions {
		if v := &s.Versions[i]; v.Stage == Compromised && v.Refused.IsZero() {
			v.Refused = now
		}
	}
}

// Served reports whether m is what the current version holds.
func (s *Set) Served(m kind.Material) bool {
	v := s.With(Current)
	return v != nil && v.Material.Same(m)
}

// Accepted returns the distinct materials that a target may accept: those of
// every version not proven refused, newest first.
func (s *Set) Accepted() []kind.Material {
	return s.distinct(func(v Version) bool {
		return v.Refused.IsZero() || v.Stage == Current || v.Stage == Pending || v.Stage == Next || v.Stage == Previous
	})
}

// All returns every distinct material of the set, newest first.
func (s *Set) All() []kind.Material { return s.distinct(func(Version) bool { return true }) }

func (s *Set) distinct(take func(Version) bool) []kind.Material {
	var out []kind.Material
	for _, v := range slices.Backward(s.Versions) {
		if take(v) && !slices.ContainsFunc(out, v.Material.Same) {
			out = append(out, v.Material)
		}
	}
	return out
}

// MarkRefused records that every known node refuses m. Versions whose material
// is served are left alone.
func (s *Set) MarkRefused(m kind.Material, now time.Time) {
	if s.Served(m) {
		return
	}
	for i := range s.Versions {
		v := &s.Versions[i]
		if !v.Material.Same(m) {
			continue
		}
		if v.Refused.IsZero() {
			v.Refused = now
		}
		if v.Stage == Previous {
			if v.Stage = Retired; v.TakenBack {
				v.Stage = Failed
			}
		}
	}
}

// Prune forgets the oldest versions beyond keep, first those whose material is served
// under another number. It never forgets a version that is in use, or one that a
// target may still accept.
func (s *Set) Prune(keep int) {
	excess := len(s.Versions) - max(keep, 1)
	for _, every := range []bool{false, true} {
		s.Versions = slices.DeleteFunc(s.Versions, func(v Version) bool {
			if excess <= 0 || !s.forgettable(v) || !every && !s.Served(v.Material) {
				return false
			}
			excess--
			return true
		})
	}
}

func (s *Set) forgettable(v Version) bool {
	switch v.Stage {
	case Pending, Next, Current, Previous:
		return false
	default: // whatever else may be forgotten once it is refused
	}
	// Material that is served again under a newer number is not refused, and
	// the newer number keeps it.
	return !v.Refused.IsZero() || s.Served(v.Material)
}

// Clone returns a copy that shares nothing with s.
func (s Set) Clone() Set {
	s.Versions = slices.Clone(s.Versions)
	return s
}
