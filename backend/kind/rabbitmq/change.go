package rabbitmq

import (
	"context"
	"fmt"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// Change implements kind.Target. Hashes alone travel.
func (t *target) Change(ctx context.Context, changes []kind.Change) []kind.Outcome {
	outcomes := make([]kind.Outcome, len(changes))
	users := make([]kind.User, len(changes))
	for i, ch := range changes {
		users[i] = ch.User
	}
	c, err := t.discover(ctx, users)
	if err != nil {
		for i := range outcomes {
			outcomes[i].Err = err
		}
		return outcomes
	}
	defer c.close()
	each(len(changes), func(i int) {
		err := c.change(ctx, changes[i])
		for _, n := range c.nodes {
			out := kind.NodeError{Node: n.name, Err: n.err}
			if err != nil && (n.err == nil || kind.IsDefinite(err)) {
				out.Err = err
			}
			outcomes[i].Nodes = append(outcomes[i].Nodes, out)
		}
	})
	return outcomes
}

// change makes one change true. The user is read first: a broker that hangs
// already never gets to see the change, and the request would create a user that
// does not exist. It is read again afterwards, because a broker stores whatever
// hash it is given.
func (c *cluster) change(ctx context.Context, ch kind.Change) error {
	u, err := c.user(ctx, ch.Username)
	if err != nil {
		return err
	}
	due, secret, err := plan(ch, u)
	if err != nil || !due {
		return err
	}
	if c.hanging {
		return fmt.Errorf("a broker of the cluster of %s hangs, so that a change would be carried out at an unknown time: "+
			"nothing was changed, wait until the others take that broker for dead, or stop it", c.name)
	}
	var hash string
	algorithm := u.next()
	if secret != "" {
		if hash, err = passwordHash(algorithm, secret); err != nil {
			return err
		}
	}
	if err := c.put(ctx, u, algorithm, hash); err != nil {
		if kind.IsUnreachable(err) { // it may have heard: nobody must be passed over for this
			err = &kind.Error{Class: kind.Unavailable, Err: err}
		}
		return err
	}
	after, err := c.user(ctx, ch.Username)
	if err != nil {
		return err
	}
	if after.Hash != hash || after.algorithm() != algorithm {
		return fmt.Errorf("management API %s shows another password for user %s than the one that was just set: see to it that nobody else changes it", c.name, ch.Username)
	}
	return nil
}

// plan says whether u has to be changed for c to be true of it, and to which
// password; "" for none at all.
func plan(c kind.Change, u user) (due bool, secret string, err error) {
	if !u.exists {
		return false, "", kind.Definitely("%s", errNobody(c.Username))
	}
	if u.next() == "" {
		return false, "", kind.Definitely("%s", u.strange())
	}
	for _, m := range c.Accept {
		switch {
		case m.Secret == "":
			return false, "", kind.Definitely("%w", errNoPassword)
		case secret != "" && secret != m.Secret:
			return false, "", kind.Definitely("user %s cannot have two passwords at once: rotate its role with strategy swap", c.Username)
		}
		secret = m.Secret
	}
	if secret != "" {
		return !u.has(secret), secret, nil
	}
	if c.Exclusive {
		return u.Hash != "", "", nil
	}
	for _, m := range c.Refuse {
		if u.has(m.Secret) {
			return true, "", nil
		}
	}
	return false, "", nil
}

// strange says that the password of u is hashed by an extension of the broker.
func (u user) strange() string {
	return "the password of user " + u.Name + " is hashed in a way that is not known here: set it once with rabbitmqctl change_password and the hashing module that comes with RabbitMQ"
}
