package rotation

import (
	"fmt"
	"slices"
	"strings"
)

// table is a transition table, and which runs it is for.
type table struct {
	name, title, what string
	legs              []leg
	governs           func(*Role) bool
}

// tables are all of them. The last that governs a run is its: the first is for
// whatever has none of its own.
var tables = []table{
	{
		"rotate", "Overlap, alternate and swap",
		"What most rotations do. With overlap and alternate the target accepts two versions from apply to retire, so that every step before it can be taken back.",
		transitions, func(*Role) bool { return true },
	},
	{
		"swapback", "The way back of swap",
		"Where a server knows one credential and consumers have seen the new one: the server comes first, and what it knows again is served then.",
		swapBackTransitions, func(r *Role) bool { return r.Run.SwapsBack },
	},
	{
		"clear", "The way back of a secret that no server holds",
		"What failed stays shown as previous until consumers have left it.",
		clearedTransitions, func(r *Role) bool { return r.Run.Cleared },
	},
	{
		"ring", "Key rings",
		"The next key is shown to every consumer before it is used.",
		ringTransitions, (*Role).announces,
	},
	{
		"leave", "Retirement of an earlier key",
		"`retire/… version=N`, or by its age.",
		retireTransitions, func(r *Role) bool { return r.Run.Trigger == Retirement },
	},
	{
		"reconcile", "Reconcile",
		"Nothing is generated or promoted.",
		reconcileTransitions, func(r *Role) bool { return r.Run.Trigger == Reconcile },
	},
	{
		"emergency", "Emergency",
		"After a compromise: every earlier version is refused before consumers are brought the new one.",
		emergencyTransitions, func(r *Role) bool { return r.Run.urgent() },
	},
	{
		"kept", "Secrets that another server keeps",
		"It is asked for a new version, once.",
		keptTransitions, (*Role).kept,
	},
}

// legs are the transition table of the role's run.
func (r *Role) legs() []leg {
	for _, t := range slices.Backward(tables) {
		if t.governs(r) {
			return t.legs
		}
	}
	return nil
}

// Leg is a transition as people are shown it: phases on the way back, ahead and after
// retirement have names of their own.
type Leg struct {
	From, On, To string
	// End is the outcome, where there is no next phase.
	End string
}

// Machine is a transition table.
type Machine struct {
	// Name is its in docs/model.
	Name        string
	Title, What string
	Legs        []Leg
}

// Machines are all transition tables, for documentation and for docs/model.
func Machines() []Machine {
	var out []Machine
	for _, t := range tables {
		m := Machine{Name: t.name, Title: t.title, What: t.what}
		for _, l := range t.legs {
			to := ""
			if l.End == "" {
				to = l.stageTo()
			}
			m.Legs = append(m.Legs, Leg{From: l.stageFrom(), On: string(l.On), To: to, End: string(l.End)})
		}
		out = append(out, m)
	}
	return out
}

func (l leg) stageFrom() string { return stage(l.From, l.Back, l.Retired, l.Ahead) }

func (l leg) stageTo() string {
	if l.On == anew {
		return string(l.To)
	}
	return stage(l.To, l.Back || l.ToBack, l.Retired || l.ToRetired, l.ToAhead)
}

func stage(p Phase, back, retired, ahead bool) string {
	switch name := string(p); {
	case back:
		return name + "_back"
	case retired:
		return name + "_retired"
	case ahead:
		return name + "_ahead"
	default:
		return name
	}
}

// Transitions is the file that docs/model includes: a name for every phase, and for every
// row. A model that takes a row which is not here does not build.
func Transitions() string {
	var out strings.Builder
	out.WriteString("/* Made from the transition tables of backend/rotation (make docs). */\n")
	stages, rows := 0, 0
	known := map[string]bool{}
	for _, m := range Machines() {
		for _, l := range m.Legs {
			for _, s := range []string{l.From, l.To} {
				if s != "" && !known[s] {
					known[s] = true
					stages++
					fmt.Fprintf(&out, "#define at_%s %d\n", s, stages)
				}
			}
		}
	}
	for _, s := range States {
		if s.Ended() { // there is no run any more
			fmt.Fprintf(&out, "#define at_%s 0\n", s)
		}
	}
	for _, m := range Machines() {
		for _, l := range m.Legs {
			fmt.Fprintf(&out, "#define row_%s %d\n", m.Row(l), rows)
			rows++
		}
	}
	fmt.Fprintf(&out, "#define ROWS %d\n", rows)
	return out.String()
}

// Row names a row of the table.
func (m Machine) Row(l Leg) string {
	to := l.To
	if to == "" {
		to = l.End
	}
	return strings.Join([]string{m.Name, l.From, l.On, to}, "_")
}
