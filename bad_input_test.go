package harmonyflow

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/rotation"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/storage"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// badMount has a connection cache with role app, which is idle, role busy, which
// is in grace, and role token, which needs no server.
func badMount(t *testing.T) (*mount, *servers.RedisNode, string) {
	t.Helper()
	m := newMount(t)
	server := servers.Redis(t, users(4), servers.WithUsers("stranger on >stranger-password ~* +@all"))
	m.connect("cache", server.Addr, map[string]any{"allowed_roles": "app,busy,new,second,token", "allowed_usernames": "user-*,admin"})
	m.connect("also-cache", server.Addr, nil)
	m.adopt("app", "cache", 0, nil)
	m.adopt("busy", "cache", 1, nil)
	m.must("roles/token", map[string]any{"kind": "api-key"})
	running := id(m.must("rotate/redis/busy", nil))
	require.Equal(t, "grace", m.read("roles/busy").data["state"])
	return m, server, running
}

// badCase is a request that is refused, with part of the sentence that says so.
type badCase struct {
	op   logical.Operation // update when empty
	path string
	data map[string]any
	code int // 400 when 0
	says string
}

func redisRole(more map[string]any) map[string]any {
	data := map[string]any{"kind": "redis", "connection": "cache", "username": "user-2", "initial_password": password(2)}
	maps.Copy(data, more)
	return data
}

func apiKey(more map[string]any) map[string]any {
	data := map[string]any{"kind": "api-key"}
	maps.Copy(data, more)
	return data
}

