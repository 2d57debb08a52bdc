package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// stage is a Vault, the servers beside it, and a client.
type stage struct {
	vault *servers.Vault
	http  *http.Client
	stops []func() error
}

// startVault starts a Vault with the engine. Its log and that of the plugin are as in
// production.
func (b *bench) startVault(options servers.VaultOptions) (*stage, error) {
	options.LogLevel = "warn"
	if options.Plugin == "" {
		options.Plugin = b.plugin
	}
	v, err := servers.StartVault(options)
	if err != nil {
		return nil, err
	}
	return &stage{
		vault: v, stops: []func() error{v.Stop},
		http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 128}, Timeout: 2 * time.Minute},
	}, nil
}

// stop ends what the stage has started, the last first.
func (s *stage) stop() error {
	s.http.CloseIdleConnections()
	var errs []error
	for _, stop := range slices.Backward(s.stops) {
		errs = append(errs, stop())
	}
	return errors.Join(errs...)
}

// redis starts a Redis with users user-0, user-1, …
func (s *stage) redis(ctx context.Context, dir string, users int) (*servers.RedisNode, error) {
	list := make([]string, users)
	for i := range list {
		list[i] = fmt.Sprintf("%s on >%s ~* +@all -@admin", user(i), firstPassword(i))
	}
	node, err := servers.StartRedis(ctx, dir, servers.WithUsers(list...))
	if err != nil {
		return nil, err
	}
	s.stops = append(s.stops, node.Kill)
	return node, nil
}

func user(i int) string          { return fmt.Sprintf("user-%06d", i) }
func firstPassword(i int) string { return fmt.Sprintf("password-%d-initial", i) }
func role(i int) string          { return fmt.Sprintf("app-%06d", i) }

// connectRedis writes a connection of the engine to node.
func (s *stage) connectRedis(ctx context.Context, name string, node *servers.RedisNode) error {
	_, err := s.write(ctx, "harmonyflow/connections/"+name, map[string]any{
		"type": "redis", "addresses": node.Addr, "username": servers.RedisAdmin, "password": servers.RedisAdminPassword,
		"allowed_roles": "*",
	})
	return err
}

// adoptRedis makes a role of user number i.
func (s *stage) adoptRedis(ctx context.Context, connection string, i int, more map[string]any) error {
	data := map[string]any{"kind": "redis", "connection": connection, "username": user(i), "initial_password": firstPassword(i)}
	for k, v := range more {
		data[k] = v
	}
	_, err := s.write(ctx, "harmonyflow/roles/"+role(i), data)
	return err
}

type fields = map[string]any

// write is what `vault write` does, read what `vault read` does; they return what
// stands under data.
func (s *stage) write(ctx context.Context, path string, data fields) (fields, error) {
	return s.call(ctx, http.MethodPut, path, data)
}

func (s *stage) patch(ctx context.Context, path string, data fields) (fields, error) {
	return s.call(ctx, http.MethodPatch, path, data)
}

func (s *stage) read(ctx context.Context, path string) (fields, error) {
	return s.call(ctx, http.MethodGet, path, nil)
}

func (s *stage) list(ctx context.Context, path string) (fields, error) {
	return s.call(ctx, "LIST", path, nil)
}

func (s *stage) call(ctx context.Context, method, path string, data fields) (fields, error) {
	raw, err := s.raw(ctx, method, path, data)
	if err != nil || len(raw) == 0 {
		return nil, err
	}
	var answer struct{ Data fields }
	if err := json.Unmarshal(raw, &answer); err != nil {
		return nil, fmt.Errorf("%s %s answers what is no JSON: %w", method, path, err)
	}
	return answer.Data, nil
}

// raw sends one request and returns the body of its answer.
func (s *stage) raw(ctx context.Context, method, path string, data fields) ([]byte, error) {
	var body io.Reader
	if data != nil {
		raw, err := json.Marshal(data)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.vault.Address+"/v1/"+path, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Vault-Token", s.vault.Token)
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := s.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= http.StatusMultipleChoices {
		err = fmt.Errorf("%s %s answers %d: %s", method, path, resp.StatusCode, strings.TrimSpace(string(raw)))
	}
	return raw, err
}

// await asks until done says so, or it took too long.
func await(ctx context.Context, what string, within time.Duration, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var last error
	for {
		ok, err := done()
		if ok {
			return nil
		}
		if err != nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("%s did not come within %s", what, within), last)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
