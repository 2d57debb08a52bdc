package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// operatorsProgram names the build of test/tools/operators, which only
// `make e2e` makes: it holds both operators and the Kubernetes libraries.
const operatorsProgram = "HARMONYFLOW_OPERATORS"

// TestOperators lets the operators that bring secrets into Kubernetes read
// documents and creds/, with the manifests of docs/reference/documents.md. What
// reads Vault is their own code: the Vault provider and the Vault generator of
// External Secrets, and the VaultStaticSecret and VaultDynamicSecret controllers
// of Vault Secrets Operator. Kubernetes itself is a map of objects in memory.
func TestOperators(t *testing.T) {
	if os.Getenv(operatorsProgram) == "" {
		t.Skip(operatorsProgram + " is not set; make e2e builds the operators and sets it")
	}
	t.Run("ExternalSecrets", testExternalSecrets)
	t.Run("ExternalSecretsCreds", testExternalSecretsCreds)
	t.Run("VaultSecretsOperator", testVaultSecretsOperator)
	t.Run("VaultSecretsOperatorCreds", testVaultSecretsOperatorCreds)
}

func testExternalSecrets(t *testing.T) {
	c := startOperators(t, "external-secrets")
	c.write("roles/key", map[string]any{"kind": "api-key", "document": "shop/web", "field": "api-key", "previous_field": "api-key-previous"})
	c.write("roles/session", map[string]any{
		"kind": "jwt", "max_token_ttl": "1s", "propagation_delay": "1s",
		"document": "shop/web", "field": "jwt-secret", "previous_field": "jwt-secret-previous", "keys_field": "jwt-keys",
	})
	c.apply(`
apiVersion: external-secrets.io/v1
kind: ExternalSecret
metadata: {name: found}
spec:
  secretStoreRef: {name: harmonyflow}
  dataFrom: [{find: {name: {regexp: ".*"}}}]
---
apiVersion: external-secrets.io/v1
kind: ExternalSecret
metadata: {name: folder}
spec:
  secretStoreRef: {name: harmonyflow}
  dataFrom: [{find: {path: shop, name: {regexp: "^shop/w"}}}]
---
apiVersion: external-secrets.io/v1
kind: ExternalSecret
metadata: {name: absent}
spec:
  secretStoreRef: {name: harmonyflow}
  data: [{secretKey: k, remoteRef: {key: shop/absent, property: k}}]
---
apiVersion: external-secrets.io/v1
kind: ExternalSecret
metadata: {name: not-ours}
spec:
  secretStoreRef: {name: harmonyflow}
  data: [{secretKey: k, remoteRef: {key: other, property: k}}]
`)
	require.Empty(t, c.ask(request{Validate: &object{"SecretStore", "harmonyflow"}}).Error)

	// The Secret of the manifest is the document, to the field, and so is what is
	// found by name; the version that it has can be pinned.
	agrees := func() map[string]string {
		t.Helper()
		doc := c.document()
		want := c.strings(doc.Data)
		require.Equal(t, with(want, "API_KEY", want["api-key"]), c.sync("ExternalSecret", "web", "web"))
		c.pin(doc.VersionMetadata.Version)
		require.Equal(t, want, c.sync("ExternalSecret", "pinned", "pinned"))
		for _, name := range []string{"found", "folder"} {
			var found map[string]string
			require.NoError(t, json.Unmarshal([]byte(c.sync("ExternalSecret", name, name)["shop_web"]), &found), name)
			require.Equal(t, want, found, name)
		}
		return want
	}
	before := agrees()
	require.Equal(t, 2, c.document().VersionMetadata.Version)

	// During the grace period the version before can be pinned, too.
	c.write("rotate/api-key/key", nil)
	during := agrees()
	require.Equal(t, 3, c.document().VersionMetadata.Version)
	require.Equal(t, before["api-key"], during["api-key-previous"])
	require.NotEqual(t, before["api-key"], during["api-key"])
	c.pin(2)
	require.Equal(t, before, c.sync("ExternalSecret", "pinned", "pinned"))

	// After it that version is destroyed. That is a secret that does not exist to
	// External Secrets, as it is for a KV mount: the Secret stays as it is.
	c.write("retire/api-key/key", nil)
	after := agrees()
	require.Equal(t, 4, c.document().VersionMetadata.Version)
	require.Equal(t, during["api-key"], after["api-key"])
	require.Empty(t, after["api-key-previous"])
	c.sync("ExternalSecret", "pinned", "pinned")
	for _, gone := range []int{1, 2, 3} {
		c.pin(gone)
		require.Contains(t, c.ask(request{Reconcile: &object{"ExternalSecret", "pinned"}}).Error, "Secret does not exist")
		require.Equal(t, after, c.secret("pinned"))
	}
	require.Contains(t, c.ask(request{Reconcile: &object{"ExternalSecret", "absent"}}).Error, "Secret does not exist")

	// All through the rotation of a ring, whatever it reads is whole: what signs is
	// among what verifies, and the other role's field stands still.
	c.write("rotate/jwt/session", nil)
	signers, reads := map[string]bool{}, 0
	for c.state("session") != "idle" {
		read := c.sync("ExternalSecret", "web", "web")
		var keys map[string]string
		require.NoError(t, json.Unmarshal([]byte(read["jwt-keys"]), &keys))
		require.Contains(t, values(keys), read["jwt-secret"])
		require.Equal(t, after["api-key"], read["api-key"])
		signers[read["jwt-secret"]] = true
		reads++
	}
	agrees()
	require.Len(t, signers, 2, "the key that signed before and the new one are both seen in %d reads", reads)
	t.Logf("%d reads while a ring rotated; the document is at version %d", reads, c.document().VersionMetadata.Version)

	// It asked for nothing but this, and nothing was refused.
	c.onlyAsked(map[string][]string{
		"harmonyflow/data/shop/web": {"read"}, "harmonyflow/data/shop/absent": {"read"},
		"harmonyflow/metadata/": {"list"}, "harmonyflow/metadata/shop/": {"list"},
	})
	// A document that its policy does not name is another matter.
	require.Contains(t, c.ask(request{Reconcile: &object{"ExternalSecret", "not-ours"}}).Error, "permission denied")
}

