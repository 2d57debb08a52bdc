package redis

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// ruleSets are what is easily lost when rules are read and written again.
var ruleSets = map[string]string{
	"nothing":                      "",
	"everything":                   "~* &* +@all",
	"all but the dangerous":        "~* &* allcommands -@dangerous",
	"one command":                  "-@all +get",
	"the last rule counts":         "+@all -@read +get -@string +set -get",
	"categories by parts":          "-@all +@read -mget +@hash -hgetall",
	"one subcommand":               "-@all +config|get",
	"all subcommands but one":      "-@all +config -config|set",
	"a first argument":             "-@all +select|0 +get",
	"reading, writing, both":       "%R~r:* %W~w:* ~b:* -@all +@read +@write",
	"every key, for reading":       "%R~* -@all +get",
	"patterns that look like more": "~(a) ~+b ~-@all ~\"c ~d' ~e\\x20f ~{g}* ~[h-i]? -@all +get",
	"an empty pattern":             "~ -@all +get",
	"bytes that are no text":       "~\xff\xfe* ~\x01 ~ü* -@all +get",
	"channels":                     "resetchannels &news.* &o\x7f -@all +subscribe +psubscribe",
	"a selector":                   "~a -@all +get (%R~b:* -@all +set)",
	"selectors":                    "-@all (resetchannels %R~c:* &d.* +@read -mget) (&* ~* +@all -@admin) (%W~x ~y +set +config|get)",
	"an empty selector":            "+get ()",
	"bytes in a selector":          "-@all (~\xff\x02 +get) (\"~q\\\"q\" \"~s's\" +get) (~b\\x20b +get)",
	"payloads as they come":        "skip-sanitize-payload ~* -@all +restore",
}

// args splits rules at spaces, but for those within parentheses.
func args(rules string) []any {
	var out []any
	depth := 0
	for word := range strings.SplitSeq(rules, " ") {
		if depth > 0 {
			out[len(out)-1] = out[len(out)-1].(string) + " " + word
		} else if word != "" {
			out = append(out, word)
		}
		if strings.HasPrefix(word, "(") {
			depth++
		}
		if depth > 0 && strings.HasSuffix(word, ")") {
			depth--
		}
	}
	return out
}

// listed is the line of ACL LIST of a user, without its name and password.
func listed(t *testing.T, n *servers.RedisNode, name string) string {
	t.Helper()
	for _, line := range texts(do(t, n, "ACL", "LIST")) {
		if rest, ok := strings.CutPrefix(line, "user "+name+" "); ok {
			words := slices.DeleteFunc(strings.Split(rest, " "), func(w string) bool { return strings.HasPrefix(w, "#") })
			return strings.Join(words, " ")
		}
	}
	require.Fail(t, "there is no user "+name)
	return ""
}

func words(rules string) []string {
	return strings.FieldsFunc(rules, func(r rune) bool { return strings.ContainsRune(" ()", r) })
}

// sameRules requires that the profile of a user with rules makes the same user anew,
// and of one that had other rules.
func sameRules(t *testing.T, n *servers.RedisNode, rules string, before []any) {
	t.Helper()
	set := func(name string, modifiers ...any) {
		do(t, n, append([]any{"ACL", "SETUSER", name}, modifiers...)...)
	}
	set("one", append([]any{"reset", "on", ">first"}, args(rules)...)...)
	one := parseUser(do(t, n, "ACL", "GETUSER", "one"))
	profile := one.profile()
	require.True(t, slices.IsSorted(profile))
	f := facts{version: "7.0.15"}
	require.Empty(t, f.foreign(profile))

	set("two", append(f.create(profile), only([]string{hashOf("second")})...)...)
	set("three", append([]any{"reset", "on", ">third"}, before...)...)
	set("three", f.align(profile)...)
	for name, password := range map[string]string{"two": "second", "three": "third"} {
		u := parseUser(do(t, n, "ACL", "GETUSER", name))
		require.Equal(t, profile, u.profile(), "%q", rules)
		require.Equal(t, []string{hashOf(password)}, u.hashes)
		require.True(t, u.on)
		// Patterns are in the order of the profile, and single commands in none.
		require.ElementsMatch(t, words(listed(t, n, "one")), words(listed(t, n, name)), "%q", rules)
	}
	do(t, n, "ACL", "DELUSER", "one", "two", "three")
}

