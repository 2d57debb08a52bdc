// Package seen is what was seen at a consumer of secrets: of each ExternalSecret,
// Secret, workload, pod and check, with names and times, and never with values or
// anything made of them. Whoever looks fills it, and whoever keeps or shows it needs
// no more. It imports nothing of the engine.
package seen

import (
	"encoding/json"
	"slices"
	"time"
)

// Consumer is one look at a consumer.
type Consumer struct {
	Connection string    `json:"connection"`
	Namespace  string    `json:"namespace"`
	Mode       string    `json:"mode,omitempty"`
	At         time.Time `json:"at,omitzero"`
	// Done: everything that was looked for was seen. Error is why not.
	Done  bool   `json:"done,omitempty"`
	Error string `json:"error,omitempty"`
	// Changed is when the Secrets last got other values.
	Changed time.Time `json:"changed,omitzero"`

	Stores    []Store    `json:"stores,omitempty"`
	Externals []External `json:"externals,omitempty"`
	Values    []Value    `json:"values,omitempty"`
	Workloads []Workload `json:"workloads,omitempty"`
	Checks    []Check    `json:"checks,omitempty"`
	Hooks     []Hook     `json:"hooks,omitempty"`
	Pods      []Pod      `json:"pods,omitempty"`
	// PodsApart: the pods that are kept stand in an entry of their own.
	PodsApart bool `json:"pods_apart,omitempty"`

	// Counted are all of them, and More those that are not kept.
	Counted Counts `json:"counted,omitzero"`
	More    Counts `json:"more,omitzero"`
}

// Counts are numbers of what was looked at. Well are those that are as they should.
type Counts struct {
	Externals     int `json:"e,omitempty"`
	Values        int `json:"v,omitempty"`
	Workloads     int `json:"w,omitempty"`
	WellWorkloads int `json:"ww,omitempty"`
	Pods          int `json:"p,omitempty"`
	WellPods      int `json:"wp,omitempty"`
	Restarts      int `json:"x,omitempty"` // of containers of the pods
}

// Store is where an ExternalSecret is read from.
type Store struct {
	Kind  string `json:"kind"`
	Name  string `json:"name"`
	Ready bool   `json:"ready,omitempty"`
	// Problem is what is wrong with it, or why that is not known.
	Problem string `json:"problem,omitempty"`
}

// External is an ExternalSecret.
type External struct {
	Name   string `json:"name"`
	Parent string `json:"parent,omitempty"` // the ClusterExternalSecret it was made from
	Target string `json:"target,omitempty"` // the Secret it writes
	Ready  bool   `json:"ready,omitempty"`
	// Forced is when it was told to sync, Refreshed when it last was, and Version what
	// External Secrets says it has synced.
	Forced    time.Time `json:"forced,omitzero"`
	Refreshed time.Time `json:"refreshed,omitzero"`
	Version   string    `json:"version,omitempty"`
	Interval  string    `json:"interval,omitempty"`
	Problem   string    `json:"problem,omitempty"`
}

// Value is one value that a role serves, and where it stands: in which keys of which
// Secret. Old: it is one that the role no longer serves, and should stand nowhere.
type Value struct {
	Role   string   `json:"role"`
	Field  string   `json:"field,omitempty"`
	Secret string   `json:"secret,omitempty"`
	Keys   []string `json:"keys,omitempty"`
	Held   bool     `json:"held,omitempty"`
	Old    bool     `json:"old,omitempty"`
	// Problem says what stands there instead, in words.
	Problem string `json:"problem,omitempty"`
}

// Good reports whether it is as it should.
func (v Value) Good() bool { return v.Held != v.Old }

// Workload is a Deployment, StatefulSet or DaemonSet.
type Workload struct {
	Kind       string    `json:"k"`
	Name       string    `json:"n"`
	Wave       int       `json:"wave,omitempty"`
	Restarted  time.Time `json:"restarted,omitzero"`
	Generation int64     `json:"gen,omitempty"`
	Revision   string    `json:"rev,omitempty"`
	Replicas   int       `json:"want"`
	New        int       `json:"new,omitempty"`   // pods that run with what is served
	Ready      int       `json:"ready,omitempty"` // of those, the ready ones
	// Complete is when the last of its pods became ready.
	Complete time.Time `json:"complete,omitzero"`
	// Unknown: whether its pods run with what is served cannot be told.
	Unknown bool   `json:"unknown,omitempty"`
	Problem string `json:"problem,omitempty"`
}

// Label is how it is named.
func (w Workload) Label() string { return w.Kind + "/" + w.Name }

// Pod is one pod of a workload.
type Pod struct {
	Workload string    `json:"w"`
	Name     string    `json:"n"`
	Node     string    `json:"o,omitempty"`
	Created  time.Time `json:"c,omitzero"`
	Ready    time.Time `json:"r,omitzero"`
	Restarts int       `json:"x,omitempty"`
	Image    string    `json:"i,omitempty"` // the beginning of its id
	New      bool      `json:"new,omitempty"`
	Problem  string    `json:"p,omitempty"`
}

// Check is one check of the consumer.
type Check struct {
	Number int    `json:"number"`
	Type   string `json:"type"`
	Target string `json:"target,omitempty"`
	// Ran: it was made. Passed and Result say what came of it; Tries is how often it
	// was made in this look, and InRow how often it passed in a row, of Times.
	Ran    bool   `json:"ran,omitempty"`
	Passed bool   `json:"passed,omitempty"`
	Result string `json:"result,omitempty"`
	Tries  int    `json:"tries,omitempty"`
	InRow  int    `json:"in_row,omitempty"`
	Times  int    `json:"times,omitempty"`
}

