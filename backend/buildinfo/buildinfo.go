// Package buildinfo knows which release of the engine is running.
package buildinfo

// Version is what the plugin reports to Vault, which insists on a semantic
// version. The Makefile sets it with -ldflags "-X …/backend/buildinfo.Version=…".
var Version = "v0.1.0-dev"
