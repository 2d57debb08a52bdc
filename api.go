package harmonyflow

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
)

// operationPrefix groups the engine's operations in the OpenAPI document.
const operationPrefix = "harmony-flow"

// maxValue bounds every value a user may send, in bytes.
const maxValue = 32 << 10

// maxPath bounds the path of a request: two names and what stands before them.
const maxPath = 512

// answerWithin is when a request is answered at the latest: the CLI gives up at
// 60 s and Vault at 90 s, and both send the request again.
const answerWithin = 30 * time.Second

// operation declares one operation of a path.
type operation struct {
	call     framework.OperationFunc
	summary  string
	verb     string // of the OpenAPI operation id
	suffix   string
	fields   map[string]*framework.FieldSchema // of the 200 answer
	none     bool                              // answers 204
	errors   []int                             // beside 400, which every operation may answer
	mutating bool
	active   bool // answered by the active node alone, as what is mutating is
}

// handler wraps an operation with what all have in common: unknown fields are
// refused, mutations are forwarded to the active node of the primary, refusals
// become errors with their status.
func (o operation) handler(known map[string]*framework.FieldSchema) framework.OperationHandler {
	responses := map[int][]framework.Response{}
	if o.none {
		responses[http.StatusNoContent] = []framework.Response{{Description: "No Content"}}
	} else {
		responses[http.StatusOK] = []framework.Response{{Description: "OK", Fields: answered200(o.fields)}}
	}
	for _, code := range append([]int{http.StatusBadRequest}, o.errors...) {
		responses[code] = []framework.Response{{Description: http.StatusText(code)}}
	}
	return &framework.PathOperation{
		Callback:                    strict(known, o.call),
		Summary:                     o.summary,
		Responses:                   responses,
		ForwardPerformanceStandby:   o.mutating || o.active,
		ForwardPerformanceSecondary: o.mutating || o.active,
		DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: o.verb, OperationSuffix: o.suffix},
	}
}

// answered200 declares what is answered: durations read back as a number of seconds, and
// the type of a duration that is written would be a string in the OpenAPI document.
func answered200(fields map[string]*framework.FieldSchema) map[string]*framework.FieldSchema {
	out := maps.Clone(fields)
	for name, f := range out {
		if f.Type == framework.TypeDurationSecond {
			seconds := *f
			seconds.Type, seconds.Default = framework.TypeInt64, nil
			out[name] = &seconds
		}
	}
	return out
}

// steer declares a path that acts on one role by kind and name.
func steer(verb, synopsis, description string, more map[string]*framework.FieldSchema, call framework.OperationFunc) []*framework.Path {
	return steerTo(rotationAnswer(), verb, synopsis, description, more, call)
}

// steerTo is steer with an answer of its own.
func steerTo(
	answer map[string]*framework.FieldSchema, verb, synopsis, description string, more map[string]*framework.FieldSchema, call framework.OperationFunc,
) []*framework.Path {
	fields := map[string]*framework.FieldSchema{"kind": kindField, "name": nameField}
	for k, v := range more {
		fields[k] = v
	}
	return []*framework.Path{{
		Pattern: verb + "/(?P<kind>[^/]+)/" + namePattern,
		Fields:  fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: operation{
				call: call, summary: synopsis, verb: verb, suffix: "role", fields: answer, errors: []int{404, 409}, mutating: true,
			}.handler(fields),
		},
		DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis:    synopsis,
		HelpDescription: description,
	}}
}

// strict refuses fields that the path does not have, and names that a path could
// not carry.
func strict(known map[string]*framework.FieldSchema, call framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		for name, value := range req.Data {
			if known[name] == nil {
				return answered(refuse("unknown field %.64q; this path takes %s", name, list(known)))
			}
			if value == nil {
				d.Raw[name] = "" // JSON null clears a field, as an empty value does
			}
		}
		if name, ok := d.Raw["name"].(string); ok {
			if err := checkName(name); err != nil {
				return answered(refuse("%v", err))
			}
		}
		if known["reason"] != nil {
			if err := checkReason("reason", d.Get("reason").(string)); err != nil {
				return answered(refuse("%v", err))
			}
		}
		return answered(call(ctx, req, d))
	}
}

// checkReason refuses a reason that would not fit where it is repeated: in every
// entry and every list that tells of a rotation.
func checkReason(field, reason string) error {
	if len(reason) > maxReason || strings.ContainsFunc(reason, unicode.IsControl) {
		return fmt.Errorf("%s is %.40q; give one line of at most %d bytes", field, reason, maxReason)
	}
	return nil
}

