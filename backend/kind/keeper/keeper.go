// Package keeper is what the kinds have in common whose secret another Vault
// keeps: each names a path of that Vault which makes a new version, and what of
// an answer to it says whether it did.
package keeper

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/vault/api"
	"golang.org/x/sync/errgroup"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/vault"
)

// Call calls f with a client that is logged in to the Vault of one connection,
// and that repeats nothing by itself; it may call f again where that Vault
// answered 403. Its errors have a class (kind.Error).
type Call func(ctx context.Context, f func(ctx context.Context, client *api.Client) error) error

// parallel is how many secrets of one Vault are asked about at once.
const parallel = 8

// Each asks about every subject, and answers in their order.
func Each[T any](subjects []kind.Subject, ask func(kind.Subject) T) []T {
	out := make([]T, len(subjects))
	g := errgroup.Group{}
	g.SetLimit(parallel)
	for i, s := range subjects {
		g.Go(func() error { out[i] = ask(s); return nil })
	}
	_ = g.Wait()
	return out
}

var keyRegexp = regexp.MustCompile(`^[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?$`)

// Complete fills in where the secret is kept, and refuses what is no such place.
func Complete(spec *kind.Spec, mount string) error {
	spec.Strategy = kind.Kept
	if spec.Mount == "" {
		spec.Mount = mount
	}
	if err := vault.CheckMount("mount", spec.Mount); err != nil {
		return err
	}
	switch {
	case spec.Key == "":
		return errors.New("key is missing; give the name that the secret has at its mount")
	case !keyRegexp.MatchString(spec.Key) || strings.Contains(spec.Key, ".."):
		return fmt.Errorf("key is %.80q; give the name that the secret has at its mount", spec.Key)
	}
	return nil
}

// Read reads a path; nil where there is nothing.
func Read(ctx context.Context, call Call, path string) (data map[string]any, err error) {
	err = call(ctx, func(ctx context.Context, client *api.Client) error {
		answer, err := client.Logical().ReadWithContext(ctx, path)
		if data = nil; answer != nil {
			data = answer.Data
		}
		return err
	})
	return data, err
}

// Lacks names those of paths that the token may not write. Where it may not ask
// that, either, it says so, and nothing is known to be missing.
func Lacks(ctx context.Context, call Call, paths ...string) (missing []string, known bool) {
	var data map[string]any
	err := call(ctx, func(ctx context.Context, client *api.Client) error {
		answer, err := client.Logical().WriteWithContext(ctx, "sys/capabilities-self", map[string]any{"paths": paths})
		if data = nil; answer != nil {
			data = answer.Data
		}
		return err
	})
	if err != nil || data == nil {
		return nil, false
	}
	for _, path := range paths {
		can, _ := data[path].([]any)
		if !slices.Contains(can, any("update")) && !slices.Contains(can, any("root")) {
			missing = append(missing, path)
		}
	}
	return missing, true
}

// Unasked is a note where Lacks does not know.
const Unasked = "the token may not read what it is allowed to do (sys/capabilities-self): whether it may rotate shows when it does"

// Forbidden says what a policy has to have.
func Forbidden(paths []string) string {
	return fmt.Sprintf(`the token may not write %s; give its policy: path "%s" { capabilities = ["update"] }`, strings.Join(paths, " and "), paths[0])
}

// Number reads a number of an answer; 0 where there is none.
func Number(v any) int {
	n, ok := v.(json.Number)
	if !ok {
		return 0
	}
	i, err := n.Int64()
	if err != nil {
		return 0
	}
	return int(i)
}

// Turn writes a path once. refusals are texts of answers that are given before
// anything is done, although their status does not say so.
func Turn(ctx context.Context, call Call, path string, s kind.Subject, refusals ...string) kind.Turned {
	var out kind.Turned
	sent := false
	err := call(ctx, func(ctx context.Context, client *api.Client) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		sent = true
		var status, date string
		marked := client.WithRequestCallbacks(func(r *api.Request) { r.Headers.Set(correlation, s.Rotation) }).
			WithResponseCallbacks(func(r *api.Response) { status, date = r.Status, r.Header.Get("Date") })
		answer, err := marked.Logical().WriteWithContext(ctx, path, nil)
		if err != nil {
			sent = effective(err)
			if text := known(err, refusals); text != "" {
				sent = false
				return kind.Definitely("%s was answered with %q; look at what is configured there", path, text)
			}
			return err
		}
		out.Evidence = evidence(answer, status, date)
		return nil
	})
	out.Err = err
	out.NoEffect = err != nil && !sent
	if kind.IsDefinite(err) && sent { // understood as a refusal, and not certainly one
		out.Err = &kind.Error{Class: kind.Unavailable, Err: err}
	}
	return out
}

// correlation is a header that Vault writes into its audit log.
const correlation = "X-Correlation-Id"

// evidence tells the answer apart from all others. Not every answer has a body,
// and with it the id of its request.
func evidence(answer *api.Secret, status, date string) string {
	if answer != nil && answer.RequestID != "" {
		return "request " + answer.RequestID
	}
	return fmt.Sprintf("answered %s on %s", status, date)
}

// effective reports whether what was answered with err may have had an effect:
// not where no connection came about, or where Vault refused the request. What it
// answers with 5xx it may have done, and something in front of it may have
// answered in its place.
func effective(err error) bool {
	var (
		raw  *api.ResponseError
		dial *net.OpError
		cert *tls.CertificateVerificationError
	)
	switch {
	case errors.As(err, &raw):
		refusal := raw.StatusCode >= 400 && raw.StatusCode < 500 && raw.StatusCode != http.StatusRequestTimeout
		return !refusal && !slices.ContainsFunc(raw.Errors, func(s string) bool { return strings.Contains(s, "Vault is sealed") })
	case errors.As(err, &dial) && dial.Op == "dial", errors.As(err, &cert):
		return false
	}
	return true
}

// known is the one of texts that an error answer holds. Nothing else of it is
// shown: it may repeat what nobody should read.
func known(err error, texts []string) string {
	var raw *api.ResponseError
	if !errors.As(err, &raw) {
		return ""
	}
	for _, text := range texts {
		if strings.Contains(strings.Join(raw.Errors, "\n"), text) {
			return text
		}
	}
	return ""
}
