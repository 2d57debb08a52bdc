package connection

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/semaphore"
)

// locks gives each connection a lock of its own: one whose server does not
// answer holds up no other.
type locks struct {
	mu   sync.Mutex
	held map[string]*nameLock
}

type nameLock struct {
	sem   *semaphore.Weighted
	users int
}

const exclusive = 1 << 20

// Lock keeps a connection as it is, from reading it to writing it again.
func (st *Store) Lock(ctx context.Context, name string) (unlock func(), err error) {
	return st.locks.acquire(ctx, name, exclusive)
}

// Share keeps a connection from being written or deleted while a role that uses
// it comes about.
func (st *Store) Share(ctx context.Context, name string) (unlock func(), err error) {
	return st.locks.acquire(ctx, name, 1)
}

func (l *locks) acquire(ctx context.Context, name string, weight int64) (unlock func(), err error) {
	l.mu.Lock()
	n := l.held[name]
	if n == nil {
		n = &nameLock{sem: semaphore.NewWeighted(exclusive)}
		l.held[name] = n
	}
	n.users++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if n.users--; n.users == 0 {
			delete(l.held, name)
		}
	}
	if err := n.sem.Acquire(ctx, weight); err != nil {
		leave()
		return nil, fmt.Errorf("connection %q is being tried by another request: %w", name, err)
	}
	return func() { n.sem.Release(weight); leave() }, nil
}
