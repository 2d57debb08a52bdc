//go:build tools

// Package tools pins OpenTofu, which scripts/ensure-tofu.sh builds.
package tools

import _ "github.com/opentofu/opentofu/cmd/tofu"
