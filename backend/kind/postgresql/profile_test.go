package postgresql

import (
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// What a line says is what makes a user have it, and what takes it away.
func TestTraits(t *testing.T) {
	for line, c := range map[string]struct{ give, take string }{
		"CREATEDB":                           {`ALTER ROLE "a ""b" CREATEDB`, `ALTER ROLE "a ""b" NOCREATEDB`},
		"NOINHERIT":                          {`ALTER ROLE "a ""b" NOINHERIT`, `ALTER ROLE "a ""b" INHERIT`},
		"CONNECTION LIMIT 5":                 {`ALTER ROLE "a ""b" CONNECTION LIMIT 5`, `ALTER ROLE "a ""b" CONNECTION LIMIT -1`},
		`member of "Ops \"x\" é"`:            {`GRANT "Ops ""x"" é" TO "a ""b"`, `REVOKE "Ops ""x"" é" FROM "a ""b"`},
		`member of "x" WITH ADMIN`:           {`GRANT "x" TO "a ""b" WITH ADMIN OPTION`, `REVOKE "x" FROM "a ""b"`},
		`setting work_mem = "5MB"`:           {`ALTER ROLE "a ""b" SET "work_mem" TO '5MB'`, `ALTER ROLE "a ""b" RESET "work_mem"`},
		`setting role = "it's \\ new\nline"`: {`ALTER ROLE "a ""b" SET "role" TO E'it''s \\ new` + "\n" + `line'`, `ALTER ROLE "a ""b" RESET "role"`},
		`setting search_path = "\"$user\", public, \"a \"\"b\""`: {
			`ALTER ROLE "a ""b" SET "search_path" TO '$user', 'public', 'a "b'`, `ALTER ROLE "a ""b" RESET "search_path"`,
		},
		`setting search_path = "\"\"" in database "d \"x\""`: {
			`ALTER ROLE "a ""b" IN DATABASE "d ""x""" SET "search_path" TO ''`, `ALTER ROLE "a ""b" IN DATABASE "d ""x""" RESET "search_path"`,
		},
	} {
		trait := traitOf(line)
		require.False(t, trait.ofObjects(), line)
		require.Equal(t, c.give, trait.give(`a "b`, 150000).sql, line)
		require.Equal(t, c.take, trait.take(`a "b`).sql, line)
	}
	for _, line := range []string{
		`ownership of table public.orders in database "shop"`, `SELECT, INSERT on table public.orders`, `CONNECTION LIMIT 5; DROP ROLE b`,
		`member of x`, `member of "x"; DROP ROLE b`, `CREATEDB SUPERUSER`, ``,
	} {
		require.True(t, traitOf(line).ofObjects(), line)
	}
	require.Equal(t, `GRANT "x" TO "a" WITH ADMIN true, INHERIT false, SET true`, traitOf(`member of "x" WITH ADMIN WITHOUT INHERIT`).give("a", 160000).sql)
	require.Equal(t, `member of "x" WITH ADMIN WITHOUT INHERIT WITHOUT SET`, membership("x", true, false, false))
}

func TestProfilesHideWhatMayBeSecret(t *testing.T) {
	p := profile{hidden: map[string]string{}}
	p.addSetting("app.key", "of-the-application", "")
	p.addSetting("work_mem", "5MB", "")
	p.add("ownership of table \"new\nline\"")
	require.NotContains(t, strings.Join(p.lines, "\n"), "of-the-application")
	require.Len(t, strings.Split(strings.Join(p.lines, "\n"), "\n"), 3)
	require.Empty(t, p.tooBig("app"))

	all, err := creation("b", p.lines[:2], p.hidden, 150000)
	require.NoError(t, err)
	require.Equal(t, `ALTER ROLE "b" SET "app.key" TO 'of-the-application'`, all[1].sql)
	_, err = creation("b", p.lines[:2], nil, 150000)
	require.ErrorContains(t, err, "app.key")
	require.True(t, kind.IsDefinite(err))
	_, err = creation("b", p.lines, p.hidden, 150000)
	require.ErrorContains(t, err, "member")
	require.NotContains(t, err.Error(), "of-the-application")

	p.addSetting("search_path", strings.Repeat("x", maxProfile), "")
	require.Empty(t, p.tooBig("app"))
	for i := range 50 {
		p.addSetting("search_path", strings.Repeat("x", maxValue), "database-"+strconv.Itoa(i))
	}
	require.Contains(t, p.tooBig("app"), "49152 are kept")
}