// TestBadInput: each is refused with one sentence, stores nothing and changes
// nothing at the target.
func TestBadInput(t *testing.T) {
	t.Parallel()
	m, server, running := badMount(t)
	cases := map[string]badCase{
		// Roles.
		"unknown kind":                   {path: "roles/new", data: map[string]any{"kind": "oracle"}, says: "allowed are redis, "},
		"no kind":                        {path: "roles/new", data: map[string]any{}, says: "allowed are redis, "},
		"unknown connection":             {path: "roles/new", data: redisRole(map[string]any{"connection": "nowhere"}), says: "write connections/nowhere first"},
		"no connection":                  {path: "roles/new", data: map[string]any{"kind": "redis", "username": "user-2"}, says: "connection is missing"},
		"a connection where none is due": {path: "roles/new", data: apiKey(map[string]any{"connection": "cache"}), says: "need none"},
		"a connection's name with ..":    {path: "roles/new", data: redisRole(map[string]any{"connection": "../role/app"}), says: "connection: name"},
		"role not allowed":               {path: "roles/other", data: redisRole(nil), says: "add it to its allowed_roles"},
		"user not allowed":               {path: "roles/new", data: redisRole(map[string]any{"username": "stranger"}), says: "add it to its allowed_usernames"},
		"admin's own user":               {path: "roles/new", data: redisRole(map[string]any{"username": servers.RedisAdmin}), says: "own admin user"},
		"user of another role":           {path: "roles/new", data: redisRole(map[string]any{"username": "user-0", "initial_password": password(0)}), code: 409, says: `belongs to role "app"`},
		"the same by another connection": {path: "roles/new", data: redisRole(map[string]any{"username": "user-0", "initial_password": password(0), "connection": "also-cache"}), code: 409, says: `belongs to role "app"`},
		"unknown user":                   {path: "roles/new", data: map[string]any{"kind": "redis", "connection": "cache", "username": "user-9"}, code: 409, says: "user-9"},
		"wrong initial password":         {path: "roles/new", data: redisRole(map[string]any{"initial_password": "wrong-password-x"}), code: 409, says: "initial_password"},
		"password not given":             {path: "roles/new", data: map[string]any{"kind": "redis", "connection": "cache", "username": "user-2"}, code: 409, says: "overwrite_existing=true"},
		"empty initial password":         {path: "roles/new", data: redisRole(map[string]any{"initial_password": ""}), says: "initial_password is empty"},
		"two schedules":                  {path: "roles/new", data: redisRole(map[string]any{"rotation_period": "24h", "rotation_schedule": "0 3 * * *"}), says: "only one of them"},
		"a window without a schedule":    {path: "roles/new", data: redisRole(map[string]any{"rotation_window": "1h"}), says: "rotation_window"},
		"a window and a period":          {path: "roles/new", data: redisRole(map[string]any{"rotation_period": "24h", "rotation_window": "1h"}), says: "rotation_window"},
		"cron that never fires":          {path: "roles/new", data: redisRole(map[string]any{"rotation_schedule": "0 0 30 2 *"}), says: "never fires"},
		"cron of six fields":             {path: "roles/new", data: redisRole(map[string]any{"rotation_schedule": "0 0 0 1 1 *"}), says: "rotation_schedule"},
		"cron that is none":              {path: "roles/new", data: redisRole(map[string]any{"rotation_schedule": "often"}), says: "rotation_schedule"},
		"zero period":                    {path: "roles/new", data: redisRole(map[string]any{"rotation_period": 0}), says: "rotation_period"},
		"zero period as text":            {path: "roles/new", data: redisRole(map[string]any{"rotation_period": "0s"}), says: "rotation_period"},
		"negative period":                {path: "roles/new", data: redisRole(map[string]any{"rotation_period": -5}), says: "rotation_period"},
		"negative period as text":        {path: "roles/new", data: redisRole(map[string]any{"rotation_period": "-1h"}), says: "rotation_period"},
		"period of a second":             {path: "roles/new", data: redisRole(map[string]any{"rotation_period": "1s"}), says: "rotation_period"},
		"period that overflows":          {path: "roles/new", data: redisRole(map[string]any{"rotation_period": "99999999999h"}), says: "rotation_period"},
		"period shorter than grace":      {path: "roles/new", data: redisRole(map[string]any{"rotation_period": "30m"}), says: "shorten grace_period"},
		"cron shorter than grace":        {path: "roles/new", data: redisRole(map[string]any{"rotation_schedule": "*/30 * * * *"}), says: "shorten grace_period"},
		"grace longer than period":       {path: "roles/new", data: redisRole(map[string]any{"rotation_period": "24h", "grace_period": "25h"}), says: "shorten grace_period"},
		"negative grace":                 {path: "roles/new", data: redisRole(map[string]any{"grace_period": "-1s"}), says: "grace_period"},
		"grace of years":                 {path: "roles/new", data: redisRole(map[string]any{"grace_period": "99999h"}), says: "grace_period"},
		"keep one version":               {path: "roles/new", data: redisRole(map[string]any{"keep_versions": 1}), says: "keep_versions"},
		"keep too many versions":         {path: "roles/new", data: redisRole(map[string]any{"keep_versions": 1000}), says: "keep_versions"},
		"short password":                 {path: "roles/new", data: redisRole(map[string]any{"length": 4}), says: "length"},
		"negative length":                {path: "roles/new", data: redisRole(map[string]any{"length": -1}), says: "length"},
		"unknown strategy":               {path: "roles/new", data: redisRole(map[string]any{"strategy": "hope"}), says: "strategy"},
		"a key ring on redis":            {path: "roles/new", data: redisRole(map[string]any{"strategy": "key-ring"}), says: "strategy"},
		"field of another kind":          {path: "roles/new", data: redisRole(map[string]any{"encoding": "hex"}), says: `field "encoding" is not for kind redis`},
		"username of an api-key":         {path: "roles/new", data: apiKey(map[string]any{"username": "me"}), says: `"username" is not for kind api-key`},
		"initial_value of a user":        {path: "roles/new", data: redisRole(map[string]any{"initial_value": "some-initial-value"}), says: "use initial_password"},
		"initial_password of a key":      {path: "roles/new", data: apiKey(map[string]any{"initial_password": "some-initial-password"}), says: "use initial_value"},
		"encoding that is none":          {path: "roles/new", data: apiKey(map[string]any{"encoding": "base13"}), says: "encoding"},
		"policy that does not exist":     {path: "roles/new", data: apiKey(map[string]any{"password_policy": "nowhere"}), says: "sys/policies/password/nowhere"},
		"previous_field that is taken":   {path: "roles/new", data: apiKey(map[string]any{"previous_field": "value"}), says: "previous_field"},
		"username of control characters": {path: "roles/new", data: redisRole(map[string]any{"username": "a\x00b"}), says: "username"},
		"username with a line":           {path: "roles/new", data: redisRole(map[string]any{"username": "a\nACL DELUSER admin"}), says: "username"},
		"unknown field":                  {path: "roles/new", data: redisRole(map[string]any{"hooks": "web"}), says: `unknown field "hooks"`},
		"long description":               {path: "roles/new", data: redisRole(map[string]any{"description": strings.Repeat("a", 1025)}), says: "description"},
		"period as a list":               {path: "roles/new", data: redisRole(map[string]any{"rotation_period": []any{1, 2}}), says: "rotation_period"},
		"length as text":                 {path: "roles/new", data: redisRole(map[string]any{"length": "long"}), says: "length"},
		"bool as text":                   {path: "roles/new", data: redisRole(map[string]any{"allow_partial": "perhaps"}), says: "allow_partial"},
		"name as a map":                  {path: "roles/new", data: redisRole(map[string]any{"username": map[string]any{"a": 1}}), says: "username"},
		"password as a list":             {path: "roles/new", data: redisRole(map[string]any{"initial_password": []any{"in-a-list-password"}}), says: `"initial_password" must be a string`},
		"password as a map":              {path: "roles/new", data: redisRole(map[string]any{"initial_password": map[string]any{"p": "in-a-map-password"}}), says: `"initial_password" must be a string`},

		// Updates.
		"changing kind":                      {path: "roles/app", data: map[string]any{"kind": "api-key"}, says: "create another role"},
		"changing connection":                {path: "roles/app", data: map[string]any{"connection": "also-cache"}, says: "create another role"},
		"changing username":                  {path: "roles/app", data: map[string]any{"username": "user-2"}, says: "create another role"},
		"initial_password on update":         {path: "roles/app", data: map[string]any{"initial_password": "initial-on-update"}, says: "rotate it instead"},
		"overwrite_existing on update":       {path: "roles/app", data: map[string]any{"overwrite_existing": true}, says: "rotate it instead"},
		"initial_value on update":            {path: "roles/token", data: map[string]any{"initial_value": "initial-on-update"}, says: "rotate it instead"},
		"bad period on update":               {path: "roles/app", data: map[string]any{"rotation_period": "5m"}, says: "rotation_period"},
		"cleared kind":                       {path: "roles/app", data: map[string]any{"kind": ""}, says: "kind"},
		"cleared username":                   {path: "roles/app", data: map[string]any{"username": ""}, says: "username"},
		"patching what does not exist":       {op: logical.PatchOperation, path: "roles/nobody", data: map[string]any{"description": "x"}, code: 404, says: "nobody"},
		"patching with an unknown field":     {op: logical.PatchOperation, path: "roles/app", data: map[string]any{"colour": "red"}, says: "unknown field"},
		"changing length while rotating":     {path: "roles/busy", data: map[string]any{"length": 40}, code: 409, says: running},
		"changing partial while rotating":    {path: "roles/busy", data: map[string]any{"allow_partial": true}, code: 409, says: running},
		"changing versions while rotating":   {op: logical.PatchOperation, path: "roles/busy", data: map[string]any{"keep_versions": 9}, code: 409, says: running},
		"deleting while rotating":            {op: logical.DeleteOperation, path: "roles/busy", code: 409, says: running},
		"rotating during grace":              {path: "rotate/redis/busy", code: 409, says: "retire/redis/busy"},
		"rotating during grace names the id": {path: "rotate/redis/busy", code: 409, says: running},

		// Names.
		"role all":                    {path: "roles/all", data: apiKey(nil), says: "reserved"},
		"role of slashes":             {path: "roles/a/b", data: apiKey(nil), says: "name"},
		"role of dots":                {path: "roles/..", data: apiKey(nil), says: "name"},
		"role with a trailing dot":    {path: "roles/a.", data: apiKey(nil), says: "name"},
		"role with NUL":               {path: "roles/a\x00b", data: apiKey(nil), says: "name"},
		"role with a new line":        {path: "roles/a\nb", data: apiKey(nil), says: "name"},
		"role with escape":            {path: "roles/\x1b[31mred", data: apiKey(nil), says: "name"},
		"role of other letters":       {path: "roles/rôle", data: apiKey(nil), says: "name"},
		"role of bad utf-8":           {path: "roles/a\xffb", data: apiKey(nil), says: "name"},
		"role of a space":             {path: "roles/a b", data: apiKey(nil), says: "name"},
		"role of 129 characters":      {path: "roles/" + strings.Repeat("a", 129), data: apiKey(nil), says: "name"},
		"role of a megabyte":          {path: "roles/" + strings.Repeat("a", 1<<20), data: apiKey(nil), says: "bytes"},
		"connection all":              {path: "connections/all", data: map[string]any{"type": "redis"}, says: "reserved"},
		"connection of slashes":       {path: "connections/a/b", data: map[string]any{"type": "redis"}, says: "name"},
		"creds of a bad name":         {op: logical.ReadOperation, path: "creds/a/b", says: "name"},
		"reading a bad name":          {op: logical.ReadOperation, path: "roles/a\x01", says: "name"},
		"deleting a bad name":         {op: logical.DeleteOperation, path: "roles/a/b", says: "name"},
		"rotating all of a kind":      {path: "rotate/redis/all", says: "reserved"},
		"rotating a name of slashes":  {path: "rotate/redis/a/b", says: "name"},
		"verifying a bad name":        {op: logical.ReadOperation, path: "verify/redis/a b", says: "name"},
		"name of the body":            {path: "roles/app", data: map[string]any{"name": strings.Repeat("n", 40000)}, says: "bytes"},
		"rotating an unknown kind":    {path: "rotate/oracle/app", code: 404, says: "allowed are"},
		"rotating all unknown":        {path: "rotate/oracle", code: 404, says: "allowed are"},
		"rotating the wrong kind":     {path: "rotate/api-key/app", code: 404, says: "no role"},
		"rotating nobody":             {path: "rotate/redis/nobody", code: 404, says: "nobody"},
		"dry run of nobody":           {path: "rotate/redis/nobody", data: map[string]any{"dry_run": true}, code: 404, says: "nobody"},
		"rotating with odd fields":    {path: "rotate/redis/app", data: map[string]any{"force": true}, says: `unknown field "force"`},
		"rotating with a bad dry_run": {path: "rotate/redis/app", data: map[string]any{"dry_run": "maybe"}, says: "dry_run"},
		"verifying nobody":            {op: logical.ReadOperation, path: "verify/redis/nobody", code: 404, says: "nobody"},
		"creds of nobody":             {op: logical.ReadOperation, path: "creds/nobody", code: 404},
		"roles of nobody":             {op: logical.ReadOperation, path: "roles/nobody", code: 404},
		"connection of nobody":        {op: logical.ReadOperation, path: "connections/nobody", code: 404},

		// Steering.
		"cancelling what is not":      {path: "cancel/0192-none", code: 404, says: "0192-none"},
		"reading what is not":         {op: logical.ReadOperation, path: "rotations/0192-none", code: 404, says: "0192-none"},
		"rolling back nothing":        {path: "rollback/redis/app", code: 409, says: "no earlier material"},
		"rolling back nobody":         {path: "rollback/redis/nobody", code: 404, says: "nobody"},
		"retiring nobody":             {path: "retire/redis/nobody", code: 404, says: "nobody"},
		"retiring with odd fields":    {path: "retire/redis/app", data: map[string]any{"number": 3}, says: "unknown field"},
		"retiring a version of none":  {path: "retire/redis/app", data: map[string]any{"version": 3}, says: "version is for key rings"},
		"reconciling nobody":          {path: "reconcile/redis/nobody", code: 404, says: "nobody"},
		"reconciling without target":  {path: "reconcile/api-key/token", says: "no target"},
		"limit of zero":               {op: logical.ReadOperation, path: "rotations", data: map[string]any{"limit": "0"}, says: "limit"},
		"negative limit":              {op: logical.ListOperation, path: "rotations/", data: map[string]any{"limit": "-1"}, says: "limit"},
		"large limit":                 {op: logical.ListOperation, path: "rotations/", data: map[string]any{"limit": "1001"}, says: "limit"},
		"limit of letters":            {op: logical.ListOperation, path: "rotations/", data: map[string]any{"limit": "ten"}, says: "limit"},
		"state that is none":          {op: logical.ReadOperation, path: "rotations", data: map[string]any{"state": "happy"}, says: "allowed are"},
		"unknown query of a list":     {op: logical.ListOperation, path: "roles/", data: map[string]any{"after": "x"}, says: "unknown field"},
		"unknown query of rotations":  {op: logical.ListOperation, path: "rotations/", data: map[string]any{"before": "x"}, says: "unknown field"},
		"unknown query of creds":      {op: logical.ReadOperation, path: "creds/app", data: map[string]any{"version": "1"}, says: "unknown field"},
		"unknown query of a role":     {op: logical.ReadOperation, path: "roles/app", data: map[string]any{"x": "1"}, says: "unknown field"},
		"unknown query of a server":   {op: logical.ReadOperation, path: "connections/cache", data: map[string]any{"x": "1"}, says: "unknown field"},
		"unknown query of rotation":   {op: logical.ReadOperation, path: "rotations/" + running, data: map[string]any{"x": "1"}, says: "unknown field"},
		"unknown query of status":     {op: logical.ReadOperation, path: "status", data: map[string]any{"x": "1"}, says: "unknown field"},
		"unknown query of config":     {op: logical.ReadOperation, path: "config", data: map[string]any{"x": "1"}, says: "unknown field"},
		"unknown query of verify":     {op: logical.ReadOperation, path: "verify/redis/app", data: map[string]any{"x": "1"}, says: "unknown field"},
		"unknown query of servers":    {op: logical.ListOperation, path: "connections/", data: map[string]any{"x": "1"}, says: "unknown field"},
		"deleting with a field":       {op: logical.DeleteOperation, path: "roles/app", data: map[string]any{"force": "1"}, says: "unknown field"},
		"deleting a server by field":  {op: logical.DeleteOperation, path: "connections/cache", data: map[string]any{"abandon": "1"}, says: "unknown field"},
		"cancelling with a field":     {path: "cancel/" + running, data: map[string]any{"force": true}, says: "unknown field"},
		"rolling back with a field":   {path: "rollback/redis/busy", data: map[string]any{"version": 1}, says: "unknown field"},
		"reconciling with a field":    {path: "reconcile/redis/app", data: map[string]any{"force": true}, says: "unknown field"},
		"all rotations with a field":  {path: "rotate/all", data: map[string]any{"kind": "redis"}, says: "unknown field"},
		"kind rotations with a field": {path: "rotate/redis", data: map[string]any{"name": "app"}, says: "unknown field"},

		// Configuration.
		"negative workers":       {path: "config", data: map[string]any{"workers": -1}, says: "workers"},
		"too many workers":       {path: "config", data: map[string]any{"workers": 257}, says: "workers"},
		"keeping one":            {path: "config", data: map[string]any{"keep_versions": 1}, says: "keep_versions"},
		"keeping negative":       {path: "config", data: map[string]any{"keep_versions": -5}, says: "keep_versions"},
		"keeping too many":       {path: "config", data: map[string]any{"keep_versions": 51}, says: "keep_versions"},
		"negative default grace": {path: "config", data: map[string]any{"grace_period": "-1h"}, says: "grace_period"},
		"default grace of years": {path: "config", data: map[string]any{"grace_period": "2161h"}, says: "grace_period"},
		"freeze that is neither": {path: "config", data: map[string]any{"freeze": "perhaps"}, says: "freeze"},
		"unknown default":        {path: "config", data: map[string]any{"colour": "red"}, says: `unknown field "colour"`},

		// Connections.
		"no type":                        {path: "connections/new", data: map[string]any{"addresses": server.Addr, "password": "connection-password"}, says: "type is missing"},
		"unknown type":                   {path: "connections/new", data: map[string]any{"type": "oracle"}, says: "allowed is redis"},
		"no password":                    {path: "connections/new", data: map[string]any{"type": "redis", "addresses": server.Addr}, says: "password is missing"},
		"empty password":                 {path: "connections/new", data: map[string]any{"type": "redis", "addresses": server.Addr, "password": ""}, says: "password is empty"},
		"no addresses":                   {path: "connections/new", data: map[string]any{"type": "redis", "password": "connection-password"}, says: "addresses is empty"},
		"address without port":           {path: "connections/new", data: map[string]any{"type": "redis", "addresses": "localhost", "password": "connection-password"}, says: "host:port"},
		"address with credentials":       {path: "connections/new", data: map[string]any{"type": "redis", "addresses": "redis://u:in-an-address@h:1", "password": "connection-password"}, says: "addresses holds one with"},
		"unknown topology":               {path: "connections/cache", data: map[string]any{"topology": "ring"}, says: "topology"},
		"unknown persistence":            {path: "connections/cache", data: map[string]any{"persistence": "hope"}, says: "persistence"},
		"bad glob":                       {path: "connections/cache", data: map[string]any{"allowed_roles": "[a"}, says: "allowed_roles"},
		"bad network":                    {path: "connections/cache", data: map[string]any{"allowed_cidrs": "10.0.0.0/99", "password": servers.RedisAdminPassword}, says: "allowed_cidrs"},
		"addresses without password":     {path: "connections/cache", data: map[string]any{"addresses": "127.0.0.1:1"}, says: "password in the same request"},
		"address_map without password":   {path: "connections/cache", data: map[string]any{"address_map": map[string]any{server.Addr: "127.0.0.1:1"}}, says: "password in the same request"},
		"allowed_cidrs without password": {path: "connections/cache", data: map[string]any{"allowed_cidrs": "0.0.0.0/0"}, says: "password in the same request"},
		"the same, untried":              {path: "connections/cache", data: map[string]any{"addresses": "127.0.0.1:1", "verify_connection": false}, says: "password in the same request"},
		"tls without password":           {path: "connections/cache", data: map[string]any{"tls": true}, says: "password in the same request"},
		"an authority without tls":       {path: "connections/cache", data: map[string]any{"tls_skip_verify": true, "password": servers.RedisAdminPassword}, says: "give tls=true"},
		"tls_ca that is none":            {path: "connections/cache", data: map[string]any{"tls": true, "tls_ca": "nonsense", "password": servers.RedisAdminPassword}, says: "tls_ca holds no certificate"},
		"a server without TLS":           {path: "connections/cache", data: map[string]any{"tls": true, "password": servers.RedisAdminPassword}, says: "nothing was stored"},
		"sentinels without their master": {path: "connections/cache", data: map[string]any{"topology": "sentinel"}, says: "sentinel_master is missing"},
		"a master and no sentinels":      {path: "connections/cache", data: map[string]any{"sentinel_master": "primary", "password": servers.RedisAdminPassword}, says: "leave sentinel_master out"},
		"a master without password":      {path: "connections/cache", data: map[string]any{"sentinel_master": "primary"}, says: "password in the same request"},
		"a master of a cluster":          {path: "connections/cache", data: map[string]any{"sentinel_master": "primary", "topology": "cluster", "password": servers.RedisAdminPassword}, says: "leave one of them out"},
		"a master of two words":          {path: "connections/cache", data: map[string]any{"sentinel_master": "pri mary", "password": servers.RedisAdminPassword}, says: "sentinel_master is"},
		"a sentinel login without one":   {path: "connections/cache", data: map[string]any{"sentinel_password": "for-no-sentinel"}, says: "give sentinel_master as well"},
		"a sentinel user alone":          {path: "connections/cache", data: map[string]any{"sentinel_master": "primary", "sentinel_username": "me", "password": servers.RedisAdminPassword}, says: "sentinel_password is missing"},
		"a sentinel_auth_user of words":  {path: "connections/cache", data: map[string]any{"sentinel_master": "primary", "sentinel_auth_user": "a b", "password": servers.RedisAdminPassword}, says: "sentinel_auth_user is"},
		"sentinel_password as a list":    {path: "connections/cache", data: map[string]any{"sentinel_password": []any{"listed-password-1"}}, says: "must be a string"},
		"with an empty password":         {path: "connections/cache", data: map[string]any{"addresses": "127.0.0.1:1", "password": ""}, says: "password"},
		"username without password":      {path: "connections/cache", data: map[string]any{"username": "user-3"}, says: "password"},
		"wrong password":                 {path: "connections/cache", data: map[string]any{"password": "wrong-connection-password"}, says: "nothing was stored"},
		"nobody listens":                 {path: "connections/new", data: map[string]any{"type": "redis", "addresses": "127.0.0.1:1", "password": "connection-password"}, says: "nothing was stored"},
		"not an admin":                   {path: "connections/new", data: map[string]any{"type": "redis", "addresses": server.Addr, "username": "user-3", "password": password(3)}, says: "nothing was stored"},
		"unknown connection field":       {path: "connections/cache", data: map[string]any{"plugin": "x"}, says: `unknown field "plugin"`},
		"password of a connection list":  {path: "connections/cache", data: map[string]any{"password": []any{"listed-password-1", "listed-password-2"}}, says: "must be a string"},
		"password of a connection map":   {path: "connections/new", data: map[string]any{"type": "redis", "password": map[string]any{"a": "mapped-password"}}, says: "must be a string"},
		"deleting a used connection":     {op: logical.DeleteOperation, path: "connections/cache", code: 409, says: "delete the roles that use it first"},
		"address_map that is none":       {path: "connections/cache", data: map[string]any{"address_map": "nonsense", "password": servers.RedisAdminPassword}, says: "address_map"},
	}
	for _, secret := range []string{"in-a-list-password", "in-a-map-password", "listed-password-1", "listed-password-2", "mapped-password", "in-an-address"} {
		m.storage.note(map[string]bool{"password": true}, map[string]any{"password": secret})
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) { m.refuses(t, server, c) })
	}
	t.Run("frozen", func(t *testing.T) {
		m.must("config", map[string]any{"freeze": true})
		for _, path := range []string{"rotate/redis/app", "rotate/redis", "rotate/all", "rollback/redis/app"} {
			m.refuses(t, server, badCase{path: path, code: 409, says: "frozen"})
		}
	})
}

