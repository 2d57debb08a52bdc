package rabbitmq

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// ValidateConfig refuses rabbitmq fields of a connection that cannot work, with
// one sentence that names the field. It repeats no URL: one may hold a password.
func ValidateConfig(c *connection.RabbitMQ) error {
	if c == nil || len(c.ManagementURLs) == 0 {
		return fmt.Errorf("management_urls is empty: give the URL of at least one management API, such as https://rabbitmq.example.com:15671")
	}
	for _, text := range c.ManagementURLs {
		u, err := url.Parse(text)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || !bare(u) {
			return fmt.Errorf("management_urls holds what is not http(s)://host:port, with a path at most: give no credentials and no query in it")
		}
	}
	for _, text := range c.AMQPURLs {
		u, err := url.Parse(text)
		if err != nil || u.Scheme != "amqp" && u.Scheme != "amqps" || !bare(u) || strings.Trim(u.Path, "/") != "" {
			return fmt.Errorf("amqp_urls holds what is not amqp(s)://host:port: give no credentials, path or query in it, and vhosts in the field of that name")
		}
	}
	if slices.Contains(c.VHosts, "") {
		return fmt.Errorf("vhosts holds an empty name: the first vhost of a broker is called /")
	}
	return nil
}

func bare(u *url.URL) bool {
	return u.Hostname() != "" && !strings.ContainsAny(u.Hostname(), "[]") && u.User == nil && u.RawQuery == "" && u.Fragment == "" && u.Opaque == ""
}

// Verify logs in to the management API of a connection and looks at every
// broker. It fails when rotations through this connection could not work.
func Verify(ctx context.Context, entry *connection.Entry) (*connection.Info, error) {
	seen := *entry
	seen.Members = nil // a connection that is written may lead to another cluster
	c, err := discover(ctx, &seen, nil)
	if err != nil {
		return nil, err
	}
	defer c.close()
	info := &connection.Info{
		Identity: "rabbitmq:" + c.id, Members: append([]string{c.id}, entry.RabbitMQ.Hosts()...),
	}
	for _, err := range c.apiErrs {
		info.Warnings = append(info.Warnings, err.Error())
	}
	if len(c.split) > 0 {
		info.Warnings = append(info.Warnings, "the cluster has come apart: bring it together again before anything is rotated")
	}
	if c.hanging {
		info.Warnings = append(info.Warnings, "a broker of the cluster hangs: start it again before anything is rotated")
	}
	if given := len(entry.RabbitMQ.AMQPURLs); given > 0 && given < len(c.members) {
		info.Warnings = append(info.Warnings, fmt.Sprintf(
			"amqp_urls names %d for a cluster of %d brokers: a login is tried at those alone, so name every broker", given, len(c.members)))
	}
	each(len(c.nodes), func(i int) { c.greet(ctx, c.nodes[i]) })
	for _, n := range c.nodes {
		note := "RabbitMQ " + c.version
		if n.err != nil {
			if kind.IsDefinite(n.err) {
				return nil, n.err
			}
			note = "no answer"
			info.Warnings = append(info.Warnings, n.err.Error())
		}
		info.Nodes = append(info.Nodes, connection.Node{Name: n.name, Note: note})
	}
	info.Summary = fmt.Sprintf("RabbitMQ %s, %d nodes", c.version, len(c.nodes))
	if len(c.nodes) == 1 {
		info.Summary = fmt.Sprintf("RabbitMQ %s, 1 node", c.version)
	}
	slices.Sort(info.Members)
	info.Members = slices.Compact(info.Members)
	return info, nil
}

// greet makes sure that AMQP is spoken at n: a login of nobody is refused. The
// admin's own credential is for the management API, and is not sent there.
func (c *cluster) greet(ctx context.Context, n *node) {
	if n.err == nil {
		nobody := kind.Material{Username: "harmonyflow-nobody", Secret: rand.Text()}
		_, n.err = logIn(ctx, n.name, n.endpoint, c.entry.TLS, nobody, somewhere)
	}
}
