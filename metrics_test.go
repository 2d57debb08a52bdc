package harmonyflow

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/stretchr/testify/require"
	"sigs.k8s.io/yaml"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// scraped is what Prometheus's own parser makes of metrics.
type scraped map[string]*dto.MetricFamily

func (m *mount) scrape() scraped {
	m.Helper()
	r := m.read("metrics")
	require.Equal(m, http.StatusOK, r.code)
	require.Contains(m, r.data[logical.HTTPContentType], "text/plain; version=0.0.4")
	parser := expfmt.NewTextParser(model.LegacyValidation)
	out, err := parser.TextToMetricFamilies(strings.NewReader(string(r.data[logical.HTTPRawBody].([]byte))))
	require.NoError(m, err)
	return out
}

// of is the value of a series, its labels as k=v; -1 where there is none.
func (s scraped) of(name string, labels ...string) float64 {
	for _, metric := range s[name].GetMetric() {
		has := map[string]bool{}
		for _, l := range metric.GetLabel() {
			has[l.GetName()+"="+l.GetValue()] = true
		}
		all := true
		for _, l := range labels {
			all = all && has[l]
		}
		switch {
		case !all:
		case metric.Gauge != nil:
			return metric.GetGauge().GetValue()
		case metric.Counter != nil:
			return metric.GetCounter().GetValue()
		case metric.Histogram != nil:
			return float64(metric.GetHistogram().GetSampleCount())
		}
	}
	return -1
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(2))
	m.connect("cache", server.Addr, nil)
	m.must("config", map[string]any{"grace_period": "1h", "workers": 7})
	m.adopt("app", "cache", 0, map[string]any{"rotation_period": "24h"})
	m.must("roles/token", map[string]any{"kind": "api-key"})

	s := m.scrape()
	require.EqualValues(t, 1, s.of("harmonyflow_roles", "kind=redis"))
	require.EqualValues(t, 1, s.of("harmonyflow_roles", "kind=api-key"))
	require.EqualValues(t, 7, s.of("harmonyflow_workers"))
	require.EqualValues(t, 1, s.of("harmonyflow_roles_counted"))
	require.EqualValues(t, 0, s.of("harmonyflow_frozen"))
	require.InDelta(t, time.Now().Add(24*time.Hour).Unix(), s.of("harmonyflow_next_rotation_timestamp_seconds", "kind=redis"), 60)
	require.EqualValues(t, -1, s.of("harmonyflow_next_rotation_timestamp_seconds", "kind=api-key"))
	before := s.of("harmonyflow_oldest_secret_timestamp_seconds", "kind=redis")
	require.InDelta(t, time.Now().Unix(), before, 60)
	require.EqualValues(t, 1, s.of("harmonyflow_rotations_total", "kind=redis", "trigger=create", "outcome=completed"))

	rotated := m.must("rotate/redis/app", nil)
	s = m.scrape()
	require.EqualValues(t, 1, s.of("harmonyflow_roles_standing", "kind=redis", "standing=running"))
	m.must("retire/redis/app", nil)
	m.ended(id(rotated))
	s = m.scrape()
	require.EqualValues(t, 0, s.of("harmonyflow_roles_standing", "kind=redis", "standing=running"))
	require.EqualValues(t, 1, s.of("harmonyflow_rotations_total", "kind=redis", "trigger=manual", "outcome=completed"))
	require.Greater(t, s.of("harmonyflow_oldest_secret_timestamp_seconds", "kind=redis"), before)
	for _, phase := range []string{"preflight", "apply", "test", "grace", "retire"} {
		require.GreaterOrEqual(t, s.of("harmonyflow_phase_duration_seconds", "kind=redis", "phase="+phase), 1.0, phase)
	}
	for _, call := range []string{"preflight", "probe", "change"} {
		require.GreaterOrEqual(t, s.of("harmonyflow_target_call_duration_seconds", "kind=redis", "call="+call), 1.0, call)
	}

	// A rotation that fails is named, until one succeeds.
	server.Stop()
	m.write("rotate/redis/app", nil)
	require.Eventually(t, func() bool {
		return m.scrape().of("harmonyflow_role_problem", "kind=redis", "role=app", "problem=failed") == 1
	}, patience, 100*time.Millisecond)

	m.delete("roles/token")
	require.EqualValues(t, -1, m.scrape().of("harmonyflow_roles", "kind=api-key"))
}

