package notify

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/buildinfo"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/outbound"
)

// Headers of Standard Webhooks (https://www.standardwebhooks.com).
const (
	idHeader        = "Webhook-Id"
	timeHeader      = "Webhook-Timestamp"
	signatureHeader = "Webhook-Signature"
)

// sendTimeout is how long a receiver has to answer.
const sendTimeout = 15 * time.Second

// message is what the JSON format sends.
type message struct {
	Type      string    `json:"type"`
	Timestamp time.Time `json:"timestamp"`
	Data      data      `json:"data"`
}

type data struct {
	Event
	Mount  string `json:"mount"`
	Follow string `json:"follow"`
}

// typeOf is an event's type, as Standard Webhooks write it.
func typeOf(k Kind) string {
	switch k {
	case Overdue, Drift:
		return "role." + string(k)
	case Test:
		return "notification.test"
	default:
		return "rotation." + string(k)
	}
}

// follow is the next command to type.
func (n *Notification) follow(e Event) string {
	if e.Rotation != "" {
		return "vault read " + n.Mount + "rotations/" + e.Rotation
	}
	return "vault read " + n.Mount + "status"
}

func (n *Notification) body(e Event) ([]byte, error) {
	if n.Format == Slack {
		return json.Marshal(map[string]string{"text": n.text(e)})
	}
	return json.Marshal(message{Type: typeOf(e.Kind), Timestamp: e.At, Data: data{Event: e, Mount: n.Mount, Follow: n.follow(e)}})
}

var escape = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", "`", "'")

// text is an event for a channel that people read.
func (n *Notification) text(e Event) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%s* %s", strings.ReplaceAll(string(e.Kind), "_", " "), escape.Replace(e.Summary))
	for _, r := range e.Roles {
		if r.Error != "" {
			fmt.Fprintf(&b, "\n• %s: %s", escape.Replace(r.label()), escape.Replace(r.Error))
		}
	}
	if e.Reason != "" {
		fmt.Fprintf(&b, "\nreason: %s", escape.Replace(e.Reason))
	}
	fmt.Fprintf(&b, "\n`%s`", escape.Replace(n.follow(e)))
	return b.String()
}

// send sends e once. Its error names the host and nothing else of the URL.
func (n *Notification) send(ctx context.Context, e Event, mayCall func(host string) bool) error {
	u, err := url.Parse(n.URL)
	if err != nil {
		return errors.New("url cannot be read; write the notification again")
	}
	if !mayCall(u.Hostname()) {
		return fmt.Errorf("host %q is no longer in allowed_hosts of config", u.Hostname())
	}
	body, err := n.body(e)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, n.URL, bytes.NewReader(body))
	if err != nil {
		return errors.New("no request can be made of url; write the notification again")
	}
	for name, value := range n.Header {
		req.Header.Set(name, value)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "harmonyflow/"+buildinfo.Version)
	req.Header.Set(idHeader, e.ID)
	if n.Format == JSON {
		if err := n.sign(req, e.ID, body, time.Now()); err != nil {
			return err
		}
	}
	client, done := outbound.Client(u, outbound.Options{Timeout: sendTimeout})
	defer done()
	resp, err := client.Do(req)
	if err != nil {
		text, _ := outbound.Silence(err) // the error repeats the URL
		return fmt.Errorf("%s %s", u.Host, text)
	}
	defer func() { _ = resp.Body.Close() }()
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10)
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return fmt.Errorf("%s answered %d %s", u.Host, resp.StatusCode, http.StatusText(resp.StatusCode)) // and not in its own words
	}
	return nil
}

func (n *Notification) sign(req *http.Request, id string, body []byte, now time.Time) error {
	key, err := n.key()
	if err != nil {
		return err
	}
	at := strconv.FormatInt(now.Unix(), 10)
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", id, at, body)
	req.Header.Set(timeHeader, at)
	req.Header.Set(signatureHeader, "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	return nil
}
