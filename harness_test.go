package harmonyflow

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/testhelpers/schema"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/leaks"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

func TestMain(m *testing.M) {
	// Most of their time they wait. More at once would starve each other on a slow
	// machine: a server that does not answer within seconds is down to the engine.
	_ = flag.Set("test.parallel", "4") // the command line overrides it
	// Started by the import of a library of the SDK, and never ended.
	leaks.Main(m, goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"))
}

const (
	mountPoint = "harmonyflow/"
	patience   = time.Minute // for what comes about by itself, on a machine that is busy with other things
	glance     = 5 * time.Millisecond
	shortly    = time.Second // within which requests for a target that hangs are answered
)

// mount is a backend as Vault holds it: requests go in the way Vault sends
// them, every answer is checked against what its path declares, and at the end
// of the test no secret may stand anywhere but in creds/ and in sealed storage.
type mount struct {
	testing.TB
	t       *testing.T
	b       *backend
	storage *watchedStorage
	system  *logical.StaticSystemView
	log     *lockedBuffer
	events  *vaultEvents
	change  func(*backend) // applied to each new backend before Setup is used

	mu        sync.Mutex
	told      bytes.Buffer // every answer but those of creds/
	exercised map[string]bool
}

func newMount(t *testing.T) *mount {
	t.Helper()
	m := &mount{
		TB: t, t: t, storage: &watchedStorage{Storage: logical.NewStorageView(&logical.InmemStorage{}, "logical/mount/"), secrets: map[string]string{}},
		system: &logical.StaticSystemView{
			DefaultLeaseTTLVal: time.Hour, MaxLeaseTTLVal: 24 * time.Hour, VersionString: "1.21.0",
			PluginEnvironment: &logical.PluginEnvironment{VaultVersion: "1.21.0"},
			PasswordPolicies: map[string]logical.PasswordGenerator{
				"words": func() (string, error) { return "policy-" + uuid.NewString(), nil },
			},
		},
		log: &lockedBuffer{}, events: &vaultEvents{}, exercised: map[string]bool{},
	}
	m.start()
	t.Cleanup(func() {
		m.b.Cleanup(context.Background())
		m.findSecrets()
	})
	return m
}

// vaultEvents is a Vault that takes events.
type vaultEvents struct {
	mu   sync.Mutex
	sent []vaultEvent
}

type vaultEvent struct {
	id, kind string
	metadata map[string]any
}

func (v *vaultEvents) SendEvent(_ context.Context, kind logical.EventType, e *logical.EventData) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.sent = append(v.sent, vaultEvent{e.GetId(), string(kind), e.GetMetadata().AsMap()})
	return nil
}

// of are the events of a kind.
func (v *vaultEvents) of(kind string) (out []vaultEvent) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, e := range v.sent {
		if e.kind == kind {
			out = append(out, e)
		}
	}
	return out
}

func (v *vaultEvents) text() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return fmt.Sprint(v.sent)
}

// start makes a backend on the mount's storage, as after an unseal or a crash.
func (m *mount) start() {
	m.Helper()
	made, err := Factory(context.Background(), &logical.BackendConfig{
		Logger: hclog.New(&hclog.LoggerOptions{
			Output: m.log, Level: hclog.Trace, Mutex: &sync.Mutex{},
		}),
		System: m.system, StorageView: m.storage, BackendUUID: "b", Config: map[string]string{}, EventsSender: m.events,
	})
	require.NoError(m, err)
	m.b = made.(*backend)
	if m.change != nil {
		m.change(m.b)
	}
	require.NoError(m, m.b.Initialize(context.Background(), &logical.InitializationRequest{Storage: m.storage}))
}

func (m *mount) restart() {
	m.Helper()
	m.b.Cleanup(context.Background())
	m.start()
}

// reply is what a client sees of an answer.
type reply struct {
	code     int // 200, 204, or that of the error
	message  string
	data     map[string]any
	warnings []string
	err      error
	took     time.Duration
}

// request is one that a client sends.
type request struct {
	op      logical.Operation
	path    string
	data    map[string]any
	id      string
	entity  string
	context context.Context
}

// write sends what `vault write` does: Vault asks first whether the thing
// exists, and makes it a create or an update.
func (m *mount) write(path string, data map[string]any) reply {
	m.Helper()
	return m.send(request{op: logical.UpdateOperation, path: path, data: data})
}

func (m *mount) read(path string) reply {
	m.Helper()
	return m.send(request{op: logical.ReadOperation, path: path})
}

func (m *mount) list(path string) reply {
	m.Helper()
	return m.send(request{op: logical.ListOperation, path: path})
}

func (m *mount) delete(path string) reply {
	m.Helper()
	return m.send(request{op: logical.DeleteOperation, path: path})
}

