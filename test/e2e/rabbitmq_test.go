package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// broker is a RabbitMQ that the engine reaches through proxies.
type broker struct {
	*servers.RabbitMQNode
	http, amqp *servers.Proxy
}

func (b *broker) stop() error { return errors.Join(b.http.Close(), b.amqp.Close(), b.End()) }

// startRabbitMQ: rabbitmq-start [-user NAME:PASSWORD[:TAGS]] NAME
func startRabbitMQ(ctx context.Context, c call) error {
	flags := flag.NewFlagSet("rabbitmq-start", flag.ContinueOnError)
	flags.SetOutput(c.out)
	var users []string
	flags.Func("user", "a user with every permission in the vhost /: NAME:PASSWORD[:TAGS]", func(user string) error {
		users = append(users, user)
		return nil
	})
	if err := flags.Parse(c.args); err != nil {
		return err
	}
	name := flags.Arg(0)
	if flags.NArg() != 1 {
		return errors.New("usage: rabbitmq-start [-user NAME:PASSWORD[:TAGS]] NAME")
	}
	n, err := servers.StartRabbitMQ(ctx, filepath.Join(c.dir, ".rabbitmq-"+name))
	if err != nil {
		return err
	}
	b := &broker{RabbitMQNode: n}
	if b.http, err = servers.NewProxy(n.ManagementAddr); err != nil {
		return errors.Join(err, n.End())
	}
	if b.amqp, err = servers.NewProxy(n.Addr); err != nil {
		return errors.Join(err, b.http.Close(), n.End())
	}
	c.brokers[name] = b
	for _, user := range users {
		parts := strings.SplitN(user+"::", ":", 3)
		if err := n.SetUser(ctx, parts[0], parts[1], strings.Trim(parts[2], ":")); err != nil {
			return err
		}
	}
	c.ts.Setenv(strings.ToUpper(name)+"_URL", "http://"+b.http.Addr())
	c.ts.Setenv(strings.ToUpper(name)+"_AMQP", "amqp://"+b.amqp.Addr())
	return nil
}

func onBroker(do func(*broker) error) command {
	return func(_ context.Context, c call) error {
		if len(c.args) != 1 || c.brokers[c.args[0]] == nil {
			return errors.New("name one broker that was started with rabbitmq-start")
		}
		return do(c.brokers[c.args[0]])
	}
}

// runRabbitMQ: rabbitmq -as USER:PASSWORD NAME
func runRabbitMQ(ctx context.Context, c call) error {
	flags := flag.NewFlagSet("rabbitmq", flag.ContinueOnError)
	flags.SetOutput(c.out)
	as := flags.String("as", "", "log in as USER:PASSWORD")
	if err := flags.Parse(c.args); err != nil {
		return err
	}
	b := c.brokers[flags.Arg(0)]
	if b == nil {
		return errors.New("usage: rabbitmq -as USER:PASSWORD NAME")
	}
	user, password, _ := strings.Cut(*as, ":")
	if err := b.login(ctx, user, password); err != nil {
		return err
	}
	fmt.Fprintln(c.out, "logged in")
	return nil
}

// login logs in over AMQP, on a fresh connection, and out again.
func (b *broker) login(ctx context.Context, user, password string) error {
	conn, err := amqp.DialConfig("amqp://"+b.Addr+"/", amqp.Config{
		SASL: []amqp.Authentication{&amqp.PlainAuth{Username: user, Password: password}},
		Dial: func(network, addr string) (net.Conn, error) {
			dialer := net.Dialer{Timeout: 10 * time.Second}
			return dialer.DialContext(ctx, network, addr)
		},
	})
	if err != nil {
		return err
	}
	return conn.Close()
}

// setRabbitMQPassword: rabbitmq-password USER:PASSWORD NAME, as an operator does
// by hand. The user has no tags.
func setRabbitMQPassword(ctx context.Context, c call) error {
	if len(c.args) != 2 || c.brokers[c.args[1]] == nil {
		return errors.New("usage: rabbitmq-password USER:PASSWORD NAME")
	}
	user, password, _ := strings.Cut(c.args[0], ":")
	return c.brokers[c.args[1]].SetUser(ctx, user, password, "")
}
