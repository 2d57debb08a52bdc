package kube

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	amqp "github.com/rabbitmq/amqp091-go"
)

// ErrRefused is a login that a server answered with no.
var ErrRefused = errors.New("the login was refused")

// loginWithin bounds one login. A broker takes three seconds to refuse one.
const loginWithin = 10 * time.Second

// Login logs in to a server afresh and leaves. Its error is ErrRefused where
// the server says that it knows no such user, or another password.
type Login func(ctx context.Context, addr, username, password string) error

var logins = map[string]Login{
	"redis": loginRedis, "postgresql": loginPostgreSQL, "rabbitmq": loginRabbitMQ,
	"none": func(context.Context, string, string, string) error { return nil },
}

func loginRedis(ctx context.Context, addr, username, password string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	command := fmt.Sprintf("*3\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", len(username), username, len(password), password)
	if _, err := conn.Write([]byte(command)); err != nil {
		return err
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	answer = strings.TrimSpace(answer)
	switch {
	case err != nil:
		return err
	case answer == "+OK":
		return nil
	case strings.HasPrefix(answer, "-WRONGPASS"), strings.HasPrefix(answer, "-NOPERM"), strings.HasPrefix(answer, "-ERR invalid"):
		return fmt.Errorf("%w: %s", ErrRefused, answer)
	}
	return errors.New(answer)
}

func loginPostgreSQL(ctx context.Context, addr, username, password string) error {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(username, password), Host: addr, Path: "/postgres", RawQuery: "sslmode=disable",
	}
	conn, err := pgx.Connect(ctx, u.String())
	if err == nil {
		_, err = conn.Exec(ctx, "SELECT 1")
		return errors.Join(err, conn.Close(ctx))
	}
	var refused *pgconn.PgError
	if errors.As(err, &refused) && strings.HasPrefix(refused.Code, "28") { // invalid authorization
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return err
}

func loginRabbitMQ(ctx context.Context, addr, username, password string) error {
	u := url.URL{Scheme: "amqp", User: url.UserPassword(username, password), Host: addr, Path: "/"}
	config := amqp.Config{Dial: func(network, addr string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if deadline, ok := ctx.Deadline(); ok && err == nil {
			err = conn.SetDeadline(deadline)
		}
		return conn, err
	}}
	conn, err := amqp.DialConfig(u.String(), config)
	if err == nil {
		return conn.Close()
	}
	var refused *amqp.Error
	if errors.As(err, &refused) && refused.Code == amqp.AccessRefused {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return err
}
