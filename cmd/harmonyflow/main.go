// Command harmonyflow follows rotations from a terminal or a script. It does nothing
// that vault could not: it sends the same requests, as whoever VAULT_ADDR,
// VAULT_TOKEN and Vault's token helper say, and shows what comes of them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/api/cliconfig"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/buildinfo"
)

// Exit codes, for scripts.
const (
	exitDone        = 0   // it is served everywhere, or over
	exitError       = 1   // the request was refused, or Vault could not be reached
	exitFailed      = 2   // the rotation failed, went back or was cancelled
	exitHeld        = 3   // somebody has to decide
	exitInterrupted = 130 // following was ended; the rotation goes on
)

const usage = `Usage: harmonyflow [flags] COMMAND

  rotate KIND|KIND/ROLE|all  rotate the roles of a kind, one role, or everything
  rollback KIND/ROLE         bring the previous version back
  emergency KIND|KIND/ROLE|all
                             after a compromise: refuse every earlier version at once,
                             close sessions, restart consumers; --reason is required
  follow ID                  follow a rotation
  status                     one look at the mount
  watch                      the same, and what is running, again and again

Vault is found as the vault command finds it: VAULT_ADDR, VAULT_TOKEN or its token
helper, VAULT_NAMESPACE, VAULT_CACERT and so on.

Flags:
`

const exits = `
Exit status: 0 done, or served and proven (grace); 1 refused, or Vault cannot be
reached; 2 failed, rolled back or cancelled; 3 held: somebody has to decide;
130 interrupted: the rotation goes on.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// program is one call of the command.
type program struct {
	out, err io.Writer
	client   *api.Client
	o        options
	screen   *screen // nil: plain lines
	back     bool    // it was asked to go back
}

type options struct {
	mount, format, reason, key, until string
	follow, dryRun, version           bool
	every                             time.Duration
	namespaces, hooks                 []string
}

func run(ctx context.Context, args []string, out, errs io.Writer) int {
	p := &program{out: harmless{out}, err: harmless{errs}}
	flags := p.flags()
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return exitDone
		}
		return p.fail(err)
	}
	if p.o.version {
		fmt.Fprintln(p.out, buildinfo.Version)
		return exitDone
	}
	command, arg, err := p.command(flags.Args())
	if err != nil {
		return p.fail(err)
	}
	if p.client, err = connect(); err != nil {
		return p.fail(err)
	}
	if file, ok := out.(*os.File); ok && p.o.format == "table" && term.IsTerminal(int(file.Fd())) && os.Getenv("TERM") != "dumb" {
		p.screen = &screen{out: file}
	}
	switch command {
	case "rotate":
		return p.begin(ctx, "rotate/"+arg)
	case "emergency":
		return p.begin(ctx, "emergency/rotate/"+arg)
	case "rollback":
		p.back = true
		return p.begin(ctx, "rollback/"+arg)
	case "follow":
		return p.follow(ctx, arg)
	case "watch":
		return p.watch(ctx)
	default:
		return p.status(ctx)
	}
}

func (p *program) flags() *pflag.FlagSet {
	f := pflag.NewFlagSet("harmonyflow", pflag.ContinueOnError)
	f.SetOutput(p.err)
	f.SortFlags = false
	f.StringVar(&p.o.mount, "mount", envOr("HARMONYFLOW_MOUNT", "harmonyflow"), "where the engine is mounted (HARMONYFLOW_MOUNT)")
	f.StringVar(&p.o.format, "format", "table", "table, or json: an object a line for each change")
	f.BoolVarP(&p.o.follow, "follow", "f", false, "show progress until the new version is served and proven")
	f.StringVar(&p.o.until, "until", "grace", "how far to follow: grace (served and proven at every consumer), or end (the previous version is refused)")
	f.BoolVar(&p.o.dryRun, "dry-run", false, "say what would be done, and change nothing")
	f.StringVar(&p.o.reason, "reason", "", "why, for those who ask later")
	f.StringSliceVar(&p.o.namespaces, "restart-namespaces", nil, "of an emergency: namespaces in which every workload is restarted")
	f.StringSliceVar(&p.o.hooks, "hooks", nil, "of an emergency: names of the hooks that are called, or none (default: all)")
	f.StringVar(&p.o.key, "idempotency-key", "", "the same key within a day is the same rotation")
	f.DurationVar(&p.o.every, "every", time.Second, "how often to look")
	f.BoolVar(&p.o.version, "version", false, "print the version")
	f.Usage = func() { fmt.Fprintf(p.err, "%s%s%s", usage, f.FlagUsages(), exits) }
	return f
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// command checks what was asked for.
func (p *program) command(args []string) (command, arg string, err error) {
	if len(args) == 0 {
		return "", "", errors.New("no command; see harmonyflow --help")
	}
	command = args[0]
	arg = strings.Trim(strings.Join(args[1:], "/"), "/")
	takes, known := map[string]string{
		"rotate": "a kind, KIND/ROLE or all", "emergency": "a kind, KIND/ROLE or all", "rollback": "KIND/ROLE", "follow": "the id of a rotation", "status": "", "watch": "",
	}[command]
	switch {
	case !known:
		return "", "", fmt.Errorf("command %q is not known; see harmonyflow --help", command)
	case takes == "" && arg != "":
		return "", "", fmt.Errorf("%s takes nothing more", command)
	case takes != "" && arg == "", command == "rollback" && strings.Count(arg, "/") != 1, (command == "rotate" || command == "emergency") && strings.Count(arg, "/") > 1, command == "follow" && strings.Contains(arg, "/"):
		return "", "", fmt.Errorf("%s takes %s", command, takes)
	case command != "emergency" && len(p.o.namespaces)+len(p.o.hooks) > 0:
		return "", "", errors.New("--restart-namespaces and --hooks are of emergency")
	case p.o.format != "table" && p.o.format != "json":
		return "", "", fmt.Errorf("--format is %q; it is table or json", p.o.format)
	case p.o.until != "grace" && p.o.until != "end":
		return "", "", fmt.Errorf("--until is %q; it is grace or end", p.o.until)
	case p.o.every < 100*time.Millisecond:
		return "", "", errors.New("--every is at least 100ms")
	}
	p.o.mount = strings.Trim(p.o.mount, "/")
	return command, arg, nil
}

// connect is a client as the vault command would make it.
func connect() (*api.Client, error) {
	client, err := api.NewClient(nil)
	if err != nil {
		return nil, err
	}
	if client.Token() == "" {
		helper, err := cliconfig.DefaultTokenHelper()
		if err != nil {
			return nil, err
		}
		token, err := helper.Get()
		if err != nil {
			return nil, err
		}
		client.SetToken(token)
	}
	return client, nil
}

func (p *program) fail(err error) int {
	var answer *api.ResponseError
	if errors.As(err, &answer) { // the rest of it is for programs
		fmt.Fprintln(p.err, strings.Join(answer.Errors, "\n"))
		if answer.StatusCode == 403 {
			fmt.Fprintln(p.err, "Log in with vault login, or ask for a policy that allows it.")
		}
		return exitError
	}
	fmt.Fprintln(p.err, err)
	return exitError
}
