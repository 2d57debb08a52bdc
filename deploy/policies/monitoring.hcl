# What Prometheus needs.
path "harmonyflow/metrics" {
  capabilities = ["read"]
}
