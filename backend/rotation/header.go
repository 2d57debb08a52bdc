package rotation

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// maxRoles is how many roles a rotation holds; a larger request becomes
// children under a parent, so that no entry grows with the number of roles.
const maxRoles = 500

// maxNames bounds the length of all names in a header.
const maxNames = 16 << 10

// Requester is who asked for a rotation. It holds no token.
type Requester struct {
	EntityID    string `json:"entity_id,omitempty"`
	Accessor    string `json:"accessor,omitempty"`
	DisplayName string `json:"display_name,omitempty"`
	RequestID   string `json:"request_id,omitempty"`
}

// Header is the small entry of a rotation. It is written before its roles', so
// that a role never points at a rotation that nobody knows.
type Header struct {
	ID          string    `json:"id"`
	Parent      string    `json:"parent,omitempty"`
	Children    []string  `json:"children,omitempty"`
	Trigger     Trigger   `json:"trigger"`
	RequestedBy Requester `json:"requested_by"`
	Reason      string    `json:"reason,omitempty"`
	Started     time.Time `json:"started"`
	Finished    time.Time `json:"finished,omitzero"`
	// State is set when the rotation has ended; until then it follows from the
	// roles.
	State   State    `json:"state,omitempty"`
	Roles   []Part   `json:"roles,omitempty"`
	Running []string `json:"already_running,omitempty"` // roles that were busy
	Request string   `json:"request,omitempty"`         // key of its first request entry
	// Requests are the keys of all its request entries, which go when it does.
	Requests []string `json:"requests,omitempty"`
	Source   int      `json:"source,omitempty"` // of a rollback
	// Restores: the role that is created is a deleted one.
	Restores bool `json:"restores,omitempty"`
	// Of an emergency: what else it does, and what it set aside.
	Emergency *Emergency `json:"emergency,omitempty"`
	Overrides []string   `json:"overrides,omitempty"`
}

// Part is one role's part in a rotation, as lists show it.
type Part struct {
	Role    string `json:"role"`
	Kind    string `json:"kind"`
	Version int    `json:"version,omitempty"`
	State   State  `json:"state,omitempty"`
	Phase   Phase  `json:"phase,omitempty"`
	Error   string `json:"error,omitempty"`
	// Unit numbers the roles of the rotation that go forward or back together; 0:
	// the role is alone.
	Unit int `json:"unit,omitempty"`
	// Until is when consumers have had the time to read what was published.
	Until time.Time `json:"until,omitzero"`
	// Refused is when, in an emergency, every earlier version was proven refused.
	Refused time.Time `json:"refused,omitzero"`
	// Clients says who was seen to use the previous version in its grace.
	Clients string `json:"clients,omitempty"`
}

// Served reports whether the new version is served and only the end of the
// previous one is outstanding.
func (p Part) Served() bool {
	return p.State == InGrace || p.State == Running && p.Phase == Retire
}

// Line is how a part is printed: one line that a terminal shows whole.
func (p Part) Line() string {
	s := p.Label() + ": "
	switch {
	case p.Served():
		s += fmt.Sprintf("version %d, promoted", p.Version)
	case p.State == Completed:
		s += fmt.Sprintf("version %d, completed", p.Version)
	case p.State == Partial:
		s += fmt.Sprintf("version %d, served, and every earlier one refused; not all consumers were proven", p.Version)
	case !p.Refused.IsZero():
		s += fmt.Sprintf("version %d, served, and every earlier one refused (%s)", p.Version, p.Phase)
	case !p.Until.IsZero():
		s += fmt.Sprintf("version %d, published; consumers have until %s to read it", p.Version, p.Until.UTC().Format(time.RFC3339))
	case p.State == "":
		s += "not started"
	case p.Phase != "" && !p.State.Ended():
		s += fmt.Sprintf("%s (%s)", p.State, p.Phase)
	default:
		s += string(p.State)
	}
	if p.Error != "" {
		s += ": " + p.Error
	}
	return s
}

// Evidence is what is kept of one role's part in a rotation after it ended.
type Evidence struct {
	Part
	From     int         `json:"from,omitempty"`
	Trigger  Trigger     `json:"trigger"`
	Started  time.Time   `json:"started"`
	Finished time.Time   `json:"finished"`
	Nodes    []string    `json:"nodes,omitempty"`
	Missed   []string    `json:"missed,omitempty"`
	Timeline []Moment    `json:"timeline,omitempty"`
	Usage    *Usage      `json:"usage,omitempty"`
	Batch    int         `json:"batch,omitempty"` // of an emergency, see Run
	Criteria []Criterion `json:"criteria,omitempty"`
	// Account is what conditions of success are told by; nil of those that ended before
	// it was kept.
	Account *Account `json:"account,omitempty"`
}

// Criterion is a condition of success and what was seen of it. Verdict is empty where
// there is no more to it than Met.
type Criterion struct {
	Name    string  `json:"name"`
	Met     bool    `json:"met"`
	Verdict Verdict `json:"verdict,omitempty"`
	Detail  string  `json:"detail,omitempty"`
}

