package kube

import (
	"context"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/tools/cache"
)

// follower is told what there is of one kind: put is called for every object
// that is new or has changed, gone for one that is not there any more.
type follower struct {
	put, gone func(metav1.Object)

	synced chan struct{} // closed when put was called for all that there was
	once   sync.Once
	there  map[types.UID]metav1.Object
}

func newFollower(put, gone func(metav1.Object)) *follower {
	return &follower{put: put, gone: gone, synced: make(chan struct{}), there: map[types.UID]metav1.Object{}}
}

// follow follows the objects of a kind of the core API until ctx ends, those of
// every namespace where it is "". While the API server is down it asks again
// within a second; client-go's own informers wait for up to a minute.
func (c *Cluster) follow(ctx context.Context, resource, namespace string, kind runtime.Object, f *follower) {
	objects := cache.NewListWatchFromClient(c.Core.RESTClient(), resource, namespace, fields.Everything())
	cache.NewReflectorWithOptions(objects, kind, f, cache.ReflectorOptions{
		Backoff: &wait.Backoff{Duration: 100 * time.Millisecond, Factor: 2, Steps: 4, Cap: time.Second},
	}).RunWithContext(ctx)
}

// Add, Update, Delete, Replace and Resync are what a reflector calls.
func (f *follower) Add(object any) error { return f.Update(object) }

// Update takes an object that is new or has changed.
func (f *follower) Update(object any) error {
	o, err := meta.Accessor(object)
	if err != nil {
		return err
	}
	f.there[o.GetUID()] = o
	f.put(o)
	return nil
}

// Delete takes one that is gone.
func (f *follower) Delete(object any) error {
	o, err := meta.Accessor(object)
	if err != nil {
		return err
	}
	delete(f.there, o.GetUID())
	f.gone(o)
	return nil
}

// Replace takes all that there is.
func (f *follower) Replace(objects []any, _ string) error {
	before := f.there
	f.there = map[types.UID]metav1.Object{}
	for _, object := range objects {
		if err := f.Update(object); err != nil {
			return err
		}
	}
	for uid, o := range before {
		if f.there[uid] == nil {
			f.gone(o)
		}
	}
	f.once.Do(func() { close(f.synced) })
	return nil
}

// Resync has nothing to do.
func (f *follower) Resync() error { return nil }
