// Package harmonyflow is a Vault secrets engine that rotates long-lived
// application secrets in place: it changes the credential at its target, proves
// that the new one works, serves it, and takes the old one away only after that.
//
// This package is the Vault API and nothing more: one path_*.go a path family,
// each of which decodes a request, calls into backend/, and encodes the answer.
// The rules are in backend/rotation.
package harmonyflow

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/buildinfo"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/consumer"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/metrics"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/notify"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
)

var _ logical.Factory = Factory

type backend struct {
	*framework.Backend

	storage     *storage.Fenced
	connections *connection.Store
	documents   *publish.Documents
	vaults      *vault.Clients
	remote      *publish.Remote
	consumers   *consumer.Store
	engine      *rotation.Engine
	metrics     *metrics.Metrics
	notifier    *notify.Notifier
	kinds       []kindEntry
	// connectionTypes is the registry of that name.
	connectionTypes []connectionType
	secretFields    map[string]bool

	// identities is held while a connection is compared with all others and
	// stored.
	identities sync.Mutex
	// notifications is held while one is changed.
	notifications sync.Mutex

	glimpses glimpses
	keySets  keySets

	// format is what is known of the format of what is stored.
	format formatCheck

	// answerWithin is the constant of that name, but in tests.
	answerWithin time.Duration
}

// stopTimeout is how long Clean waits for work under way. Vault waits for it
// while it seals or steps down.
const stopTimeout = 5 * time.Second

// Factory wires a backend. It reads and starts nothing: Vault also calls it to
// learn what the plugin is, without storage.
func Factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := newBackend(conf)
	if err := b.Setup(ctx, conf); err != nil {
		return nil, err
	}
	return b, nil
}

func newBackend(conf *logical.BackendConfig) *backend {
	b := &backend{kinds: kinds(), connectionTypes: connectionTypes(), answerWithin: answerWithin, metrics: metrics.New()}
	b.storage = storage.Fence(conf.StorageView)
	b.connections = connection.NewStore(b.storage, b.rootOf)
	b.documents = publish.NewDocuments(b.storage)
	b.vaults = vault.New(b.connections.Must, conf.Logger)
	b.remote = publish.NewRemote(b.vaults)
	b.consumers = consumer.NewStore(b.storage)
	clusters := consumer.New(consumer.Options{Entry: b.connections.Must, MayCall: b.mayCall, Sources: b.secretOf})
	b.notifier = notify.New(notify.Options{
		Storage: b.storage, Logger: conf.Logger, Rotations: rotation.NewStore(b.storage), MayCall: b.mayCall, Active: b.active,
		Standings: func(ctx context.Context, f func(string, rotation.Standing)) error {
			return b.engine.EachStanding(ctx, f)
		},
		Found: b.event, Sent: b.metrics.Sent,
	})
	b.engine = rotation.New(rotation.Options{
		Storage:    b.storage,
		Logger:     conf.Logger,
		Kind:       b.kind,
		Target:     b.target,
		Keeper:     b.keeper,
		Generation: b.connections.Generation,
		Permit:     b.permit,
		Source:     source{b},
		Publish:    b.documents.Publish,
		PublishTo:  b.remote.Publish,
		Reach:      b.reach,
		Consumers:  deliverer{b.consumers, clusters},
		Recorder:   watchers{b.metrics, b.notifier},
		Active:     b.active,
	})
	b.Backend = &framework.Backend{
		Help:           strings.TrimSpace(backendHelp),
		BackendType:    logical.TypeLogical,
		RunningVersion: buildinfo.Version,
		PathsSpecial:   &logical.Paths{SealWrapStorage: storage.SealWrapped(), Unauthenticated: []string{jwksPath + "*"}},
		Paths: framework.PathAppend(
			b.pathConfig(),
			b.pathConnections(),
			b.pathRotateRoot(),
			b.pathConsumers(),
			b.pathRoles(),
			b.pathDeleted(),
			b.pathRestore(),
			b.pathCreds(),
			b.pathDocuments(),
			b.pathData(),
			b.pathMetadata(),
			b.pathJWKS(),
			b.pathRotate(),
			b.pathEmergency(),
			b.pathRotations(),
			b.pathRollback(),
			b.pathResume(),
			b.pathRetire(),
			b.pathAck(),
			b.pathReconcile(),
			b.pathVerify(),
			b.pathStatus(),
			b.pathMetrics(),
			b.pathNotifications(),
		),
		InitializeFunc: b.initialize,
		PeriodicFunc:   b.periodic,
		Clean:          b.clean,
		Invalidate:     b.invalidate,
	}
	b.secretFields = secretFields(b.Paths)
	return b
}

