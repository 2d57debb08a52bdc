package rotation

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

// Who still uses the previous version. In grace a role's target is asked who is logged
// in with it. That is done beside the rotation, in lanes of its own and without its
// lock: a look fails no rotation and holds up none. Most roles are looked at when
// grace begins, if consumers were proven before it, and shortly before it ends: who
// is seen then is a consumer that nobody has named. One with grace_until_unused is
// looked at again and again, and retires when nobody was seen anywhere twice in a row.

// Usage is who was seen to use the previous version in its grace. It holds no secret.
type Usage struct {
	User string `json:"user"`
	// Older: the user stays the same, and sessions are known by their age alone.
	Older    bool `json:"older,omitempty"`
	Sessions int  `json:"sessions"` // open at the last look that told something new
	// Clients were seen at any look, at most maxClients; More is how many of those that
	// are there now are not among them.
	Clients []Client `json:"clients,omitempty"`
	More    int      `json:"more,omitempty"`
	// Unknown is why the last look did not tell everything.
	Unknown string `json:"unknown,omitempty"`
}

// Client is who has opened sessions.
type Client struct {
	Address string    `json:"address,omitempty"`
	Name    string    `json:"name,omitempty"` // what it calls itself
	Gone    time.Time `json:"gone,omitzero"`  // when it was first seen to have none any more
}

func (c Client) String() string {
	s := cmp.Or(c.Address, "unknown address")
	if c.Name != "" {
		s += " (" + c.Name + ")"
	}
	return s
}

// Line is what is told of c.
func (c Client) Line() string {
	if c.Gone.IsZero() {
		return c.String()
	}
	return fmt.Sprintf("%s, gone at %s", c, c.Gone.UTC().Format(time.RFC3339))
}

const (
	// maxClients bounds how many are named, and maxClientText how much of each.
	maxClients    = 20
	maxClientText = 64
	// usageRoom is how much of an entry they may take.
	usageRoom = maxClients*(4*maxClientText+96) + maxText + 512
)

// Line says who still uses the previous version, or "" where nobody was seen to.
func (u *Usage) Line() string {
	if u == nil {
		return ""
	}
	whose := fmt.Sprintf("user %q", u.User)
	if u.Older {
		whose += " from before the promotion"
	}
	var here, gone []string
	for _, c := range u.Clients {
		if c.Gone.IsZero() {
			here = append(here, c.String())
		} else {
			gone = append(gone, c.String())
		}
	}
	switch {
	case u.Unknown != "" && len(here) == 0:
		return fmt.Sprintf("sessions of %s: not known: %s", whose, u.Unknown)
	case len(here) == 0 && len(gone) == 0:
		return ""
	case len(here) == 0:
		return fmt.Sprintf("no session of %s is open any more; there were some from %s", whose, strings.Join(gone, ", "))
	}
	more := ""
	if u.More > 0 {
		more = fmt.Sprintf(" and %d more", u.More)
	}
	line := fmt.Sprintf("%s of %s from %s%s", sessions(u.Sessions), whose, strings.Join(here, ", "), more)
	if u.Unknown != "" { // nobody was seen to go, then
		line += "; not all are known: " + u.Unknown
	}
	return line
}

func sessions(n int) string {
	if n == 1 {
		return "1 session"
	}
	return fmt.Sprintf("%d sessions", n)
}

// saw is u after a look; what is told has changed where it differs from u.
func (u *Usage) saw(user string, older bool, a kind.SessionsAnswer, secret func(string) bool, now time.Time) *Usage {
	next := &Usage{User: user, Older: older, Sessions: len(a.Sessions)}
	if u != nil {
		next.Clients = slices.Clone(u.Clients)
	}
	if a.Err != nil {
		next.Unknown = clip(a.Err.Error())
	}
	var here []Client
	for _, s := range a.Sessions {
		c := Client{Address: clipTo(s.Client, maxClientText, 2*maxClientText), Name: clipTo(s.Name, maxClientText, 2*maxClientText)}
		if secret(s.Name) {
			c.Name = "" // what calls itself by its password is not told
		}
		if !slices.Contains(here, c) {
			here = append(here, c)
		}
	}
	slices.SortFunc(here, func(a, b Client) int { return cmp.Or(cmp.Compare(a.Address, b.Address), cmp.Compare(a.Name, b.Name)) })
	for i, c := range next.Clients {
		open := slices.Contains(here, Client{Address: c.Address, Name: c.Name})
		switch {
		case open:
			next.Clients[i].Gone = time.Time{}
		case c.Gone.IsZero() && a.Err == nil: // a look that does not tell everything shows nobody gone
			next.Clients[i].Gone = now.UTC().Truncate(time.Second)
		}
	}
	for _, c := range here {
		if !slices.Contains(next.Clients, c) {
			next.add(c)
		}
	}
	return next
}

