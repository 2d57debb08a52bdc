package redis

import (
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// What persistence may be.
const (
	PersistAuto    = "auto"
	PersistACL     = "acl-save"
	PersistRewrite = "config-rewrite"
	PersistNone    = "none"
)

var (
	aclSave       = command{"ACL", "SAVE"}
	configRewrite = command{"CONFIG", "REWRITE"}
)

// persistence returns the command that makes the users of n survive its
// restart, nil where the connection wants none, or why there is none.
//
// With an aclfile only ACL SAVE saves users; CONFIG REWRITE answers OK there
// and saves none of them.
func (n *node) persistence(mode string) (command, error) {
	f := n.facts
	switch mode {
	case PersistNone:
		return nil, nil
	case PersistACL:
		if f.configKnown && f.aclFile == "" {
			return nil, kind.Definitely("node %s has no aclfile, which persistence=acl-save needs: set persistence=auto", n.name)
		}
		return aclSave, nil
	case PersistRewrite:
		if f.aclFile != "" {
			return nil, kind.Definitely("node %s keeps its users in an aclfile, which persistence=config-rewrite does not save: set persistence=auto", n.name)
		}
	default:
		if !f.configKnown {
			return nil, kind.Definitely("node %s does not say where it saves its users: grant CONFIG GET to the admin user, or set persistence", n.name)
		}
		if f.aclFile != "" {
			return aclSave, nil
		}
	}
	if f.configFile == "" {
		return nil, kind.Definitely("node %s runs without a configuration file or an aclfile and would forget a change at its restart: give it one, or set persistence=none", n.name)
	}
	return configRewrite, nil
}

// explainPersist says why a change could not be saved.
func (s *session) explainPersist(err error, c command) error {
	what := c[0].(string) + " " + c[1].(string)
	if replyCode(err) != "ERR" {
		return s.explain(err, "run "+what, "")
	}
	for cause, advice := range map[string]string{
		// A single file that is mounted cannot be replaced (redis#12084).
		"Device or resource busy":    "its configuration file is mounted as a single file: mount the directory that holds it",
		"Permission denied":          "it may not write to the directory of its configuration file: make that writable for the server",
		"Read-only file system":      "its configuration is on a read-only file system: put it on a writable one",
		"No space left":              "its disk is full: free some space",
		"without a config file":      "it runs without a configuration file: start it with one",
		"not configured to use an":   "it has no aclfile: set persistence=auto",
		"error trying to save the A": "its log says why: often the aclfile is mounted as a single file (mount its directory), or the directory is not writable",
	} {
		if strings.Contains(err.Error(), cause) {
			return kind.Definitely("node %s cannot save its users with %s, because %s", s.node, what, advice)
		}
	}
	return kind.Definitely("node %s cannot save its users with %s: look at its log", s.node, what)
}