// creds/ is flat: a store of version v1 reads it, and so does the generator.
func testExternalSecretsCreds(t *testing.T) {
	c := startOperators(t, "external-secrets-creds")
	c.write("roles/key", map[string]any{"kind": "api-key", "rotation_period": "24h"})
	c.apply(`
apiVersion: generators.external-secrets.io/v1alpha1
kind: VaultDynamicSecret
metadata: {name: key}
spec:
  path: harmonyflow/creds/key
  provider:
    server: ` + c.vault.Address + `
    auth: {appRole: {path: approle, roleId: shop, secretRef: {name: vault-approle, key: id}}}
---
apiVersion: external-secrets.io/v1
kind: ExternalSecret
metadata: {name: generated}
spec:
  dataFrom: [{sourceRef: {generatorRef: {apiVersion: generators.external-secrets.io/v1alpha1, kind: VaultDynamicSecret, name: key}}}]
`)
	for i := range 2 {
		if i > 0 {
			c.write("rotate/api-key/key", nil)
		}
		want := c.read("creds/key")
		require.Equal(t, map[string]string{"key": want["value"].(string)}, c.sync("ExternalSecret", "key", "key"))
		generated := c.sync("ExternalSecret", "generated", "generated")
		require.Equal(t, want["value"], generated["value"])
		require.Equal(t, string(want["version"].(json.Number)), generated["version"])
		require.Equal(t, "86400", generated["rotation_period"])
	}
	c.onlyAsked(map[string][]string{"harmonyflow/creds/key": {"read"}})
}

