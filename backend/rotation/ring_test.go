package rotation

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// testDelay is how long the consumers of these tests take to read a change.
const testDelay = 3 * time.Minute

// fakeRing is fakeKind with keys that verify in another form.
type fakeRing struct{ fakeKind }

func (fakeRing) Verifying(m kind.Material) (string, error) { return "verify-" + m.Secret, nil }

func (k fakeRing) Name() string { return "fakering" }

func (w *world) ringRole(r *Role) {
	r.UsernameField = ""
	r.Spec.PropagationDelay, r.Spec.MaxTokenTTL = testDelay, w.shape.tokens
	if w.shape.tokens == 0 {
		r.Spec.RetireAfter = time.Hour
		r.Spec.PreviousField = ""
	} else {
		r.Spec.PreviousField = "previous-" + r.Name
	}
	r.Spec.KeysField = "keys-" + r.Name
}

// life is what became of a key: since when consumers can read it, at creds/ and
// in the document, and when it was last used to sign or to encrypt.
type life struct {
	shown, published, used time.Time
	current                bool
	asked                  bool // it was asked for that it leaves
}

func (w *world) life(role, secret string) *life {
	if w.lives == nil {
		w.lives = map[string]map[string]*life{}
	}
	if w.lives[role] == nil {
		w.lives[role] = map[string]*life{}
	}
	l := w.lives[role][secret]
	if l == nil {
		l = &life{}
		w.lives[role][secret] = l
	}
	return l
}

// inUse has keys that the engine does not know of in use: earlier ones until now,
// and the last one from now on.
func (w *world) inUse(role string, secrets ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := time.Now().Add(-time.Hour)
	for _, secret := range secrets {
		*w.life(role, secret) = life{shown: before, published: before, used: time.Now()}
	}
}

// noteKeys checks a write of a ring: a key is used only after consumers could
// read it for as long as they may take, and one that was used leaves only when
// nothing that was made with it counts any more, or somebody said so.
func (w *world) noteKeys(r *Role) {
	if !r.ring() {
		return
	}
	now := time.Now()
	if r.Run.urgent() && r.Run.Promoted { // nobody waits for those who read it late
		for _, l := range w.lives[r.Name] {
			l.asked = l.asked || !r.decrypts()
		}
		long := now.Add(-time.Hour)
		l := w.life(r.Name, r.With(version.Current).Material.Secret)
		l.shown, l.published = long, long
	}
	var ring []string
	for _, v := range r.Ring() {
		ring = append(ring, v.Material.Secret)
		if l := w.life(r.Name, v.Material.Secret); l.shown.IsZero() {
			l.shown = now
		}
	}
	first := len(w.lives[r.Name]) == len(ring) && len(ring) == 1
	if current := r.With(version.Current); current != nil {
		l := w.life(r.Name, current.Material.Secret)
		if l.used.IsZero() && !first {
			if now.Sub(l.shown) < testDelay {
				w.violateLocked("key %s of role %s is used %s after it was shown", current.Material.Secret, r.Name, now.Sub(l.shown))
			}
			if r.Shows() && (l.published.IsZero() || now.Sub(l.published) < testDelay) {
				w.violateLocked("key %s of role %s is used, and its document has shown it since %s", current.Material.Secret, r.Name, l.published)
			}
		}
		for _, other := range w.lives[r.Name] {
			if other.current { // until now
				other.used, other.current = now, false
			}
		}
		l.used, l.current = now, true
	}
	if run := r.Run; run != nil && (run.RetireNow || run.Trigger == Retirement && run.Source != 0) {
		number := run.From
		if run.Trigger == Retirement {
			number = run.Source
		}
		if v := r.Get(number); v != nil {
			w.life(r.Name, v.Material.Secret).asked = true
		}
	}
	for secret, l := range w.lives[r.Name] {
		if slices.Contains(ring, secret) || l.used.IsZero() || l.asked || r.With(version.Current) == nil {
			continue
		}
		if now.Sub(l.used) < w.needed() {
			w.violateLocked("key %s of role %s leaves its ring %s after it was used: %s", secret, r.Name, now.Sub(l.used), describe(r))
		}
	}
}

