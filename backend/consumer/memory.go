package consumer

import (
	"sync"
	"time"
)

// What a consumer of many workloads costs. Each step is a look at all of them, every
// few seconds, and would be as many requests as there are workloads. But the pods of
// a namespace are one list, and tell by themselves what moves. So a workload is read
// where its pods do not suffice: before it is restarted, once they are as they should
// be, and now and then while they are not.
const (
	// few workloads are read at each look, whatever is known of them.
	few = 4
	// readAgain is when a workload is read again whose pods are not as they should
	// be: its controller may have given up.
	readAgain = 10 * time.Second
	// readsPerLook and restartsPerLook bound one look, which has a bounded time and a
	// bounded rate of requests; the next one goes on.
	readsPerLook    = 100
	restartsPerLook = 40
	// worthAList is how many reads a list of a whole kind is better than.
	worthAList = 16
	// forgotten is when what is known of a delivery that nobody asks for is dropped.
	forgotten = 15 * time.Minute
	// notPermitted is how long a list that was refused is not tried again.
	notPermitted = 10 * time.Minute
)

// known is what was read of a workload. It is never changed, but for replacing it.
type known struct {
	w  *workload
	at time.Time
	// looked: something was concluded from it.
	looked bool
	// proven: when it was read, all was as it should be, in the step that is named.
	proven bool
	step   string
	pods   int    // that were living
	told   string // the step of which that was told
}

// memory is what one process knows of a delivery. Losing it costs requests, and
// nothing else: what was done stands in the cluster.
type memory struct {
	mu    sync.Mutex
	known map[ref]known
	logs  map[string]bool // that were read, and held nothing forbidden
	used  time.Time

	urgent urgentMemory
}

func (m *memory) get(r ref) (known, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	k, ok := m.known[r]
	return k, ok
}

func (m *memory) put(r ref, k known) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.known[r] = k
}

func (m *memory) isClean(log string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.logs[log]
}

func (m *memory) clean(log string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.logs == nil {
		m.logs = map[string]bool{}
	}
	m.logs[log] = true
}

// dirty has all logs read again.
func (m *memory) dirty() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.logs = nil
}

// memories are those of all deliveries, and which lists were refused.
type memories struct {
	mu      sync.Mutex
	of      map[string]*memory
	refused map[string]time.Time
}

// recall returns what is known of a delivery to a consumer.
func (ms *memories) recall(c *Consumer, id string, now time.Time) *memory {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if ms.of == nil {
		ms.of, ms.refused = map[string]*memory{}, map[string]time.Time{}
	}
	for key, m := range ms.of {
		if now.Sub(m.used) > forgotten {
			delete(ms.of, key)
		}
	}
	key := string(c.Mode) + "/" + c.Connection + "/" + c.Namespace + "/" + c.Name + "/" + id
	m := ms.of[key]
	if m == nil {
		m = &memory{known: map[ref]known{}}
		ms.of[key] = m
	}
	m.used = now
	return m
}

// mayList reports whether a list was not refused lately.
func (ms *memories) mayList(list string, now time.Time) bool {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	at, refused := ms.refused[list]
	return !refused || now.Sub(at) > notPermitted
}

func (ms *memories) notListed(list string, now time.Time) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if ms.refused != nil {
		ms.refused[list] = now
	}
}
