package rotation

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
)

// Verdict is what is known of a condition of success.
type Verdict string

// The verdicts. What nobody looked at is unknown, and never met.
const (
	Met           Verdict = "met"
	NotMet        Verdict = "not met"
	Pending       Verdict = "pending"
	Unknown       Verdict = "unknown"
	NotApplicable Verdict = "not applicable"
)

// Account is what is kept of a run for its conditions of success.
type Account struct {
	Phase       Phase     `json:"phase"` // the last one
	Promoted    bool      `json:"promoted,omitempty"`
	PromotedAt  time.Time `json:"promoted_at,omitzero"`
	Back        bool      `json:"back,omitempty"`
	Retired     bool      `json:"retired,omitempty"`
	PublishedAt time.Time `json:"published_at,omitzero"`
	// Anew is when the run began anew; what was seen before was taken back.
	Anew time.Time `json:"anew,omitzero"`
	// Shown is where consumers read it, in words.
	Shown     string   `json:"shown,omitempty"`
	Consumers []string `json:"consumers,omitempty"`
	// Server: a server holds the secret, that fresh logins can ask. Kept: another server
	// keeps it, and Seen is what that showed.
	Server bool   `json:"server,omitempty"`
	Kept   bool   `json:"kept,omitempty"`
	Seen   string `json:"seen,omitempty"`
}

func accountOf(r *Role, run *Run) *Account {
	a := &Account{
		Phase: run.Phase, Promoted: run.Promoted, Back: run.Back, Retired: run.Retired, PublishedAt: run.PublishedAt, Anew: run.Anew,
		Consumers: r.Consumers, Server: r.Connection != "" && !r.kept(), Kept: r.kept(),
	}
	if v := r.Get(run.To); v != nil {
		a.PromotedAt, a.Seen = v.Promoted, clip(v.Evidence)
	}
	a.Shown = clip(r.ShownAt())
	return a
}

// ShownAt is where consumers read what the role serves, in words; "" where that is at
// creds/ alone.
func (r *Role) ShownAt() string {
	switch {
	case r.Document != "":
		return "document " + r.Document
	case !r.Place.Zero():
		return r.Place.String()
	}
	return ""
}

// LiveEvidence is what a run that has not ended has to show so far.
func (r *Role) LiveEvidence() *Evidence {
	run := r.Run
	return &Evidence{
		Part: livePart(r), From: run.From, Trigger: run.Trigger, Started: run.Started,
		Nodes: r.Nodes, Missed: run.Missed, Timeline: run.Timeline, Account: accountOf(r, run),
	}
}

// The conditions of success of the runbook that the engine replaces, by its words.
const (
	vaultUpdated  = "Vault secret updated with new version"
	inKubernetes  = "Kubernetes secret synced within refresh interval"
	allRestarted  = "All services restarted successfully"
	noErrorLogs   = "No error logs in application pods"
	healthy       = "Health endpoints return 200 OK"
	authWorks     = "Authentication/authorization working"
	databaseWorks = "Database connections successful"
	noUserErrors  = "No user-facing errors reported"
	monitoringOK  = "Monitoring shows normal operation"
)

// finding is what is known of a condition by one role or consumer.
type finding struct {
	verdict Verdict
	text    string
}

func found(v Verdict, format string, args ...any) finding {
	return finding{v, fmt.Sprintf(format, args...)}
}

