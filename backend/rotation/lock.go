package rotation

import (
	"context"
	"slices"
	"sync"
)

// locks gives one lock a name. Two names never share a lock, so a batch may
// hold many; those who take several take them in order.
type locks struct {
	mu   sync.Mutex
	held map[string]*keyLock
}

type keyLock struct {
	ch   chan struct{}
	refs int
}

func newLocks() *locks { return &locks{held: map[string]*keyLock{}} }

// lock waits for name until ctx ends.
func (l *locks) lock(ctx context.Context, name string) error {
	l.mu.Lock()
	k := l.held[name]
	if k == nil {
		k = &keyLock{ch: make(chan struct{}, 1)}
		l.held[name] = k
	}
	k.refs++
	l.mu.Unlock()
	select {
	case k.ch <- struct{}{}:
		return nil
	case <-ctx.Done():
		l.release(name, k)
		return ctx.Err()
	}
}

func (l *locks) unlock(name string) {
	l.mu.Lock()
	k := l.held[name]
	l.mu.Unlock()
	<-k.ch
	l.release(name, k)
}

func (l *locks) release(name string, k *keyLock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.refs--; k.refs == 0 {
		delete(l.held, name)
	}
}

// lockAll takes every name, in order, and returns what gives them back.
func (l *locks) lockAll(ctx context.Context, names []string) (unlock func(), err error) {
	names = slices.Clone(names)
	slices.Sort(names)
	names = slices.Compact(names)
	for i, name := range names {
		if err := l.lock(ctx, name); err != nil {
			for _, n := range names[:i] {
				l.unlock(n)
			}
			return nil, err
		}
	}
	return func() {
		for _, n := range names {
			l.unlock(n)
		}
	}, nil
}
