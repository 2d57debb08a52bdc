package rabbitmq

import (
	"maps"
	"slices"
	"sync"
	"time"
)

// ghostAfter is how long a connection is listed without statistics until it is taken for
// ended where nothing else shows it: many times the interval of those of any broker.
const ghostAfter = 5 * time.Minute

// together is how far two looks at a user may be apart to be told of the same
// connections: an address may be used anew. Whoever looks again and again does so each
// minute.
const together = 3 * time.Minute

// ghosts remembers connections that brokers list and have no statistics of. Where a
// client is cut off while it opens one, RabbitMQ may go on listing it until the broker is
// restarted. Nobody can be asked about it, or close it, and while it counted, a user that
// nobody uses any more would be in use for ever.
//
// A broker makes the statistics of all its connections at once. So one that has some
// shows that another, which was listed when it was not yet, and has none, is gone.
type ghosts struct {
	mu    sync.Mutex
	users map[userOf]*sightings
}

// userOf is a user of a cluster.
type userOf struct{ cluster, name string }

// sightings are those of one user, for as long as one of its connections has no
// statistics.
type sightings struct {
	last  time.Time
	looks int
	first map[place]int // the look that listed it first
	since map[place]time.Time
	gone  map[place]bool // what has shown it may have ended itself by now
}

// place is a connection, by what its broker calls it.
type place struct{ node, name string }

func placeOf(s session) place { return place{s.Node, s.Name} }

// forget takes those out of o that are gone.
func (g *ghosts) forget(user userOf, o *openSessions, now time.Time) {
	if o.err != nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(o.silent) == 0 {
		delete(g.users, user)
		return
	}
	maps.DeleteFunc(g.users, func(_ userOf, s *sightings) bool { return now.Sub(s.last) > together })
	before := g.users[user]
	if before == nil {
		before = &sightings{}
	}
	next := &sightings{last: now, looks: before.looks + 1, first: map[place]int{}, since: map[place]time.Time{}, gone: map[place]bool{}}
	newest := map[string]int{} // by broker, of those that have statistics
	for _, s := range slices.Concat(o.known, o.silent, o.listed) {
		at := placeOf(s)
		next.first[at] = next.looks
		if look, ok := before.first[at]; ok {
			next.first[at] = look
		}
	}
	for _, s := range o.known {
		newest[s.Node] = max(newest[s.Node], next.first[placeOf(s)])
	}
	o.silent = slices.DeleteFunc(o.silent, func(s session) bool {
		at := placeOf(s)
		next.since[at] = now
		if since, ok := before.since[at]; ok {
			next.since[at] = since
		}
		gone := before.gone[at] || newest[s.Node] > next.first[at] || now.Sub(next.since[at]) >= ghostAfter
		if gone {
			next.gone[at] = true
		}
		return gone
	})
	if g.users == nil {
		g.users = map[userOf]*sightings{}
	}
	g.users[user] = next
}
