package redis

import (
	"context"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

var (
	clientList = command{"CLIENT", "LIST"}

	_ kind.Observer = (*target)(nil)
)

// loggedIn is one line of CLIENT LIST.
type loggedIn struct {
	id, user, addr, name, flags, command string

	age time.Duration // in whole seconds
}

func parseClients(lines string) []loggedIn {
	var out []loggedIn
	for line := range strings.Lines(lines) {
		values := map[string]string{}
		for pair := range strings.FieldsSeq(line) {
			name, value, _ := strings.Cut(pair, "=")
			values[name] = value
		}
		age, _ := strconv.Atoi(values["age"])
		out = append(out, loggedIn{
			id: values["id"], user: values["user"], addr: values["addr"], name: values["name"],
			flags: values["flags"], command: values["cmd"], age: time.Duration(age) * time.Second,
		})
	}
	return out
}

// of reports whether p is a session of user. What a node replicates over is none,
// and who asks, as the admin, is not either.
func (p loggedIn) of(user, admin string) bool {
	asks := user == admin && (p.command == "client|list" || p.command == "client")
	return p.user == user && !strings.ContainsAny(p.flags, "SM") && !asks
}

// before reports whether p may have been opened before t: its age leaves out up to a
// second, and it is better to close one session too many, which opens another, than
// to keep one of somebody who has the old password.
func (p loggedIn) before(t, now time.Time) bool {
	return now.Add(-p.age - time.Second).Before(t)
}

func (p loggedIn) session(node string, now time.Time) kind.Session {
	host, _, err := net.SplitHostPort(p.addr)
	if err != nil {
		host = ""
	}
	return kind.Session{Node: node, Client: host, Name: p.name, Opened: now.Add(-p.age)}
}

// clients lists who is connected to the node, and when that was.
func (n *node) clients(ctx context.Context) ([]loggedIn, time.Time, error) {
	now := time.Now() // before the node looks, so that nobody seems younger than he is
	r := n.s.run(ctx, []command{clientList})[0]
	if r.err != nil {
		return nil, now, n.explainClients(r.err, "CLIENT LIST", "list who is connected")
	}
	return parseClients(text(r.value)), now, nil
}

func (n *node) explainClients(err error, shown, what string) error {
	if replyCode(err) == "NOPERM" {
		return kind.Definitely("the admin user %s may not run %s at node %s: grant it with ACL SETUSER %s +client|list +client|kill", n.facts.admin, shown, n.name, n.facts.admin)
	}
	return n.s.explain(err, what, n.facts.admin)
}

// Sessions implements kind.Observer.
func (t *target) Sessions(ctx context.Context, questions []kind.SessionsQuestion) []kind.SessionsAnswer {
	answers := make([]kind.SessionsAnswer, len(questions))
	users := make([]kind.User, len(questions))
	for i, q := range questions {
		users[i] = q.User
	}
	f, err := t.discover(ctx, users)
	if err != nil {
		for i := range answers {
			answers[i].Err = err
		}
		return answers
	}
	defer f.close()

	works := f.share(users)
	found := make(map[*node][][]kind.Session, len(f.nodes))
	for _, n := range f.nodes {
		found[n] = make([][]kind.Session, len(questions))
	}
	f.each(func(n *node) { works[n].sessions(ctx, questions, found[n]) })
	for i := range questions {
		for _, n := range f.nodes {
			answers[i].Sessions = append(answers[i].Sessions, found[n][i]...)
		}
		for _, r := range f.results(works, i) {
			if answers[i].Err == nil {
				answers[i].Err = r.Err
			}
		}
	}
	return answers
}

// sessions adds to found what this node knows of each question.
func (w *work) sessions(ctx context.Context, questions []kind.SessionsQuestion, found [][]kind.Session) {
	which := w.todo()
	if len(which) == 0 {
		return
	}
	clients, now, err := w.clients(ctx)
	for _, i := range which {
		w.errs[i] = err
	}
	for _, p := range clients {
		for _, i := range which {
			if p.of(questions[i].Username, w.facts.admin) && p.before(questions[i].Before, now) {
				found[i] = append(found[i], p.session(w.name, now))
			}
		}
	}
}

// closeSessions ends what the changes want ended, at every node that did what was
// asked of it: who is thrown out of another could log in there again.
func (j *job) closeSessions(ctx context.Context) {
	if !slices.ContainsFunc(j.changes, closes) {
		return
	}
	j.each(func(n *node) {
		w := j.works[n]
		which := slices.DeleteFunc(w.todo(), func(i int) bool { return !closes(j.changes[i]) })
		if len(which) > 0 {
			w.closeClients(ctx, j.changes, which)
		}
	})
}

func closes(c kind.Change) bool { return !c.CloseBefore.IsZero() }

// closeClients ends sessions one by one: CLIENT KILL USER would end the replication
// of a user that nodes log in to each other with, and those that were opened since.
func (w *work) closeClients(ctx context.Context, changes []kind.Change, which []int) {
	clients, now, err := w.clients(ctx)
	for _, i := range which {
		w.unclosed[i] = err
	}
	var commands []command
	var owners []int
	for _, p := range clients {
		for _, i := range which {
			if p.of(changes[i].Username, w.facts.admin) && p.before(changes[i].CloseBefore, now) {
				commands = append(commands, command{"CLIENT", "KILL", "ID", p.id})
				owners = append(owners, i)
			}
		}
	}
	for at, r := range w.s.run(ctx, commands) {
		if r.err != nil {
			w.unclosed[owners[at]] = w.explainClients(r.err, "CLIENT KILL", "close a connection")
			continue
		}
		killed, _ := r.value.(int64) // 0 where it has ended meanwhile
		w.closed[owners[at]] += int(killed)
	}
}
