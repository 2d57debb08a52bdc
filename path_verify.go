package harmonyflow

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/version"
)

func (b *backend) pathVerify() []*framework.Path {
	fields := map[string]*framework.FieldSchema{"kind": kindField, "name": nameField}
	return []*framework.Path{{
		Pattern: "verify/(?P<kind>[^/]+)/" + namePattern,
		Fields:  fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: operation{
				call: b.verify, summary: "Ask the target, now, what it accepts.", verb: "verify", suffix: "role", errors: []int{404},
				fields: map[string]*framework.FieldSchema{
					"ok": boolField("Whether everything is as it should be."), "summary": stringField("In a sentence."),
					"follow": stringField("The next command to type."), "state": stringField("State of the role."),
					"version": intField("Current version."), "checks": {Type: framework.TypeSlice, Description: "One entry a node: what it accepts, by version."},
					"notes":                  listField("Worth knowing."),
					"consumers":              {Type: framework.TypeSlice, Description: "One entry a consumer, as at rotations/<id>: stores, external_secrets, secrets, workloads, pods and checks as they are now. Checks that would change something are not made. What does not answer within 25 seconds is told as an error of its consumer."},
					"sessions":               stringField("Who may still be logged in with the previous version, in a sentence."),
					"previous_sessions":      intField("How many sessions there are of that kind; absent where nobody can tell."),
					"previous_clients":       mapField("How many of them each client has, by address and name."),
					"key_version":            intField("Newest version of the key, of a transit role."),
					"min_decryption_version": intField("Oldest version of the key that decrypts, of a transit role."),
				},
			}.handler(fields),
		},
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis: "A live list of what each node accepts, and of what consumers run with.",
		HelpDescription: `Logs in at every node with every version that is kept, and says which are accepted. Beside the fields below
there is one line a node, named after it. Of each consumer of the role it is told whether External Secrets can read from
Vault, whether the Secrets hold what is served (by key, never the values), whether the workloads are complete and their
pods from after the last change, and whether the checks that only read pass. Nothing is changed.`,
	}}
}

func (b *backend) verify(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := b.roleOf(ctx, d)
	if err != nil {
		return nil, err
	}
	rep, err := b.engine.LookAt(ctx, r.Name)
	if err != nil {
		return nil, err
	}
	if isKept(rep.Role) {
		return &logical.Response{Data: verifyKept(rep, req.MountPoint)}, nil
	}
	data := map[string]any{"state": rep.Role.State(), "version": currentNumber(rep.Role), "notes": orEmpty(rep.Notes)}
	checks := make([]any, 0, len(rep.Nodes))
	allGood := rep.Err == nil
	for _, n := range rep.Nodes {
		good, line := nodeLine(rep.Role, n)
		allGood = allGood && good
		data["node "+n.Node] = line
		checks = append(checks, map[string]any{"node": n.Node, "ok": good, "accepts": n.Accepted, "unknown": int64(n.Unknown), "detail": line})
	}
	data["ok"], data["checks"] = allGood, checks
	data["summary"], data["follow"] = verdict(rep, allGood, req.MountPoint)
	describeSessions(rep, data)
	describeConsumersNow(rep, req.MountPoint, data)
	return &logical.Response{Data: data}, nil
}

// describeSessions says who may still be logged in with the previous version.
func describeSessions(rep rotation.Report, data map[string]any) {
	if rep.Sessions == nil {
		return
	}
	if rep.Sessions.Err != nil {
		data["sessions"] = "not known: " + rep.Sessions.Err.Error()
		return
	}
	clients := map[string]any{}
	for _, s := range rep.Sessions.Sessions {
		who := cmp.Or(s.Client, "unknown address")
		if s.Name != "" {
			who += " (" + s.Name + ")"
		}
		n, _ := clients[who].(int64)
		clients[who] = n + 1
	}
	n := len(rep.Sessions.Sessions)
	data["previous_sessions"], data["previous_clients"] = int64(n), clients
	since := ""
	if rep.Older {
		since = " from before the promotion"
	}
	data["sessions"] = fmt.Sprintf("%s of user %q%s", count(n, "session"), rep.SessionsOf, since)
	if n > 0 {
		data["sessions"] = fmt.Sprintf("%s: %s", data["sessions"], strings.Join(slices.Sorted(maps.Keys(clients))[:min(len(clients), maxClients)], ", "))
	}
}

// maxClients bounds how many clients a line names.
const maxClients = 8

func verdict(rep rotation.Report, good bool, mount string) (summary, follow string) {
	r := rep.Role
	creds := fmt.Sprintf("vault read %screds/%s", mount, r.Name)
	switch {
	case good && len(rep.Nodes) == 0:
		return fmt.Sprintf("version %d is served; no server holds this secret", currentNumber(r)), creds
	case good:
		return fmt.Sprintf("version %d is accepted at %d of %s", currentNumber(r), len(rep.Nodes), count(len(rep.Nodes), "node")), creds
	case rep.Err != nil:
		return rep.Err.Error(), fmt.Sprintf("vault write -f %sreconcile/%s/%s", mount, r.Kind, r.Name)
	}
	return "some nodes differ from what is stored", fmt.Sprintf("vault write -f %sreconcile/%s/%s", mount, r.Kind, r.Name)
}

// nodeLine says what a node accepts, and whether that is what it should.
func nodeLine(r *rotation.Role, n rotation.NodeReport) (good bool, line string) {
	if n.Err != nil {
		return false, "no answer: " + n.Err.Error()
	}
	words := make([]string, 0, len(n.Accepted))
	current := false
	for _, number := range n.Accepted {
		stage := version.Stage("?")
		if v := r.Get(number); v != nil {
			stage = v.Stage
		}
		current = current || stage == version.Current
		good = good || stage == version.Current
		words = append(words, fmt.Sprintf("version %d (%s)", number, stage))
	}
	line = "accepts " + strings.Join(words, " and ")
	if len(words) == 0 {
		line = "accepts no version that is kept"
	}
	if n.Unknown != 0 {
		line += "; accepts passwords that this engine does not know"
	}
	if n.Problem != "" {
		line += "; " + n.Problem
	}
	expected := 1
	if p, _ := r.PreviousServed(); p != nil {
		expected = 2
	}
	good = current && n.Unknown == 0 && n.Problem == "" && (r.Run != nil || len(n.Accepted) == expected)
	return good, line
}
