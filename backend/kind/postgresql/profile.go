package postgresql

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/jackc/pgx/v5"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const (
	// maxProfile bounds the lines of one user, which are stored with a role.
	maxProfile = 48 << 10
	// maxValue is how long the value of a setting in a line may be.
	maxValue = 1 << 10
)

// profile is what a user is beside its password, as kind.Finding has it. Each line
// is one trait:
//
//	LOGIN, CREATEDB, CONNECTION LIMIT 5        an attribute that is not the default
//	member of "readers" WITH ADMIN
//	setting search_path = "a, b" in database "shop"
//	setting app.key = #0123456789abcdef
//	ownership of table public.orders in database "shop"
//
// Everybody may read the settings of every user, and values of custom ones have
// been seen to be secrets: of those, and of very long ones, the line has a digest.
// What is none of the first four nobody can be created with.
type profile struct {
	lines []string
	// hidden are the values behind digests, by line.
	hidden map[string]string
	// coarse are databases whose objects are counted and not looked at.
	coarse []string
}

func (p *profile) add(line string) {
	if strings.ContainsFunc(line, unicode.IsControl) { // names may hold them
		line = strconv.Quote(line)
	}
	p.lines = append(p.lines, line)
}

func (p *profile) addSetting(name, value, database string) {
	// The parameters of the server itself have a name without a dot.
	hide, shown := strings.Contains(name, ".") || len(value) > maxValue, strconv.Quote(value)
	if hide {
		shown = digest(value)
	}
	line := "setting " + name + " = " + shown + inDatabase(database)
	p.add(line)
	if hide {
		p.hidden[line] = value
	}
}

func inDatabase(name string) string {
	if name == "" {
		return ""
	}
	return " in database " + strconv.Quote(name)
}

func digest(value string) string {
	sum := sha256.Sum256([]byte(value))
	return "#" + hex.EncodeToString(sum[:8])
}

// tooBig says why the profile of a user cannot be kept, or "".
func (p *profile) tooBig(name string) string {
	size := 0
	for _, l := range p.lines {
		size += len(l)
	}
	if size <= maxProfile {
		return ""
	}
	return fmt.Sprintf("what user %s is takes %d bytes to describe, and at most %d are kept: give its rights and settings to a role that it is a member of", name, size, maxProfile)
}

// trait is what one line says.
type trait struct {
	line      string
	attribute string
	// A membership.
	group                   string
	admin, noInherit, noSet bool
	// A setting, with its value or the digest of it.
	setting, value, digest, database string
}

// opposites take an attribute away. CONNECTION LIMIT is the one with a number.
var opposites = map[string]string{
	"LOGIN": "NOLOGIN", "SUPERUSER": "NOSUPERUSER", "CREATEDB": "NOCREATEDB", "CREATEROLE": "NOCREATEROLE",
	"REPLICATION": "NOREPLICATION", "BYPASSRLS": "NOBYPASSRLS", "NOINHERIT": "INHERIT",
}

const quoted = `("(?:[^"\\]|\\.)*")`

var (
	limitLine   = regexp.MustCompile(`^CONNECTION LIMIT [0-9]+$`)
	memberLine  = regexp.MustCompile(`^member of ` + quoted + `( WITH ADMIN)?( WITHOUT INHERIT)?( WITHOUT SET)?$`)
	settingLine = regexp.MustCompile(`^setting ([^ ]+) = (?:` + quoted + `|(#[0-9a-f]{16}))(?: in database ` + quoted + `)?$`)
)

// traitOf reads a line.
func traitOf(line string) trait {
	t := trait{line: line}
	if _, ok := opposites[line]; ok || limitLine.MatchString(line) {
		t.attribute = line
	}
	if m := memberLine.FindStringSubmatch(line); m != nil {
		t.group = unquote(m[1])
		t.admin, t.noInherit, t.noSet = m[2] != "", m[3] != "", m[4] != ""
	}
	if m := settingLine.FindStringSubmatch(line); m != nil {
		t.setting, t.value, t.digest, t.database = m[1], unquote(m[2]), m[3], unquote(m[4])
	}
	return t
}

func unquote(text string) string {
	plain, err := strconv.Unquote(text)
	if err != nil {
		return ""
	}
	return plain
}

// ofObjects reports whether t is about objects, and so stays with its user.
func (t trait) ofObjects() bool { return t.attribute == "" && t.group == "" && t.setting == "" }

// statement is one that a user is made with, and what it does in words that
// follow "may not".
type statement struct{ sql, what string }

// give makes a user have t. number is the version of the server.
func (t trait) give(user string, number int) statement {
	name := pgx.Identifier{user}.Sanitize()
	switch {
	case t.attribute != "":
		return statement{"ALTER ROLE " + name + " " + t.attribute, "give user " + user + " " + t.attribute}
	case t.group != "":
		return statement{"GRANT " + pgx.Identifier{t.group}.Sanitize() + " TO " + name + t.options(number), fmt.Sprintf("make user %s a member of %q", user, t.group)}
	}
	return statement{t.alter(name) + " SET " + pgx.Identifier{t.setting}.Sanitize() + " TO " + settingValue(t.setting, t.value), "set " + t.setting + " for user " + user}
}