func TestProfileMakesTheSameUser(t *testing.T) {
	t.Parallel()
	n := servers.Redis(t)
	for _, open := range []string{"allchannels", "resetchannels"} { // what new users and selectors have
		do(t, n, "CONFIG", "SET", "acl-pubsub-default", open)
		for name, rules := range ruleSets {
			t.Run(open+"/"+name, func(t *testing.T) {
				sameRules(t, n, rules, args(ruleSets["selectors"]+" ~had:* resetchannels &had +@write skip-sanitize-payload"))
			})
		}
	}
}

// Two servers write the same rules in different orders.
func TestProfileIsTheSameAtEveryNode(t *testing.T) {
	t.Parallel()
	a, b := servers.Redis(t), servers.Redis(t)
	different := 0
	for name, rules := range ruleSets {
		var users []user
		for _, n := range []*servers.RedisNode{a, b} {
			do(t, n, append([]any{"ACL", "SETUSER", "u", "reset", "on"}, args(rules)...)...)
			users = append(users, parseUser(do(t, n, "ACL", "GETUSER", "u")))
		}
		require.Equal(t, users[0].profile(), users[1].profile(), name)
		if !slices.Equal(users[0].rules, users[1].rules) {
			different++
		}
	}
	t.Logf("the servers wrote %d of %d differently", different, len(ruleSets))
}

// TestProfileOfAnyRules is the same for rules that were thrown together.
func TestProfileOfAnyRules(t *testing.T) {
	t.Parallel()
	n := servers.Redis(t)
	const seed = 7
	random := rand.New(rand.NewPCG(seed, seed))
	commands := []string{
		"+@all", "-@all", "+@read", "-@read", "+@write", "-@write", "+@dangerous", "-@dangerous", "+@fast", "-@slow",
		"+get", "-get", "+set", "-set", "+config", "-config|set", "+config|get", "+acl|whoami", "-acl", "+select|0", "+client|id", "-client",
	}
	patterns := []string{"~a:*", "%R~b", "%W~b", "%RW~c*", "~d?", "&x", "&y*", "%R~*"}
	some := func(of []string) string {
		var out []string
		for range random.IntN(6) {
			out = append(out, of[random.IntN(len(of))])
		}
		return strings.Join(out, " ")
	}
	for range 200 {
		rules := some(patterns) + " " + some(commands)
		for range random.IntN(3) {
			rules += " (" + strings.TrimSpace(some(patterns)+" "+some(commands)) + ")"
		}
		sameRules(t, n, rules, args(some(patterns)+" "+some(commands)))
	}
}

func TestOrderOfCommandsThatSaysNothing(t *testing.T) {
	for rules, want := range map[string]string{
		"":                                   "",
		"-@all":                              "-@all",
		"-@all +set +get":                    "-@all +get +set",
		"+@all -set -@read +mget +get":       "+@all -set -@read +get +mget",
		"-@all +config -config|set +acl":     "-@all +acl +config -config|set",
		"-@all -config|set +config +acl|cat": "-@all +acl|cat -config|set +config",
		"-@all +x|b +x|a +x -x|d -x|c +x|d":  "-@all +x|a +x|b +x -x|c -x|d +x|d",
		"-@all +get +get|b +getex +get|a":    "-@all +get +get|a +get|b +getex",
	} {
		require.Equal(t, want, ordered(rules))
	}
}

// Redis 6 writes patterns as lists, without marks, and 6.0 knows no channels.
func TestProfileOfRedis6(t *testing.T) {
	list := func(words ...any) []any { return words }
	seven := parseUser(list("flags", list("on", "sanitize-payload"), "passwords", list(),
		"commands", "-@all +get", "keys", "~b ~a:*", "channels", "&x", "selectors", list()))
	six := parseUser(list("flags", list("on", "allcommands", "sanitize-payload"), "passwords", list(),
		"commands", "-@all +get", "keys", list("a:*", "b"), "channels", list("x")))
	require.Equal(t, []string{"&x", "-@all +get", "~a:*", "~b"}, seven.profile())
	require.Equal(t, seven.profile(), six.profile())

	open := parseUser(list("flags", list("on", "allkeys"), "passwords", list(), "commands", "+@all", "keys", list("*")))
	require.Equal(t, []string{"&*", "+@all", "~*"}, open.profile())
	require.Nil(t, parseUser(nil).profile(), "nobody")

	first, second := facts{version: "6.0.16"}, facts{version: "6.2.7"}
	require.Equal(t, []any{"reset", "on", "resetkeys", "nocommands", "+@all", "~*"}, first.create(open.profile()))
	require.Equal(t, []any{"resetkeys", "nocommands", "resetchannels", "sanitize-payload", "&*", "+@all", "~*"}, second.align(open.profile()))
	for rule, old := range map[string][]bool{ // at 6.0, 6.2, 7.2
		"&*": {false, false, false}, "&x": {true, false, false}, skipSanitize: {true, false, false},
		"%R~a": {true, true, false}, "(~a resetchannels -@all +get)": {true, true, false}, "~a": {false, false, false},
	} {
		for i, version := range []string{"6.0.16", "6.2.7", "7.2.4"} {
			f := facts{version: version}
			require.Equal(t, old[i], f.foreign([]string{rule}) != "", "%s %s", version, rule)
		}
	}
}