// add names one more client, instead of one that has gone where there is no room.
func (u *Usage) add(c Client) {
	if len(u.Clients) >= maxClients {
		gone := slices.IndexFunc(u.Clients, func(o Client) bool { return !o.Gone.IsZero() })
		if gone < 0 {
			u.More++
			return
		}
		u.Clients = slices.Delete(u.Clients, gone, gone+1)
	}
	u.Clients = append(u.Clients, c)
}

// same reports whether u tells what other does. Nobody was seen is what no usage tells.
func (u *Usage) same(other *Usage) bool {
	if u == nil {
		return other.Sessions == 0 && len(other.Clients) == 0 && other.Unknown == ""
	}
	return u.Sessions == other.Sessions && u.More == other.More && u.Unknown == other.Unknown && slices.Equal(u.Clients, other.Clients)
}

// When a role is looked at.
const (
	// defaultMinimum is how long the previous version stays at least.
	defaultMinimum = 5 * time.Minute
	// looksApart bound how far two looks are apart that are to show that nobody uses
	// it: a tenth of the minimum, within them.
	minLooksApart, maxLooksApart = 5 * time.Second, time.Minute
	// lastLook is how long before the end of grace who is left is looked at.
	lastLook = time.Minute
	// sessionsTimeout is for one look.
	sessionsTimeout = kind.CallTimeout
)

// Minimum is how long the previous version stays accepted though nobody uses it.
func (r *Role) Minimum(c Config) time.Duration {
	least := defaultMinimum
	if r.GraceMinimum != nil {
		least = *r.GraceMinimum
	}
	return min(least, r.Grace(c))
}

func (r *Role) looksApart(c Config) time.Duration {
	return min(maxLooksApart, max(minLooksApart, r.Minimum(c)/10))
}

// lookedAt is what this engine remembers of the looks at a role: whoever comes after it
// believes none of them.
type lookedAt struct {
	rotation string
	n        int       // how many have shown the same: the more, the rarer they become
	last     time.Time // when the last one began
	unused   time.Time // since when, in a row, nobody was seen
}

// watched reports whether there is something to look at.
func (r *Role) watched() bool {
	run := r.Run
	if run == nil || run.Phase != Grace || run.Back || run.Recall != "" || run.RetireNow || run.Reapply || run.GraceFrom.IsZero() || r.Root() || r.ring() {
		return false
	}
	_, _, ok := r.sessionsBefore(run.GraceFrom)
	return ok
}

// nextLook is when a role in grace is looked at next; zero: not any more.
func (r *Role) nextLook(seen lookedAt, c Config, now time.Time) time.Time {
	run := r.Run
	before := func(at time.Time) time.Time {
		if !at.Before(run.GraceUntil) {
			return time.Time{}
		}
		return at
	}
	begins := seen.n == 0 && run.Usage == nil && (r.UntilUnused || r.delivers()) && now.Before(run.GraceFrom.Add(lastLook))
	last := run.GraceUntil.Add(-min(lastLook, run.GraceUntil.Sub(run.GraceFrom)/4))
	from := run.GraceFrom.Add(r.Minimum(c))
	switch {
	case begins:
		return before(run.GraceFrom)
	case !r.UntilUnused && seen.last.Before(last):
		return before(last)
	case !r.UntilUnused:
		return time.Time{}
	case seen.last.Before(from):
		return before(from)
	case !seen.unused.IsZero():
		return before(later(seen.unused.Add(r.looksApart(c)), seen.last.Add(minLooksApart)))
	}
	return before(seen.last.Add(min(maxLooksApart, r.looksApart(c)<<min(max(0, seen.n-2), 4))))
}

// laneOfSessions begins lanes of looks.
const laneOfSessions = "sessions/"

// lookLater has a role that waits in grace looked at when it is time.
func (e *Engine) lookLater(r *Role) {
	if !r.watched() {
		return
	}
	if at := r.nextLook(e.looksOf(r), e.Config(), time.Now()); !at.IsZero() {
		e.wake(laneOfSessions+r.targetLane(), r.Name, at)
	}
}

func (e *Engine) looksOf(r *Role) lookedAt {
	e.mu.Lock()
	defer e.mu.Unlock()
	seen := e.looks[r.Name]
	if seen.rotation != r.Run.Rotation {
		return lookedAt{rotation: r.Run.Rotation}
	}
	return seen
}

func (e *Engine) forgetLooks(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.looks, name)
}

// observe looks at those roles of a lane whose time has come, with one call.
func (e *Engine) observe(lane string, names []string) pace {
	ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
	defer cancel()
	roles, bad := e.st.roles(ctx, names)
	for name, err := range bad {
		e.wake(lane, name, time.Now().Add(rereadPause(err)))
	}
	now := time.Now()
	var due []*Role
	for _, r := range roles {
		if r == nil || laneOfSessions+r.targetLane() != lane || !r.watched() {
			continue
		}
		if at := r.nextLook(e.looksOf(r), e.Config(), now); !at.IsZero() && !at.After(now) {
			due = append(due, r)
		} else {
			e.lookLater(r)
		}
	}
	if len(due) == 0 {
		return unknown
	}
	generation, err := e.o.Generation(ctx, due[0].Connection)
	answers := make([]kind.SessionsAnswer, len(due))
	if err == nil {
		answers = e.whoIsThere(due, generation, now)
	}
	g := errgroup.Group{}
	g.SetLimit(parallelStorage)
	for i, r := range due {
		if err != nil {
			answers[i].Err = err
		}
		g.Go(func() error { e.observed(r, answers[i], now); return nil })
	}
	_ = g.Wait()
	if time.Since(now) > sessionsTimeout/2 {
		return sluggish
	}
	return prompt
}

