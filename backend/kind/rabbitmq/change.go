package rabbitmq

import (
	"context"
	"fmt"
	"slices"

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
	errs := make([]error, len(changes))
	do := func(i int) { outcomes[i].Notes, errs[i] = c.change(ctx, changes[i]) }
	own := func(i int) bool { return changes[i].Username == c.login.Username }
	each(len(changes), func(i int) {
		if !own(i) {
			do(i)
		}
	})
	for i := range changes { // last, because it takes the login of the others away
		if own(i) {
			do(i)
		}
	}
	for i, err := range errs {
		outcomes[i].Nodes = c.outcome(err)
	}
	c.closeSessions(ctx, changes, outcomes, errs)
	return outcomes
}

// outcome says for each node that a change ended with err.
func (c *cluster) outcome(err error) []kind.NodeError {
	out := make([]kind.NodeError, len(c.nodes))
	for i, n := range c.nodes {
		out[i] = kind.NodeError{Node: n.name, Err: n.err}
		if err != nil && (n.err == nil || kind.IsDefinite(err)) {
			out[i].Err = err
		}
	}
	return out
}

// work is what a change comes to.
type work struct {
	kind.Change
	user    user
	create  bool
	begun   bool // the user exists as one that is incomplete
	newHash bool
	secret  string     // to be hashed, "" for no password at all
	align   *alignment // nil where rights stay as they are
}

func (w *work) due() bool { return w.create || w.newHash || w.align.due() }

// change makes one change true. The user is read first: a broker that hangs
// already never gets to see the change, and the request would create a user that
// does not exist. It is read again afterwards, because a broker stores whatever
// hash it is given.
func (c *cluster) change(ctx context.Context, ch kind.Change) (notes []string, err error) {
	w, err := c.prepare(ctx, ch)
	if err != nil || !w.due() {
		return nil, err
	}
	if c.hanging {
		return nil, fmt.Errorf("a broker of the cluster of %s hangs, so that a change would be carried out at an unknown time: "+
			"nothing was changed, wait until the others take that broker for dead, or stop it", c.name)
	}
	if err := c.carryOut(ctx, w); err != nil {
		return nil, err
	}
	if w.create || w.align.due() {
		notes = append(notes, w.align.note(ch, w.create))
	}
	return notes, nil
}

// prepare finds out what there is to do, and changes nothing.
func (c *cluster) prepare(ctx context.Context, ch kind.Change) (*work, error) {
	u, err := c.user(ctx, ch.Username)
	if err != nil {
		return nil, err
	}
	w := &work{Change: ch, user: u}
	switch {
	case u.there():
	case len(ch.Accept) > 0 && len(ch.Profile) > 0:
		w.create, w.begun = true, u.exists && u.Hash == "" && sameTags(u.Tags, tags{tagIncomplete})
		w.user = user{Name: ch.Username, Algorithm: hashSHA256, Tags: u.Tags, Limits: u.Limits, exists: u.exists}
	case len(ch.Accept) > 0 || !u.exists && ch.Exists():
		return nil, kind.Definitely("%s", u.absent(ch.Username))
	case !u.exists:
		return w, nil // who is not there is refused
	}
	if w.newHash, w.secret, err = plan(ch, w.user); err != nil {
		return nil, err
	}
	if w.newHash && ch.Username == c.login.Username {
		if err := c.mayChangeItself(ch, w.secret); err != nil {
			return nil, err
		}
	}
	if w.create || ch.Align && len(ch.Profile) > 0 && u.there() {
		w.align, err = c.align(ctx, w.user, ch.Profile)
	}
	return w, err
}

// mayChangeItself refuses what would lock the engine out: the next login has to be
// one that is stored with the connection.
func (c *cluster) mayChangeItself(ch kind.Change, secret string) error {
	next := kind.Material{Username: ch.Username, Secret: secret}
	switch {
	case !ch.Admin:
		return kind.Definitely("%s", ownUser(ch.Username))
	case !slices.ContainsFunc(c.entry.Admin.Logins(), next.Same):
		return kind.Definitely("the next password of user %s, which the connection logs in as, is not stored with the connection: nothing was changed, start the rotation again", ch.Username)
	}
	return nil
}

func ownUser(name string) string {
	return fmt.Sprintf("user %s is the one that the connection logs in as: give the connection a user of its own", name)
}

// carryOut does the work. A user gets in only once it is complete: its password
// comes last, in one request with its tags.
func (c *cluster) carryOut(ctx context.Context, w *work) error {
	if w.create && !w.begun {
		first := w.user
		first.Tags = tags{tagIncomplete}
		if err := c.set(ctx, first); err != nil {
			return err
		}
	}
	next := w.user
	if w.align != nil {
		if err := c.run(ctx, w.align); err != nil {
			return err
		}
		next.Tags = w.align.tags
	}
	if w.newHash {
		next.Algorithm, next.Hash = w.user.next(), ""
		if w.secret != "" {
			var err error
			if next.Hash, err = passwordHash(next.Algorithm, w.secret); err != nil {
				return err
			}
		}
	}
	if w.newHash || w.align != nil && w.align.retag {
		if err := c.set(ctx, next); err != nil {
			return err
		}
	}
	return c.readBack(ctx, w, next)
}

// set sends the record of a user.
func (c *cluster) set(ctx context.Context, u user) error {
	if err := haveTime(ctx); err != nil {
		return unsure(c.explain(err, "change user "+u.Name, c.login.Username))
	}
	return unsure(c.put(ctx, u, u.algorithm(), u.Hash))
}

// readBack makes sure that a user is what it was made.
func (c *cluster) readBack(ctx context.Context, w *work, made user) error {
	if w.Username == c.login.Username && w.newHash {
		if err := c.logInAgain(ctx); err != nil {
			return err
		}
	}
	after, err := c.user(ctx, w.Username)
	if err != nil {
		return err
	}
	if after.Hash != made.Hash || after.algorithm() != made.algorithm() {
		return fmt.Errorf("management API %s shows another password for user %s than the one that was just set: see to it that nobody else changes it", c.name, w.Username)
	}
	if w.align == nil {
		return nil
	}
	has, err := c.rightsOf(ctx, after)
	if err != nil {
		return err
	}
	if !slices.Equal(has.profile(), w.align.profile) {
		return fmt.Errorf("management API %s shows other tags, permissions or limits of user %s than those that were just set: see to it that nobody else changes them", c.name, w.Username)
	}
	return nil
}

// logInAgain follows the user that the engine logs in as to its next password.
func (c *cluster) logInAgain(ctx context.Context) error {
	logins := slices.DeleteFunc(c.entry.Admin.Logins(), c.login.Same)
	if err := c.authenticate(ctx, append(logins, c.login)); err != nil {
		return unsure(err)
	}
	return nil
}

// plan says whether u has to be changed for c to be true of it, and to which
// password; "" for none at all.
func plan(c kind.Change, u user) (due bool, secret string, err error) {
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
