package rotation

import (
	"slices"
	"time"
)

// Recorder is told of what people watch. It must not wait.
type Recorder interface {
	// Ended is a role's part in a rotation that has ended.
	Ended(o Ended)
	// Asked is a call to a target of a kind: one of preflight, probe and change, for any
	// number of users.
	Asked(kind, call string, took time.Duration)
	// Moved: something of a rotation is stored that people may want to know.
	Moved(id string)
}

// Ended is how a role's part in a rotation ended.
type Ended struct {
	Kind    string
	Trigger Trigger
	State   State
	Took    time.Duration
	// Phases is how long each phase on the way forward took.
	Phases map[Phase]time.Duration
}

type unrecorded struct{}

func (unrecorded) Ended(Ended)                         {}
func (unrecorded) Asked(string, string, time.Duration) {}
func (unrecorded) Moved(string)                        {}

// outcome is ev for who counts. A phase that the rotation turned round in has no
// length: what follows it in the timeline is the way back.
func (ev *Evidence) outcome() Ended {
	o := Ended{Kind: ev.Kind, Trigger: ev.Trigger, State: ev.State, Took: ev.Finished.Sub(ev.Started), Phases: map[Phase]time.Duration{}}
	var last *Moment
	for i := range ev.Timeline {
		m := &ev.Timeline[i]
		if !slices.Contains(Phases, Phase(m.What)) && m.What != string(Completed) {
			continue
		}
		if last != nil {
			o.Phases[Phase(last.What)] += m.At.Sub(last.At)
		}
		last = m
	}
	return o
}

// timed tells the recorder how long a call took that begins now.
func (g guard) timed(call string) func() {
	began := time.Now()
	return func() { g.e.o.Recorder.Asked(g.kind, call, time.Since(began)) }
}

// Load is what the engine's workers do.
type Load struct {
	Workers int // how many there may be
	Busy    int
	Slow    int // of those, at targets that did not answer in time
	Waiting int // roles that wait for one
}

// Load looks at the workers.
func (e *Engine) Load() Load {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := Load{Workers: e.Config().Workers, Busy: e.busy, Slow: e.slow}
	for _, lane := range e.queue {
		if !e.own(lane.name) {
			l.Waiting += len(lane.ready)
		}
	}
	return l
}
