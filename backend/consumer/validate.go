package consumer

import (
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/labels"
)

// Bounds on a consumer.
const (
	maxWorkloads = 200
	maxChecks    = 50
	maxTimes     = 20
	// DefaultRolloutTimeout and DefaultStabilization apply where nothing is given.
	DefaultRolloutTimeout = 5 * time.Minute
	DefaultStabilization  = time.Minute
)

// nameRegexp is what Kubernetes takes for the name of an object (RFC 1123).
var (
	nameRegexp    = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$`)
	spaceRegexp   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	serviceRegexp = regexp.MustCompile(`^(https?:)?[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?:[a-z0-9-]{1,15}$`)
	headerRegexp  = regexp.MustCompile(`^[A-Za-z0-9-]{1,64}$`)
)

// Normalize fills in defaults.
func (c *Consumer) Normalize() {
	if c.Mode == "" {
		c.Mode = Restart
	}
	if c.RolloutTimeout == 0 {
		c.RolloutTimeout = DefaultRolloutTimeout
	}
}

// Validate refuses what cannot work, with one sentence that names the field.
func (c *Consumer) Validate() error {
	for _, check := range []func() error{c.validateScope, c.validateObjects, c.validateWorkloads, c.validateTimes} {
		if err := check(); err != nil {
			return err
		}
	}
	if len(c.Checks) > maxChecks {
		return fmt.Errorf("checks has %d checks; at most %d are allowed", len(c.Checks), maxChecks)
	}
	for i := range c.Checks {
		if err := c.Checks[i].validate(); err != nil {
			return fmt.Errorf("check %d of checks: %w", i+1, err)
		}
	}
	if err := c.validateHooks(); err != nil {
		return err
	}
	return nil
}

func (c *Consumer) validateScope() error {
	switch {
	case c.Connection == "":
		return fmt.Errorf("connection is missing; give a connection of type kubernetes")
	case c.Namespace == "":
		return fmt.Errorf("namespace is missing; give the namespace of the workloads")
	case !spaceRegexp.MatchString(c.Namespace):
		return fmt.Errorf("namespace is %.80q, which is no name of one", c.Namespace)
	case c.Mode != Restart && c.Mode != Observe && c.Mode != None:
		return fmt.Errorf("mode is %.40q; allowed are %s, %s and %s", c.Mode, Restart, Observe, None)
	case len(c.ExternalSecrets)+len(c.Secrets)+len(c.Workloads) == 0:
		return fmt.Errorf("the consumer has nothing to do; give external_secrets, secrets or workloads")
	case c.Mode == Observe && len(c.Workloads) == 0:
		return fmt.Errorf("mode is observe, and there are no workloads to observe; give workloads")
	case c.Mode == Observe && len(c.ExternalSecrets)+len(c.Secrets) == 0:
		return fmt.Errorf("mode is observe, and there is no Secret whose change pods would be newer than; give external_secrets or secrets")
	}
	for _, p := range c.AllowedRoles {
		if _, err := path.Match(p, ""); err != nil {
			return fmt.Errorf("allowed_roles holds %.64q, which is no glob; use names, or * and ? within them", p)
		}
	}
	return nil
}

func (c *Consumer) validateObjects() error {
	for field, names := range map[string][]string{"external_secrets": c.ExternalSecrets, "secrets": c.Secrets} {
		for _, name := range names {
			if err := checkNameOrSelector(field, name); err != nil {
				return err
			}
		}
	}
	if c.RestartOperator == "" {
		return nil
	}
	ns, name, ok := strings.Cut(c.RestartOperator, "/")
	if !ok || !spaceRegexp.MatchString(ns) || !nameRegexp.MatchString(name) {
		return fmt.Errorf("restart_operator is %.80q; give namespace/name of the Deployment of External Secrets", c.RestartOperator)
	}
	return nil
}

func checkNameOrSelector(field, name string) error {
	if isSelector(name) {
		if err := checkSelector(name); err != nil {
			return fmt.Errorf("%s holds %.80q, which is no selector; write it as app=web", field, name)
		}
		return nil
	}
	if !nameRegexp.MatchString(name) {
		return fmt.Errorf("%s holds %.80q, which is neither a name nor a selector of labels (app=web)", field, name)
	}
	return nil
}

// checkSelector refuses what selects nothing in particular.
func checkSelector(text string) error {
	s, err := labels.Parse(text)
	if err != nil || s.Empty() {
		return fmt.Errorf("selector is %.80q; write it as app=web or app=web,tier!=cache", text)
	}
	return nil
}

func (c *Consumer) validateWorkloads() error {
	n := 0
	seen := map[Workload]bool{}
	for _, wave := range c.Workloads {
		if len(wave) == 0 {
			return fmt.Errorf("workloads has an empty wave; leave it out")
		}
		for _, w := range wave {
			if err := w.validate(); err != nil {
				return err
			}
			if seen[w] {
				return fmt.Errorf("workloads names %s %s twice; one wave restarts it", w.Kind, w.Name+w.Selector)
			}
			seen[w] = true
			n++
		}
	}
	if n > maxWorkloads {
		return fmt.Errorf("workloads has %d workloads; at most %d are allowed", n, maxWorkloads)
	}
	if c.MaxParallel < 0 {
		return fmt.Errorf("max_parallel is %d; give how many workloads of a wave are restarted at once, or 0 for all", c.MaxParallel)
	}
	return nil
}

func (w Workload) validate() error {
	switch {
	case resources[w.Kind] == "":
		return fmt.Errorf("workloads has kind %.40q; allowed are %s, %s and %s", w.Kind, deployment, statefulSet, daemonSet)
	case (w.Name == "") == (w.Selector == ""):
		return fmt.Errorf("workloads has a %s with name %.80q and selector %.80q; give one of them", w.Kind, w.Name, w.Selector)
	case w.Name != "" && !nameRegexp.MatchString(w.Name):
		return fmt.Errorf("workloads has name %.80q, which is no name of a %s", w.Name, w.Kind)
	case w.Selector != "":
		return checkSelector(w.Selector)
	}
	return nil
}

func (c *Consumer) validateTimes() error {
	switch {
	case c.RolloutTimeout < time.Second || c.RolloutTimeout > 24*time.Hour:
		return fmt.Errorf("rollout_timeout is %s; give between 1s and 24h", c.RolloutTimeout)
	case c.Stabilization < 0 || c.Stabilization > time.Hour:
		return fmt.Errorf("stabilization is %s; give at most 1h", c.Stabilization)
	}
	return nil
}

// AllowsRole reports whether a role may name the consumer. By default none may.
func (c *Consumer) AllowsRole(role string) bool {
	return slices.ContainsFunc(c.AllowedRoles, func(p string) bool {
		ok, err := path.Match(p, role)
		return err == nil && ok
	})
}

// fields of a check that each type takes, beside type, times and timeout.
var checkFields = map[string][]string{
	checkHTTP:       {"url", "service", "path", "method", "body", "headers", "basic_auth", "ca_cert", "expect"},
	checkLogs:       {"selector", "forbid"},
	checkPrometheus: {"url", "query", "expect", "headers", "basic_auth", "ca_cert"},
	checkPods:       {"selector"},
}

func (c *Check) given() map[string]bool {
	return map[string]bool{
		"url": c.URL != "", "service": c.Service != "", "path": c.Path != "", "method": c.Method != "", "body": c.Body != "",
		"headers": len(c.Headers) > 0, "expect": c.Expect != "", "selector": c.Selector != "", "forbid": c.Forbid != "", "query": c.Query != "",
		"basic_auth": c.BasicAuth != "", "ca_cert": c.CACert != "",
	}
}

func (c *Check) validate() error {
	takes, known := checkFields[c.Type]
	if !known {
		return fmt.Errorf("type is %.40q; allowed are http, logs, prometheus and pods", c.Type)
	}
	for field, given := range c.given() {
		if given && !slices.Contains(takes, field) {
			return fmt.Errorf("%s is not for type %s, which takes %s", field, c.Type, strings.Join(takes, ", "))
		}
	}
	switch {
	case c.Times < 0 || c.Times > maxTimes:
		return fmt.Errorf("times is %d; give at most %d", c.Times, maxTimes)
	case c.Timeout < 0 || c.Timeout > time.Hour:
		return fmt.Errorf("timeout is %s; give at most 1h", c.Timeout)
	}
	if err := c.validateHeaders(); err != nil {
		return err
	}
	if err := c.validateTemplates(); err != nil {
		return err
	}
	switch c.Type {
	case checkHTTP:
		return c.validateHTTP()
	case checkLogs:
		return c.validateLogs()
	case checkPrometheus:
		return c.validatePrometheus()
	}
	return checkSelector(c.Selector)
}

// credentialHeaders are never stored with a consumer, which is read back.
var credentialHeaders = []string{"authorization", "proxy-authorization", "cookie", "x-api-key", "x-vault-token", "x-auth-token"}

func (c *Check) validateHeaders() error {
	for name, value := range c.Headers {
		switch {
		case !headerRegexp.MatchString(name) || strings.ContainsAny(value, "\r\n\x00"):
			return fmt.Errorf("headers has %.64q, which cannot be sent", name)
		case slices.Contains(credentialHeaders, strings.ToLower(name)) && c.Service != "":
			return fmt.Errorf("headers has %s, which the API server takes out on the way to a Service; check a path that needs no login", name)
		case slices.Contains(credentialHeaders, strings.ToLower(name)) && !placeholder.MatchString(value):
			return fmt.Errorf("headers has %s, and checks hold no credentials, for they are read back; write {{role.value}} for that of a role", name)
		}
	}
	return nil
}

func (c *Check) validateHTTP() error {
	switch {
	case (c.URL == "") == (c.Service == ""):
		return fmt.Errorf("give url, or service (scheme:name:port) for a Service of the namespace")
	case c.URL != "" && c.Path != "":
		return fmt.Errorf("path is for a service; make it part of url")
	case c.Method != "" && !slices.Contains([]string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}, c.Method):
		return fmt.Errorf("method is %.20q; allowed are GET, HEAD, POST, PUT, PATCH and DELETE", c.Method)
	}
	if _, err := statusCodes(c.Expect); err != nil {
		return err
	}
	if c.URL != "" {
		return checkURL(c.URL)
	}
	if !serviceRegexp.MatchString(c.Service) {
		return fmt.Errorf("service is %.80q; write it as http:web:8080", c.Service)
	}
	u, err := url.Parse(c.Path)
	if err != nil || u.Host != "" || u.Scheme != "" || strings.Contains(u.Path, "..") {
		return fmt.Errorf("path is %.80q; give the path within the Service, such as /healthz", c.Path)
	}
	return nil
}

func checkURL(text string) error {
	u, err := url.Parse(text)
	switch {
	case err != nil || u.Hostname() == "":
		return fmt.Errorf("url is none; give scheme, host and path, such as https://web.example.com/healthz")
	case u.User != nil:
		return fmt.Errorf("url holds a user or a password, and checks hold no credentials; leave them out")
	case u.Scheme == "https":
		return nil
	case u.Scheme == "http" && isLoopback(u.Hostname()):
		return nil
	}
	return fmt.Errorf("url begins with %.20q; allowed are https:// and, to this machine, http://", u.Scheme+"://")
}

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

func hostname(text string) string {
	if u, err := url.Parse(text); err == nil {
		return u.Hostname()
	}
	return ""
}

func (c *Check) validateLogs() error {
	if c.Forbid == "" {
		return fmt.Errorf("forbid is missing; give a regular expression that no line may match")
	}
	if _, err := regexp.Compile(c.Forbid); err != nil {
		return fmt.Errorf("forbid is %.80q, which is no regular expression (RE2)", c.Forbid)
	}
	if c.Selector != "" {
		return checkSelector(c.Selector)
	}
	return nil
}

func (c *Check) validatePrometheus() error {
	if c.Query == "" {
		return fmt.Errorf("query is missing; give a PromQL expression")
	}
	if c.URL == "" {
		return fmt.Errorf("url is missing; give that of the Prometheus")
	}
	if _, err := parseComparison(c.Expect); err != nil {
		return err
	}
	return checkURL(c.URL)
}
