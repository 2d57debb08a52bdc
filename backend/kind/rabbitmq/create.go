package rabbitmq

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// tagIncomplete marks a user that is being created. RabbitMQ knows no permission
// of a user that does not exist, so a user is created in several steps: with this
// tag alone and without a password, then its permissions and limits, and last its
// tags and its password, in one request. A user with this tag is treated as one
// that does not exist, so whoever comes after a crash finishes it.
const tagIncomplete = "harmonyflow-incomplete"

// there reports whether u exists, and not halfway.
func (u user) there() bool { return u.exists && !slices.Contains(u.Tags, tagIncomplete) }

// absent says that a user which has to exist does not.
func (u user) absent(name string) string {
	if u.exists {
		return fmt.Sprintf("user %s was created halfway, which its tag %s says: rotate the role that it was created for, or remove it with rabbitmqctl delete_user", name, tagIncomplete)
	}
	return errNobody(name)
}

// reserve is how much of its time a call leaves unused: a request that would begin
// in it might be carried out without its answer being heard.
const reserve = 100 * time.Millisecond

func haveTime(ctx context.Context) error {
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < reserve {
		return context.DeadlineExceeded
	}
	return ctx.Err()
}

// alignment is what makes a user be what its profile says.
type alignment struct {
	tags     tags
	profile  []string
	requests []request
	retag    bool
	// got and lost are lines of profiles.
	got, lost []string
}

// align compares u with what it is to be.
func (c *cluster) align(ctx context.Context, u user, profile []string) (*alignment, error) {
	should, err := parseProfile(profile)
	if err != nil {
		return nil, err
	}
	var has rights
	if u.exists {
		if has, err = c.rightsOf(ctx, u); err != nil {
			return nil, err
		}
	}
	a := &alignment{tags: should.tags, profile: should.profile(), requests: has.towards(should, u.Name), retag: !sameTags(u.Tags, should.tags)}
	a.got, a.lost = without(a.profile, has.profile()), without(has.profile(), a.profile)
	return a, nil
}

// without are the lines that are not among others.
func without(lines, others []string) []string {
	return slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return slices.Contains(others, l) })
}

func sameTags(a, b tags) bool {
	return slices.Equal(slices.Compact(slices.Sorted(slices.Values(a))), slices.Compact(slices.Sorted(slices.Values(b))))
}

func (a *alignment) due() bool { return a != nil && (a.retag || len(a.requests) > 0) }

// run sends the requests of a, one after the other: one that is not known to have
// happened ends it, and a call that comes after it does the rest.
func (c *cluster) run(ctx context.Context, a *alignment) error {
	for _, r := range a.requests {
		err := haveTime(ctx)
		if err == nil {
			err = c.do(ctx, c.login, r.method, r.path, r.body, nil)
		}
		if r.method == http.MethodDelete && notFound(err) {
			continue
		}
		if err != nil {
			return unsure(c.explain(err, r.what, c.login.Username))
		}
	}
	return nil
}

// unsure makes of an error of a request that changes something one that nobody is
// passed over for: it may have been heard.
func unsure(err error) error {
	if kind.IsUnreachable(err) {
		return &kind.Error{Class: kind.Unavailable, Err: err}
	}
	return err
}

// note says what was done to a user.
func (a *alignment) note(ch kind.Change, created bool) string {
	switch {
	case created && ch.Like != "":
		return fmt.Sprintf("user %s was created like %s", ch.Username, ch.Like)
	case created:
		return fmt.Sprintf("user %s was created, with what is remembered of it", ch.Username)
	}
	var what []string
	if len(a.got) > 0 {
		what = append(what, "got "+some(a.got))
	}
	if len(a.lost) > 0 {
		what = append(what, "lost "+some(a.lost))
	}
	return fmt.Sprintf("user %s %s", ch.Username, strings.Join(what, ", and "))
}

// maxShown bounds how many lines of a profile a note shows.
const maxShown = 8

func some(lines []string) string {
	if more := len(lines) - maxShown; more > 0 {
		lines = append(slices.Clone(lines[:maxShown]), fmt.Sprintf("%d more", more))
	}
	return strings.Join(lines, ", ")
}