func (m *mount) patch(path string, data map[string]any) reply {
	m.Helper()
	return m.send(request{op: logical.PatchOperation, path: path, data: data})
}

// must sends a write that has to succeed.
func (m *mount) must(path string, data map[string]any) reply {
	m.Helper()
	r := m.write(path, data)
	require.Less(m, r.code, 300, "write %s: %s", path, r.message)
	return r
}

// creds reads what a role serves.
func (m *mount) creds(role string) map[string]any {
	m.Helper()
	r := m.read("creds/" + role)
	require.Equal(m, http.StatusOK, r.code, r.message)
	return r.data
}

func (m *mount) send(in request) reply {
	m.Helper()
	ctx := in.context
	if ctx == nil {
		ctx = context.Background()
	}
	if in.id == "" {
		in.id = uuid.NewString()
	}
	req := &logical.Request{
		Operation: in.op, Path: in.path, Data: in.data, Storage: m.storage, MountPoint: mountPoint,
		ID: in.id, EntityID: in.entity, DisplayName: "tester", ClientTokenAccessor: "accessor",
	}
	if in.data != nil {
		m.storage.note(m.b.secretFields, in.data)
	}
	began := time.Now()
	if in.op == logical.UpdateOperation {
		found, exists, err := m.b.HandleExistenceCheck(ctx, req)
		if err != nil {
			// Vault writes this error into its own log.
			_, _ = fmt.Fprintf(m.log, "existence check: %v\n", err)
			require.ErrorIs(m, err, logical.ErrUnsupportedPath, "vault answers 500 or logs it")
		}
		if found && !exists {
			req.Operation = logical.CreateOperation
		}
	}
	resp, err := m.b.HandleRequest(ctx, req)
	r := m.reply(req, resp, err)
	r.took = time.Since(began)
	m.check(req, resp, r)
	return r
}

// reply maps an answer to what Vault makes of it.
func (m *mount) reply(req *logical.Request, resp *logical.Response, err error) reply {
	code, shown := logical.RespondErrorCommon(req, resp, err)
	logical.AdjustErrorStatusCode(&code, shown)
	r := reply{code: code, err: err}
	if shown != nil {
		r.message = shown.Error()
	}
	if resp != nil {
		r.data, r.warnings = resp.Data, resp.Warnings
		if status, ok := resp.Data[logical.HTTPStatusCode].(int); ok { // a raw body
			r.code = status
		}
	}
	if r.code == 0 {
		r.code = http.StatusOK
		if resp == nil {
			r.code = http.StatusNoContent
		}
	}
	return r
}

var dynamicKey = regexp.MustCompile(`^([a-z]+(-[a-z]+)*/[^/]+|(node|consumer) .+)$`)

// check holds an answer to what its path declares.
func (m *mount) check(req *logical.Request, resp *logical.Response, r reply) {
	m.Helper()
	path := m.b.Route(req.Path)
	m.mu.Lock()
	if path != nil {
		m.exercised[path.Pattern+" "+string(req.Operation)] = true
	}
	serves := strings.HasPrefix(req.Path, "creds/") || strings.HasPrefix(req.Path, "data/")
	if !serves || r.code >= 300 {
		raw, err := json.Marshal(map[string]any{"data": r.data, "warnings": r.warnings, "message": r.message})
		require.NoError(m, err)
		_, _ = fmt.Fprintf(&m.told, "%s %s: %s\n", req.Operation, req.Path, raw)
	}
	m.mu.Unlock()
	if path == nil || path.Operations[req.Operation] == nil || r.err == logical.ErrReadOnly { //nolint:errorlint // Vault compares by identity
		return
	}
	declared := path.Operations[req.Operation].Properties().Responses
	// An empty list is Vault's own 404.
	if !(req.Operation == logical.ListOperation && r.code == http.StatusNotFound) && r.code != http.StatusInternalServerError {
		require.Contains(m, declared, r.code, "%s %s answers what it does not declare: %s", req.Operation, req.Path, r.message)
	}
	if r.code >= 300 {
		return
	}
	data := maps.Clone(r.data)
	for key, value := range data {
		if dynamicKey.MatchString(key) && !strings.HasPrefix(req.Path, "creds/") {
			require.IsType(m, "", value, "%s of %s is a line for a terminal", key, req.Path)
			delete(data, key)
		}
		if name, ok := strings.CutPrefix(req.Path, "creds/"); ok && key == m.role(name).Spec.PreviousField {
			delete(data, key) // the name is the role's own
		}
	}
	shown := resp
	if resp != nil {
		shown = &logical.Response{Data: data}
	}
	schema.ValidateResponse(m.t, schema.GetResponseSchema(m.t, path, req.Operation), shown, true)
}