// count makes looks rarer while they show what the one before has shown. When
// sessions end, more of them will; a look that has told nothing says nothing about when.
func (l *lookedAt) count(a kind.SessionsAnswer, before *Usage) {
	switch {
	case a.Err != nil:
		l.n = max(1, l.n)
	case before != nil && len(a.Sessions) < before.Sessions:
		l.n = 1
	default:
		l.n++
	}
}

func (e *Engine) whoIsThere(roles []*Role, generation int, now time.Time) []kind.SessionsAnswer {
	questions := make([]kind.SessionsQuestion, len(roles))
	for i, r := range roles {
		username, before, _ := r.sessionsBefore(now)
		questions[i] = kind.SessionsQuestion{User: r.user(username, generation), Before: before}
	}
	ctx, cancel := context.WithTimeout(e.ctx, sessionsTimeout)
	defer cancel()
	answers, known := e.guarded(roles[0]).sessions(ctx, questions)
	for i := range answers {
		if !known && roles[i].UntilUnused { // to others it is no news
			answers[i].Err = fmt.Errorf("secrets of kind %s are at a server that does not tell who is logged in", roles[i].Kind)
		}
	}
	return answers
}

// observed keeps what a look at a role has shown. Where it cannot be stored, the next
// look comes all the same.
func (e *Engine) observed(r *Role, a kind.SessionsAnswer, asked time.Time) {
	c := e.Config()
	seen := e.looksOf(r)
	nobody := r.UntilUnused && a.Err == nil && len(a.Sessions) == 0 && !asked.Before(r.Run.GraceFrom.Add(r.Minimum(c)))
	over := nobody && !seen.unused.IsZero() && !asked.Before(seen.unused.Add(r.looksApart(c)))
	switch {
	case !nobody:
		seen.unused = time.Time{}
	case seen.unused.IsZero():
		seen.unused = asked
	}
	seen.count(a, r.Run.Usage)
	seen.last = asked
	ctx, cancel := context.WithTimeout(e.ctx, storageTimeout)
	defer cancel()
	if over && !e.unitIsThere(ctx, r) { // what was seen is old when it is
		over, seen.unused = false, time.Time{}
	}
	e.mu.Lock()
	e.looks[r.Name] = seen
	e.mu.Unlock()
	if over || !r.Run.Usage.same(r.sawUsers(a, asked)) {
		err := e.change(ctx, r.Name, func(now *Role) error { return now.keepUsage(r, a, asked, over, seen.unused) })
		if err != nil {
			e.o.Logger.Debug("who uses the previous version is not stored", "role", r.Name, "reason", err)
		}
	}
	if e.ctx.Err() == nil {
		e.lookLater(r)
	}
}

func (r *Role) sawUsers(a kind.SessionsAnswer, now time.Time) *Usage {
	user, _, _ := r.sessionsBefore(now)
	secret := func(name string) bool {
		return slices.ContainsFunc(r.Versions, func(v version.Version) bool {
			return v.Material.Secret != "" && strings.Contains(name, v.Material.Secret)
		})
	}
	return r.Run.Usage.saw(user, !r.alternates(), a, secret, now)
}

// keepUsage puts what was seen of before, the same role in the same grace, into its
// entry. Nobody was seen ends the grace.
func (r *Role) keepUsage(before *Role, a kind.SessionsAnswer, asked time.Time, over bool, unused time.Time) error {
	if !r.watched() || r.Run.Rotation != before.Run.Rotation || r.UntilUnused != before.UntilUnused {
		return errNoRun
	}
	first := r.Run.Usage == nil || r.Run.Usage.Unknown != ""
	r.Run.Usage = r.sawUsers(a, asked)
	now := time.Now()
	switch {
	case over:
		r.Run.RetireNow = true
		r.mark(now, fmt.Sprintf("no session of user %q at any node since %s: the grace ends early", r.Run.Usage.User, unused.UTC().Format(time.RFC3339)))
	case first || r.Run.Usage.Unknown != "":
		r.mark(now, r.Run.Usage.Line())
	}
	return nil
}

// unitIsThere reports whether the others of a role's unit have come as far as their
// grace: until they have, none of them retires.
func (e *Engine) unitIsThere(ctx context.Context, r *Role) bool {
	if r.Run.Unit == 0 {
		return true
	}
	u, err := e.unitOf(ctx, r.Run.unitID())
	if err != nil {
		return false
	}
	others := u.but(r.Name)
	return others.all(others.arrived)
}