// needed is for how long a key has to stay after it was last used.
func (w *world) needed() time.Duration {
	if w.shape.tokens > 0 {
		return w.shape.tokens + testDelay
	}
	return time.Hour
}

func (w *world) noteShown(r *Role) {
	now := time.Now()
	for _, secret := range w.shownKeys(r) {
		if l := w.life(r.Name, secret); l.published.IsZero() {
			l.published = now
		}
	}
}

// shownKeys are the keys that the document shows in the form that verifies.
func (w *world) shownKeys(r *Role) (secrets []string) {
	keys := map[string]string{}
	if raw := w.doc.Body[r.Spec.KeysField]; raw != "" {
		if err := json.Unmarshal([]byte(raw), &keys); err != nil {
			w.violateLocked("keys of role %s: %v", r.Name, err)
		}
	}
	for kid, form := range keys {
		if form != "verify-"+strings.TrimPrefix(kid, "kid-") {
			w.violateLocked("the document of role %s shows %s as %s", r.Name, kid, form)
		}
		secrets = append(secrets, strings.TrimPrefix(form, "verify-"))
	}
	return secrets
}

// checkShownRing: whoever reads the document can check what others sign with the
// current key, and what was signed with one that is still needed.
func (w *world) checkShownRing(r *Role, signs string) {
	if r.Run.urgent() && !r.isDelivery(r.Run.Phase) { // nobody knows it yet
		return
	}
	shown := w.shownKeys(r)
	if !slices.Contains(shown, signs) {
		w.violateLocked("the document of role %s signs with %s and does not show it", r.Name, signs)
	}
	current := r.With(version.Current)
	if current == nil {
		return
	}
	if !slices.Contains(shown, current.Material.Secret) {
		w.violateLocked("role %s serves key %s, which its document does not show", r.Name, current.Material.Secret)
	}
	for secret, l := range w.lives[r.Name] {
		if !l.used.IsZero() && !l.asked && time.Since(l.used) < w.needed() && !slices.Contains(shown, secret) {
			w.violateLocked("the document of role %s does not show key %s, used %s ago", r.Name, secret, time.Since(l.used))
		}
	}
}

func (w *world) checkRingAtRest(r *Role) {
	if v := r.With(version.Next); v != nil {
		w.violateLocked("at rest role %s still has next version %d", r.Name, v.Number)
	}
	if w.doc == nil || r.LastRun == nil || r.LastRun.State != Completed && r.LastRun.State != RolledBack || r.LastRun.Trigger == Reconcile {
		return
	}
	if got, want := w.doc.Body[r.Field], r.With(version.Current).Material.Secret; got != want && len(w.shownKeys(r)) > 0 {
		w.violateLocked("at rest the document shows %s as the key of role %s, which uses %s", got, r.Name, want)
	}
}

func TestRingVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &Role{Spec: kind.Spec{Strategy: kind.KeyRing, PropagationDelay: time.Minute, MaxTokenTTL: time.Hour}}
		now := time.Now()
		for _, secret := range []string{"one", "two"} {
			r.Add(kind.Material{Secret: secret}, "", now)
			r.Announce()
			r.Promote(now)
			r.dateKeys(now)
		}
		require.Equal(t, now.Add(time.Hour+time.Minute), r.With(version.Previous).RetireAt)

		// A rotation that is taken back leaves what it used in the ring.
		require.Equal(t, 3, r.PromoteRingBack("", now))
		r.dateKeys(now)
		require.True(t, r.Served(kind.Material{Secret: "one"}))
		require.Equal(t, 2, r.With(version.Previous).Number)
		require.Len(t, r.Ring(), 2)
		require.Equal(t, now.Add(time.Hour+time.Minute), r.retireAt())
		require.Nil(t, newest(r), "what was taken back is not brought back")

		r.Leave(2, now)
		require.Equal(t, version.Failed, r.Get(2).Stage)
		require.Len(t, r.Ring(), 1)
	})
}

