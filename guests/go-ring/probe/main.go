// Command go-probe is what the parent's tests look through, as guests/probe is for kube-rs. PROBE
// says what it does, in the namespace NAMESPACE. All objects are ConfigMaps.
//
//	apply      for each labelled probe=apply: server-side apply of data.key=probe as field manager
//	           probe, without force; upon a conflict writes it to data.message of NAME-conflict, then
//	           applies with force
//	conflict   for each labelled probe=conflict: updates it from an old copy, writes the API server's
//	           words to data.message of NAME-conflict, then retries until it has data.key=probe
//	deep       for each labelled probe=deep: reads, copies and writes JSON as deep as parsers allow, and
//	           writes how deep to data.depth of NAME-out
//	events     for each labelled probe=events: records an Event about it with reason Probed
//	finalizer  for each labelled probe=finalizer: holds a finalizer; writes NAME-applied, and upon
//	           deletion NAME-cleaned
//	idle       for each labelled probe=idle: writes NAME-seen and has nothing more to do
//	informer   client-go's informer factory, without controller-runtime: writes the names that it
//	           sees, joined, to data.names of informer-out
//	list       lists all in pages of 500 by a typed, a dynamic and a metadata client, and by a cache,
//	           and writes the counts to list-out
//	owns       for each labelled probe=owns: CreateOrUpdate of a NAME-owned that it owns
//	requeue    for each labelled probe=requeue: adds the time in ms to data.times (comma-separated)
//	           of NAME-out, and again every 2 s
//	retry      for each labelled probe=retry: fails three times, adds the time as above, then is done
//	stop       writes started; upon the request to stop writes stopped and ends with code 0
//	panic, exit, spin, grow, recurse
//	           does so when one of that name appears; at its start increases data.starts of started
//
// QUEUE=classic takes the classic work queue instead of the priority queue.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sort"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/events"
	"k8s.io/client-go/util/retry"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/config"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
)

const done = "probe.amurant.io/done"

type prober struct {
	client.Client
	namespace string
	recorder  events.EventRecorder
	failures  int
}

type reconcile func(context.Context, *corev1.ConfigMap) (ctrl.Result, error)

// put writes a ConfigMap, whoever owns its fields.
func (p *prober) put(ctx context.Context, name string, data map[string]string) error {
	wanted := applycorev1.ConfigMap(name, p.namespace).WithData(data)
	return p.Apply(ctx, wanted, client.FieldOwner("probe-out"), client.ForceOwnership)
}

func (p *prober) get(ctx context.Context, name string) (*corev1.ConfigMap, error) {
	var found corev1.ConfigMap
	err := p.Get(ctx, client.ObjectKey{Namespace: p.namespace, Name: name}, &found)
	return &found, client.IgnoreNotFound(err)
}

// stamp adds the time to NAME-out.
func (p *prober) stamp(ctx context.Context, object *corev1.ConfigMap) error {
	name := object.Name + "-out"
	before, err := p.get(ctx, name)
	if err != nil {
		return err
	}
	times := strconv.FormatInt(time.Now().UnixMilli(), 10)
	if earlier := before.Data["times"]; earlier != "" {
		times = earlier + "," + times
	}
	return p.put(ctx, name, map[string]string{"times": times})
}

func (p *prober) apply(ctx context.Context, object *corev1.ConfigMap) (ctrl.Result, error) {
	wanted := applycorev1.ConfigMap(object.Name, p.namespace).WithData(map[string]string{"key": "probe"})
	err := p.Apply(ctx, wanted, client.FieldOwner("probe"))
	if apierrors.IsConflict(err) {
		if err := p.put(ctx, object.Name+"-conflict", map[string]string{"message": err.Error()}); err != nil {
			return ctrl.Result{}, err
		}
		err = p.Apply(ctx, wanted, client.FieldOwner("probe"), client.ForceOwnership)
	}
	return ctrl.Result{}, err
}

func (p *prober) conflict(ctx context.Context, object *corev1.ConfigMap) (ctrl.Result, error) {
	if object.Data["key"] == "probe" {
		return ctrl.Result{}, nil
	}
	newer := object.DeepCopy()
	newer.Data = map[string]string{"key": "other"}
	if err := p.Update(ctx, newer); err != nil {
		return ctrl.Result{}, err
	}
	object.Data = map[string]string{"key": "probe"}
	err := p.Update(ctx, object)
	if !apierrors.IsConflict(err) {
		return ctrl.Result{}, fmt.Errorf("no conflict: %w", err)
	}
	if err := p.put(ctx, object.Name+"-conflict", map[string]string{"message": err.Error()}); err != nil {
		return ctrl.Result{}, err
	}
	return ctrl.Result{}, retry.RetryOnConflict(retry.DefaultRetry, func() error {
		current, err := p.get(ctx, object.Name)
		if err != nil {
			return err
		}
		current.Data = map[string]string{"key": "probe"}
		return p.Update(ctx, current)
	})
}

