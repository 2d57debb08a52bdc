package redis

import (
	"context"
	"fmt"
	"net"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Sentinels log in to the nodes that they watch with auth-user and auth-pass,
// which they tell nobody, not even each other. One whose password went stale
// notices nothing until its links drop. Then it takes a primary that is well
// for dead, and has a replica promoted, and the old primary, to which it cannot
// log in either, goes on as one (redis#4799). So the user that they log in as
// is changed as the one of replicas is: every node accepts the new password,
// every sentinel uses it, and only then is the old one refused. A sentinel that
// cannot be asked keeps the old one accepted.

// provenEvery is how often a sentinel is asked whether it is logged in again.
const provenEvery = 50 * time.Millisecond

// Sentinels split their configuration file at spaces and quotes.
var masterPattern = regexp.MustCompile(`^[!#-&(-~]{1,128}$`)

// sight is what a sentinel sees.
type sight struct {
	id       string // how it signs its logins at nodes
	primary  string
	flags    []string // of the primary
	replicas []string
	others   []watcher // other sentinels, by address
	rules    []string  // the engine's own command rules, nil when they cannot be read
}

// watcher is a sentinel that somebody has seen.
type watcher struct {
	id   string // at least its first eight characters
	user string // that it logged in as
	addr string // of its client, or its own
}

// shortID is all of an id that a sentinel shows at nodes.
const shortID = 8

func short(id string) string { return id[:min(len(id), shortID)] }

func validateSentinel(c *connection.Redis) error {
	s := c.Sentinel
	if s.Master == "" {
		switch {
		case c.Topology == TopologySentinel:
			return fmt.Errorf("sentinel_master is missing: topology sentinel needs the name that the sentinels know the primary by")
		case !s.Login.Zero() || s.AuthUser != "":
			return fmt.Errorf("sentinel_username, sentinel_password and sentinel_auth_user are for sentinels: give sentinel_master as well, or none of them")
		}
		return nil
	}
	switch {
	case !masterPattern.MatchString(s.Master):
		return fmt.Errorf("sentinel_master is %.80q: give the one name that stands after \"sentinel monitor\" in the configuration of the sentinels", s.Master)
	case c.Topology == TopologyStandalone || c.Topology == TopologyCluster:
		return fmt.Errorf("topology is %.64q, and sentinel_master is for topology sentinel or auto: leave one of them out", c.Topology)
	case s.Login.Username != "" && s.Login.Secret == "":
		return fmt.Errorf("sentinel_password is missing: sentinel_username needs it")
	case s.AuthUser != "" && !usernamePattern.MatchString(s.AuthUser):
		return fmt.Errorf("sentinel_auth_user is %.128q: give the name of the one ACL user that sentinels log in to the nodes as", s.AuthUser)
	}
	return nil
}

// askSentinels finds every sentinel, and asks each what it sees.
func (f *fleet) askSentinels(ctx context.Context) error {
	w := &fleet{entry: f.entry, sentinels: true, cancel: func() {}}
	f.watch = w
	connectCtx, stop := within(ctx, 5, sentinelTimeout)
	defer stop()
	w.resolveSeeds(connectCtx)
	w.visit(ctx, connectCtx, w.newNodes(f.entry.Redis.Addresses, true, false))
	if w.full {
		return kind.Definitely("connection %q leads to more than %d sentinels: check what its addresses answer to SENTINEL SENTINELS", f.entry.Name, maxNodes)
	}
	if err := w.answered("sentinel"); err != nil {
		return err
	}
	w.merge()
	return nil
}

// look logs in to a sentinel and asks what it sees.
func (n *node) look(ctx context.Context, conf connection.Sentinel) error {
	user, err := n.s.login(ctx, []kind.Material{conf.Login})
	if err != nil {
		return err
	}
	r := n.s.run(ctx, []command{
		{"SENTINEL", "MASTER", conf.Master},
		{"SENTINEL", "REPLICAS", conf.Master},
		{"SENTINEL", "SENTINELS", conf.Master},
		{"SENTINEL", "MYID"},
		{"INFO", "server"},
		{"ACL", "GETUSER", user},
	})
	for i, what := range []string{"SENTINEL MASTER", "SENTINEL REPLICAS", "SENTINEL SENTINELS", "SENTINEL MYID", "INFO"} {
		if r[i].err != nil {
			return n.s.explain(r[i].err, "run "+what, user)
		}
	}
	n.sight = &sight{id: text(r[3].value)}
	if r[5].err == nil {
		n.sight.rules = parseUser(r[5].value).rules
	}
	n.sight.see(r[0].value)
	for _, replica := range records(r[1].value) {
		n.sight.replicas = append(n.sight.replicas, address(replica))
	}
	for _, other := range records(r[2].value) {
		n.sight.others = append(n.sight.others, watcher{id: other["runid"], addr: address(other)})
		n.facts.replicas = append(n.facts.replicas, address(other)) // where discovery goes on
	}
	n.facts.admin, n.facts.runID, n.facts.version = user, n.sight.id, fields(r[4].value)["redis_version"]
	return nil
}

// see reads what SENTINEL MASTER answers.
func (s *sight) see(value any) (sinceOK time.Duration) {
	m := pairs(value)
	s.primary, s.flags = address(m), strings.Split(m["flags"], ",")
	ms, err := time.ParseDuration(m["last-ok-ping-reply"] + "ms")
	if err != nil {
		return time.Duration(1<<63 - 1)
	}
	return ms
}

// down reports whether the sentinel takes the primary for dead, or cannot log in.
func (s *sight) down() bool {
	return slices.ContainsFunc(s.flags, func(flag string) bool { return flag == "s_down" || flag == "o_down" || flag == "disconnected" })
}

func address(m map[string]string) string { return net.JoinHostPort(m["ip"], m["port"]) }

// pairs reads a list of names and values.
func pairs(value any) map[string]string {
	list := texts(value)
	out := make(map[string]string, len(list)/2)
	for i := 0; i+1 < len(list); i += 2 {
		out[list[i]] = list[i+1]
	}
	return out
}

func records(value any) []map[string]string {
	list, _ := value.([]any)
	out := make([]map[string]string, len(list))
	for i, v := range list {
		out[i] = pairs(v)
	}
	return out
}

// answeredSentinel is explain for an answer of a sentinel.
func (s *session) answeredSentinel(err error, what, user string) error {
	switch replyCode(err) {
	case "NOPERM":
		return kind.Definitely("%s does not permit %q to %s: grant it the command there (see the documentation of redis connections)", s.who(), user, what)
	case "WRONGPASS":
		return fmt.Errorf("%s refuses the login of %q when asked to %s: write the connection with the right sentinel_password, or enable the user there", s.who(), user, what)
	case "NOAUTH":
		return fmt.Errorf("%s wants a login when asked to %s: write the connection with a sentinel_username and sentinel_password", s.who(), what)
	case "NOQUORUM", "NOGOODSLAVE":
		return fmt.Errorf("%s sees too few sentinels for a failover: start those that are down, or look at its log", s.who())
	}
	if strings.Contains(err.Error(), "No such master") {
		return kind.Definitely("%s watches no primary of the name that sentinel_master gives: correct it, or make the sentinel watch it with SENTINEL MONITOR", s.who())
	}
	if unknownCommand(err) {
		return kind.Definitely("%s does not know how to %s: give sentinels of redis 6.2 or later as addresses, or leave sentinel_master out where they are the nodes themselves", s.who(), what)
	}
	return fmt.Errorf("%s could not %s: look at its log", s.who(), what)
}

// watched are the nodes that the sentinels watch, primaries first. Replicas that
// are down are among them until SENTINEL RESET.
func (f *fleet) watched() []string {
	var primaries, replicas []string
	for _, s := range f.nodes {
		if s.err == nil {
			primaries = append(primaries, s.sight.primary)
			replicas = append(replicas, s.sight.replicas...)
		}
	}
	return append(primaries, replicas...)
}

// disagreement says that sentinels name different primaries, or "".
func (f *fleet) disagreement() string {
	var first *node
	for _, s := range f.watch.nodes {
		switch {
		case s.err != nil:
		case first == nil:
			first = s
		case f.find(s.sight.primary) != f.find(first.sight.primary):
			return fmt.Sprintf("sentinel %s takes %s for the primary, and sentinel %s takes %s for it: wait until a failover is over, or look at their logs",
				first.name, first.sight.primary, s.name, s.sight.primary)
		}
	}
	return ""
}

// watchers are the sentinels that are logged in to the node. They name
// themselves sentinel-<id>-pubsub, as anybody may; so those count that log in as
// a user that can do what sentinels have to, which is to make nodes primaries.
func (s *session) watchers(ctx context.Context) ([]watcher, bool) {
	r := s.run(ctx, []command{{"CLIENT", "LIST", "TYPE", "pubsub"}})[0]
	if r.err != nil {
		return nil, false
	}
	var seen []watcher
	var names []string
	for line := range strings.Lines(text(r.value)) {
		client := map[string]string{}
		for word := range strings.FieldsSeq(line) {
			name, value, _ := strings.Cut(word, "=")
			client[name] = value
		}
		id, ok := strings.CutPrefix(strings.TrimSuffix(client["name"], "-pubsub"), "sentinel-")
		if ok && len(id) == shortID {
			seen = append(seen, watcher{id: id, user: client["user"], addr: client["addr"]})
			if !slices.Contains(names, client["user"]) {
				names = append(names, client["user"])
			}
		}
	}
	users, _ := s.users(ctx, names)
	return slices.DeleteFunc(seen, func(w watcher) bool { return !users[slices.Index(names, w.user)].watches() }), true
}

// watches reports whether u can do what a sentinel has to.
func (u user) watches() bool { return allows(u.rules, "slaveof") || allows(u.rules, "replicaof") }

// watchUser is the user that sentinel id logs in to nodes as, as far as nodes
// that answer show; "" where none does.
func (f *fleet) watchUser(id string) string {
	for _, n := range f.nodes {
		if n.err != nil {
			continue
		}
		for _, w := range n.facts.watchers {
			if id != "" && w.id == short(id) {
				return w.user
			}
		}
	}
	return ""
}

// isWatchUser reports whether sentinels log in to nodes as user.
func (f *fleet) isWatchUser(user string) bool {
	if f.watch != nil && f.entry.Redis.Sentinel.AuthUser == user {
		return true
	}
	return slices.ContainsFunc(f.nodes, func(n *node) bool {
		return n.err == nil && slices.ContainsFunc(n.facts.watchers, func(w watcher) bool { return w.user == user })
	})
}

// unsure reports whether nobody can tell which user the sentinels log in as.
func (f *fleet) unsure() bool {
	return f.watch != nil && f.entry.Redis.Sentinel.AuthUser == "" &&
		!slices.ContainsFunc(f.nodes, func(n *node) bool {
			return n.err == nil && slices.ContainsFunc(n.facts.watchers, func(w watcher) bool { return f.knows(w.id) })
		})
}

// inHalves reports whether user is changed in two halves: something logs in to
// nodes with it that has to be switched in between, or may do so.
func (f *fleet) inHalves(user string) bool {
	return f.isLinkUser(user) || f.isWatchUser(user) || f.unsure()
}

// stranger says that a sentinel logs in as username that the connection does not
// know, and so cannot switch, or "".
func (f *fleet) stranger(username string) string {
	for _, n := range f.nodes {
		if n.err != nil {
			continue
		}
		for _, w := range n.facts.watchers {
			switch {
			case w.user != username || f.knows(w.id):
			case f.watch == nil:
				return fmt.Sprintf("a sentinel (from %s) logs in to node %s as %s and would be locked out: write the connection with the sentinels as addresses, and sentinel_master", w.addr, n.name, username)
			default:
				return fmt.Sprintf("a sentinel (from %s) logs in to node %s as %s and is none that the others know: add it to addresses, or end it", w.addr, n.name, username)
			}
		}
	}
	return ""
}

// knows reports whether a sentinel of the target has id.
func (f *fleet) knows(id string) bool {
	return f.watch != nil && slices.ContainsFunc(f.watch.nodes, func(s *node) bool {
		return s.err == nil && (short(s.sight.id) == id ||
			slices.ContainsFunc(s.sight.others, func(w watcher) bool { return short(w.id) == id }))
	})
}

// sentinelTrouble lists what keeps the sentinels from being switched, where
// username is the one that they log in as.
func (f *fleet) sentinelTrouble(username string) []string {
	var out []string
	if text := f.stranger(username); text != "" {
		out = append(out, text)
	}
	if f.watch == nil {
		return out
	}
	if text := f.disagreement(); text != "" {
		out = append(out, text)
	}
	for _, s := range f.watch.nodes {
		switch {
		case s.err != nil:
			out = append(out, fmt.Sprintf("%v; without it the password of %s cannot be retired, because the sentinel logs in with it", s.err, username))
		case s.sight.rules != nil && !allows(s.sight.rules, "sentinel|set"):
			out = append(out, fmt.Sprintf("the user %s may not run SENTINEL SET at sentinel %s: grant it with ACL SETUSER %s +sentinel|set", s.facts.admin, s.name, s.facts.admin))
		}
	}
	return out
}

// unlinkedSentinels says which sentinels cannot log in to the primary, or take it
// for dead. A change may mend that, so it is no reason against one.
func (f *fleet) unlinkedSentinels() []string {
	var out []string
	if f.watch == nil {
		return nil
	}
	for _, s := range f.watch.nodes {
		if s.err == nil && s.sight.down() {
			out = append(out, fmt.Sprintf("sentinel %s has no working link to the primary %s: look at its log", s.name, s.sight.primary))
		}
	}
	return out
}

// unsureText says what to do where nobody can tell which user sentinels log in as.
const unsureText = "no node shows which user the sentinels log in as: grant CLIENT LIST to the admin user, wait until they are logged in, or set sentinel_auth_user"

// inspectSentinels adds to finding what there is to say about sentinels and user
// number i.
func (f *fleet) inspectSentinels(finding *kind.Finding, works map[*node]*work, i int, username string) {
	switch {
	case f.isWatchUser(username):
		finding.Problems = append(finding.Problems, f.sentinelTrouble(username)...)
		finding.Notes = append(finding.Notes, f.unlinkedSentinels()...)
	case f.mayWatch(works, i):
		finding.Problems = append(finding.Problems, unsureText)
	case f.watch != nil:
		for _, s := range f.watch.nodes {
			if s.err != nil {
				finding.Notes = append(finding.Notes, s.err.Error())
			}
		}
	}
}

// mayWatch reports whether user i could be the one that sentinels log in as,
// because nobody can tell which one is.
func (f *fleet) mayWatch(works map[*node]*work, i int) bool {
	return f.unsure() && slices.ContainsFunc(f.nodes, func(n *node) bool {
		return works[n].part[i] && works[n].users[i].watches()
	})
}

// verifySentinels adds to info what the sentinels show.
func (f *fleet) verifySentinels(info *Info) error {
	if f.watch == nil {
		return nil
	}
	conf := f.entry.Redis.Sentinel
	for _, s := range f.watch.nodes {
		shown := Node{Name: s.name, Aliases: s.aliases, Err: s.err}
		if s.err != nil {
			if kind.IsDefinite(s.err) {
				return s.err
			}
			info.Warnings = append(info.Warnings, s.err.Error())
		} else {
			shown.Version, shown.Role = s.facts.version, "sentinel"
			if user := f.watchUser(s.sight.id); conf.AuthUser != "" && user != "" && user != conf.AuthUser {
				info.Warnings = append(info.Warnings, fmt.Sprintf("sentinel %s logs in to nodes as %s, and sentinel_auth_user is %s: correct one of them", s.name, user, conf.AuthUser))
			}
		}
		info.Sentinels = append(info.Sentinels, shown)
	}
	if text := f.disagreement(); text != "" {
		info.Warnings = append(info.Warnings, text)
	}
	info.Warnings = append(info.Warnings, f.unlinkedSentinels()...)
	if f.unsure() {
		info.Warnings = append(info.Warnings, unsureText)
	}
	return nil
}

// switchSentinels makes every sentinel log in with the lead of each change whose
// user sentinels log in as.
func (j *job) switchSentinels(ctx context.Context) {
	j.watched = make([][]kind.NodeError, len(j.changes))
	for i, c := range j.changes {
		if j.watch == nil || j.steps[i] != acceptOnly || c.Lead.Secret == "" || !j.isWatchUser(c.Username) {
			continue
		}
		blocked := j.unready(i)
		stepCtx, cancel := within(ctx, 2, kind.CallTimeout)
		errs := map[string]chan error{}
		for _, s := range j.watch.nodes {
			errs[s.name] = make(chan error, 1)
			if s.err != nil {
				errs[s.name] <- s.err
			}
		}
		j.watch.each(func(s *node) {
			if blocked != nil {
				errs[s.name] <- fmt.Errorf("sentinel %s was left as it is: %w", s.name, blocked)
				return
			}
			errs[s.name] <- j.reauth(stepCtx, s, c)
		})
		cancel()
		for _, s := range j.watch.nodes {
			j.watched[i] = append(j.watched[i], kind.NodeError{Node: "sentinel " + s.name, Err: <-errs[s.name]})
		}
	}
}

// unready says why sentinels may not be given the lead of change i yet: they log
// in to every node that answers, and have to agree on the one that is the
// primary.
func (j *job) unready(i int) error {
	if text := j.disagreement(); text != "" {
		return fmt.Errorf("%s", text)
	}
	for _, n := range j.nodes {
		if w := j.works[n]; n.err == nil && w.part[i] && w.errs[i] != nil {
			return fmt.Errorf("node %s has not accepted and taken over the new password of %s: wait, or mend what it says", n.name, j.changes[i].Username)
		}
	}
	for _, s := range j.watch.nodes {
		if s.err != nil {
			continue
		}
		if slices.Contains(s.sight.flags, "failover_in_progress") {
			return fmt.Errorf("sentinel %s has a failover in progress: wait until it is over", s.name)
		}
		if primary := j.find(s.sight.primary); primary == nil || primary.err != nil {
			return fmt.Errorf("the primary %s does not answer and has not accepted the new password of %s: wait until it does, or until a failover is over", s.sight.primary, j.changes[i].Username)
		}
	}
	return nil
}

// reauth makes sentinel s log in with the lead of c, and waits until it has. What
// it holds cannot be read, so it is set at each call. Setting it ends the links
// of the sentinel (since Redis 7, redis#10400), which makes its next ping the
// proof.
func (j *job) reauth(ctx context.Context, s *node, c kind.Change) error {
	master := j.entry.Redis.Sentinel.Master
	set := command{"SENTINEL", "SET", master}
	if j.watchUser(s.sight.id) != c.Username {
		set = append(set, "auth-user", c.Username)
	}
	set = append(set, "auth-pass", c.Lead.Secret)
	if err := s.s.run(ctx, []command{set})[0].err; err != nil {
		return s.s.explain(err, "take over the password of "+c.Username+" with SENTINEL SET", s.facts.admin)
	}
	since := time.Now()
	for {
		r := s.s.run(ctx, []command{{"SENTINEL", "MASTER", master}, {"SENTINEL", "CKQUORUM", master}})
		if r[0].err != nil {
			return s.s.explain(r[0].err, "run SENTINEL MASTER", s.facts.admin)
		}
		seen := sight{}
		if ok := seen.see(r[0].value); ok < time.Since(since) && !seen.down() {
			if r[1].err != nil {
				return s.s.explain(r[1].err, "run SENTINEL CKQUORUM", s.facts.admin)
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("sentinel %s was given the new password of %s and has not reached its primary %s with it: wait, or look at its log", s.name, c.Username, s.sight.primary)
		case <-time.After(provenEvery):
		}
	}
}

// unwatched says why the old password of change i still has to be accepted, for
// the sake of a sentinel.
func (j *job) unwatched(i int) error {
	username := j.changes[i].Username
	if text := j.stranger(username); text != "" {
		return fmt.Errorf("the old password of %s is still accepted: %s", username, text)
	}
	if j.mayWatch(j.works, i) {
		return fmt.Errorf("the old password of %s is still accepted: %s", username, unsureText)
	}
	for _, s := range j.watched[i] {
		if s.Err != nil {
			return fmt.Errorf("the old password of %s is still accepted, because it could not be replaced at every sentinel: %s", username, s.Err) //nolint:errorlint // how that sentinel failed is not how the nodes did
		}
	}
	return nil
}
