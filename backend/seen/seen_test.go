package seen

import (
	"reflect"
	"testing"

	"github.com/stretchr/testify/require"
)

// fill puts a text into every place of v that takes one, and one element into lists.
func fill(v reflect.Value, n *int) {
	switch v.Kind() {
	case reflect.String:
		v.SetString("as it came")
		*n++
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				fill(v.Field(i), n)
			}
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0), n)
	default:
	}
}

func count(v reflect.Value, text string) (n int) {
	switch v.Kind() {
	case reflect.String:
		if v.String() == text {
			n++
		}
	case reflect.Struct:
		for i := range v.NumField() {
			n += count(v.Field(i), text)
		}
	case reflect.Slice:
		for i := range v.Len() {
			n += count(v.Index(i), text)
		}
	default:
	}
	return n
}

// TestMap: no text of what was seen is left out, whatever is added to it.
func TestMap(t *testing.T) {
	t.Parallel()
	c, n := &Consumer{}, 0
	fill(reflect.ValueOf(c).Elem(), &n)
	require.Greater(t, n, 25)
	c.Map(func(string) string { return "cleaned" })
	require.Zero(t, count(reflect.ValueOf(*c), "as it came"))
	require.Equal(t, n, count(reflect.ValueOf(*c), "cleaned"))
}
