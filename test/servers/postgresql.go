package servers

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// The superuser of every server.
const (
	PostgresAdmin         = "admin"
	PostgresAdminPassword = "admin-secret"
)

// PostgresOption changes how a PostgreSQL is started.
type PostgresOption func(*postgresOptions)

type postgresOptions struct {
	config []string
	hba    []string
	files  map[string]string
}

// WithPostgresConfig adds lines to postgresql.conf.
func WithPostgresConfig(lines ...string) PostgresOption {
	return func(o *postgresOptions) { o.config = append(o.config, lines...) }
}

// WithHBA puts rules in front of the ones that pg_hba.conf has anyway, which
// are: SCRAM for everybody from this machine.
func WithHBA(rules ...string) PostgresOption {
	return func(o *postgresOptions) { o.hba = append(o.hba, rules...) }
}

// WithPostgresTLS lets clients speak TLS. The server shows cert, and trusts
// certificates of clients that clientCA has signed.
func WithPostgresTLS(cert, key, clientCA string) PostgresOption {
	return func(o *postgresOptions) {
		o.files = map[string]string{"server.crt": cert, "server.key": key, "clients.crt": clientCA}
		o.config = append(o.config, "ssl = on", "ssl_ca_file = 'clients.crt'")
	}
}

// PostgresNode is one PostgreSQL server.
type PostgresNode struct {
	Addr string
	Dir  string

	options postgresOptions
	port    int
	account *account
	mu      sync.Mutex
	proc    *process
}

// StartPostgres starts one server with its files below dir.
func StartPostgres(ctx context.Context, dir string, opts ...PostgresOption) (*PostgresNode, error) {
	n, err := newPostgres(dir, opts)
	if err != nil {
		return nil, err
	}
	if err := n.initialize(ctx); err != nil {
		return nil, err
	}
	return n.startAnywhere(ctx)
}

