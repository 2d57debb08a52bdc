package rotation

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

var rewrite = flag.Bool("rewrite", false, "write what the traces show now to testdata")

// TestTraces replays testdata/*.txt: a command, a line of dashes, and what is
// stored and what the target hears because of it. A reviewer reads behaviour
// there; `go test ./backend/rotation -run Traces -rewrite` writes it anew.
//
// The commands:
//
//	world strategy=overlap|swap|targetless nodes=2 [partial]   first of all
//	world strategy=kept [shows]                                the same for a secret that another server keeps
//	seed                        role a, version 1 accepted everywhere
//	create [initial=old]        create role a; with initial, its user has that password
//	rotate | rollback | retire | reconcile | cancel
//	until apply|grace|back|end  let time pass until role a is there
//	fault target|storage n what at the n-th operation from now
//	down n2 | up n2             a node
//	crash                       the engine dies, another one starts
//	wait 30s
//	show                        what is stored, and what each node accepts
func TestTraces(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			raw, err := os.ReadFile(file)
			require.NoError(t, err)
			var got string
			synctest.Test(t, func(t *testing.T) { got = replay(t, string(raw)) })
			if *rewrite {
				require.NoError(t, os.WriteFile(file, []byte(got), 0o600))
				return
			}
			require.Equal(t, string(raw), got)
		})
	}
}

// replay runs the commands of a trace file and returns it with what they show.
func replay(t *testing.T, text string) string {
	t.Helper()
	p := &player{t: t}
	defer func() {
		if p.w != nil {
			p.w.close()
		}
	}()
	var out strings.Builder
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		if line == "" || strings.HasPrefix(line, "#") {
			fmt.Fprintln(&out, line)
			continue
		}
		fmt.Fprintf(&out, "%s\n----\n%s", line, p.play(strings.Fields(line)))
		for i+1 < len(lines) && lines[i+1] != "" { // what was shown before
			i++
		}
	}
	return out.String()
}

type player struct {
	t    *testing.T
	w    *world
	id   string
	seen int
}

func (p *player) play(words []string) string {
	w := p.w
	switch words[0] {
	case "world":
		w = newWorld(p.t, shapeOf(p.t, words[1:]), plan{name: p.t.Name()})
		p.w = w
		w.run()
		w.pass(time.Second)
	case "seed":
		w.seed("a", nil)
	case "create":
		p.create(words[1:])
	case "rotate":
		p.id = w.rotate("a")
	case "rollback":
		w.rollBack("a")
	case "retire":
		w.retire("a")
	case "reconcile":
		w.reconcile("a")
	case "cancel":
		w.cancel(p.id)
	case "until":
		p.until(words[1])
	case "fault":
		p.fault(words[1:])
	case "down", "up":
		w.setDown(words[1], words[0] == "down")
	case "crash":
		w.restart()
	case "wait":
		d, err := time.ParseDuration(words[1])
		require.NoError(p.t, err)
		w.pass(d)
	case "show":
		return p.show()
	default:
		p.t.Fatalf("no such command: %s", words[0])
	}
	synctest.Wait()
	return p.news()
}

func shapeOf(t *testing.T, words []string) shape {
	t.Helper()
	s := shape{nodes: 2}
	for _, word := range words {
		key, value, _ := strings.Cut(word, "=")
		switch key {
		case "strategy":
			s.strategy, s.targetless = kind.Strategy(value), value == "targetless"
			if s.targetless {
				s.strategy, s.nodes = kind.Overlap, 0
			}
			if s.keeper = s.strategy == kind.Kept; s.keeper {
				s.nodes = 0
			}
		case "nodes":
			_, err := fmt.Sscan(value, &s.nodes)
			require.NoError(t, err)
		case "partial":
			s.partial = true
		case "shows":
			s.shows = true
		default:
			t.Fatalf("no such field of a world: %s", word)
		}
	}
	return s
}

func (p *player) create(words []string) {
	var initial *kind.Material
	for _, word := range words {
		_, secret, _ := strings.Cut(word, "=")
		initial = material("a", secret)
		p.w.tamper(p.w.order[0], "u-a", *initial)
		for _, n := range p.w.order {
			p.w.tamper(n, "u-a", *initial)
		}
	}
	e := p.w.instance().engine
	_, err := e.Create(p.t.Context(), Creation{Role: p.w.newRole("a"), Initial: initial, Target: "target"})
	p.w.logf("create: %s", answer(err))
}

func (p *player) until(what string) {
	p.w.until(what, 24*time.Hour, func() bool {
		r := p.w.roles["a"]
		if r == nil || r.Run == nil {
			return true
		}
		switch what {
		case "end":
			return false
		case "back":
			return r.Run.Back
		}
		return string(r.Run.Phase) == what
	})
}

func (p *player) fault(words []string) {
	var n int
	_, err := fmt.Sscan(words[1], &n)
	require.NoError(p.t, err)
	if words[0] == "storage" {
		p.w.nextWrite(n, fault(words[2]))
		return
	}
	p.w.nextCall(n, fault(words[2]))
}

func (p *player) show() string {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	var out strings.Builder
	if r := p.w.roles["a"]; r != nil {
		fmt.Fprintf(&out, "role a: %s\n", describe(r))
	} else {
		out.WriteString("no role a\n")
	}
	if p.w.shape.keeper {
		h := p.w.keeper.of("a")
		fmt.Fprintf(&out, "its server has made version %d; decrypts from version %d\n", h.newest, h.oldest)
	}
	for _, n := range p.w.order {
		state := ""
		if p.w.nodes[n].down {
			state = " (down)"
		}
		fmt.Fprintf(&out, "%s accepts %s%s\n", n, secrets(p.w.nodes[n].accepts["u-a"]), state)
	}
	return out.String()
}

// news is what has happened since the last command. Times are left out: pauses
// between tries are random.
// news is what happened since it was asked last, and then what the user was
// answered: the worker does not wait for that, nor that for the worker.
func (p *player) news() string {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	var out, answers strings.Builder
	for _, line := range p.w.trace[p.seen:] {
		into := &out
		if answered.MatchString(line[12:]) {
			into = &answers
		}
		fmt.Fprintln(into, line[12:])
	}
	p.seen = len(p.w.trace)
	return out.String() + answers.String()
}

var answered = regexp.MustCompile(`^(create|rotate|rollback|retire|reconcile|cancel|abandon|delete): `)