func (p *prober) owns(ctx context.Context, object *corev1.ConfigMap) (ctrl.Result, error) {
	owned := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, Name: object.Name + "-owned"}}
	_, err := controllerutil.CreateOrUpdate(ctx, p.Client, owned, func() error {
		return controllerutil.SetControllerReference(object, owned, p.Scheme())
	})
	return ctrl.Result{}, err
}

func (p *prober) finalize(ctx context.Context, object *corev1.ConfigMap) (ctrl.Result, error) {
	if object.DeletionTimestamp.IsZero() {
		if controllerutil.AddFinalizer(object, done) {
			if err := p.Update(ctx, object); err != nil {
				return ctrl.Result{}, err
			}
		}
		return ctrl.Result{}, p.put(ctx, object.Name+"-applied", nil)
	}
	if err := p.put(ctx, object.Name+"-cleaned", nil); err != nil {
		return ctrl.Result{}, err
	}
	if controllerutil.RemoveFinalizer(object, done) {
		return ctrl.Result{}, client.IgnoreNotFound(p.Update(ctx, object))
	}
	return ctrl.Result{}, nil
}

func (p *prober) publish(_ context.Context, object *corev1.ConfigMap) (ctrl.Result, error) {
	p.recorder.Eventf(object, nil, corev1.EventTypeNormal, "Probed", "Probe", "seen by the probe")
	return ctrl.Result{}, nil
}

func (p *prober) requeue(ctx context.Context, object *corev1.ConfigMap) (ctrl.Result, error) {
	return ctrl.Result{RequeueAfter: 2 * time.Second}, p.stamp(ctx, object)
}

func (p *prober) retry(ctx context.Context, object *corev1.ConfigMap) (ctrl.Result, error) {
	if p.failures < 3 {
		p.failures++
		return ctrl.Result{}, errors.New("as asked")
	}
	return ctrl.Result{}, p.stamp(ctx, object)
}

func (p *prober) idle(ctx context.Context, object *corev1.ConfigMap) (ctrl.Result, error) {
	return ctrl.Result{}, p.put(ctx, object.Name+"-seen", nil)
}

// list counts all objects in every way that there is.
func (p *prober) list(ctx context.Context, cached client.Reader) error {
	counts := map[string]string{}
	pages := func(kind string, list client.ObjectList) error {
		number, objects := 0, 0
		for token := ""; ; {
			options := &client.ListOptions{Namespace: p.namespace, Limit: 500, Continue: token}
			if err := p.List(ctx, list, options); err != nil {
				return fmt.Errorf("%s: %w", kind, err)
			}
			number++
			objects += meta.LenList(list)
			if token = list.GetContinue(); token == "" {
				counts[kind] = fmt.Sprintf("%d in %d pages", objects, number)
				return nil
			}
		}
	}
	dynamic := &unstructured.UnstructuredList{}
	dynamic.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("ConfigMapList"))
	metadata := &metav1.PartialObjectMetadataList{}
	metadata.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("ConfigMapList"))
	err := errors.Join(pages("typed", &corev1.ConfigMapList{}), pages("unstructured", dynamic), pages("metadata", metadata))
	if err != nil {
		return err
	}
	var all corev1.ConfigMapList
	if err := cached.List(ctx, &all, client.InNamespace(p.namespace)); err != nil {
		return err
	}
	counts["cached"] = strconv.Itoa(len(all.Items))
	return p.put(ctx, "list-out", counts)
}

// started counts the starts of this child.
func (p *prober) started(ctx context.Context) error {
	before, err := p.get(ctx, "started")
	if err != nil {
		return err
	}
	starts, _ := strconv.Atoi(before.Data["starts"])
	return p.put(ctx, "started", map[string]string{"starts": strconv.Itoa(starts + 1)})
}

// deep follows JSON to the depth at which encoding/json gives up.
func (p *prober) deep(ctx context.Context, object *corev1.ConfigMap) (ctrl.Result, error) {
	const depth = 10_000
	text := strings.Repeat("[", depth) + strings.Repeat("]", depth)
	var value any
	if err := json.Unmarshal([]byte(text), &value); err != nil {
		return ctrl.Result{}, err
	}
	back, err := json.Marshal(runtime.DeepCopyJSONValue(value))
	if err != nil {
		return ctrl.Result{}, err
	}
	data := map[string]string{"depth": strconv.Itoa(len(back) / 2)}
	return ctrl.Result{}, p.put(ctx, object.Name+"-out", data)
}

// misbehave does what its name says.
func misbehave(how string) {
	switch how {
	case "panic":
		// One in Reconcile would be caught.
		go panic("as asked")
	case "exit":
		os.Exit(3)
	case "spin":
		for i := 0; ; i++ {
			if i < 0 {
				break
			}
		}
	case "grow":
		var kept [][]byte
		for {
			kept = append(kept, make([]byte, 1<<20))
		}
	case "recurse":
		fmt.Println(depth(0))
	}
}

