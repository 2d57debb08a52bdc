# Sets the engine up and rotates everything. Reads no secret: creds/ and data/ are
# not here, and what is written as a password is never read back.
path "harmonyflow/config" {
  capabilities = ["create", "read", "update"]
}
path "harmonyflow/connections/*" {
  capabilities = ["create", "read", "update", "patch", "delete", "list"]
}
path "harmonyflow/rotate-root/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/consumers/*" {
  capabilities = ["create", "read", "update", "patch", "delete", "list"]
}
path "harmonyflow/documents/*" {
  capabilities = ["create", "read", "update", "patch", "delete", "list"]
}
path "harmonyflow/roles/*" {
  capabilities = ["create", "read", "update", "patch", "delete", "list"]
}
path "harmonyflow/deleted" {
  capabilities = ["read", "list"]
}
path "harmonyflow/deleted/*" {
  capabilities = ["read", "list"]
}
path "harmonyflow/restore/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/metadata/*" {
  capabilities = ["read", "list"]
}

path "harmonyflow/rotate/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/rollback/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/retire/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/reconcile/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/ack/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/cancel/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/resume/*" {
  capabilities = ["create", "update"]
}
path "harmonyflow/verify/*" {
  capabilities = ["read"]
}
path "harmonyflow/rotations" {
  capabilities = ["read", "list"]
}
path "harmonyflow/rotations/*" {
  capabilities = ["read", "list"]
}
path "harmonyflow/notifications/*" {
  capabilities = ["create", "read", "update", "delete", "list"]
}
path "harmonyflow/status" {
  capabilities = ["read"]
}
path "harmonyflow/metrics" {
  capabilities = ["read"]
}
