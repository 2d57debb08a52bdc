// Package consumer brings a changed secret to what uses it in a namespace of a
// Kubernetes cluster, and proves that every pod runs with it: ExternalSecrets are
// forced to sync and the Secrets compared with what is served, workloads are
// restarted in waves, and pods, rollouts and checks are looked at.
//
// Every step is a call that does what can be done now and says whether that was
// all. It keeps nothing: what was done is read from the cluster, by the id of the
// delivery that stands in annotations, so that whoever comes next goes on. It knows
// no rotation and no target.
package consumer

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/seen"
)

// Mode is who restarts the workloads of a consumer.
type Mode string

// The modes: the engine restarts, it waits for somebody else to (Reloader, Vault
// Secrets Operator, …), or nobody has to, because the workloads read the Secret
// themselves.
const (
	Restart Mode = "restart"
	Observe Mode = "observe"
	None    Mode = "none"
)

// Consumer is a stored consumer.
type Consumer struct {
	Name         string   `json:"name"`
	Connection   string   `json:"connection"`
	Namespace    string   `json:"namespace"`
	AllowedRoles []string `json:"allowed_roles,omitempty"`
	// ExternalSecrets and Secrets are names, or label selectors (app=web). The
	// Secrets of the ExternalSecrets are compared without being named.
	ExternalSecrets []string `json:"external_secrets,omitempty"`
	Secrets         []string `json:"secrets,omitempty"`
	// Workloads are waves: those of one are restarted together, after those of the
	// one before are proven.
	Workloads      [][]Workload  `json:"workloads,omitempty"`
	Mode           Mode          `json:"mode"`
	Checks         []Check       `json:"checks,omitempty"`
	Hooks          []Hook        `json:"hooks,omitempty"` // of emergencies
	RolloutTimeout time.Duration `json:"rollout_timeout"`
	Stabilization  time.Duration `json:"stabilization"`
	MaxParallel    int           `json:"max_parallel,omitempty"` // 0: a whole wave
	// RestartOperator is the Deployment (namespace/name) of External Secrets, that is
	// restarted where an ExternalSecret ignores being forced; "": it is not.
	RestartOperator string `json:"restart_operator,omitempty"`
}

// Workload is one that is restarted, or those that a selector finds.
type Workload struct {
	Kind     string `json:"kind"` // Deployment, StatefulSet, DaemonSet
	Name     string `json:"name,omitempty"`
	Selector string `json:"selector,omitempty"`
}

// Check is one thing that has to be true after the restart.
type Check struct {
	Type    string `json:"type"` // http, logs, prometheus, pods
	URL     string `json:"url,omitempty"`
	Service string `json:"service,omitempty"` // scheme:name:port, through the API server
	Method  string `json:"method,omitempty"`
	Path    string `json:"path,omitempty"`
	Body    string `json:"body,omitempty"`
	// Headers may hold {{role.field}}; BasicAuth is a role with a user.
	Headers   map[string]string `json:"headers,omitempty"`
	BasicAuth string            `json:"basic_auth,omitempty"`
	CACert    string            `json:"ca_cert,omitempty"` // PEM; "": what the system trusts
	Expect    string            `json:"expect,omitempty"`
	Selector  string            `json:"selector,omitempty"`
	Forbid    string            `json:"forbid,omitempty"`
	Query     string            `json:"query,omitempty"`
	Times     int               `json:"times,omitempty"`
	Timeout   time.Duration     `json:"timeout,omitempty"`
}

// Delivery is one time that a change is brought to a consumer. The way back of a
// rotation is another one.
type Delivery struct {
	// ID is the same for every step and every try, and no other delivery's. What
	// comes before its last "-" is that of the rotation, whose way back has another.
	ID string
	// Since is when what is to be delivered could be read.
	Since time.Time
	// Holds has to stand in the consumer's Secrets, and Lacks must not any more.
	Holds, Lacks []Value
	// Undone, on the way back, is what was served between; Holds is what was before.
	Undone []Value
	// Emergency, when set, is what else is to be done: what was served before was
	// compromised, is refused by now, and there is no way back.
	Emergency *Emergency
	// Sure: a look counts only pods that are sure to run with what is to stand there:
	// those that this delivery, or with the ID of a rotation one of it, has restarted,
	// and those that began after their Secrets last changed. It makes no checks.
	Sure bool
}

// Emergency is what a delivery after a compromise does beyond what every one does.
type Emergency struct {
	// Whole: every workload of the namespace is restarted, whoever names it.
	Whole bool
	// Hooks are the names of those that are called; nil: all, and of an empty list none.
	Hooks []string
}

// Value is what a role serves, or no longer does. It prints as its role alone.
type Value struct {
	Role   string
	Field  string // what it is called where it is published; "" where that is not known
	Secret string
}

// Format implements fmt.Formatter for every verb.
func (v Value) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, v.Role+": (secret)") }

// Finding is what a look found before anything is changed.
type Finding struct {
	// Err, when set, is why no answer could be had.
	Err error
	// Problems are definite reasons against a delivery, each a sentence that says
	// what to do.
	Problems []string
	// Notes are worth telling and no reason to stop.
	Notes []string
	// Plan is what a delivery would do, in order, a line each.
	Plan []string
}

// Progress is how far a step is.
type Progress struct {
	Done bool
	// Err, when set, is why the step is not done: definite (kind.IsDefinite) where
	// waiting does not help. Without it, and not Done, Waits says for what it waits.
	Err   error
	Waits string
	// Told is what was done and seen by this call, a line each, without secrets.
	Told []string
	// Seen is the same of every object, as far as the call looked.
	Seen *seen.Consumer
}

// Clusters are the steps. Each is idempotent, bounded by its context, and may be
// called again at any time; none waits for what takes long.
type Clusters interface {
	Preflight(ctx context.Context, c *Consumer) Finding
	// Radius changes nothing either. It says what an emergency would do, and in Notes
	// what would stand against it.
	Radius(ctx context.Context, c *Consumer, e Emergency) Finding
	Sync(ctx context.Context, c *Consumer, d Delivery) Progress
	Restart(ctx context.Context, c *Consumer, d Delivery) Progress
	Check(ctx context.Context, c *Consumer, d Delivery) Progress
	// Look shows how things stand, changes nothing, and answers with what it could see
	// until the context ended. The ID of its delivery is that of the rotation that made
	// what is served, and Since when the Secrets got it, zero where nobody knows.
	Look(ctx context.Context, c *Consumer, d Delivery) *seen.Consumer
}
