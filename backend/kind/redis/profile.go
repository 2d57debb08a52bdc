package redis

import (
	"cmp"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// A profile is what ACL GETUSER says of a user beside its passwords and whether it
// is on. Each line is what ACL SETUSER takes: a pattern of keys (~ or %), a pattern
// of channels (&), all rules about commands (+ or -), a selector in parentheses, or
// skip-sanitize-payload. Rules about commands are one line because their order
// counts; the order of everything else does not.

const (
	anyChannel   = "&*"
	skipSanitize = "skip-sanitize-payload"
)

// rights are what one list of rules allows: a user's own, or a selector's.
type rights struct {
	keys, channels []string
	commands       string
}

// read takes one field of a reply of ACL GETUSER.
func (r *rights) read(name string, value any) {
	switch name {
	case "commands":
		r.commands = ordered(text(value))
	case "keys":
		r.keys = patterns(value, "~")
	case "channels":
		r.channels = patterns(value, "&")
	}
}

// ordered is one of the many ways to write rules about commands. Redis 7.0 writes
// single commands in the order of a hash table, which is another at each node and
// changes with time. Their order counts between a command and its subcommands, and on
// either side of a category.
func ordered(rules string) string {
	words := strings.Fields(rules)
	for start, end := 0, 0; end <= len(words); end++ {
		if end == len(words) || strings.HasPrefix(words[end][1:], "@") {
			sortCommands(words[start:end])
			start = end + 1
		}
	}
	return strings.Join(words, " ")
}

func sortCommands(rules []string) {
	type key struct {
		rule, parent, name string
		turn               int // how many rules about the parent itself came before
	}
	turns := map[string]int{}
	keys := make([]key, len(rules))
	for i, rule := range rules {
		name := rule[1:]
		parent, _, sub := strings.Cut(name, "|")
		if !sub {
			turns[parent]++
		}
		keys[i] = key{rule, parent, name, turns[parent]}
	}
	slices.SortStableFunc(keys, func(a, b key) int {
		return cmp.Or(strings.Compare(a.parent, b.parent), cmp.Compare(a.turn, b.turn), strings.Compare(a.name, b.name))
	})
	for i, k := range keys {
		rules[i] = k.rule
	}
}

// patterns reads what redis 7 writes as "~a %R~b", and redis 6 as a list without
// marks.
func patterns(value any, mark string) []string {
	if s, ok := value.(string); ok {
		return strings.FieldsFunc(s, func(r rune) bool { return r == ' ' })
	}
	out := texts(value)
	for i := range out {
		out[i] = mark + out[i]
	}
	return out
}

// selector is r as one argument of ACL SETUSER. A new selector may use every channel
// where acl-pubsub-default says so.
func (r *rights) selector() string {
	words := slices.Sorted(slices.Values(r.keys))
	if !slices.Equal(r.channels, []string{anyChannel}) {
		words = append(words, "resetchannels")
	}
	words = append(words, slices.Sorted(slices.Values(r.channels))...)
	for i, w := range words {
		if strings.ContainsAny(w, `"'`) { // a selector is read like a line of redis-cli
			words[i] = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(w) + `"`
		}
	}
	return "(" + strings.Join(append(words, r.commands), " ") + ")"
}

// profile is all that u is beside its passwords and whether it is on.
func (u user) profile() []string {
	if !u.exists {
		return nil
	}
	lines := slices.Concat(u.keys, u.channels, u.selectors)
	lines = append(lines, u.commands)
	if u.skipSanitize {
		lines = append(lines, skipSanitize)
	}
	for i, l := range lines {
		lines[i] = shown(l)
	}
	slices.Sort(lines)
	return lines
}

// shown is line as text that may be stored and displayed, whatever bytes its
// patterns hold. No rule begins with a quote, so that hidden can tell.
func shown(line string) string {
	if utf8.ValidString(line) && !strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return line
	}
	return strconv.Quote(line)
}

// hidden undoes shown.
func hidden(line string) string {
	if raw, err := strconv.Unquote(line); err == nil && strings.HasPrefix(line, `"`) {
		return raw
	}
	return line
}

// create makes a user that has profile and no password yet. It says everything,
// because what is left out depends on settings of the node.
func (f *facts) create(profile []string) []any {
	return append([]any{"reset", "on"}, f.align(profile)...)
}

// align gives a user the rules of profile, whatever it had, and leaves its passwords
// and whether it is on.
func (f *facts) align(profile []string) []any {
	out := []any{"resetkeys", "nocommands"}
	pubsub := f.since(6, 2)
	if pubsub {
		out = append(out, "resetchannels")
		if !slices.Contains(profile, skipSanitize) {
			out = append(out, "sanitize-payload")
		}
	}
	if f.since(7, 0) {
		out = append(out, "clearselectors")
	}
	for _, line := range profile {
		switch line = hidden(line); {
		case strings.HasPrefix(line, "+"), strings.HasPrefix(line, "-"):
			for rule := range strings.FieldsSeq(line) {
				out = append(out, rule)
			}
		case line == anyChannel && !pubsub: // there is nothing else
		default:
			out = append(out, line)
		}
	}
	return out
}

// foreign is a line of profile that the node is too old for, or "".
func (f *facts) foreign(profile []string) string {
	for _, line := range profile {
		rule := hidden(line)
		switch {
		case strings.HasPrefix(rule, "("), strings.HasPrefix(rule, "%"):
			if !f.since(7, 0) {
				return line
			}
		case rule == skipSanitize, strings.HasPrefix(rule, "&") && rule != anyChannel:
			if !f.since(6, 2) {
				return line
			}
		}
	}
	return ""
}

// since reports whether the node is at least of a version.
func (f *facts) since(major, minor int) bool {
	first, rest, _ := strings.Cut(f.version, ".")
	second, _, _ := strings.Cut(rest, ".")
	a, _ := strconv.Atoi(first)
	b, _ := strconv.Atoi(second)
	return a > major || a == major && b >= minor
}

var refusedModifier = regexp.MustCompile(`(?s) modifier '(.*)': `)

// explainChange says why ACL SETUSER failed. The reply repeats the modifier that it
// did not take; that is shown only where it is a rule of the user's profile.
func (s *session) explainChange(err error, c kind.Change, modifiers []any) error {
	if replyCode(err) == "ERR" && len(c.Profile) > 0 {
		found := refusedModifier.FindStringSubmatch(err.Error())
		if len(found) == 2 && !strings.HasPrefix(found[1], "#") && slices.Contains(modifiers, any(found[1])) {
			return kind.Definitely("node %s does not take the rule %s, which user %s is to have: upgrade it, or load the modules that other nodes have", s.node, shown(found[1]), c.Username)
		}
	}
	return s.explain(err, "change user "+c.Username+" with ACL SETUSER", c.Username)
}
