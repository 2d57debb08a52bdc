package connection

// TypePostgreSQL is a connection to a PostgreSQL: a primary, with or without
// standbys.
const TypePostgreSQL = "postgresql"

// PostgreSQL is what a connection of type postgresql has beyond the common
// fields.
type PostgreSQL struct {
	// URL is a URL or keywords and values, with {{username}} and {{password}} where
	// credentials go. It never holds any.
	URL string `json:"connection_url"`
	// Hosts are those of URL, host:port.
	Hosts []string `json:"hosts"`
}
