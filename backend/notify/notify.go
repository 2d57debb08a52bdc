// Package notify tells people what rotations come to, by webhooks.
//
// What is told follows from what is stored of rotations, and from nothing that
// happens in between: after a crash the same events are found again. An event is
// stored before it is sent and taken out once its receiver has answered, so each
// arrives at least once, with the same id each time. Nothing here is ever waited
// for by a rotation.
package notify

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
)

// Format is how a notification is written.
type Format string

// The formats.
const (
	JSON  Format = "json"  // Standard Webhooks, signed
	Slack Format = "slack" // {"text": …}, as Slack and what imitates it take it
)

// Notification is where events are sent.
type Notification struct {
	Name   string            `json:"-"`
	URL    string            `json:"url"`
	Format Format            `json:"format"`
	Events []Kind            `json:"events,omitempty"` // none: all
	Secret string            `json:"secret,omitempty"`
	Header map[string]string `json:"headers,omitempty"`
	// Mount is what commands in a notification begin with.
	Mount string `json:"mount"`
	// Created: nothing from before then is told.
	Created time.Time `json:"created"`
}

// Most bounds how many there are, for each has a sender of its own.
const Most = 20

const (
	maxHeaders = 16
	maxEntry   = 64 << 10
	minKey     = 24
	maxKey     = 64
	keyPrefix  = "whsec_"
)

// Check refuses what could not be sent; mayCall says which hosts config allows.
func (n *Notification) Check(mayCall func(host string) bool) error {
	u, err := url.Parse(n.URL)
	if err != nil || u.Host == "" || u.Opaque != "" {
		return fmt.Errorf("url is none; give one like https://hooks.example.com/rotations")
	}
	loopback := net.ParseIP(u.Hostname()).IsLoopback()
	switch {
	case u.Scheme != "https" && (u.Scheme != "http" || !loopback):
		return fmt.Errorf("url has to begin with https://, or with http:// to an address of this machine")
	case u.User != nil:
		return fmt.Errorf("url must not hold a password; give headers instead")
	case !mayCall(u.Hostname()):
		return fmt.Errorf("host %.253q is none that may be sent to; add it to allowed_hosts of config first", u.Hostname())
	}
	if n.Format != JSON && n.Format != Slack {
		return fmt.Errorf("format is %.40q; it is json or slack", n.Format)
	}
	for _, e := range n.Events {
		if !slices.Contains(Kinds, e) {
			return fmt.Errorf("event %.40q is not known; there are %s", e, kinds())
		}
	}
	if err := n.checkHeaders(); err != nil {
		return err
	}
	if n.Format == JSON {
		_, err = n.key()
	}
	return err
}

func kinds() string {
	var names []string
	for _, k := range Kinds {
		names = append(names, string(k))
	}
	return strings.Join(names, ", ")
}

// ParseHeaders reads headers, one a line. Its errors repeat nothing of them.
func ParseHeaders(text string) (map[string]string, error) {
	var out map[string]string
	for line := range strings.Lines(text) {
		if strings.TrimSpace(line) == "" {
			continue
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok {
			return nil, fmt.Errorf("headers have to be like 'Name: value', one a line")
		}
		if out == nil {
			out = map[string]string{}
		}
		out[http.CanonicalHeaderKey(strings.TrimSpace(name))] = strings.TrimSpace(value)
	}
	return out, nil
}

func (n *Notification) checkHeaders() error {
	if len(n.Header) > maxHeaders {
		return fmt.Errorf("there are %d headers; at most %d are taken", len(n.Header), maxHeaders)
	}
	for name, value := range n.Header {
		if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) {
			return fmt.Errorf("headers hold one that HTTP does not know; give 'Name: value', one a line")
		}
		switch http.CanonicalHeaderKey(name) {
		case "Content-Type", "Content-Length", "Transfer-Encoding", "Host", "Connection", "User-Agent", idHeader, timeHeader, signatureHeader:
			return fmt.Errorf("header %.64q is set by the engine; leave it out", name)
		}
	}
	return nil
}

// key is what events are signed with.
func (n *Notification) key() ([]byte, error) {
	text, ok := strings.CutPrefix(n.Secret, keyPrefix)
	key, err := base64.StdEncoding.DecodeString(text)
	if !ok || err != nil || len(key) < minKey || len(key) > maxKey {
		return nil, fmt.Errorf("secret has to be whsec_ and %d to %d bytes in base64, as of: printf whsec_; openssl rand -base64 32", minKey, maxKey)
	}
	return key, nil
}

// Host is what may be shown of the URL: those of Slack are secrets.
func (n *Notification) Host() string {
	if u, err := url.Parse(n.URL); err == nil {
		return u.Scheme + "://" + u.Host
	}
	return ""
}

// Headers names the headers; their values are not shown.
func (n *Notification) Headers() []string { return slices.Sorted(maps.Keys(n.Header)) }

// wants reports whether events of a kind are sent.
func (n *Notification) wants(k Kind) bool { return len(n.Events) == 0 || slices.Contains(n.Events, k) }

// Store reads and writes notifications.
type Store struct{ s logical.Storage }

// NewStore returns a Store over s.
func NewStore(s logical.Storage) *Store { return &Store{s: s} }

// Get reads a notification; nil when there is none.
func (st *Store) Get(ctx context.Context, name string) (*Notification, error) {
	n, err := storage.Get[Notification](ctx, st.s, storage.Notification+name)
	if n != nil {
		n.Name = name
		n.Format = cmp.Or(n.Format, JSON)
	}
	return n, err
}

// Put writes a notification.
func (st *Store) Put(ctx context.Context, n *Notification) error {
	return storage.Put(ctx, st.s, storage.Notification+n.Name, n, maxEntry)
}

// Delete removes a notification. What was not sent yet is dropped.
func (st *Store) Delete(ctx context.Context, name string) error {
	if err := st.s.Delete(ctx, storage.Notification+name); err != nil {
		return fmt.Errorf("deleting notification %q: %w", name, err)
	}
	return nil
}

// List names all notifications.
func (st *Store) List(ctx context.Context) ([]string, error) {
	return st.s.List(ctx, storage.Notification)
}

// All reads every notification that can be decoded.
func (st *Store) All(ctx context.Context) ([]*Notification, error) {
	names, err := st.List(ctx)
	if err != nil {
		return nil, err
	}
	var out []*Notification
	for _, name := range names {
		n, err := st.Get(ctx, name)
		if err != nil && !storage.IsUndecodable(err) {
			return nil, err
		}
		if n != nil {
			out = append(out, n)
		}
	}
	return out, nil
}
