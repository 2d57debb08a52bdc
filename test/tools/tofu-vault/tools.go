//go:build tools

// Package tools pins the Terraform provider of Vault, which scripts/ensure-tofu.sh builds.
package tools

import _ "github.com/hashicorp/terraform-provider-vault"
