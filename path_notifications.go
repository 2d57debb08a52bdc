package harmonyflow

import (
	"context"
	"errors"
	"maps"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/metrics"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/notify"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

func (b *backend) pathNotifications() []*framework.Path {
	sensitive := &framework.DisplayAttributes{Sensitive: true}
	fields := map[string]*framework.FieldSchema{
		"name":    nameField,
		"url":     {Type: framework.TypeString, DisplayAttrs: sensitive, Description: "Where events are sent: https://, to a host in allowed_hosts of config. Only its host is shown again."},
		"format":  {Type: framework.TypeString, Description: "json (default: Standard Webhooks, signed) or slack (a text for a channel)."},
		"events":  {Type: framework.TypeCommaStringSlice, Description: "Which: started, promoted, failed, held, completed, rolled_back, emergency, overdue, drift. Default all."},
		"secret":  {Type: framework.TypeString, DisplayAttrs: sensitive, Description: "What json is signed with: whsec_ and 24 to 64 bytes in base64. Never shown again."},
		"headers": {Type: framework.TypeString, DisplayAttrs: sensitive, Description: "More headers, for example of a login, as 'Name: value', one a line. Only their names are shown again."},
	}
	answer := map[string]*framework.FieldSchema{
		"host": stringField("Scheme and host of the URL."), "format": stringField("json or slack."), "events": listField("Which events are sent."),
		"headers": listField("Names of the headers."), "pending": intField("How many events wait to be sent."),
		"last_error": stringField("Why the last try failed; empty when it did not."), "last_sent": stringField("When the last event was taken since the plugin started, RFC 3339."),
	}
	one := map[string]*framework.FieldSchema{"name": nameField}
	tested := map[string]*framework.FieldSchema{"summary": stringField("What became of it.")}
	write := func(summary string) framework.OperationHandler {
		return operation{call: b.writeNotification, summary: summary, verb: "write", suffix: "notification", none: true, mutating: true}.handler(fields)
	}
	return []*framework.Path{
		{
			Pattern: "notifications/?$",
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: operation{
					call: b.listNotifications, summary: "List notifications.", verb: "list", suffix: "notifications", fields: keyInfoFields,
				}.handler(nil),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "List notifications.",
			HelpDescription: "Lists the names of all notifications, with their host and format.",
		},
		{
			Pattern: "notifications/" + namePattern + "/test",
			Fields:  one,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: operation{
					call: b.testNotification, summary: "Send a test, and say what became of it.", verb: "test", suffix: "notification", fields: tested, errors: []int{404}, mutating: true,
				}.handler(one),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "Send a test, and say what became of it.",
			HelpDescription: "Sends an event notification.test at once, whatever events are chosen: vault write -f harmonyflow/notifications/<name>/test.",
		},
		{
			Pattern:        "notifications/" + namePattern,
			Fields:         fields,
			ExistenceCheck: b.notificationExists,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: operation{
					call: b.readNotification, summary: "Read a notification, without what is secret, and how it stands with it.", verb: "read", suffix: "notification",
					fields: answer, errors: []int{404}, active: true, // it is the one that sends
				}.handler(nil),
				logical.CreateOperation: write("Create a notification."),
				logical.UpdateOperation: write("Change a notification; what is not given stays."),
				logical.DeleteOperation: operation{
					call: b.deleteNotification, summary: "Delete a notification, and what it was not sent yet.", verb: "delete", suffix: "notification", none: true, mutating: true,
				}.handler(nil),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis: "Where people are told what rotations come to.",
			HelpDescription: `Events are stored before they are sent and arrive at least once, with the same webhook-id each time. A receiver that is
down is tried again for 72 hours and never slows a rotation. json is signed as Standard Webhooks say
(https://www.standardwebhooks.com); slack is {"text": ...}. No event holds a secret. A change of host takes url and secret in
one request.`,
		},
	}
}

func (b *backend) listNotifications(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	all, err := b.notifier.Store().All(ctx)
	if err != nil {
		return nil, err
	}
	names, info := []string{}, map[string]any{}
	for _, n := range all {
		names = append(names, n.Name)
		info[n.Name] = map[string]any{"host": n.Host(), "format": string(n.Format)}
	}
	return logical.ListResponseWithInfo(names, info), nil
}

func (b *backend) notificationExists(ctx context.Context, _ *logical.Request, d *framework.FieldData) (bool, error) {
	name := d.Get("name").(string)
	if checkName(name) != nil {
		return false, nil //nolint:nilerr // the write refuses it
	}
	n, err := b.notifier.Store().Get(ctx, name)
	return n != nil, err
}

func (b *backend) readNotification(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	n, err := b.notifier.Store().Get(ctx, d.Get("name").(string))
	if err != nil || n == nil {
		return nil, err
	}
	health := b.notifier.Health(n.Name)
	sent := ""
	if !health.LastSent.IsZero() {
		sent = formatTime(health.LastSent)
	}
	events := []string{}
	for _, e := range n.Events {
		events = append(events, string(e))
	}
	return &logical.Response{Data: map[string]any{
		"host": n.Host(), "format": string(n.Format), "events": events, "headers": orEmpty(n.Headers()),
		"pending": int64(health.Pending), "last_error": health.LastError, "last_sent": sent,
	}}, nil
}

func (b *backend) writeNotification(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	b.notifications.Lock()
	defer b.notifications.Unlock()
	before, err := b.notifier.Store().Get(ctx, name)
	if err != nil {
		return nil, err
	}
	next := &notify.Notification{Name: name, Format: notify.JSON, Created: time.Now().UTC()}
	if before != nil {
		copied := *before
		next = &copied
		next.Header = maps.Clone(before.Header)
	}
	next.Mount = req.MountPoint
	if v, ok := d.GetOk("url"); ok {
		next.URL = v.(string)
	}
	if v, ok := d.GetOk("format"); ok {
		next.Format = notify.Format(v.(string))
	}
	if v, ok := d.GetOk("secret"); ok {
		next.Secret = v.(string)
	}
	if v, ok := d.GetOk("events"); ok {
		next.Events = nil
		for _, e := range v.([]string) {
			next.Events = append(next.Events, notify.Kind(e))
		}
	}
	if v, ok := d.GetOk("headers"); ok {
		if next.Header, err = notify.ParseHeaders(v.(string)); err != nil {
			return refuse("%v", err)
		}
	}
	if err := next.Check(b.mayCall); err != nil {
		return refuse("%v", err)
	}
	if err := movedAway(before, next, d); err != nil {
		return refuse("%v", err)
	}
	names, err := b.notifier.Store().List(ctx)
	if err != nil {
		return nil, err
	}
	if before == nil && len(names) >= notify.Most {
		return refuse("there are %d notifications, and may be no more; delete one first", len(names))
	}
	if err := b.notifier.Store().Put(ctx, next); err != nil {
		return nil, err
	}
	b.notifier.Changed()
	return nil, nil
}

// movedAway refuses to send what is stored to somebody new: whoever may write a
// notification is not told its secrets.
func movedAway(before, next *notify.Notification, d *framework.FieldData) error {
	if before == nil || before.Host() == next.Host() {
		return nil
	}
	for field, stored := range map[string]bool{"secret": before.Secret != "", "headers": len(before.Header) > 0} {
		if _, given := d.GetOk(field); stored && !given {
			return errors.New("the host changes: give " + field + " in the same request, or the stored one would go to a stranger")
		}
	}
	return nil
}

func (b *backend) deleteNotification(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	b.notifications.Lock()
	defer b.notifications.Unlock()
	if err := b.notifier.Store().Delete(ctx, d.Get("name").(string)); err != nil {
		return nil, err
	}
	b.notifier.Changed()
	return nil, nil
}

func (b *backend) testNotification(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	n, err := b.notifier.Store().Get(ctx, name)
	if err != nil {
		return nil, err
	}
	if n == nil {
		return nil, notFound("there is no notification %q; list notifications/ to see which there are", name)
	}
	if err := b.notifier.Try(ctx, n); err != nil {
		return refuse("the test was not taken: %v", err)
	}
	return &logical.Response{Data: map[string]any{"summary": "the test was taken by " + n.Host()}}, nil
}

// watchers is who is told what the engine does.
type watchers struct {
	*metrics.Metrics
	notifier *notify.Notifier
}

var _ rotation.Recorder = watchers{}

// Moved implements rotation.Recorder.
func (w watchers) Moved(id string) { w.notifier.Moved(id) }