func depth(n int) int {
	if n < 0 {
		return n
	}
	return depth(n+1) + 1
}

// inform is an operator of the old kind: client-go's informers and nothing else.
func inform(ctx context.Context, p *prober, configuration *rest.Config) error {
	clientset, err := kubernetes.NewForConfig(configuration)
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactoryWithOptions(clientset, 10*time.Hour, informers.WithNamespace(p.namespace))
	maps := factory.Core().V1().ConfigMaps()
	changes := make(chan struct{}, 1)
	change := func(object any) {
		if m, ok := object.(*corev1.ConfigMap); ok && m.Name == "informer-out" {
			return
		}
		select {
		case changes <- struct{}{}:
		default:
		}
	}
	handler := toolscache.ResourceEventHandlerFuncs{AddFunc: change, DeleteFunc: change, UpdateFunc: func(_, object any) { change(object) }}
	if _, err := maps.Informer().AddEventHandler(handler); err != nil {
		return err
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	for {
		select {
		case <-ctx.Done():
			factory.Shutdown()
			return nil
		case <-changes:
		}
		seen, err := maps.Lister().ConfigMaps(p.namespace).List(labels.SelectorFromSet(labels.Set{"probe": "informer"}))
		if err != nil {
			return err
		}
		var names []string
		for _, m := range seen {
			names = append(names, m.Name)
		}
		sort.Strings(names)
		if err := p.put(ctx, "informer-out", map[string]string{"names": strings.Join(names, ",")}); err != nil {
			return err
		}
	}
}

func run(probe string) error {
	namespace := os.Getenv("NAMESPACE")
	priority := os.Getenv("QUEUE") != "classic"
	configuration := ctrl.GetConfigOrDie()
	manager, err := ctrl.NewManager(configuration, ctrl.Options{
		Metrics:    metricsserver.Options{BindAddress: ":8080"},
		Cache:      cache.Options{DefaultNamespaces: map[string]cache.Config{namespace: {}}},
		Client:     client.Options{Cache: &client.CacheOptions{DisableFor: []client.Object{&corev1.ConfigMap{}}}},
		Controller: config.Controller{UsePriorityQueue: &priority},
	})
	if err != nil {
		return err
	}
	p := &prober{Client: manager.GetClient(), namespace: namespace, recorder: manager.GetEventRecorder("probe")}
	ctx := ctrl.SetupSignalHandler()

	reconcilers := map[string]reconcile{
		"apply": p.apply, "conflict": p.conflict, "deep": p.deep, "events": p.publish, "finalizer": p.finalize, "idle": p.idle,
		"owns": p.owns, "requeue": p.requeue, "retry": p.retry,
	}
	act, labelled := reconcilers[probe], true
	switch probe {
	case "informer":
		return inform(ctx, p, configuration)
	case "panic", "exit", "spin", "grow", "recurse":
		labelled = false
		act = func(_ context.Context, object *corev1.ConfigMap) (ctrl.Result, error) {
			if object.Name == probe {
				misbehave(probe)
			}
			return ctrl.Result{}, nil
		}
		err = p.started(ctx)
	case "stop":
		act = p.idle
		err = p.started(ctx)
	case "list":
		act = p.idle
		// The cache is full once it says so.
		err = manager.Add(runnable(func(ctx context.Context) error { return p.list(ctx, manager.GetCache()) }))
	}
	if err != nil {
		return err
	}
	if act == nil {
		return fmt.Errorf("PROBE=%s: no such probe", probe)
	}
	isMeant := predicate.NewPredicateFuncs(func(object client.Object) bool {
		return !labelled || object.GetLabels()["probe"] == probe
	})
	controller := ctrl.NewControllerManagedBy(manager).For(&corev1.ConfigMap{}, builder.WithPredicates(isMeant))
	if probe == "owns" {
		controller = controller.Owns(&corev1.ConfigMap{})
	}
	err = controller.Complete(reconcileFunc(p, act))
	if err != nil {
		return err
	}
	if err := manager.Start(ctx); err != nil {
		return err
	}
	if probe == "stop" {
		return p.put(context.Background(), "stopped", nil)
	}
	return nil
}

// runnable waits for the cache and runs once.
type runnable func(context.Context) error

func (r runnable) Start(ctx context.Context) error { return r(ctx) }

type reconcileOne struct {
	*prober
	act reconcile
}

func reconcileFunc(p *prober, act reconcile) *reconcileOne { return &reconcileOne{p, act} }

// Reconcile reads the object and acts upon it.
func (r *reconcileOne) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	var object corev1.ConfigMap
	if err := r.Get(ctx, request.NamespacedName, &object); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	return r.act(ctx, &object)
}

func main() {
	ctrl.SetLogger(zap.New())
	if err := run(os.Getenv("PROBE")); err != nil {
		ctrl.Log.Error(err, "go-probe ends")
		os.Exit(1)
	}
}
