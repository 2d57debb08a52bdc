package postgresql

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

const (
	// maxObjects bounds how many objects of one user are looked at one by one in one
	// database, and maxDatabases how many databases are logged in to for that.
	maxObjects   = 200
	maxDatabases = 8

	named = `r.rolname::text IN (SELECT v FROM pg_catalog.json_array_elements_text($1::json) v)`

	readingAttributes = `SELECT r.rolname::text, r.rolcanlogin::text, r.rolsuper::text, r.rolcreatedb::text, r.rolcreaterole::text,
 r.rolreplication::text, r.rolbypassrls::text, (NOT r.rolinherit)::text, r.rolconnlimit::text
 FROM pg_catalog.pg_roles r WHERE ` + named

	// inherit_option and set_option exist from 16 on, and there somebody may be a
	// member by several grantors.
	readingMemberships = `SELECT r.rolname::text, g.rolname::text, bool_or(m.admin_option)::text,
 bool_or(coalesce(pg_catalog.to_jsonb(m) ->> 'inherit_option', 'true')::bool)::text,
 bool_or(coalesce(pg_catalog.to_jsonb(m) ->> 'set_option', 'true')::bool)::text
 FROM pg_catalog.pg_auth_members m JOIN pg_catalog.pg_roles r ON r.oid = m.member JOIN pg_catalog.pg_roles g ON g.oid = m.roleid
 WHERE ` + named + ` GROUP BY 1, 2`

	readingSettings = `SELECT r.rolname::text, coalesce(d.datname::text, ''), pg_catalog.unnest(s.setconfig)
 FROM pg_catalog.pg_db_role_setting s JOIN pg_catalog.pg_roles r ON r.oid = s.setrole
 LEFT JOIN pg_catalog.pg_database d ON d.oid = s.setdatabase WHERE ` + named

	// pg_shdepend knows of every database who owns an object, is named by its
	// privileges or by a policy, and everybody may read it.
	ofDependencies = ` FROM pg_catalog.pg_shdepend s
 JOIN pg_catalog.pg_roles r ON s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass AND s.refobjid = r.oid
 LEFT JOIN pg_catalog.pg_database d ON d.oid = s.dbid`

	countingObjects = `SELECT r.rolname::text, coalesce(d.datname::text, ''), s.deptype::text, s.classid::pg_catalog.regclass::text, count(*)::text,
 pg_catalog.md5(string_agg(s.objid || '.' || s.objsubid, ' ' ORDER BY s.objid, s.objsubid)),
 (sum(count(*)) OVER (PARTITION BY r.rolname, d.datname) <= $2::int)::text, (coalesce(d.datname = current_database(), true))::text` +
		ofDependencies + ` WHERE s.deptype IN ('o', 'a', 'r') AND ` + named + ` GROUP BY r.rolname, d.datname, s.deptype, s.classid`

	// Temporary objects come and go with sessions.
	readingObjects = `SELECT r.rolname::text, coalesce(d.datname::text, ''), s.deptype::text, coalesce(o.type, ''), coalesce(o.identity, ''),
 coalesce((SELECT string_agg(DISTINCT p.privilege_type || CASE WHEN p.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END, ', ')
  FROM pg_catalog.aclexplode(CASE s.classid%s END) p WHERE p.grantee = r.oid), '')` +
		ofDependencies + ` CROSS JOIN LATERAL pg_catalog.pg_identify_object(s.classid, s.objid, s.objsubid) o
 WHERE s.deptype IN ('o', 'a', 'r') AND ` + named + ` AND coalesce(d.datname::text, '') = $2
 AND coalesce(o.schema, '') !~ '^pg_temp' AND coalesce(o.identity, '') !~ '^pg_temp'`
)

// privileges are where the catalogs keep those of objects; column is one of a
// table.
var privileges = []struct {
	since                     int
	class, catalog, id, holds string
}{
	{0, "pg_class", "pg_class", "oid", "relacl"},
	{0, "pg_namespace", "pg_namespace", "oid", "nspacl"},
	{0, "pg_proc", "pg_proc", "oid", "proacl"},
	{0, "pg_type", "pg_type", "oid", "typacl"},
	{0, "pg_database", "pg_database", "oid", "datacl"},
	{0, "pg_tablespace", "pg_tablespace", "oid", "spcacl"},
	{0, "pg_language", "pg_language", "oid", "lanacl"},
	{0, "pg_foreign_data_wrapper", "pg_foreign_data_wrapper", "oid", "fdwacl"},
	{0, "pg_foreign_server", "pg_foreign_server", "oid", "srvacl"},
	{0, "pg_largeobject", "pg_largeobject_metadata", "oid", "lomacl"},
	{0, "pg_default_acl", "pg_default_acl", "oid", "defaclacl"},
	{150000, "pg_parameter_acl", "pg_parameter_acl", "oid", "paracl"},
}

// objectsQuery reads what users have to do with objects of the database of the
// session, or ("") of all databases.
func objectsQuery(number int) string {
	var cases strings.Builder
	for _, p := range privileges {
		if number < p.since {
			continue
		}
		acl := fmt.Sprintf("(SELECT %s FROM pg_catalog.%s WHERE %s = s.objid)", p.holds, p.catalog, p.id)
		if p.class == "pg_class" {
			acl = "CASE s.objsubid WHEN 0 THEN " + acl +
				" ELSE (SELECT attacl FROM pg_catalog.pg_attribute WHERE attrelid = s.objid AND attnum = s.objsubid) END"
		}
		fmt.Fprintf(&cases, " WHEN 'pg_catalog.%s'::pg_catalog.regclass THEN %s", p.class, acl)
	}
	return fmt.Sprintf(readingObjects, cases.String())
}

