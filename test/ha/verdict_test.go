package ha_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// verdict is what all of it came to.
type verdict struct {
	*stage
	play    *play
	crowd   *crowd
	drivers *drivers
	watch   *leaderWatch

	states    map[string]int // rotations that were asked for, by state
	doubled   []string
	open      []string
	refused   []string // served credentials that are, at the end
	leaked    []string
	searched  int
	instances int // of the engine that run, in the plugin's process
	routines  int
	ends      []time.Time // of rotations that completed
}

// accepted is a credential that a server accepts, as far as it says so.
type accepted struct {
	role, user string
	is         func(secret string) (bool, error)
}

// accepted asks every server what it keeps of the users of the roles.
func (s *stage) accepted(ctx context.Context) (all []accepted, err error) {
	for _, r := range s.roles {
		for _, user := range r.users {
			var found []func(string) (bool, error)
			switch r.kind {
			case "redis":
				found, err = s.acceptedByRedis(ctx, user)
			case "postgresql":
				found, err = s.acceptedByPostgres(ctx, user)
			case "rabbitmq":
				found, err = s.acceptedByRabbit(ctx, user)
			}
			if err != nil {
				return nil, fmt.Errorf("what is accepted of %s: %w", user, err)
			}
			for _, is := range found {
				all = append(all, accepted{r.name, user, is})
			}
		}
	}
	return all, nil
}

func (s *stage) acceptedByRedis(ctx context.Context, user string) (all []func(string) (bool, error), err error) {
	reply, err := s.redis.Do(ctx, "ACL", "LIST")
	if err != nil {
		return nil, err
	}
	for _, line := range reply.([]any) {
		words := strings.Fields(line.(string)) // user NAME on #hash …
		if words[1] != user {
			continue
		}
		for _, word := range words {
			if hash, ok := strings.CutPrefix(word, "#"); ok {
				all = append(all, func(secret string) (bool, error) {
					sum := sha256.Sum256([]byte(secret))
					return hex.EncodeToString(sum[:]) == hash, nil
				})
			}
		}
	}
	return all, nil
}

// acceptedByPostgres reads SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>
// (RFC 5803).
func (s *stage) acceptedByPostgres(ctx context.Context, user string) ([]func(string) (bool, error), error) {
	verifier, err := s.postgres.Text(ctx, "SELECT coalesce(rolpassword, '') FROM pg_authid WHERE rolname = $1", user)
	if err != nil || verifier == "" {
		return nil, err
	}
	return []func(string) (bool, error){func(secret string) (bool, error) {
		parts := strings.FieldsFunc(verifier, func(r rune) bool { return r == '$' || r == ':' })
		if len(parts) != 5 {
			return false, errors.New("it is no verifier of SCRAM")
		}
		iterations, err := strconv.Atoi(parts[1])
		if err != nil {
			return false, err
		}
		salt, err := base64.StdEncoding.DecodeString(parts[2])
		if err != nil {
			return false, err
		}
		salted, err := pbkdf2.Key(sha256.New, secret, salt, iterations, sha256.Size)
		if err != nil {
			return false, err
		}
		h := hmac.New(sha256.New, salted)
		h.Write([]byte("Client Key"))
		stored := sha256.Sum256(h.Sum(nil))
		return base64.StdEncoding.EncodeToString(stored[:]) == parts[3], nil
	}}, nil
}

// acceptedByRabbit reads base64(salt SHA256(salt password)), with a salt of four
// bytes.
func (s *stage) acceptedByRabbit(ctx context.Context, user string) ([]func(string) (bool, error), error) {
	var u struct {
		Hash string `json:"password_hash"`
	}
	err := s.rabbit.Do(ctx, http.MethodGet, "users/"+user, nil, &u)
	if err != nil || u.Hash == "" {
		if err != nil && strings.Contains(err.Error(), "with 404") {
			err = nil // the second user is made by the first rotation
		}
		return nil, err
	}
	return []func(string) (bool, error){func(secret string) (bool, error) {
		raw, err := base64.StdEncoding.DecodeString(u.Hash)
		if err != nil || len(raw) <= 4 {
			return false, errors.Join(errors.New("it is no hash of a password"), err)
		}
		sum := sha256.Sum256(append(slices.Clone(raw[:4]), secret...))
		return bytes.Equal(sum[:], raw[4:]), nil
	}}, nil
}

