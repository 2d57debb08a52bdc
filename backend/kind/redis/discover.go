package redis

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
)

// What topology may be.
const (
	TopologyAuto       = "auto"
	TopologyStandalone = "standalone"
	TopologyCluster    = "cluster"
	TopologySentinel   = "sentinel"
)

const (
	maxParallel    = 16
	connectTimeout = 3 * time.Second
	// sentinelTimeout leaves time for the nodes where a sentinel hangs.
	sentinelTimeout = 2 * time.Second
	// maxNodes is far more than a cluster of any use has. A server that names
	// more is not one that the admin credential should be sent around for.
	maxNodes = 1000
)

// node is one server of the target during one call, or one sentinel of it.
type node struct {
	name    string // as it was discovered first
	aliases []string
	seed    bool
	extra   bool // remembered by a role, not found by discovery
	s       *session
	facts   facts
	sight   *sight // of a sentinel: what it sees
	err     error  // why it cannot be asked
}

// answersTo reports whether addr is another name of n.
func (n *node) answersTo(addr string) bool {
	return n.name == addr || slices.Contains(n.aliases, addr)
}

// fleet is every node of the target, with a session to each that answers.
type fleet struct {
	entry  *connection.Entry
	seeds  []netip.Addr
	nodes  []*node
	full   bool // there were more than maxNodes
	cancel context.CancelFunc

	sentinels bool   // it is made of sentinels
	watch     *fleet // the sentinels of the target, nil where it has none
}

// close ends every session.
func (f *fleet) close() {
	f.cancel()
	for _, n := range f.nodes {
		if n.err == nil {
			n.s.close()
		}
	}
	if f.watch != nil {
		f.watch.close()
	}
}

// discover finds and logs in to every node: from the seeds, to whatever a node
// that answers knows of, until nothing new turns up. In a cluster CLUSTER NODES
// is asked, because CLUSTER SLOTS, which client libraries iterate over, leaves
// out failed replicas; with replication INFO is, in both directions. Where
// sentinels are the seeds, the nodes that they watch come first.
func discover(ctx context.Context, entry *connection.Entry, known []string) (*fleet, error) {
	if entry == nil || entry.Redis == nil || len(entry.Redis.Addresses) == 0 {
		return nil, kind.Definitely("the connection has no redis addresses: write its addresses")
	}
	ctx, cancel := context.WithCancel(ctx)
	f := &fleet{entry: entry, cancel: cancel}
	if err := f.seek(ctx, known); err != nil {
		f.close()
		return nil, err
	}
	return f, nil
}

func (f *fleet) seek(ctx context.Context, known []string) error {
	first := f.entry.Redis.Addresses
	if f.entry.Redis.Watched() {
		if err := f.askSentinels(ctx); err != nil {
			return err
		}
		first = f.watch.watched()
	}
	connectCtx, stop := within(ctx, 3, connectTimeout)
	defer stop()
	f.resolveSeeds(connectCtx)

	f.visit(ctx, connectCtx, f.newNodes(first, f.watch == nil, false))
	if f.full {
		return kind.Definitely("connection %q leads to more than %d nodes: check what its addresses answer to CLUSTER NODES and INFO", f.entry.Name, maxNodes)
	}
	if err := f.answered("redis node"); err != nil {
		return err
	}
	f.drop()
	f.visit(ctx, connectCtx, f.newNodes(f.missing(known), false, true))
	f.merge()
	return nil
}

func (f *fleet) resolveSeeds(ctx context.Context) {
	for _, a := range f.entry.Redis.Addresses {
		host, _, err := net.SplitHostPort(f.entry.Reach(a))
		if err != nil {
			continue
		}
		if ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host); err == nil {
			f.seeds = append(f.seeds, ips...)
		}
	}
}

// newNodes makes nodes of those addresses that no node answers to yet, up to
// maxNodes; those that a role remembers were found within them once.
func (f *fleet) newNodes(addrs []string, seed, extra bool) []*node {
	var out []*node
	named, reached := f.index()
	for _, a := range addrs {
		reach := f.entry.Reach(a)
		if named[a] != nil {
			continue
		}
		if n := reached[reach]; n != nil {
			n.aliases = append(n.aliases, a)
			named[a] = n
			continue
		}
		if len(f.nodes) >= maxNodes && !extra {
			f.full = true
			break
		}
		n := &node{name: a, seed: seed, extra: extra}
		named[a], reached[reach] = n, n
		f.nodes = append(f.nodes, n)
		out = append(out, n)
	}
	return out
}