// Postgres starts one server for the length of a test.
func Postgres(t testing.TB, opts ...PostgresOption) *PostgresNode {
	t.Helper()
	n, err := StartPostgres(context.Background(), t.TempDir(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	cleanUpPostgres(t, n)
	return n
}

// StartPostgresReplicated starts a primary, which is the first, and standbys
// that can be read from (hot standby), and waits until they replicate.
func StartPostgresReplicated(ctx context.Context, dir string, standbys int, opts ...PostgresOption) ([]*PostgresNode, error) {
	primary, err := newPostgres(dir, opts)
	if err != nil {
		return nil, err
	}
	if err := primary.initialize(ctx); err != nil {
		return nil, err
	}
	// A server that has never run can be copied as it is.
	nodes := []*PostgresNode{primary}
	for range standbys {
		n, err := newPostgres(dir, opts)
		if err != nil {
			return nil, err
		}
		if err := n.copyOf(primary); err != nil {
			return nil, err
		}
		nodes = append(nodes, n)
	}
	if _, err := primary.startAnywhere(ctx); err != nil {
		return nil, err
	}
	stop := func(err error) error {
		errs := []error{err}
		for _, n := range nodes {
			errs = append(errs, n.Abort())
		}
		return errors.Join(errs...)
	}
	for _, n := range nodes[1:] {
		n.options.config = append(slices.Clone(n.options.config), fmt.Sprintf(
			"primary_conninfo = 'host=127.0.0.1 port=%d user=%s password=%s sslmode=disable'", primary.port, PostgresAdmin, PostgresAdminPassword))
		if _, err := n.startAnywhere(ctx); err != nil {
			return nil, stop(err)
		}
	}
	if err := WaitPostgresReplicating(ctx, nodes); err != nil {
		return nil, stop(err)
	}
	return nodes, nil
}

// PostgresReplicated starts a primary and standbys for the length of a test.
func PostgresReplicated(t testing.TB, standbys int, opts ...PostgresOption) []*PostgresNode {
	t.Helper()
	nodes, err := StartPostgresReplicated(context.Background(), t.TempDir(), standbys, opts...)
	if err != nil {
		t.Fatal(err)
	}
	cleanUpPostgres(t, nodes...)
	return nodes
}

func cleanUpPostgres(t testing.TB, nodes ...*PostgresNode) {
	t.Helper()
	t.Cleanup(func() {
		for _, n := range nodes {
			if err := n.Abort(); err != nil {
				t.Errorf("clean up: %v", err)
			}
		}
	})
}

// WaitPostgresReplicating waits until every node but the first streams from
// the first and has all that it has.
func WaitPostgresReplicating(ctx context.Context, nodes []*PostgresNode) error {
	return poll(ctx, func(ctx context.Context) error {
		streams, err := nodes[0].Text(ctx, "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'")
		if err != nil {
			return err
		}
		if streams != strconv.Itoa(len(nodes)-1) {
			return fmt.Errorf("%s standbys of %d replicate", streams, len(nodes)-1)
		}
		at, err := nodes[0].Text(ctx, "SELECT pg_current_wal_lsn()")
		if err != nil {
			return err
		}
		for _, n := range nodes[1:] {
			there, err := n.Text(ctx, "SELECT pg_last_wal_replay_lsn() >= $1::pg_lsn", at)
			if err != nil {
				return err
			}
			if there != "true" {
				return fmt.Errorf("standby %s is behind %s", n.Addr, at)
			}
		}
		return nil
	})
}

func newPostgres(dir string, opts []PostgresOption) (*PostgresNode, error) {
	n := &PostgresNode{}
	for _, opt := range opts {
		opt(&n.options)
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	n.port, n.Addr = port, loopback(port)
	n.Dir = filepath.Join(dir, fmt.Sprintf("postgresql-%d", port))
	if n.account, err = postgresAccount(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(n.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of a postgresql: %w", err)
	}
	if err := n.account.pass(n.Dir); err != nil {
		return nil, err
	}
	return n, n.account.own(n.Dir)
}

func (n *PostgresNode) file(name string) string { return filepath.Join(n.Dir, name) }

func (n *PostgresNode) data() string { return n.file("data") }

// initialize makes the files of a server that has never run.
func (n *PostgresNode) initialize(ctx context.Context) error {
	if err := os.WriteFile(n.file("password"), []byte(PostgresAdminPassword), 0o600); err != nil {
		return fmt.Errorf("write the password of a postgresql: %w", err)
	}
	if err := n.account.own(n.file("password")); err != nil {
		return err
	}
	initdb, err := postgresProgram("initdb")
	if err != nil {
		return err
	}
	// Locale and time zone do not depend on the machine.
	cmd := exec.CommandContext(ctx, initdb, "-D", n.data(), "-U", PostgresAdmin, "--pwfile", n.file("password"),
		"--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync", "--no-instructions")
	cmd.Dir, cmd.Env = n.Dir, postgresEnvironment()
	// Not dieWithParent: the thread that starts it may end before it does.
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: n.account.credential()}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w: %s", err, out)
	}
	return nil
}

// copyOf makes n a standby of a server that has not run yet.
func (n *PostgresNode) copyOf(primary *PostgresNode) error {
	if err := os.CopyFS(n.data(), os.DirFS(primary.data())); err != nil {
		return fmt.Errorf("copy the files of a postgresql: %w", err)
	}
	if err := os.WriteFile(filepath.Join(n.data(), "standby.signal"), nil, 0o600); err != nil {
		return fmt.Errorf("make a standby: %w", err)
	}
	return filepath.WalkDir(n.data(), func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = os.Chmod(path, 0o700)
		}
		if err == nil {
			err = n.account.own(path)
		}
		return err
	})
}

// startAnywhere starts n on another port when somebody took its own.
func (n *PostgresNode) startAnywhere(ctx context.Context) (*PostgresNode, error) {
	var lastErr error
	for range 3 {
		if lastErr = n.Start(ctx); lastErr == nil {
			return n, nil
		}
		_ = n.Abort()
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		n.port, n.Addr = port, loopback(port)
	}
	return nil, lastErr
}