// A replica may have been made anew, and names say nothing about who is one.
func TestProfileIsThatOfAPrimary(t *testing.T) {
	replica, primary := &node{facts: facts{replica: true}}, &node{}
	of := func(rules string) *work {
		return &work{part: []bool{true}, errs: []error{nil}, users: []user{{exists: rules != "", rights: rights{commands: rules}}}}
	}
	for _, x := range []struct {
		replica, primary string
		want             []string
	}{
		{"+get", "+set", []string{"+set"}},
		{"", "+set", []string{"+set"}},
		{"+get", "", []string{"+get"}},
		{"", "", nil},
	} {
		for _, nodes := range [][]*node{{replica, primary}, {primary, replica}} {
			in := inspection{fleet: &fleet{nodes: nodes}, works: map[*node]*work{replica: of(x.replica), primary: of(x.primary)}}
			require.Equal(t, x.want, in.profile(0))
		}
	}
}

func problems(t *testing.T, target kind.Target, u kind.User) (problems, notes string) {
	t.Helper()
	f := target.Preflight(limited(t), []kind.User{u})[0]
	require.NoError(t, f.Err)
	return strings.Join(f.Problems, "\n"), strings.Join(f.Notes, "\n")
}

// A replica that was replaced has the users that its image has.
func TestNodeThatWasReplacedIsHealed(t *testing.T) {
	t.Parallel()
	set := servers.RedisReplicated(t, 1, servers.WithUsers("app on sanitize-payload >old ~app:* resetchannels -@all +@read (%R~x +set)"))
	primary, replica := set.Nodes[0], set.Nodes[1]
	target := open(direct(set.Nodes...))
	u := kind.User{Username: "app", Known: set.Addrs()}
	profile := target.Preflight(limited(t), []kind.User{u})[0].Profile
	require.Equal(t, []string{"(%R~x resetchannels -@all +set)", "-@all +@read", "~app:*"}, profile)

	do(t, replica, "ACL", "DELUSER", "app")
	problem, _ := problems(t, target, u)
	require.Contains(t, problem, "does not exist at node "+replica.Addr)
	u.Profile = profile
	problem, note := problems(t, target, u)
	require.Empty(t, problem)
	require.Contains(t, note, "user app will be created at "+replica.Addr)

	old, fresh := kind.Material{Username: "app", Secret: "old"}, kind.Material{Username: "app", Secret: "new"}
	nobody := kind.Change{User: u, Exclusive: true}
	nobody.Username, nobody.Known = "nobody", nil
	out := target.Change(limited(t), []kind.Change{{User: u, Accept: []kind.Material{old, fresh}}, nobody})
	for _, n := range slices.Concat(out[0].Nodes, out[1].Nodes) {
		require.NoError(t, n.Err, n.Node)
	}
	require.Equal(t, []string{"user app was created at " + replica.Addr}, out[0].Notes)
	require.Empty(t, out[1].Notes, "who is not there accepts nothing")
	require.NoError(t, replica.Restart(t.Context()))
	require.NoError(t, set.WaitReplicating(t.Context()))
	require.Equal(t, listed(t, primary, "app"), listed(t, replica, "app"))
	q := kind.Question{User: u, Materials: []kind.Material{old, fresh}}
	for _, n := range target.Probe(limited(t), []kind.Question{q})[0].Nodes {
		require.NoError(t, n.Err)
		require.Equal(t, []bool{true, true}, n.Accepts)
		require.Zero(t, n.Extra)
	}
}

