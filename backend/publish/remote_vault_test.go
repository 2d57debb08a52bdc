package publish

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// documented is the policy that the reference says is enough.
func documented(t *testing.T) string {
	t.Helper()
	page, err := os.ReadFile("../../docs/reference/vault-connections.md")
	require.NoError(t, err)
	block := regexp.MustCompile("(?s)```hcl\n(.*?)```").FindSubmatch(page)
	require.NotNil(t, block)
	return string(block[1])
}

// The engine publishes to a real Vault with the documented policy and no more.
func TestPublishToVault(t *testing.T) {
	ctx := t.Context()
	v := servers.NewVault(t, servers.VaultOptions{})
	root := v.Client()
	p, err := servers.NewProxy(strings.TrimPrefix(v.Address, "http://"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = p.Close() })
	id, secretID, err := v.AppRole(ctx, "publisher", documented(t), "1h")
	require.NoError(t, err)
	e := &connection.Entry{
		Name: "other", Type: connection.TypeVault, Admin: connection.NewAdmin(kind.Material{Username: id, Secret: secretID}),
		Vault: &connection.Vault{
			Address: "http://" + p.Addr(), Auth: connection.AuthAppRole, AuthMount: "approle",
			AllowedPublishPaths: []string{"*/harmonyflow/*", "team/kv/harmonyflow/*"},
		},
	}
	clients := vault.New(func(context.Context, string) (*connection.Entry, error) { return e, nil }, hclog.NewNullLogger())
	t.Cleanup(func() { clients.Close(context.Background()) })
	r := NewRemote(clients)
	at := Place{Connection: "other", Mount: "secret", Path: "harmonyflow/jwt"}
	data := "secret/data/harmonyflow/jwt"
	state := func() (version int, body string) {
		resp, err := root.Logical().ReadRawWithContext(ctx, data)
		if err != nil {
			return 0, ""
		}
		defer resp.Body.Close()
		var got struct {
			Data struct {
				Data     json.RawMessage
				Metadata struct{ Version int }
			}
		}
		require.NoError(t, json.NewDecoder(resp.Body).Decode(&got))
		return got.Data.Metadata.Version, string(got.Data.Data)
	}
	stands := func(version int, body string) {
		t.Helper()
		gotVersion, gotBody := state()
		require.JSONEq(t, body, gotBody)
		require.Equal(t, version, gotVersion)
	}
	publish := func(fields map[string]string) error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		return r.Publish(ctx, at, fields)
	}

	// A secret that is not there yet, with the field names of today's consumers.
	require.NoError(t, publish(map[string]string{"jwt-secret": "one", "jwt-secret-previous": ""}))
	stands(1, `{"jwt-secret":"one","jwt-secret-previous":""}`)
	require.NoError(t, publish(map[string]string{"jwt-secret": "one", "jwt-secret-previous": ""}))
	stands(1, `{"jwt-secret":"one","jwt-secret-previous":""}`)

	// What others keep there stays as it was. (Vault itself keeps numbers as
	// float64, so the one with many digits loses some before we see it.)
	foreign := `"number":12345678901234567890.50,"count":9007199254740993,"big":1e40,"deep":{"b":[1,"<&>",null],"a":true},"text":"ü\u2028"`
	_, err = root.Logical().WriteBytesWithContext(ctx, data, []byte(`{"data":{"jwt-secret":"one",`+foreign+`}}`))
	require.NoError(t, err)
	_, before := state()
	require.NoError(t, publish(map[string]string{"jwt-secret": "two", "jwt-secret-previous": "one"}))
	version, body := state()
	require.Equal(t, 3, version)
	parts := func(body string) map[string]json.RawMessage {
		var m map[string]json.RawMessage
		require.NoError(t, json.Unmarshal([]byte(body), &m))
		return m
	}
	for _, name := range []string{"number", "count", "big", "deep", "text"} {
		require.Equal(t, string(parts(before)[name]), string(parts(body)[name]))
	}
	held, err := r.Held(ctx, at, []string{"jwt-secret", "jwt-secret-previous", "big", "absent"})
	require.NoError(t, err)
	require.Equal(t, map[string]string{"jwt-secret": "two", "jwt-secret-previous": "one", "big": "1e+40"}, held)

	// The reply to a write is lost: it landed, and nothing more is written.
	p.LoseReplyTo("PUT /v1/" + data)
	err = publish(map[string]string{"jwt-secret": "three", "jwt-secret-previous": "two"})
	require.Equal(t, kind.Unreachable, classOf(err), "%v", err)
	p.Heal()
	version, _ = state()
	require.Equal(t, 4, version)
	require.NoError(t, publish(map[string]string{"jwt-secret": "three", "jwt-secret-previous": "two"}))
	version, body = state()
	require.Equal(t, 4, version)
	require.Equal(t, string(parts(before)["deep"]), string(parts(body)["deep"]))

	// Nobody answers, then somebody does.
	for _, fault := range []func(bool){p.Blackhole, p.Cut, p.LoseReplies} {
		fault(true)
		require.Equal(t, kind.Unreachable, classOf(publish(map[string]string{"jwt-secret": "four"})))
		p.Heal()
	}
	require.NoError(t, publish(map[string]string{"jwt-secret": "four"}))
	version, _ = state()
	require.Equal(t, 5, version)

	// Deleted, destroyed, erased: it comes back with our fields alone.
	for i, remove := range []func() error{
		func() error { return root.KVv2("secret").Delete(ctx, at.Path) },
		func() error { return root.KVv2("secret").Destroy(ctx, at.Path, []int{6}) },
		func() error { return root.KVv2("secret").DeleteMetadata(ctx, at.Path) },
	} {
		require.NoError(t, remove())
		held, err := r.Held(ctx, at, []string{"jwt-secret"})
		require.NoError(t, err)
		require.Empty(t, held)
		require.NoError(t, publish(map[string]string{"jwt-secret": "five"}))
		stands([]int{6, 7, 1}[i], `{"jwt-secret":"five"}`)
	}

	// A mount that wants check-and-set, below a path of two parts.
	require.NoError(t, root.Sys().MountWithContext(ctx, "team/kv", &api.MountInput{Type: "kv-v2"}))
	require.Eventually(t, func() bool {
		_, err := root.Logical().WriteWithContext(ctx, "team/kv/config", map[string]any{"cas_required": true})
		return err == nil
	}, 20*time.Second, 50*time.Millisecond)
	require.NoError(t, root.Sys().PutPolicyWithContext(ctx, "publisher", strings.ReplaceAll(documented(t), "secret/data", "+/data")+
		`path "team/kv/data/*" { capabilities = ["create", "read", "update"] }
		 path "old/*" { capabilities = ["create", "read", "update"] }`))
	at = Place{Connection: "other", Mount: "team/kv", Path: "harmonyflow/a"}
	require.NoError(t, publish(map[string]string{"k": "v"}))

	// Where there is no KV version 2 nothing is written.
	require.NoError(t, root.Sys().MountWithContext(ctx, "old", &api.MountInput{Type: "kv", Options: map[string]string{"version": "1"}}))
	_, err = root.Logical().WriteWithContext(ctx, "old/data/harmonyflow/there", map[string]any{"k": "v"})
	require.NoError(t, err)
	for _, name := range []string{"there", "absent"} {
		at = Place{Connection: "other", Mount: "old", Path: "harmonyflow/" + name}
		err = publish(map[string]string{"k": "w"})
		require.Equal(t, kind.Definite, classOf(err), "%v", err)
		require.ErrorContains(t, err, "no mount of KV version 2")
	}
	there, err := root.Logical().ReadWithContext(ctx, "old/data/harmonyflow/there")
	require.NoError(t, err)
	require.Equal(t, map[string]any{"k": "v"}, there.Data)
	absent, err := root.Logical().ReadWithContext(ctx, "old/data/harmonyflow/absent")
	require.NoError(t, err)
	require.Nil(t, absent)
	// Nor into the engine itself.
	at = Place{Connection: "other", Mount: "harmonyflow", Path: "harmonyflow/a"}
	require.ErrorContains(t, publish(map[string]string{"k": "v"}), "no mount of KV version 2")
	// Nor where there is no mount.
	at = Place{Connection: "other", Mount: "nowhere", Path: "harmonyflow/a"}
	err = publish(map[string]string{"k": "v"})
	require.Equal(t, kind.Definite, classOf(err), "%v", err)
	require.ErrorContains(t, err, "no handler for route")

	// Nor while it is sealed.
	at = Place{Connection: "other", Mount: "secret", Path: "harmonyflow/jwt"}
	require.NoError(t, root.Sys().SealWithContext(ctx))
	err = publish(map[string]string{"jwt-secret": "six"})
	require.Equal(t, kind.Unavailable, classOf(err))
	require.ErrorContains(t, err, "sealed")
}