// writeSettings writes postgresql.conf, pg_hba.conf and what they name as a
// whole.
func (n *PostgresNode) writeSettings() error {
	conf := []string{
		fmt.Sprintf("port = %d", n.port), "listen_addresses = '127.0.0.1'", "unix_socket_directories = ''",
		"shared_buffers = 16MB", "log_statement = 'all'", "timezone = 'UTC'", "log_timezone = 'UTC'",
		"password_encryption = 'scram-sha-256'",
		"wal_level = replica", "wal_keep_size = 64MB", "hot_standby = on", "wal_retrieve_retry_interval = 100ms",
		// What a killed process has written stays; only a machine that fails loses it.
		"fsync = off", "max_wal_size = 128MB",
	}
	hba := append(slices.Clone(n.options.hba),
		"host all all 127.0.0.1/32 scram-sha-256", "host replication all 127.0.0.1/32 scram-sha-256")
	files := map[string]string{
		"postgresql.conf": strings.Join(append(conf, n.options.config...), "\n") + "\n",
		"pg_hba.conf":     strings.Join(hba, "\n") + "\n",
	}
	maps.Copy(files, n.options.files)
	for name, content := range files {
		path := filepath.Join(n.data(), name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			return fmt.Errorf("write %s: %w", name, err)
		}
		if err := n.account.own(path); err != nil {
			return err
		}
	}
	return nil
}

// SetHBA replaces the rules that were given with WithHBA, and makes the server
// use them.
func (n *PostgresNode) SetHBA(ctx context.Context, rules ...string) error {
	n.options.hba = rules
	if err := n.writeSettings(); err != nil {
		return err
	}
	before, err := n.Text(ctx, "SELECT pg_conf_load_time()")
	if err != nil {
		return err
	}
	if _, err := n.Text(ctx, "SELECT pg_reload_conf()"); err != nil {
		return err
	}
	// The server that accepts connections has read pg_hba.conf before it starts
	// one that shows a later time.
	return poll(ctx, func(ctx context.Context) error {
		now, err := n.Text(ctx, "SELECT pg_conf_load_time()")
		if err == nil && now == before {
			err = errors.New("the server has not read its rules again")
		}
		return err
	})
}

// Start starts the server again after Stop, Abort or Kill, on the same port and
// with the same files, and waits until it answers.
func (n *PostgresNode) Start(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc != nil && n.proc.running() {
		return nil
	}
	if err := n.writeSettings(); err != nil {
		return err
	}
	if err := n.launch(); err != nil {
		return err
	}
	return poll(ctx, func(ctx context.Context) error {
		if !n.proc.running() {
			log := n.lastLog()
			if strings.Contains(log, "pre-existing shared memory block") {
				// Children of a killed server need a moment to notice.
				return errors.Join(errors.New(log), n.launch())
			}
			return &fatalError{fmt.Errorf("postgresql at %s ended while starting: %s", n.Addr, log)}
		}
		where, err := n.Text(ctx, "SELECT current_setting('data_directory')")
		if err != nil {
			return fmt.Errorf("postgresql at %s does not answer: %w", n.Addr, err)
		}
		if filepath.Base(filepath.Dir(where)) != filepath.Base(n.Dir) {
			return &fatalError{fmt.Errorf("another postgresql answers at %s", n.Addr)}
		}
		return nil
	})
}

func (n *PostgresNode) launch() error {
	postgres, err := postgresProgram("postgres")
	if err != nil {
		return err
	}
	n.proc, err = startAs(n.account.attributes(), postgresEnvironment(), n.Dir, postgres, "-D", n.data())
	return err
}

// Log is everything that the server has logged; it logs every statement.
func (n *PostgresNode) Log() ([]byte, error) { return os.ReadFile(n.file("output.log")) }

func (n *PostgresNode) lastLog() string {
	data, _ := n.Log()
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], " / ")
}

// Stop ends the server in order; open sessions are ended, too.
func (n *PostgresNode) Stop() error { return n.end(syscall.SIGINT) }

// Abort ends the server at once without tidying up its tables. Unlike Kill it
// leaves nothing in the system.
func (n *PostgresNode) Abort() error { return n.end(syscall.SIGQUIT) }

// Kill ends the server at once (SIGKILL).
func (n *PostgresNode) Kill() error { return n.end(syscall.SIGKILL) }

func (n *PostgresNode) end(s syscall.Signal) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc == nil {
		return nil
	}
	return n.proc.end(s)
}

