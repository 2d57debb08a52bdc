package consumer

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// A cluster that somebody has taken over, or that is none.

const (
	hostileToken = "a-token-of-the-connection-0123456789"
	hostileValue = "a-value-that-the-cluster-was-given-0123456789"
	nasty        = "\x1b[2J\x1b]0;owned\a\r\nredis/app: completed\u202e\u009b31m"
)

// hostileStep is a step of a delivery to a cluster that answers as handler does.
func hostileStep(t *testing.T, handler http.HandlerFunc) (*clusters, *Consumer, Delivery) {
	t.Helper()
	e := apiServer(t, handler)
	e.Admin = connection.NewAdmin(kind.Material{Secret: hostileToken})
	k := newClusters(Options{Entry: func(context.Context, string) (*connection.Entry, error) { return e, nil }})
	c := &Consumer{
		Name: "web", Connection: "prod", Namespace: "app", Mode: Restart, ExternalSecrets: []string{"app", "app=web"}, Secrets: []string{"app"},
		Workloads:      [][]Workload{{{Kind: deployment, Name: "web"}}, {{Kind: statefulSet, Selector: "app=web"}}},
		Checks:         []Check{{Type: checkLogs, Forbid: "x", Selector: "app=web"}, {Type: checkPods, Selector: "app=web"}, {Type: checkHTTP, Service: "http:web:80", Path: "/"}},
		RolloutTimeout: time.Minute,
	}
	return k, c, Delivery{ID: "r1-1", Since: noon, Holds: []Value{{Role: "db", Secret: hostileValue}}}
}

// everything calls every step, and returns what came of it as text: of what is given the
// secrets of a delivery, and of what looks before there is one.
func everything(t *testing.T, k *clusters, c *Consumer, d Delivery, timeout time.Duration) (given, before string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	var out strings.Builder
	add := func(v any, err error) {
		raw, marshalErr := json.Marshal(v)
		require.NoError(t, marshalErr)
		fmt.Fprintf(&out, "%s %v\n", raw, err)
	}
	for _, step := range []func(context.Context, *Consumer, Delivery) Progress{k.Sync, k.Restart, k.Check} {
		p := step(ctx, c, d)
		err := p.Err
		p.Err = nil
		add(p, err)
	}
	add(k.Look(ctx, c, d), nil)
	given = out.String()
	out.Reset()
	for _, f := range []Finding{k.Preflight(ctx, c), k.Radius(ctx, c, Emergency{Whole: true})} {
		err := f.Err
		f.Err = nil
		add(f, err)
	}
	return given, out.String()
}

// TestHostileCluster: an API server that answers with escape sequences, with the token
// that it was shown, and with the values of its Secrets, has none of it shown.
func TestHostileCluster(t *testing.T) {
	t.Parallel()
	echo := strings.Join([]string{hostileToken, hostileValue, nasty}, " ")
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request){
		"objects": func(w http.ResponseWriter, r *http.Request) { _ = json.NewEncoder(w).Encode(hostileObject(r, echo)) },
		"status": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusConflict)
			_ = json.NewEncoder(w).Encode(map[string]any{
				"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": hostileToken, "message": echo, "code": 409,
				"details": map[string]any{"kind": echo, "name": hostileToken + nasty, "group": echo, "causes": []any{map[string]any{"message": echo}}},
			})
		},
		"not found": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "code": 404, "message": echo, "details": map[string]any{"kind": echo, "name": echo}})
		},
		"forbidden": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			_ = json.NewEncoder(w).Encode(map[string]any{
				"kind": "Status", "apiVersion": "v1", "code": 403, "reason": "Forbidden",
				"message": `User "` + hostileToken + nasty + `" cannot get resource "secrets" in API group "" in the namespace "app"`, "details": map[string]any{"name": echo},
			})
		},
		"reason phrase": func(w http.ResponseWriter, _ *http.Request) {
			c, _, err := w.(http.Hijacker).Hijack()
			if err == nil {
				_, _ = fmt.Fprintf(c, "HTTP/1.1 500 %s\r\nX-A: %s\r\nContent-Length: 3\r\n\r\nbad", hostileToken, hostileValue)
				_ = c.Close()
			}
		},
		"no HTTP": func(w http.ResponseWriter, _ *http.Request) {
			c, _, err := w.(http.Hijacker).Hijack()
			if err == nil {
				_, _ = io.WriteString(c, echo+"\r\n\r\n")
				_ = c.Close()
			}
		},
		"no JSON": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, echo) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k, c, d := hostileStep(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				w.Header().Set("Warning", `299 - "`+hostileValue+`"`)
				answer(w, r)
			})
			given, before := everything(t, k, c, d, 20*time.Second)
			require.NotContains(t, given, hostileValue[:20])
			said := given + before
			require.NotContains(t, said, hostileToken[:16])
			for _, raw := range strings.Split(strings.TrimSuffix(said, "\n"), "\n") {
				var text any
				require.NoError(t, json.NewDecoder(strings.NewReader(raw)).Decode(&text))
				eachText(text, func(s string) { require.Equal(t, bounded.Line(s), s) })
			}
			for _, bad := range []string{"\x1b", "\u202e", "\u009b", `\u001b`, `\u202e`} {
				require.NotContains(t, said, bad)
			}
		})
	}
}

