package kube

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"
)

// auditPolicy has the API server write down what service accounts ask of it, and
// nothing of what administrators do.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- {level: Metadata, userGroups: ["system:serviceaccounts"]}
- {level: None}
`

// Request is one that the API server has answered.
type Request struct {
	Agent, Verb, Resource, Name string
	DryRun                      bool
	Code                        int
	At                          time.Time
}

func (r Request) String() string {
	if r.DryRun {
		return "dry-run " + r.Verb + " " + r.Resource
	}
	return r.Verb + " " + r.Resource
}

// Requests are those of a service account, by the audit log of the API server.
func (c *Cluster) Requests(namespace, account string) ([]Request, error) {
	f, err := os.Open(c.file("audit.log"))
	if err != nil {
		return nil, fmt.Errorf("read the audit log of a cluster: %w", err)
	}
	defer func() { _ = f.Close() }()
	var out []Request
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e struct {
			Verb, UserAgent, RequestURI string
			StageTimestamp              time.Time
			User                        struct{ Username string }
			ObjectRef                   struct{ Resource, Name string }
			ResponseStatus              struct{ Code int }
		}
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return nil, fmt.Errorf("read the audit log of a cluster: %w", err)
		}
		if e.User.Username == "system:serviceaccount:"+namespace+":"+account {
			out = append(out, Request{
				Agent: e.UserAgent, Verb: e.Verb, Resource: e.ObjectRef.Resource, Name: e.ObjectRef.Name,
				DryRun: strings.Contains(e.RequestURI, "dryRun="), Code: e.ResponseStatus.Code, At: e.StageTimestamp,
			})
		}
	}
	return out, lines.Err()
}
