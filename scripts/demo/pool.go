package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// credential is what creds/ serves.
type credential struct {
	Username, Secret string
	Version          int64
	Previous         string
}

const (
	poolSize = 16
	// each client logs in so often: together 200 times a second.
	loginEvery = 80 * time.Millisecond
	// and reads creds/ again so often.
	readEvery = 400 * time.Millisecond
)

// pool is clients that log in all the while with what creds/ serves, each time
// on a fresh connection.
type pool struct {
	target target
	read   func(context.Context) (credential, error)

	tried, refused atomic.Int64
	versions       [poolSize]atomic.Int64 // that each client last logged in with

	mu    sync.Mutex
	first error // what was answered to the first login that was refused

	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func startPool(ctx context.Context, t target, read func(context.Context) (credential, error)) (*pool, error) {
	p := &pool{target: t, read: read}
	ctx, p.cancel = context.WithCancel(ctx)
	c, err := read(ctx)
	if err != nil {
		return nil, err
	}
	for i := range poolSize {
		p.wg.Go(func() { p.client(ctx, i, c) })
	}
	return p, nil
}

// client keeps what it has while creds/ does not answer, as an application
// does whose Vault is away for a moment.
func (p *pool) client(ctx context.Context, i int, c credential) {
	tick := time.NewTicker(loginEvery)
	defer tick.Stop()
	select { // not all at the same time
	case <-time.After(loginEvery * time.Duration(i) / poolSize):
	case <-ctx.Done():
	}
	readAt := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if time.Since(readAt) > readEvery {
			if newer, err := p.read(ctx); err == nil {
				c, readAt = newer, time.Now()
			}
		}
		err := p.target.login(ctx, rand.IntN(p.target.places()), c)
		if ctx.Err() != nil {
			return
		}
		p.tried.Add(1)
		if err != nil {
			p.complain(fmt.Errorf("client %d with version %d: %w", i, c.Version, err))
			continue
		}
		p.versions[i].Store(c.Version)
	}
}

func (p *pool) complain(err error) {
	p.refused.Add(1)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.first == nil {
		p.first = err
	}
}

// verdict is nil when every login so far succeeded.
func (p *pool) verdict() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.first == nil {
		return nil
	}
	return fmt.Errorf("%d of %d logins were refused; the first was %w", p.refused.Load(), p.tried.Load(), p.first)
}

// moved waits until every client has logged in with version v or a newer one.
func (p *pool) moved(ctx context.Context, v int64) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return until(ctx, func() (bool, error) {
		if err := p.verdict(); err != nil {
			return false, err
		}
		for i := range p.versions {
			if p.versions[i].Load() < v {
				return false, nil
			}
		}
		return true, nil
	})
}

func (p *pool) stop() {
	p.cancel()
	p.wg.Wait()
}

// until asks every few milliseconds until the answer is yes.
func until(ctx context.Context, yes func() (bool, error)) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := yes()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.New("waited for too long")
		case <-tick.C:
		}
	}
}