func eachText(v any, f func(string)) {
	switch v := v.(type) {
	case string:
		f(v)
	case []any:
		for _, one := range v {
			eachText(one, f)
		}
	case map[string]any:
		for key, one := range v {
			f(key)
			eachText(one, f)
		}
	}
}

// hostileObject is what was asked for, with text wherever text goes.
func hostileObject(r *http.Request, text string) map[string]any {
	labels := map[string]any{"app": "web"}
	meta := map[string]any{
		"name": "web" + text, "namespace": "app", "uid": text, "resourceVersion": text, "labels": labels, "generation": 1,
		"annotations": map[string]any{"force-sync": text}, "ownerReferences": []any{map[string]any{"kind": "ReplicaSet", "name": "web" + text + "-1", "uid": text, "apiVersion": "apps/v1", "controller": true}},
		"managedFields": []any{map[string]any{"manager": text, "operation": "Update", "fieldsType": "FieldsV1", "fieldsV1": map[string]any{"f:data": map[string]any{}}}},
	}
	containers := []any{map[string]any{"name": text, "ready": false, "restartCount": 3, "image": text, "imageID": text, "state": map[string]any{"waiting": map[string]any{"reason": text, "message": text}}}}
	spec := map[string]any{
		"replicas": 1, "selector": map[string]any{"matchLabels": labels}, "nodeName": text, "containers": []any{map[string]any{"name": text, "image": text}},
		"template":        map[string]any{"metadata": map[string]any{"labels": labels, "annotations": map[string]any{"kubectl.kubernetes.io/restartedAt": text}}},
		"refreshInterval": text, "refreshPolicy": text, "secretStoreRef": map[string]any{"name": text, "kind": text}, "target": map[string]any{"name": text},
	}
	conditions := []any{map[string]any{"type": "Ready", "status": "False", "reason": text, "message": text}, map[string]any{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": text}}
	object := map[string]any{
		"metadata": meta, "spec": spec, "data": map[string]any{}, "type": text,
		"status": map[string]any{
			"phase": "Running", "conditions": conditions, "containerStatuses": containers, "updateRevision": text, "currentRevision": text, "observedGeneration": 1,
			"replicas": 1, "syncedResourceVersion": text, "refreshTime": text, "allowed": false, "reason": text, "evaluationError": text,
		},
	}
	of, version := "Pod", "v1"
	for part, kindOf := range map[string][2]string{
		"pods": {"Pod", "v1"}, "secrets": {"Secret", "v1"}, "deployments": {"Deployment", "apps/v1"}, "statefulsets": {"StatefulSet", "apps/v1"}, "daemonsets": {"DaemonSet", "apps/v1"},
		"externalsecrets": {"ExternalSecret", "external-secrets.io/v1"}, "secretstores": {"SecretStore", "external-secrets.io/v1"}, "clustersecretstores": {"ClusterSecretStore", "external-secrets.io/v1"},
		"selfsubjectaccessreviews": {"SelfSubjectAccessReview", "authorization.k8s.io/v1"}, "selfsubjectreviews": {"SelfSubjectReview", "authentication.k8s.io/v1"},
	} {
		if strings.Contains(r.URL.Path, "/"+part) {
			of, version = kindOf[0], kindOf[1]
		}
	}
	object["kind"], object["apiVersion"] = of, version
	if of == "Pod" {
		delete(spec, "selector")
		delete(spec, "template")
	}
	delete(object["status"].(map[string]any), "refreshTime")
	if strings.HasSuffix(of, "Review") {
		object = map[string]any{"kind": of, "apiVersion": version, "status": map[string]any{"allowed": true, "reason": text, "userInfo": map[string]any{"username": text}}}
	}
	last := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	if r.Method == http.MethodGet && strings.HasSuffix(last, "s") && last != "status" {
		return map[string]any{"kind": of + "List", "apiVersion": version, "metadata": map[string]any{"resourceVersion": "1"}, "items": []any{object}}
	}
	return object
}

// large is what was asked for, as large as any that is read.
func large(r *http.Request) map[string]any {
	object, most := hostileObject(r, "x"), maxObject
	one := object
	if items, is := object["items"].([]any); is {
		one, most = items[0].(map[string]any), maxPage
	}
	if meta, has := one["metadata"].(map[string]any); has {
		meta["annotations"] = map[string]any{"large": strings.Repeat("x", most-16<<10)}
	}
	return object
}

// TestClusterWithoutEnd: answers without an end, lists whose pages never stop and servers
// that say a byte a second cost a bounded amount of memory, and time that was set before.
func TestClusterWithoutEnd(t *testing.T) {
	for name, answer := range map[string]func(w http.ResponseWriter, r *http.Request){
		"an object without an end": func(w http.ResponseWriter, _ *http.Request) {
			_, err := io.WriteString(w, `{"kind":"Deployment","apiVersion":"apps/v1","metadata":{"name":"`)
			for block := []byte(strings.Repeat("x", 64<<10)); err == nil; {
				_, err = w.Write(block)
			}
		},
		"objects of the largest size": func(w http.ResponseWriter, r *http.Request) {
			_ = json.NewEncoder(w).Encode(large(r))
		},
		"one that is compressed": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(bomb(t))
		},
		"pages without an end": func(w http.ResponseWriter, r *http.Request) {
			object := hostileObject(r, strings.Repeat("x", 4<<10))
			if _, is := object["items"]; is {
				object["metadata"] = map[string]any{"continue": "again"}
			}
			_ = json.NewEncoder(w).Encode(object)
		},
		"headers without an end": func(w http.ResponseWriter, _ *http.Request) {
			c, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				return
			}
			defer func() { _ = c.Close() }()
			_, err = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
			for line := "X: " + strings.Repeat("x", 4096) + "\r\n"; err == nil; {
				_, err = io.WriteString(c, line)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			var asked atomic.Int64
			k, c, d := hostileStep(t, func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				w.Header().Set("Content-Type", "application/json")
				answer(w, r)
			})
			stop := make(chan struct{})
			most := make(chan uint64)
			go func() { most <- heap(stop) }()
			began := time.Now()
			given, before := everything(t, k, c, d, 8*time.Second)
			took := time.Since(began)
			close(stop)
			require.Less(t, <-most, uint64(256<<20))
			require.Less(t, took, 30*time.Second)
			require.Positive(t, asked.Load())
			require.Less(t, len(given)+len(before), 1<<20)
		})
	}
}