// look checks that nothing is lost: what a server accepts is in storage. The
// servers are asked before storage is, because what they accept was stored before
// they heard of it, and is not forgotten before they refuse it.
func (p *play) look(ctx context.Context) error {
	all, err := p.accepted(ctx)
	if err != nil {
		return err
	}
	roles := map[string]*rotation.Role{}
	for _, a := range all {
		r := roles[a.role]
		if r == nil {
			if r, err = p.stored(ctx, a.role); err != nil {
				return err
			}
			roles[a.role] = r
		}
		known := false
		for _, v := range slices.Backward(r.Versions) {
			if v.Material.Username != a.user {
				continue
			}
			p.know(a.role, v.Material.Secret)
			if known, err = a.is(v.Material.Secret); err != nil || known {
				break
			}
		}
		if err != nil {
			return fmt.Errorf("what is accepted of %s: %w", a.user, err)
		}
		if !known {
			p.lost = append(p.lost, fmt.Sprintf("%s accepts what is not in storage (%s, %s)", a.user, a.role, phaseOf(r)))
		}
	}
	return nil
}

// collect looks at everything once no more rotations are asked for.
func (v *verdict) collect(ctx context.Context) error {
	if err := v.awaitIdle(ctx); err != nil {
		v.open = append(v.open, err.Error())
	}
	if err := v.play.look(ctx); err != nil {
		return err
	}
	if err := v.judgeRotations(ctx); err != nil {
		return err
	}
	if err := v.judgeServed(ctx); err != nil {
		return err
	}
	if err := v.countInstances(ctx); err != nil {
		return err
	}
	return v.searchLogs()
}

// awaitIdle only reads: what was interrupted ends by itself.
func (v *verdict) awaitIdle(ctx context.Context) error {
	return untilEvery(ctx, 5*time.Minute, 300*time.Millisecond, func(ctx context.Context) error {
		data, err := v.read(ctx, "status", nil)
		if err != nil {
			return err
		}
		if running := data["running"].([]any); len(running) > 0 {
			return fmt.Errorf("still running: %v", running)
		}
		return nil
	})
}

// judgeRotations reads the evidence of every rotation. Of each role no two overlap,
// each takes the number after the last one, and there is none that nobody asked for.
func (v *verdict) judgeRotations(ctx context.Context) error {
	v.states = map[string]int{}
	asked := map[string]bool{}
	for key, ids := range v.drivers.ids {
		for _, id := range ids {
			asked[id] = true
		}
		if len(ids) > 1 {
			v.doubled = append(v.doubled, fmt.Sprintf("%s was answered with %v", key, ids))
		}
	}
	parts := map[string][]*rotation.Evidence{}
	headers, err := v.headers(ctx)
	if err != nil {
		return err
	}
	for id := range headers {
		h := &rotation.Header{}
		if err := v.raw(ctx, "rotation/"+id, h); err != nil {
			return err
		}
		if !h.State.Ended() {
			v.open = append(v.open, fmt.Sprintf("rotation %s: %q", id, h.State))
		}
		if h.Trigger == rotation.Manual {
			v.states[string(h.State)]++
			if !asked[id] {
				v.doubled = append(v.doubled, fmt.Sprintf("rotation %s of %v (%s) was not asked for", id, h.Roles, h.State))
			}
		}
		for _, part := range h.Roles {
			e := &rotation.Evidence{}
			err := v.raw(ctx, "evidence/"+id+"/"+part.Role, e)
			if errors.Is(err, errMissing) && part.State != rotation.Completed {
				continue // it never began
			}
			if err != nil {
				return err
			}
			parts[part.Role] = append(parts[part.Role], e)
			if e.State == rotation.Completed {
				v.ends = append(v.ends, e.Finished)
			}
		}
	}
	for name, all := range parts {
		v.judgeSequence(name, all)
	}
	return nil
}

// headers are the ids of all rotations.
func (v *verdict) headers(ctx context.Context) (map[string]bool, error) {
	ids := map[string]bool{}
	for after := ""; ; {
		data, err := v.read(ctx, "rotations", map[string][]string{"after": {after}, "limit": {"200"}})
		if err != nil {
			return nil, err
		}
		keys, _ := data["keys"].([]any)
		for _, key := range keys {
			after = key.(string)
			ids[after] = true
		}
		if len(keys) < 200 {
			return ids, nil
		}
	}
}

