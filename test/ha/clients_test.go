package ha_test

import (
	"bufio"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/api"
	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	clientReads = time.Second            // how often a client reads what is served
	clientPause = 150 * time.Millisecond // between two logins of one
)

// crowd is the clients of all roles, and what they saw.
type crowd struct {
	*stage
	clients []*client

	mu       sync.Mutex
	by       map[string]*tally // by role
	newest   map[string]int64  // of each path, the greatest version that was read
	problems []string
}

// tally is what clients of a role saw.
type tally struct {
	logins, refused int
	// late: refused, and read longer ago than it is promised to be accepted.
	late   int
	reads  int
	silent int // reads that nobody answered
	stale  int // reads that showed an earlier version than a read before
	// Of a role of strategy swap: what was refused meanwhile, and for how long at
	// most.
	swapped int
	outage  time.Duration
}

func newCrowd(s *stage) *crowd {
	c := &crowd{stage: s, by: map[string]*tally{}, newest: map[string]int64{}}
	for _, r := range s.roles {
		c.by[r.name] = &tally{}
		peers := &ring{}
		for _, from := range r.sources {
			c.clients = append(c.clients, &client{crowd: c, role: r, from: from, ring: peers})
		}
	}
	return c
}

func (c *crowd) start(ctx context.Context, all *sync.WaitGroup) {
	for _, one := range c.clients {
		all.Go(func() { one.work(ctx) })
	}
}

// count changes what is known of a role.
func (c *crowd) count(r *role, change func(*tally)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c.by[r.name])
}

