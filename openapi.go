package harmonyflow

import (
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// inlineSchemas puts the schemas of requests and answers where they are referred to. On
// its way from a plugin into Vault's OpenAPI document a reference is lost
// (framework.NewOASDocumentFromMap knows no "$ref"), and with it every field.
func inlineSchemas(resp *logical.Response) {
	if resp == nil {
		return
	}
	doc, ok := resp.Data["openapi"].(*framework.OASDocument)
	if !ok {
		return
	}
	for _, item := range doc.Paths {
		for _, op := range []*framework.OASOperation{item.Get, item.Post, item.Patch, item.Delete} {
			if op == nil {
				continue
			}
			if op.RequestBody != nil {
				inlineContent(op.RequestBody.Content, doc)
			}
			for _, r := range op.Responses {
				inlineContent(r.Content, doc)
			}
		}
	}
}

func inlineContent(content framework.OASContent, doc *framework.OASDocument) {
	for _, media := range content {
		if media == nil || media.Schema == nil {
			continue
		}
		name, is := strings.CutPrefix(media.Schema.Ref, "#/components/schemas/")
		if schema := doc.Components.Schemas[name]; is && schema != nil {
			media.Schema = schema
		}
	}
}
