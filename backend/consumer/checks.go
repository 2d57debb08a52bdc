package consumer

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/outbound"
)

// The types of checks.
const (
	checkHTTP       = "http"
	checkLogs       = "logs"
	checkPrometheus = "prometheus"
	checkPods       = "pods"
)

// maxLog bounds what is read of the log of one container.
const maxLog = 4 << 20

// newRequest makes the request of a check to address.
func newRequest(ctx context.Context, c *Check, address string) (*http.Request, error) {
	method := c.Method
	if method == "" {
		method = http.MethodGet
	}
	r, err := http.NewRequestWithContext(ctx, method, address, strings.NewReader(c.Body))
	if err != nil {
		return nil, kind.Definitely("no request can be made of the check")
	}
	for k, v := range c.Headers {
		r.Header.Set(k, v)
	}
	r.Header.Set("User-Agent", userAgent())
	return r, nil
}

// checkURL sends a request to a host that checks may send to. Nothing of its answer
// but the status is looked at.
func (s *step) checkURL(ctx context.Context, c *Check) error {
	resp, err := s.call(ctx, c, c.URL)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	s.result = fmt.Sprintf("answered with %d", resp.StatusCode)
	return expectStatus(c.Expect, resp.StatusCode, hostOf(c.URL))
}

// call sends the request of a check. That nobody answers is what checks are for.
func (s *step) call(ctx context.Context, c *Check, address string) (*http.Response, error) {
	u, err := url.Parse(address)
	if err != nil || u.Hostname() == "" {
		return nil, kind.Definitely("url is none; write the consumer again")
	}
	if !s.k.MayCall(u.Hostname()) {
		return nil, kind.Definitely("host %.253q is none that checks may send requests to; add it to allowed_hosts of config", u.Hostname())
	}
	r, err := newRequest(ctx, c, address)
	if err != nil {
		return nil, err
	}
	secrets, err := c.permitted(ctx, s.c.Name, s.k.Sources)
	if err != nil {
		return nil, err
	}
	if err := c.fill(r, secrets); err != nil {
		return nil, err
	}
	trust, err := c.trusts(u)
	if err != nil {
		return nil, err
	}
	client, done := outbound.Client(u, outbound.Options{Timeout: kind.CallTimeout, Trust: trust, Follow: len(secrets) == 0})
	defer done()
	resp, err := client.Do(r)
	if err != nil {
		if ctx.Err() != nil {
			return nil, unsure("%s was not waited for", u.Host)
		}
		return nil, badly("%s %s", u.Host, silenceOf(err))
	}
	return resp, nil
}

// silenceOf says why the host of a check did not answer.
func silenceOf(err error) string {
	text, _ := outbound.Silence(err)
	var untrusted *tls.CertificateVerificationError
	if errors.As(err, &untrusted) {
		text += "; give ca_cert of who signed it"
	}
	return text
}

// checkService asks a Service of the namespace, through the API server.
func (s *step) checkService(ctx context.Context, c *Check) error {
	path := "/api/v1/namespaces/" + url.PathEscape(s.c.Namespace) + "/services/" + c.Service + "/proxy/" + strings.TrimPrefix(c.Path, "/")
	r, err := newRequest(ctx, c, s.host+path)
	if err != nil {
		return err
	}
	resp, err := s.http.Do(r)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if err := proxyError(resp); err != nil {
		return err
	}
	s.result = fmt.Sprintf("answered with %d", resp.StatusCode)
	return expectStatus(c.Expect, resp.StatusCode, "Service "+c.Service)
}

// proxyError tells an answer of the API server from one of the Service, which may
// have the same status.
func proxyError(resp *http.Response) error {
	if resp.StatusCode < http.StatusBadRequest || !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") {
		return nil
	}
	var st metav1.Status
	err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(&st)
	if err != nil || st.Kind != "Status" || st.APIVersion != "v1" {
		return nil //nolint:nilerr // the Service answers with what it likes
	}
	st.Code = int32(resp.StatusCode) //nolint:gosec // has three digits
	switch resp.StatusCode {
	case http.StatusServiceUnavailable, http.StatusBadGateway, http.StatusGatewayTimeout, http.StatusInternalServerError:
		return badly("the Service has nothing that answers (%d)", resp.StatusCode)
	}
	return &apierrors.StatusError{ErrStatus: st}
}