// Rotations and rollbacks in turn leave no versions that are never forgotten.
func TestRingsForget(t *testing.T) {
	s := shape{name: "signing ring", strategy: kind.KeyRing, targetless: true, tokens: 20 * time.Minute}
	inWorld(t, s, nil, func(t *testing.T, w *world) {
		for range 5 {
			w.rotate("a")
			w.phase("a", Grace)
			w.rollBack("a")
			w.idle("a")
			w.rotate("a")
			w.idle("a")
		}
		w.pass(time.Hour)
		w.rotate("a")
		w.idle("a")
		r := w.role("a")
		require.LessOrEqual(t, len(r.Versions), r.KeepVersions)
		for _, v := range r.Versions {
			require.True(t, v.Stage == version.Current || !v.Refused.IsZero(), describe(r))
		}
	})
}

// Tokens that were signed while they could live longer are verified until they have
// run out, and consumers that were told to read less often are waited for.
func TestRingsThatGetFaster(t *testing.T) {
	s := shape{name: "signing ring", strategy: kind.KeyRing, targetless: true, tokens: 20 * time.Minute}
	inWorld(t, s, nil, func(t *testing.T, w *world) {
		began := time.Now()
		w.mu.Lock()
		w.shape.tokens = time.Minute // what is signed from now on
		w.mu.Unlock()
		require.NoError(t, w.do("update", func(ctx context.Context, e *Engine) error {
			return e.Update(ctx, "a", func(r *Role) error {
				r.Spec.MaxTokenTTL, r.Spec.PropagationDelay = time.Minute, time.Second
				return nil
			})
		}))
		w.rotate("a")
		w.until("the new key is used", time.Hour, func() bool { return w.roles["a"].With(version.Current).Number == 2 })
		require.GreaterOrEqual(t, time.Since(began), testDelay)
		w.idle("a")
		w.until("the old key has left", 2*time.Hour, func() bool { return len(w.roles["a"].Ring()) == 1 })
		require.GreaterOrEqual(t, time.Since(began), testDelay+20*time.Minute)
	})
}

// A ring that is created again goes on with the key that consumers know, or, where
// that is of another algorithm, with a new one.
func TestRingsThatAreCreatedAgain(t *testing.T) {
	s := shape{name: "signing ring", strategy: kind.KeyRing, targetless: true, tokens: 20 * time.Minute}
	inWorld(t, s, func(r *Role) { r.Spec.Algorithm = "RS256" }, func(t *testing.T, w *world) {
		create := func(algorithm string, initial *kind.Material, overwrite bool) error {
			return w.do("create", func(ctx context.Context, e *Engine) error {
				r := w.newRole("a")
				r.Spec.Algorithm = algorithm
				_, err := e.Create(ctx, Creation{Role: r, Initial: initial, Overwrite: overwrite})
				return err
			})
		}
		w.remove("a")
		require.ErrorContains(t, create("RS256", nil, true), "rotate/fakering/a")
		require.ErrorContains(t, create("RS256", material("a", "another"), false), "rotate/fakering/a")
		require.NoError(t, create("RS256", nil, false))
		w.idle("a")
		require.Equal(t, "m0-a", secret(w.role("a"), version.Current))

		w.remove("a")
		w.mu.Lock()
		w.lives = nil // nobody can verify with keys of another algorithm
		w.mu.Unlock()
		require.NoError(t, create("ES256", nil, false))
		w.idle("a")
		require.Equal(t, "m1", secret(w.role("a"), version.Current))
		require.Len(t, w.role("a").Ring(), 1)
	})
}
