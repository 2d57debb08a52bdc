package harmonyflow

import (
	"net/http"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
)

// TestAnswersStayOnTheirLines: what targets and clusters say neither acts on a terminal nor
// looks like a line of the engine, and what people wrote in several lines stays as it is.
func TestAnswersStayOnTheirLines(t *testing.T) {
	t.Parallel()
	const nasty = "\x1b[2J\r\nredis/app: completed\u202e\u009b"
	answer := func() *logical.Response {
		return &logical.Response{Warnings: []string{nasty}, Data: map[string]any{
			"text": nasty, "list": []string{nasty}, "any": []any{nasty, 1, nil}, "map": map[string]any{"in": map[string]any{"a": nasty}, "list": []map[string]any{{"b": nasty}}},
			"texts": map[string]string{"c": nasty}, "number": 1,
		}}
	}
	clean := bounded.Line(nasty)
	for _, path := range []string{"verify/redis/app", "rotations/0192", "rotate/all", "status", "emergency/rotate/all"} {
		resp, err := onLines(&logical.Request{Path: path}, answer(), nil)
		require.NoError(t, err)
		require.Equal(t, []string{clean}, resp.Warnings)
		require.Equal(t, map[string]any{
			"text": clean, "list": []string{clean}, "any": []any{clean, 1, nil}, "map": map[string]any{"in": map[string]any{"a": clean}, "list": []map[string]any{{"b": clean}}},
			"texts": map[string]string{"c": clean}, "number": 1,
		}, resp.Data)
	}
	resp, err := onLines(&logical.Request{Path: "connections/cache"}, answer(), nil)
	require.NoError(t, err)
	require.Equal(t, nasty, resp.Data["text"], "a certificate has lines")

	resp, err = onLines(&logical.Request{Path: "connections/cache"}, logical.ErrorResponse("it said "+nasty), logical.ErrInvalidRequest)
	require.Equal(t, logical.ErrInvalidRequest, err)
	require.Equal(t, "it said "+clean, resp.Data["error"])
	_, err = onLines(&logical.Request{Path: "creds/app"}, nil, logical.CodedError(http.StatusConflict, nasty))
	require.Equal(t, logical.CodedError(http.StatusConflict, clean), err)
}
