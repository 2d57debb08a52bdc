package outbound

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestPermitted(t *testing.T) {
	t.Parallel()
	for address, want := range map[string][2]bool{ // over https, over http
		"127.0.0.1:1":          {true, true},
		"[::1]:1":              {true, true},
		"[::ffff:127.0.0.1]:1": {true, true},
		"10.0.0.1:1":           {true, false},
		"169.254.169.254:80":   {false, false},
		"[fe80::1%eth0]:80":    {false, false},
		"[::ffff:a9fe:a9fe]:1": {false, false},
		"0.0.0.0:1":            {false, false},
		"[::]:1":               {false, false},
		"224.0.0.1:1":          {false, false},
		"nothing":              {false, false},
	} {
		require.Equal(t, want[0], permitted(address, false) == nil, address)
		require.Equal(t, want[1], permitted(address, true) == nil, address)
	}
}

func TestRedirects(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/within":
			http.Redirect(w, r, "/", http.StatusFound)
		case "/away":
			http.Redirect(w, r, "http://localhost:1/", http.StatusFound)
		case "/round":
			http.Redirect(w, r, "/round", http.StatusFound)
		}
	}))
	defer server.Close()
	u, err := url.Parse(server.URL)
	require.NoError(t, err)
	for path, want := range map[string][2]int{
		"/":       {http.StatusOK, http.StatusOK},
		"/within": {http.StatusOK, http.StatusFound},
		"/away":   {http.StatusFound, http.StatusFound},
		"/round":  {http.StatusFound, http.StatusFound},
	} {
		for i, follow := range []bool{true, false} {
			client, done := Client(u, Options{Timeout: 10 * time.Second, Follow: follow})
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+path, nil)
			require.NoError(t, err)
			resp, err := client.Do(req)
			require.NoError(t, err)
			require.NoError(t, resp.Body.Close())
			require.Equal(t, want[i], resp.StatusCode, "%s, follow %t", path, follow)
			done()
		}
	}
}