// mostShapes is how many secrets are looked for in every form; of more it would take too
// long.
const mostShapes = 60

// findSecrets fails when a secret stands where it must not: in the log, in an
// answer or an error of any path but creds/, or in storage that is not sealed.
func (m *mount) findSecrets() {
	m.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	known := m.storage.known()
	texts := map[string]string{
		"the log": m.log.String(), "an answer": m.told.String(), "an event of Vault": m.events.text(), "storage that is not seal-wrapped": m.storage.openText(),
	}
	for secret, from := range known {
		shapes := map[string]string{"plain": secret}
		if len(known) <= mostShapes {
			shapes = leaks.Shapes(secret)
		}
		for where, text := range texts {
			for form, shape := range shapes {
				if i := strings.Index(text, shape); i >= 0 {
					m.Errorf("a secret (%s, %s) stands in %s: …%q…", from, form, where, text[max(0, i-200):min(len(text), i+len(shape)+20)])
				}
			}
		}
	}
}

// ended waits until a rotation is over and its header is closed.
func (m *mount) ended(id string) map[string]any {
	m.Helper()
	m.until(id, func(s rotation.State) bool { return s.Ended() })
	var data map[string]any
	require.Eventually(m, func() bool { data = m.read("rotations/" + id).data; return data["finished"] != nil }, patience, glance)
	return data
}

// fullHour is a daily schedule whose next slot is half a day away, so that none
// comes while a test runs, at whatever time that is.
func fullHour() string {
	return fmt.Sprintf("0 %d * * *", time.Now().UTC().Add(12*time.Hour).Hour())
}

// stored is everything that is stored, once nothing of what was answered is still
// being written: rotations that are over at each of their roles are closed behind
// the answer.
func (m *mount) stored(t testing.TB) (out map[string]string) {
	t.Helper()
	require.Eventually(t, func() bool {
		out = m.storage.dump(t)
		for key := range out {
			if id, ok := strings.CutPrefix(key, storage.Open); ok && !running(out, id) {
				return false
			}
		}
		return true
	}, patience, glance)
	return out
}

// running reports whether a stored role is in rotation id.
func running(stored map[string]string, id string) bool {
	for key, entry := range stored {
		if strings.HasPrefix(key, storage.Role) && strings.Contains(entry, fmt.Sprintf(`"run":{"rotation":%q`, id)) {
			return true
		}
	}
	return false
}

func (m *mount) until(id string, is func(rotation.State) bool) (data map[string]any) {
	m.Helper()
	require.Eventually(m, func() bool {
		r := m.read("rotations/" + id)
		data = r.data
		return r.code == http.StatusOK && is(rotation.State(data["state"].(string)))
	}, patience, glance)
	for field, value := range data {
		require.NotEqual(m, "", value, "%s is not known, and is printed as n/a", field)
	}
	return data
}

// role reads a role's entry.
func (m *mount) role(name string) *rotation.Role {
	m.Helper()
	r, err := rotation.NewStore(m.storage).Role(context.Background(), name)
	require.NoError(m, err)
	return r
}

// alter changes a role's entry behind the engine's back.
func (m *mount) alter(name string, change func(*rotation.Role)) {
	m.Helper()
	r := m.role(name)
	require.NotNil(m, r)
	next := *r
	change(&next)
	require.NoError(m, rotation.NewStore(m.storage).PutRole(context.Background(), r, &next))
}

// example is a request path that a pattern takes.
func example(p *framework.Path, kind, name string) string {
	return strings.NewReplacer("(?P<kind>[^/]+)", kind, namePattern, name, "(?P<id>[^/]+)", "0192-none", "/?$", "", "^", "", "$", "").Replace(p.Pattern)
}

func id(r reply) string {
	s, _ := r.data["rotation_id"].(string)
	return s
}

// watchedStorage counts what is asked of it, and knows every secret that was
// ever stored.
type watchedStorage struct {
	logical.Storage
	operations, writes atomic.Int64
	held               atomic.Pointer[hold]
	hanging            atomic.Int64 // writes that were held up

	mu      sync.Mutex
	secrets map[string]string
	open    bytes.Buffer
}

// hold holds up writes.
type hold struct {
	text     string
	released chan struct{}
}

// hang holds up every write that contains text until it is released.
func (s *watchedStorage) hang(text string) (release func()) {
	h := &hold{text: text, released: make(chan struct{})}
	s.held.Store(h)
	return func() { s.held.Store(nil); close(h.released) }
}

func (s *watchedStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	s.operations.Add(1)
	return s.Storage.Get(ctx, key)
}

