package rabbitmq

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// odd may be part of any name and pattern.
const odd = "a/b c, \"d\": write \"%q\" \\ é\n\x00"

func TestProfile(t *testing.T) {
	r := rights{
		tags:        tags{"management", odd, "b", "management"},
		permissions: []permission{{"/", ".*", "", "^a|b$"}, {odd, odd, odd, odd}},
		topics:      []topic{{"/", "amq.topic", "", ".*"}, {"/", "", "a", "b"}, {odd, odd, odd, odd}},
		limits:      limits{"max-connections": 0, "max-channels": 7},
	}
	lines := r.profile()
	require.Len(t, lines, 10)
	require.True(t, slices.IsSorted(lines))
	for _, l := range lines {
		require.NotContains(t, l, "\n")
		require.NotContains(t, l, "\x00")
	}
	t.Log(strings.Join(lines, "\n"))
	back, err := parseProfile(lines)
	require.NoError(t, err)
	require.Equal(t, lines, back.profile())
	require.ElementsMatch(t, r.permissions, back.permissions)
	require.ElementsMatch(t, r.topics, back.topics)
	require.Equal(t, r.limits, back.limits)
	require.True(t, sameTags(r.tags, back.tags))
	require.Empty(t, rights{}.profile())
	require.NotNil(t, rights{}.profile())

	for _, bad := range []string{
		"", "tag", "tag x", `tag "x" `, `tag "x`, `limit a`, `limit a 07`, `limit a 7 `, `tag "x""y"`,
		`permission in vhost "/": configure "" write ""`, `permission in vhost "/": configure "" write "" read "" more`,
	} {
		_, err := parseProfile([]string{bad})
		require.True(t, kind.IsDefinite(err), bad)
	}
}

func TestLimits(t *testing.T) {
	for text, want := range map[string]limits{
		`{}`: {}, `[]`: nil, `{"max-connections":0,"max-channels":-1}`: {"max-connections": 0},
	} {
		var got limits
		require.NoError(t, json.Unmarshal([]byte(text), &got))
		require.Equal(t, want, got, text)
	}
	require.Error(t, json.Unmarshal([]byte(`"x"`), &limits{}))
}

func TestTowards(t *testing.T) {
	has := rights{
		permissions: []permission{{"/", "a", "b", "c"}, {"same", "a", "b", "c"}, {"gone", "", "", ""}},
		topics:      []topic{{"/", "stays", "a", "b"}, {"/", "goes", "a", "b"}, {"same", "x", "a", "b"}},
		limits:      limits{"max-connections": 1, "max-channels": 2},
	}
	should := rights{
		permissions: []permission{{"/", "a", "b", "other"}, {"same", "a", "b", "c"}, {"new one", "", "", ""}},
		topics:      []topic{{"/", "stays", "a", "b"}, {"same", "x", "a", "b"}, {"same", "y", "a", "b"}},
		limits:      limits{"max-connections": 3},
	}
	var got []string
	for _, r := range has.towards(should, "u/v") {
		sent, err := json.Marshal(r.body)
		require.NoError(t, err)
		got = append(got, fmt.Sprint(r.method, " ", r.path, " ", string(sent)))
	}
	require.Equal(t, []string{
		`PUT permissions/%2F/u%2Fv {"configure":"a","read":"other","write":"b"}`,
		`PUT permissions/new%20one/u%2Fv {"configure":"","read":"","write":""}`,
		`PUT user-limits/u%2Fv/max-connections {"value":3}`,
		`DELETE permissions/gone/u%2Fv null`,
		`DELETE user-limits/u%2Fv/max-channels null`,
		`DELETE topic-permissions/%2F/u%2Fv null`,
		`PUT topic-permissions/%2F/u%2Fv {"exchange":"stays","read":"b","write":"a"}`,
		`PUT topic-permissions/same/u%2Fv {"exchange":"y","read":"b","write":"a"}`,
	}, got)
	require.Empty(t, has.towards(has, "u"))
	require.Empty(t, rights{}.towards(rights{}, "u"))
}

func TestTagsAreSentApart(t *testing.T) {
	require.Equal(t, "a,b", tags{"a", "b"}.sent())
	require.Equal(t, []string{"a,b", "c"}, tags{"a,b", "c"}.sent())
}

// pairOf answers for user u, which is to take the place of user v.
func pairOf(u, v string) *fake {
	f := healthy()
	f.answers["GET users/u"], f.answers["GET users/v"] = u, v
	for _, which := range []string{"permissions", "topic-permissions"} {
		f.answers["GET users/v/"+which] = "[]"
	}
	for name, answer := range map[string]string{"u": u, "v": v} {
		if answer == "" {
			f.status["GET users/"+name] = http.StatusNotFound
		}
	}
	f.answers["GET users/v/permissions"] = `[{"vhost":"/"}]`
	f.status["GET vhosts/gone"] = http.StatusNotFound
	return f
}

