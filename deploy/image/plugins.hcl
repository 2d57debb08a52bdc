# Beside your own configuration in /vault/config, or as part of it.
plugin_directory = "/opt/vault/plugins"

# Neither Vault nor the plugin may lock memory in this image: docs/howto/image.md.
disable_mlock = true
