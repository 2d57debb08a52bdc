package connection

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// Clusters behind one load balancer may differ by the path alone.
func TestClustersBehindOneHost(t *testing.T) {
	at := func(urls ...string) *Entry {
		return &Entry{Type: TypeRabbitMQ, RabbitMQ: &RabbitMQ{ManagementURLs: urls}}
	}
	a := at("https://lb/a", "https://other:15671")
	require.True(t, a.Overlaps(at("https://lb/a/")))
	require.True(t, a.Overlaps(at("http://other:15671")))
	require.False(t, a.Overlaps(at("https://lb/b")))
	require.False(t, a.Overlaps(at("https://lb")))
}