// HandleRequest answers a request. What is wrong with its shape is refused
// before the framework converts it, because the framework's errors repeat what
// was given, a password included.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (resp *logical.Response, err error) {
	// A panic would end the process, and with it every other mount that it
	// serves; Vault would then send the same request again.
	defer func() {
		if p := recover(); p != nil {
			b.Logger().Error("a request met a defect", "path", req.Path, "operation", req.Operation, "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
			resp, err = nil, fmt.Errorf("this request met a defect of the engine (%T at %.64s); please report it", p, req.Path)
		}
	}()
	if err := b.checkShape(req); err != nil {
		if strings.HasPrefix(req.Path, jwksPath) {
			return nil, nil // it needs no token, and tells nobody anything
		}
		return answered(refuse("%v", err))
	}
	if err := b.mayChange(req.Operation); err != nil {
		return answered(nil, err)
	}
	ctx, cancel := context.WithTimeout(ctx, b.answerWithin)
	defer cancel()
	resp, err = b.Backend.HandleRequest(ctx, req)
	resp, err = onLines(req, resp, err)
	if req.Operation == logical.HelpOperation {
		inlineSchemas(resp)
	}
	return resp, err
}

// told are the paths whose answers repeat what targets and clusters say. What the others
// show was written by whoever may, in as many lines as he likes.
var told = []string{
	"rotate/", "rotate-root/", "rollback/", "retire/", "verify/", "reconcile/", "ack/", "emergency/", "rotations", "cancel/", "resume/", "status", "deleted/", "restore/",
}

// onLines takes out of an answer what the terminal of its reader would act on.
func onLines(req *logical.Request, resp *logical.Response, err error) (*logical.Response, error) {
	var coded logical.HTTPCodedError
	if errors.As(err, &coded) {
		if text := bounded.Line(coded.Error()); text != coded.Error() {
			err = logical.CodedError(coded.Code(), text)
		}
	}
	if resp == nil {
		return resp, err
	}
	for i := range resp.Warnings {
		resp.Warnings[i] = bounded.Line(resp.Warnings[i])
	}
	if resp.IsError() || slices.ContainsFunc(told, func(p string) bool { return strings.HasPrefix(req.Path, p) }) {
		for key, value := range resp.Data {
			resp.Data[key] = onLine(value)
		}
	}
	return resp, err
}

func onLine(value any) any {
	switch v := value.(type) {
	case string:
		return bounded.Line(v)
	case []string:
		for i := range v {
			v[i] = bounded.Line(v[i])
		}
	case []any:
		for i := range v {
			v[i] = onLine(v[i])
		}
	case map[string]any:
		for key, inner := range v {
			v[key] = onLine(inner)
		}
	case map[string]string:
		for key, inner := range v {
			v[key] = bounded.Line(inner)
		}
	case []map[string]any:
		for i := range v {
			onLine(v[i])
		}
	}
	return value
}

// HandleExistenceCheck says whether a write creates or updates. That depends on
// the path alone. The rest is left out: Vault writes errors of this check into
// its log, and the framework's repeat what was given.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (found, exists bool, err error) {
	if b.checkShape(req) != nil {
		return true, true, nil //nolint:nilerr // HandleRequest refuses it
	}
	bare := *req
	bare.Data = nil
	return b.Backend.HandleExistenceCheck(ctx, &bare)
}

// secretFields are the fields that hold what may stand in no error.
func secretFields(paths []*framework.Path) map[string]bool {
	secret := map[string]bool{}
	for _, p := range paths {
		for name, f := range p.Fields {
			if f.DisplayAttrs != nil && f.DisplayAttrs.Sensitive {
				secret[name] = true
			}
		}
	}
	return secret
}

func (b *backend) checkShape(req *logical.Request) error {
	if len(req.Path) > maxPath {
		return fmt.Errorf("the path has %d bytes; at most %d are allowed", len(req.Path), maxPath)
	}
	for name, value := range req.Data {
		if n := size(value); n > maxValue {
			return fmt.Errorf("field %.64q has %d bytes; at most %d are allowed", name, n, maxValue)
		}
		if !b.secretFields[name] {
			continue
		}
		switch value.(type) {
		case string, json.Number, nil:
		default:
			return fmt.Errorf("field %q must be a string", name)
		}
	}
	return nil
}

// size is how many bytes of text a value holds.
func size(value any) int {
	n := 0
	switch v := value.(type) {
	case string:
		n = len(v)
	case []string:
		for _, s := range v {
			n += len(s)
		}
	case []any:
		for _, e := range v {
			n += size(e) + 1
		}
	case map[string]any:
		for k, e := range v {
			n += len(k) + size(e)
		}
	case map[string]string:
		for k, e := range v {
			n += len(k) + len(e)
		}
	}
	return n
}

func list(known map[string]*framework.FieldSchema) string {
	if len(known) == 0 {
		return "none"
	}
	return strings.Join(slices.Sorted(maps.Keys(known)), ", ")
}

var nameRegexp = regexp.MustCompile(`^[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,126}[A-Za-z0-9_])?$`)

