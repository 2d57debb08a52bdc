package redis

import (
	"context"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// facts are what a node says about itself at login.
type facts struct {
	admin      string // the user that is logged in
	version    string
	runID      string
	configFile string
	cluster    bool
	self       string // in a cluster: the address others know it by
	id         string // in a cluster: its node id
	members    []member

	replica  bool
	upstream string // host:port of the primary, on a replica
	linkUp   bool
	replicas []string

	configKnown bool // CONFIG GET is permitted
	aclFile     string
	masterUser  string
	masterAuth  string
	requirePass bool

	rules       []string // the admin's command rules, one list per selector
	defaultOpen bool

	watchersKnown bool // CLIENT LIST is permitted
	watchers      []watcher
}

// member is one line of CLUSTER NODES.
type member struct{ id, addr string }

// learn asks a node about itself, in one round trip.
func (s *session) learn(ctx context.Context, admin string) (facts, error) {
	r := s.run(ctx, []command{
		{"INFO", "server"},
		{"INFO", "replication"},
		{"INFO", "cluster"},
		{"CLUSTER", "NODES"},
		{"CONFIG", "GET", "aclfile"}, // one parameter each: redis 6 takes no more
		{"CONFIG", "GET", "masteruser"},
		{"CONFIG", "GET", "masterauth"},
		{"CONFIG", "GET", "requirepass"},
		{"ACL", "GETUSER", admin},
		{"ACL", "GETUSER", "default"},
	})
	f := facts{admin: admin}
	for _, i := range []int{0, 1, 2} {
		if r[i].err != nil {
			return f, s.explain(r[i].err, "run INFO", admin)
		}
	}
	info := fields(r[0].value, r[1].value, r[2].value)
	if info["redis_mode"] == "sentinel" {
		return f, kind.Definitely("node %s is a sentinel: write the connection with sentinel_master, the name that the sentinels know the primary by", s.node)
	}
	f.version, f.runID, f.configFile = info["redis_version"], info["run_id"], info["config_file"]
	if major, _, _ := strings.Cut(f.version, "."); len(major) == 1 && major < "6" {
		return f, s.tooOld()
	}
	f.readReplication(info)
	if f.cluster = info["cluster_enabled"] == "1"; f.cluster {
		if r[3].err != nil {
			return f, s.explain(r[3].err, "run CLUSTER NODES", admin)
		}
		f.readMembers(text(r[3].value))
	}
	if err := f.readConfig(s, r[4:8]); err != nil {
		return f, err
	}
	if r[8].err != nil {
		return f, s.explain(r[8].err, "run ACL GETUSER", admin)
	}
	f.rules = parseUser(r[8].value).rules
	u := parseUser(r[9].value)
	f.defaultOpen = u.on && u.nopass
	if !f.cluster && f.may("client|list") {
		f.watchers, f.watchersKnown = s.watchers(ctx)
	}
	return f, nil
}

func (f *facts) readConfig(s *session, replies []reply) error {
	values := make([]string, len(replies))
	for i, r := range replies {
		switch {
		case replyCode(r.err) == "NOPERM":
			return nil
		case r.err != nil:
			return s.explain(r.err, "run CONFIG GET", f.admin)
		}
		if pair, _ := r.value.([]any); len(pair) == 2 {
			values[i] = text(pair[1])
		}
	}
	f.configKnown = true
	f.aclFile, f.masterUser, f.masterAuth = values[0], values[1], values[2]
	f.requirePass = values[3] != ""
	return nil
}

func (f *facts) readReplication(info map[string]string) {
	f.replica = info["role"] == "slave"
	f.linkUp = info["master_link_status"] == "up"
	if f.replica && info["master_host"] != "" {
		f.upstream = net.JoinHostPort(info["master_host"], info["master_port"])
	}
	for i := 0; ; i++ {
		line, ok := info["slave"+strconv.Itoa(i)]
		if !ok {
			return
		}
		values := map[string]string{}
		for pair := range strings.SplitSeq(line, ",") {
			name, value, _ := strings.Cut(pair, "=")
			values[name] = value
		}
		if values["ip"] != "" && values["port"] != "0" {
			f.replicas = append(f.replicas, net.JoinHostPort(values["ip"], values["port"]))
		}
	}
}

// readMembers reads lines of
//
//	<id> <ip:port@cport[,hostname]> <flags> <primary> <ping> <pong> <epoch> <link> <slot>…
//
// Failed nodes are listed and count; one that has not joined yet (handshake)
// or has no address (noaddr) cannot be asked and is on its way out or in.
func (f *facts) readMembers(nodes string) {
	for line := range strings.Lines(nodes) {
		words := strings.Fields(line)
		if len(words) < 3 {
			continue
		}
		flags := strings.Split(words[2], ",")
		if slices.Contains(flags, "handshake") || slices.Contains(flags, "noaddr") {
			continue
		}
		addr, _, _ := strings.Cut(words[1], "@")
		addr, _, _ = strings.Cut(addr, ",")
		colon := strings.LastIndexByte(addr, ':')
		myself := slices.Contains(flags, "myself")
		if myself {
			f.id = words[0]
		}
		if colon <= 0 { // a node that never met another does not know its address
			continue
		}
		m := member{id: words[0], addr: net.JoinHostPort(addr[:colon], addr[colon+1:])}
		if myself {
			f.self = m.addr
		}
		f.members = append(f.members, m)
	}
}

// neighbours are the addresses of the other nodes that this one knows.
func (f *facts) neighbours() []string {
	var out []string
	if f.cluster {
		for _, m := range f.members {
			if m.addr != f.self {
				out = append(out, m.addr)
			}
		}
		return out
	}
	if f.upstream != "" {
		out = append(out, f.upstream)
	}
	return append(out, f.replicas...)
}

// may reports whether the admin's rules permit name ("acl|save").
func (f *facts) may(name string) bool { return allows(f.rules, name) }

// allows reports whether rules permit name ("acl|save"). Rules apply in the
// order they are listed; the categories are those that the commands this
// package needs belong to.
func allows(selectors []string, name string) bool {
	parent, _, _ := strings.Cut(name, "|")
	return slices.ContainsFunc(selectors, func(rules string) bool {
		allowed := false
		for rule := range strings.FieldsSeq(strings.ToLower(rules)) {
			switch strings.TrimLeft(rule, "+-") {
			case name, parent, "@all", "@admin", "@dangerous", "@slow":
				allowed = rule[0] == '+'
			case "allcommands":
				allowed = true
			case "nocommands":
				allowed = false
			}
		}
		return allowed
	})
}

// user is what ACL GETUSER says.
type user struct {
	exists, on, nopass, skipSanitize bool

	hashes []string
	rights
	selectors []string
	rules     []string // about commands, its own and those of its selectors
}

func parseUser(value any) user {
	list, ok := value.([]any)
	if !ok {
		return user{}
	}
	// A redis that knows no channels allows all of them.
	u := user{exists: true, rights: rights{channels: []string{anyChannel}}}
	for i := 0; i+1 < len(list); i += 2 {
		name := text(list[i])
		u.read(name, list[i+1])
		switch name {
		case "flags":
			for _, flag := range texts(list[i+1]) {
				u.on = u.on || flag == "on"
				u.nopass = u.nopass || flag == "nopass"
				u.skipSanitize = u.skipSanitize || flag == skipSanitize
			}
		case "passwords":
			u.hashes = texts(list[i+1])
		case "commands":
			u.rules = append(u.rules, text(list[i+1]))
		case "selectors":
			selectors, _ := list[i+1].([]any)
			for _, s := range selectors {
				parsed := parseUser(s)
				u.rules = append(u.rules, parsed.rules...)
				u.selectors = append(u.selectors, parsed.selector())
			}
		}
	}
	return u
}

func (u user) has(hash string) bool { return slices.Contains(u.hashes, hash) }

// users asks s for every one of names, and answers in their order.
func (s *session) users(ctx context.Context, names []string) ([]user, []error) {
	commands := make([]command, len(names))
	for i, name := range names {
		commands[i] = command{"ACL", "GETUSER", name}
	}
	users, errs := make([]user, len(names)), make([]error, len(names))
	for i, r := range s.run(ctx, commands) {
		if users[i] = parseUser(r.value); r.err != nil {
			errs[i] = s.explain(r.err, "run ACL GETUSER", names[i])
		}
	}
	return users, errs
}

func text(value any) string {
	s, _ := value.(string)
	return s
}

func texts(value any) []string {
	list, _ := value.([]any)
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = text(v)
	}
	return out
}

func fields(replies ...any) map[string]string {
	out := map[string]string{}
	for _, r := range replies {
		for line := range strings.Lines(text(r)) {
			if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
				out[name] = value
			}
		}
	}
	return out
}
