// Command go-ring copies the nonce of every TestResource from one namespace to the next.
//
// Several of them, each from namespace i to i + 1 and the last one back to the first, make a ring
// round which a nonce travels once: a copy only ever raises it. IN_NAMESPACE and OUT_NAMESPACE say
// from where and to where (default).
//
// This is an ordinary program on controller-runtime: `go run .` works as well.
package main

import (
	"context"
	"os"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"wasm-operator.invalid/go-ring/api"
)

type ring struct {
	client.Client
	target string
}

// Reconcile brings an object's nonce to the object of the same name in the target namespace.
func (r *ring) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	var source api.TestResource
	if err := r.Get(ctx, request.NamespacedName, &source); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	spec := api.TestResourceSpec{Nonce: source.Spec.Nonce, UpdatedAt: time.Now().UTC().Format(time.RFC3339Nano)}
	target := &api.TestResource{ObjectMeta: metav1.ObjectMeta{Namespace: r.target, Name: source.Name}}
	err := r.Get(ctx, client.ObjectKeyFromObject(target), target)
	switch {
	case apierrors.IsNotFound(err):
		target.Spec = spec
		err = r.Create(ctx, target)
	case err == nil && target.Spec.Nonce >= spec.Nonce:
		return ctrl.Result{}, nil
	case err == nil:
		target.Spec = spec
		err = r.Update(ctx, target)
	}
	if err == nil {
		ctrl.LoggerFrom(ctx).Info("copied", "nonce", spec.Nonce, "to", r.target)
	}
	return ctrl.Result{}, err
}

func variable(name string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return "default"
}

func run() error {
	scheme := runtime.NewScheme()
	utilruntime.Must(api.AddToScheme(scheme))
	source, target := variable("IN_NAMESPACE"), variable("OUT_NAMESPACE")
	manager, err := ctrl.NewManager(ctrl.GetConfigOrDie(), ctrl.Options{
		Scheme:  scheme,
		Metrics: metricsserver.Options{BindAddress: "0"},
		Cache:   cache.Options{DefaultNamespaces: map[string]cache.Config{source: {}}},
		// The target is read where it is, as the other samples do.
		Client: client.Options{Cache: &client.CacheOptions{DisableFor: []client.Object{&api.TestResource{}}}},
	})
	if err != nil {
		return err
	}
	reconciler := &ring{Client: manager.GetClient(), target: target}
	if err := ctrl.NewControllerManagedBy(manager).For(&api.TestResource{}).Complete(reconciler); err != nil {
		return err
	}
	return manager.Start(ctrl.SetupSignalHandler())
}

func main() {
	ctrl.SetLogger(zap.New())
	if err := run(); err != nil {
		ctrl.Log.Error(err, "go-ring ends")
		os.Exit(1)
	}
}
