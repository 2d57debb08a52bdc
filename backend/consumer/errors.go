package consumer

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/outbound"
)

// explain turns what happened to a call into an error with its class. Of what an
// API server says nothing is shown but what Kubernetes itself makes of names: a
// webhook may repeat what it was sent.
func (c *cluster) explain(err error) error {
	if err == nil {
		return nil
	}
	var known *kind.Error
	if errors.As(err, &known) {
		return err
	}
	var answer apierrors.APIStatus
	if errors.As(err, &answer) {
		class, text := explainStatus(answer.Status())
		return &kind.Error{Class: class, Err: fmt.Errorf("the cluster of connection %q %s", c.name, text)}
	}
	class, text := explainSilence(err)
	return &kind.Error{Class: class, Err: fmt.Errorf("the cluster of connection %q %s", c.name, text)}
}

var (
	// denied is how RBAC says no.
	denied = regexp.MustCompile(`User "([^"]{1,200})" cannot ([a-z]{1,20}) resource "([a-z./-]{1,80})"(?: in API group "([a-z0-9.-]{0,80})")?(?: in the namespace "([a-z0-9-]{1,63})")?`)
	// admission is how a ValidatingAdmissionPolicy says no.
	admission = regexp.MustCompile(`ValidatingAdmissionPolicy '([A-Za-z0-9.-]{1,200})'`)
)

// explainStatus says what an answer means for a delivery. 401 and 403 are for now:
// a role can be bound again while the delivery waits.
func explainStatus(s metav1.Status) (kind.Class, string) {
	what := described(s)
	switch {
	case admission.MatchString(s.Message): // with 403 or 422
		return kind.Unavailable, "does not permit it: " + forbidden(s, what)
	case s.Code == http.StatusUnauthorized:
		return kind.Unavailable, "refuses the token: it has ended or was revoked; write the connection with a new one"
	case s.Code == http.StatusForbidden:
		return kind.Unavailable, "does not permit it: " + forbidden(s, what)
	case s.Code == http.StatusNotFound && s.Details != nil && s.Details.Name != "":
		return kind.Definite, "has no " + what + "; check the names and the namespace of the consumer"
	case s.Code == http.StatusNotFound:
		return kind.Definite, "does not know what was asked for; check that External Secrets (external-secrets.io/v1) is installed, if the consumer names any"
	case s.Code == http.StatusUnprocessableEntity, s.Code == http.StatusBadRequest, s.Code == http.StatusMethodNotAllowed:
		return kind.Definite, fmt.Sprintf("refuses the change of %s with %d %s", what, s.Code, reasonOf(s))
	}
	return kind.Unavailable, fmt.Sprintf("answered about %s with %d %s", what, s.Code, reasonOf(s))
}

var (
	reasonRegexp = regexp.MustCompile(`^[A-Za-z]{1,40}$`)
	kindRegexp   = regexp.MustCompile(`^[A-Za-z./-]{1,80}$`)
)

// reasonOf is one of Kubernetes' own words, or nothing: an API server that is none may
// write there what it was sent.
func reasonOf(s metav1.Status) string {
	if reason := string(s.Reason); reasonRegexp.MatchString(reason) {
		return reason
	}
	return "(a reason that is none)"
}

var wordRegexp = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9]{0,59}$`)

// word is a reason of an object, where it is one word, as those of Kubernetes are.
func word(text string) string {
	if text == "" || wordRegexp.MatchString(text) {
		return text
	}
	return "(a reason that is none)"
}

// named are the kind and the name of what an answer is about, where they are such.
func named(s metav1.Status) (of, name string) {
	if s.Details == nil {
		return "", ""
	}
	if kindRegexp.MatchString(s.Details.Kind) {
		of = s.Details.Kind
	}
	if nameRegexp.MatchString(s.Details.Name) {
		name = s.Details.Name
	}
	return of, name
}

// refused reports whether a role, a policy or a webhook of the cluster said no.
func refused(err error) bool {
	var answer apierrors.APIStatus
	return apierrors.IsForbidden(err) || errors.As(err, &answer) && admission.MatchString(answer.Status().Message)
}

func described(s metav1.Status) string {
	of, name := named(s)
	if of == "" && name == "" {
		return "a request"
	}
	return strings.TrimSpace(of + " " + name)
}

func forbidden(s metav1.Status, what string) string {
	if m := denied.FindStringSubmatch(s.Message); m != nil {
		group := m[4]
		if group == "" {
			group = "core"
		}
		_, name := named(s)
		if name != "" {
			name = " " + name
		}
		where, role := "in the cluster", "a ClusterRole that is bound to it"
		if m[5] != "" {
			where, role = "in namespace "+m[5], "a Role that is bound to it there"
		}
		return fmt.Sprintf("user %s may not %s %s%s %s (API group %s); add that to %s", m[1], m[2], m[3], name, where, group, role)
	}
	if m := admission.FindStringSubmatch(s.Message); m != nil {
		return fmt.Sprintf("policy %s refuses the change of %s", m[1], what)
	}
	return what + " is refused; look at roles, policies and webhooks of the cluster"
}

// explainSilence is about calls that were not answered.
func explainSilence(err error) (kind.Class, string) {
	if why := connection.Distrust(err); why != "" {
		return kind.Unavailable, "cannot be used: " + trust(why)
	}
	if strings.Contains(err.Error(), "client rate limiter Wait returned an error") {
		return kind.Unreachable, "did not answer in time"
	}
	if errors.Is(err, bounded.ErrTooMuch) {
		return kind.Unavailable, fmt.Sprintf("answered with more than is read (%d MiB of an object, and %d MiB in one step); "+
			"check that host leads to an API server, or keep fewer and smaller pods in the namespace of the consumer", maxObject>>20, maxStep>>20)
	}
	text, reached := outbound.Silence(err)
	if !reached {
		return kind.Unreachable, text
	}
	return kind.Unavailable, text + "; check that host leads to an API server"
}

// trust names the fields of this type of connection.
func trust(text string) string {
	return strings.NewReplacer("tls_ca", "ca_cert", "tls_cert and tls_key", "the client certificate of the kubeconfig").Replace(text)
}
