package kube

import "context"

// Client is what a container does again and again, with all that its Secret held when
// it started (SimulatedPod.Values). Its error is ErrRefused where a server says no.
type Client func(ctx context.Context, pod SimulatedPod) error

// WithClient adds a kind of target that takes more than a user and a password.
func WithClient(target string, client Client) SimulatorOption {
	return func(o *simulatorOptions) {
		if o.clients == nil {
			o.clients = map[string]Client{}
		}
		o.clients[target] = client
	}
}

// loginTo is what the container does at its target; nil where nobody knows that.
func (p *simulation) loginTo() Login {
	target := p.pod.Annotations[simTarget]
	client := p.simulator.options.clients[target]
	if client == nil {
		return p.simulator.options.logins[target]
	}
	return func(ctx context.Context, _, _, _ string) error {
		p.simulator.mu.Lock()
		known := p.known
		p.simulator.mu.Unlock()
		return client(ctx, known)
	}
}

func texts(data map[string][]byte) map[string]string {
	out := make(map[string]string, len(data))
	for k, v := range data {
		out[k] = string(v)
	}
	return out
}

// LoginTo is what pods with this target do: redis, postgresql, rabbitmq or none.
func LoginTo(target string) Login { return logins[target] }