// Success says of each condition of the runbook what was seen of it, by the roles of a
// rotation and what is kept of their deliveries. Nothing is met that was not seen.
func Success(roles []*Evidence, proofs []*Proof) []Criterion {
	s := success{proofs: map[string]*Proof{}}
	for _, ev := range roles {
		if ev != nil && ev.Account != nil {
			s.roles = append(s.roles, ev)
		}
	}
	for _, p := range proofs { // the last way that is about what is promoted
		if p.Way == WayForward || p.Way == wayAfter && s.proofs[p.Consumer] == nil {
			s.proofs[p.Consumer] = p
		}
	}
	if len(s.roles) == 0 {
		return nil
	}
	return []Criterion{
		s.byRole(vaultUpdated, served),
		s.byConsumer(inKubernetes, synced),
		s.byConsumer(allRestarted, restarted),
		s.byConsumer(noErrorLogs, checked("logs", noErrorLogs)),
		s.byConsumer(healthy, checked("http", healthy)),
		s.byRole(authWorks, accepted),
		s.byRole(databaseWorks, connected),
		s.byConsumer(noUserErrors, checked("prometheus", noUserErrors)),
		s.byConsumer(monitoringOK, checked("prometheus", monitoringOK)),
	}
}

type success struct {
	roles  []*Evidence
	proofs map[string]*Proof
}

func (s *success) byRole(name string, look func(*Evidence) finding) Criterion {
	all := make([]finding, len(s.roles))
	for i, ev := range s.roles {
		all[i] = look(ev)
	}
	return fold(name, all)
}

func (s *success) byConsumer(name string, look func(*Evidence, string, *Proof) finding) Criterion {
	var all []finding
	known := map[string]bool{}
	for _, ev := range s.roles {
		switch {
		case len(ev.Account.Consumers) == 0:
			all = append(all, found(NotApplicable, "role %s has no consumers; name them in its field consumers to have this proven", ev.Role))
			continue
		case ev.Trigger == Create, ev.Trigger == Reconcile:
			all = append(all, found(NotApplicable, "a rotation with trigger %s changes nothing at consumers", ev.Trigger))
			continue
		case ev.Trigger == Retirement && name != inKubernetes:
			all = append(all, found(NotApplicable, "what is no longer needed is taken away, and nothing is restarted for that"))
			continue
		}
		for _, c := range ev.Account.Consumers {
			if !known[c] {
				known[c] = true
				p := s.proofs[c].since(ev.Account.Anew)
				if p != nil && p.Way == wayAfter && ev.Account.Back { // what failed was cleared
					p = nil
				}
				all = append(all, look(ev, c, p))
			}
		}
	}
	return fold(name, all)
}

// order is which verdict counts when there are several: the worst, and what does not
// apply only where nothing else does.
var order = []Verdict{NotMet, Pending, Unknown, Met, NotApplicable}

// maxFindings is how many roles or consumers a condition names.
const maxFindings = 3

func fold(name string, all []finding) Criterion {
	for _, v := range order {
		var texts []string
		n := 0
		for _, f := range all {
			if f.verdict != v {
				continue
			}
			if n++; n <= maxFindings && !slices.Contains(texts, f.text) {
				texts = append(texts, f.text)
			}
		}
		if n == 0 {
			continue
		}
		detail := strings.Join(texts, "; ")
		if n > maxFindings {
			detail += fmt.Sprintf("; and %d more", n-maxFindings)
		}
		return Criterion{Name: name, Met: v == Met, Verdict: v, Detail: detail}
	}
	return Criterion{Name: name, Verdict: Unknown}
}

// missing is what is said of something that has not been seen: it may still come, or
// it never will.
func missing(ev *Evidence, comes string) finding {
	if !ev.State.Ended() && !ev.Account.Back {
		return found(Pending, "%s: %s", ev.Role, comes)
	}
	why := cmp.Or(ev.Error, string(ev.State))
	return found(NotMet, "%s: the rotation ended, or turned back, before it came to that: %s", ev.Role, why)
}