// However many roles need somebody, few are named.
func TestMetricsAreBounded(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("config", map[string]any{"freeze": true}) // nothing is begun
	const roles = 250
	for i := range roles {
		r := &rotation.Role{Name: fmt.Sprintf("r%03d", i), Kind: "redis", Drift: &rotation.Drift{Reason: "why"}, Next: time.Now().Add(-2 * time.Hour)}
		require.NoError(t, m.b.engine.Store().PutRole(t.Context(), nil, r))
	}
	s := m.scrape()
	require.Len(t, s["harmonyflow_role_problem"].GetMetric(), 100)
	require.EqualValues(t, 2*roles-100, s.of("harmonyflow_role_problems_left_out"))
	require.EqualValues(t, roles, s.of("harmonyflow_roles_standing", "kind=redis", "standing=overdue"))
	body := m.read("metrics").data[logical.HTTPRawBody].([]byte)
	require.Less(t, len(body), 64<<10)
}

var metricName = regexp.MustCompile(`\bharmonyflow_[a-z_]+`)

// What is in deploy/monitoring asks for nothing that is not there.
func TestMonitoringUsesWhatThereIs(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	m.connect("cache", server.Addr, nil)
	m.must("config", map[string]any{"grace_period": "0"})
	m.adopt("app", "cache", 0, map[string]any{"rotation_period": "24h"})
	m.ended(id(m.must("rotate/redis/app", nil)))
	m.alter("app", func(r *rotation.Role) { r.Drift = &rotation.Drift{Reason: "why"} }) // not told yet: nobody has asked
	m.must("config", map[string]any{"allowed_hosts": "127.0.0.1"})
	hook := newReceiver(t, "whsec_"+strings.Repeat("a", 40))
	m.must("notifications/ops", map[string]any{"url": hook.URL, "secret": "whsec_" + strings.Repeat("a", 40)})
	m.must("notifications/ops/test", nil)
	there := m.scrape()

	exprs := map[string]string{}
	var rules struct {
		Groups []struct {
			Rules []struct {
				Alert       string            `json:"alert"`
				Expr        string            `json:"expr"`
				Labels      map[string]string `json:"labels"`
				Annotations map[string]string `json:"annotations"`
			} `json:"rules"`
		} `json:"groups"`
	}
	raw, err := os.ReadFile("deploy/monitoring/alerts.yaml")
	require.NoError(t, err)
	require.NoError(t, yaml.Unmarshal(raw, &rules))
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			exprs[r.Alert] = r.Expr
			require.NotEmpty(t, r.Labels["severity"], r.Alert)
			require.NotEmpty(t, r.Annotations["summary"], r.Alert)
			require.NotEmpty(t, r.Annotations["description"], r.Alert)
		}
	}
	require.Greater(t, len(exprs), 5)
	var board struct {
		Panels []struct {
			Title   string `json:"title"`
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
	}
	raw, err = os.ReadFile("deploy/monitoring/dashboard.json")
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(raw, &board))
	for _, p := range board.Panels {
		require.NotEmpty(t, p.Targets, p.Title)
		for i, target := range p.Targets {
			exprs[fmt.Sprint("panel ", p.Title, i)] = target.Expr
		}
	}
	used := map[string]bool{}
	for where, expr := range exprs {
		names := metricName.FindAllString(expr, -1)
		require.NotEmpty(t, names, where)
		for _, name := range names {
			base := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_sum"), "_count")
			require.True(t, there[name] != nil || there[base] != nil && there[base].GetType() == dto.MetricType_HISTOGRAM, "%s uses %s, which is not there", where, name)
			used[base] = true
		}
	}
	t.Logf("%d expressions use %d of %d metrics", len(exprs), len(used), len(there))
}
