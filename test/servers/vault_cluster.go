package servers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/vishvananda/netlink"
)

// VaultCluster is several Vaults that are one, with integrated storage and TLS on
// every port. Nodes reach each other, and plugins their targets, by way of
// proxies, so that the network of one node can be cut. A proxy sees by the process
// at the other end whose connection it has: that needs /proc, and no privilege.
type VaultCluster struct {
	Nodes []*Vault

	dir string
	ca  *Authority

	mu      sync.Mutex
	targets map[string]*Proxy // to what plugins reach, by address
}

// member is what a Vault knows of its cluster.
type member struct {
	cluster *VaultCluster
	name    string
	dir     string
	link    *Proxy // where the other nodes reach this one
}

// StartVaultCluster starts a cluster of so many nodes, all unsealed, with the
// plugin in the folder of each. options are those of every node; Raft is implied.
// The caller stops it.
func StartVaultCluster(options VaultOptions, nodes int) (_ *VaultCluster, err error) {
	if !hasProc() {
		return nil, errors.New("a cluster of vaults needs /proc, to tell whose a connection is")
	}
	c := &VaultCluster{dir: options.Dir, targets: map[string]*Proxy{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Stop())
		}
	}()
	if c.ca, err = NewAuthority(); err != nil {
		return nil, err
	}
	options.Raft = true
	for i := range nodes {
		name := fmt.Sprintf("node-%d", i+1)
		options.Dir = filepath.Join(c.dir, name)
		v := &Vault{options: options, member: &member{cluster: c, name: name, dir: options.Dir}}
		c.Nodes = append(c.Nodes, v)
		if err := v.member.writeFiles(); err != nil {
			return nil, err
		}
		if err := v.prepare(); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*vaultStartTimeout)
	defer cancel()
	first := c.Nodes[0]
	if err := first.begin(ctx); err != nil {
		return nil, err
	}
	for _, v := range c.Nodes[1:] {
		if err := v.join(ctx, first); err != nil {
			return nil, err
		}
	}
	return c, c.awaitVoters(ctx, first)
}

