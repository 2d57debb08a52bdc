package rotation

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

var (
	movesOfModels = regexp.MustCompile(`\bmove\(([^()]*)\)`)
	rowsOfModels  = regexp.MustCompile(`\bROW\(row_(\w+)\)`)
)

// TestModelsTakeEveryRow: docs/model moves by the rows of the transition tables, by all
// of them, and by no other. That a row is taken as it says, and can be, is what the
// model checker shows.
func TestModelsTakeEveryRow(t *testing.T) {
	files, err := filepath.Glob("../../docs/model/*.pml")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	taken := map[string]string{}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, row := range rowsTaken(filepath.Base(file), string(raw)) {
			taken[row] = filepath.Base(file)
		}
	}
	for _, m := range Machines() {
		for _, l := range m.Legs {
			row := m.Row(l)
			require.Contains(t, taken, row, "no model takes this row of the code")
			delete(taken, row)
		}
	}
	require.Empty(t, taken, "the code has no such rows")
}

// rowsTaken are those that a model names. The first word of a move is its table; where
// that is T it is either of two, by the kind of secret, and units are of one table.
func rowsTaken(file, text string) (rows []string) {
	for _, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(strings.TrimSpace(line), "#define move") {
			continue
		}
		if strings.HasPrefix(line, "#define turn(p)") || strings.HasPrefix(line, "#define unswap(p)") { // used for each phase that can be taken back
			continue
		}
		for _, m := range movesOfModels.FindAllStringSubmatch(line, -1) {
			row := strings.ReplaceAll(m[1], ", ", "_")
			switch {
			case file == "units.pml":
				rows = append(rows, "rotate_"+row)
			case strings.HasPrefix(row, "T_"):
				rows = append(rows, "ring"+row[1:], "rotate"+row[1:])
			default:
				rows = append(rows, row)
			}
		}
		for _, m := range rowsOfModels.FindAllStringSubmatch(line, -1) {
			rows = append(rows, m[1])
		}
	}
	for _, m := range regexp.MustCompile(`-> turn\((\w+)\)`).FindAllStringSubmatch(text, -1) {
		rows = append(rows, "rotate_"+m[1]+"_recall_publish_back")
	}
	for _, m := range regexp.MustCompile(`-> unswap\((\w+)\)`).FindAllStringSubmatch(text, -1) {
		rows = append(rows, "swapback_"+m[1]+"_recall_apply_back")
	}
	return rows
}

// checkMoves: what is stored of a run comes from what was, by rows of its tables.
func (w *world) checkMoves(before, r *Role) {
	if before == nil || before.Run == nil || r.Run == nil || before.Run.Rotation != r.Run.Rotation {
		return
	}
	at := func(run *Run) string { return stage(run.Phase, run.Back, run.Retired, run.Ahead) }
	legs := append(append([]leg{}, before.legs()...), r.legs()...)
	known := map[string]bool{at(before.Run): true}
	for grows := true; grows; {
		grows = false
		for _, l := range legs {
			if known[l.stageFrom()] && l.End == "" && !known[l.stageTo()] {
				known[l.stageTo()], grows = true, true
			}
		}
	}
	if !known[at(r.Run)] {
		w.violateLocked("no row leads role %s from %s to %s", r.Name, at(before.Run), at(r.Run))
	}
}

// unsynced has a consumer not come to what is published; "" has all come to it.
func (w *world) unsynced(consumer string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.clusters.unsynced = consumer
}

// A swap role that is taken back serves what its server knows for as long as that
// cannot be told anything else.
func TestSwapGoesBackAtItsServerFirst(t *testing.T) {
	s := shape{name: "consumed swap", strategy: kind.Swap, nodes: 1, consumers: true}
	inWorld(t, s, nil, func(t *testing.T, w *world) {
		w.crashing("m1")
		w.unsynced(w.role("a").Consumers[0])
		w.rotate("a")
		w.phase("a", Sync)
		w.setDown("n1", true)
		w.unsynced("")
		w.until("it tries to go back", time.Hour, func() bool {
			run := w.roles["a"].Run
			return run == nil || run.Back && run.Tries > 1
		})
		r := w.role("a")
		require.Equal(t, "m1", r.With(version.Current).Material.Secret, "its server knows nothing else")
		ttl, ok := r.TTL(time.Now())
		require.True(t, ok)
		require.Zero(t, ttl)
		w.setDown("n1", false)
		w.idle("a")
		r = w.role("a")
		require.Equal(t, "m0-a", r.With(version.Current).Material.Secret)
		require.Equal(t, RolledBack, r.LastRun.State)
		require.True(t, w.accepts("n1", "u-a", "m0-a"))
		require.False(t, w.accepts("n1", "u-a", "m1"))
		w.finish()
	})
}

// A key counts for as long as what was signed with it lives, and consumers sign with it
// until they were seen to have another one, however long that takes.
func TestKeysCountFromTheProof(t *testing.T) {
	s := shape{name: "consumed ring", strategy: kind.KeyRing, targetless: true, document: true, tokens: 20 * time.Minute, consumers: true}
	left := func(t *testing.T, w *world, secret string) time.Duration {
		moved := time.Now()
		w.until("the end of "+secret, 5*time.Hour, func() bool {
			r := w.roles["a"]
			return r.Run == nil && r.With(version.Previous) == nil
		})
		return time.Since(moved)
	}
	t.Run("forward", func(t *testing.T) {
		inWorld(t, s, nil, func(t *testing.T, w *world) {
			w.rotate("a")
			w.phase("a", Check) // of the next key
			w.unsynced(w.role("a").Consumers[0])
			w.until("it is promoted", time.Hour, func() bool {
				run := w.roles["a"].Run
				return run == nil || run.Promoted
			})
			w.pass(4 * time.Minute) // longer than they are said to take, and not past their deadline
			w.unsynced("")
			w.phase("a", Grace)
			require.GreaterOrEqual(t, left(t, w, "m0-a"), s.tokens)
			w.finish()
		})
	})
	t.Run("back", func(t *testing.T) {
		inWorld(t, s, nil, func(t *testing.T, w *world) {
			w.rotate("a")
			w.phase("a", Grace)
			w.unsynced(w.role("a").Consumers[0])
			w.rollBack("a")
			w.pass(2 * time.Hour)
			w.unsynced("")
			w.idle("a")
			require.Equal(t, RolledBack, w.role("a").LastRun.State)
			require.GreaterOrEqual(t, left(t, w, "m1"), s.tokens)
			w.finish()
		})
	})
}

// A rotation that somebody has to decide about has not ended.
func TestHeldIsNoOutcome(t *testing.T) {
	for _, other := range States {
		if got := Summarize([]Part{{State: Held}, {State: other}}); got.Ended() {
			t.Errorf("held and %s is %s", other, got)
		}
	}
}

// TestStatesHaveMeanings: docs/state-machine.md says when each of them is.
func TestStatesHaveMeanings(t *testing.T) {
	for _, s := range States {
		require.NotEmpty(t, s.Meaning(), s)
	}
}
