package harmonyflow

import (
	"context"
	"net/http"
	"strconv"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/publish"
)

// data/ and metadata/ have the shape of a KV version 2 mount, so that every
// client that reads one reads this engine: External Secrets, Vault Secrets
// Operator, Vault Agent, api.KVv2, and vault kv once the mount was tuned with
// options=version=2.

func (b *backend) pathData() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"document": documentField,
		"version":  {Type: framework.TypeInt64, Query: true, Description: "Version to read: the current one (0, the default) or, during a grace period, the one before it."},
	}
	for name, what := range map[string]string{"data": "Refused.", "options": "Refused."} { // what KV clients write
		fields[name] = &framework.FieldSchema{Type: framework.TypeMap, Description: what}
	}
	managed := operation{
		call: b.refuseWrite, summary: "Refused: documents are written by rotations.", verb: "write", suffix: "data", none: true, errors: []int{400}, mutating: true,
	}
	erased := managed
	erased.verb = "delete"
	return []*framework.Path{{
		Pattern: "data/(?P<document>.+)",
		Fields:  fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: operation{
				call: b.readData, summary: "Read a document, as of KV version 2.", verb: "read", suffix: "data", errors: []int{400, 404},
				fields: map[string]*framework.FieldSchema{
					"data": mapField("The fields of the document."), "metadata": mapField("Version and times, as of KV version 2."),
				},
			}.handler(fields),
			logical.UpdateOperation: managed.handler(fields),
			logical.DeleteOperation: erased.handler(fields),
		},
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		HelpSynopsis: "Documents, with the shape of KV version 2 secrets.",
		HelpDescription: `What a document holds changes only together with its version, which goes up by one for each published change and
never down. During a grace period the version before the current one can be read as well; every other version
is answered as KV answers a destroyed one: 404, with its metadata.`,
	}}
}

func (b *backend) readData(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("document").(string)
	if err := publish.CheckName(name); err != nil {
		return refuse("%v", err)
	}
	doc, err := b.documents.Get(ctx, name)
	if err != nil || doc == nil {
		return nil, err
	}
	body, number, created, ok := doc.At(int(d.Get("version").(int64)))
	if !ok {
		return nil, nil
	}
	metadata := map[string]any{
		"version": int64(number), "created_time": formatTime(created), "deletion_time": "", "destroyed": body == nil, "custom_metadata": nil,
	}
	if body == nil {
		resp := &logical.Response{Data: map[string]any{"data": nil, "metadata": metadata}}
		return logical.RespondWithStatusCode(resp, req, http.StatusNotFound)
	}
	return &logical.Response{Data: map[string]any{"data": stringMap(body), "metadata": metadata}}, nil
}

func (b *backend) refuseWrite(_ context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	return refuse("documents are written by rotations and cannot be changed here; write %srotate/<kind>/<name>, or create a role that fills the field", req.MountPoint)
}

func (b *backend) pathMetadata() []*framework.Path {
	only := map[string]*framework.FieldSchema{"document": documentField}
	folder := map[string]*framework.FieldSchema{
		"document": {Type: framework.TypeString, Description: "Folder, with a slash at its end; empty for the top."},
	}
	return []*framework.Path{
		{
			Pattern: "metadata/(?P<document>.*/)?$",
			Fields:  folder,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: operation{
					call: b.listMetadata, summary: "List documents.", verb: "list", suffix: "metadata", fields: keyInfoFields,
				}.handler(folder),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "List documents.",
			HelpDescription: "Lists documents that something was published to, and folders of them, which end with a slash.",
		},
		{
			Pattern: "metadata/(?P<document>.+[^/])",
			Fields:  only,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: operation{
					call: b.readMetadata, summary: "Read the metadata of a document, as of KV version 2.", verb: "read", suffix: "metadata", errors: []int{400, 404},
					fields: map[string]*framework.FieldSchema{
						"versions": mapField("Times of each version, by number."), "current_version": intField("Current version."), "oldest_version": intField("Oldest version that is listed."),
						"created_time": stringField("When the document was first published."), "updated_time": stringField("When it was last."),
						"max_versions": intField("How many versions can be read at most."), "cas_required": boolField("Always false."), "delete_version_after": stringField("Always 0s."),
						"custom_metadata": mapField("Always null."),
					},
				}.handler(only),
			},
			DisplayAttrs:    &framework.DisplayAttributes{OperationPrefix: operationPrefix},
			HelpSynopsis:    "Metadata of documents, with the shape of KV version 2.",
			HelpDescription: "Versions that can no longer be read are listed as destroyed.",
		},
	}
}

func (b *backend) listMetadata(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	folder := d.Get("document").(string)
	if folder != "" {
		if err := publish.CheckName(strings.TrimSuffix(folder, "/")); err != nil {
			return refuse("%v", err)
		}
	}
	names, err := b.documents.List(ctx, folder)
	if err != nil {
		return nil, err
	}
	return logical.ListResponse(names), nil
}

func (b *backend) readMetadata(ctx context.Context, _ *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("document").(string)
	if err := publish.CheckName(name); err != nil {
		return refuse("%v", err)
	}
	doc, err := b.documents.Get(ctx, name)
	if err != nil || doc == nil {
		return nil, err
	}
	oldest := doc.Oldest()
	versions := map[string]any{}
	for n := oldest; n <= doc.Version; n++ {
		body, _, created, _ := doc.At(n)
		versions[strconv.Itoa(n)] = map[string]any{
			"created_time": formatTime(created), "deletion_time": "", "destroyed": body == nil,
		}
	}
	return &logical.Response{Data: map[string]any{
		"versions": versions, "current_version": int64(doc.Version), "oldest_version": int64(oldest),
		"created_time": formatTime(doc.First), "updated_time": formatTime(doc.Updated()),
		"max_versions": int64(2), "cas_required": false, "delete_version_after": "0s", "custom_metadata": nil,
	}}, nil
}