func testVaultSecretsOperator(t *testing.T) {
	c := startOperators(t, "vault-secrets-operator")
	c.write("roles/key", map[string]any{"kind": "api-key", "document": "shop/web", "field": "api-key", "previous_field": "api-key-previous"})
	c.write("roles/plain", map[string]any{"kind": "api-key", "document": "shop/web", "field": "plain"})
	c.write("roles/store", map[string]any{
		"kind": "encryption-key", "propagation_delay": "1s", "require_reencryption_ack": true,
		"document": "shop/web", "field": "encryption-key", "keys_field": "encryption-keys",
	})
	c.apply(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec: {selector: {matchLabels: {app: web}}, template: {metadata: {labels: {app: web}}, spec: {containers: [{name: web}]}}}
`)

	// One look: the Secret holds the fields of the document and nothing else but
	// _raw, the whole answer, which also shows the version that was read. The
	// operator's digest covers _raw, and a changed digest restarts the Deployment.
	type look struct{ raw, mac, restarted string }
	see := func() look {
		t.Helper()
		doc := c.document()
		got := c.sync("VaultStaticSecret", "web", "web")
		var raw struct {
			Data     map[string]string
			Metadata struct{ Version int }
		}
		require.NoError(t, json.Unmarshal([]byte(got["_raw"]), &raw))
		require.Equal(t, c.strings(doc.Data), raw.Data)
		require.Equal(t, doc.VersionMetadata.Version, raw.Metadata.Version)
		require.Equal(t, with(raw.Data, "_raw", got["_raw"]), got)
		var status struct{ Status struct{ SecretMAC string } }
		c.get("VaultStaticSecret", "web", &status)
		require.NotEmpty(t, status.Status.SecretMAC)
		var deployment struct {
			Spec struct {
				Template struct {
					Metadata struct{ Annotations map[string]string }
				}
			}
		}
		c.get("Deployment", "web", &deployment)
		return look{got["_raw"], status.Status.SecretMAC, deployment.Spec.Template.Metadata.Annotations["vso.secrets.hashicorp.com/restartedAt"]}
	}
	still := func(want look, why string) {
		t.Helper()
		for range 3 {
			require.Equal(t, want, see(), why)
		}
	}
	moved := func(old look, why string) look {
		t.Helper()
		if restarted, err := time.Parse(time.RFC3339, old.restarted); err == nil { // restarts are marked by the second
			require.Eventually(t, func() bool { return time.Since(restarted) > time.Second }, time.Minute, 10*time.Millisecond)
		}
		changed := see()
		require.NotEqual(t, old.raw, changed.raw, why)
		require.NotEqual(t, old.mac, changed.mac, why)
		require.NotEqual(t, old.restarted, changed.restarted, why)
		still(changed, why)
		return changed
	}

	first := see()
	require.Empty(t, first.restarted, "the first read restarts nothing")
	still(first, "nothing happened")

	c.write("rotate/api-key/key", nil)
	seen := moved(first, "a rotation")
	c.killPlugin()
	still(seen, "the plugin was started again")
	c.write("retire/api-key/key", nil)
	seen = moved(seen, "the previous value is emptied")

	// Retiring a value that no field shows, and an acknowledgement, publish nothing.
	c.write("rotate/api-key/plain", nil)
	seen = moved(seen, "a rotation")
	c.write("retire/api-key/plain", nil)
	still(seen, "a retirement that publishes nothing")
	c.write("rotate/encryption-key/store", nil)
	require.Eventually(t, func() bool {
		return c.read("roles/store")["version"] == json.Number("2") && c.state("store") != "rotating"
	}, time.Minute, 50*time.Millisecond)
	seen = moved(seen, "a ring rotated")
	c.write("ack/encryption-key/store", map[string]any{"version": 1})
	still(seen, "an acknowledgement")
	c.killPlugin()
	still(seen, "the plugin was started again")
	c.write("rollback/api-key/key", nil)
	moved(seen, "a rollback")

	// A destroyed version has no fields to it; with a KV mount it is the same.
	c.apply(`
apiVersion: secrets.hashicorp.com/v1beta1
kind: VaultStaticSecret
metadata: {name: pinned}
spec: {vaultAuthRef: vault, type: kv-v2, mount: harmonyflow, path: shop/web, version: 1, destination: {name: pinned, create: true}}
`)
	pinned := c.sync("VaultStaticSecret", "pinned", "pinned")
	require.Len(t, pinned, 1)
	require.Contains(t, pinned["_raw"], `"destroyed":true`)

	c.onlyAsked(map[string][]string{"harmonyflow/data/shop/web": {"read"}})
}

// The times of creds/ are those of a static role of the database engine, which
// allowStaticCreds is for.
func testVaultSecretsOperatorCreds(t *testing.T) {
	c := startOperators(t, "vault-secrets-operator-creds")
	c.write("roles/key", map[string]any{"kind": "api-key", "rotation_period": "24h"})
	var previous string
	for i := range 2 {
		if i > 0 {
			c.write("rotate/api-key/key", nil)
		}
		want := c.read("creds/key")
		got := c.sync("VaultDynamicSecret", "key", "key")
		require.Equal(t, want["value"], got["value"])
		require.NotEqual(t, previous, got["value"])
		previous = got["value"]
		var status struct {
			Status struct {
				StaticCredsMetaData struct {
					LastVaultRotation, RotationPeriod, TTL int64
				}
				SecretLease struct{ ID string }
			}
		}
		c.get("VaultDynamicSecret", "key", &status)
		rotated, err := time.Parse(time.RFC3339Nano, want["last_vault_rotation"].(string))
		require.NoError(t, err)
		require.Equal(t, rotated.Unix(), status.Status.StaticCredsMetaData.LastVaultRotation)
		require.EqualValues(t, 86400, status.Status.StaticCredsMetaData.RotationPeriod)
		require.InDelta(t, 86400, status.Status.StaticCredsMetaData.TTL, 60, "it reads again when the next rotation is due")
		require.Empty(t, status.Status.SecretLease.ID)
	}
	c.onlyAsked(map[string][]string{"harmonyflow/creds/key": {"read"}})
}

type object struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
}

type request struct {
	Apply     string  `json:"apply,omitempty"`
	Reconcile *object `json:"reconcile,omitempty"`
	Get       *object `json:"get,omitempty"`
	Validate  *object `json:"validate,omitempty"`
}

type reply struct {
	Object json.RawMessage
	Events []string
	Error  string
}

// operators is a Vault and, beside it, the operators with the manifests of the
// documentation, logged in as who may do what the documentation says.
type operators struct {
	run   *run
	t     *testing.T
	vault *servers.Vault
	root  *api.Client
	in    *json.Encoder
	out   *bufio.Scanner
}

var (
	manifests = regexp.MustCompile("(?ms)^```yaml\n(.*?)^```$")
	policies  = regexp.MustCompile(`(?m)^    (path "harmonyflow/[^\n]*)$`)
)

func startOperators(t *testing.T, name string) *operators {
	t.Helper()
	ctx := context.Background()
	c := &operators{t: t, vault: servers.NewVault(t, servers.VaultOptions{Race: raceEnabled}), run: &run{}}
	c.root = c.vault.Client()
	t.Cleanup(func() {
		if err := c.run.checkLogs(c.vault); err != nil {
			t.Error(err)
		}
	})

	page, err := os.ReadFile("../../docs/reference/documents.md")
	require.NoError(t, err)
	var policy []string
	for _, line := range policies.FindAllSubmatch(page, -1) {
		policy = append(policy, string(line[1]))
	}
	require.Len(t, policy, 4)
	_, secretID, err := c.vault.AppRole(ctx, name, strings.Join(policy, "\n"), "1h")
	require.NoError(t, err)
	_, err = c.root.Logical().WriteWithContext(ctx, "auth/approle/role/"+name+"/role-id", map[string]any{"role_id": "shop"})
	require.NoError(t, err)

	command := exec.Command(os.Getenv(operatorsProgram))
	command.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
	var log bytes.Buffer
	command.Stderr = &log
	in, err := command.StdinPipe()
	require.NoError(t, err)
	out, err := command.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, command.Start())
	t.Cleanup(func() {
		if err := in.Close(); err != nil {
			t.Error(err)
		}
		if err := command.Wait(); err != nil {
			t.Errorf("operators: %v", err)
		}
		if t.Failed() {
			t.Logf("what the operators logged:\n%s", log.String())
		}
	})
	c.in, c.out = json.NewEncoder(in), bufio.NewScanner(out)
	c.out.Buffer(nil, 1<<20)

	c.apply("apiVersion: v1\nkind: Secret\nmetadata: {name: vault-approle}\nstringData: {id: " + secretID + "}\n")
	examples := manifests.FindAllSubmatch(page, -1)
	require.Len(t, examples, 3)
	for _, example := range examples {
		c.apply(strings.ReplaceAll(string(example[1]), "https://vault.example.com:8200", c.vault.Address))
	}
	return c
}

func (c *operators) ask(r request) reply {
	c.t.Helper()
	require.NoError(c.t, c.in.Encode(r))
	require.True(c.t, c.out.Scan(), "the operators answer: %v", c.out.Err())
	var a reply
	require.NoError(c.t, json.Unmarshal(c.out.Bytes(), &a))
	return a
}

func (c *operators) apply(manifests string) {
	c.t.Helper()
	require.Empty(c.t, c.ask(request{Apply: manifests}).Error)
}

// pin lets the ExternalSecret "pinned" read one version.
func (c *operators) pin(version int) {
	c.t.Helper()
	c.apply(`
apiVersion: external-secrets.io/v1
kind: ExternalSecret
metadata: {name: pinned}
spec:
  secretStoreRef: {name: harmonyflow}
  dataFrom: [{extract: {key: shop/web, version: "` + strconv.Itoa(version) + `"}}]
`)
}

// sync reconciles an object and returns the Secret that it fills.
func (c *operators) sync(kind, name, secret string) map[string]string {
	c.t.Helper()
	a := c.ask(request{Reconcile: &object{kind, name}})
	require.Empty(c.t, a.Error)
	for _, event := range a.Events {
		require.NotContains(c.t, event, "Warning")
	}
	return c.secret(secret)
}

func (c *operators) secret(name string) map[string]string {
	c.t.Helper()
	var secret struct{ Data map[string][]byte }
	c.get("Secret", name, &secret)
	data := map[string]string{}
	for k, v := range secret.Data {
		data[k] = string(v)
	}
	return data
}

func (c *operators) get(kind, name string, into any) {
	c.t.Helper()
	a := c.ask(request{Get: &object{kind, name}})
	require.Empty(c.t, a.Error)
	require.NoError(c.t, json.Unmarshal(a.Object, into))
}

func (c *operators) write(path string, data map[string]any) {
	c.t.Helper()
	_, err := c.root.Logical().Write(servers.DefaultMount+"/"+path, data)
	require.NoError(c.t, err)
}

func (c *operators) read(path string) map[string]any {
	c.t.Helper()
	secret, err := c.root.Logical().Read(servers.DefaultMount + "/" + path)
	require.NoError(c.t, err)
	return secret.Data
}

func (c *operators) state(role string) string {
	c.t.Helper()
	state, ok := c.read("roles/" + role)["state"].(string)
	require.True(c.t, ok)
	return state
}

func (c *operators) document() *api.KVSecret {
	c.t.Helper()
	doc, err := c.root.KVv2(servers.DefaultMount).Get(context.Background(), "shop/web")
	require.NoError(c.t, err)
	for _, value := range c.strings(doc.Data) {
		if value != "" {
			c.run.remember(value)
		}
	}
	return doc
}

func (c *operators) strings(data map[string]any) map[string]string {
	c.t.Helper()
	values := map[string]string{}
	for k, v := range data {
		value, ok := v.(string)
		require.True(c.t, ok, k)
		values[k] = value
	}
	return values
}

// killPlugin returns when Vault has started the plugin again.
func (c *operators) killPlugin() {
	c.t.Helper()
	killed, err := c.vault.KillPlugin()
	require.NoError(c.t, err)
	require.Positive(c.t, killed)
	require.Eventually(c.t, func() bool {
		_, err := c.root.KVv2(servers.DefaultMount).Get(context.Background(), "shop/web")
		return err == nil
	}, time.Minute, 50*time.Millisecond)
}

// onlyAsked looks through the audit log: whoever logged in with AppRole did
// these operations in the mount, all of them, and nothing was refused to him
// there or elsewhere.
func (c *operators) onlyAsked(want map[string][]string) {
	c.t.Helper()
	content, err := os.ReadFile(c.vault.AuditPath)
	require.NoError(c.t, err)
	asked := map[string][]string{}
	for line := range bytes.Lines(content) {
		var entry struct {
			Type, Error string
			Auth        struct {
				DisplayName string `json:"display_name"`
			}
			Request struct{ Operation, Path string }
		}
		require.NoError(c.t, json.Unmarshal(line, &entry))
		if entry.Type != "response" || entry.Auth.DisplayName != "approle" || entry.Request.Path == "auth/approle/login" {
			continue
		}
		require.Empty(c.t, entry.Error, "%s %s", entry.Request.Operation, entry.Request.Path)
		if strings.HasPrefix(entry.Request.Path, servers.DefaultMount+"/") && !slices.Contains(asked[entry.Request.Path], entry.Request.Operation) {
			asked[entry.Request.Path] = append(asked[entry.Request.Path], entry.Request.Operation)
		}
	}
	for path, operations := range want {
		require.ElementsMatch(c.t, operations, asked[path], "asked for %s", path)
		delete(asked, path)
	}
	require.Empty(c.t, asked)
}

func with(data map[string]string, key, value string) map[string]string {
	more := map[string]string{key: value}
	for k, v := range data {
		more[k] = v
	}
	return more
}

func values(m map[string]string) []string {
	var all []string
	for _, v := range m {
		all = append(all, v)
	}
	return all
}
