package consumer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"net/url"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// secret is a Secret of the consumer. It prints as its name alone.
type secret struct {
	name string
	data map[string][]byte
	// loose: values may be made of what is served, such as a URL with a password.
	loose     bool
	missing   bool
	immutable bool
	changed   time.Time
}

func (s *secret) String() string { return s.name }

// secrets reads the Secrets of the ExternalSecrets, and those that are named.
func (s *step) secrets(ctx context.Context, externals []*external) ([]*secret, error) {
	var out []*secret
	known := map[string]*secret{}
	add := func(one *secret) {
		if before := known[one.name]; before != nil {
			before.loose = before.loose || one.loose
			return
		}
		known[one.name] = one
		out = append(out, one)
	}
	for _, e := range externals {
		if e.target() == "" {
			continue
		}
		one, err := s.secret(ctx, e.target())
		if err != nil {
			return nil, err
		}
		one.loose = e.templated()
		add(one)
	}
	for _, name := range s.c.Secrets {
		all, err := s.named(ctx, name)
		if err != nil {
			return nil, err
		}
		for _, one := range all {
			one.loose = true // who knows what makes it
			add(one)
		}
	}
	return out, nil
}

// named reads one Secret, or those that a selector finds.
func (s *step) named(ctx context.Context, name string) ([]*secret, error) {
	if !isSelector(name) {
		one, err := s.secret(ctx, name)
		if err != nil {
			return nil, err
		}
		return []*secret{one}, nil
	}
	all, err := listed(ctx, s.cluster, name, func(o metav1.ListOptions) ([]corev1.Secret, string, error) {
		page, err := s.core.Secrets(s.c.Namespace).List(ctx, o)
		if err != nil {
			return nil, "", err
		}
		return page.Items, page.Continue, nil
	})
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, kind.Definitely("no Secret of namespace %q has the labels %s; check secrets of the consumer", s.c.Namespace, name)
	}
	out := make([]*secret, len(all))
	for i := range all {
		out[i] = ofSecret(&all[i])
	}
	return out, nil
}

// secret reads a Secret. One that is not there may be about to come.
func (s *step) secret(ctx context.Context, name string) (*secret, error) {
	o, err := s.core.Secrets(s.c.Namespace).Get(ctx, name, metav1.GetOptions{})
	if isMissing(err) {
		return &secret{name: name, missing: true}, nil
	}
	if err != nil {
		return nil, err
	}
	return ofSecret(o), nil
}

func ofSecret(o *corev1.Secret) *secret {
	return &secret{
		name: o.Name, data: o.Data, immutable: o.Immutable != nil && *o.Immutable,
		changed: dataChanged(o.ObjectMeta),
	}
}

// dataChanged is when somebody last wrote values of a Secret. Labels and
// annotations are written by others, at any time.
func dataChanged(meta metav1.ObjectMeta) time.Time {
	at := meta.CreationTimestamp.Time
	for _, f := range meta.ManagedFields {
		if f.Time != nil && ownsData(f.FieldsV1) && f.Time.After(at) {
			at = f.Time.Time
		}
	}
	return at
}

// ownsData reports whether a manager of fields has written values. Who applies them
// as stringData owns that, though nobody ever reads it.
func ownsData(f *metav1.FieldsV1) bool {
	if f == nil {
		return false
	}
	raw := f.GetRawString()
	return strings.Contains(raw, `"f:data"`) || strings.Contains(raw, `"f:stringData"`)
}

// changed is when the Secrets of the consumer last changed; when the delivery
// began, where it has none.
func (s *step) changed(ctx context.Context) (time.Time, error) {
	externals, err := s.externals(ctx)
	if err != nil {
		return time.Time{}, err
	}
	secrets, err := s.secrets(ctx, externals)
	if err != nil {
		return time.Time{}, err
	}
	at := time.Time{}
	for _, one := range secrets {
		if one.changed.After(at) {
			at = one.changed
		}
	}
	if at.IsZero() {
		at = s.d.Since
	}
	return at, nil
}

// compare says what of a delivery does not stand in the Secrets of a consumer, or
// should not. Nothing of what they hold gets into its errors, or out of memory.
func compare(secrets []*secret, d Delivery) error {
	for _, one := range secrets {
		if one.missing {
			return unsure("Secret %s is not there; an ExternalSecret with creationPolicy Merge waits until somebody makes it", one)
		}
	}
	if len(secrets) == 0 {
		return nil
	}
	for _, v := range d.Holds {
		if v.Secret != "" && whichHolds(secrets, v.Secret) == nil {
			return absent(secrets, v)
		}
	}
	for _, v := range d.Lacks {
		if one := whichShows(secrets, v.Secret, d.Holds); one != nil {
			return unsure("Secret %s still holds what role %s no longer serves; look at what its ExternalSecret reads", one, v.Role)
		}
	}
	return nil
}

func absent(secrets []*secret, v Value) error {
	names := make([]string, len(secrets))
	fixed := true
	for i, one := range secrets {
		names[i] = one.name
		fixed = fixed && one.immutable
	}
	const format = "no value of Secret %s is what role %s serves; %s"
	all := strings.Join(names, ", ")
	if fixed {
		return kind.Definitely(format, all, v.Role, "it is immutable, and cannot be changed: make a new one")
	}
	return unsure(format, all, v.Role, "look at remoteRef and the template of its ExternalSecret, and whether it reads where the role is published")
}

func whichHolds(secrets []*secret, value string) *secret {
	for _, one := range secrets {
		for _, held := range one.data {
			if same(held, value) || one.loose && contains(held, value) {
				return one
			}
		}
	}
	return nil
}

// shortest is the length from which on a value that is found within another one is
// taken for itself, and not for a part of something else.
const shortest = 8

func whichShows(secrets []*secret, value string, holds []Value) *secret {
	if value == "" {
		return nil
	}
	for _, one := range secrets {
		for _, held := range one.data {
			if same(held, value) || one.loose && len(value) >= shortest && contains(without(held, holds), value) {
				return one
			}
		}
	}
	return nil
}

// without is what is left of a value beside what it may hold: a password may be
// part of the next one.
func without(held []byte, holds []Value) []byte {
	for _, v := range holds {
		for _, form := range forms(v.Secret) {
			held = bytes.ReplaceAll(held, form, nil)
		}
	}
	return held
}

// same takes the same time for all values, whatever they have in common.
func same(held []byte, value string) bool {
	a, b := sha256.Sum256(held), sha256.Sum256([]byte(value))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

func contains(held []byte, value string) bool {
	for _, form := range forms(value) {
		if bytes.Contains(held, form) {
			return true
		}
	}
	return false
}

// forms are the ways in which a template may write a value: as it is, within a
// URL, within JSON, in base64.
func forms(value string) [][]byte {
	if value == "" {
		return nil
	}
	quoted, err := json.Marshal(value)
	if err != nil {
		quoted = nil
	}
	return [][]byte{
		[]byte(value), []byte(url.QueryEscape(value)), []byte(url.PathEscape(value)), []byte(url.UserPassword("", value).String()[1:]),
		bytes.Trim(quoted, `"`), []byte(base64.StdEncoding.EncodeToString([]byte(value))),
	}
}
