package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Annotations of the template of pods that a Simulator runs. Such pods are
// started by KWOK, and ready when they have logged in: without a Simulator they
// never are.
const (
	simulated   = "sim/secret"       // a Secret of their namespace
	simTarget   = "sim/target"       // redis, postgresql, rabbitmq, or none for no login at all
	simAddr     = "sim/addr"         // of the server
	simUsername = "sim/username-key" // a key of the Secret, "username" where it is not said
	simPassword = "sim/password-key" // another one, "password"
	simUser     = "sim/username"     // the name itself, where the Secret does not have it
	simEvery    = "sim/every"        // how long from one login to the next, "100ms"
)

// Figures count what pods saw.
type Figures struct {
	Logins  int // that went well
	Refused int // ErrRefused
	Failed  int // for another reason: the server is down
}

func (f Figures) plus(g Figures) Figures {
	return Figures{f.Logins + g.Logins, f.Refused + g.Refused, f.Failed + g.Failed}
}

// SimulatedPod is what a Simulator knows of a pod.
type SimulatedPod struct {
	Namespace, Name, Workload string
	Username, Password        string            // what it took from the Secret when it started last
	Values                    map[string]string // all that the Secret held then
	SecretVersion             string            // the resource version that these had
	Ready, Gone               bool
	Restarts                  int
	Figures
}

// Simulator is the program in the containers of pods that have the annotations
// above. As a container does, it takes its credential from the Secret when it
// starts and never looks again; it logs in, is ready then, and logs in again
// and again for as long as its pod is there. One that cannot log in at the start
// crashes and is started again, with what the Secret holds by then.
type Simulator struct {
	cluster *Cluster
	options simulatorOptions
	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex
	pods    map[types.UID]*simulation
	crash   func(SimulatedPod) bool
	hang    func(SimulatedPod) bool
	changed chan struct{} // closed and made anew with every change
	seen    map[workload][]seenSecret
}

type seenSecret struct {
	at     time.Time
	secret *corev1.Secret
}

// SimulatorOption changes what a Simulator does.
type SimulatorOption func(*simulatorOptions)

type simulatorOptions struct {
	namespace  string
	crashAfter int
	lag        time.Duration
	backoff    time.Duration
	logins     map[string]Login
	clients    map[string]Client
}

// InNamespace leaves the pods of other namespaces alone. A pod must have no more
// than one Simulator.
func InNamespace(name string) SimulatorOption {
	return func(o *simulatorOptions) { o.namespace = name }
}

// WithCrashAfter lets a pod crash that is refused n times one after the other.
// Otherwise only one that is starting does.
func WithCrashAfter(n int) SimulatorOption { return func(o *simulatorOptions) { o.crashAfter = n } }

// WithSecretLag gives pods what a Secret held this long ago, as the cache of a
// kubelet may.
func WithSecretLag(d time.Duration) SimulatorOption { return func(o *simulatorOptions) { o.lag = d } }

// WithBackoff changes how long a crashed container waits at first: 500 ms. It
// doubles up to ten times that.
func WithBackoff(d time.Duration) SimulatorOption {
	return func(o *simulatorOptions) { o.backoff = d }
}

// WithLogin adds a kind of target, or replaces one.
func WithLogin(target string, login Login) SimulatorOption {
	return func(o *simulatorOptions) { o.logins[target] = login }
}