// refuses sends what has to be refused, and compares storage and server before
// and after.
func (m *mount) refuses(t *testing.T, server *servers.RedisNode, c badCase) {
	t.Helper()
	if c.op == "" {
		c.op = logical.UpdateOperation
	}
	if c.code == 0 {
		c.code = http.StatusBadRequest
	}
	stored, there := m.stored(t), aclList(t, server)
	r := m.send(request{op: c.op, path: c.path, data: c.data})
	require.Equal(t, c.code, r.code, "%s (%v)", r.message, r.data)
	require.Contains(t, r.message, c.says)
	if c.says != "" {
		require.Less(t, len(r.message), 1000, "a sentence")
		require.NotContains(t, r.message, "\n")
		require.NotContains(t, r.message, "\x1b")
		require.NotContains(t, r.message, "%!")
	}
	require.Equal(t, stored, m.stored(t), "something was stored")
	require.Equal(t, there, aclList(t, server), "something was changed at the target")
}

// TestMegabytes sends a megabyte in every field of every path, as text, as a list
// and as a map.
func TestMegabytes(t *testing.T) {
	t.Parallel()
	m, server, _ := badMount(t)
	stored, there := m.stored(t), aclList(t, server)
	big := strings.Repeat("x", 1<<20)
	for _, p := range m.b.Paths {
		for op := range p.Operations {
			path := example(p, "redis", "app")
			if op == logical.ListOperation {
				path += "/"
			}
			if op == logical.CreateOperation {
				op, path = logical.UpdateOperation, example(p, "redis", "new")
			}
			fields := []string{"no-such-field"}
			for name := range p.Fields {
				fields = append(fields, name)
			}
			for _, field := range fields {
				for shape, value := range map[string]any{
					"text": big, "list": []any{big}, "many": manyValues(), "map": map[string]any{"k": big}, "key": map[string]any{big: "v"},
				} {
					r := m.send(request{op: op, path: path, data: map[string]any{field: value}})
					if strings.HasPrefix(path, jwksPath) { // it needs no token, and tells nothing
						require.Equal(t, http.StatusNotFound, r.code, "%s as %s", field, shape)
						continue
					}
					require.Equal(t, http.StatusBadRequest, r.code, "%s %s %s as %s: %s", op, path, field, shape, r.message)
					require.Contains(t, r.message, "bytes")
					require.Less(t, len(r.message), 200)
				}
			}
		}
	}
	require.Equal(t, stored, m.stored(t))
	require.Equal(t, there, aclList(t, server))
	m.refuses(t, server, badCase{path: "roles/new", data: redisRole(map[string]any{"initial_password": big}), says: "bytes"})
	m.refuses(t, server, badCase{path: "connections/new", data: map[string]any{"type": "redis", "addresses": big}, says: "bytes"})
	m.refuses(t, server, badCase{path: "roles/app", data: map[string]any{big: "x"}, says: "unknown field"})
}

