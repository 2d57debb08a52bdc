package rotation

import (
	"context"
	"slices"
	"time"
)

// EachRole calls f with every role that can be decoded, a page at a time, until
// it returns false. ScanRoles names the others.
func (st *Store) EachRole(ctx context.Context, f func(*Role) bool) error {
	_, err := st.ScanRoles(ctx, f)
	return err
}

// ScanRoles is EachRole, and names the roles it met that cannot be decoded.
func (st *Store) ScanRoles(ctx context.Context, f func(*Role) bool) (unreadable []string, err error) {
	names, err := st.RoleNames(ctx)
	if err != nil {
		return nil, err
	}
	for page := range slices.Chunk(names, 1000) {
		roles, bad, err := st.readable(ctx, page)
		if err != nil {
			return nil, err
		}
		unreadable = append(unreadable, bad...)
		for _, r := range roles {
			if r != nil && !f(r) {
				return unreadable, nil
			}
		}
	}
	return unreadable, nil
}

// FirstRole returns the name of a role that match accepts, or "". That there is
// none it says only when every role was looked at.
func (st *Store) FirstRole(ctx context.Context, match func(*Role) bool) (name string, err error) {
	unreadable, err := st.ScanRoles(ctx, func(r *Role) bool {
		if match(r) {
			name = r.Name
		}
		return name == ""
	})
	if err == nil && name == "" && len(unreadable) > 0 {
		_, err = st.Role(ctx, unreadable[0])
	}
	return name, err
}

// RolesOfKind names the roles of a kind; of every kind when kind is "".
func (st *Store) RolesOfKind(ctx context.Context, kind string) ([]string, error) {
	if kind == "" {
		return st.RoleNames(ctx)
	}
	var names []string
	err := st.EachRole(ctx, func(r *Role) bool {
		if r.Kind == kind {
			names = append(names, r.Name)
		}
		return true
	})
	return names, err
}

// AllParts returns the parts of a rotation, those of its children included, and
// adds to h the roles that its children found taken.
func (st *Store) AllParts(ctx context.Context, h *Header) ([]Part, error) {
	parts, err := st.Parts(ctx, h)
	if err != nil {
		return nil, err
	}
	for i, id := range h.Children {
		child, err := st.Header(ctx, id)
		if err != nil {
			return nil, err
		}
		if child == nil {
			plan, err := st.plan(ctx, h.ID, i)
			if err != nil {
				return nil, err
			}
			if plan != nil {
				more, err := st.planned(ctx, plan.Roles)
				if err != nil {
					return nil, err
				}
				parts = append(parts, more...)
			}
			continue
		}
		h.Running = append(h.Running, child.Running...)
		more, err := st.Parts(ctx, child)
		if err != nil {
			return nil, err
		}
		parts = append(parts, more...)
	}
	return parts, nil
}

// StateOf is the state of a rotation with these parts.
func StateOf(h *Header, parts []Part) State {
	if h.State != "" {
		return h.State
	}
	return Summarize(parts)
}

// WaitAll waits for a rotation and its children.
func (e *Engine) WaitAll(ctx context.Context, h *Header, until Until) {
	e.Wait(ctx, h.ID, until)
	for _, id := range h.Children {
		e.Wait(ctx, id, until)
	}
}

// Longest is how long a rotation of the role may take: the least time between two
// scheduled ones.
func (r *Role) Longest(c Config) time.Duration {
	longest := r.Grace(c) + preflightTimeout + credentialTimeout
	if r.ring() {
		longest += 2 * r.Spec.PropagationDelay
	}
	return longest
}

// Line prints a criterion.
func (c Criterion) Line() string {
	s := c.Name
	switch {
	case c.Verdict != "":
		s = string(c.Verdict) + ": " + s
	case c.Met:
		s = "met: " + s
	default:
		s = "not met: " + s
	}
	if c.Detail != "" {
		s += " (" + c.Detail + ")"
	}
	return s
}
