// Package ha_test measures what becomes of rotations, and of those who log in
// meanwhile, when nodes of a Vault cluster fail: three nodes with integrated
// storage, a Redis, a PostgreSQL and a RabbitMQ, roles of seven kinds that rotate
// without a pause, clients that log in with what is served, and a script of events
// in between.
//
//	make soak                                   # 120 events
//	make soak SOAK_EVENTS=300 SOAK_MINUTES=90   # what comes first
//	make soak SOAK_SEED=7                       # the same script again
//	SOAK_DIR=/tmp/soak make soak                # keep what the nodes write there
//	make e2e RUN=ha                             # ten events, every sort of them
//
// It ends by itself and prints the seed and the figures. nodes_test.go has the
// servers and roles, script_test.go the script, events_test.go what happens,
// rotations_test.go and clients_test.go who works meanwhile, and verdict_test.go
// what must hold.
package ha_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/report"
)

func TestMain(m *testing.M) { leaks.Main(m) }

// TestHighAvailability plays the script of a seed.
func TestHighAvailability(t *testing.T) {
	many, minutes, seed := asked(t)
	ctx, cancel := context.WithCancel(t.Context())
	s := newStage(t)
	watch := s.watchLeader()
	defer watch.stop()
	crowd := newCrowd(s)
	drivers := newDrivers(s)

	running, stop := context.WithCancel(ctx)
	defer stop()
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel() // a test that fails waits for nothing
	crowd.start(running, &all)
	drivers.start(ctx, &all)

	began := time.Now()
	play := &play{stage: s, drivers: drivers}
	for n, e := range script(seed, many) {
		if time.Since(began) > minutes {
			break
		}
		require.NoError(t, play.event(ctx, e), "event %d: %s", n+1, e)
		t.Logf("event %d: %s", n+1, play.done[n])
	}
	drivers.stop()
	require.NoError(t, drivers.wait(ctx))
	stop()
	all.Wait()
	watch.stop()

	v := &verdict{stage: s, play: play, crowd: crowd, drivers: drivers, watch: watch}
	require.NoError(t, v.collect(ctx))
	report.Figure(t, "HA_FILE", "high availability: seed %d, %d events in %s\n%s", seed, len(play.done), time.Since(began).Round(time.Second), strings.Join(v.lines(), "\n"))
	v.require(t)
}

// asked is how much of the script of which seed to play.
func asked(t *testing.T) (events int, within time.Duration, seed int64) {
	t.Helper()
	if os.Getenv("SOAK_EVENTS") == "" {
		t.Skip("it takes minutes: make soak, or make e2e RUN=ha")
	}
	number := func(name, unset string) int64 {
		text := os.Getenv(name)
		if text == "" {
			text = unset
		}
		n, err := strconv.ParseInt(text, 10, 64)
		require.NoError(t, err, name)
		return n
	}
	events = int(number("SOAK_EVENTS", ""))
	within = time.Duration(number("SOAK_MINUTES", "1440")) * time.Minute
	seed = number("SOAK_SEED", strconv.FormatInt(time.Now().UnixNano()%1_000_000, 10))
	t.Logf("the script is that of SOAK_SEED=%d", seed)
	return events, within, seed
}

// until repeats try, and returns its last error when it does not succeed in time.
func until(ctx context.Context, within time.Duration, try func(context.Context) error) error {
	return untilEvery(ctx, within, 50*time.Millisecond, try)
}

func untilEvery(ctx context.Context, within, every time.Duration, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %s: %w", within, err)
		case <-tick.C:
		}
	}
}

// wait is a pause that ctx can end.
func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// errRefused is a server's answer to a credential that it does not accept.
var errRefused = errors.New("refused")