func (s *watchedStorage) List(ctx context.Context, prefix string) ([]string, error) {
	s.operations.Add(1)
	return s.Storage.List(ctx, prefix)
}

func (s *watchedStorage) Delete(ctx context.Context, key string) error {
	s.operations.Add(1)
	s.writes.Add(1)
	return s.Storage.Delete(ctx, key)
}

func (s *watchedStorage) Put(ctx context.Context, e *logical.StorageEntry) error {
	s.operations.Add(1)
	s.writes.Add(1)
	if h := s.held.Load(); h != nil && bytes.Contains(e.Value, []byte(h.text)) {
		s.hanging.Add(1)
		<-h.released
	}
	s.mu.Lock()
	if slices.ContainsFunc(storage.SealWrapped(), func(p string) bool { return strings.HasPrefix(e.Key, p) }) {
		for _, found := range secretJSON.FindAllSubmatch(e.Value, -1) {
			s.noteLocked(string(found[1]), "stored in "+e.Key)
		}
	} else {
		s.open.Write(e.Value)
		s.open.WriteByte('\n')
	}
	s.mu.Unlock()
	return s.Storage.Put(ctx, e)
}

var secretJSON = regexp.MustCompile(`"secret":"([^"]*)"`)

// noteLocked remembers a secret. Short ones are words that stand everywhere.
func (s *watchedStorage) noteLocked(secret, from string) {
	if len(secret) >= 8 {
		s.secrets[secret] = from
	}
}

// note remembers the secrets of a request.
func (s *watchedStorage) note(fields map[string]bool, data map[string]any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for field, value := range data {
		if u, err := url.Parse(fmt.Sprint(value)); field == "url" && err == nil && strings.Trim(u.Path, "/") == "" {
			continue // the host alone is no secret
		}
		if v, ok := value.(string); ok && fields[field] && len(v) < 4096 {
			s.noteLocked(v, "given as "+field)
		}
	}
}

func (s *watchedStorage) known() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.secrets)
}

func (s *watchedStorage) openText() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open.String()
}

// dump is everything that is stored.
func (s *watchedStorage) dump(t testing.TB) map[string]string {
	t.Helper()
	out := map[string]string{}
	require.NoError(t, logical.ScanView(context.Background(), logical.NewStorageView(s.Storage, ""), func(key string) {
		e, err := s.Storage.Get(context.Background(), key)
		// The engine writes its barrier by itself, and nothing of a request's.
		if err == nil && e != nil && key != "barrier" {
			out[key] = string(e.Value)
		}
	}))
	return out
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// connect writes a connection to a private Redis.
func (m *mount) connect(name, address string, more map[string]any) reply {
	m.Helper()
	data := map[string]any{
		"type": "redis", "addresses": []string{address}, "username": servers.RedisAdmin, "password": servers.RedisAdminPassword,
		"allowed_roles": "*",
	}
	maps.Copy(data, more)
	return m.must("connections/"+name, data)
}

// users are ACL users for a private Redis: user-0 with password password-0-0,
// and so on.
func users(n int) servers.RedisOption {
	list := make([]string, n)
	for i := range list {
		list[i] = fmt.Sprintf("user-%d on >%s ~* +@all -@admin", i, password(i))
	}
	return servers.WithUsers(list...)
}

func password(i int) string { return fmt.Sprintf("password-%d-initial", i) }

// adopt makes a role of user-<i>.
func (m *mount) adopt(role, connection string, i int, more map[string]any) reply {
	m.Helper()
	data := map[string]any{
		"kind": "redis", "connection": connection, "username": fmt.Sprintf("user-%d", i), "initial_password": password(i),
	}
	maps.Copy(data, more)
	return m.must("roles/"+role, data)
}

// aclList is what a Redis knows of its users.
func aclList(t testing.TB, n *servers.RedisNode) []any {
	t.Helper()
	got, err := n.Do(context.Background(), "ACL", "LIST")
	require.NoError(t, err)
	lines := slices.Clone(got.([]any))
	slices.SortFunc(lines, func(a, b any) int { return strings.Compare(a.(string), b.(string)) })
	return lines
}

// canLogIn tries a user's password.
func canLogIn(t testing.TB, n *servers.RedisNode, user, password string) bool {
	t.Helper()
	c := n.Client()
	defer func() { _ = c.Close() }()
	err := c.Do(context.Background(), "AUTH", user, password).Err()
	if err != nil {
		require.ErrorContains(t, err, "WRONGPASS")
	}
	return err == nil
}

func proxy(t testing.TB, target string) *servers.Proxy {
	t.Helper()
	p, err := servers.NewProxy(target)
	require.NoError(t, err)
	t.Cleanup(func() { _ = p.Close() })
	return p
}