func (v *verdict) judgeSequence(name string, all []*rotation.Evidence) {
	slices.SortFunc(all, func(a, b *rotation.Evidence) int { return a.Started.Compare(b.Started) })
	last, ended := 0, time.Time{}
	for _, e := range all {
		if e.Started.Before(ended) {
			v.doubled = append(v.doubled, fmt.Sprintf("%s: a rotation began at %s, before the last one ended at %s", name, e.Started, ended))
		}
		ended = e.Finished
		switch {
		case e.Version == last+1:
			last = e.Version
		case e.Version == last && (e.State != rotation.Completed || e.Trigger == rotation.Retirement):
			// It came to no version of its own.
		default:
			v.doubled = append(v.doubled, fmt.Sprintf("%s: version %d after %d (%s, %s)", name, e.Version, last, e.Trigger, e.State))
			last = max(last, e.Version)
		}
	}
}

// judgeServed logs in with what is served, and has the engine ask what else is
// accepted.
func (v *verdict) judgeServed(ctx context.Context) error {
	for _, r := range v.roles {
		if len(r.users) == 0 {
			continue
		}
		data, err := v.read(ctx, "creds/"+r.name, nil)
		if err != nil {
			return err
		}
		err = v.logIn(ctx, r.kind, data["username"].(string), data["password"].(string))
		if errors.Is(err, errRefused) {
			v.refused = append(v.refused, fmt.Sprintf("%s: version %v is served and %v", r.name, data["version"], err))
		} else if err != nil {
			return err
		}
		if data, err = v.read(ctx, "verify/"+r.kind+"/"+r.name, nil); err != nil {
			return err
		}
		for _, c := range data["checks"].([]any) {
			check := c.(map[string]any)
			if fmt.Sprint(check["unknown"]) != "0" || check["ok"] != true {
				v.play.lost = append(v.play.lost, fmt.Sprintf("%s: %v", r.name, check))
			}
		}
	}
	return nil
}

// countInstances ends the plugin of the active node in the way in which Go prints
// its goroutines: there is one instance of the engine for each of the two mounts,
// however often they were reloaded.
func (v *verdict) countInstances(ctx context.Context) error {
	if err := v.touchQuiet(ctx); err != nil {
		return err
	}
	if _, err := v.read(ctx, "status", nil); err != nil {
		return err
	}
	active, err := v.cluster.Active(ctx)
	if err != nil {
		return err
	}
	pids, err := active.PluginPIDs()
	if err != nil {
		return err
	}
	before, err := active.Log()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGQUIT); err != nil {
			return err
		}
	}
	return until(ctx, time.Minute, func(context.Context) error {
		for _, pid := range pids {
			if err := syscall.Kill(pid, 0); err == nil {
				return fmt.Errorf("the plugin (%d) still runs", pid)
			}
		}
		log, err := active.Log()
		if err != nil {
			return err
		}
		dump := log[len(before):]
		v.instances = strings.Count(dump, "rotation.(*Engine).loop(")
		v.routines = strings.Count(dump, "goroutine ") - strings.Count(dump, " in goroutine ")
		if v.instances == 0 {
			return errors.New("the plugin has not printed its goroutines")
		}
		return nil
	})
}

// searchLogs looks for every secret in everything that the nodes wrote down.
func (v *verdict) searchLogs() error {
	byStart := map[uint64][]string{}
	for secret := range v.secrets {
		if len(secret) >= 8 {
			start := binary.LittleEndian.Uint64([]byte(secret))
			byStart[start] = append(byStart[start], secret)
		}
	}
	paths := []string{v.cluster.Nodes[0].AuditPath}
	for _, node := range v.cluster.Nodes {
		paths = append(paths, node.LogPath)
	}
	for _, path := range paths {
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		v.searched += len(content)
		for i := 0; i+8 <= len(content); i++ {
			for _, secret := range byStart[binary.LittleEndian.Uint64(content[i:])] {
				if bytes.HasPrefix(content[i:], []byte(secret)) {
					line := content[bytes.LastIndexByte(content[:i], '\n')+1 : i]
					v.leaked = append(v.leaked, fmt.Sprintf("%s holds a secret of %s after: %s", path, v.secrets[secret], line))
				}
			}
		}
		for _, sign := range []string{"panic:", "fatal error:", "panicked"} {
			if i := bytes.Index(content, []byte(sign)); i >= 0 {
				v.leaked = append(v.leaked, fmt.Sprintf("%s: %s", path, content[i:min(len(content), i+1000)]))
			}
		}
	}
	return nil
}

// goesOn is how long after a time the next rotation completed.
func (v *verdict) goesOn(after time.Time) time.Duration {
	next := time.Duration(math.MaxInt64)
	for _, end := range v.ends {
		if end.After(after) {
			next = min(next, end.Sub(after))
		}
	}
	return next
}

