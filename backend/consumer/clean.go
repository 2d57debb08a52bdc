package consumer

import (
	"errors"
	"slices"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// What a cluster says of itself (names, reasons, labels) is stored, logged and shown on
// terminals. It knows the token of the connection and the secrets that it was brought,
// and may be anybody's who has taken it over.

const (
	// maxClean bounds a text, in bytes.
	maxClean = 1000
	// maxTold bounds the lines of one step.
	maxTold = 500
	// minHidden is how long a value is that is told from a word: users are served, too.
	minHidden = 16
)

// clean is text on one line, in so many bytes and without secrets that the cluster knows.
func (s *step) clean(text string) string {
	text = s.hides.Replace(text)
	if len(text) > maxClean {
		text = strings.ToValidUTF8(text[:maxClean], "") + "…"
	}
	return bounded.Line(text)
}

// hiding takes the secrets that a cluster knows out of a text.
func hiding(token string, d Delivery) *strings.Replacer {
	var all []string
	for _, v := range slices.Concat([]Value{{Secret: token}}, d.Holds, d.Lacks, d.Undone) {
		for _, form := range forms(v.Secret) {
			if len(v.Secret) >= minHidden {
				all = append(all, string(form))
			}
		}
	}
	slices.SortFunc(all, func(a, b string) int { return len(b) - len(a) }) // one may be part of another
	var pairs []string
	for _, secret := range all {
		pairs = append(pairs, secret, "(secret)")
	}
	return strings.NewReplacer(pairs...)
}

// cleaned is err with a clean text and the same class.
func (s *step) cleaned(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	clean := s.clean(text)
	if clean == text {
		return err
	}
	var known *kind.Error
	if errors.As(err, &known) {
		return &kind.Error{Class: known.Class, Err: errors.New(clean)}
	}
	return errors.New(clean)
}

// found is what a look found, in clean texts.
func (s *step) found(f Finding) Finding {
	f.Err = s.cleaned(f.Err)
	for _, list := range [][]string{f.Problems, f.Notes, f.Plan} {
		for i := range list {
			list[i] = s.clean(list[i])
		}
	}
	return f
}
