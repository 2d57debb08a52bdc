package consumer

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
)

const fuzzedValue = "served-value-1c7f9b2e4a"

// FuzzTemplates: of a header nothing is replaced but a template of a role that the check
// names, what is put there is not read again, and no header that cannot be sent is.
func FuzzTemplates(f *testing.F) {
	for _, text := range []string{
		"{{db.password}}", "{{ db.username }}:{{db.password}}", "{{db.password", "{{{{db.password}}}}", "{{other.value}}", "{{db.password}}\r\nX: y", "{{db}}", "{{.password}}",
		"{{db..password}}", "{{db.password.value}}", "Bearer {{a.b.value}}", "}}{{", "{{db.passwordx}}", "\x00", "{{\ndb.password}}", "{{db.value}}",
	} {
		f.Add("X-Key", text, "served")
		f.Add("Authorization", text, "{{other.value}}")
		f.Add("X-Key", text, "a\r\nX-Evil: 1")
	}
	f.Fuzz(func(t *testing.T, name, text, served string) {
		c := &Check{Type: checkHTTP, URL: "https://api.example.com/", Headers: map[string]string{name: text}}
		if err := c.validate(); err != nil {
			if bounded.Line(err.Error()) != err.Error() {
				t.Fatalf("%q: %q", text, err)
			}
			return
		}
		from := map[string]*Source{}
		for role, fields := range c.uses() {
			if !roleRegexp.MatchString(role) {
				t.Fatalf("%q uses role %q", text, role)
			}
			from[role] = &Source{Role: role, Fields: map[string]string{}}
			for _, field := range fields {
				from[role].Fields[field] = served
			}
		}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.fill(r, from); err != nil {
			if len(served) > 7 && strings.Contains(err.Error(), served) {
				t.Fatalf("%q: %v", text, err)
			}
			return
		}
		got := r.Header.Get(name)
		if strings.ContainsAny(got, "\r\n\x00") {
			t.Fatalf("%q with %q became %q", text, served, got)
		}
		if len(from) == 0 && got != text {
			t.Fatalf("%q became %q", text, got)
		}
		if want := placeholder.ReplaceAllLiteralString(text, served); got != want {
			t.Fatalf("%q with %q became %q", text, served, got)
		}
	})
}

// FuzzURLs: what may be asked is one host to everybody who reads the URL.
func FuzzURLs(f *testing.F) {
	for _, text := range []string{
		"https://api.example.com/health", "https://api.example.com:8443", "http://127.0.0.1:8080/x", "https://a@b/", `https://a\@b/`, "https://[::1]:443/", "https://[fe80::1%25eth0]/",
		"//a/b", "https:a", "https://a#@b", "https://a?@b", "https://\u212aey.example.com/", "https://a.:443/", "https://0x7f.1/", "HTTPS://A/", "https://a:0443/", "https://a\x00b", "http://localhost:1",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		err := checkURL(text)
		if err != nil && bounded.Line(err.Error()) != err.Error() {
			t.Fatalf("%q: %q", text, err)
		}
		to, sendErr := destination(text)
		_, _ = ParseSecretHost(text)
		if sendErr == nil {
			again, err := ParseSecretHost(to.String())
			u, parseErr := url.Parse(text)
			if err != nil || parseErr != nil || again != to || !strings.EqualFold(u.Hostname(), to.host) && !sameIP(u.Hostname(), to.host) {
				t.Fatalf("%q leads to %s, and that to %s (%v)", text, to, again, err)
			}
		}
		if err != nil {
			return
		}
		u, err := url.Parse(text)
		if err != nil || u.User != nil || u.Scheme != "https" && !isLoopback(u.Hostname()) {
			t.Fatalf("%q is taken", text)
		}
		if hostname(text) != u.Hostname() {
			t.Fatalf("%q has the hosts %q and %q", text, hostname(text), u.Hostname())
		}
	})
}

func sameIP(a, b string) bool {
	x, err := netip.ParseAddr(a)
	y, err2 := netip.ParseAddr(b)
	return err == nil && err2 == nil && x == y
}