// expectStatus: the codes that are expected, or any 2xx.
func expectStatus(expect string, code int, who string) error {
	if expect == "" && code >= 200 && code < 300 {
		return nil
	}
	codes, err := statusCodes(expect)
	if err != nil {
		return kind.Definitely("%w", err)
	}
	if slices.Contains(codes, code) {
		return nil
	}
	if expect == "" {
		expect = "2xx"
	}
	return badly("%s answered with %d, and %s is expected", who, code, expect)
}

func statusCodes(expect string) ([]int, error) {
	if strings.TrimSpace(expect) == "" {
		return nil, nil
	}
	var out []int
	for part := range strings.SplitSeq(expect, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(part))
		if err != nil || n < 100 || n > 599 {
			return nil, fmt.Errorf("expect is %.60q; of an http check give status codes, such as 200 or 200,204", expect)
		}
		out = append(out, n)
	}
	return out, nil
}

// checkLogs looks for a text in what containers have written since the restart.
// The lines themselves are shown to nobody.
func (s *step) checkLogs(ctx context.Context, c *Check, pods []corev1.Pod, round int) error {
	forbidden, err := regexp.Compile(c.Forbid)
	if err != nil {
		return kind.Definitely("forbid is no regular expression; write the consumer again")
	}
	if c.Selector != "" {
		if pods, err = s.listPods(ctx, s.c.Namespace, c.Selector); err != nil {
			return err
		}
	}
	if len(pods) == 0 {
		return badly("there are no pods whose logs could be read")
	}
	logs := logsOf(pods)
	many, unread := len(logs) > logsPerLook, 0
	for _, l := range logs {
		key := strings.Join([]string{c.Forbid, c.Selector, strconv.Itoa(round), string(l.pod.UID), l.container}, "\x00")
		if many && s.memory.isClean(key) {
			continue
		}
		if many && s.view.left <= 0 {
			unread++
			continue
		}
		s.view.left--
		n, err := s.countLines(ctx, l.pod, l.container, forbidden)
		if err != nil {
			return err
		}
		if n > 0 {
			return badly("container %s of pod %s has written %d lines with what is forbidden", l.container, l.pod.Name, n)
		}
		if many {
			s.memory.clean(key)
		}
	}
	if unread > 0 {
		return notYet{fmt.Errorf("of %d logs %d have still to be read", len(logs), unread)}
	}
	s.result = fmt.Sprintf("no line of %d containers matches", len(logs))
	return nil
}

// logsPerLook are read at each look, all of them. More are read once, by several
// looks.
const logsPerLook = 50

// notYet is why a check has not been made yet.
type notYet struct{ error }

type containerLog struct {
	pod       *corev1.Pod
	container string
}

func logsOf(pods []corev1.Pod) (out []containerLog) {
	for i := range pods {
		p := &pods[i]
		if ended(p) || terminating(p) {
			continue
		}
		for _, container := range p.Spec.Containers {
			out = append(out, containerLog{p, container.Name})
		}
	}
	return out
}

func (s *step) countLines(ctx context.Context, p *corev1.Pod, container string, forbidden *regexp.Regexp) (int, error) {
	since := metav1.NewTime(s.d.Since)
	if p.CreationTimestamp.After(since.Time) {
		since = p.CreationTimestamp
	}
	limit := int64(maxLog)
	text, err := s.core.Pods(p.Namespace).GetLogs(p.Name, &corev1.PodLogOptions{
		Container: container, SinceTime: &since, LimitBytes: &limit,
	}).Stream(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { _ = text.Close() }()
	lines := bufio.NewReader(io.LimitReader(text, maxLog))
	n := 0
	for {
		line, err := lines.ReadString('\n')
		if line != "" && forbidden.MatchString(line) {
			n++
		}
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// checkPods: all pods with the labels are ready, and there is one.
func (s *step) checkPods(ctx context.Context, c *Check) error {
	pods, err := s.listPods(ctx, s.c.Namespace, c.Selector)
	if err != nil {
		return err
	}
	n := 0
	for i := range pods {
		p := &pods[i]
		if ended(p) || terminating(p) {
			continue
		}
		if is, _ := ready(p); !is {
			return badly("pod %s is not ready", p.Name)
		}
		n++
	}
	if n == 0 {
		return badly("no pod of namespace %s has the labels %s", s.c.Namespace, c.Selector)
	}
	s.result = fmt.Sprintf("%d pods are ready", n)
	return nil
}