// index finds nodes by what they answer to, and by where they are dialled.
func (f *fleet) index() (named, reached map[string]*node) {
	named, reached = map[string]*node{}, map[string]*node{}
	for _, n := range f.nodes {
		reached[f.entry.Reach(n.name)] = n
		for _, a := range append([]string{n.name}, n.aliases...) {
			named[a] = n
		}
	}
	return named, reached
}

// visit connects to nodes, all at once within bounds, and to those they name.
// Only connecting is bound by connectCtx: sessions live as long as ctx.
func (f *fleet) visit(ctx, connectCtx context.Context, waiting []*node) {
	visited := make(chan *node)
	for busy := 0; busy > 0 || len(waiting) > 0; {
		for busy < maxParallel && len(waiting) > 0 && !f.full {
			n := waiting[0]
			waiting = waiting[1:]
			busy++
			go func() {
				f.connect(ctx, connectCtx, n)
				visited <- n
			}()
		}
		if busy == 0 {
			break // there are too many
		}
		n := <-visited
		busy--
		if n.err == nil && !n.extra && !f.full {
			waiting = append(waiting, f.newNodes(n.facts.neighbours(), false, false)...)
		}
	}
	for _, n := range waiting {
		n.err = errUnvisited
	}
}

// errUnvisited is about a node that nobody will ask, because there are too many.
var errUnvisited = errors.New("there are too many nodes")

func (f *fleet) connect(ctx, connectCtx context.Context, n *node) {
	to, addrs, err := f.way(connectCtx, n)
	if err != nil {
		n.err = err
		return
	}
	n.s, n.err = dial(ctx, connectCtx, to, addrs)
	if n.err != nil {
		return
	}
	if n.err = f.greet(connectCtx, n); n.err != nil {
		n.s.close()
	}
}

// greet logs in to n and asks it about itself.
func (f *fleet) greet(ctx context.Context, n *node) error {
	if f.sentinels {
		return n.look(ctx, f.entry.Redis.Sentinel)
	}
	user, err := n.s.login(ctx, f.entry.Admin.Logins())
	if err == nil {
		n.facts, err = n.s.learn(ctx, user)
	}
	if err == nil {
		err = n.checkTopology(f.entry.Redis.Topology)
	}
	return err
}

func (n *node) checkTopology(wanted string) error {
	if wanted == "" || wanted == TopologyAuto || n.facts.cluster == (wanted == TopologyCluster) {
		return nil
	}
	return kind.Definitely("node %s does not run with the topology %q that its connection asks for: write the connection with topology=auto", n.name, wanted)
}

// way resolves where n is dialled, and refuses what the connection may not
// send its admin credential to. An address that the operator wrote down,
// as a seed or in address_map, is allowed.
func (f *fleet) way(ctx context.Context, n *node) (peer, []string, error) {
	to := peer{node: n.name, sentinel: f.sentinels}
	reach := f.entry.Reach(n.name)
	host, port, err := net.SplitHostPort(reach)
	if err != nil {
		return to, nil, kind.Definitely("the address %q of %s is not host:port: correct addresses or address_map", reach, to.who())
	}
	if f.entry.Redis.TLS {
		if to.tls, err = f.entry.TLS.Config(host); err != nil {
			return to, nil, kind.Definitely("%w", err)
		}
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return to, nil, kind.CannotReach(fmt.Errorf("the address of %s cannot be resolved, check the name: %w", to.who(), err))
	}
	_, mapped := f.entry.AddressMap[n.name]
	var out []string
	for _, ip := range ips {
		if !n.seed && !mapped {
			if err := f.entry.CheckDiscovered(ip, f.seeds); err != nil {
				return to, nil, kind.Definitely("%w", err)
			}
		}
		out = append(out, net.JoinHostPort(ip.Unmap().String(), port))
	}
	return to, out, nil
}