// FuzzConsumer: any consumer is refused with one sentence, or is one whose requests stay
// where they belong.
func FuzzConsumer(f *testing.F) {
	for _, text := range []string{
		`{"connection":"prod","namespace":"app","secrets":["app"],"mode":"restart","workloads":[[{"kind":"Deployment","name":"web"}]],"rollout_timeout":1000000000,"checks":[{"type":"http","service":"http:web:80","path":"/healthz"}]}`,
		`{"connection":"prod","namespace":"app","external_secrets":["app=web,tier!=x"],"mode":"none","rollout_timeout":1000000000,"checks":[{"type":"logs","forbid":"(a+)+$"},{"type":"prometheus","url":"https://p","query":"up","expect":"== 1"}],"hooks":[{"name":"a","url":"https://a/"}]}`,
		`{"namespace":"../x","checks":[{"type":"http","service":"http:web:80","path":"/../../../secrets"}]}`,
		`{"connection":"prod","namespace":"app","secrets":["a"],"rollout_timeout":1000000000,"checks":[{"type":"http","service":"http:web:80","path":"%2e%2e/%2e%2e/x?y#z"}]}`,
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		c := &Consumer{}
		if json.Unmarshal(raw, c) != nil {
			return
		}
		c.Normalize()
		if err := c.Validate(); err != nil {
			if bounded.Line(err.Error()) != err.Error() || len(err.Error()) > 2000 {
				t.Fatalf("%s: %q", raw, err)
			}
			return
		}
		c.AllowsRole("app")
		for i := range c.Checks {
			check := &c.Checks[i]
			check.target()
			check.reads()
			if check.Service == "" {
				continue
			}
			path := "/api/v1/namespaces/" + c.Namespace + "/services/" + check.Service + "/proxy/"
			u, err := url.Parse("https://cluster" + path + strings.TrimPrefix(check.Path, "/"))
			if err != nil {
				continue // no request is made of it
			}
			if u.Host != "cluster" || !strings.HasPrefix(u.Path, path) || slices.Contains(strings.Split(u.Path, "/"), "..") {
				t.Fatalf("%s asks for %s", raw, u)
			}
		}
	})
}

