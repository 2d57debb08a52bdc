package connection

// TypeVault is a connection to a Vault: another one, or the one that the engine
// runs in.
const TypeVault = "vault"

// The ways to log in to a Vault.
const (
	// AuthToken: Admin holds the token.
	AuthToken = "token"
	// AuthAppRole: Admin holds role_id and secret_id.
	AuthAppRole = "approle"
	// AuthKubernetes: Admin holds the role and, if one was given, a JWT.
	AuthKubernetes = "kubernetes"
)

// Vault is what a connection of type vault has beyond the common fields.
type Vault struct {
	Address   string `json:"address"`
	Namespace string `json:"namespace,omitempty"`
	Auth      string `json:"auth"`
	AuthMount string `json:"auth_mount,omitempty"`
	// Role is the name of the AppRole, which its role_id does not tell. Whoever
	// rotates the secret-id needs it.
	Role string `json:"role,omitempty"`
	// AllowedPublishPaths are globs over <mount>/<path>.
	AllowedPublishPaths []string `json:"allowed_publish_paths,omitempty"`
}

// AllowsPublish reports whether roles may publish to path of a KV mount. By
// default they may publish nowhere.
func (e *Entry) AllowsPublish(mount, path string) bool {
	return e.Vault != nil && matchAny(e.Vault.AllowedPublishPaths, mount+"/"+path)
}