const (
	whole   = `{"name":"%s","password_hash":"","hashing_algorithm":"rabbit_password_hashing_sha256","tags":[],"limits":{}}`
	halfway = `{"name":"%s","password_hash":"","hashing_algorithm":"rabbit_password_hashing_sha256","tags":["harmonyflow-incomplete"]}`
)

func TestPreflightOfTwoUsers(t *testing.T) {
	t.Parallel()
	u, v, half := fmt.Sprintf(whole, "u"), fmt.Sprintf(whole, "v"), fmt.Sprintf(halfway, "u")
	in := func(vhost string) []string { return rights{permissions: []permission{{VHost: vhost}}}.profile() }
	var many []string
	for i := range 2000 {
		many = append(many, fmt.Sprintf(`{"vhost":"vhost-%d"}`, i))
	}
	for name, c := range map[string]struct {
		u, v          string
		user          kind.User
		problem, note string
		spoil         func(*fake)
	}{
		"alike":                      {u: u, v: v, user: kind.User{Like: "v"}},
		"to be created like another": {v: v, user: kind.User{Like: "v"}, note: "will be created like v"},
		"found halfway":              {u: half, v: v, user: kind.User{Like: "v"}, note: "will be created like v"},
		"to be created again":        {user: kind.User{Profile: in("/")}, note: "what is remembered"},
		"halfway, and nobody's":      {u: half, user: kind.User{}, problem: "halfway"},
		"neither exists":             {user: kind.User{Like: "v"}, problem: "nor does v"},
		"neither, but it is known":   {user: kind.User{Like: "v", Profile: in("/")}, note: "will be created"},
		"the other does not exist":   {u: u, user: kind.User{Like: "v"}, note: "not compared"},
		"a vhost that is gone":       {user: kind.User{Profile: in("gone")}, problem: "vhost gone"},
		"a profile of another time":  {user: kind.User{Profile: []string{"colour blue"}}, problem: "not understood"},
		"nothing to log in to":       {user: kind.User{Profile: []string{`tag "x"`}}, problem: "nothing can log in"},
		"too much": {u: u, v: v, user: kind.User{Like: "v"}, problem: "more than 48 KiB", spoil: func(f *fake) {
			f.answers["GET users/u/permissions"] = "[" + strings.Join(many, ",") + "]"
		}},
		"too much to be copied": {v: v, user: kind.User{Like: "v"}, problem: "more than 48 KiB", spoil: func(f *fake) {
			f.answers["GET users/v/permissions"] = "[" + strings.Join(many, ",") + "]"
		}},
		"too much to be remembered": {u: u, user: kind.User{}, note: "not be created again", spoil: func(f *fake) {
			f.answers["GET users/u/permissions"] = "[" + strings.Join(many, ",") + "]"
		}},
	} {
		f := pairOf(c.u, c.v)
		if c.spoil != nil {
			c.spoil(f)
		}
		c.user.Username = "u"
		found := open(f.entry(t)).Preflight(t.Context(), []kind.User{c.user})[0]
		require.NoError(t, found.Err, name)
		require.Equal(t, c.problem != "", len(found.Problems) > 0, "%s: %q", name, found.Problems)
		require.Contains(t, fmt.Sprint(found.Problems), c.problem, name)
		require.Contains(t, fmt.Sprint(found.Notes), c.note, name)
		require.Zero(t, f.puts.Load())
	}
}

func TestRightsThatAreNotKept(t *testing.T) {
	t.Parallel()
	f := pairOf(fmt.Sprintf(whole, "u"), "")
	ch := kind.Change{User: kind.User{Username: "u", Profile: rights{permissions: []permission{{VHost: "other"}}}.profile()}, Align: true}
	out := open(f.entry(t)).Change(t.Context(), []kind.Change{ch})[0]
	require.ErrorContains(t, out.Nodes[0].Err, "shows other tags")
	require.False(t, kind.IsDefinite(out.Nodes[0].Err))

	f.status["PUT permissions/other/u"] = http.StatusBadRequest
	out = open(f.entry(t)).Change(t.Context(), []kind.Change{ch})[0]
	require.ErrorContains(t, out.Nodes[0].Err, "give user u its permission in vhost other")
	require.True(t, kind.IsDefinite(out.Nodes[0].Err))
	require.Empty(t, out.Notes)

	f.answers["GET users/u"] = fmt.Sprintf(halfway, "u")
	puts := f.puts.Load()
	ch.Exclusive, ch.Profile = true, nil
	require.NoError(t, open(f.entry(t)).Change(t.Context(), []kind.Change{ch})[0].Nodes[0].Err, "it has no password")
	require.Equal(t, puts, f.puts.Load())
}