// lines are the figures.
func (v *verdict) lines() []string {
	var slowest, old time.Duration
	sorts, met := map[string]int{}, map[string]int{}
	for _, h := range v.play.done {
		sorts[h.sort]++
		met[v.label(h.role)+": "+h.met]++
		slowest, old = max(slowest, v.goesOn(h.at)), max(old, h.old)
	}
	total, made := tally{}, tally{}
	var roles, rings []string
	for _, r := range v.roles {
		t := v.crowd.by[r.name]
		total.late += t.late
		total.reads, total.silent, total.stale = total.reads+t.reads, total.silent+t.silent, total.stale+t.stale
		text := fmt.Sprintf("%s %d of %d", r.label(), t.refused, t.logins)
		switch {
		case r.ring:
			rings = append(rings, text)
			made.logins, made.refused = made.logins+t.logins, made.refused+t.refused
		case !r.swap:
			roles = append(roles, text)
			total.logins, total.refused = total.logins+t.logins, total.refused+t.refused
		}
	}
	swap := v.crowd.by["report"]
	round := func(d time.Duration) time.Duration { return d.Round(100 * time.Millisecond) }
	return []string{
		"events: " + counts(sorts),
		"met: " + counts(met),
		fmt.Sprintf("rotations: %s; %d lost, %d doubled, %d that did not end; %d requests were repeated",
			counts(v.states), len(v.play.lost), len(v.doubled), len(v.open), v.drivers.repeated),
		fmt.Sprintf("logins: %d, %d refused (%s)", total.logins, total.refused, strings.Join(roles, ", ")),
		fmt.Sprintf("checks of what keys of rings had made: %d, %d refused (%s)", made.logins, made.refused, strings.Join(rings, ", ")),
		fmt.Sprintf("swap: %d of %d logins refused, for %s at the longest", swap.swapped, swap.logins, round(swap.outage)),
		fmt.Sprintf("reads: %d at any node, %d without an answer, %d of an earlier version; %d logins with what was read too long ago to count",
			total.reads, total.silent, total.stale, total.late),
		fmt.Sprintf("without an active node %d times, for %s at the longest; a node that was cut off took itself for it for up to %s", v.watch.times, round(v.watch.longest), round(old)),
		fmt.Sprintf("from an event to the next rotation that completed: %s at the longest", round(slowest)),
		fmt.Sprintf("%d secrets searched in %d bytes: %d found; the plugin: %d instances for 2 mounts, %d goroutines",
			len(v.secrets), v.searched, len(v.leaked), v.instances, v.routines),
	}
}

func (s *stage) label(name string) string {
	for _, r := range s.roles {
		if r.name == name {
			return r.label()
		}
	}
	return name
}

// counts prints a map, the most frequent first.
func counts(by map[string]int) string {
	keys := slices.SortedFunc(maps.Keys(by), func(a, b string) int {
		return cmp.Or(by[b]-by[a], strings.Compare(a, b))
	})
	for i, key := range keys {
		keys[i] = fmt.Sprintf("%s %d", key, by[key])
	}
	return strings.Join(keys, ", ")
}

// require fails the test where something does not hold.
func (v *verdict) require(t *testing.T) {
	t.Helper()
	require.NoError(t, errors.Join(v.drivers.problems...))
	require.Empty(t, v.crowd.problems)
	require.Empty(t, v.play.lost)
	require.Empty(t, v.doubled)
	require.Empty(t, v.open)
	require.Empty(t, v.refused)
	require.Empty(t, v.leaked)
	require.Equal(t, 2, v.instances, "instances of the engine")
	// Whoever sees nothing shows nothing.
	require.GreaterOrEqual(t, v.states["completed"], len(v.play.done))
	for _, h := range v.play.done {
		if h.sort == cutTargets {
			require.Positive(t, v.play.kept, "nothing was kept from its way to a server")
		}
	}
	for _, r := range v.roles {
		seen := v.crowd.by[r.name]
		require.Zero(t, seen.refused, r.name)
		require.Greater(t, seen.logins, 10*len(v.play.done), r.name)
		require.Less(t, seen.late, seen.logins/2, "%s: the clients were too slow for this to show anything", r.name)
	}
	for state := range v.states {
		// Before it was promoted a rotation may give up: nothing came of it.
		require.Contains(t, []string{"completed", "failed", "rolled_back", "cancelled", "superseded"}, state)
	}
	for _, r := range v.roles {
		if len(r.users) == 2 {
			all, err := v.accepted(t.Context())
			require.NoError(t, err)
			users := map[string]bool{}
			for _, a := range all {
				if a.role == r.name {
					users[a.user] = true
				}
			}
			require.Len(t, users, 1, "the idle user of %s has no password", r.name)
		}
	}
}