func manyValues() []any {
	out := make([]any, 20_000)
	for i := range out {
		out[i] = "a:1"
	}
	return out
}

// TestRoleWithoutItsConnection: deleting a used connection is refused, so this
// takes a restored snapshot, or a defect.
func TestRoleWithoutItsConnection(t *testing.T) {
	t.Parallel()
	m, server, _ := badMount(t)
	require.NoError(t, m.storage.Delete(context.Background(), storage.Connection+"cache"))
	for _, c := range []badCase{
		{path: "rotate/redis/app", says: "write connections/cache first"},
		{path: "reconcile/redis/app", says: "write connections/cache first"},
		{path: "roles/new", data: redisRole(nil), says: "write connections/cache first"},
	} {
		m.refuses(t, server, c)
	}
	r := m.read("verify/redis/app")
	require.Equal(t, http.StatusOK, r.code)
	require.Equal(t, false, r.data["ok"])
	require.Contains(t, r.data["summary"], "write connections/cache first")
	require.Equal(t, http.StatusOK, m.read("roles/app").code)
	require.Equal(t, password(0), m.creds("app")["password"])
	r = m.must("rotate/redis/app", map[string]any{"dry_run": true})
	require.Contains(t, r.data["redis/app"], "write connections/cache first")
	r = m.write("rotate/redis", nil)
	require.Equal(t, http.StatusBadRequest, r.code, r.message)
	require.Contains(t, r.message, "write connections/cache first")
	require.Equal(t, http.StatusNoContent, m.delete("roles/app").code)
}

