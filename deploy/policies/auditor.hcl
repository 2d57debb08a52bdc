# Looks at what was done and how it was proven. Changes nothing, asks no target, and
# reads no secret.
path "harmonyflow/notifications/*" {
  capabilities = ["read", "list"]
}
path "harmonyflow/status" {
  capabilities = ["read"]
}
path "harmonyflow/metrics" {
  capabilities = ["read"]
}
path "harmonyflow/config" {
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
path "harmonyflow/deleted" {
  capabilities = ["read", "list"]
}
path "harmonyflow/deleted/*" {
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
