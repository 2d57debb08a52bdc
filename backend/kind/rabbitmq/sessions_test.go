package rabbitmq

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// connected answers for a user u with one connection, which a broker says this of.
func connected(about string) *fake {
	f := healthy()
	f.answers["GET nodes"] = `[{"name":"rabbit@a","running":true}]`
	f.answers["GET connections/username/u"] = `[{"name":"one -> two","user":"u","vhost":"/","node":"rabbit@a"}]`
	f.answers["GET connections/one%20-%3E%20two"] = about
	if about == "" {
		f.status["GET connections/one%20-%3E%20two"] = http.StatusNotFound
	}
	return f
}

func TestSessions(t *testing.T) {
	t.Parallel()
	noon := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	const full = `{"name":"one -> two","node":"rabbit@a","peer_host":"192.0.2.1","connected_at":%d,%s"client_properties":{"product":"Client"}}`
	for name, c := range map[string]struct {
		about  string
		spoil  func(*fake)
		found  []kind.Session
		says   string // why not all is known
		closed int
	}{
		"before": {
			about:  fmt.Sprintf(full, noon.Add(-time.Millisecond).UnixMilli(), `"user_provided_name":"orders",`),
			found:  []kind.Session{{Node: "rabbit@a", Client: "192.0.2.1", Name: "orders", Opened: noon.Add(-time.Millisecond)}},
			closed: 1,
		},
		"without a name": {
			about:  fmt.Sprintf(full, 0+1, ""),
			found:  []kind.Session{{Node: "rabbit@a", Client: "192.0.2.1", Name: "Client", Opened: time.UnixMilli(1)}},
			closed: 1,
		},
		"afterwards":       {about: fmt.Sprintf(full, noon.UnixMilli(), "")},
		"no statistics":    {about: `{"name":"one -> two"}`, says: "disable_metrics_collector"},
		"statistics later": {says: "collect_statistics_interval"},
		"another answer":   {about: "<html>", says: "is no management API"},
		"not permitted": {
			spoil: func(f *fake) { f.status["GET connections/username/u"] = http.StatusUnauthorized }, says: "right password",
		},
		"an old broker": {
			spoil: func(f *fake) { f.status["GET connections/username/u"] = http.StatusNotFound }, says: "update RabbitMQ",
		},
		"half a cluster": {spoil: func(f *fake) {
			f.answers["GET nodes"] = `[{"name":"rabbit@a","running":true,"partitions":["rabbit@b"]}]`
		}, says: "come apart"},
		"a broker that is down": {
			about:  fmt.Sprintf(full, 1, ""),
			spoil:  func(f *fake) { f.answers["GET nodes"] = healthy().answers["GET nodes"] },
			found:  []kind.Session{{Node: "rabbit@a", Client: "192.0.2.1", Name: "Client", Opened: time.UnixMilli(1)}},
			closed: 1, says: "rabbit@b does not run",
		},
	} {
		f := connected(c.about)
		if c.spoil != nil {
			c.spoil(f)
		}
		target := open(f.entry(t))
		ctx, cancel := context.WithTimeout(t.Context(), 1200*time.Millisecond)
		u := kind.User{Username: "u"}
		a := target.(kind.Observer).Sessions(ctx, []kind.SessionsQuestion{{User: u, Before: noon}})[0]
		cancel()
		require.Len(t, a.Sessions, len(c.found), name)
		for i, s := range a.Sessions {
			require.True(t, s.Opened.Equal(c.found[i].Opened), name)
			s.Opened = c.found[i].Opened
			require.Equal(t, c.found[i], s, name)
		}
		ctx, cancel = context.WithTimeout(t.Context(), 1200*time.Millisecond)
		out := target.Change(ctx, []kind.Change{{User: u, Exclusive: true, CloseBefore: noon}})[0]
		cancel()
		require.NoError(t, out.Err, name)
		require.NoError(t, out.Nodes[0].Err, name)
		require.Equal(t, c.closed, int(f.ends.Load()), name)
		if c.says == "" {
			require.NoError(t, a.Err, name)
			require.Len(t, out.Notes, c.closed, name)
			continue
		}
		require.ErrorContains(t, a.Err, c.says, name)
		require.False(t, kind.IsDefinite(a.Err), name)
		require.Len(t, out.Notes, 1+c.closed, name)
		require.Contains(t, out.Notes[c.closed], c.says, name)
	}
}

func TestConnectionThatCannotBeClosed(t *testing.T) {
	t.Parallel()
	f := connected(`{"name":"one -> two","node":"rabbit@a","connected_at":1}`)
	target := open(f.entry(t))
	closing := []kind.Change{{User: kind.User{Username: "u"}, Exclusive: true, CloseBefore: time.Now()}}
	for status, says := range map[int]string{
		http.StatusInternalServerError: "cannot close a connection", http.StatusNotFound: "",
	} {
		f.status["DELETE connections/one%20-%3E%20two"] = status
		out := target.Change(t.Context(), closing)[0]
		require.NoError(t, out.Nodes[0].Err)
		require.Contains(t, fmt.Sprint(out.Notes), says)
		require.NotContains(t, fmt.Sprint(out.Notes), "that were closed")
	}
	f.answers["GET users/u"] = `{"name":"v"}` // a change that fails closes nothing
	before := f.ends.Load()
	require.Error(t, target.Change(t.Context(), closing)[0].Nodes[0].Err)
	require.Equal(t, before, f.ends.Load())
}

// Nothing begins that would not be heard of.
func TestNothingBeginsAtTheEnd(t *testing.T) {
	t.Parallel()
	f := healthy()
	e := f.entry(t)
	f.status["GET users/v"] = http.StatusNotFound
	ctx, cancel := context.WithTimeout(t.Context(), reserve-time.Millisecond)
	defer cancel()
	create := kind.Change{User: kind.User{Username: "v", Profile: []string{`tag "x"`}}, Accept: changeU[0].Accept}
	for _, out := range open(e).Change(ctx, []kind.Change{changeU[0], create}) {
		err := out.Err
		if err == nil {
			err = out.Nodes[0].Err
		}
		require.Error(t, err)
		require.False(t, kind.IsDefinite(err), "%v", err)
	}
	require.Zero(t, f.puts.Load())
}
