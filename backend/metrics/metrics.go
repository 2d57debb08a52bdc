// Package metrics is what a monitoring system reads of a mount, in the text format of
// Prometheus. Whatever the number of roles, there are few series: by kind, and by
// role only for those that need somebody, at most maxProblems of them.
package metrics

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/buildinfo"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// maxProblems bounds the series that name roles.
const maxProblems = 100

// ContentType is that of Text.
var ContentType = string(expfmt.NewFormat(expfmt.TypeTextPlain))

// Metrics counts what happens on this node since the plugin started.
type Metrics struct {
	registry  *prometheus.Registry
	rotations *prometheus.CounterVec
	took      *prometheus.HistogramVec
	phases    *prometheus.HistogramVec
	calls     *prometheus.HistogramVec
	sent      *prometheus.CounterVec
}

// New counts from nothing.
func New() *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		rotations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "harmonyflow_rotations_total", Help: "Parts of roles in rotations that have ended since the plugin started, by how.",
		}, []string{"kind", "trigger", "outcome"}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "harmonyflow_rotation_duration_seconds", Help: "From the start of a rotation to its end, the grace period included.",
			Buckets: []float64{1, 10, 60, 300, 900, 3600, 4 * 3600, 24 * 3600},
		}, []string{"kind"}),
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "harmonyflow_phase_duration_seconds", Help: "How long phases took, of rotations that have ended.",
			Buckets: []float64{.01, .1, 1, 10, 60, 300, 3600, 24 * 3600},
		}, []string{"kind", "phase"}),
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "harmonyflow_target_call_duration_seconds", Help: "How long targets took to answer, by kind of what was asked.",
			Buckets: []float64{.001, .01, .1, .5, 1, 5, 10, 30},
		}, []string{"kind", "call"}),
	}
	m.sent = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "harmonyflow_notifications_sent_total", Help: "Tries to send an event to a receiver, by whether it was taken.",
	}, []string{"notification", "outcome"})
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "harmonyflow_build_info", Help: "Always 1; the version of the plugin is a label.",
		ConstLabels: prometheus.Labels{"version": buildinfo.Version},
	})
	build.Set(1)
	m.registry.MustRegister(m.rotations, m.took, m.phases, m.calls, m.sent, build)
	return m
}

// Ended counts, for rotation.Recorder.
func (m *Metrics) Ended(o rotation.Ended) {
	m.rotations.WithLabelValues(o.Kind, string(o.Trigger), string(o.State)).Inc()
	m.took.WithLabelValues(o.Kind).Observe(o.Took.Seconds())
	for phase, took := range o.Phases {
		m.phases.WithLabelValues(o.Kind, string(phase)).Observe(took.Seconds())
	}
}

// Asked measures, for rotation.Recorder.
func (m *Metrics) Asked(kind, call string, took time.Duration) {
	m.calls.WithLabelValues(kind, call).Observe(took.Seconds())
}

// Sent counts a try to send an event.
func (m *Metrics) Sent(to string, err error) {
	outcome := "taken"
	if err != nil {
		outcome = "failed"
	}
	m.sent.WithLabelValues(to, outcome).Inc()
}

// Look is how the mount stands at one moment.
type Look struct {
	At     time.Time
	Load   rotation.Load
	Frozen bool
	Unsent int // deliveries of notifications that are outstanding
	// Each calls f with where each role stands. Where it fails there is nothing about
	// roles but that they are not counted.
	Each func(f func(name string, s rotation.Standing)) error
}

// Text is all of it, in the text format.
func (m *Metrics) Text(l Look) ([]byte, error) {
	now := prometheus.NewPedanticRegistry()
	if err := now.Register(moment(l)); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	families, err := prometheus.Gatherers{m.registry, now}.Gather()
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	var out bytes.Buffer
	enc := expfmt.NewEncoder(&out, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, f := range families {
		if err := enc.Encode(f); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return out.Bytes(), nil
}

// moment collects a Look.
type moment Look

func gauge(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("harmonyflow_"+name, help, labels, nil)
}

var (
	workers      = gauge("workers", "How many workers there may be.")
	workersBusy  = gauge("workers_busy", "Workers at work.")
	workersSlow  = gauge("workers_slow", "Workers at targets that did not answer in time before; at most half of all.")
	rolesWaiting = gauge("roles_waiting_for_worker", "Roles that could go on and wait for a worker.")
	frozen       = gauge("frozen", "1 while new rotations are stopped.")
	counted      = gauge("roles_counted", "1 when every role is in the figures about roles; 0 while they are read after a start.")
	unsent       = gauge("notifications_pending", "Events that a receiver has not taken yet.")
	roles        = gauge("roles", "Roles.", "kind")
	standing     = gauge("roles_standing", "Roles that are running, due, overdue (by more than an hour), failed, drifted or suspended; one may be several.", "kind", "standing")
	oldest       = gauge("oldest_secret_timestamp_seconds", "When the oldest of the secrets that are served was made, in seconds since 1970.", "kind")
	nextRotation = gauge("next_rotation_timestamp_seconds", "When the next scheduled rotation is, in seconds since 1970.", "kind")
	problem      = gauge("role_problem", "1 for a role that failed, is overdue, drifted or unreadable; at most 100.", "kind", "role", "problem")
	problemsMore = gauge("role_problems_left_out", "Problems that are not among the 100.")
	allOfLook    = []*prometheus.Desc{workers, workersBusy, workersSlow, rolesWaiting, frozen, unsent, counted, roles, standing, oldest, nextRotation, problem, problemsMore}
)

// Describe implements prometheus.Collector.
func (moment) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range allOfLook {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (l moment) Collect(ch chan<- prometheus.Metric) {
	set := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	set(workers, float64(l.Load.Workers))
	set(workersBusy, float64(l.Load.Busy))
	set(workersSlow, float64(l.Load.Slow))
	set(rolesWaiting, float64(l.Load.Waiting))
	set(frozen, float(l.Frozen))
	set(unsent, float64(l.Unsent))
	t, err := count(Look(l))
	set(counted, float(err == nil))
	if err != nil {
		return
	}
	for kind, k := range t.kinds {
		set(roles, float64(k.roles), kind)
		for _, name := range standings {
			set(standing, float64(k.standing[name]), kind, name)
		}
		if !k.oldest.IsZero() {
			set(oldest, seconds(k.oldest), kind)
		}
		if !k.next.IsZero() {
			set(nextRotation, seconds(k.next), kind)
		}
	}
	slices.SortFunc(t.troubles, func(a, b trouble) int {
		return cmp.Or(cmp.Compare(a.role, b.role), cmp.Compare(a.what, b.what))
	})
	for _, p := range t.troubles[:min(maxProblems, len(t.troubles))] {
		set(problem, 1, p.kind, p.role, p.what)
	}
	set(problemsMore, float64(max(0, len(t.troubles)-maxProblems)))
}

func float(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func seconds(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }
