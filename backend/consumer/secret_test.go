package consumer

import (
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

func held(name string, loose bool, values ...string) *secret {
	s := &secret{name: name, loose: loose, data: map[string][]byte{}}
	for _, v := range values {
		s.data[v] = []byte(v)
	}
	return s
}

func TestCompare(t *testing.T) {
	t.Parallel()
	const next, old = "next/value+1", "old-value-1"
	for name, c := range map[string]struct {
		secrets []*secret
		says    string
	}{
		"as it is":              {[]*secret{held("a", false, "app", next)}, ""},
		"in another one":        {[]*secret{held("a", false, "app"), held("b", false, next)}, ""},
		"within, strictly":      {[]*secret{held("a", false, "redis://:"+next+"@db")}, "no value of Secret a is what role db serves"},
		"within a template":     {[]*secret{held("a", true, "redis://:"+next+"@db")}, ""},
		"escaped in a URL":      {[]*secret{held("a", true, "redis://:next%2Fvalue%2B1@db")}, ""},
		"in base64":             {[]*secret{held("a", true, base64.StdEncoding.EncodeToString([]byte(next)))}, ""},
		"nowhere":               {[]*secret{held("a", true, "else"), held("b", true)}, "no value of Secret a, b is what role db serves"},
		"the old one as well":   {[]*secret{held("a", false, next, old)}, "still holds what role db no longer serves"},
		"the old one, escaped":  {[]*secret{held("a", true, next, "x="+old)}, "still holds"},
		"the old one, strictly": {[]*secret{held("a", false, next, "x="+old)}, ""},
		"missing":               {[]*secret{{name: "a", missing: true}}, "Secret a is not there"},
	} {
		err := compare(c.secrets, delivery("r1", next, old))
		if c.says == "" {
			require.NoError(t, err, name)
			continue
		}
		require.ErrorContains(t, err, c.says, name)
		require.False(t, kind.IsDefinite(err), name)
		require.NotContains(t, err.Error(), next, name)
		require.NotContains(t, err.Error(), old, name)
	}
	fixed := held("a", false, old)
	fixed.immutable = true
	require.True(t, kind.IsDefinite(compare([]*secret{fixed}, delivery("r1", next))))
	// A password may be part of the next one, and a short one of anything.
	require.NoError(t, compare([]*secret{held("a", true, "url=old-value-12")}, delivery("r1", "old-value-12", "old-value-1")))
	require.NoError(t, compare([]*secret{held("a", true, "redis://:next@db")}, delivery("r1", "next", "redis")))
}

func TestWhenASecretChanged(t *testing.T) {
	t.Parallel()
	at := func(m int) *metav1.Time { n := metav1.NewTime(noon.Add(time.Duration(m) * time.Minute)); return &n }
	meta := metav1.ObjectMeta{CreationTimestamp: *at(0), ManagedFields: []metav1.ManagedFieldsEntry{
		{Time: at(5), FieldsV1: metav1.NewFieldsV1(`{"f:data":{"f:password":{}}}`)},
		{Time: at(9), FieldsV1: metav1.NewFieldsV1(`{"f:metadata":{"f:labels":{"f:team":{}}}}`)},
		{Time: at(2)},
	}}
	require.Equal(t, at(5).Time, dataChanged(meta))
	meta.ManagedFields[0].FieldsV1 = metav1.NewFieldsV1(`{"f:stringData":{"f:password":{}}}`)
	require.Equal(t, at(5).Time, dataChanged(meta))
	require.Equal(t, at(0).Time, dataChanged(metav1.ObjectMeta{CreationTimestamp: *at(0)}))
}

// That External Secrets computes the same is shown by TestCluster, within one second.
func TestResourceVersion(t *testing.T) {
	t.Parallel()
	o := &unstructured.Unstructured{Object: map[string]any{}}
	o.SetGeneration(2)
	e := &external{object: o}
	require.True(t, strings.HasPrefix(e.resourceVersion(), "2-"))
	require.Len(t, e.resourceVersion(), 2+56)
	before := e.resourceVersion()
	o.SetAnnotations(map[string]string{"force-sync": "r1"})
	require.NotEqual(t, before, e.resourceVersion())
	require.True(t, e.forced("r1"))
	require.False(t, e.forced("r"))
	require.False(t, e.forced("r12"))
	require.Equal(t, 1, e.tries("r1"))
	o.SetAnnotations(map[string]string{"force-sync": "r1.3"})
	require.True(t, e.forced("r1"))
	require.Equal(t, 3, e.tries("r1"))
}

// Without a hash that is known, only a refresh of a later second says that what was
// read is what is delivered.
func TestReadByTime(t *testing.T) {
	t.Parallel()
	e := &external{object: &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{
		"refreshTime": "2026-03-01T12:00:00Z", "syncedResourceVersion": "of-another-version",
		"conditions": []any{map[string]any{"type": "Ready", "status": "True"}},
	}}}}
	require.True(t, e.read(Delivery{Since: noon.Add(-time.Millisecond)}))
	require.False(t, e.read(Delivery{Since: noon}))
	require.False(t, e.read(Delivery{Since: noon.Add(time.Millisecond)}))
}

func TestComparisons(t *testing.T) {
	t.Parallel()
	for expect, holds := range map[string]bool{"== 3": true, "< 5": true, "<3": false, "<= 3": true, "> 3": false, ">= 3": true, "!= 3": false, "!= 4": true} {
		c, err := parseComparison(expect)
		require.NoError(t, err)
		require.Equal(t, holds, c.holds(3), expect)
	}
	for _, bad := range []string{"", "3", "== three", "== NaN", "=3"} {
		_, err := parseComparison(bad)
		require.Error(t, err, bad)
	}
	v, err := parseResult(strings.NewReader(`{"status":"success","data":{"resultType":"scalar","result":[1,"2.5"]}}`))
	require.NoError(t, err)
	require.Equal(t, []float64{2.5}, v)
	v, err = parseResult(strings.NewReader(`{"status":"success","data":{"resultType":"vector","result":[]}}`))
	require.NoError(t, err)
	require.Empty(t, v)
	for _, bad := range []string{`{}`, `<html>`, `{"status":"error"}`, `{"status":"success","data":{"resultType":"matrix","result":[]}}`} {
		_, err := parseResult(strings.NewReader(bad))
		require.Error(t, err, bad)
	}
}
