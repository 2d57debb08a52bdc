package proof_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

const (
	tokenRotations = 20 // of roles of each algorithm
	tokenMounts    = 2  // that they are spread over
	tokenDelay     = 4 * time.Second
	tokenRefresh   = tokenDelay / 2
	tokenTTL       = 3 * time.Second
	tokenPause     = 50 * time.Millisecond

	hastyRotations = 4

	tokenDocument  = "session-state-service"
	tokenField     = "jwt-secret"
	tokenKeysField = "jwt-keys"
)

// TestNoTokenIsRefused lets processes that sign exchange tokens with processes
// that verify, through twenty rotations of their keys. Each consumer reads its
// keys every two seconds and knows nothing else, as the documentation tells it
// to. Every token is checked at once and once more just before it runs out.
//
// A consumer that a busy machine keeps from its keys for longer than the role's
// propagation_delay has not done what it promised. What it signs or checks then
// is counted, and is no refusal of the engine's.
func TestNoTokenIsRefused(t *testing.T) {
	t.Parallel()
	// A Vault of its own: in others plugins are killed, and consumers would not
	// get what they ask for.
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true, RawStorage: true})
	t.Run("as documented", func(t *testing.T) {
		t.Parallel()
		exchanges := make([]*exchange, tokenMounts)
		rotations, ctx := errgroup.WithContext(t.Context())
		for n := range exchanges {
			e := newExchange(t, v, fmt.Sprintf("exchange-%d", n))
			e.start(t)
			exchanges[n] = e
			rotations.Go(func() error { return e.rotate(ctx, tokenRotations/tokenMounts, true) })
		}
		require.NoError(t, rotations.Wait())
		all := tally{Keys: map[jose.SignatureAlgorithm]int{}}
		rotated, back := 0, 0
		for _, e := range exchanges {
			all.add(e.end(t))
			counts, err := e.rotations(t.Context(), "manual")
			require.NoError(t, err)
			back += counts["rolled_back"]
			for _, n := range counts {
				rotated += n
			}
		}
		figure(t, "%d rotations of HS256, ES256 and RS256, %d tokens checked twice, %d refused", rotated, all.Twice, all.Refused)
		t.Logf("%d rotations were rolled back; %d tokens came too late to count and %d had run out; keys were %s old at most",
			back, all.Late, all.Expired, all.Oldest.Round(time.Millisecond))
		require.Zero(t, all.Refused, "%v", all.Reasons)
		require.Equal(t, tokenRotations, rotated)
		require.Positive(t, back)
		for _, algorithm := range tokenAlgorithms { // the first keys and those that came after
			require.Equal(t, tokenMounts+tokenRotations, all.Keys[algorithm], "%s: keys that signed what was accepted twice", algorithm)
		}
		require.Greater(t, all.Twice, all.Tokens/2, "the consumers were too slow for this to show anything")
	})
	t.Run("one rollout", func(t *testing.T) {
		t.Parallel()
		e := newExchange(t, v, "exchange-hasty")
		e.promoteAtOnce(t)
		e.start(t)
		require.NoError(t, e.rotate(t.Context(), hastyRotations, false))
		got := e.end(t)
		figure(t, "one-rollout promotion: %d of %d tokens refused", got.Refused, got.Tokens)
		require.Positive(t, got.Refused, "whoever cannot see a refusal shows nothing where there is none")
		t.Logf("the first of them: %s", got.Reasons[0])
	})
}

// exchange is a mount with a role of each algorithm, a process that signs with
// their keys, and one that verifies what that one signed.
type exchange struct {
	*mount
	signer, verifier *process
	found            *json.Decoder // what the verifier says
}

func newExchange(t *testing.T, v *servers.Vault, path string) *exchange {
	t.Helper()
	e := &exchange{mount: newMount(t, v, path)}
	for _, algorithm := range tokenAlgorithms {
		role := map[string]any{
			"kind": "jwt", "algorithm": string(algorithm), "max_token_ttl": tokenTTL.String(), "propagation_delay": tokenDelay.String(),
		}
		if algorithm == jose.HS256 {
			role["document"], role["field"], role["keys_field"] = tokenDocument, tokenField, tokenKeysField
		} else {
			role["public_jwks"] = true
		}
		e.mustWrite(t, "roles/"+roleOf(algorithm), role)
	}
	require.NoError(t, e.awaitIdle(t.Context()))
	return e
}

// promoteAtOnce takes the wait after the first publication away, and nothing
// else: a new key is shown and used in one rollout, as where nobody thinks of an
// order. No user can ask for that, so that it is written behind the engine. An
// earlier key stays as long as it does otherwise.
func (e *exchange) promoteAtOnce(t *testing.T) {
	t.Helper()
	for _, algorithm := range tokenAlgorithms {
		role := roleOf(algorithm)
		r, err := e.stored(t.Context(), role)
		require.NoError(t, err)
		r.Spec.PropagationDelay, r.Spec.MaxTokenTTL = 0, r.Spec.PropagationDelay+r.Spec.MaxTokenTTL
		raw, err := json.Marshal(r)
		require.NoError(t, err)
		_, err = e.c.Logical().WriteWithContext(t.Context(), "sys/raw/logical/"+e.uuid+"/role/"+role, map[string]any{"value": string(raw)})
		require.NoError(t, err)
		data, err := e.read(t.Context(), "roles/"+role)
		require.NoError(t, err)
		require.Equal(t, "0", fmt.Sprint(data["propagation_delay"]))
	}
}