// FuzzObjects: whatever a cluster answers with is looked at without harm, and what is
// shown of it holds no secret that it knows and stays on its line.
func FuzzObjects(f *testing.F) {
	for _, text := range []string{
		`{"metadata":{"name":"web","generation":2,"annotations":{"x":"y"}},"spec":{"replicas":3,"selector":{"matchLabels":{"app":"web"}},"template":{"metadata":{"annotations":{"kubectl.kubernetes.io/restartedAt":"2026-01-01T00:00:00Z"}}}},"status":{"observedGeneration":2,"updatedReplicas":3,"replicas":3,"availableReplicas":2,"conditions":[{"type":"Progressing","status":"False","reason":"ProgressDeadlineExceeded"}]}}`,
		`{"metadata":{"name":"web-1","ownerReferences":[{"kind":"ReplicaSet","name":"web-5d","controller":true}],"labels":{"app":"web"}},"spec":{"containers":[{"name":"c"}]},"status":{"phase":"Running","containerStatuses":[{"name":"c","restartCount":-1,"state":{"waiting":{"reason":"CrashLoopBackOff"}},"lastState":{"terminated":{"exitCode":1,"reason":"Error"}}}]}}`,
		`{"metadata":{"name":"app","managedFields":[{"manager":"x","fieldsType":"FieldsV1","fieldsV1":{"f:data":{"f:a":{}}}}]},"data":{"a":"c2VydmVkLXZhbHVlLTFjN2Y5YjJlNGE="},"immutable":true}`,
		`{"kind":"ExternalSecret","metadata":{"name":"served-value-1c7f9b2e4a","annotations":{"force-sync":"r1-1.3"}},"spec":{"refreshPolicy":"CreatedOnce","refreshInterval":"0s","target":{"name":"\u001b[31m","template":{"data":{}}}},"status":{"conditions":[{"type":"Ready","status":"False","reason":"SecretSyncedError"}],"refreshTime":"x"}}`,
		`{"spec":{"replicas":-5},"status":{"conditions":[null,{}]}}`,
	} {
		f.Add([]byte(text), "r1-1")
	}
	f.Fuzz(func(t *testing.T, raw []byte, id string) {
		if len(raw) > 64<<10 {
			return
		}
		now := noon
		d := Delivery{ID: id, Since: now, Holds: []Value{{Role: "db", Field: "password", Secret: fuzzedValue}}}
		s := &step{
			cluster: &cluster{name: "prod", manager: "harmonyflow"}, c: &Consumer{Namespace: "app", Mode: Restart, Stabilization: time.Minute}, d: d, now: now,
			hides: hiding("a-token-of-the-connection", d),
		}
		var pod corev1.Pod
		var pods []corev1.Pod
		if json.Unmarshal(raw, &pod) == nil {
			pods = append(pods, pod)
			broken(&pod, now)
			unsettled(&pod, now, time.Minute)
			ownerOf(&pod)
		}
		out := s.evidenceOf(false, string(raw))
		var deployment appsv1.Deployment
		var set appsv1.StatefulSet
		var daemons appsv1.DaemonSet
		var all []*workload
		if json.Unmarshal(raw, &deployment) == nil {
			all = append(all, ofDeployment(&deployment))
		}
		if json.Unmarshal(raw, &set) == nil {
			all = append(all, ofStatefulSet(&set))
		}
		if json.Unmarshal(raw, &daemons) == nil {
			all = append(all, ofDaemonSet(&daemons))
		}
		for _, w := range all {
			own, _ := theirs(pods, w)
			_, _ = prove(w, pods, proof{mark: id, since: now, now: now})
			one, seen := seenWorkload(w, append(own, pods...), func(*corev1.Pod) bool { return true }, now)
			out.Workloads, out.Pods = append(out.Workloads, one), append(out.Pods, seen...)
		}
		var secretObject corev1.Secret
		if json.Unmarshal(raw, &secretObject) == nil {
			secrets := []*secret{ofSecret(&secretObject)}
			_ = compare(secrets, d)
			out.Values, out.Changed = seenValues(secrets, d), lastChange(secrets)
		}
		object := map[string]any{}
		if json.Unmarshal(raw, &object) == nil {
			e := &external{object: &unstructured.Unstructured{Object: object}}
			e.deaf(now)
			e.tries(id)
			e.templated()
			parentOf(e.object)
			out.Externals = append(out.Externals, s.seenExternal(e))
		}
		var status metav1.Status
		if json.Unmarshal(raw, &status) == nil {
			_, text := explainStatus(status)
			out.Error = text
		}
		out.Count()
		out.Map(s.clean)
		out.Fit(16 << 10)
		shown, err := json.Marshal(out)
		if err != nil {
			t.Fatal(err)
		}
		out.Map(func(text string) string {
			if bounded.Line(text) != text {
				t.Fatalf("%s is shown as %q", raw, text)
			}
			return text
		})
		if strings.Contains(string(shown), fuzzedValue) || len(shown) > 32<<10 {
			t.Fatalf("%s is shown as %s", raw, shown)
		}
	})
}

// FuzzPrometheus: an answer is understood or refused, and so is what is expected of it.
func FuzzPrometheus(f *testing.F) {
	f.Add([]byte(`{"status":"success","data":{"resultType":"vector","result":[{"value":[1,"0"]}]}}`), "== 0")
	f.Add([]byte(`{"status":"success","data":{"resultType":"scalar","result":[1,"NaN"]}}`), "< 5")
	f.Add([]byte(`{"data":{"result":[[[[]]]]}}`), "!= 1e999")
	f.Fuzz(func(t *testing.T, raw []byte, expect string) {
		values, err := parseResult(strings.NewReader(string(raw)))
		c, bad := parseComparison(expect)
		if bad != nil {
			if bounded.Line(bad.Error()) != bad.Error() {
				t.Fatalf("%q: %q", expect, bad)
			}
			return
		}
		if err == nil {
			for _, v := range values {
				_ = c.holds(v)
			}
		}
		_, _ = statusCodes(expect)
	})
}
