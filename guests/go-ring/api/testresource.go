// Package api is the custom resource testresources.amurant.io.
package api

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// TestResource is a number that travels.
type TestResource struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              TestResourceSpec `json:"spec"`
}

// TestResourceSpec is what the operators change.
type TestResourceSpec struct {
	// Nonce is the number. The sample operators only ever raise it.
	Nonce int64 `json:"nonce"`
	// UpdatedAt is when one of them last wrote it (RFC 3339).
	UpdatedAt string `json:"updated_at,omitempty"`
}

// TestResourceList is a list of them.
type TestResourceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []TestResource `json:"items"`
}

// DeepCopyObject copies it, as caches must.
func (in *TestResource) DeepCopyObject() runtime.Object {
	out := *in
	in.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	return &out
}

// DeepCopyObject copies it.
func (in *TestResourceList) DeepCopyObject() runtime.Object {
	out := *in
	in.ListMeta.DeepCopyInto(&out.ListMeta)
	out.Items = make([]TestResource, len(in.Items))
	for i := range in.Items {
		out.Items[i] = *in.Items[i].DeepCopyObject().(*TestResource)
	}
	return &out
}

// AddToScheme makes the types known to a client.
func AddToScheme(scheme *runtime.Scheme) error {
	version := schema.GroupVersion{Group: "amurant.io", Version: "v1"}
	scheme.AddKnownTypes(version, &TestResource{}, &TestResourceList{})
	metav1.AddToGroupVersion(scheme, version)
	return nil
}
