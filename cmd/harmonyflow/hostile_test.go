package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
)

const nasty = "\x1b[2J\x1b]0;owned\a\r\nredis/app: version 9, completed\u009b31m\u202e"

// nastyAnswer is one in which all that targets, clusters and people may write is nasty.
func nastyAnswer(state string) map[string]any {
	return map[string]any{
		"rotation_id": "id", "state": state, "summary": "summary " + nasty, "grace_until": nasty, "earlier_versions_refused": nasty, "next": nasty,
		"timeline": []any{"sync: web: " + nasty}, "criteria": []any{"not met: " + nasty}, "failed": []any{"redis/app: " + nasty}, "frozen": true, "frozen_until": nasty, "freeze_reason": nasty,
		"counts": map[string]any{"failed": 5}, nasty: nasty,
		"roles": map[string]any{"app" + nasty: map[string]any{"kind": "redis", "state": state, "phase": "sync", "error": "pod " + nasty, "version": 2}},
	}
}

// requireHarmless: what was written is lines of the command itself.
func requireHarmless(t *testing.T, text string) {
	t.Helper()
	for _, line := range strings.Split(text, "\n") {
		require.Equal(t, bounded.Line(line), line)
		require.False(t, strings.HasPrefix(line, "redis/app: version 9, completed"), "a line of somebody else's: %q", text)
	}
}

// TestNothingMovesTheCursor: what a target, a cluster or a person wrote neither acts on
// the terminal nor looks like a line of the command.
func TestNothingMovesTheCursor(t *testing.T) {
	for _, refused := range []bool{false, true} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if refused {
				w.WriteHeader(http.StatusBadRequest)
				_ = json.NewEncoder(w).Encode(map[string]any{"errors": []string{"role " + strings.ReplaceAll(nasty, "\r\n", "\r")}})
				return
			}
			_ = json.NewEncoder(w).Encode(map[string]any{"data": nastyAnswer("failed"), "warnings": []string{nasty}})
		}))
		t.Setenv("VAULT_ADDR", server.URL)
		t.Setenv("VAULT_TOKEN", "token")
		t.Setenv("VAULT_MAX_RETRIES", "0")
		for _, args := range [][]string{
			{"status"},
			{"status", "--format=json"},
			{"rotate", "redis/app"},
			{"rotate", "redis/app", "--dry-run"},
			{"rotate", "-f", "redis/app"},
			{"rotate", "-f", "redis/app", "--format=json"},
			{"follow", "id"},
			{"rollback", "redis/app"},
			{"emergency", "redis", "--reason=x"},
			{nasty},
			{"rotate", nasty + "/x/y"},
			{"status", "--format=" + nasty},
			{"--" + nasty},
		} {
			var out, errs bytes.Buffer
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			run(ctx, args, &out, &errs)
			cancel()
			for _, line := range strings.Split(out.String()+errs.String(), "\n") {
				require.Equal(t, bounded.Line(line), line, "%q", args)
			}
			if args[0] != nasty {
				requireHarmless(t, out.String())
			}
		}
		server.Close()
	}
}

// FuzzAnswer: whatever Vault answers, what is written of it is harmless.
func FuzzAnswer(f *testing.F) {
	for _, state := range []string{"failed", "grace", "held", "completed"} {
		raw, err := json.Marshal(map[string]any{"data": nastyAnswer(state)})
		require.NoError(f, err)
		f.Add(raw)
	}
	f.Add([]byte(`{"data":{"roles":{"a":null,"b":[]},"timeline":[1,null],"state":7,"counts":[],"criteria":{}}}`))
	f.Add([]byte(`{"data":null}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, format := range []string{"table", "json"} {
			secret, err := api.ParseSecret(bytes.NewReader(raw))
			if err != nil || secret == nil {
				return
			}
			var out bytes.Buffer
			p := &program{out: harmless{&out}, err: harmless{&out}, o: options{format: format, mount: "harmonyflow", until: "grace"}}
			data := p.clean(secret).Data
			v := &view{p: p, seen: map[string]bool{}}
			v.show(data)
			p.print(data)
			p.conclude("id", data)
			p.outcome(stateOf(data))
			for _, line := range append(progress(data), overview(data)...) {
				if format == "table" && bounded.Line(line) != line {
					t.Fatalf("%q", line)
				}
				cut(line, 10)
			}
			for line := range strings.SplitSeq(out.String(), "\n") {
				if bounded.Line(line) != line {
					t.Fatalf("%q", line)
				}
			}
		}
	})
}

// FuzzArguments: whatever is typed is understood, or refused, before Vault is asked.
func FuzzArguments(f *testing.F) {
	for _, text := range []string{"rotate redis/app", "rollback redis", "emergency all --reason x", "follow id -f", "status --mount /a/", "rotate a/b/c", "watch x", "--every 1ms status", "rotate -f --until end redis"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var out bytes.Buffer
		p := &program{out: harmless{&out}, err: harmless{&out}}
		flags := p.flags()
		if flags.Parse(strings.Fields(text)) != nil {
			return
		}
		command, arg, err := p.command(flags.Args())
		if err != nil {
			return
		}
		if command == "" || strings.HasPrefix(arg, "/") || strings.HasSuffix(arg, "/") || command == "follow" && strings.Contains(arg, "/") {
			t.Fatalf("%q is %s %q", text, command, arg)
		}
	})
}