func served(ev *Evidence) finding {
	a := ev.Account
	switch {
	case ev.Trigger == Reconcile, ev.Trigger == Retirement:
		return found(NotApplicable, "%s: a rotation with trigger %s makes no version", ev.Role, ev.Trigger)
	case a.Back, ev.State.Ended() && !a.Promoted:
		return found(NotMet, "%s: what was served before is served (%s)", ev.Role, cmp.Or(ev.Error, string(ev.State)))
	case !a.Promoted:
		return missing(ev, "it is served from phase promote on")
	case a.Kept:
		return found(Met, "%s: version %d, %s", ev.Role, ev.Version, cmp.Or(a.Seen, "seen at its server"))
	}
	text := fmt.Sprintf("%s: version %d is served since %s", ev.Role, ev.Version, stamp(a.PromotedAt))
	if !a.PublishedAt.IsZero() && a.Shown != "" {
		text += fmt.Sprintf(", and stands in %s since %s", a.Shown, stamp(a.PublishedAt))
	}
	return finding{Met, text}
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// accepted: test comes before promote, and retire ends with a login that is refused.
func accepted(ev *Evidence) finding {
	a := ev.Account
	switch {
	case a.Kept:
		return found(NotApplicable, "%s: another server keeps the secret, and logs in with it itself", ev.Role)
	case !a.Server:
		return found(NotApplicable, "%s: no server can be asked about this secret; an http check of a consumer that uses it is what would show it", ev.Role)
	case ev.Trigger == Retirement:
		return found(NotApplicable, "%s: nothing new has to be accepted", ev.Role)
	case ev.Trigger == Reconcile && ev.State == Completed:
	case a.Back:
		return found(NotMet, "%s: the new version was taken back: %s", ev.Role, cmp.Or(ev.Error, string(ev.State)))
	case !a.Promoted:
		return missing(ev, "a fresh login at every node is made in phase test")
	}
	at := len(ev.Nodes) - len(ev.Missed)
	text := fmt.Sprintf("%s: version %d was accepted by a fresh login at %d of %d nodes", ev.Role, ev.Version, at, len(ev.Nodes))
	switch {
	case len(ev.Missed) > 0:
		return finding{NotMet, fmt.Sprintf("%s; passed over: %s", text, few(ev.Missed))}
	case a.Retired, ev.State == Completed:
		text += ", and every earlier one is refused there, by a login too"
	case ev.State == InGrace:
		text += "; the one before is still accepted, until the grace is over"
	}
	return finding{Met, text}
}

// connected is about servers alone: whether each node can be reached and logged in to.
func connected(ev *Evidence) finding {
	f := accepted(ev)
	if f.verdict == Met || f.verdict == NotMet && len(ev.Missed) > 0 {
		f.text = fmt.Sprintf("%s: logged in anew at %s", ev.Role, few(without(ev.Nodes, ev.Missed)))
		if len(ev.Missed) > 0 {
			f.text += "; not at " + few(ev.Missed)
		}
	}
	if f.verdict == NotApplicable {
		f.text = fmt.Sprintf("%s: no database or broker is logged in to with this secret by the engine", ev.Role)
	}
	return f
}

func without(list, some []string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(s string) bool { return slices.Contains(some, s) })
}

