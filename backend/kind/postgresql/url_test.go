package postgresql

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
)

func TestConnectionURLs(t *testing.T) {
	for text, want := range map[string]settings{
		"postgresql://{{username}}:{{password}}@db.example.org:5433/app?sslmode=disable": {hosts: []string{"db.example.org:5433"}, database: "app"},
		"postgres://{{username}}:{{password}}@db":                                        {hosts: []string{"db:5432"}, database: "postgres", tls: true},
		"postgresql://db,10.0.0.2:5433,[fd00::1]:5434/?target_session_attrs=read-write":  {hosts: []string{"db:5432", "10.0.0.2:5433", "[fd00::1]:5434"}, database: "postgres", tls: true},
		"postgresql://{{username}}@db/a%20b?application_name=rot":                        {hosts: []string{"db:5432"}, database: "a b", tls: true, application: "rot"},
		"host=a,b port=1,2 user={{username}} password={{password}} dbname=x":             {hosts: []string{"a:1", "b:2"}, database: "x", tls: true},
		"host=a,b port=7 password='{{password}}' sslmode=verify-full":                    {hosts: []string{"a:7", "b:7"}, database: "postgres", tls: true},
		" host = db  dbname = 'it''s' ":                                                  {},
		`host=db dbname='it\'s' sslmode=disable`:                                         {hosts: []string{"db:5432"}, database: "it's"},
	} {
		got, err := parse(text)
		if want.hosts == nil {
			require.Error(t, err, text)
			continue
		}
		require.NoError(t, err, text)
		if want.application == "" {
			want.application = "vault-plugin-secrets-harmonyflow"
		}
		require.Equal(t, want, got, text)
	}
}

// Whatever is wrong with it, a password that somebody wrote into it is not
// repeated.
func TestConnectionURLsThatAreRefused(t *testing.T) {
	const secret = "hunter2"
	for text, says := range map[string]string{
		"":                                       "missing",
		"postgresql://admin:hunter2@db/postgres": "holds a user",

		"postgresql://{{username}}:hunter2@db/postgres":                               "holds a password",
		"postgresql://{{username}}:hun/hunter2@db/postgres":                           "no host", // an unescaped slash
		"postgresql://db/?password=hunter2":                                           "holds a password",
		"postgresql://db:hunter2/postgres":                                            "port",
		"postgresql://db@hunter2@db/postgres":                                         "holds a user",
		"host=db password=hunter2":                                                    "holds a password",
		"host=db password='hunter2":                                                   "cannot be read",
		"host=db password=my hunter2=x":                                               "holds a parameter, which is not supported",
		"postgresql://db/?sslmode=require&a=hunter2&hunter2=1":                        "holds a parameter, which is not supported",
		"host=db my=1 hunter2=2 hunter2=3":                                            "cannot be read",
		"hunter2":                                                                     "cannot be read",
		"postgresql:///postgres":                                                      "no host",
		"postgresql://%2Fvar%2Frun%2Fpostgresql/postgres":                             "socket",
		"host=/var/run/postgresql":                                                    "socket",
		"host=@abstract":                                                              "socket",
		"postgresql://db/?sslcert=/etc/hunter2":                                       "tls_cert",
		"postgresql://db/?sslkey=x":                                                   "reads no files",
		"postgresql://db/?sslrootcert=x":                                              "reads no files",
		"postgresql://db/?passfile=x":                                                 "reads no files",
		"postgresql://db/?service=x":                                                  "reads no files",
		"host=db servicefile=x":                                                       "reads no files",
		"postgresql://db/?options=-c%20x":                                             "not supported",
		"postgresql://db/?require_auth=none":                                          "not supported",
		"postgresql://db/?sslmode=prefer":                                             "sslmode",
		"postgresql://db/?target_session_attrs=standby":                               "target_session_attrs",
		"postgresql://db/?sslmode=disable&sslmode=require":                            "twice",
		"postgresql://db/?host=other":                                                 "twice",
		"postgresql://db:0/":                                                          "port",
		"postgresql://db:99999/":                                                      "port",
		"postgresql://db,db:5432/":                                                    "twice",
		"host=a,b port=1,2,3":                                                         "ports",
		"postgresql://db/%zz":                                                         "escape",
		"postgresql://db/?%zz=1":                                                      "cannot be read",
		"host=db dbname=x\\":                                                          "cannot be read",
		"postgresql://" + strings.Repeat("a,", maxHosts) + "b/":                       "hosts",
		"postgresql://" + strings.Repeat("a", 254) + "/":                              "host",
		"mysql://{{username}}:{{password}}@db/x?y=hunter2 ":                           "",
		"postgresql://db/?sslmode=hunter2":                                            "sslmode",
		"jdbc:postgresql://db/postgres?user=admin&password=hunter2&loginTimeout=10 x": "cannot be read",
	} {
		err := ValidateConfig(&connection.PostgreSQL{URL: text}, connection.TLS{})
		require.Error(t, err, text)
		require.ErrorContains(t, err, says, text)
		require.ErrorContains(t, err, "connection_url", text)
		require.NotContains(t, err.Error(), secret, text)
	}
	require.Error(t, ValidateConfig(nil, connection.TLS{}))
	plain := &connection.PostgreSQL{URL: "postgresql://db/?sslmode=disable"}
	require.NoError(t, ValidateConfig(plain, connection.TLS{}))
	require.Equal(t, []string{"db:5432"}, plain.Hosts)
	require.ErrorContains(t, ValidateConfig(plain, connection.TLS{SkipVerify: true}), "sslmode=disable")
}
