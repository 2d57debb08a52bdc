# Who may replace secrets at once, after a compromise: for the few who are called then.
# Every earlier version is refused at once, and consumers are restarted. Reads no secret.
path "harmonyflow/emergency/rotate/*" {
  capabilities = ["create", "update"]
}

# To see what comes of it.
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
path "harmonyflow/verify/*" {
  capabilities = ["read"]
}