func evidenceKey(rotation, role string) string { return storage.Evidence + rotation + "/" + role }

func (st *Store) putEvidence(ctx context.Context, id string, e *Evidence) error {
	return storage.Put(ctx, st.s, evidenceKey(id, e.Role), e, maxSmallEntry)
}

// Evidence reads what is kept of a role's part in a rotation.
func (st *Store) Evidence(ctx context.Context, rotation, role string) (*Evidence, error) {
	return storage.Get[Evidence](ctx, st.s, evidenceKey(rotation, role))
}

// Header reads a rotation's header; nil when there is none.
func (st *Store) Header(ctx context.Context, id string) (*Header, error) {
	return storage.Get[Header](ctx, st.s, storage.Rotation+id)
}

// Headers lists the ids of all rotations, oldest first: ids sort by time.
func (st *Store) Headers(ctx context.Context) ([]string, error) {
	ids, err := st.s.List(ctx, storage.Rotation)
	slices.Sort(ids)
	return ids, err
}

func (st *Store) putHeader(ctx context.Context, h *Header) error {
	if h.State == "" {
		// The marker comes first: a marker without a header is dropped, a header
		// without a marker would never be resumed.
		if err := st.putOpen(ctx, h.ID); err != nil {
			return err
		}
	}
	if err := storage.Put(ctx, st.s, storage.Rotation+h.ID, h, maxHeaderEntry); err != nil {
		return err
	}
	if h.State != "" {
		return st.s.Delete(ctx, storage.Open+h.ID)
	}
	return nil
}

func (st *Store) putOpen(ctx context.Context, id string) error {
	return storage.Put(ctx, st.s, openKey(id), struct{}{}, maxSmallEntry)
}

// openRotations lists rotations that have not ended.
func (st *Store) openRotations(ctx context.Context) ([]string, error) {
	return st.s.List(ctx, storage.Open)
}

type requestEntry struct {
	Rotation string    `json:"rotation"`
	At       time.Time `json:"at"`
}

// requestKey is where a request leaves the id of the rotation it started.
func requestKey(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s,", len(p), p)
	}
	return storage.Request + hex.EncodeToString(h.Sum(nil))
}

func (st *Store) request(ctx context.Context, key string) (*requestEntry, error) {
	return storage.Get[requestEntry](ctx, st.s, key)
}

func (st *Store) putRequest(ctx context.Context, key string, e requestEntry) error {
	return storage.Put(ctx, st.s, key, e, maxSmallEntry)
}

// Parts returns what each role of h is doing or has come to: from the role
// while it runs, from its evidence after that.
func (st *Store) Parts(ctx context.Context, h *Header) ([]Part, error) {
	if h.State != "" {
		return h.Roles, nil
	}
	parts := make([]Part, len(h.Roles))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelStorage)
	for i, p := range h.Roles {
		g.Go(func() (err error) {
			parts[i], err = st.part(ctx, h.ID, p)
			return err
		})
	}
	return parts, g.Wait()
}

func (st *Store) part(ctx context.Context, id string, p Part) (Part, error) {
	r, err := st.Role(ctx, p.Role)
	if err != nil {
		return p, err
	}
	if r != nil && r.Run != nil && r.Run.Rotation == id {
		return livePart(r), nil
	}
	e, err := st.Evidence(ctx, id, p.Role)
	if err != nil || e == nil {
		return p, err
	}
	return e.Part, nil
}

func livePart(r *Role) Part {
	run := r.Run
	p := Part{
		Role: r.Name, Kind: r.Kind, Version: run.To, State: run.state(), Phase: run.Phase, Error: run.Error, Unit: run.Unit,
		Clients: clip(run.Usage.Line()), Refused: run.Refused,
	}
	if run.Phase == Check && !run.Back {
		p.Until = run.CheckUntil
	}
	return p
}

// Summarize derives the state of a rotation from its parts.
func Summarize(parts []Part) State {
	if len(parts) == 0 {
		return Superseded // all roles were taken
	}
	count := map[State]int{}
	for _, p := range parts {
		if p.State == "" {
			p.State = Running
		}
		count[p.State]++
	}
	for _, s := range []State{RollbackFailed, Held, RollingBack, Running, Waiting, InGrace} {
		if count[s] > 0 {
			return s
		}
	}
	for s, n := range count {
		if n == len(parts) {
			return s
		}
	}
	if count[Completed]+count[Partial] > 0 {
		return Partial
	}
	return Failed
}

// forget removes a rotation and everything kept of it.
func (st *Store) forget(ctx context.Context, h *Header) error {
	for _, p := range h.Roles {
		if err := st.s.Delete(ctx, evidenceKey(h.ID, p.Role)); err != nil {
			return err
		}
	}
	if err := st.forgetProofs(ctx, h.ID); err != nil {
		return err
	}
	for _, key := range h.Requests {
		if err := st.s.Delete(ctx, key); err != nil {
			return err
		}
	}
	return st.s.Delete(ctx, storage.Rotation+h.ID)
}