// Simulate starts a Simulator, for every namespace unless it is told otherwise.
// Stop ends it.
func (c *Cluster) Simulate(opts ...SimulatorOption) *Simulator {
	s := &Simulator{
		cluster: c, options: simulatorOptions{backoff: 500 * time.Millisecond, logins: maps.Clone(logins)},
		pods: map[types.UID]*simulation{}, changed: make(chan struct{}), seen: map[workload][]seenSecret{},
	}
	for _, opt := range opts {
		opt(&s.options)
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if s.options.lag > 0 {
		secrets := newFollower(s.see, func(metav1.Object) {})
		s.running.Go(func() { c.follow(s.ctx, "secrets", s.options.namespace, &corev1.Secret{}, secrets) })
		<-secrets.synced
	}
	pods := newFollower(s.adopt, s.leave)
	s.running.Go(func() { c.follow(s.ctx, "pods", s.options.namespace, &corev1.Pod{}, pods) })
	return s
}

// Stop ends all pods' logins and returns when they have ended. The figures stay.
func (s *Simulator) Stop() {
	s.cancel()
	s.running.Wait()
}

// CrashWhen makes containers crash for which crash returns true. It is asked
// when one starts and before each of its logins. A nil function ends that.
func (s *Simulator) CrashWhen(crash func(SimulatedPod) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.crash = crash
}

// HangWhen makes containers that start do nothing, and so never be ready, for as
// long as hang returns true of them. A nil function ends that.
func (s *Simulator) HangWhen(hang func(SimulatedPod) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hang = hang
	close(s.changed)
	s.changed = make(chan struct{})
}

// Pods are all pods that there were, the oldest first.
func (s *Simulator) Pods(namespace, workloadName string) []SimulatedPod {
	s.mu.Lock()
	defer s.mu.Unlock()
	var pods []SimulatedPod
	for _, p := range s.inOrder() {
		if p.known.Namespace == namespace && p.known.Workload == workloadName {
			pods = append(pods, p.known)
		}
	}
	return pods
}

func (s *Simulator) inOrder() []*simulation {
	return slices.SortedFunc(maps.Values(s.pods), func(a, b *simulation) int { return cmp.Compare(a.number, b.number) })
}

// Workload is the sum of all pods of a workload, of those that are gone too.
func (s *Simulator) Workload(namespace, name string) Figures {
	var sum Figures
	for _, p := range s.Pods(namespace, name) {
		sum = sum.plus(p.Figures)
	}
	return sum
}

// Total is the sum of all pods.
func (s *Simulator) Total() Figures {
	s.mu.Lock()
	defer s.mu.Unlock()
	var sum Figures
	for _, p := range s.pods {
		sum = sum.plus(p.known.Figures)
	}
	return sum
}

// Wait returns when ok is true of the pods of a workload, which it is asked
// after every login.
func (s *Simulator) Wait(ctx context.Context, namespace, name string, ok func([]SimulatedPod) bool) error {
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		pods := s.Pods(namespace, name)
		if ok(pods) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%w, while %d pods of %s saw %+v", ctx.Err(), len(pods), name, s.Workload(namespace, name))
		}
	}
}