// heap watches how much of it is in use, above what there was, until stop.
func heap(stop <-chan struct{}) (most uint64) {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	before := m.HeapInuse
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		runtime.ReadMemStats(&m)
		if m.HeapInuse > before {
			most = max(most, m.HeapInuse-before)
		}
		select {
		case <-stop:
			return most
		case <-tick.C:
		}
	}
}

// TestBearerIsBounded: of one answer no more is read than is bounded, and neither of all
// answers of a step.
func TestBearerIsBounded(t *testing.T) {
	t.Parallel()
	e := apiServer(t, func(w http.ResponseWriter, _ *http.Request) {
		var err error
		for block := make([]byte, 1<<20); err == nil; {
			_, err = w.Write(block)
		}
	})
	c, err := dial(e, podFolder)
	require.NoError(t, err)
	defer c.close()
	read := func(query string) int64 {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.host+query, nil)
		require.NoError(t, err)
		resp, err := c.http.Do(r)
		require.NoError(t, err)
		defer func() { _ = resp.Body.Close() }()
		n, err := io.Copy(io.Discard, resp.Body)
		require.ErrorIs(t, err, bounded.ErrTooMuch)
		return n
	}
	all := read("/api/v1/namespaces/app/secrets/app")
	require.LessOrEqual(t, all, int64(maxObject))
	for range maxStep/maxPage + 2 {
		n := read("/api/v1/namespaces/app/pods?limit=250")
		require.LessOrEqual(t, n, int64(maxPage))
		all += n
	}
	require.LessOrEqual(t, all, int64(maxStep))
	require.Zero(t, read("/api/v1/namespaces/app/secrets/app"), "no more of what is kept")
	n := read("/api/v1/namespaces/app/pods/web/log?limitBytes=1")
	require.Positive(t, n, "logs are not kept")
	require.LessOrEqual(t, n, int64(maxObject))
}

