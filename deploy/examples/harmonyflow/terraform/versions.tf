terraform {
  required_version = ">= 1.4" # of OpenTofu or Terraform: terraform_data

  required_providers {
    vault = {
      source  = "hashicorp/vault"
      version = ">= 4.0"
    }
  }
}

# VAULT_ADDR, VAULT_TOKEN and so on say which Vault, as for the command vault.
provider "vault" {}