// see keeps what a Secret holds.
func (s *Simulator) see(object metav1.Object) {
	secret, ok := object.(*corev1.Secret)
	if !ok {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := workload{secret.Namespace, secret.Name}
	s.seen[key] = append(s.seen[key], seenSecret{time.Now(), secret})
}

// adopt starts the container of a pod that KWOK has started.
func (s *Simulator) adopt(object metav1.Object) {
	pod, ok := object.(*corev1.Pod)
	if !ok || pod.Annotations[simulated] == "" || pod.Status.Phase != corev1.PodRunning {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pods[pod.UID] != nil || s.ctx.Err() != nil {
		return
	}
	p := &simulation{simulator: s, pod: pod, number: len(s.pods)}
	p.known = SimulatedPod{Namespace: pod.Namespace, Name: pod.Name, Workload: workloadOf(pod).name}
	s.pods[pod.UID] = p
	ctx, cancel := context.WithCancel(s.ctx)
	p.cancel = cancel
	s.running.Go(func() {
		defer cancel()
		p.run(ctx)
	})
}

// leave ends what ran for a pod that is gone.
func (s *Simulator) leave(object metav1.Object) {
	s.mu.Lock()
	p := s.pods[object.GetUID()]
	s.mu.Unlock()
	if p == nil {
		return
	}
	p.cancel()
	p.update(func(known *SimulatedPod) { known.Gone, known.Ready = true, false })
}

// secret reads what a container that starts now is given.
func (s *Simulator) secret(ctx context.Context, namespace, name string) (*corev1.Secret, error) {
	if s.options.lag == 0 {
		return s.cluster.Core.Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	all, then := s.seen[workload{namespace, name}], time.Now().Add(-s.options.lag)
	if len(all) == 0 {
		return nil, fmt.Errorf("secret %q not found", name)
	}
	for _, version := range slices.Backward(all) {
		if version.at.Before(then) {
			return version.secret, nil
		}
	}
	return all[0].secret, nil
}

// simulation is one pod.
type simulation struct {
	simulator *Simulator
	pod       *corev1.Pod
	number    int
	cancel    context.CancelFunc
	known     SimulatedPod // under the lock of the simulator
}

func (p *simulation) update(change func(*SimulatedPod)) {
	s := p.simulator
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&p.known)
	close(s.changed)
	s.changed = make(chan struct{})
}

// run starts the container, again when it ends, until the pod is gone.
func (p *simulation) run(ctx context.Context) {
	backoff := p.simulator.options.backoff
	for restarts := 0; ctx.Err() == nil; {
		started := time.Now()
		username, password, err := p.credential(ctx)
		if err != nil {
			// A kubelet waits with this until the Secret has what is asked for.
			p.set(ctx, waiting(restarts, "CreateContainerConfigError", err.Error()))
			pause(ctx, p.simulator.options.backoff)
			continue
		}
		if !p.crashes(ctx, username, password, restarts) {
			return
		}
		restarts++
		p.update(func(known *SimulatedPod) { known.Restarts, known.Ready = restarts, false })
		p.set(ctx, waiting(restarts, "CrashLoopBackOff", "back-off restarting failed container"))
		if time.Since(started) > 10*p.simulator.options.backoff {
			backoff = p.simulator.options.backoff
		}
		pause(ctx, backoff)
		backoff = min(2*backoff, 10*p.simulator.options.backoff)
	}
}

// credential is what the container finds in its environment.
func (p *simulation) credential(ctx context.Context) (username, password string, err error) {
	secret, err := p.simulator.secret(ctx, p.pod.Namespace, p.pod.Annotations[simulated])
	if err != nil {
		return "", "", err
	}
	username = p.pod.Annotations[simUser]
	usernameKey := cmp.Or(p.pod.Annotations[simUsername], "username")
	passwordKey := cmp.Or(p.pod.Annotations[simPassword], "password")
	if username == "" {
		if username = string(secret.Data[usernameKey]); username == "" {
			return "", "", fmt.Errorf("couldn't find key %s in Secret %s/%s", usernameKey, secret.Namespace, secret.Name)
		}
	}
	if password = string(secret.Data[passwordKey]); password == "" {
		return "", "", fmt.Errorf("couldn't find key %s in Secret %s/%s", passwordKey, secret.Namespace, secret.Name)
	}
	p.update(func(known *SimulatedPod) {
		known.Username, known.Password, known.SecretVersion, known.Values = username, password, secret.ResourceVersion, texts(secret.Data)
	})
	return username, password, nil
}

// crashes is the life of the container. It returns true when that ended, and
// false when the pod did.
func (p *simulation) crashes(ctx context.Context, username, password string, restarts int) bool {
	every, err := time.ParseDuration(cmp.Or(p.pod.Annotations[simEvery], "100ms"))
	login := p.loginTo()
	if err != nil || login == nil {
		p.simulator.cluster.Log(p.pod.Namespace, p.pod.Name,
			fmt.Sprintf("%s is %q, %s is %q: one of them is wrong", simTarget, p.pod.Annotations[simTarget], simEvery, p.pod.Annotations[simEvery]))
		return true
	}
	refused := 0
	p.hangs(ctx)
	for first := true; ; first = false {
		if p.mustCrash() {
			return true
		}
		err := p.login(ctx, login, username, password)
		switch {
		case ctx.Err() != nil:
			return false
		case errors.Is(err, ErrRefused):
			refused++
		default:
			refused = 0
		}
		if first && err != nil || refused > 0 && refused == p.simulator.options.crashAfter {
			return true
		}
		if first {
			p.update(func(known *SimulatedPod) { known.Ready = true })
			p.set(ctx, ready(restarts))
		}
		pause(ctx, every)
	}
}

// hangs returns when the container need not hang any more.
func (p *simulation) hangs(ctx context.Context) {
	s := p.simulator
	for {
		s.mu.Lock()
		hang, known, changed := s.hang, p.known, s.changed
		s.mu.Unlock()
		if hang == nil || !hang(known) {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (p *simulation) mustCrash() bool {
	s := p.simulator
	s.mu.Lock()
	crash, known := s.crash, p.known
	s.mu.Unlock()
	return crash != nil && crash(known)
}

// login logs in once and counts it, unless the pod went meanwhile: a pod that is
// gone may be refused before its end is known here.
func (p *simulation) login(ctx context.Context, login Login, username, password string) error {
	bounded, cancel := context.WithTimeout(ctx, loginWithin)
	defer cancel()
	err := login(bounded, p.pod.Annotations[simAddr], username, password)
	if errors.Is(err, ErrRefused) && p.gone(ctx) {
		p.cancel()
	}
	if ctx.Err() != nil {
		return err
	}
	p.update(func(known *SimulatedPod) {
		switch {
		case err == nil:
			known.Logins++
		case errors.Is(err, ErrRefused):
			known.Refused++
		default:
			known.Failed++
		}
	})
	return err
}

// gone asks the API server; one that does not answer knows nothing of it.
func (p *simulation) gone(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, loginWithin)
	defer cancel()
	pod, err := p.simulator.cluster.Core.Pods(p.pod.Namespace).Get(ctx, p.pod.Name, metav1.GetOptions{})
	return apierrors.IsNotFound(err) || err == nil && pod.UID != p.pod.UID
}

// containerState is what set writes of every container.
type containerState struct {
	ready    bool
	restarts int
	state    corev1.ContainerState
}

func ready(restarts int) containerState {
	return containerState{true, restarts, corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}}
}

func waiting(restarts int, reason, message string) containerState {
	return containerState{false, restarts, corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}
}

// set writes the status of the pod, as a kubelet does: until it is written.
func (p *simulation) set(ctx context.Context, to containerState) {
	status, reason := corev1.ConditionFalse, "ContainersNotReady"
	if to.ready {
		status, reason = corev1.ConditionTrue, ""
	}
	var conditions []map[string]any
	for _, kind := range []corev1.PodConditionType{corev1.PodReady, corev1.ContainersReady} {
		conditions = append(conditions, map[string]any{"type": kind, "status": status, "reason": reason, "lastTransitionTime": metav1.Now()})
	}
	var containers []corev1.ContainerStatus
	for _, container := range p.pod.Spec.Containers {
		one := corev1.ContainerStatus{
			Name: container.Name, Image: container.Image, Ready: to.ready, Started: &to.ready, RestartCount: int32(to.restarts), State: to.state,
		}
		if to.restarts > 0 {
			one.LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: 1, Reason: "Error", FinishedAt: metav1.Now()}
		}
		containers = append(containers, one)
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": p.pod.UID},
		"status":   map[string]any{"conditions": conditions, "containerStatuses": containers},
	})
	if err != nil {
		return
	}
	for ctx.Err() == nil {
		_, err := p.simulator.cluster.Core.Pods(p.pod.Namespace).Patch(
			ctx, p.pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
		if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) { // the pod is gone
			return
		}
		pause(ctx, 100*time.Millisecond)
	}
}

// pause waits for d, or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
