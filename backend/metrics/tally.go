package metrics

import (
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// standings are the values of the label of that name.
var standings = []string{"running", "due", "overdue", "failed", "drifted", "suspended", "unreadable"}

// tally is what is added up over all roles.
type tally struct {
	kinds    map[string]*ofKind
	troubles []trouble
}

type ofKind struct {
	roles        int
	standing     map[string]int
	oldest, next time.Time
}

// trouble is a role that needs somebody.
type trouble struct{ kind, role, what string }

func count(l Look) (*tally, error) {
	t := &tally{kinds: map[string]*ofKind{}}
	err := l.Each(func(name string, s rotation.Standing) { t.add(name, s, l.At) })
	return t, err
}

func (t *tally) add(name string, s rotation.Standing, now time.Time) {
	kind := s.Kind
	k := t.kinds[kind]
	if k == nil {
		k = &ofKind{standing: map[string]int{}}
		t.kinds[kind] = k
	}
	k.roles++
	for _, in := range s.In(now) {
		k.standing[in]++
		switch in {
		case "overdue", "failed", "drifted", "unreadable":
			t.troubles = append(t.troubles, trouble{kind, name, in})
		}
	}
	if !s.Since.IsZero() && (k.oldest.IsZero() || s.Since.Before(k.oldest)) {
		k.oldest = s.Since
	}
	if !s.Next.IsZero() && !s.Suspended && (k.next.IsZero() || s.Next.Before(k.next)) {
		k.next = s.Next
	}
}