func checkName(name string) error {
	switch {
	case !nameRegexp.MatchString(name):
		return fmt.Errorf("name %.64q is not allowed; use 1 to 128 of the characters A-Z a-z 0-9 _ . - and begin with a letter or digit", name)
	case strings.Contains(name, ".."): // Vault's storage takes it for a way up
		return fmt.Errorf("name %.64q is not allowed: it has two dots in a row", name)
	case name == "all":
		return errors.New(`name "all" is reserved for every role at once; choose another`)
	}
	return nil
}

// refusal is a mistake of the request; it is answered with 400.
type refusal struct{ error }

func badRequest(format string, args ...any) error { return refusal{fmt.Errorf(format, args...)} }

// refuse answers 400 with one sentence.
func refuse(format string, args ...any) (*logical.Response, error) {
	return nil, badRequest(format, args...)
}

// answered gives refusals their HTTP status. Errors are returned bare: on their
// way from a plugin to Vault wrapped ones lose what they are.
func answered(resp *logical.Response, err error) (*logical.Response, error) {
	var (
		mistake  refusal
		definite *kind.Error
		c        *rotation.Conflict
	)
	switch {
	case err == nil:
		return resp, nil
	case errors.As(err, &c):
		return nil, logical.CodedError(http.StatusConflict, c.Text)
	case errors.As(err, &mistake), errors.As(err, &definite):
		return logical.ErrorResponse("%v", err), logical.ErrInvalidRequest
	case errors.Is(err, rotation.ErrNotFound):
		return nil, logical.CodedError(http.StatusNotFound, err.Error())
	}
	return resp, err
}

func notFound(format string, args ...any) error {
	return logical.CodedError(http.StatusNotFound, fmt.Sprintf(format, args...))
}

func conflict(format string, args ...any) error {
	return logical.CodedError(http.StatusConflict, fmt.Sprintf(format, args...))
}

func requester(req *logical.Request) rotation.Requester {
	return rotation.Requester{
		EntityID: req.EntityID, Accessor: req.ClientTokenAccessor,
		DisplayName: req.DisplayName, RequestID: req.ID,
	}
}

// requestKeys identify a request: Vault sends the same one again when the
// plugin dies under it, and a user may give a key of his own.
func requestKeys(req *logical.Request, d *framework.FieldData) [][]string {
	var keys [][]string
	if req.ID != "" {
		keys = append(keys, []string{"id", req.ID})
	}
	if k, _ := d.Get("idempotency_key").(string); k != "" {
		keys = append(keys, []string{"key", req.EntityID, req.Path, k})
	}
	return keys
}

// formatTime prints a time as every answer does; "" for none.
func formatTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// count prints "1 role", "2 roles".
func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func seconds(d time.Duration) int64 { return int64(d / time.Second) }

// duration reads a TypeDurationSecond field.
func duration(d *framework.FieldData, name string) time.Duration {
	return time.Duration(d.Get(name).(int)) * time.Second
}

// namePattern takes anything, so that a name that is not allowed is told so.
const namePattern = "(?P<name>(?s:.+))"

// Fields that several paths share.
var (
	nameField = &framework.FieldSchema{
		Type: framework.TypeString, Required: true,
		Description: "Name: 1 to 128 of the characters A-Z a-z 0-9 _ . - (\"all\" is reserved).",
	}
	kindField = &framework.FieldSchema{
		Type: framework.TypeString, Required: true,
		Description: "Kind of secret, for example redis or api-key.",
	}
	reasonField = &framework.FieldSchema{
		Type: framework.TypeString, Description: "Why, in words: one line of at most 256 bytes, kept with the rotation.",
	}
	idempotencyField = &framework.FieldSchema{
		Type:        framework.TypeString,
		Description: "A key of your own: a repeat of the request with the same key answers with the same rotation.",
	}
	keyInfoFields = map[string]*framework.FieldSchema{
		"keys":     {Type: framework.TypeStringSlice, Description: "Names."},
		"key_info": {Type: framework.TypeMap, Description: "What there is to know about each, by name."},
	}
)

// limitField is how much of a list that has pages is asked for.
var limitField = &framework.FieldSchema{
	Type: framework.TypeInt64, Query: true, Default: int64(100), Description: "At most so many; 1 to 1000. Default 100.",
}

func pageLimit(d *framework.FieldData) (int, error) {
	limit := d.Get("limit").(int64)
	if limit < 1 || limit > 1000 {
		return 0, badRequest("limit is %d; it may be 1 to 1000", limit)
	}
	return int(limit), nil
}

// stringField, and the like, are for declaring what answers hold.
func stringField(description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: framework.TypeString, Description: description}
}

func boolField(description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: framework.TypeBool, Description: description}
}

func intField(description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: framework.TypeInt64, Description: description}
}

func listField(description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: framework.TypeStringSlice, Description: description}
}

func mapField(description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: framework.TypeMap, Description: description}
}

func durationField(description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: framework.TypeDurationSecond, Description: description}
}