// answered is nil when at least one node could be asked.
func (f *fleet) answered(what string) error {
	var errs []error
	definite, silent := true, true
	for _, n := range f.nodes {
		if n.err == nil {
			return nil
		}
		errs = append(errs, n.err)
		definite = definite && kind.IsDefinite(n.err)
		silent = silent && kind.IsUnreachable(n.err)
	}
	err := fmt.Errorf("no %s of connection %q could be asked: %w", what, f.entry.Name, errs[0])
	switch {
	case definite:
		return kind.Definitely("%w", err)
	case silent:
		return kind.CannotReach(err)
	}
	// One error among others must not lend its class to the whole.
	return errors.New(err.Error())
}

func (f *fleet) isCluster() bool {
	return slices.ContainsFunc(f.nodes, func(n *node) bool { return n.err == nil && n.facts.cluster })
}

// drop removes, in a cluster, seeds that do not answer and that no member
// knows: there CLUSTER NODES says who counts, and a seed may be any name.
func (f *fleet) drop() {
	if !f.isCluster() {
		return
	}
	members := map[string]bool{}
	for _, n := range f.nodes {
		for _, m := range n.facts.members {
			members[m.addr] = true
		}
	}
	f.nodes = slices.DeleteFunc(f.nodes, func(n *node) bool {
		return n.err != nil && !members[n.name] && !slices.ContainsFunc(n.aliases, func(a string) bool { return members[a] })
	})
}

// missing returns the known nodes that discovery did not find and that still
// count. A dead replica vanishes from its primary's INFO, so with replication
// every one of them does. CLUSTER NODES forgets only who was made to leave, so
// in a cluster none does, provided that most of the cluster was heard.
func (f *fleet) missing(known []string) []string {
	if f.isCluster() {
		up := 0
		for _, n := range f.nodes {
			if n.err == nil {
				up++
			}
		}
		if 2*up > len(f.nodes) {
			return nil
		}
	}
	return slices.Compact(slices.Sorted(slices.Values(known)))
}

// merge makes one node of several names of one server, which its run id tells.
func (f *fleet) merge() {
	var kept []*node
	for _, n := range f.nodes {
		i := slices.IndexFunc(kept, func(k *node) bool {
			return n.err == nil && k.err == nil && n.facts.runID != "" && k.facts.runID == n.facts.runID
		})
		if i < 0 {
			if n.facts.self != "" && !n.answersTo(n.facts.self) {
				// The name that the cluster knows it by is the one that lasts.
				n.aliases = append(n.aliases, n.name)
				n.name = n.facts.self
			}
			kept = append(kept, n)
			continue
		}
		kept[i].aliases = append(kept[i].aliases, append(n.aliases, n.name)...)
		kept[i].seed = kept[i].seed || n.seed
		n.s.close()
	}
	// Others may know a node by an address that does not lead to it from here.
	f.nodes = slices.DeleteFunc(slices.Clone(kept), func(n *node) bool {
		return n.err != nil && slices.ContainsFunc(kept, func(k *node) bool { return k.err == nil && k.answersTo(n.name) })
	})
	slices.SortFunc(f.nodes, func(a, b *node) int { return strings.Compare(a.name, b.name) })
}

// of returns the nodes that hold u: all that were discovered, and of the
// others those that u is known to have been on.
func (f *fleet) of(u kind.User) []*node {
	var out []*node
	for _, n := range f.nodes {
		if !n.extra || slices.ContainsFunc(u.Known, n.answersTo) {
			out = append(out, n)
		}
	}
	return out
}

// find returns the node that answers to addr, or nil.
func (f *fleet) find(addr string) *node {
	for _, n := range f.nodes {
		if n.answersTo(addr) || f.entry.Reach(addr) == f.entry.Reach(n.name) {
			return n
		}
	}
	return nil
}

// each runs do for every node that answers, in parallel within bounds.
func (f *fleet) each(do func(*node)) {
	up := make(chan *node)
	var workers sync.WaitGroup
	for range min(maxParallel, len(f.nodes)) {
		workers.Go(func() {
			for n := range up {
				do(n)
			}
		})
	}
	for _, n := range f.nodes {
		if n.err == nil {
			up <- n
		}
	}
	close(up)
	workers.Wait()
}