// initialize runs after unseal and after the plugin was restarted. What was
// interrupted is found in the background.
func (b *backend) initialize(ctx context.Context, _ *logical.InitializationRequest) error {
	b.revive(ctx)
	return nil
}

// revive starts what works by itself, where what is stored is understood.
func (b *backend) revive(ctx context.Context) {
	if !b.understood(ctx) {
		return
	}
	b.engine.Tick()    //nolint:contextcheck // what it starts outlives the call
	b.notifier.Start() //nolint:contextcheck // as above
	b.renewTokens()
}

// periodic runs about once a minute, and is what revives the engine after its
// process was killed.
func (b *backend) periodic(ctx context.Context, _ *logical.Request) error {
	b.revive(ctx)
	return nil
}

// renewTokens keeps the tokens of connections alive, on the node that uses them.
func (b *backend) renewTokens() {
	if b.active() {
		b.vaults.Renew(b.connections.All, b.connections.Changes)
	}
}

func (b *backend) clean(context.Context) {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	err := b.engine.Stop(ctx)                    //nolint:contextcheck // the context that Vault gives ends when it likes
	if err := b.notifier.Stop(ctx); err != nil { //nolint:contextcheck // as above
		b.Logger().Warn(err.Error())
	}
	b.vaults.Close(ctx)  //nolint:contextcheck // as above
	b.storage.Close(ctx) //nolint:contextcheck // as above
	if err != nil {
		b.Logger().Warn(err.Error())
	}
}

func (b *backend) invalidate(ctx context.Context, key string) {
	if key == storage.Config {
		if _, err := b.engine.LoadConfig(ctx); err != nil {
			b.Logger().Warn("the configuration cannot be read again", "error", err)
		}
	}
}

// active reports whether this node may write and rotate: only the active node of
// a primary, and not while the mount is being taken away (its storage is about
// to be erased).
func (b *backend) active() bool {
	sys := b.System()
	if sys.Tainted() {
		return false
	}
	state := sys.ReplicationState()
	if state.HasState(consts.ReplicationPerformanceStandby | consts.ReplicationDRSecondary) {
		return false
	}
	return !state.HasState(consts.ReplicationPerformanceSecondary) || sys.LocalMount()
}

// source is randomness, and Vault's password policies.
type source struct{ b *backend }

func (s source) Read(p []byte) (int, error) { return s.b.GetRandomReader().Read(p) }

func (s source) FromPolicy(ctx context.Context, policy string) (string, error) {
	password, err := s.b.System().GeneratePasswordFromPolicy(ctx, policy)
	if err != nil {
		return "", fmt.Errorf("password policy %q cannot be used; read sys/policies/password/%s: %w", policy, policy, err)
	}
	return password, nil
}

var _ kind.Source = source{}

const backendHelp = `
HarmonyFlow rotates long-lived application secrets in place: passwords of
servers, API keys and tokens. It changes a credential at its target, proves by a
login at every node that the new one works, serves it at creds/<role>, keeps the
old one accepted for a grace period, and takes it away only after that. Every
step is stored before it is taken, so that nothing is lost whatever crashes.

Start with connections/<name> (how to reach a server with admin rights) and
roles/<name> (one secret); then write rotate/<kind>/<name>.
`
