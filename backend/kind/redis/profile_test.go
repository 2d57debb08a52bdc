package redis

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

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