func TestUsersThatTakeTurns(t *testing.T) {
	t.Parallel()
	set := servers.RedisReplicated(t, 1, servers.WithReplicationUser("repl", "link"), servers.WithUsers("a on >first ~a:* +get"))
	primary, replica := set.Nodes[0], set.Nodes[1]
	target := open(direct(set.Nodes...))
	b := kind.User{Username: "b", Like: "a"}
	problem, note := problems(t, target, b)
	require.Empty(t, problem)
	require.Contains(t, note, "user b will be created like a")
	require.NotContains(t, note, "b will be created like a at", "it is nowhere")

	problem, _ = problems(t, target, kind.User{Username: "b", Like: "c"})
	require.Contains(t, problem, "user b does not exist", "and neither does c")
	problem, _ = problems(t, target, kind.User{Username: "repl", Like: "a"})
	require.Contains(t, problem, "nodes log in to each other")

	for _, n := range set.Nodes {
		do(t, n, "ACL", "SETUSER", "b", "on", "~a:*", "+get")
	}
	problem, _ = problems(t, target, b)
	require.Empty(t, problem, "an idle user has no password")
	do(t, replica, "ACL", "SETUSER", "b", "+set", "resetkeys", "~b:*")
	problem, _ = problems(t, target, b)
	require.Contains(t, problem, "user b differs from a, whose place it is to take: it lacks -@all +get, lacks ~a:*")
	require.Contains(t, problem, "(at "+replica.Addr+")")
	require.Contains(t, problem, "user b has other rules at "+replica.Addr+" than at the other nodes")

	_, note = problems(t, target, kind.User{Username: "b"})
	require.Contains(t, note, "user b has other rules at "+replica.Addr, "no problem for who is alone")
	do(t, primary, "ACL", "SETUSER", "b", "off")
	problem, _ = problems(t, target, b)
	require.Contains(t, problem, "is off")
	do(t, primary, "ACL", "SETUSER", "b", "on", "nopass")
	problem, _ = problems(t, target, b)
	require.Contains(t, problem, "nopass")
}

// A rule that a node does not take is named, and nothing is made without it.
func TestRuleThatIsNotTaken(t *testing.T) {
	t.Parallel()
	n := servers.Redis(t)
	u := kind.User{Username: "app", Profile: []string{"&*", "-@all +json.get", "~*"}}
	m := kind.Material{Username: "app", Secret: "a-password"}
	err := open(direct(n)).Change(limited(t), []kind.Change{{User: u, Accept: []kind.Material{m}}})[0].Nodes[0].Err
	require.True(t, kind.IsDefinite(err), "%v", err)
	require.ErrorContains(t, err, "does not take the rule +json.get")
	require.NotContains(t, err.Error(), hashOf(m.Secret))
	require.NotContains(t, fmt.Sprint(do(t, n, "ACL", "LIST")), "user app ")
}

// What makes users, aligns them and closes their connections sends no password.
func TestNoPlaintextOfUsersThatAreMade(t *testing.T) {
	t.Parallel()
	r := newRig(t, servers.RedisReplicated(t, 1, servers.WithConfig("slowlog-log-slower-than 0", "slowlog-max-len 1024")))
	old, fresh := kind.Material{Username: "app", Secret: "old-of-app"}, kind.Material{Username: "app", Secret: "new-of-app"}
	r.setUser(t, "like", "on", ">something", "~like:*", "+get")
	profile := r.target().Preflight(limited(t), []kind.User{{Username: "like"}})[0].Profile
	u := kind.User{Username: "app", Like: "like", Profile: profile}
	stop := r.capture(t)
	change := func(c kind.Change) []string {
		out := r.target().Change(limited(t), []kind.Change{c})[0]
		for _, n := range out.Nodes {
			require.NoError(t, n.Err)
		}
		return out.Notes
	}
	require.Contains(t, fmt.Sprint(change(kind.Change{User: u, Accept: []kind.Material{old}, Exclusive: true})), "created")
	alive := r.hold(t, old) // past the proxies
	r.setUser(t, "app", "+set")
	c := kind.Change{User: u, Accept: []kind.Material{fresh}, Exclusive: true, Align: true, CloseBefore: time.Now()}
	notes := fmt.Sprint(change(c))
	require.Contains(t, notes, "given the rules")
	require.Contains(t, notes, "connections of user app that were closed: 1")
	require.False(t, alive())
	seen := string(stop())
	require.Contains(t, seen, hashOf(fresh.Secret))
	for _, m := range []kind.Material{old, fresh} {
		require.NotContains(t, seen, m.Secret)
	}
}
