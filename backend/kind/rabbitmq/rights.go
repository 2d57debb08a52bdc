package rabbitmq

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// maxProfile bounds the bytes of a profile, which is stored with a role.
const maxProfile = 48 << 10

// rights are all that a user is beside its password.
type rights struct {
	tags        tags
	permissions []permission
	topics      []topic
	limits      limits
}

// permission is what a user may do in one vhost, by the names of things there.
type permission struct{ VHost, Configure, Write, Read string }

// topic is what a user may do at one topic exchange, by routing keys.
type topic struct{ VHost, Exchange, Write, Read string }

// limits are how many connections or channels a user may have. One below zero is
// none.
type limits map[string]int

// UnmarshalJSON takes a list, too: Erlang's empty map may come as an empty one.
func (l *limits) UnmarshalJSON(data []byte) error {
	if string(data) == "[]" {
		return nil
	}
	var m map[string]int
	err := json.Unmarshal(data, &m)
	maps.DeleteFunc(m, func(_ string, value int) bool { return value < 0 })
	*l = m
	return err
}

// Lines of a profile. Names and patterns may hold anything, so they are quoted as
// in Go; no line holds a comma of its own, because they are shown in lists.
const (
	tagLine        = "tag %q"
	permissionLine = "permission in vhost %q: configure %q write %q read %q"
	topicLine      = "topic permission in vhost %q at exchange %q: write %q read %q"
	limitLine      = "limit %s %d"
)

// profile is the rights as sorted lines.
func (r rights) profile() []string {
	lines := []string{}
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	for _, t := range r.tags {
		add(tagLine, t)
	}
	for _, p := range r.permissions {
		add(permissionLine, p.VHost, p.Configure, p.Write, p.Read)
	}
	for _, t := range r.topics {
		add(topicLine, t.VHost, t.Exchange, t.Write, t.Read)
	}
	for name, value := range r.limits {
		add(limitLine, name, value)
	}
	slices.Sort(lines)
	return slices.Compact(lines)
}

// large reports whether the lines are too many to be stored.
func large(profile []string) bool {
	size := 0
	for _, l := range profile {
		size += len(l)
	}
	return size > maxProfile
}

// parseProfile is the inverse of profile.
func parseProfile(lines []string) (rights, error) {
	r := rights{limits: limits{}}
	for _, l := range lines {
		if !r.add(l) {
			return rights{}, kind.Definitely("the profile that is remembered of a user has a line that is not understood here (%.80q): start a rotation once the other user of the role can be read", l)
		}
	}
	return r, nil
}

func (r *rights) add(line string) bool {
	if q, ok := quoted(line, tagLine); ok {
		r.tags = append(r.tags, q[0])
		return true
	}
	if q, ok := quoted(line, permissionLine); ok {
		r.permissions = append(r.permissions, permission{q[0], q[1], q[2], q[3]})
		return true
	}
	if q, ok := quoted(line, topicLine); ok {
		r.topics = append(r.topics, topic{q[0], q[1], q[2], q[3]})
		return true
	}
	var name string
	var value int
	if _, err := fmt.Sscanf(line, limitLine, &name, &value); err != nil || line != fmt.Sprintf(limitLine, name, value) {
		return false
	}
	r.limits[name] = value
	return true
}

// quoted takes what stands for %q in format from line; false where line is not of
// that form.
func quoted(line, format string) ([]string, bool) {
	var out []string
	for {
		text, more, found := strings.Cut(format, "%q")
		rest, ok := strings.CutPrefix(line, text)
		if !ok || !found {
			return out, ok && rest == ""
		}
		q, err := strconv.QuotedPrefix(rest)
		if err != nil {
			return nil, false
		}
		value, err := strconv.Unquote(q)
		if err != nil {
			return nil, false
		}
		out, line, format = append(out, value), rest[len(q):], more
	}
}

// request is one of those that change the rights of a user.
type request struct {
	method, path string
	body         any
	what         string // it does, for errors
}

// towards are the requests that make the rights of a user those of should, all
// but its tags, which stand in its record. What is given comes first.
func (r rights) towards(should rights, name string) []request {
	given, taken := r.permissionRequests(should, name)
	for limit, value := range should.limits {
		if has, ok := r.limits[limit]; !ok || has != value {
			given = append(given, request{http.MethodPut, limitPath(name, limit), map[string]int{"value": value}, "set limit " + limit + " of user " + name})
		}
	}
	for limit := range r.limits {
		if _, ok := should.limits[limit]; !ok {
			taken = append(taken, request{http.MethodDelete, limitPath(name, limit), nil, "remove limit " + limit + " of user " + name})
		}
	}
	return slices.Concat(given, taken, r.topicRequests(should, name))
}

func limitPath(name, limit string) string {
	return "user-limits/" + url.PathEscape(name) + "/" + url.PathEscape(limit)
}

func (r rights) permissionRequests(should rights, name string) (given, taken []request) {
	path := func(p permission) string {
		return "permissions/" + url.PathEscape(p.VHost) + "/" + url.PathEscape(name)
	}
	for _, p := range should.permissions {
		if !slices.Contains(r.permissions, p) {
			body := map[string]string{"configure": p.Configure, "write": p.Write, "read": p.Read}
			given = append(given, request{http.MethodPut, path(p), body, fmt.Sprintf("give user %s its permission in vhost %s", name, p.VHost)})
		}
	}
	for _, p := range r.permissions {
		if !slices.ContainsFunc(should.permissions, func(s permission) bool { return s.VHost == p.VHost }) {
			taken = append(taken, request{http.MethodDelete, path(p), nil, fmt.Sprintf("take the permission in vhost %s from user %s", p.VHost, name)})
		}
	}
	return given, taken
}

// topicRequests end the topic permissions of a vhost, which is possible for all of
// its exchanges only, where one is too many, and set those that are wanted.
func (r rights) topicRequests(should rights, name string) []request {
	var out []request
	path := func(vhost string) string {
		return "topic-permissions/" + url.PathEscape(vhost) + "/" + url.PathEscape(name)
	}
	var ended []string
	for _, t := range r.topics {
		wanted := slices.ContainsFunc(should.topics, func(s topic) bool { return s.VHost == t.VHost && s.Exchange == t.Exchange })
		if !wanted && !slices.Contains(ended, t.VHost) {
			ended = append(ended, t.VHost)
			out = append(out, request{http.MethodDelete, path(t.VHost), nil, fmt.Sprintf("take the topic permissions in vhost %s from user %s", t.VHost, name)})
		}
	}
	for _, t := range should.topics {
		if slices.Contains(r.topics, t) && !slices.Contains(ended, t.VHost) {
			continue
		}
		body := map[string]string{"exchange": t.Exchange, "write": t.Write, "read": t.Read}
		out = append(out, request{http.MethodPut, path(t.VHost), body, fmt.Sprintf("give user %s its topic permission in vhost %s", name, t.VHost)})
	}
	return out
}

// rightsOf reads all that u is beside its password.
func (m *management) rightsOf(ctx context.Context, u user) (rights, error) {
	r := rights{tags: u.Tags, limits: u.Limits}
	var err error
	if r.permissions, err = m.permissions(ctx, u.Name); err == nil {
		r.topics, err = m.topics(ctx, u.Name)
	}
	return r, err
}

// vhosts are those in which there is any permission, sorted.
func (r rights) vhosts() []string {
	out := make([]string, len(r.permissions))
	for i, p := range r.permissions {
		out[i] = p.VHost
	}
	slices.Sort(out)
	return out
}