// TestRequestsWhileRotating holds a role in the middle of a rotation, with its
// target silent.
func TestRequestsWhileRotating(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	server := servers.Redis(t, users(1))
	p := proxy(t, server.Addr)
	m.connect("cache", p.Addr(), nil)
	m.adopt("app", "cache", 0, map[string]any{"grace_period": "1h"})
	m.b.answerWithin = shortly
	p.Blackhole(true)
	running := id(m.must("rotate/redis/app", nil))
	m.b.answerWithin = shortly / 4
	for _, c := range []badCase{
		{path: "rotate/redis/app", says: running},
		{path: "retire/redis/app", says: "role \"app\""},
		{path: "reconcile/redis/app", says: "role \"app\""},
		{path: "rollback/redis/app", says: "role \"app\""},
		{path: "cancel/" + running, says: "role \"app\""},
		{path: "roles/app", data: map[string]any{"length": 40}, says: "role \"app\""},
		{op: logical.DeleteOperation, path: "roles/app", says: "role \"app\""},
	} {
		began := time.Now()
		if c.op == "" {
			c.op = logical.UpdateOperation
		}
		r := m.send(request{op: c.op, path: c.path, data: c.data})
		require.Equal(t, http.StatusConflict, r.code, "%s: %s", c.path, r.message)
		require.Contains(t, r.message, c.says)
		require.Less(t, time.Since(began), kind.CallTimeout/2, "%s waits for a target that hangs", c.path)
	}
	require.Equal(t, password(0), m.creds("app")["password"], "reads never wait")
	p.Heal()
	m.b.answerWithin = answerWithin
	m.until(running, func(s rotation.State) bool { return s == rotation.InGrace })
	require.True(t, canLogIn(t, server, "user-0", password(0)))
	require.Less(t, m.write("roles/app", map[string]any{"description": "d", "grace_period": "2h", "rotation_period": "24h"}).code, 300)
}