// Two roles rotate fields of one secret of a real Vault, thirty times each, while
// somebody patches a third: every version shows that no field ever goes back, and
// there is one version for each change.
func TestPublishersOfAVault(t *testing.T) {
	const rounds = 30
	ctx := t.Context()
	v := servers.NewVault(t, servers.VaultOptions{NoMount: true})
	root := v.Client()
	clients := vault.New(func(_ context.Context, name string) (*connection.Entry, error) {
		return &connection.Entry{
			Name: name, Type: connection.TypeVault, Admin: connection.NewAdmin(kind.Material{Secret: v.Token}),
			Vault: &connection.Vault{Address: v.Address, Auth: connection.AuthToken, AllowedPublishPaths: []string{"secret/app/*"}},
		}, nil
	}, hclog.NewNullLogger())
	t.Cleanup(func() { clients.Close(context.Background()) })
	r := NewRemote(clients)
	require.NoError(t, root.KVv2("secret").PutMetadata(ctx, place.Path, api.KVMetadataPutInput{MaxVersions: 10 * rounds}))
	start := map[string]any{"a": "0", "b": "0", "theirs": "0"}
	_, err := root.KVv2("secret").Put(ctx, place.Path, start)
	require.NoError(t, err)
	var wg sync.WaitGroup
	for _, field := range []string{"a", "b"} {
		wg.Go(func() {
			for i := 1; i <= rounds; i++ {
				if !assert.NoError(t, r.Publish(ctx, place, map[string]string{field: fmt.Sprint(i)})) {
					return
				}
			}
		})
	}
	wg.Go(func() {
		for i := 1; i <= rounds; i++ {
			_, err := root.KVv2("secret").Patch(ctx, place.Path, map[string]any{"theirs": fmt.Sprint(i)})
			if !assert.NoError(t, err) {
				return
			}
		}
	})
	wg.Wait()
	last := map[string]int{}
	for n := 1; n <= 1+3*rounds; n++ {
		got, err := root.KVv2("secret").GetVersion(ctx, place.Path, n)
		require.NoError(t, err)
		require.Len(t, got.Data, len(start))
		for field, value := range got.Data {
			i, err := strconv.Atoi(value.(string))
			require.NoError(t, err)
			require.GreaterOrEqual(t, i, last[field], "%s goes back in version %d", field, n)
			last[field] = i
		}
	}
	require.Equal(t, map[string]int{"a": rounds, "b": rounds, "theirs": rounds}, last)
	now, err := root.KVv2("secret").GetMetadata(ctx, place.Path)
	require.NoError(t, err)
	require.Equal(t, 1+3*rounds, now.CurrentVersion)
}