// Pause stops the server from accepting sessions (SIGSTOP); new ones hang.
func (n *PostgresNode) Pause() error { return n.signal(syscall.SIGSTOP) }

// Resume ends Pause.
func (n *PostgresNode) Resume() error { return n.signal(syscall.SIGCONT) }

func (n *PostgresNode) signal(s syscall.Signal) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc == nil {
		return nil
	}
	return n.proc.signal(s)
}

// Login connects to the database postgres as one user.
func (n *PostgresNode) Login(ctx context.Context, username, password string) (*pgx.Conn, error) {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(username, password), Host: n.Addr, Path: "/postgres",
		RawQuery: "sslmode=disable&default_query_exec_mode=exec",
	}
	return pgx.Connect(ctx, u.String())
}

// Text runs one statement as the superuser and returns the first field of its
// first row as text, "" where there is none.
func (n *PostgresNode) Text(ctx context.Context, sql string, args ...any) (string, error) {
	c, err := n.Login(ctx, PostgresAdmin, PostgresAdminPassword)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	rows, err := c.Query(ctx, sql, args...)
	if err != nil {
		return "", err
	}
	defer rows.Close()
	text := ""
	if rows.Next() {
		values, err := rows.Values()
		if err != nil {
			return "", err
		}
		if len(values) > 0 && values[0] != nil {
			text = fmt.Sprint(values[0])
		}
	}
	rows.Close()
	return text, rows.Err()
}

// Exec runs statements as the superuser, all in one transaction.
func (n *PostgresNode) Exec(ctx context.Context, statements ...string) error {
	c, err := n.Login(ctx, PostgresAdmin, PostgresAdminPassword)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	_, err = c.PgConn().Exec(ctx, strings.Join(statements, ";\n")).ReadAll()
	var refused *pgconn.PgError
	if errors.As(err, &refused) {
		return fmt.Errorf("postgresql at %s: %w %s", n.Addr, refused, refused.Hint)
	}
	return err
}

// postgresEnvironment is free of variables that change what the programs do.
func postgresEnvironment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "PG") || strings.HasPrefix(v, "LC_") || strings.HasPrefix(v, "LANG")
	})
}

// postgresProgram finds a program of the server. Debian keeps them out of the
// PATH, one folder a version.
func postgresProgram(name string) (string, error) {
	found, _ := filepath.Glob("/usr/lib/postgresql/[0-9]*/bin/" + name)
	version := func(path string) int {
		v, _ := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(path))))
		return v
	}
	if len(found) > 0 {
		return slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) }), nil
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("there is no %s: install the package postgresql: %w", name, err)
	}
	return path, nil
}

// account is whom a server runs as: nil is whoever runs this program.
// PostgreSQL refuses to run as root.
type account struct{ uid, gid uint32 }

func postgresAccount() (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			continue
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			continue
		}
		return &account{uid: uint32(uid), gid: uint32(gid)}, nil
	}
	return nil, errors.New("postgresql does not run as root, and there is no user postgres or nobody to run it as")
}

func (a *account) attributes() *syscall.SysProcAttr {
	attributes := dieWithParent()
	attributes.Credential = a.credential()
	return attributes
}

func (a *account) credential() *syscall.Credential {
	if a == nil {
		return nil
	}
	return &syscall.Credential{Uid: a.uid, Gid: a.gid}
}

// pass lets the account through the folders that this program made above path.
func (a *account) pass(path string) error {
	if a == nil {
		return nil
	}
	top := filepath.Clean(os.TempDir())
	for dir := filepath.Dir(path); strings.HasPrefix(dir, top+string(filepath.Separator)); dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return fmt.Errorf("look at the folder of a postgresql: %w", err)
		}
		if info.Mode()&0o001 == 0 {
			if err := os.Chmod(dir, info.Mode().Perm()|0o011); err != nil {
				return fmt.Errorf("open the folder of a postgresql: %w", err)
			}
		}
	}
	return nil
}

// own gives path to the account.
func (a *account) own(path string) error {
	if a == nil {
		return nil
	}
	if err := os.Chown(path, int(a.uid), int(a.gid)); err != nil {
		return fmt.Errorf("give a file to the account of postgresql: %w", err)
	}
	return nil
}