// TestTypesThatJSONBrings: what the HTTP API decodes is json.Number and the like.
func TestTypesThatJSONBrings(t *testing.T) {
	t.Parallel()
	m := newMount(t)
	m.must("roles/token", map[string]any{
		"kind": "api-key", "length": json.Number("40"), "rotation_period": json.Number("86400"), "grace_period": json.Number("0"),
		"keep_versions": "3", "disable_automated_rotation": "true",
	})
	role := m.read("roles/token").data
	require.EqualValues(t, 40, role["length"])
	require.EqualValues(t, 86400, role["rotation_period"])
	require.EqualValues(t, 0, role["grace_period"])
	require.EqualValues(t, 3, role["keep_versions"])
	require.Equal(t, true, role["disable_automated_rotation"])
	require.Len(t, m.creds("token")["value"], 40)

	// null clears what was given, as an empty value does.
	for _, cleared := range []any{nil, ""} {
		m.must("roles/token", map[string]any{
			"description": "d", "length": 40, "rotation_period": "24h", "grace_period": "5m", "keep_versions": 3, "prefix": "p_",
		})
		require.Equal(t, http.StatusOK, m.patch("roles/token", map[string]any{
			"description": cleared, "length": cleared, "rotation_period": cleared, "grace_period": cleared, "keep_versions": cleared,
			"prefix": cleared, "disable_automated_rotation": cleared, "rotation_schedule": cleared, "rotation_window": cleared, "password_policy": cleared,
		}).code)
		role = m.read("roles/token").data
		require.Equal(t, "", role["description"])
		require.EqualValues(t, 32, role["length"])
		require.EqualValues(t, 0, role["rotation_period"])
		require.EqualValues(t, 3600, role["grace_period"])
		require.EqualValues(t, 5, role["keep_versions"])
		require.Equal(t, "", role["prefix"])
		require.Equal(t, false, role["disable_automated_rotation"])
		require.Equal(t, "", role["next_rotation"])
	}
}