func few(names []string) string {
	const most = 6
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

func synced(ev *Evidence, name string, p *Proof) finding {
	s := p.Seen(Sync)
	switch {
	case s == nil:
		return missing(ev, fmt.Sprintf("consumer %s is brought to it in phase sync", name))
	case !s.Done:
		return found(NotMet, "consumer %s: %s", name, cmp.Or(s.Error, "not in time"))
	case s.Counted.Externals == 0 && s.Counted.Values == 0:
		return found(Unknown, "not checked: consumer %s names no ExternalSecrets and no Secrets; add external_secrets or secrets", name)
	}
	var words []string
	for _, e := range s.Externals {
		text := fmt.Sprintf("ExternalSecret %s was synced at %s", e.Name, stamp(e.Refreshed))
		if after := e.Refreshed.Sub(ev.Account.PublishedAt); after >= 0 && !ev.Account.PublishedAt.IsZero() {
			text += fmt.Sprintf(", %s after it was published", after.Round(time.Second))
		}
		if e.Interval != "" {
			text += fmt.Sprintf(" (refreshInterval %s)", e.Interval)
		}
		words = append(words, text)
	}
	if len(words) > maxFindings {
		words = append(words[:maxFindings], fmt.Sprintf("and %d more", s.Counted.Externals-maxFindings))
	}
	good := 0
	for _, v := range s.Values {
		if v.Good() {
			good++
		}
	}
	words = append(words, fmt.Sprintf("%d of %d values were found in its Secrets", good+s.More.Values, s.Counted.Values))
	return found(Met, "consumer %s: %s", name, strings.Join(words, ", "))
}

func restarted(ev *Evidence, name string, p *Proof) finding {
	all := p.Seen(Check)
	before := p.Seen(Restart)
	look := cmp.Or(all, before, p.Seen(Sync))
	switch {
	case look != nil && look.Mode == "none":
		return found(NotApplicable, "consumer %s has mode=none: its workloads read the Secrets by themselves", name)
	case before != nil && !before.Done:
		return found(NotMet, "consumer %s: %s", name, cmp.Or(before.Error, "not in time"))
	case all == nil:
		return missing(ev, fmt.Sprintf("consumer %s is proven in phase check", name))
	case all.Counted.Workloads == 0 && all.Done:
		return found(Unknown, "not checked: consumer %s names no workloads; add them", name)
	case !all.Done && (all.Counted.WellWorkloads < all.Counted.Workloads || !slices.ContainsFunc(all.Checks, ran)):
		return found(NotMet, "consumer %s: %s", name, cmp.Or(all.Error, "not in time"))
	}
	n := all.Counted
	return found(Met, "consumer %s: %d of %d workloads are complete, %d of %d pods run with it and are ready, with %d restarts of containers",
		name, n.WellWorkloads, n.Workloads, n.WellPods, n.Pods, n.Restarts)
}

// ran: checks are made when every workload is proven. Until then those that a look has
// seen need not be all of them.
func ran(c seen.Check) bool { return c.Ran }

// checked is about the checks of one type.
func checked(of, condition string) func(*Evidence, string, *Proof) finding {
	return func(ev *Evidence, name string, p *Proof) finding {
		s := p.Seen(Check)
		if s == nil {
			return missing(ev, fmt.Sprintf("consumer %s is checked in phase check", name))
		}
		var passed, left []string
		for _, c := range s.Checks {
			if c.Type != of {
				continue
			}
			label := fmt.Sprintf("check %d (%s)", c.Number, c.Target)
			switch {
			case !c.Ran:
				left = append(left, label)
			case !c.Passed:
				return found(NotMet, "consumer %s: %s: %s", name, label, c.Result)
			default:
				passed = append(passed, label+": "+c.Result+inRow(c))
			}
		}
		switch {
		case len(left) > 0:
			return found(Unknown, "consumer %s: %s was not made: %s", name, strings.Join(left, ", "), s.Error)
		case len(passed) > 0:
			return found(Met, "consumer %s: %s", name, strings.Join(passed, "; "))
		case condition == noUserErrors:
			return found(Unknown, "not checked: the engine sees no users, and consumer %s has no prometheus check; add one on the rate of errors", name)
		}
		return found(Unknown, "not checked: consumer %s has no %s check; add one", name, of)
	}
}

func inRow(c seen.Check) string {
	if c.Times > 1 {
		return fmt.Sprintf(", %d times in a row", c.InRow)
	}
	return ""
}

// Recorded says who asked for a rotation, as far as Vault told.
func Recorded(h *Header) Criterion {
	by, c := h.RequestedBy, Criterion{Name: "Who asked is recorded", Met: true, Verdict: Met}
	switch {
	case h.Trigger == Scheduled:
		c.Detail = "a schedule"
	case by.DisplayName == "" && by.RequestID == "" && by.Accessor == "":
		c.Met, c.Verdict, c.Detail = false, Unknown, fmt.Sprintf("the engine itself, with trigger %s", h.Trigger)
	default:
		c.Detail = fmt.Sprintf("%s, in request %s; the audit log of Vault has more of it", cmp.Or(by.DisplayName, "no name"), cmp.Or(by.RequestID, "without id"))
	}
	return c
}