// profiles asks a node what users are; who does not exist is not in the answer.
// Objects are looked at where somebody is compared, and counted otherwise.
func (n *node) profiles(ctx context.Context, users []kind.User) (map[string]*profile, error) {
	names, err := namesOf(users)
	if err != nil {
		return nil, err
	}
	out, err := n.copyable(ctx, names)
	if err == nil {
		err = n.objects(ctx, names, !everyOneExists(users), out)
	}
	if err != nil {
		return nil, n.later(ctx, err, "read what its users may do", n.facts.admin)
	}
	for _, p := range out {
		slices.Sort(p.lines)
	}
	return out, nil
}

// copyable reads what users can be created with.
func (n *node) copyable(ctx context.Context, names string) (map[string]*profile, error) {
	out := map[string]*profile{}
	found, err := n.s.ask(ctx, readingAttributes, names)
	if err != nil {
		return nil, err
	}
	for _, f := range found {
		p := &profile{hidden: map[string]string{}}
		for i, attribute := range []string{"LOGIN", "SUPERUSER", "CREATEDB", "CREATEROLE", "REPLICATION", "BYPASSRLS", "NOINHERIT"} {
			if f[i+1] == "true" {
				p.add(attribute)
			}
		}
		if f[8] != "-1" {
			p.add("CONNECTION LIMIT " + f[8])
		}
		out[f[0]] = p
	}
	if found, err = n.s.ask(ctx, readingMemberships, names); err != nil {
		return nil, err
	}
	for _, f := range found {
		if p := out[f[0]]; p != nil {
			p.add(membership(f[1], f[2] == "true", f[3] == "true", f[4] == "true"))
		}
	}
	if found, err = n.s.ask(ctx, readingSettings, names); err != nil {
		return nil, err
	}
	for _, f := range found {
		if p := out[f[0]]; p != nil {
			name, value, _ := strings.Cut(f[2], "=")
			p.addSetting(name, value, f[1])
		}
	}
	return out, nil
}

func membership(group string, admin, inherit, set bool) string {
	line := fmt.Sprintf("member of %q", group)
	if admin {
		line += " WITH ADMIN"
	}
	if !inherit {
		line += " WITHOUT INHERIT"
	}
	if !set {
		line += " WITHOUT SET"
	}
	return line
}

// place is a database, and the users who have to do with few objects there.
type place struct {
	here  bool // the session is in it, or it is none: of what all databases share
	users []kind.User
}

// objects adds what users have to do with objects.
func (n *node) objects(ctx context.Context, names string, closely bool, out map[string]*profile) error {
	counted, err := n.s.ask(ctx, countingObjects, names, fmt.Sprint(maxObjects))
	if err != nil {
		return err
	}
	places := map[string]*place{}
	for _, f := range counted {
		user := kind.User{Username: f[0]}
		if p := places[f[1]]; p == nil && closely && f[6] == "true" {
			places[f[1]] = &place{here: f[7] == "true", users: []kind.User{user}}
		} else if p != nil && f[6] == "true" {
			p.users = append(p.users, user)
		}
	}
	elsewhere := 0
	looked := map[[2]string]bool{}
	for _, database := range slices.Sorted(maps.Keys(places)) {
		p := places[database]
		if !p.here {
			elsewhere++
		}
		if !p.here && elsewhere > maxDatabases {
			continue
		}
		seen, err := n.look(ctx, database, p, out)
		if err != nil {
			return err
		}
		for _, u := range p.users {
			looked[[2]string{database, u.Username}] = seen
		}
	}
	for _, f := range counted {
		if p := out[f[0]]; p != nil && !looked[[2]string{f[1], f[0]}] {
			p.count(f[1], f[2], f[3], f[4], f[5])
		}
	}
	return nil
}

// count adds objects that nobody looked at.
func (p *profile) count(database, relation, catalog, number, digest string) {
	p.add(fmt.Sprintf("%s %s entries of %s%s (#%.16s)", relations[relation], number, strings.TrimPrefix(catalog, "pg_catalog."), inDatabase(database), digest))
	if database != "" && !slices.Contains(p.coarse, database) {
		p.coarse = append(p.coarse, database)
	}
}

// relations say what a user has to do with an object, in words that follow "has"
// and "lacks".
var relations = map[string]string{"o": "ownership of", "a": "privileges on", "r": "a place in"}

// look adds the objects of one database. It reports false where it may not look.
func (n *node) look(ctx context.Context, database string, where *place, out map[string]*profile) (bool, error) {
	names, err := namesOf(where.users)
	if err != nil {
		return false, err
	}
	s := n.s
	if !where.here {
		other := n.door
		other.database = database
		connectCtx, cancel := within(ctx, 4, connectTimeout)
		defer cancel()
		if s, _, err = other.login(ctx, connectCtx, n.admin); err != nil {
			return false, ctx.Err() // they are counted
		}
		defer s.close(ctx)
	}
	found, err := s.ask(ctx, objectsQuery(n.facts.number), names, database)
	if err != nil {
		return false, err
	}
	for _, f := range found {
		p := out[f[0]]
		if p == nil {
			continue
		}
		relation := relations[f[2]]
		if f[5] != "" {
			relation = f[5] + " on"
		}
		p.add(fmt.Sprintf("%s %s %s%s", relation, f[3], f[4], inDatabase(f[1])))
	}
	return true, nil
}
