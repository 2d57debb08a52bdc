package kube

import "fmt"

func (c *Cluster) etcdFlags() []string {
	client, peer := fmt.Sprintf("http://127.0.0.1:%d", c.ports.etcd), fmt.Sprintf("http://127.0.0.1:%d", c.ports.peer)
	return []string{
		"--name=etcd", "--data-dir=" + c.file("etcd/data"), "--log-level=warn",
		"--listen-client-urls=" + client, "--advertise-client-urls=" + client,
		"--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer, "--initial-cluster=etcd=" + peer,
		// What a killed process has written stays; only a machine that fails loses it.
		"--unsafe-no-fsync",
	}
}

func (c *Cluster) apiServerFlags() []string {
	return []string{
		fmt.Sprintf("--etcd-servers=http://127.0.0.1:%d", c.ports.etcd),
		"--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", c.ports.api),
		"--tls-cert-file=" + c.file("apiserver.crt"), "--tls-private-key-file=" + c.file("apiserver.key"),
		"--cert-dir=" + c.file("kube-apiserver"),
		// The endpoint of the service kubernetes must not be a loopback address.
		"--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.96.0.0/16",
		"--authorization-mode=Node,RBAC", "--token-auth-file=" + c.file("tokens.csv"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + c.file("serviceaccounts.key"),
		"--service-account-signing-key-file=" + c.file("serviceaccounts.key"),
		"--egress-selector-config-file=" + c.file("egress.yaml"),
		"--kubelet-preferred-address-types=InternalIP", "--kubelet-certificate-authority=" + c.CAFile,
		"--audit-policy-file=" + c.file("audit.yaml"), "--audit-log-path=" + c.file("audit.log"),
		"--profiling=false",
	}
}

// The controllers are administrators: with a role of their own they need
// service accounts, which they take ten seconds to make.
func (c *Cluster) controllerFlags() []string {
	return []string{
		"--kubeconfig=" + c.Kubeconfig, "--leader-elect=false",
		"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", c.ports.controllers), "--cert-dir=" + c.file("kube-controller-manager"),
		"--service-account-private-key-file=" + c.file("serviceaccounts.key"), "--root-ca-file=" + c.CAFile,
		// While the API server is down the node cannot say that it is well, and no
		// kubelet makes pods ready again.
		"--node-monitor-grace-period=24h",
		"--profiling=false",
	}
}

func (c *Cluster) schedulerFlags() []string {
	return []string{
		"--kubeconfig=" + c.file("scheduler.kubeconfig"), "--leader-elect=false",
		"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", c.ports.scheduler), "--cert-dir=" + c.file("kube-scheduler"),
		"--profiling=false",
	}
}

// Without --node-port and --server-address KWOK serves nothing: logs are served
// by network.
func (c *Cluster) kwokFlags() []string {
	return []string{
		"--kubeconfig=" + c.Kubeconfig, "--config=" + c.file("kwok.yaml"),
		"--manage-all-nodes=true",
		// A KWOK that starts afresh would wait for the lease of the one before.
		"--node-lease-duration-seconds=0",
		"--cidr=" + podNetwork, "--node-ip=" + nodeAddress,
	}
}