func (c *crowd) report(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.problems = append(c.problems, time.Now().UTC().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

// client knows nothing but what it read itself.
type client struct {
	*crowd
	role *role
	from source
	ring *ring

	last    reading
	due     bool      // it was refused, and reads again
	refused time.Time // since when it has been
}

// reading is what a client read.
type reading struct {
	asked  time.Time // when the reading began
	node   string
	number int64 // of the version, or of the document's

	user, secret, previous string
	keys                   map[string]string // by kid
}

func (c *client) work(ctx context.Context) {
	for ; ctx.Err() == nil; wait(ctx, clientPause) {
		if c.due || time.Since(c.last.asked) > clientReads {
			if r, err := c.read(ctx); err == nil {
				c.last, c.due = r, false
			}
		}
		if c.last.asked.IsZero() {
			continue
		}
		// What has begun is finished: what was sent counts.
		ctx := context.WithoutCancel(ctx)
		switch {
		case c.role.ring:
			c.exchange()
		case c.role.kind == "api-key":
			c.present(ctx)
		default:
			c.login(ctx)
		}
	}
}

// read asks a node by chance.
func (c *client) read(ctx context.Context) (r reading, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	node := c.anybody()
	c.mu.Lock()
	newest := c.newest[c.from.path]
	c.mu.Unlock()
	r.asked, r.node = time.Now(), c.cluster.Nodes[node].Name()
	data, err := dataOf(c.reader[node].Logical().ReadWithContext(ctx, mountPath+"/"+c.from.path))
	if err == nil {
		err = r.decode(data, c.from)
	}
	c.count(c.role, func(t *tally) {
		t.reads++
		if err != nil {
			t.silent++
		} else if r.number < newest {
			t.stale++
		}
		if err == nil {
			c.newest[c.from.path] = max(c.newest[c.from.path], r.number)
		}
	})
	var answer *api.ResponseError
	if errors.As(err, &answer) && answer.StatusCode < 500 {
		c.report("%s answers %s with %v", r.node, c.from.path, err)
	}
	if err == nil {
		c.know(c.from.path, r.secret)
		c.know(c.from.path, r.previous)
		for _, key := range r.keys {
			c.know(c.from.path, key)
		}
	}
	return r, err
}

// decode takes the fields of a path apart.
func (r *reading) decode(data map[string]any, from source) error {
	number := data["version"]
	if document, ok := data["data"].(map[string]any); ok && strings.HasPrefix(from.path, "data/") {
		number, data = data["metadata"].(map[string]any)["version"], document
	}
	if _, err := fmt.Sscan(fmt.Sprint(number), &r.number); err != nil {
		return fmt.Errorf("the version of %s: %w", from.path, err)
	}
	text := func(field string) string {
		s, _ := data[field].(string)
		return s
	}
	r.user, r.secret, r.previous = text(from.user), text(from.secret), text(from.previous)
	if r.secret == "" {
		return fmt.Errorf("%s has no %s", from.path, from.secret)
	}
	if from.keys == "" {
		return nil
	}
	raw, err := json.Marshal(data[from.keys])
	if s, ok := data[from.keys].(string); ok {
		raw, err = []byte(s), nil
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, &r.keys)
}

// login logs in at the server of the role.
func (c *client) login(ctx context.Context) {
	began := time.Now()
	err := c.logIn(ctx, c.role.kind, c.last.user, c.last.secret)
	age := time.Since(c.last.asked)
	switch {
	case err == nil:
		c.count(c.role, func(t *tally) {
			t.logins++
			if !c.refused.IsZero() {
				t.outage = max(t.outage, time.Since(c.refused))
			}
		})
		c.refused = time.Time{}
	case !errors.Is(err, errRefused):
		c.report("%s as %s: %v", c.role.name, c.last.user, err)
	case c.role.swap:
		c.count(c.role, func(t *tally) { t.logins++; t.swapped++ })
		if c.due = true; c.refused.IsZero() {
			c.refused = began
		}
	default:
		c.refuse(age, fmt.Sprintf("as %s: %v", c.last.user, err))
	}
}

// refuse judges a refusal: what was read longer ago than the grace period may have
// been retired since.
func (c *client) refuse(age time.Duration, what string) {
	late := age > grace
	c.count(c.role, func(t *tally) {
		if late {
			t.late++
		} else {
			t.logins++
			t.refused++
		}
	})
	c.due = true
	if !late {
		c.report("%s, version %d of %s, read %s ago from %s, %s", c.role.name, c.last.number, c.from.path, age.Round(time.Millisecond), c.last.node, what)
	}
}

// present shows an api-key to somebody who reads which ones count.
func (c *client) present(ctx context.Context) {
	for range 3 {
		now, err := c.read(ctx)
		if err != nil {
			return // he cannot tell
		}
		if now.number < c.last.number {
			continue // he asked a node that has not heard of it
		}
		if slices.Contains([]string{now.secret, now.previous}, c.last.secret) {
			c.count(c.role, func(t *tally) { t.logins++ })
		} else {
			c.refuse(time.Since(c.last.asked), fmt.Sprintf("is none of version %d", now.number))
		}
		return
	}
}

// ring is what those who share the keys of a ring read last, and what they made.
type ring struct {
	mu   sync.Mutex
	made []proof
}

// proof is what one has made with the key in use: a token, or something encrypted.
type proof struct {
	kid  string
	sum  []byte
	made time.Time
}

func prove(kid, key string, made time.Time) proof {
	h := hmac.New(sha256.New, []byte(key))
	_, _ = fmt.Fprintln(h, kid, made.UnixNano())
	return proof{kid, h.Sum(nil), made}
}

// exchange makes something with the key in use, and checks what all have made as
// long as it counts. Keys that were read longer ago than promised do neither.
func (c *client) exchange() {
	now := time.Now()
	if now.Sub(c.last.asked) > propagation {
		c.count(c.role, func(t *tally) { t.late++ })
		return
	}
	c.ring.mu.Lock()
	defer c.ring.mu.Unlock()
	for kid, key := range c.last.keys {
		if key == c.last.secret {
			c.ring.made = append(c.ring.made, prove(kid, key, now))
		}
	}
	c.ring.made = slices.DeleteFunc(c.ring.made, func(p proof) bool { return now.Sub(p.made) >= c.role.lives })
	bad := 0
	for _, p := range c.ring.made {
		if key, ok := c.last.keys[p.kid]; !ok || !hmac.Equal(p.sum, prove(p.kid, key, p.made).sum) {
			if bad++; bad == 1 {
				c.report("%s: key %s of %s ago is not among those of version %d of %s, read %s ago from %s", c.role.name, p.kid,
					now.Sub(p.made).Round(time.Millisecond), c.last.number, c.from.path, now.Sub(c.last.asked).Round(time.Millisecond), c.last.node)
			}
		}
	}
	checked := len(c.ring.made)
	c.count(c.role, func(t *tally) { t.logins, t.refused = t.logins+checked, t.refused+bad })
}

// logIn opens a connection of its own, past the proxies.
func (s *stage) logIn(ctx context.Context, kind, user, password string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	switch kind {
	case "redis":
		return s.logInRedis(ctx, user, password)
	case "postgresql":
		c, err := s.postgres.Login(ctx, user, password)
		if err == nil {
			return c.Close(ctx)
		}
		if strings.Contains(err.Error(), "28P01") {
			return fmt.Errorf("%w: %w", errRefused, err)
		}
		return err
	case "rabbitmq":
		return s.logInRabbit(ctx, user, password)
	}
	return fmt.Errorf("nobody logs in at a %s", kind)
}

func (s *stage) logInRedis(ctx context.Context, user, password string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.redis.Addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(conn, "*3\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", len(user), user, len(password), password); err != nil {
		return err
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	switch {
	case err != nil:
		return err
	case !strings.HasPrefix(answer, "+OK"):
		return fmt.Errorf("%w: %s", errRefused, strings.TrimSpace(answer))
	}
	return nil
}

func (s *stage) logInRabbit(ctx context.Context, user, password string) error {
	u := url.URL{Scheme: "amqp", User: url.UserPassword(user, password), Host: s.rabbit.Addr, Path: "/"}
	c, err := amqp.DialConfig(u.String(), amqp.Config{Dial: func(network, addr string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err == nil {
			err = conn.SetDeadline(time.Now().Add(20 * time.Second))
		}
		return conn, err
	}})
	if errors.Is(err, amqp.ErrCredentials) {
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	if err != nil {
		return err
	}
	return c.Close()
}
