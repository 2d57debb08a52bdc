package postgresql

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// logInAsSelf opens a session of a user itself, with the first of its credentials
// that is accepted. problem says why there is none.
func (n *node) logInAsSelf(ctx context.Context, u kind.User) (s *session, problem string, err error) {
	connectCtx, cancel := within(ctx, 2, connectTimeout)
	defer cancel()
	for _, m := range u.Self {
		m.Username = u.Username
		s, heard, err := n.login(ctx, connectCtx, m)
		switch code := codeOf(err); {
		case err == nil:
			return s, "", nil
		case heard.accepted && heard.asked == askedNothing:
			return nil, n.openly(u.Username), nil
		case code == "42501":
			return nil, fmt.Sprintf("user %s may not connect to database %s at node %s, where it is to change its own password: GRANT CONNECT ON DATABASE to it",
				u.Username, n.database, n.node), nil
		case code != "28P01":
			return nil, "", n.later(ctx, err, "let user "+u.Username+" in to change its own password", u.Username)
		}
	}
	return nil, fmt.Sprintf("user %s is to change its own password, and node %s accepts none that is known of it: "+
		"give it the one that creds/ serves with ALTER ROLE … PASSWORD, or set allow_self_rotation=false so that the admin user changes it", u.Username, n.node), nil
}

// trySelf says for each user that changes its own password whether it could log
// in for that.
func (n *node) trySelf(ctx context.Context, users []kind.User, rows map[string]row) []verdict {
	verdicts := make([]verdict, len(users))
	var logins errgroup.Group
	logins.SetLimit(atOnce)
	for i, u := range users {
		if len(u.Self) == 0 || !rows[u.Username].canLogin {
			continue
		}
		logins.Go(func() error {
			verdicts[i] = n.inTime(ctx, func() verdict {
				s, problem, err := n.logInAsSelf(ctx, u)
				if s != nil {
					s.close(ctx)
				}
				return verdict{problem: problem, err: err}
			})
			return nil
		})
	}
	_ = logins.Wait()
	return verdicts
}