// take makes a user not have t.
func (t trait) take(user string) statement {
	name := pgx.Identifier{user}.Sanitize()
	switch {
	case strings.HasPrefix(t.attribute, "CONNECTION"):
		return statement{"ALTER ROLE " + name + " CONNECTION LIMIT -1", "change the connection limit of user " + user}
	case t.attribute != "":
		return statement{"ALTER ROLE " + name + " " + opposites[t.attribute], "take " + t.attribute + " from user " + user}
	case t.group != "":
		return statement{"REVOKE " + pgx.Identifier{t.group}.Sanitize() + " FROM " + name, fmt.Sprintf("end that user %s is a member of %q", user, t.group)}
	}
	return statement{t.alter(name) + " RESET " + pgx.Identifier{t.setting}.Sanitize(), "reset " + t.setting + " for user " + user}
}

func (t trait) alter(name string) string {
	if t.database == "" {
		return "ALTER ROLE " + name
	}
	return "ALTER ROLE " + name + " IN DATABASE " + pgx.Identifier{t.database}.Sanitize()
}

// options are those of a GRANT. From 16 on the default of one depends on the
// user, so all are given.
func (t trait) options(number int) string {
	if number >= 160000 {
		return fmt.Sprintf(" WITH ADMIN %t, INHERIT %t, SET %t", t.admin, !t.noInherit, !t.noSet)
	}
	if t.admin {
		return " WITH ADMIN OPTION"
	}
	return ""
}

// lists are the parameters that are stored in the form that SET takes: one
// literal of the whole would be a list of one (variable_is_guc_list_quote of
// pg_dump).
var lists = []string{
	"local_preload_libraries", "search_path", "session_preload_libraries", "shared_preload_libraries", "temp_tablespaces",
	"unix_socket_directories",
}

func settingValue(name, stored string) string {
	if !slices.Contains(lists, strings.ToLower(name)) {
		return literal(stored)
	}
	var words []string
	for _, w := range listed(stored) {
		words = append(words, literal(w))
	}
	if len(words) == 0 {
		return "''"
	}
	return strings.Join(words, ", ")
}

// listed splits a list of names, which are quoted where they have to be.
func listed(text string) []string {
	var out []string
	for text = strings.TrimSpace(text); text != ""; {
		var word strings.Builder
		inside, i := false, 0
		for ; i < len(text) && (inside || text[i] != ','); i++ {
			switch {
			case text[i] != '"':
				word.WriteByte(text[i])
			case inside && i+1 < len(text) && text[i+1] == '"':
				word.WriteByte('"')
				i++
			default:
				inside = !inside
			}
		}
		out = append(out, word.String())
		text = strings.TrimLeft(text[min(i+1, len(text)):], " ")
	}
	return out
}

// literal means the same whatever standard_conforming_strings is.
func literal(s string) string {
	s = strings.ReplaceAll(s, "'", "''")
	if strings.Contains(s, `\`) {
		return "E'" + strings.ReplaceAll(s, `\`, `\\`) + "'"
	}
	return "'" + s + "'"
}

// traits reads lines, and puts back what digests stand for: who has the same
// line has the same value.
func traits(lines []string, hidden map[string]string) ([]trait, error) {
	var out []trait
	for _, l := range lines {
		t := traitOf(l)
		if t.digest != "" {
			value, ok := hidden[l]
			if !ok {
				return nil, kind.Definitely("the value of setting %s is nowhere to be found, because it may be a secret, or is long, and is not kept: create the user with it, by CREATE ROLE and ALTER ROLE … SET", t.setting)
			}
			t.value = value
		}
		out = append(out, t)
	}
	return out, nil
}

// creation makes a user that there is not, without a password.
func creation(user string, lines []string, hidden map[string]string, number int) ([]statement, error) {
	all, err := traits(lines, hidden)
	if err != nil {
		return nil, err
	}
	if bound := bound(lines); len(bound) > 0 {
		return nil, kind.Definitely("user %s cannot be created, because %s cannot be copied: %s", user, enumerate(bound), sharing)
	}
	head := "CREATE ROLE " + pgx.Identifier{user}.Sanitize()
	var out []statement
	for _, t := range all {
		if t.attribute != "" {
			head += " " + t.attribute
			continue
		}
		out = append(out, t.give(user, number))
	}
	return append([]statement{{head, "create user " + user + " with the attributes that it is to have"}}, out...), nil
}

// sharing is how two users have the same rights whatever is added to them.
const sharing = "give it to a role that both are members of, as in CREATE ROLE owner NOLOGIN, REASSIGN OWNED BY … TO owner, GRANT owner TO …, and for each ALTER ROLE … SET role TO owner"

// bound are the lines that stay with their user.
func bound(lines []string) []string {
	return slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return !traitOf(l).ofObjects() })
}

// enumerate names a few lines, and how many there are.
func enumerate(lines []string) string {
	const most = 8
	if more := len(lines) - most; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(lines[:most], ", "), more)
	}
	return strings.Join(lines, ", ")
}

// alignment makes a user that has some lines have others. What is taken comes
// first: a membership with other options, or a setting with another value, is
// given anew.
func alignment(user string, has, should []string, hidden map[string]string, number int) ([]statement, error) {
	missing := slices.DeleteFunc(slices.Clone(should), func(l string) bool { return slices.Contains(has, l) })
	given, err := traits(missing, hidden)
	if err != nil {
		return nil, err
	}
	var out []statement
	for _, l := range has {
		if t := traitOf(l); !t.ofObjects() && !slices.Contains(should, l) {
			out = append(out, t.take(user))
		}
	}
	for _, t := range given {
		if !t.ofObjects() {
			out = append(out, t.give(user, number))
		}
	}
	return out, nil
}
