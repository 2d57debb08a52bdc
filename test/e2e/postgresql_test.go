package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// database is a PostgreSQL, or a primary and its standbys, which the engine
// reaches through proxies.
type database struct {
	nodes   []*servers.PostgresNode
	proxies []*servers.Proxy
}

func (d *database) stop() error {
	var errs []error
	for _, p := range d.proxies {
		errs = append(errs, p.Close())
	}
	for _, n := range d.nodes {
		errs = append(errs, n.Abort())
	}
	return errors.Join(errs...)
}

// startPostgreSQL: postgresql-start [-sql STATEMENT] [-standby] NAME
func startPostgreSQL(ctx context.Context, c call) error {
	flags := flag.NewFlagSet("postgresql-start", flag.ContinueOnError)
	flags.SetOutput(c.out)
	var statements []string
	flags.Func("sql", "a statement, run as the administrator", func(sql string) error {
		statements = append(statements, sql)
		return nil
	})
	standby := flags.Bool("standby", false, "with a standby")
	if err := flags.Parse(c.args); err != nil {
		return err
	}
	name := flags.Arg(0)
	if flags.NArg() != 1 {
		return errors.New("usage: postgresql-start [-sql STATEMENT] [-standby] NAME")
	}
	standbys := 0
	if *standby {
		standbys = 1
	}
	d := &database{}
	c.databases[name] = d
	var err error
	if d.nodes, err = servers.StartPostgresReplicated(ctx, filepath.Join(c.dir, ".postgresql-"+name), standbys); err != nil {
		return err
	}
	var hosts []string
	for _, n := range d.nodes {
		p, err := servers.NewProxy(n.Addr)
		if err != nil {
			return err
		}
		d.proxies, hosts = append(d.proxies, p), append(hosts, p.Addr())
	}
	c.ts.Setenv(strings.ToUpper(name)+"_URL", "postgresql://{{username}}:{{password}}@"+strings.Join(hosts, ",")+"/postgres?sslmode=disable")
	return d.nodes[0].Exec(ctx, append(statements, "SELECT 1")...)
}

func onDatabase(do func(*database) error) command {
	return func(_ context.Context, c call) error {
		if len(c.args) != 1 || c.databases[c.args[0]] == nil {
			return errors.New("name one server that was started with postgresql-start")
		}
		return do(c.databases[c.args[0]])
	}
}

// losePostgreSQLReplies loses every answer from the next change of a user on.
func losePostgreSQLReplies(d *database) error {
	for _, p := range d.proxies {
		p.LoseReplyTo("ALTER ROLE")
	}
	return nil
}

func healPostgreSQL(d *database) error {
	for _, p := range d.proxies {
		p.Heal()
	}
	return nil
}

// runPostgreSQL: postgresql [-as USER:PASSWORD] NAME[.INDEX] STATEMENT
func runPostgreSQL(ctx context.Context, c call) error {
	flags := flag.NewFlagSet("postgresql", flag.ContinueOnError)
	flags.SetOutput(c.out)
	as := flags.String("as", servers.PostgresAdmin+":"+servers.PostgresAdminPassword, "log in as USER:PASSWORD")
	if err := flags.Parse(c.args); err != nil {
		return err
	}
	name, index, _ := strings.Cut(flags.Arg(0), ".")
	d := c.databases[name]
	if d == nil || flags.NArg() != 2 || index == "1" && len(d.nodes) < 2 {
		return errors.New("usage: postgresql [-as USER:PASSWORD] NAME[.1] STATEMENT")
	}
	n := d.nodes[0]
	if index == "1" {
		n = d.nodes[1]
	}
	user, password, _ := strings.Cut(*as, ":")
	conn, err := n.Login(ctx, user, password)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	results, err := conn.PgConn().Exec(ctx, flags.Arg(1)).ReadAll()
	for _, r := range results {
		for _, row := range r.Rows {
			for i, field := range row {
				fmt.Fprint(c.out, strings.Repeat("\t", min(i, 1)), string(field))
			}
			fmt.Fprintln(c.out)
		}
	}
	return err
}

// searchPostgreSQLLogs: postgresql-log NAME TEXT fails unless a log of the
// server holds text. They hold every statement.
func searchPostgreSQLLogs(_ context.Context, c call) error {
	if len(c.args) != 2 || c.databases[c.args[0]] == nil {
		return errors.New("usage: postgresql-log NAME TEXT")
	}
	for _, n := range c.databases[c.args[0]].nodes {
		log, err := n.Log()
		if err != nil {
			return err
		}
		if strings.Contains(string(log), c.args[1]) {
			return nil
		}
	}
	return errors.New("no log holds that text")
}
