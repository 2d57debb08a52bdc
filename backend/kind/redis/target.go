package redis

import (
	"context"
	"fmt"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// target is the nodes of one connection. It remembers nothing between calls.
type target struct {
	entry func(context.Context) (*connection.Entry, error)
}

// Open returns the Target behind a connection. entry is called at every call,
// so that addresses and the admin credential are those that are stored now.
func Open(entry func(context.Context) (*connection.Entry, error)) kind.Target {
	return &target{entry: entry}
}

func (t *target) discover(ctx context.Context, users []kind.User) (*fleet, error) {
	entry, err := t.entry(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the redis connection: %w", err)
	}
	var known []string
	for _, u := range users {
		known = append(known, u.Known...)
	}
	return discover(ctx, entry, known)
}

// work is what one node has to do in one call, and what came of it, for each
// user of the call in order.
type work struct {
	*node
	part  []bool // the users that this node holds
	users []user
	errs  []error

	effects  []effect // what was done beside passwords
	closed   []int    // how many sessions of each user were closed
	unclosed []error  // why sessions of each user may be open yet
}

// share gives every node its part of users.
func (f *fleet) share(users []kind.User) map[*node]*work {
	out := make(map[*node]*work, len(f.nodes))
	for _, n := range f.nodes {
		w := &work{
			node: n, part: make([]bool, len(users)),
			users: make([]user, len(users)), errs: make([]error, len(users)),
			effects: make([]effect, len(users)), closed: make([]int, len(users)), unclosed: make([]error, len(users)),
		}
		for i := range w.errs {
			w.errs[i] = n.err
		}
		out[n] = w
	}
	for i, u := range users {
		for _, n := range f.of(u) {
			out[n].part[i] = true
		}
	}
	return out
}

// todo are the users that this node holds and that nothing went wrong with.
func (w *work) todo() []int {
	var out []int
	for i, mine := range w.part {
		if mine && w.errs[i] == nil {
			out = append(out, i)
		}
	}
	return out
}

// read asks the node for its users as they stand.
func (w *work) read(ctx context.Context, users []kind.User, which []int) {
	names := make([]string, len(which))
	for i, at := range which {
		names[i] = users[at].Username
	}
	found, errs := w.s.users(ctx, names)
	for i, at := range which {
		w.users[at], w.errs[at] = found[i], errs[i]
	}
}

// results lists what came of user i at each of its nodes.
func (f *fleet) results(works map[*node]*work, i int) []kind.NodeError {
	var out []kind.NodeError
	for _, n := range f.nodes {
		if w := works[n]; w.part[i] {
			out = append(out, kind.NodeError{Node: n.name, Err: w.errs[i]})
		}
	}
	return out
}