// awaitVoters returns when every node has a vote, and knows it: Vault gives it to one that
// has been well for ten seconds. Without it the others elect nobody when the first is gone.
func (c *VaultCluster) awaitVoters(ctx context.Context, first *Vault) error {
	err := first.await(ctx, func() error {
		state, err := first.client.Sys().RaftAutopilotStateWithContext(ctx)
		if err == nil && (!state.Healthy || len(state.Voters) != len(c.Nodes)) {
			err = fmt.Errorf("%d of %d nodes have a vote", len(state.Voters), len(c.Nodes))
		}
		return err
	})
	if err != nil {
		return err
	}
	// Whoever has what is written now has what was decided before it.
	if _, err := first.client.Logical().WriteWithContext(ctx, "cubbyhole/voters", map[string]any{"all": true}); err != nil {
		return err
	}
	written, err := first.client.Sys().LeaderWithContext(ctx)
	if err != nil {
		return err
	}
	for _, v := range c.Nodes {
		err := v.await(ctx, func() error {
			own, err := v.client.Sys().LeaderWithContext(ctx)
			if err == nil && own.RaftAppliedIndex < written.RaftAppliedIndex {
				err = fmt.Errorf("%s is behind the active node", v.member.name)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// NewVaultCluster is StartVaultCluster for a test. The logs are shown when the test
// failed.
func NewVaultCluster(t testing.TB, options VaultOptions, nodes int) *VaultCluster {
	t.Helper()
	if options.Dir == "" {
		options.Dir = t.TempDir()
	}
	c, err := StartVaultCluster(options, nodes)
	if err != nil {
		t.Fatalf("starting a cluster of vaults: %v", err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Errorf("stopping vault: %v", err)
		}
		for _, v := range c.Nodes {
			if t.Failed() {
				t.Logf("end of the log of %s:\n%s", v.member.name, v.logTail())
			}
		}
	})
	return c
}

// Stop ends every node and every proxy. Stopping twice is fine.
func (c *VaultCluster) Stop() error {
	var errs []error
	for _, v := range c.Nodes {
		errs = append(errs, v.Stop())
		if v.member.link != nil {
			errs = append(errs, v.member.link.Close())
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.targets {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

// Install puts a release into the plugin folder of every node, and registers it.
func (c *VaultCluster) Install(ctx context.Context, version string) error {
	active, err := c.Active(ctx)
	if err != nil {
		return err
	}
	return release(ctx, active, c.Nodes, version)
}

// Active is the node that takes writes. It waits until there is one among those
// that are not in except: a node that was cut off may still think that it is.
func (c *VaultCluster) Active(ctx context.Context, except ...*Vault) (*Vault, error) {
	ctx, cancel := context.WithTimeout(ctx, vaultStartTimeout)
	defer cancel()
	for {
		for _, v := range c.Nodes {
			if !slices.Contains(except, v) && v.IsActive(ctx) {
				return v, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, errors.New("no vault of the cluster became active")
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// IsActive asks a node whether it takes writes.
func (v *Vault) IsActive(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	health, err := v.client.Sys().HealthWithContext(ctx)
	return err == nil && health.Initialized && !health.Sealed && !health.Standby
}

// Name is that of a member of a cluster.
func (v *Vault) Name() string { return v.member.name }

// ToTarget is the proxy by which plugins of the cluster reach a server at address.
func (c *VaultCluster) ToTarget(address string) (*Proxy, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.targets[address]; p != nil {
		return p, nil
	}
	p, err := NewOwnedProxy(address, c.ownerOf)
	if err == nil {
		c.targets[address] = p
	}
	return p, err
}

// CutPeers takes a node off the network of the cluster, in both directions. When
// silent, nothing tells the nodes: connections stay open and nothing arrives.
func (c *VaultCluster) CutPeers(v *Vault, silent bool) {
	if silent {
		v.member.link.Blackhole(true)
	} else {
		v.member.link.Cut(true)
	}
	for _, other := range c.Nodes {
		if other != v {
			other.member.link.Isolate(v.member.name, silent)
		}
	}
}

// HealPeers ends CutPeers. Connections that have lost something end.
func (c *VaultCluster) HealPeers(v *Vault) {
	v.member.link.Cut(true)
	v.member.link.Heal()
	for _, other := range c.Nodes {
		other.member.link.Rejoin()
	}
}

// CutTargets takes the targets away from a node's plugin.
func (c *VaultCluster) CutTargets(v *Vault, silent bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.targets {
		p.Isolate(v.member.name, silent)
	}
}

// HealTargets ends CutTargets, and says how many connections or messages that has
// kept from their way.
func (c *VaultCluster) HealTargets() (kept int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range c.targets {
		kept += p.Rejoin()
	}
	return kept
}

// ownerOf is the name of the node whose server, or plugin, has the other end of a
// connection; "" when it is somebody else's.
func (c *VaultCluster) ownerOf(client, here net.Addr) string {
	inode, err := socketOf(client, here)
	if err != nil {
		return ""
	}
	for _, v := range c.Nodes {
		if pid := v.PID(); pid != 0 && holdsSocket(pid, inode) {
			return v.member.name
		}
	}
	programs, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return ""
	}
	for _, exe := range programs {
		program, err := os.Readlink(exe)
		if err != nil {
			continue // it has ended
		}
		for _, v := range c.Nodes {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(exe)))
			if err == nil && filepath.Dir(program) == v.pluginDir && holdsSocket(pid, inode) {
				return v.member.name
			}
		}
	}
	return ""
}

func (m *member) file(name string) string { return filepath.Join(m.dir, name) }

func (m *member) writeFiles() error {
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return err
	}
	cert, key, err := m.cluster.ca.Issue("localhost", "127.0.0.1")
	if err != nil {
		return err
	}
	for name, content := range map[string]string{"ca.pem": m.cluster.ca.PEM, "cert.pem": cert, "key.pem": key} {
		if err := os.WriteFile(m.file(name), []byte(content), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// listen makes the way by which the other nodes reach this one, whose API has port.
func (m *member) listen(port int) (err error) {
	if m.link != nil {
		if err := m.link.Close(); err != nil {
			return err
		}
	}
	m.link, err = NewOwnedProxy(loopback(port+10000), m.cluster.ownerOf)
	return err
}

// config is the file of a member. Raft's timeouts are Vault's own: on a busy machine
// shorter ones keep nodes from ever agreeing.
func (m *member) config(v *Vault, listen, cluster string) []byte {
	return fmt.Appendf(nil, `
disable_mlock        = true
ui                   = false
raw_storage_endpoint = %t
plugin_directory     = %q
api_addr             = "https://%s"
cluster_addr         = "https://%s"

listener "tcp" {
  address         = %q
  cluster_address = %q
  tls_cert_file   = %q
  tls_key_file    = %q
}

storage "raft" {
  path    = %q
  node_id = %q
}
`, v.options.RawStorage, v.pluginDir, listen, m.link.Addr(), listen, cluster,
		m.file("cert.pem"), m.file("key.pem"), filepath.Join(v.dir, "data"), m.name)
}

// join starts a node that nobody has used yet, as a member of the cluster of first.
func (v *Vault) join(ctx context.Context, first *Vault) error {
	if err := v.listen(ctx); err != nil {
		return err
	}
	v.unsealKey, v.Token = first.unsealKey, first.Token
	v.client.SetToken(v.Token)
	_, err := v.client.Sys().RaftJoinWithContext(ctx, &api.RaftJoinRequest{
		LeaderAPIAddr: first.Address, LeaderCACert: first.member.cluster.ca.PEM,
	})
	if err != nil {
		return fmt.Errorf("joining %s: %w", first.member.name, err)
	}
	return v.awaitUnsealed(ctx)
}

// awaitUnsealed returns when the node is the active one, or knows it.
func (v *Vault) awaitUnsealed(ctx context.Context) error {
	return v.await(ctx, func() error {
		status, err := v.client.Sys().SealStatusWithContext(ctx)
		if err != nil {
			return err
		}
		if status.Sealed {
			return errors.Join(errors.New("it is sealed"), v.Unseal(ctx))
		}
		leader, err := v.client.Sys().LeaderWithContext(ctx)
		if err == nil && leader.LeaderAddress == "" {
			err = errors.New("it knows of no active node")
		}
		return err
	})
}

// socketOf is the inode of the socket at one end of a connection. The kernel is asked for
// that one: its table in /proc may leave one out while others come and go.
func socketOf(end, other net.Addr) (string, error) {
	s, err := netlink.SocketGet(end, other)
	if err != nil {
		return "", fmt.Errorf("the socket at %s: %w", end, err)
	}
	return strconv.FormatUint(uint64(s.INode), 10), nil
}

func holdsSocket(pid int, inode string) bool {
	descriptors, err := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "fd", "*"))
	if err != nil {
		return false
	}
	for _, d := range descriptors {
		if to, err := os.Readlink(d); err == nil && to == "socket:["+inode+"]" {
			return true
		}
	}
	return false
}
