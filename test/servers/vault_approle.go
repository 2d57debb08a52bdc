package servers

import (
	"context"
	"fmt"
	"strings"

	"github.com/hashicorp/vault/api"
)

// AppRole makes a role of that auth method whose tokens may do what policy (HCL)
// says, beside what the policy "default" says, and live for ttl. The method is
// enabled at approle/ when it is not.
func (v *Vault) AppRole(ctx context.Context, name, policy, ttl string) (roleID, secretID string, err error) {
	client := v.Client()
	err = client.Sys().EnableAuthWithOptionsWithContext(ctx, "approle", &api.EnableAuthOptions{Type: "approle"})
	if err != nil && !strings.Contains(err.Error(), "path is already in use") {
		return "", "", fmt.Errorf("enabling approle: %w", err)
	}
	if err := client.Sys().PutPolicyWithContext(ctx, name, policy); err != nil {
		return "", "", err
	}
	role := "auth/approle/role/" + name
	if _, err := client.Logical().WriteWithContext(ctx, role, map[string]any{"token_policies": name, "token_ttl": ttl}); err != nil {
		return "", "", err
	}
	answer, err := client.Logical().ReadWithContext(ctx, role+"/role-id")
	if err != nil {
		return "", "", err
	}
	roleID, _ = answer.Data["role_id"].(string)
	if answer, err = client.Logical().WriteWithContext(ctx, role+"/secret-id", map[string]any{}); err != nil {
		return "", "", err
	}
	secretID, _ = answer.Data["secret_id"].(string)
	return roleID, secretID, nil
}
