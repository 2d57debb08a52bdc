# Reads one document, as an application or External Secrets does. A role that fills
# no document is read at creds/<role> instead.
path "harmonyflow/data/session-state-service" {
  capabilities = ["read"]
}
path "harmonyflow/metadata/session-state-service" {
  capabilities = ["read"]
}