// Hook is a request that an emergency sends.
type Hook struct {
	Name   string `json:"name"`
	Target string `json:"target,omitempty"`
	// Called is how often it was sent, OK whether it has succeeded, and Result what came
	// of the last time.
	Called int       `json:"called,omitempty"`
	OK     bool      `json:"ok,omitempty"`
	Result string    `json:"result,omitempty"`
	At     time.Time `json:"at,omitzero"`
}

// Map puts f of it in the place of every text: most of them are somebody else's.
func (c *Consumer) Map(f func(string) string) {
	each := func(texts ...*string) {
		for _, t := range texts {
			if *t != "" {
				*t = f(*t)
			}
		}
	}
	each(&c.Connection, &c.Namespace, &c.Mode, &c.Error)
	for i := range c.Stores {
		s := &c.Stores[i]
		each(&s.Kind, &s.Name, &s.Problem)
	}
	for i := range c.Externals {
		e := &c.Externals[i]
		each(&e.Name, &e.Parent, &e.Target, &e.Version, &e.Interval, &e.Problem)
	}
	for i := range c.Values {
		v := &c.Values[i]
		each(&v.Role, &v.Field, &v.Secret, &v.Problem)
		for k := range v.Keys {
			each(&v.Keys[k])
		}
	}
	for i := range c.Workloads {
		w := &c.Workloads[i]
		each(&w.Kind, &w.Name, &w.Revision, &w.Problem)
	}
	for i := range c.Checks {
		k := &c.Checks[i]
		each(&k.Type, &k.Target, &k.Result)
	}
	for i := range c.Hooks {
		h := &c.Hooks[i]
		each(&h.Name, &h.Target, &h.Result)
	}
	for i := range c.Pods {
		p := &c.Pods[i]
		each(&p.Workload, &p.Name, &p.Node, &p.Image, &p.Problem)
	}
}

// Count fills Counted.
func (c *Consumer) Count() {
	c.Counted = Counts{Externals: len(c.Externals), Values: len(c.Values), Workloads: len(c.Workloads), Pods: len(c.Pods)}
	for _, w := range c.Workloads {
		if w.Problem == "" {
			c.Counted.WellWorkloads++
		}
	}
	for _, p := range c.Pods {
		c.Counted.Restarts += p.Restarts
		if p.Problem == "" {
			c.Counted.WellPods++
		}
	}
}

// Fit leaves out what would make more than limit bytes of JSON: of each list the
// end, after what is bad was moved to its beginning. What is left out is counted.
func (c *Consumer) Fit(limit int) {
	worst(c.Externals, func(e External) bool { return e.Problem != "" })
	worst(c.Values, func(v Value) bool { return !v.Good() })
	worst(c.Workloads, func(w Workload) bool { return w.Problem != "" })
	worst(c.Pods, func(p Pod) bool { return p.Problem != "" })
	for size := c.size(); size > limit; size = c.size() {
		// Pods first: there are the most of them, and workloads say the same in short.
		switch {
		case cut(&c.Pods, &c.More.Pods), cut(&c.Workloads, &c.More.Workloads),
			cut(&c.Values, &c.More.Values), cut(&c.Externals, &c.More.Externals):
		default:
			c.Stores, c.Checks, c.Hooks = nil, nil, nil
			return
		}
	}
}

func (c *Consumer) size() int {
	raw, err := json.Marshal(c)
	if err != nil {
		return 0
	}
	return len(raw)
}

func worst[T any](list []T, bad func(T) bool) {
	rank := func(v T) int {
		if bad(v) {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(list, func(a, b T) int { return rank(a) - rank(b) })
}

// cut leaves out an eighth of a list, or its last entry.
func cut[T any](list *[]T, more *int) bool {
	n := len(*list)
	if n == 0 {
		return false
	}
	out := max(1, n/8)
	*list, *more = (*list)[:n-out], *more+out
	return true
}

// Add takes over what a later look at the same consumer has seen.
func (c *Consumer) Add(later *Consumer) {
	c.At, c.Done, c.Error, c.Mode = later.At, later.Done, later.Error, later.Mode
	c.Connection, c.Namespace = later.Connection, later.Namespace
	if !later.Changed.IsZero() {
		c.Changed = later.Changed
	}
	take(&c.Externals, later.Externals, &c.Counted.Externals, later.Counted.Externals, &c.More.Externals, later.More.Externals)
	take(&c.Values, later.Values, &c.Counted.Values, later.Counted.Values, &c.More.Values, later.More.Values)
	if later.Counted.Workloads > 0 {
		c.Counted.WellWorkloads = later.Counted.WellWorkloads
	}
	take(&c.Workloads, later.Workloads, &c.Counted.Workloads, later.Counted.Workloads, &c.More.Workloads, later.More.Workloads)
	if later.Counted.Pods > 0 {
		c.Counted.WellPods, c.Counted.Restarts = later.Counted.WellPods, later.Counted.Restarts
	}
	take(&c.Pods, later.Pods, &c.Counted.Pods, later.Counted.Pods, &c.More.Pods, later.More.Pods)
	if len(later.Checks) > 0 {
		c.Checks = later.Checks
	}
	if len(later.Hooks) > 0 {
		c.Hooks = later.Hooks
	}
}

func take[T any](list *[]T, later []T, counted *int, n int, more *int, left int) {
	if n > 0 {
		*list, *counted, *more = later, n, left
	}
}