// TestHostsOfChecks: what config does not name is not asked, in whatever form it is
// written, and what it names is not asked where the name leads elsewhere.
func TestHostsOfChecks(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer server.Close()
	port := server.URL[strings.LastIndex(server.URL, ":"):]
	s, _ := checker()
	s.k.MayCall = func(host string) bool {
		return strings.EqualFold(host, "api.example.com") || strings.HasSuffix(host, "169.254.169.254") || host == "::ffff:169.254.169.254" || host == "64:ff9b::a9fe:a9fe"
	}
	for _, u := range []string{
		"http://127.0.0.1" + port, "http://localhost" + port, "http://[::ffff:127.0.0.1]" + port, "http://2130706433" + port, "http://0x7f.1" + port, "http://0177.0.0.1" + port,
		"http://127.1" + port, "http://[::1]" + port, "https://[::]" + port, "http://api.example.com@127.0.0.1" + port, "http://127.0.0.1" + port + "#@api.example.com",
		"http://127.0.0.1" + port + "?api.example.com", `http://127.0.0.1` + port + `\@api.example.com`, "https://api.example.com.127.0.0.1.nip.io", "http://api.example.com" + port,
		"https://169.254.169.254", "https://[::ffff:169.254.169.254]", "https://[64:ff9b::a9fe:a9fe]", "//127.0.0.1" + port, "http:127.0.0.1" + port, "http:///127.0.0.1" + port,
	} {
		require.Error(t, s.checkURL(t.Context(), &Check{Type: checkHTTP, URL: u}), u)
	}
	require.Zero(t, asked.Load())
}

// bomb is a quarter of a gigabyte, compressed.
func bomb(t *testing.T) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	block := make([]byte, 1<<20)
	for range 256 {
		_, err := w.Write(block)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return out.Bytes()
}

// TestListsWithoutEnd: a list whose pages are as large as any that is read, and never
// stop, ends with what a step may keep, and says so.
func TestListsWithoutEnd(t *testing.T) {
	var pages atomic.Int64
	e := apiServer(t, func(w http.ResponseWriter, r *http.Request) {
		pages.Add(1)
		object := large(r)
		object["metadata"] = map[string]any{"continue": "again"}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(object)
	})
	c, err := dial(e, podFolder)
	require.NoError(t, err)
	defer c.close()
	stop := make(chan struct{})
	most := make(chan uint64)
	go func() { most <- heap(stop) }()
	_, err = c.listPods(t.Context(), "app", "")
	close(stop)
	used := <-most
	require.ErrorIs(t, err, bounded.ErrTooMuch)
	require.ErrorContains(t, c.explain(err), "64 MiB in one step")
	require.GreaterOrEqual(t, pages.Load(), int64(maxStep/maxPage), "it is read to the bound")
	require.Less(t, used, uint64(256<<20))
	t.Logf("%d pages, %d MiB of heap at most", pages.Load(), used>>20)
}

// TestListsOfLargeObjects: what has no room in a page comes in smaller ones.
func TestListsOfLargeObjects(t *testing.T) {
	t.Parallel()
	const pods, size = 100, 100 << 10
	var asked []string
	e := apiServer(t, func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		asked = append(asked, q.Get("limit"))
		from, _ := strconv.Atoi(q.Get("continue"))
		limit, _ := strconv.Atoi(q.Get("limit"))
		list := corev1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}}
		for i := from; i < min(pods, from+limit); i++ {
			list.Items = append(list.Items, corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint(i), Annotations: map[string]string{"large": strings.Repeat("x", size)}}})
		}
		if from+limit < pods {
			list.Continue = fmt.Sprint(from + limit)
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(list)
	})
	c, err := dial(e, podFolder)
	require.NoError(t, err)
	defer c.close()
	all, err := c.listPods(t.Context(), "app", "")
	require.NoError(t, err)
	require.Len(t, all, pods)
	for i, p := range all {
		require.Equal(t, fmt.Sprint(i), p.Name)
	}
	require.Equal(t, []string{"250", "62", "62"}, asked)
}
