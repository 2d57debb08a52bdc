# On call for the roles of one kind: replace redis by another, or add its lines.
path "harmonyflow/rotate/redis" {
  capabilities = ["create", "update"]
}
path "harmonyflow/rotate/redis/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/rollback/redis/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/retire/redis/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/reconcile/redis/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/ack/redis/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/verify/redis/*" {
  capabilities = ["read"]
}

# A rotation is named by its id, whatever its kind.
path "harmonyflow/cancel/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/resume/*" {
  capabilities = ["create", "update"]
}

# To look at, of all kinds. None of these shows a secret.
path "harmonyflow/status" {
  capabilities = ["read"]
}
path "harmonyflow/rotations" {
  capabilities = ["read", "list"]
}
path "harmonyflow/rotations/*" {
  capabilities = ["read", "list"]
}
path "harmonyflow/roles/*" {
  capabilities = ["read", "list"]
}
path "harmonyflow/connections/*" {
  capabilities = ["read", "list"]
}
path "harmonyflow/consumers/*" {
  capabilities = ["read", "list"]
}
path "harmonyflow/documents/*" {
  capabilities = ["read", "list"]
}
path "harmonyflow/metadata/*" {
  capabilities = ["read", "list"]
}
