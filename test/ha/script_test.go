package ha_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// What may happen, all of it to the active node.
const (
	failover     = "failover (kill -9)"
	stepDown     = "step-down"
	seal         = "seal and unseal"
	cutPeers     = "cut from its peers"
	cutTargets   = "cut from the targets"
	pluginKilled = "plugin killed"
	pluginReload = "plugin reload"
	mountReload  = "mount reload"
	upgrade      = "upgrade and downgrade"
)

var sorts = []string{failover, stepDown, seal, cutPeers, cutTargets, pluginKilled, pluginReload, mountReload, upgrade}

// aim is where a rotation of a role stands when something happens.
type aim struct {
	role  string
	phase rotation.Phase
}

// aims are the phases in which each role can be met.
var aims = func() (all []aim) {
	for role, phases := range map[string][]rotation.Phase{
		"cache":   {rotation.Preflight, rotation.Apply, rotation.Test, rotation.Publish, rotation.Grace, rotation.Retire},
		"ledger":  {rotation.Preflight, rotation.Apply, rotation.Test, rotation.Publish, rotation.Grace, rotation.Retire},
		"report":  {rotation.Preflight, rotation.Apply, rotation.Test},
		"queue":   {rotation.Preflight, rotation.Apply, rotation.Test, rotation.Grace, rotation.Retire},
		"partner": {rotation.Publish, rotation.Grace},
		"session": {rotation.Check, rotation.Grace},
		"store":   {rotation.Publish, rotation.Check},
	} {
		for _, phase := range phases {
			all = append(all, aim{role, phase})
		}
	}
	slices.SortFunc(all, func(a, b aim) int {
		return slices.Compare([]string{a.role, string(a.phase)}, []string{b.role, string(b.phase)})
	})
	return all
}()

// event is a line of the script.
type event struct {
	sort string
	aim
	// late is by how much what is sent to the servers of that kind arrives late
	// around the event: what a node has sent lands when another has taken over.
	late time.Duration
	// lasts is how long what is cut stays cut, and what is down stays down.
	lasts time.Duration
	// silent: nothing tells that the network is cut.
	silent bool
	// cluster: a reload is one of all nodes.
	cluster bool
}

func (e event) String() string {
	text := fmt.Sprintf("%s in %s of %s", e.sort, e.phase, e.role)
	if e.sort == cutPeers || e.sort == cutTargets {
		text += map[bool]string{true: ", silently", false: ", connections closed"}[e.silent]
	}
	return text
}

// script is what happens: every sort before one comes again, each aimed at
// another phase of another role.
func script(seed int64, many int) []event {
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	var bag []string
	var left []aim
	var events []event
	for range many {
		if len(bag) == 0 {
			bag = shuffled(random, sorts)
		}
		if len(left) == 0 {
			left = shuffled(random, aims)
		}
		e := event{
			sort: bag[0], aim: left[0],
			lasts:  time.Second + time.Duration(random.Int64N(int64(6*time.Second))),
			silent: random.IntN(2) == 0, cluster: random.IntN(2) == 0,
		}
		if random.IntN(2) == 0 {
			e.late = time.Duration(random.Int64N(int64(4 * time.Second)))
		}
		bag, left = bag[1:], left[1:]
		events = append(events, e)
	}
	return events
}

func shuffled[T any](random *rand.Rand, all []T) []T {
	all = slices.Clone(all)
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// TestScript: a seed is a script, and no sort, role or phase is left out of it.
func TestScript(t *testing.T) {
	require.Equal(t, script(7, 300), script(7, 300))
	require.NotEqual(t, script(7, 300), script(8, 300))
	for seed := range int64(50) {
		inTurn := map[string]bool{}
		for _, e := range script(seed, len(sorts)) {
			inTurn[e.sort] = true
		}
		require.Len(t, inTurn, len(sorts), "the short form has every sort")
		met := map[aim]int{}
		kinds := map[string]int{}
		for _, e := range script(seed, 2*len(aims)) {
			met[e.aim]++
			kinds[e.role]++
		}
		require.Len(t, met, len(aims))
		require.Equal(t, []int{2}, slices.Compact(slices.Collect(maps.Values(met))))
		require.Len(t, kinds, len(allRoles()))
	}
}