// start starts the processes, and returns when tokens are accepted.
func (e *exchange) start(t *testing.T) {
	t.Helper()
	p := party{Mount: e.path, Refresh: tokenRefresh, Promise: tokenDelay, TTL: tokenTTL, Pause: tokenPause}
	tokensOut, tokensIn, err := os.Pipe()
	require.NoError(t, err)
	defer tokensOut.Close() // the processes have their own
	defer tokensIn.Close()
	e.verifier = e.newProcess(t, p, `path "%[1]s/creds/hs256" { capabilities = ["read"] }
path "%[1]s/data/*" { capabilities = ["read"] }`)
	e.verifier.Stdin = tokensOut
	found, err := e.verifier.StdoutPipe()
	require.NoError(t, err)
	e.found = json.NewDecoder(found)
	require.NoError(t, e.verifier.Start())

	p.Signs = true
	e.signer = e.newProcess(t, p, `path "%[1]s/creds/*" { capabilities = ["read"] }`)
	e.signer.Stdout = tokensIn
	e.signer.stop, err = e.signer.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, e.signer.Start())

	var first tally
	if err := e.found.Decode(&first); err != nil {
		require.NoError(t, errors.Join(err, e.verifier.finish()), "no token was accepted")
	}
	require.Zero(t, first.Refused, "before anything rotates: %v", first.Reasons)
}

// end lets the processes come to their end.
func (e *exchange) end(t *testing.T) (got tally) {
	t.Helper()
	require.NoError(t, e.signer.stop.Close())
	signerErr := e.signer.finish()
	err := e.found.Decode(&got)
	require.NoError(t, errors.Join(signerErr, err, e.verifier.finish()))
	require.Equal(t, got.Tokens, got.Twice+got.Refused+got.Late+got.Expired)
	return got
}

// rotate rotates every role n times, one rotation after the other, and takes
// the middle one back when every signer has moved on to its key.
func (e *exchange) rotate(ctx context.Context, n int, rollBack bool) error {
	for i := range n {
		before, err := e.signing(ctx)
		if err != nil {
			return err
		}
		if _, err := e.write(ctx, "rotate/jwt", nil); err != nil {
			return err
		}
		back := rollBack && i == n/2
		if back {
			if err := e.takeBack(ctx, before); err != nil {
				return err
			}
		}
		if err := e.awaitIdle(ctx); err != nil {
			return err
		}
		after, err := e.signing(ctx)
		if err != nil {
			return err
		}
		for role, kid := range after {
			if (kid == before[role]) != back {
				return fmt.Errorf("rotation %d of %s: key %s signs, after %s", i+1, role, kid, before[role])
			}
		}
	}
	return nil
}

// takeBack rolls the roles back when they have been signing with other keys
// than those of before for a while.
func (e *exchange) takeBack(ctx context.Context, before map[string]string) error {
	err := until(ctx, time.Minute, func(ctx context.Context) error {
		now, err := e.signing(ctx)
		for role, kid := range now {
			if kid == before[role] {
				err = errors.Join(err, fmt.Errorf("%s was not promoted", role))
			}
		}
		return err
	})
	if err != nil {
		return err
	}
	wait(ctx, tokenRefresh+tokenRefresh/2)
	var rollbacks errgroup.Group
	for role := range before {
		rollbacks.Go(func() error { return only(e.write(ctx, "rollback/jwt/"+role, nil)) })
	}
	return rollbacks.Wait()
}

// signing names the keys that sign, by role.
func (e *exchange) signing(ctx context.Context) (map[string]string, error) {
	kids := map[string]string{}
	for _, algorithm := range tokenAlgorithms {
		data, err := e.read(ctx, "creds/"+roleOf(algorithm))
		if err != nil {
			return nil, err
		}
		kids[roleOf(algorithm)] = data["kid"].(string)
	}
	return kids, nil
}

// process is a party that runs. It is killed with the test, and it ends by
// itself when the test's process is gone.
type process struct {
	*exec.Cmd
	stop   io.Closer // of a signer: its standard input
	stderr bytes.Buffer
}

// newProcess prepares a party whose token may do what policy says and nothing
// else.
func (e *exchange) newProcess(t *testing.T, p party, policy string) *process {
	t.Helper()
	name := e.path + "-verifier"
	if p.Signs {
		name = e.path + "-signer"
	}
	token, err := e.vault.TokenFor(t.Context(), name, fmt.Sprintf(policy, e.path))
	require.NoError(t, err)
	description, err := json.Marshal(p)
	require.NoError(t, err)
	self, err := os.Executable()
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	c := &process{Cmd: exec.CommandContext(ctx, self)}
	c.Env = []string{partyVariable + "=" + string(description), "VAULT_ADDR=" + e.vault.Address, "VAULT_TOKEN=" + token}
	c.Stderr = &c.stderr
	t.Cleanup(func() {
		cancel()
		_ = c.finish()
	})
	return c
}

// finish waits until the process has ended, and returns what it complained of.
// A second time it does nothing.
func (c *process) finish() error {
	if c.Process == nil || c.ProcessState != nil {
		return nil
	}
	if err := c.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, c.stderr.String())
	}
	return nil
}
